"""Leases: take, beat, give back. Taking first sweeps a bounded number of expired ones, so a lease is its own reaper."""

from typing import Annotated, Any

from pydantic import Field
from sqlalchemy import Connection, func, insert, or_, select, update

from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema
from trainchain.core.hub.service import LEASE_SECONDS, Hub
from trainchain.core.hub.store import Row, move, one
from trainchain.core.models import Count, Model
from trainchain.core.states import Evaluation, Job, Lease, Round, Shard

SWEEP = 100
CHOICES = 16
MAX_HELD = 8
"""Leases that one wallet may hold at once: a machine with eight GPUs; nobody can sit on a whole round."""


class Progress(Model):
    """Where a worker stands in its shard: shown to the owner, never believed."""

    step: Count = 0
    steps: Count = 0
    tokens_per_second: Annotated[float, Field(ge=0, le=1e12)] = 0.0


class LeaseRequest(Model):
    """`job` narrows the offer to one job; `wait` is how many seconds the hub may hold the request open."""

    job: Annotated[str, Field(max_length=66)] | None = None
    wait: Annotated[float, Field(ge=0, le=30)] = 0.0


def take(hub: Hub, worker: str, job_id: str | None) -> dict[str, Any] | None:
    """Give `worker` a lease, or None where there is nothing to do for it."""
    now = hub.clock()
    if not _something_to_do(hub, worker in hub.evaluators, now):
        return None
    with hub.store.write() as db:
        sweep(db, now)
        if worker in hub.evaluators:
            return _take_evaluation(hub, db, worker, now)
        return _take_shard(hub, db, worker, job_id, now)


def _something_to_do(hub: Hub, evaluator: bool, now: float) -> bool:
    """A look without the write lock, so that idle workers who wait do not stand in anybody's way."""
    table = schema.evaluations if evaluator else schema.shards
    overdue = select(schema.leases.c.id).where(schema.leases.c.state == Lease.HELD, schema.leases.c.expires < now)
    with hub.store.read() as db:
        waiting = db.execute(select(table.c.job).where(table.c.state == "open").limit(1)).first()
        return waiting is not None or db.execute(overdue.limit(1)).first() is not None


def _take_shard(hub: Hub, db: Connection, worker: str, job_id: str | None, now: float) -> dict[str, Any] | None:
    jobs, rounds, shards = schema.jobs, schema.rounds, schema.shards
    query = (
        select(shards)
        .join(rounds, (rounds.c.job == shards.c.job) & (rounds.c.round == shards.c.round))
        .join(jobs, jobs.c.id == shards.c.job)
        .where(jobs.c.state == Job.RUNNING, jobs.c.deadline > now)
        .where(rounds.c.state == Round.OPEN, shards.c.state == Shard.OPEN)
        .order_by(rounds.c.opened, shards.c.shard)
        .limit(CHOICES)
    )
    if job_id is not None:
        query = query.where(jobs.c.id == job_id)
    leases = schema.leases
    held = select(func.count()).where(leases.c.worker == worker, leases.c.state == Lease.HELD)
    if db.execute(held).scalar_one() >= MAX_HELD:
        return None
    for shard in db.execute(query).mappings().all():
        lease_id = "0x" + hub.random_hex(32)
        if not move(db, shards, shard, Shard.LEASED, now=now, data={"worker": worker}, lease=lease_id):
            continue
        _hold(db, lease_id, "train", shard, worker, now)
        job, round_ = one(db, jobs, id=shard["job"]), one(db, rounds, job=shard["job"], round=shard["round"])
        assert job is not None
        assert round_ is not None
        return _offer(lease_id, "train", job, round_["round"], shard["shard"], round_["start"])
    return None


def _take_evaluation(hub: Hub, db: Connection, worker: str, now: float) -> dict[str, Any] | None:
    query = select(schema.evaluations).where(schema.evaluations.c.state == Evaluation.OPEN).limit(CHOICES)
    for row in db.execute(query).mappings().all():
        lease_id = "0x" + hub.random_hex(32)
        if not move(db, schema.evaluations, row, Evaluation.LEASED, now=now, lease=lease_id):
            continue
        _hold(db, lease_id, "evaluate", row, worker, now)
        job = one(db, schema.jobs, id=row["job"])
        assert job is not None
        return _offer(lease_id, "evaluate", job, row["round"], None, row["adapter"])
    return None


def _hold(db: Connection, lease_id: str, kind: str, row: Row, worker: str, now: float) -> None:
    """Write down that `worker` holds the shard or the evaluation in `row`."""
    db.execute(
        insert(schema.leases).values(
            id=lease_id,
            kind=kind,
            job=row["job"],
            round=row["round"],
            shard=row.get("shard"),
            worker=worker,
            state=str(Lease.HELD),
            taken=now,
            expires=now + LEASE_SECONDS,
        )
    )


def _offer(lease_id: str, kind: str, job: Row, round_: int, shard: int | None, start: str) -> dict[str, Any]:
    return {
        "lease": lease_id,
        "kind": kind,
        "job": job["id"],
        "name": job["name"],
        "spec_hash": job["spec_hash"],
        "round": round_,
        "shard": shard,
        "start": start,
        "expires_in": LEASE_SECONDS,
    }


def sweep(db: Connection, now: float) -> int:
    """Expire a bounded number of leases whose beat is overdue; their work opens to others."""
    query = (
        select(schema.leases)
        .where(schema.leases.c.state == Lease.HELD, schema.leases.c.expires < now)
        .order_by(schema.leases.c.expires)
        .limit(SWEEP)
    )
    rows = db.execute(query).mappings().all()
    for lease in rows:
        _release(db, lease, now)
    return len(rows)


def _release(db: Connection, lease: Row, now: float) -> None:
    """End a held lease; what it held is offered again. The work done under it may still be handed in."""
    if not move(db, schema.leases, lease, Lease.EXPIRED, now=now, data={"worker": lease["worker"]}):
        return
    if lease["kind"] == "evaluate":
        row = one(db, schema.evaluations, job=lease["job"], round=lease["round"])
        if row is not None and row["state"] == Evaluation.LEASED and row["lease"] == lease["id"]:
            move(db, schema.evaluations, row, Evaluation.OPEN, now=now, lease=None)
        return
    shard = one(db, schema.shards, job=lease["job"], round=lease["round"], shard=lease["shard"])
    if shard is not None and shard["state"] == Shard.LEASED and shard["lease"] == lease["id"]:
        move(db, schema.shards, shard, Shard.OPEN, now=now, lease=None)


def mine(hub: Hub, worker: str, lease_id: str) -> Row:
    """The lease, if it is this worker's. Raises `lease.unknown`, `lease.not_yours`."""
    with hub.store.read() as db:
        lease = one(db, schema.leases, id=lease_id)
    if lease is None:
        raise TrainChainError("lease.unknown", f"No lease {lease_id[:66]} was ever given.")
    if lease["worker"].lower() != worker.lower():
        raise TrainChainError("lease.not_yours", f"The lease {lease_id} belongs to another wallet.")
    return lease


def beat(hub: Hub, worker: str, lease_id: str, progress: Progress) -> dict[str, Any]:
    """Keep a lease alive. Raises `shard.already_accepted`, `round.closed` or `job.closed` where its work is no longer
    wanted, `lease.lost` where it ran out or was held for longer than a round may last."""
    lease = mine(hub, worker, lease_id)
    now = hub.clock()
    longest = hub.recipe(hub.job(lease["job"])).round_deadline
    with hub.store.write() as db:
        _say_if_over(db, lease_id, now)
        kept = db.execute(
            update(schema.leases)
            .where(
                schema.leases.c.id == lease_id,
                schema.leases.c.state == Lease.HELD,
                schema.leases.c.expires >= now,
                schema.leases.c.taken >= now - longest,
            )
            .values(expires=now + LEASE_SECONDS, progress=progress.model_dump())
        )
        if kept.rowcount == 0:
            raise TrainChainError("lease.lost", f"The lease {lease_id} ran out; its shard is offered to others.")
    return {"expires_in": LEASE_SECONDS}


def _say_if_over(db: Connection, lease_id: str, now: float) -> None:
    """A lease may be worked on, even one that ran out, unless its shard, its round or its job is over.

    Half of the grace time is left for the last settlement: nobody holds it up by beating on.
    """
    lease = one(db, schema.leases, id=lease_id)
    if lease is None or lease["kind"] != "train":
        return
    round_ = one(db, schema.rounds, job=lease["job"], round=lease["round"])
    shard = one(db, schema.shards, job=lease["job"], round=lease["round"], shard=lease["shard"])
    if shard is not None and shard["state"] == Shard.ACCEPTED:
        raise TrainChainError("shard.already_accepted", f"Shard {lease['shard']} was accepted from another worker.")
    if round_ is not None and round_["state"] != Round.OPEN:
        raise TrainChainError("round.closed", f"Round {lease['round']} has closed.")
    job = one(db, schema.jobs, id=lease["job"])
    if job is not None and job["state"] != Job.RUNNING and now > job["deadline"] + job["grace"] / 2:
        raise TrainChainError("job.closed", f"Job {job['id']} has ended.")


def give_back(hub: Hub, worker: str, lease_id: str) -> None:
    """Hand a lease back unfinished, so that the next worker need not wait for it to expire."""
    lease = mine(hub, worker, lease_id)
    with hub.store.write() as db:
        if lease["state"] == Lease.HELD:
            _release(db, lease, hub.clock())
    hub.bell.ring()


def extend_all(hub: Hub) -> None:
    """After the hub was away, no lease may have run out for want of a hub to beat to."""
    until = hub.clock() + LEASE_SECONDS
    with hub.store.write() as db:
        db.execute(
            update(schema.leases)
            .where(schema.leases.c.state == Lease.HELD, schema.leases.c.expires < until)
            .values(expires=until)
        )


def may_read(hub: Hub, wallet: str, digest: str) -> bool:
    """Whether a wallet may read an object that is not public: the job's owner, and who was ever leased a part of it.

    Held-out data is for the owner and the hub's evaluating child alone: who trains must not see what it is judged by.
    """
    objects, jobs, leases = schema.objects, schema.jobs, schema.leases
    leased = select(leases.c.id).where(leases.c.job == objects.c.job, leases.c.worker == wallet).exists()
    query = (
        select(jobs)
        .join(objects, jobs.c.id == objects.c.job)
        .where(objects.c.digest == digest, objects.c.present, or_(jobs.c.owner == wallet, leased))
    )
    with hub.store.read() as db:
        rows = list(db.execute(query).mappings())
    return any(
        job["owner"] == wallet or wallet in hub.evaluators or not hub.recipe(job).only_held_out(digest) for job in rows
    )


def is_public(hub: Hub, digest: str) -> bool:
    query = select(schema.objects.c.digest).where(
        schema.objects.c.digest == digest, schema.objects.c.public, schema.objects.c.present
    )
    with hub.store.read() as db:
        return db.execute(query.limit(1)).first() is not None
