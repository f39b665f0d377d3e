"""What was earned in a job, read from the tables as `core/rewards.py` counts it."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, func, select, update

from trainchain.core.hub import schema
from trainchain.core.rewards import NEVER, Earned
from trainchain.core.states import Audit

COUNTED = func.coalesce(schema.contributions.c.merged_in, schema.contributions.c.round)
"""The round whose settlement pays a contribution."""


def earned(
    db: Connection, job_id: str, worker: str | None = None, *, shards: int = 0, fees: int = 0
) -> dict[Earned, int | None]:
    """All that was accepted in a job, of all workers or of one, each with the settlement that pays it, sent or about to
    be; of shards and of replays' fees only those beyond a place."""
    work, replays, audits = schema.contributions.c, schema.replays.c, schema.audits.c
    never = (func.coalesce(work.resolved, NEVER), func.coalesce(work.forfeited, NEVER))
    mine = select(work.round, work.shard, work.worker, work.place, work.reward, COUNTED, *never, work.settled_in)
    mine = mine.where(work.job == job_id, work.place > shards)
    paid = select(audits.round, audits.shard, replays.auditor, replays.place, replays.fee, replays.counted)
    paid = paid.add_columns(func.coalesce(replays.forfeited, NEVER), replays.settled_in)
    paid = paid.join(schema.audits, audits.lease == replays.audit)
    paid = paid.where(replays.job == job_id, replays.place > fees)
    if worker is not None:
        mine, paid = mine.where(work.worker == worker), paid.where(replays.auditor == worker)
    found: dict[Earned, int | None] = {}
    for *fields, number in db.execute(mine):
        round_, shard, who, place, amount, counted, resolved, forfeited = fields
        found[Earned(round_, shard, who, place, amount, counted, "shard", resolved, forfeited)] = number
    for *fields, number in db.execute(paid):
        round_, shard, who, place, amount, counted, forfeited = fields
        found[Earned(round_, shard, who, place, amount, counted, "replay", 0, forfeited)] = number
    return found


def rejections(db: Connection, job_id: str, worker: str) -> list[dict[str, Any]]:
    """What verdicts against a worker cost it in a job, in their order: its places from the first to the last, and the
    lease whose evidence says why. Each took all that had been accepted and not vested by then."""
    work, audits = schema.contributions.c, schema.audits.c
    failed = select(audits.lease, audits.code, audits.evidence, audits.decided).order_by(audits.decided)
    failed = failed.where(audits.job == job_id, audits.worker == worker, audits.state == Audit.FAILED)
    lost = select(work.place, work.accepted).order_by(work.place)
    lost = lost.where(work.job == job_id, work.worker == worker, work.forfeited.is_not(None))
    found, left = [], [(place, accepted) for place, accepted in db.execute(lost)]
    for lease, code, evidence, decided in db.execute(failed):
        places = [place for place, accepted in left if accepted <= decided]
        left = left[len(places) :]
        if places:
            why = {"lease": lease, "code": code, "evidence": evidence}
            found.append({"first": places[0], "last": places[-1], **why})
    return found


def waits(db: Connection, job_id: str, worker: str) -> int | None:
    """The first place of a worker's in a job that has no verdict yet: nothing vests from there on."""
    work = schema.contributions.c
    pending = select(func.min(work.place)).where(work.job == job_id, work.worker == worker)
    first: int | None = db.execute(pending.where(work.resolved.is_(None), work.forfeited.is_(None))).scalar()
    return first


def mark(db: Connection, job_id: str) -> tuple[int, ...]:
    """Changes with whatever can change what the next settlement of a given number pays, and costs little to ask."""
    work, replays = schema.contributions.c, schema.replays.c
    ours = select(func.count(work.resolved), func.count(work.forfeited), func.count(work.settled_in))
    fees = select(func.count(replays.place), func.count(replays.forfeited), func.count(replays.settled_in))
    first, then = db.execute(ours.where(work.job == job_id)).one(), db.execute(fees.where(replays.job == job_id)).one()
    return (*first, *then)


def following(db: Connection, job_id: str) -> int:
    """The number of the first settlement that can know of what is written now: one on from the last that is."""
    table = schema.settlements
    return (db.execute(select(func.max(table.c.round)).where(table.c.job == job_id)).scalar() or 0) + 1


def settle(db: Connection, job_id: str, rows: Iterable[Earned], number: int) -> None:
    """Note which settlement pays these."""
    for row in rows:
        if row.kind == "shard":
            table, mine = schema.contributions, schema.contributions.c.worker
        else:
            table, mine = schema.replays, schema.replays.c.auditor
        here = (table.c.job == job_id) & (mine == row.worker) & (table.c.place == row.place)
        db.execute(update(table).where(here).values(settled_in=number))


def unsettle(db: Connection, job_id: str, number: int) -> None:
    """Forget that settlements from `number` on pay anything. The one made in their place knows all that is known by
    now: what only those after them were to know of is dated back to it, or a verdict could overtake another."""
    for table, names in (
        (schema.contributions, ("resolved", "forfeited")),
        (schema.replays, ("counted", "forfeited")),
    ):
        db.execute(update(table).where(table.c.job == job_id, table.c.settled_in >= number).values(settled_in=None))
        for name in names:
            db.execute(update(table).where(table.c.job == job_id, table.c[name] > number).values({name: number}))
