"""A wallet's ledger: one line for each accepted shard and one for a job's fees for replays, and what became of that
pay. The parts add up to the amount."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from trainchain.core.errors import TrainChainError
from trainchain.core.money import show
from trainchain.core.rewards import FEES_VESTING, VESTING

if TYPE_CHECKING:
    from trainchain.cli.survey import Found, Survey
    from trainchain.core.history import Receipt
    from trainchain.core.messages import Lost, Verdicts
    from trainchain.core.worker.paybook import Papers

PARTS = ("accepted", "forfeited", "held", "vesting", "settling", "claimable", "claimed")
CLAIM = "claim not sent yet: trainchain claim"


@dataclass(frozen=True)
class Line:
    """Pay vests, is settled and paid in the order of acceptance here: `place` is the shard's in its wallet's queue.
    `accepted` is the whole amount, `held` what waits for a verdict, `settling` what has vested and cannot be claimed
    yet; `receipt` is where it lies on this disk, "" where another machine of the wallet has it; `at` when it was
    accepted. A line of fees is of so many `replays`, the last of them done `at`, and of no shard."""

    job: str
    name: str
    hub: str
    token: str
    round: int
    shard: int
    place: int
    lease: str
    at: float
    accepted: int
    forfeited: int
    held: int
    vesting: int
    settling: int
    claimable: int
    claimed: int
    reason: str
    receipt: str
    replays: int = 0

    @property
    def day(self) -> str:
        return datetime.fromtimestamp(self.at, UTC).strftime("%Y-%m-%d")

    @property
    def state(self) -> str:
        """Where the part of it is that is furthest from being paid: what `reason` is about."""
        return next((part for part in PARTS[1:-1] if getattr(self, part)), PARTS[-1])

    def document(self) -> dict[str, Any]:
        return {**asdict(self), **{part: str(getattr(self, part)) for part in PARTS}}


def lines(known: Survey) -> list[Line]:
    """Of every job; of one whose chain cannot be asked by what lies on this disk."""
    found = [line for one in known.found for line in _lines(known.papers, one)]
    asked = {one.job for one in known.found}
    why = {failure.what: failure.error.message for failure in known.failures}
    for job in known.missed:
        if job not in asked:
            found += _unasked(known.papers, job, why.get(job, "its chain cannot be asked now"))
    return found


def disagreements(known: Survey) -> list[tuple[str, TrainChainError]]:
    """What a hub that answers tells otherwise than it signed, by job."""
    found = []
    for one in known.found:
        if not one.source.heard:
            continue
        told = {row["lease"]: row for row in one.source.earned.get(one.job, {}).get("shards", [])}
        for receipt in known.papers.receipts(one.job):
            row = told.get(receipt.lease)
            if row is None or (row["amount"], row["place"]) != (str(receipt.amount), receipt.place):
                says = "nothing of it" if row is None else f"{show(int(row['amount']))} TRAIN at place {row['place']}"
                message = (
                    f"The hub signed a receipt over {show(receipt.amount)} TRAIN at place {receipt.place}, "
                    f"{known.papers.path(receipt)}, and now tells {says}."
                )
                hint = "Stop working for this hub, and keep the receipt; vouchers are paid without it."
                found.append((one.job, TrainChainError("receipt.invalid", message, hint=hint)))
    return found


def as_csv(rows: Iterable[Line]) -> str:
    """One line for each shard and for a job's fees, amounts in tokens; the last line end is left to who prints it."""
    out = io.StringIO()
    names = [
        "accepted_at", "hub", "job", "name", "round", "shard", "place", "lease", "replays", "token", *PARTS, "reason",
        "receipt",
    ]  # fmt: skip
    table = csv.DictWriter(out, names, lineterminator="\n")
    table.writeheader()
    for row in rows:
        at = datetime.fromtimestamp(row.at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        values = {**row.document(), **{part: show(getattr(row, part)) for part in PARTS}, "accepted_at": at}
        if row.replays:
            values |= dict.fromkeys(("round", "shard", "place"), "")
        table.writerow({name: values[name] for name in names})
    return out.getvalue().rstrip("\n")


def sums(rows: Iterable[Line]) -> dict[str, int]:
    """Each part of all of them."""
    kept = list(rows)
    return {part: sum(getattr(row, part) for row in kept) for part in PARTS}


def waits(more: int) -> str:
    """How long pay that is `more` accepted shards from vesting waits."""
    return f"vests after {more} more accepted shard{'s' if more != 1 else ''}, or when the job ends"


def _lines(papers: Papers, one: Found) -> list[Line]:
    standing = one.standing
    ready = standing.paid + standing.claimable
    marks = standing.paid, ready, max(ready, standing.pending, one.vested)
    settling = one.why or "vested, not settled yet"
    away = "" if one.source.heard else "; by what lies on this disk: the hub does not answer"
    shards = {receipt.lease: _of_receipt(papers, receipt) for receipt in papers.receipts(one.job)}
    for row in one.source.earned.get(one.job, {}).get("shards", []):
        here = shards.get(row["lease"], {})
        shards[row["lease"]] = {
            "round": row["round"], "shard": row["shard"], "place": row["place"], "lease": row["lease"],
            "accepted": int(row["amount"]), "receipt": "", **here, "at": float(row["accepted"]),
        }  # fmt: skip
    shared: dict[str, Any] = {"job": one.job, "name": one.name, "hub": one.source.url, "token": standing.job.token}
    fees = one.source.earned.get(one.job, {}).get("fees", {"replays": 0, "vested": 0})
    found = _divide(
        list(shards.values()), shared, _but(marks, int(fees["vested"]), one.vested), settling, away, one.verdicts
    )
    return [*found, *_fees(fees, shared, marks, settling, one.vested)] if fees["replays"] else found


def _but(marks: tuple[int, int, int], fees: int, vested: int) -> tuple[int, int, int]:
    """The part of cumulative amounts that is of shards: fees are paid last of what vested with them."""
    first, second, third = (min(mark, max(0, vested - fees)) if fees else mark for mark in marks)
    return first, second, third


def _fees(
    fees: dict[str, Any], shared: dict[str, Any], marks: tuple[int, int, int], settling: str, vested: int
) -> list[Line]:
    """What replays for others earned, in one line."""
    ripe, lost = int(fees["vested"]), int(fees["forfeited"])
    paid, ready, whole = (mark - part for mark, part in zip(marks, _but(marks, ripe, vested), strict=True))
    paid, ready, whole = min(paid, ripe), min(ready, ripe), min(max(whole, ready), ripe)
    parts: dict[str, Any] = {
        "forfeited": lost,
        "held": 0,
        "vesting": int(fees["accepted"]) - lost - whole,
        "settling": whole - ready,
        "claimable": ready - paid,
        "claimed": paid,
    }
    reasons = {
        "forfeited": "a replay was proven wrong",
        "vesting": f"vests after {FEES_VESTING} more replays at the latest, or when the job ends",
        "settling": settling,
        "claimable": CLAIM,
    }
    line = Line(
        **shared, round=0, shard=0, place=0, lease="", at=fees["last"] or 0.0, accepted=int(fees["accepted"]),
        **parts, reason="", receipt="", replays=int(fees["replays"]),
    )  # fmt: skip
    return [replace(line, reason=reasons.get(line.state, ""))]


def _unasked(papers: Papers, job: str, why: str) -> list[Line]:
    """Nobody can say what of it was paid: what has vested counts as not to be had now."""
    shared: dict[str, Any] = {"job": job, "name": job[:12], "hub": "", "token": ""}
    shards = [_of_receipt(papers, receipt) for receipt in papers.receipts(job)]
    settling = f"vested; what was settled or paid is not known: {why}"
    return _divide(shards, shared, (0, 0, papers.vested(job)), settling, "", papers.verdicts(job))


def _of_receipt(papers: Papers, receipt: Receipt) -> dict[str, Any]:
    path = papers.path(receipt)
    return {
        "round": receipt.round, "shard": receipt.shard, "place": receipt.place, "lease": receipt.lease,
        "accepted": receipt.amount, "receipt": str(path), "at": path.stat().st_mtime,
    }  # fmt: skip


def _divide(
    shards: list[dict[str, Any]],
    shared: dict[str, Any],
    marks: tuple[int, int, int],
    settling: str,
    away: str,
    verdicts: Verdicts,
) -> list[Line]:
    """Lay what was paid, can be claimed and has vested, each cumulative, over the shards in their order, but for those
    that are forfeited."""
    shards.sort(key=lambda shard: shard["place"])
    newest = max((shard["place"] for shard in shards), default=0)
    found, begin = [], 0
    for shard in shards:
        parts: dict[str, Any] = dict.fromkeys(PARTS[1:], 0)
        lost = verdicts.lost(shard["place"])
        if lost is not None:
            parts["forfeited"] = shard["accepted"]
            found.append(Line(**shared, **shard, **parts, reason=_why_lost(shared["job"], shard, lost)))
            continue
        end, cuts = begin + shard["accepted"], [begin]
        for mark in marks:
            cuts.append(min(end, max(mark, cuts[-1])))
        parts["claimed"], parts["claimable"], parts["settling"] = (after - before for before, after in pairwise(cuts))
        held = verdicts.waits is not None
        parts["held" if held else "vesting"] = end - cuts[-1]
        reason = ""
        if held and parts["held"]:
            reason = f"held until the audit of the shard at place {verdicts.waits} has its verdict" + away
        elif parts["vesting"]:
            reason = waits(max(1, shard["place"] + VESTING - newest)) + away
        elif parts["settling"]:
            reason = settling + away
        elif parts["claimable"]:
            reason = CLAIM
        found.append(Line(**shared, **shard, **parts, reason=reason))
        begin = end
    return found


def _why_lost(job: str, shard: dict[str, Any], lost: Lost) -> str:
    with_ = "" if lost.lease == shard["lease"] else "lost with another, "
    return f"{with_}rejected ({lost.code}): trainchain jobs show {job[:12]} --evidence {lost.lease}"
