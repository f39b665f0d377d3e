"""Settling: cumulative amounts of all merged rounds go on chain as a Merkle root. Safe to repeat.

The chain is asked outside any transaction; what it did is found again by (job, round, root).
"""

from sqlalchemy import insert, select, update

from trainchain.core.errors import TrainChainError
from trainchain.core.hub import jobs, keys, schema
from trainchain.core.hub.service import Hub, attempt
from trainchain.core.hub.store import Row, move, one, record
from trainchain.core.states import Job, Lease, Round

ENDED = (Job.FINISHED, Job.EXPIRED, Job.CANCELLED)
SETTLING = (Job.OPEN, Job.RUNNING, Job.UNFUNDED, *ENDED, Job.SETTLED)


def tick(hub: Hub) -> bool:
    """Settle what is due, look for money that unfunded jobs wait for; True if anything moved."""
    moved = False
    with hub.store.read() as db:
        query = select(schema.jobs).where(schema.jobs.c.state.in_(SETTLING))
        rows = list(db.execute(query).mappings())
    for job in rows:
        moved = attempt(_settle, hub, job) or moved
        if job["state"] == Job.UNFUNDED and job["deadline"] is not None:
            moved = attempt(_look_for_money, hub, job) or moved
    if moved:
        hub.bell.ring()
    return moved


def amounts(hub: Hub, job_id: str, through: int) -> dict[str, int]:
    """What each wallet has earned in rounds 1 to `through`: token units, cumulative."""
    query = select(schema.contributions.c.worker, schema.contributions.c.reward).where(
        schema.contributions.c.job == job_id, schema.contributions.c.round <= through
    )
    totals: dict[str, int] = {}
    with hub.store.read() as db:
        for worker, reward in db.execute(query):
            totals[worker] = totals.get(worker, 0) + reward
    return {worker: total for worker, total in totals.items() if total > 0}


def _due(hub: Hub, job: Row) -> int | None:
    """The round through which the job may be settled now, or None."""
    rounds, leases = schema.rounds, schema.leases
    with hub.store.read() as db:
        merged = db.execute(
            select(rounds.c.round)
            .where(rounds.c.job == job["id"], rounds.c.state == Round.MERGED)
            .order_by(rounds.c.round.desc())
            .limit(1)
        ).scalar()
        if job["state"] in (Job.EXPIRED, Job.CANCELLED):
            held = select(leases.c.id).where(leases.c.job == job["id"], leases.c.state == Lease.HELD)
            return None if db.execute(held.limit(1)).first() else int(job["round"])
    return int(merged) if merged is not None else None


def _settle(hub: Hub, job: Row) -> bool:
    if job["state"] == Job.SETTLED:
        return _close(hub, job)
    through = _due(hub, job)
    if through is None:
        return False
    owed = amounts(hub, job["id"], through)
    if through > job["settled_round"] and owed and not _halted(hub, job):
        settled = hub.chain.settle(job["id"], through, owed)
        leaves = hub.objects.put(settled.leaves)
        now = hub.clock()
        with hub.store.write() as db:
            if one(db, schema.settlements, job=job["id"], round=through) is None:
                db.execute(
                    insert(schema.settlements).values(
                        job=job["id"],
                        round=through,
                        root=settled.root,
                        total=settled.total,
                        leaves=leaves,
                        tx=settled.tx,
                        at=now,
                    )
                )
                record(
                    db, job["id"], f"settlement/{through}", "settled", now,
                    {"root": settled.root, "total": str(settled.total), "tx": settled.tx},
                )  # fmt: skip
            if one(db, schema.objects, digest=leaves, job=job["id"]) is None:
                db.execute(
                    insert(schema.objects).values(
                        digest=leaves, job=job["id"], size=len(settled.leaves), public=True, present=True
                    )
                )
            db.execute(update(schema.jobs).where(schema.jobs.c.id == job["id"]).values(settled_round=through))
        return True
    if job["state"] in ENDED:
        with hub.store.write() as db:
            fresh = one(db, schema.jobs, id=job["id"])
            return fresh is not None and move(db, schema.jobs, fresh, Job.SETTLED, now=hub.clock())
    return False


def _close(hub: Hub, job: Row) -> bool:
    """Once deadline and grace are over nothing can change but claims and the owner's refund: no key is needed more."""
    now = hub.clock()
    if job["deadline"] is not None and now <= job["deadline"] + job["grace"]:
        return False
    with hub.store.write() as db:
        keys.forget(db, job["id"])
        return move(db, schema.jobs, job, Job.CLOSED, now=now)


def _halted(hub: Hub, job: Row) -> bool:
    """Whether the owner told the escrow to take no further root: what is not settled by then stays unpaid."""
    escrow = hub.chain.job(job["id"])
    return escrow is None or escrow.halted


def _look_for_money(hub: Hub, job: Row) -> bool:
    try:
        return bool(jobs.fund(hub, job["id"])["state"] != Job.UNFUNDED)
    except TrainChainError as error:
        if error.code in ("job.unfunded", "job.incomplete", "job.invalid"):
            return False
        raise
