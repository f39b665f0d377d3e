"""A wallet's ledger: one line for each accepted shard, and what became of its pay. The parts add up to the amount."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from trainchain.core.errors import TrainChainError
from trainchain.core.money import show
from trainchain.core.rewards import VESTING

if TYPE_CHECKING:
    from trainchain.cli.survey import Found, Survey
    from trainchain.core.history import Receipt
    from trainchain.core.worker.paybook import Papers

PARTS = ("accepted", "vesting", "settling", "claimable", "claimed")


@dataclass(frozen=True)
class Line:
    """Pay vests, is settled and paid in the order of acceptance here: `place` is the shard's in its wallet's queue.
    `accepted` is the whole amount, `settling` what has vested and cannot be claimed yet; `receipt` is where it lies on
    this disk, "" where another machine of the wallet has it; `at` when it was accepted."""

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
    vesting: int
    settling: int
    claimable: int
    claimed: int
    reason: str
    receipt: str

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
    """One line for each shard, amounts in tokens; the last line end is left to who prints it."""
    out = io.StringIO()
    names = [
        "accepted_at", "hub", "job", "name", "round", "shard", "place", "lease", "token", *PARTS, "reason", "receipt",
    ]  # fmt: skip
    table = csv.DictWriter(out, names, lineterminator="\n")
    table.writeheader()
    for row in rows:
        at = datetime.fromtimestamp(row.at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        values = {**row.document(), **{part: show(getattr(row, part)) for part in PARTS}, "accepted_at": at}
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
    return _divide(list(shards.values()), shared, marks, settling, away)


def _unasked(papers: Papers, job: str, why: str) -> list[Line]:
    """Nobody can say what of it was paid: what has vested counts as not to be had now."""
    shared: dict[str, Any] = {"job": job, "name": job[:12], "hub": "", "token": ""}
    shards = [_of_receipt(papers, receipt) for receipt in papers.receipts(job)]
    return _divide(
        shards, shared, (0, 0, papers.vested(job)), f"vested; what was settled or paid is not known: {why}", ""
    )


def _of_receipt(papers: Papers, receipt: Receipt) -> dict[str, Any]:
    path = papers.path(receipt)
    return {
        "round": receipt.round, "shard": receipt.shard, "place": receipt.place, "lease": receipt.lease,
        "accepted": receipt.amount, "receipt": str(path), "at": path.stat().st_mtime,
    }  # fmt: skip


def _divide(
    shards: list[dict[str, Any]], shared: dict[str, Any], marks: tuple[int, int, int], settling: str, away: str
) -> list[Line]:
    """Lay what was paid, can be claimed and has vested, each cumulative, over the shards in their order."""
    shards.sort(key=lambda shard: shard["place"])
    newest = max((shard["place"] for shard in shards), default=0)
    found, begin = [], 0
    for shard in shards:
        end, cuts = begin + shard["accepted"], [begin]
        for mark in marks:
            cuts.append(min(end, max(mark, cuts[-1])))
        claimed, claimable, vested = (after - before for before, after in pairwise(cuts))
        vesting = end - cuts[-1]
        reason = ""
        if vesting:
            reason = waits(max(1, shard["place"] + VESTING - newest)) + away
        elif vested:
            reason = settling + away
        elif claimable:
            reason = "claim not sent yet: trainchain claim"
        parts = {"vesting": vesting, "settling": vested, "claimable": claimable, "claimed": claimed}
        found.append(Line(**shared, **shard, **parts, reason=reason))
        begin = end
    return found
