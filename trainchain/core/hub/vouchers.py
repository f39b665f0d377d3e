"""Vouchers: the hub's cumulative word for what has vested, which the escrow pays without the hub."""

from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from trainchain.core.hub import schema
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import Row, one
from trainchain.core.rewards import VESTING
from trainchain.core.states import ENDED, Lease


def next_place(db: Connection, job_id: str, worker: str) -> int:
    """The place that the worker's next accepted shard gets among its own in the job."""
    places = schema.contributions.c.place
    mine = (schema.contributions.c.job == job_id) & (schema.contributions.c.worker == worker)
    return (db.execute(select(func.max(places)).where(mine)).scalar() or 0) + 1


def vest(hub: Hub, db: Connection, job_id: str, worker: str, place: int) -> dict[str, Any] | None:
    """Sign what vests now that the worker's contribution at `place` is accepted; its newest voucher, if any."""
    ripe = one(db, schema.contributions, job=job_id, worker=worker, place=place - VESTING)
    if ripe is not None:
        before = one(db, schema.vouchers, job=job_id, account=worker)
        _sign(hub, db, job_id, worker, (before["cumulative"] if before else 0) + ripe["reward"])
    return newest(hub, db, job_id, worker)


def vest_all(hub: Hub, job_id: str) -> None:
    """Sign all that was accepted, once a job has ended: nothing can put it in doubt any more. Safe to repeat."""
    table = schema.contributions
    with hub.store.read() as db:
        owed: dict[str, int] = {}
        for worker, reward in db.execute(select(table.c.worker, table.c.reward).where(table.c.job == job_id)):
            owed[worker] = owed.get(worker, 0) + reward
        signed = {row["account"]: row["cumulative"] for row in _of(db, job_id)}
    lacking = {worker: total for worker, total in owed.items() if total > signed.get(worker, 0)}
    if lacking:
        with hub.store.write() as db:
            for worker, total in lacking.items():
                _sign(hub, db, job_id, worker, total)


def voucher_of(hub: Hub, job_id: str, worker: str) -> dict[str, Any]:
    """The worker's newest voucher in a job, and whether a newer one can still come. Raises `job.unknown`."""
    job = hub.job(job_id)
    if over := ended(hub, job):
        vest_all(hub, job_id)
    with hub.store.read() as db:
        return {"voucher": newest(hub, db, job_id, worker), "ended": over}


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
    """Whether nothing more can be accepted in a job: it has ended, and nobody is at it."""
    leases = schema.leases
    held = select(leases.c.id).where(leases.c.job == job["id"], leases.c.state == Lease.HELD, leases.c.kind == "train")
    with hub.store.read() as db:
        return job["state"] in ENDED and db.execute(held.limit(1)).first() is None


def _of(db: Connection, job_id: str) -> list[Row]:
    return list(db.execute(select(schema.vouchers).where(schema.vouchers.c.job == job_id)).mappings())


def _sign(hub: Hub, db: Connection, job_id: str, worker: str, cumulative: int) -> None:
    table = schema.vouchers
    before = one(db, table, job=job_id, account=worker)
    if cumulative <= (before["cumulative"] if before else 0):
        return
    message = {"jobId": job_id, "account": worker, "cumulative": cumulative}
    fields = {"cumulative": cumulative, "signature": hub.chain.sign("Voucher", message), "at": hub.clock()}
    if before is None:
        db.execute(insert(table).values(job=job_id, account=worker, **fields))
    else:
        db.execute(update(table).where(table.c.job == job_id, table.c.account == worker).values(**fields))
