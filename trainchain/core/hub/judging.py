"""Whether a round's merge may stand: it is measured on held-out data and, where that fails, taken apart.

A candidate is the round's adapter without some contributions; the first leaves out none. Where the best so far fails,
each one is measured that leaves out one more, and the best of those goes on if it is better. What is known stands in
the table of evaluations, the candidates are objects: a hub that was killed goes on where it was.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, delete, insert, select, update

from trainchain.core.adapter import Adapter
from trainchain.core.hub import schema
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import Row, one, record
from trainchain.core.merge.updates import Update, likeness
from trainchain.core.models import ResolvedRecipe
from trainchain.core.states import Evaluation, Round

PATIENCE = 120.0
"""Seconds for which a round waits for somebody who measures."""
MOST_TRIED = 16
MOST_LEFT_OUT = 4
WHY = "leave-one-out"
REJECTED = "rejected"


class Candidate(NamedTuple):
    """An adapter that a round may be merged to: made of all but the contributions `left_out`, by their digests."""

    left_out: tuple[str, ...]
    adapter: str
    outer_step: str
    sizes: dict[str, int]
    """Of both objects, by their digests."""
    error: float
    seconds: float
    shares: dict[str, dict[str, Any]]
    """What became of each contribution in the merge, by its digest."""
    rejected: tuple[str, ...] = ()
    """Those that an audit had rejected when it was made: as if they had never come."""

    @property
    def used(self) -> list[str]:
        """What a candidate can be without: the merge made something of it."""
        return [digest for digest, share in self.shares.items() if share["weight"] * share["scale"] > 0]


class Found(NamedTuple):
    """A candidate as it was measured: `loss` is None where nobody did."""

    candidate: Candidate
    loss: float | None


class Verdict(NamedTuple):
    """What to do next: settle on `chosen`, which held, failed or went unjudged, as `why` says; or make and measure
    `wanted`; neither is to wait."""

    chosen: Found | None = None
    wanted: Sequence[tuple[str, ...]] = ()
    why: str = ""


def judge(found: Sequence[Found], limit: float | None, *, waiting: bool, patient: bool) -> Verdict:
    """Where a round stands whose held-out loss may be `limit` at most (None: nobody measured its start).

    `waiting` is whether something is not measured yet; once nobody is `patient` any more it never will be.
    """
    if not found:
        return Verdict(wanted=[()])
    if waiting and patient:
        return Verdict()
    best = found[0]
    if limit is None or best.loss is None:
        return Verdict(best, why="unjudged")
    while best.loss is not None and best.loss > limit:
        left_out = best.candidate.left_out
        tried = [one for one in found if one.candidate.left_out[:-1] == left_out and one.candidate.left_out]
        if not tried and not waiting and len(left_out) < MOST_LEFT_OUT and _can_lose_one(best.candidate):
            return Verdict(wanted=[(*left_out, digest) for digest in best.candidate.used])
        measured = [one for one in tried if one.loss is not None and one.loss < best.loss]
        if not measured:
            return Verdict(best, why="unjudged" if waiting else "failed")
        best = min(measured, key=lambda one: (one.loss, one.candidate.left_out))
    return Verdict(best, why="held")


def _can_lose_one(candidate: Candidate) -> bool:
    """Whether with one less more than half of the round's contributions remain, and something to merge."""
    every = len(candidate.shares) + len(candidate.left_out)
    return 2 * (len(candidate.shares) - 1) > every and len(candidate.used) > 1


def oddest(start: Adapter, updates: Sequence[Update], wanted: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Of all that could be left out next, those that are least like what the others add up to."""
    found = likeness(start, updates)
    return sorted(wanted, key=lambda left_out: (found[left_out[-1]], left_out))[:MOST_TRIED]


def look(hub: Hub, recipe: ResolvedRecipe, round_: Row) -> Verdict:
    """What to do next about a round that is merging, by what the table says."""
    rows, share, now = _rows(hub, round_), recipe.merge.leave_one_out or 0.0, hub.clock()
    with hub.store.read() as db:
        base = one(db, schema.evaluations, job=round_["job"], round=round_["round"] - 1, adapter=round_["start"])
    every = [row for row in (base, *rows) if row is not None]
    states = {row["state"] for row in every}
    waiting = states != {Evaluation.DONE}
    patient = Evaluation.LEASED in states or now - max((row["at"] for row in every), default=now) <= PATIENCE
    limit = base["loss"] * (1 + share) if base is not None and base["loss"] is not None else None
    found = [Found(_candidate(row["merge"]), row["loss"]) for row in rows]
    return judge(found, limit, waiting=waiting, patient=patient)


def _candidate(kept: Mapping[str, Any]) -> Candidate:
    return Candidate(**{**kept, **{name: tuple(kept[name]) for name in ("left_out", "rejected")}})


def _rows(hub: Hub, round_: Row) -> list[Row]:
    table = schema.evaluations
    query = select(table).where(table.c.job == round_["job"], table.c.round == round_["round"])
    with hub.store.read() as db:
        return list(db.execute(query.order_by(table.c.candidate)).mappings())


def ask(hub: Hub, round_: Row, candidates: Sequence[Candidate]) -> bool:
    """Have candidates measured, all or none of them."""
    now, job = hub.clock(), round_["job"]
    with hub.store.write() as db:
        fresh = one(db, schema.rounds, job=job, round=round_["round"])
        if fresh is None or fresh["state"] != Round.MERGING:
            return False
        table = schema.evaluations
        number = len(db.execute(select(table.c.candidate).where(_of(round_))).all())
        for at, candidate in enumerate(candidates, number):
            values = {"job": job, "round": round_["round"], "candidate": at, "adapter": candidate.adapter, "at": now}
            db.execute(insert(table).values(state=str(Evaluation.OPEN), merge=candidate._asdict(), **values))
            name_objects(db, job, candidate, public=False)
        record(db, job, f"round/{round_['round']}", "judging", now, {"candidates": len(candidates)})
    return True


def settle(db: Connection, round_: Row, chosen: Candidate) -> list[str]:
    """Forget what was only tried and is not the round's; returns the digests of these adapters and steps. What was
    measured of them stays told."""
    objects, rounds, table = schema.objects, schema.rounds, schema.evaluations
    tried = select(table.c.adapter, table.c.merge).where(_of(round_), table.c.adapter != chosen.adapter)
    others = {digest for row in db.execute(tried) for digest in row.merge["sizes"]} - chosen.sizes.keys()
    db.execute(delete(table).where(_of(round_), table.c.adapter.in_(others), table.c.state != Evaluation.DONE))
    others -= set(db.execute(select(rounds.c.start).where(rounds.c.job == round_["job"])).scalars())
    db.execute(delete(objects).where(objects.c.job == round_["job"], objects.c.digest.in_(others)))
    left_out, rejected = ({"weight": 0.0, "scale": 1.0, "why": why} for why in (WHY, REJECTED))
    gone = {**dict.fromkeys(chosen.left_out, left_out), **dict.fromkeys(chosen.rejected, rejected)}
    for digest, share in {**chosen.shares, **gone}.items():
        given = (schema.contributions.c.job == round_["job"], schema.contributions.c.delta == digest)
        db.execute(update(schema.contributions).where(*given).values(merge=share))
    return sorted(others)


def name_objects(db: Connection, job: str, candidate: Candidate, *, public: bool) -> None:
    """Write down the objects of a candidate, or that they are public now: no worker's upload any more, if one was."""
    for digest, size in candidate.sizes.items():
        here = {"digest": digest, "job": job}
        if (row := one(db, schema.objects, **here)) is None:
            db.execute(insert(schema.objects).values(size=size, public=public, present=True, **here))
        else:
            given = (schema.objects.c.job == job, schema.objects.c.digest == digest)
            db.execute(update(schema.objects).where(*given).values(public=row["public"] or public, lease=None))


def _of(round_: Row) -> Any:
    table = schema.evaluations
    return (table.c.job == round_["job"]) & (table.c.round == round_["round"])
