"""Vouchers: the hub's cumulative word for what has vested, which the escrow pays without the hub."""

from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from trainchain.core.hub import schema
from trainchain.core.hub.earnings import earned, rejections, waits
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import Row, one
from trainchain.core.rewards import LATEST, Earned, Terms, vested
from trainchain.core.states import ENDED, PENDING, Lease

LEASED = ("train", "replay")
"""The kinds of leases that earn something."""


def next_place(db: Connection, job_id: str, worker: str) -> int:
    """The place that the worker's next accepted shard gets among its own in the job."""
    places = schema.contributions.c.place
    mine = (schema.contributions.c.job == job_id) & (schema.contributions.c.worker == worker)
    return (db.execute(select(func.max(places)).where(mine)).scalar() or 0) + 1


def vest(hub: Hub, db: Connection, job_id: str, worker: str, *, over: bool = False) -> dict[str, Any] | None:
    """Sign what has vested for a worker since its newest voucher, in the transaction that let it vest: a contribution
    or a replay that was accepted, or a verdict. `over` is whether the job has ended. Returns its newest voucher."""
    before = one(db, schema.vouchers, job=job_id, account=worker)
    places = {"shards": before["shards"], "fees": before["fees"]} if before else {}
    _sign(hub, db, job_id, worker, vested(earned(db, job_id, worker, **places), Terms(LATEST, over, 0)))
    return newest(hub, db, job_id, worker)


def vest_all(hub: Hub, job_id: str) -> None:
    """Sign all that stands, once a job has ended: nothing can put it in doubt any more. Safe to repeat."""
    with hub.store.read() as db:
        signed = {row["account"]: (row["shards"], row["fees"]) for row in _of(db, job_id)}
        rows = [row for row in earned(db, job_id) if row.place > signed.get(row.worker, (0, 0))[row.kind == "replay"]]
    lacking = {row.worker for row in vested(rows, Terms(LATEST, True, 0)) if row.amount}
    if lacking:
        with hub.store.write() as db:
            for worker in sorted(lacking):
                vest(hub, db, job_id, worker, over=True)


def voucher_of(hub: Hub, job_id: str, worker: str) -> dict[str, Any]:
    """The worker's newest voucher in a job, whether a newer one can still come, and why it is not more: of its places
    through the last the first that waits for a verdict, and what was forfeited. Raises `job.unknown`."""
    job = hub.job(job_id)
    if over := ended(hub, job):
        vest_all(hub, job_id)
    with hub.store.read() as db:
        return {
            "voucher": newest(hub, db, job_id, worker),
            "ended": over,
            "through": next_place(db, job_id, worker) - 1,
            "waits": waits(db, job_id, worker),
            "forfeited": rejections(db, job_id, worker),
        }


def newest(hub: Hub, db: Connection, job_id: str, worker: str) -> dict[str, Any] | None:
    """The worker's newest voucher in a job, as it is told; None where nothing has vested."""
    row = one(db, schema.vouchers, job=job_id, account=worker)
    if row is None:
        return None
    return {
        "jobId": row["job"],
        "account": row["account"],
        "cumulative": str(row["cumulative"]),
        "hub": hub.chain.address,
        "chain_id": hub.chain.chain_id,
        "escrow": hub.chain.escrow,
        "signature": row["signature"],
    }


def ended(hub: Hub, job: Row) -> bool:
    """Whether nothing more can be accepted or put in doubt in a job: it has ended, nobody is at it, and every audit has
    its verdict."""
    if job["state"] not in ENDED:
        return False
    with hub.store.read() as db:
        return is_over(db, job["id"])


def is_over(db: Connection, job_id: str) -> bool:
    """The same of a job that has ended. Replays whose answer is known put nothing in doubt."""
    leases, audits, replays = schema.leases, schema.audits, schema.replays
    held = select(leases.c.id).where(leases.c.job == job_id, leases.c.state == Lease.HELD, leases.c.kind.in_(LEASED))
    held = held.where(leases.c.id.not_in(select(replays.c.lease).where(replays.c.job == job_id, replays.c.ringer)))
    pending = select(audits.c.lease).where(audits.c.job == job_id, audits.c.state.in_(PENDING))
    return all(db.execute(query.limit(1)).first() is None for query in (held, pending))


def _of(db: Connection, job_id: str) -> list[Row]:
    return list(db.execute(select(schema.vouchers).where(schema.vouchers.c.job == job_id)).mappings())


def _sign(hub: Hub, db: Connection, job_id: str, worker: str, ripe: list[Earned]) -> None:
    more = sum(row.amount for row in ripe)
    if not more:
        return
    table = schema.vouchers
    before = one(db, table, job=job_id, account=worker)
    cumulative = more + (before["cumulative"] if before else 0)
    fields = {
        "cumulative": cumulative,
        "shards": _last(ripe, "shard", before["shards"] if before else 0),
        "fees": _last(ripe, "replay", before["fees"] if before else 0),
        "signature": hub.chain.sign("Voucher", {"jobId": job_id, "account": worker, "cumulative": cumulative}),
        "at": hub.clock(),
    }
    if before is None:
        db.execute(insert(table).values(job=job_id, account=worker, **fields))
    else:
        db.execute(update(table).where(table.c.job == job_id, table.c.account == worker).values(**fields))


def _last(ripe: list[Earned], kind: str, before: int) -> int:
    return max((row.place for row in ripe if row.kind == kind), default=before)
