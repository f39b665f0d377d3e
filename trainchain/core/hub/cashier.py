"""Settling: cumulative amounts of all merged rounds go on chain as a Merkle root. Safe to repeat.

What came late is settled with the round that took it in, so that a settled round's amounts never change.

The chain is asked outside any transaction; what it did is found again by (job, round, root).
"""

from sqlalchemy import func, insert, select, update

from trainchain.core.errors import TrainChainError
from trainchain.core.hub import jobs, keys, schema
from trainchain.core.hub.contributions import drop_unnamed, publish_rest
from trainchain.core.hub.service import Hub, attempt
from trainchain.core.hub.store import Row, move, one, record
from trainchain.core.states import ENDED, Job, Lease, Round

_COUNTED = func.coalesce(schema.contributions.c.merged_in, schema.contributions.c.round)
"""The round whose settlement pays a contribution."""
SETTLING = frozenset(Job) - {Job.CLOSED}


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
    """What each wallet has earned that counts in rounds 1 to `through`: token units, cumulative."""
    query = select(schema.contributions.c.worker, schema.contributions.c.reward).where(
        schema.contributions.c.job == job_id, _COUNTED.between(1, through)
    )
    totals: dict[str, int] = {}
    with hub.store.read() as db:
        for worker, reward in db.execute(query):
            totals[worker] = totals.get(worker, 0) + reward
    return {worker: total for worker, total in totals.items() if total > 0}


def _due(hub: Hub, job: Row) -> tuple[int, bool]:
    """The round through which the job may be settled now, and whether that is all: it has ended, and nothing that is
    held can add to it. Until then its last round waits, since late work of that counts in no other."""
    contributions, rounds, leases = schema.contributions, schema.rounds, schema.leases
    held = select(leases.c.id).where(leases.c.job == job["id"], leases.c.state == Lease.HELD, leases.c.kind == "train")
    merged = select(func.max(rounds.c.round)).where(rounds.c.job == job["id"], rounds.c.state == Round.MERGED)
    counted = select(func.max(_COUNTED)).where(contributions.c.job == job["id"])
    with hub.store.read() as db:
        if job["state"] in ENDED and db.execute(held.limit(1)).first() is None:
            return max(job["round"], db.execute(counted).scalar() or 0), True
        return min(db.execute(merged).scalar() or 0, hub.recipe(job).rounds - 1), False


def _settle(hub: Hub, job: Row) -> bool:
    if job["state"] == Job.SETTLED:
        return _close(hub, job)
    through, final = _due(hub, job)
    escrow = hub.chain.job(job["id"]) if through > job["settled_round"] else None
    # The owner may have told the escrow to take no further root: what is not settled by then stays unpaid.
    if escrow is not None and not escrow.halted:
        through, owed = _step(hub, job, through, escrow.round_cap)
    else:
        owed = {}
    if owed:
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
    return final and _settled(hub, job)


def _settled(hub: Hub, job: Row) -> bool:
    """All that is owed stands on chain: nothing is accepted any more, and what no merge took in is opened."""
    now, recipe = hub.clock(), hub.recipe(job)
    with hub.store.write() as db:
        fresh = one(db, schema.jobs, id=job["id"])
        if fresh is None or not move(db, schema.jobs, fresh, Job.SETTLED, now=now):
            return False
        loose = publish_rest(db, job["id"], public=not recipe.private, now=now)
    for refused in loose:
        drop_unnamed(hub, refused)
    return True


def _close(hub: Hub, job: Row) -> bool:
    """Once deadline and grace are over nothing can change but claims and the owner's refund: no key is needed more."""
    now = hub.clock()
    if job["deadline"] is not None and now <= job["deadline"] + job["grace"]:
        return False
    with hub.store.write() as db:
        keys.forget(db, job["id"])
        return move(db, schema.jobs, job, Job.CLOSED, now=now)


def _step(hub: Hub, job: Row, through: int, cap: int) -> tuple[int, dict[str, int]]:
    """The last round that the next settlement can cover, and what is owed by then: the escrow lets one add a round's
    price. After a time without the chain a job is settled in several steps."""
    with hub.store.read() as db:
        last = one(db, schema.settlements, job=job["id"], round=job["settled_round"])
    before = last["total"] if last else 0
    while True:
        owed = amounts(hub, job["id"], through)
        if sum(owed.values()) - before <= cap or through == job["settled_round"] + 1:
            return through, owed
        through -= 1


def _look_for_money(hub: Hub, job: Row) -> bool:
    try:
        return bool(jobs.fund(hub, job["id"])["state"] != Job.UNFUNDED)
    except TrainChainError as error:
        if error.code in ("job.unfunded", "job.incomplete", "job.invalid"):
            return False
        raise
