"""Draws that fell on work handed in from this disk. It is kept until its verdict, and what the hub wants of it is
answered from here, also after a kill or a reboot. Imports numpy, and no torch."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import Field

from trainchain.core.adapter import read_adapter, tensor_specs
from trainchain.core.client import HubClient
from trainchain.core.encodings import decode
from trainchain.core.errors import TrainChainError
from trainchain.core.history import Told
from trainchain.core.messages import Answer, Draw, Lease, Opening
from trainchain.core.models import Address, Amount, Count, Digest, Hash32, Model, Positive, ResolvedRecipe, parse
from trainchain.core.segments import StateDigests, leaf, proof, start_state, state_digests
from trainchain.core.settings import private_folder, sync_folder, write_private
from trainchain.core.states import PENDING, Audit
from trainchain.core.worker.bench import DRAW, remove
from trainchain.core.worker.cache import Cache
from trainchain.core.worker.faults import AWAY
from trainchain.core.worker.paybook import Ties
from trainchain.core.worker.starts import Start, fetch_start

INDEX = "segments.jsonl"
"""What the trainer wrote of a shard's states (core/train/journal.py)."""
LOCK = ".handing-in"
FINAL = frozenset({"audit.none", "audit.too_late", "audit.answer_invalid", "state.invalid"})
"""Refusals that stay. After any other an answer is tried again, since silence costs as much as a forged shard."""
FIRST_WAIT, LONGEST_WAIT = 2.0, 300.0
"""Seconds between two tries of one answer, each twice the one before."""


class Handed(Model):
    """What was handed in from a place, written before it leaves: nothing can be drawn that is not kept."""

    chain_id: int
    escrow: Address
    hub: Address
    lease: Lease
    patience: Positive
    """Seconds that a worker has to answer."""
    answer: Answer | None = None
    """What the draw wants opened; None until it is known that one fell on it."""


class Audited(Told):
    """How one of this wallet's audits stands, as the hub says."""

    lease: Hash32
    job: Hash32
    round: Positive
    shard: Count
    segment: Count
    state: Audit
    wants: list[Count]
    answer_by: Annotated[float, Field(ge=0, le=1e11)]
    code: str | None
    evidence: Digest | None


class Lost(Told):
    """Of an evidence document, what it cost."""

    class Forfeit(Told):
        amount: Amount

    forfeits: Forfeit | None


class Answers:
    """All places of a home, whichever device they were trained on. Several workers of the home may look at once: one
    of them then does what is due."""

    def __init__(
        self,
        client: HubClient,
        folder: Path,
        cache: Cache,
        ties: Ties,
        on_event: Callable[..., None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._client, self._folder, self._cache, self._ties = client, folder, cache, ties
        self._tell, self._now = on_event, now
        self.sent = 0
        """Bytes of the states that were handed in."""
        self._refused: dict[tuple[str, tuple[int, ...]], tuple[float, float]] = {}
        """What was refused: when it is tried again, and how long is waited after that."""
        self._waits: list[tuple[Audited, Handed]] = []
        self._told: set[str] = set()
        self._unread: set[Path] = set()

    @contextmanager
    def handing_in(self, place: Path, lease: Lease, recipe: ResolvedRecipe) -> Iterator[None]:
        """While a contribution is on its way; whatever interrupts it, its states are kept until the hub has said
        whether it is drawn."""
        if not recipe.audited:
            yield
            return
        ties = self._ties
        with FileLock(place / LOCK, mode=0o600):
            note = Handed(
                chain_id=ties.chain_id, escrow=ties.escrow, hub=ties.hub, lease=lease, patience=recipe.check.answer
            )
            _write(place, note)
            for folder in (place.parent, place.parent.parent):
                sync_folder(folder)
            yield

    def keep(self, place: Path, recipe: ResolvedRecipe, start: Start, drawn: Any) -> bool:
        """Take the hub's word on the draw, within `handing_in`; whether it fell on this work, which then stays."""
        note = _read(place)
        if drawn is None or note is None:
            return False
        draw = parse(Draw, drawn, code="hub.not_a_hub", what="The draw")
        self._opened(place, note, draw.segment, recipe, start)
        remove(place / "out")
        kept = {draw.segment, draw.segment + 1, recipe.segments}
        for path in (place / "states").glob("state-*.safetensors"):
            if path not in {_state(place, index) for index in kept}:
                path.unlink(missing_ok=True)
        self._tell("drawn", **_place_of(note.lease), segment=draw.segment, at_risk=draw.at_risk)
        return True

    def look_after(self) -> bool:
        """Ask how what is kept here stands, answer what is wanted, tell of verdicts; whether one is still due."""
        kept = list(self._kept())
        if not kept:
            return False
        with suppress(Timeout), FileLock(private_folder(self._folder) / ".answers", mode=0o600, timeout=0):
            try:
                found = self._client.get("/v1/audits", signed=True).get("audits")
                if not isinstance(found, list):
                    raise TrainChainError("hub.not_a_hub", "The hub does not list the audits of this wallet's work.")
                rows = [parse(Audited, _plain(row), code="hub.not_a_hub", what="An audit") for row in found]
                by_lease = {row.lease: row for row in rows}
                self._waits = [
                    pair for place, note in kept for pair in self._look(place, note, by_lease.get(note.lease.lease))
                ]
            except TrainChainError as error:
                if error.code not in AWAY:
                    raise
                self._tell("away", code=error.code, message=error.message)
                return True
        return any(True for _ in self._kept())

    def tell_waiting(self) -> None:
        """Say what is waited for before the worker ends, and until when it can be left alone; once each."""
        if not self._waits or self._told >= {row.lease for row, _ in self._waits}:
            return
        self._told |= {row.lease for row, _ in self._waits}
        until = min(_until(row, note, self._now()) for row, note in self._waits)
        shards = [{"job": row.job, "round": row.round, "shard": row.shard} for row, _ in self._waits]
        self._tell("auditing", shards=shards, until=until)

    def _kept(self) -> Iterator[tuple[Path, Handed]]:
        """The places of this hub's work that a verdict may be due on."""
        for path in sorted(self._folder.glob(f"*/*/*/{DRAW}")):
            note = _read(path.parent)
            if note is None and path not in self._unread and path.exists():
                self._unread.add(path)
                error = _torn(path.parent, ValueError(f"{DRAW} is damaged"))
                told = {"code": error.code, "message": error.message, "hint": error.hint}
                self._tell("failed", lease=None, job=None, **told, unable=False)
            if note is not None and Ties(note.chain_id, note.escrow, note.hub) == self._ties:
                yield path.parent, note

    def _look(self, place: Path, note: Handed, row: Audited | None) -> Iterator[tuple[Audited, Handed]]:
        try:
            with FileLock(place / LOCK, mode=0o600, timeout=0):
                if _read(place) != note:
                    return  # another device has handed it in since the hub was asked
                if row is None:  # it never arrived, nothing was drawn, or the verdict is long past
                    (place / DRAW).unlink(missing_ok=True) if note.answer is None else remove(place)
                    return
        except (Timeout, OSError):
            return  # it is being handed in just now, or gone
        if row.state in PENDING:
            self._answer(place, note, row)
            yield row, note
            return
        remove(place)
        self._tell(
            "audited", **_place_of(note.lease), state=str(row.state), code=row.code, evidence=row.evidence,
            forfeited=self._lost(row), hint=f"trainchain jobs show {row.job[:12]} --evidence {row.lease}",
        )  # fmt: skip

    def _answer(self, place: Path, note: Handed, row: Audited) -> None:
        """Hand in what is wanted. Until when, the hub's clock says; after that the audit is drawn no more."""
        wanted = row.lease, tuple(row.wants)
        again, wait = self._refused.get(wanted, (-math.inf, FIRST_WAIT))
        if row.state != Audit.DRAWN or self._now() < again:
            return
        try:
            answer = note.answer or self._reopened(place, note, row)
            for index in row.wants:
                self._client.upload(f"/v1/leases/{row.lease}/states/{index}", _state(place, index))
                self.sent += _state(place, index).stat().st_size
            self._client.post(f"/v1/leases/{row.lease}/answer", answer.model_dump(mode="json"))
            self._tell("answered", **_place_of(note.lease), segment=row.segment, states=row.wants)
        except (TrainChainError, OSError, ValueError, KeyError) as error:
            known = error if isinstance(error, TrainChainError) else _torn(place, error)
            if known.code in AWAY:
                raise known from None
            over = known.code in FINAL and known is error
            self._refused[wanted] = (math.inf if over else self._now() + wait, min(2 * wait, LONGEST_WAIT))
            told = {"code": known.code, "message": known.message, "hint": known.hint}
            self._tell("failed", lease=row.lease, job=row.job, **told, unable=False)

    def _reopened(self, place: Path, note: Handed, row: Audited) -> Answer:
        """After a kill between the contribution and its answer: the hub told of the draw, and nobody heard it."""
        lease, cache = note.lease, self._cache
        known = cache.private(lease.job) if lease.job in cache.private_jobs() else cache
        data = known.read(lease.spec_hash) or self._client.object(lease.spec_hash)
        recipe = parse(ResolvedRecipe, data, code="job.invalid", what=f"The recipe of {lease.job}")
        start = fetch_start(known if recipe.private else cache, self._client, lease, recipe)
        return self._opened(place, note, row.segment, recipe, start)

    def _opened(self, place: Path, note: Handed, segment: int, recipe: ResolvedRecipe, start: Start) -> Answer:
        """The openings that a draw asks for, written down with what was handed in."""
        answer = openings(note.lease, _digests(place), start_digests(recipe, start), segment)
        _write(place, note.model_copy(update={"answer": answer}))
        return answer

    def _lost(self, row: Audited) -> str | None:
        """What a verdict cost; of a rejection its evidence says it, and None where that cannot be had."""
        if row.state != Audit.FAILED:
            return "0"
        try:
            found = self._client.get(f"/v1/jobs/{row.job}/evidence/{row.lease}", signed=True)
            lost = parse(Lost, found, code="hub.not_a_hub", what="The evidence").forfeits
        except TrainChainError:
            return None
        return str(lost.amount) if lost else None


def start_digests(recipe: ResolvedRecipe, start: Start) -> StateDigests:
    """Of the state that a shard started in, with the moments that were handed on to it."""
    w, way, moments = read_adapter(start.adapter), recipe.merge, None
    if way.hands_on and start.outer_step is not None:
        moments = decode(start.outer_step.read_bytes(), way.encoding, tensor_specs(w), moments=True).moments
    return state_digests(start_state(w, moments))


def openings(lease: Lease, ends: list[tuple[int, StateDigests]], start: StateDigests, segment: int) -> Answer:
    """Of the shard's start and end, and of both of a segment's."""
    if not 0 <= segment < len(ends):
        raise TrainChainError("state.invalid", f"Segment {segment} was drawn, and the shard has {len(ends)}.")
    states, lease_id = [(0, start), *ends], bytes.fromhex(lease.lease.removeprefix("0x"))
    leaves = [leaf(lease_id, index, t, digests) for index, (t, digests) in enumerate(states)]
    opened = []
    for index in sorted({0, segment, segment + 1, len(ends)}):
        w, m, v = ("0x" + digest.hex() for digest in states[index][1])
        path = ["0x" + node.hex() for node in proof(leaves, index)]
        opened.append(Opening(index=index, w=w, m=m, v=v, proof=path))
    return Answer(openings=opened)


def _digests(place: Path) -> list[tuple[int, StateDigests]]:
    """Steps and digests at each segment's end, as the trainer wrote them down."""
    lines = (place / "states" / INDEX).read_text(encoding="utf-8").splitlines()[1:]
    rows: list[Mapping[str, Any]] = [json.loads(line) for line in lines]
    return [(int(row["t"]), StateDigests(*(bytes.fromhex(digest) for digest in row["digests"]))) for row in rows]


def _state(place: Path, index: int) -> Path:
    return place / "states" / f"state-{index:05}.safetensors"


def _read(place: Path) -> Handed | None:
    try:
        return parse(Handed, (place / DRAW).read_bytes(), code="state.invalid", what="A draw kept here")
    except (OSError, TrainChainError):
        return None


def _write(place: Path, note: Handed) -> None:
    write_private(place / DRAW, note.model_dump_json(indent=1).encode())


def _until(row: Audited, note: Handed, now: float) -> float:
    """When the worker has to be back at the earliest: the hub may want the claimed end, too."""
    return row.answer_by if row.state == Audit.DRAWN else now + note.patience


def _place_of(lease: Lease) -> dict[str, Any]:
    return lease.model_dump(include={"lease", "job", "round", "shard"})


def _plain(row: Any) -> Any:
    """The state is a word of ours, or the row is none."""
    with suppress(ValueError, TypeError, KeyError):
        return {**row, "state": Audit(row["state"])}
    return row


def _torn(place: Path, error: Exception) -> TrainChainError:
    return TrainChainError(
        "state.invalid",
        f"What was kept in {place} to answer a draw cannot be read: {type(error).__name__}: {error}.",
        hint="The work will count as not answered. Look at the disk.",
    )
