"""Leases: take, beat, give back. Taking first sweeps a bounded number of expired ones, so a lease is its own reaper."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from sqlalchemy import ColumnElement, Connection, Select, func, or_, select, tuple_, update

from trainchain.core.errors import TrainChainError
from trainchain.core.hub import access, auditors, schema, vouchers
from trainchain.core.hub.offers import came_from, hold, offer
from trainchain.core.hub.service import LEASE_SECONDS, Hub
from trainchain.core.hub.store import Row, move, one
from trainchain.core.models import Count, Hash32, Model
from trainchain.core.states import ENDED, Evaluation, Job, Lease, Round, Shard
from trainchain.core.verdicts import MOST_REPLAYS

SWEEP = 100
CHOICES = 16
MAX_SKIPPED = 64
MAX_HELD = 8
"""Leases that one wallet may hold at once: a machine with eight GPUs; nobody can sit on a whole round."""


class Progress(Model):
    """Where a worker stands in its shard: shown to the owner, never believed."""

    step: Count = 0
    steps: Count = 0
    tokens_per_second: Annotated[float, Field(ge=0, le=1e12)] = 0.0


class LeaseRequest(Model):
    """`job` narrows the offer to one job, `skip` names jobs that this worker cannot do; `wait` is how many seconds the
    hub may hold the request open; `only` replays are offered to a machine that does nothing else."""

    job: Annotated[str, Field(max_length=66)] | None = None
    skip: Annotated[list[Hash32], Field(max_length=MAX_SKIPPED, default_factory=list)]
    wait: Annotated[float, Field(ge=0, le=30)] = 0.0
    only: Literal["replay"] | None = None


def take(
    hub: Hub, worker: str, job_id: str | None, skip: Sequence[str] = (), only: str | None = None
) -> dict[str, Any] | None:
    """Give `worker` a lease, or None where there is nothing to do for it: nothing to measure, where it may, then no
    audit that it may replay, then no open shard in a job that admits it. `only` replays: nothing else."""
    now, evaluator = hub.clock(), worker in hub.evaluators
    work = _open_evaluations(skip) if evaluator else _open_shards(worker, job_id, skip, now)
    take_work = _take_evaluation if evaluator else _take_shard

    def replay(db: Connection) -> auditors.Choice | None:
        return auditors.choose(hub, db, worker, job_id, skip, now)

    # A look without the write lock, so that idle workers who wait do not stand in anybody's way.
    overdue = select(schema.leases.c.id).where(schema.leases.c.state == Lease.HELD, schema.leases.c.expires < now)
    with hub.store.read() as db:
        some = only is None and db.execute(_allowed(hub, db, work, worker).order_by(None).limit(1)).first() is not None
        if not some and replay(db) is None and db.execute(overdue.limit(1)).first() is None:
            return None
    with hub.store.write() as db:
        sweep(db, now)
        if evaluator and only is None and (found := take_work(hub, db, work, worker, now)):
            return found
        if choice := replay(db):
            return auditors.lend(hub, db, choice, worker, now)
        return None if evaluator or only is not None else take_work(hub, db, work, worker, now)


def _allowed(hub: Hub, db: Connection, query: Select[Any], worker: str) -> Select[Any]:
    """Without the jobs where a wallet holds a shard already and had none accepted yet: what a fresh one can take with
    it unaudited is one shard at most."""
    leases, given = schema.leases, schema.contributions
    held = select(leases.c.job).where(leases.c.worker == worker, leases.c.state == Lease.HELD, leases.c.kind == "train")
    known = select(given.c.lease).where(given.c.job == leases.c.job, given.c.worker == worker).exists()
    rows = db.execute(select(schema.jobs).where(schema.jobs.c.id.in_(held.where(~known)))).mappings()
    closed = [job["id"] for job in rows if hub.recipe(job).audited]
    return query.where(schema.shards.c.job.not_in(closed)) if closed else query


def _open_shards(worker: str, job_id: str | None, skip: Sequence[str], now: float) -> Select[Any]:
    """What `worker` may be lent, the oldest rounds first."""
    jobs, rounds, shards = schema.jobs, schema.rounds, schema.shards
    query = (
        select(shards)
        .join(rounds, (rounds.c.job == shards.c.job) & (rounds.c.round == shards.c.round))
        .join(jobs, jobs.c.id == shards.c.job)
        .where(jobs.c.state == Job.RUNNING, jobs.c.deadline > now)
        .where(rounds.c.state == Round.OPEN, shards.c.state == Shard.OPEN, or_(~shards.c.spare, _in_the_tail()))
        .where(access.admits(worker), jobs.c.id.not_in(skip))
        .order_by(rounds.c.opened, shards.c.shard)
        .limit(CHOICES)
    )
    return query if job_id is None else query.where(jobs.c.id == job_id)


def _in_the_tail() -> ColumnElement[bool]:
    """Whether the round of a row of `shards` has nothing left to lend but its spares, and fewer of these are lent or
    in than shards are still out: each takes the place of one that somebody is slow with."""
    other, rounds = schema.shards.alias(), schema.rounds
    left = func.count().filter(~other.c.spare, other.c.state == Shard.OPEN)
    out = func.count().filter(~other.c.spare, other.c.state == Shard.LEASED)
    used = func.count().filter(other.c.spare, other.c.state != Shard.OPEN)
    tails = (
        select(other.c.job, other.c.round)
        .join(rounds, (rounds.c.job == other.c.job) & (rounds.c.round == other.c.round))
        .where(rounds.c.state == Round.OPEN)
        .group_by(other.c.job, other.c.round)
        .having(left == 0, used < out)
    )
    return tuple_(schema.shards.c.job, schema.shards.c.round).in_(tails)


def _open_evaluations(skip: Sequence[str]) -> Select[Any]:
    evaluations = schema.evaluations
    query = select(evaluations).where(evaluations.c.state == Evaluation.OPEN, evaluations.c.job.not_in(skip))
    return query.order_by(evaluations.c.at, evaluations.c.candidate).limit(CHOICES)


def _take_shard(hub: Hub, db: Connection, query: Select[Any], worker: str, now: float) -> dict[str, Any] | None:
    jobs, rounds, shards, leases = schema.jobs, schema.rounds, schema.shards, schema.leases
    held = select(func.count()).where(leases.c.worker == worker, leases.c.state == Lease.HELD, leases.c.kind == "train")
    if db.execute(held).scalar_one() >= MAX_HELD:
        return None
    for shard in db.execute(_allowed(hub, db, query, worker)).mappings().all():
        lease_id = "0x" + hub.random_hex(32)
        if not move(db, shards, shard, Shard.LEASED, now=now, data={"worker": worker}, lease=lease_id):
            continue
        hold(db, lease_id, "train", shard, worker, now)
        job, round_ = one(db, jobs, id=shard["job"]), one(db, rounds, job=shard["job"], round=shard["round"])
        assert job is not None
        assert round_ is not None
        made = offer(lease_id, "train", job, round_["round"], shard["shard"], round_["start"]) | came_from(db, round_)
        return made | {name: round_[name] for name in ("secret_hash", "secret_signature")}
    return None


def _take_evaluation(hub: Hub, db: Connection, query: Select[Any], worker: str, now: float) -> dict[str, Any] | None:
    for row in db.execute(query).mappings().all():
        lease_id = "0x" + hub.random_hex(32)
        if not move(db, schema.evaluations, row, Evaluation.LEASED, now=now, lease=lease_id):
            continue
        hold(db, lease_id, "evaluate", row, worker, now)
        job = one(db, schema.jobs, id=row["job"])
        assert job is not None
        return offer(lease_id, "evaluate", job, row["round"], None, row["adapter"])
    return None


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
    if lease["kind"] == "replay":
        auditors.gone(db, lease)
        return
    if lease["kind"] == "evaluate":
        row = one(db, schema.evaluations, job=lease["job"], lease=lease["id"])
        if row is not None and row["state"] == Evaluation.LEASED:
            move(db, schema.evaluations, row, Evaluation.OPEN, now=now, lease=None)
        return
    shard = one(db, schema.shards, job=lease["job"], round=lease["round"], shard=lease["shard"])
    if shard is not None and shard["state"] == Shard.LEASED and shard["lease"] == lease["id"]:
        move(db, schema.shards, shard, Shard.OPEN, now=now, lease=None)


def mine(hub: Hub, worker: str, lease_id: str) -> Row:
    """The lease, if it is this worker's. Raises `lease.unknown`, `lease.not_yours`, `access.denied`."""
    with hub.store.read() as db:
        return mine_in(hub, db, worker, lease_id)


def mine_in(hub: Hub, db: Connection, worker: str, lease_id: str) -> Row:
    """`mine`, within a transaction."""
    lease = one(db, schema.leases, id=lease_id)
    if lease is None:
        raise TrainChainError("lease.unknown", f"No lease {lease_id[:66]} was ever given.")
    if lease["worker"].lower() != worker.lower():
        raise TrainChainError("lease.not_yours", f"The lease {lease_id} belongs to another wallet.")
    access.insist(hub, db, lease["job"], worker)
    return lease


def beat(hub: Hub, worker: str, lease_id: str, progress: Progress) -> dict[str, Any]:
    """Keep a lease alive. Raises `shard.already_accepted`, `contribution.too_late` or `job.closed` where its work is no
    longer wanted, `lease.lost` where it ran out or was held for longer than a round may last, or two once its own has
    closed, or a replay for its share of the time that there is."""
    lease = mine(hub, worker, lease_id)
    now = hub.clock()
    recipe = hub.recipe(hub.job(lease["job"]))
    longest: float = recipe.round_deadline
    with hub.store.write() as db:
        say_if_over(db, lease_id, now)
        round_ = one(db, schema.rounds, job=lease["job"], round=lease["round"])
        longest *= 1 if round_ is None or round_["state"] == Round.OPEN else 2
        if lease["kind"] == "replay":
            longest = recipe.check.timeout / MOST_REPLAYS
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
            raise TrainChainError("lease.lost", f"The lease {lease_id} ran out; what it held is offered to others.")
    return {"expires_in": LEASE_SECONDS}


def say_if_over(db: Connection, lease_id: str, now: float) -> None:
    """A lease may be worked on, even one that ran out, unless its shard or its job is over, or the next round too; or
    the audit that it is a replay of.

    Half of the grace time is left for the last settlement: nobody holds it up by beating on.
    """
    lease = one(db, schema.leases, id=lease_id)
    if lease is not None and lease["kind"] == "replay":
        auditors.say_if_over(db, lease)
        _insist_audited(db, lease, now)
    if lease is None or lease["kind"] != "train":
        return
    shard = one(db, schema.shards, job=lease["job"], round=lease["round"], shard=lease["shard"])
    job = one(db, schema.jobs, id=lease["job"])
    assert shard is not None
    assert job is not None
    if shard["state"] == Shard.ACCEPTED:
        raise TrainChainError("shard.already_accepted", f"Shard {lease['shard']} was accepted from another worker.")
    insist_in_time(db, job, lease, shard)
    if job["state"] != Job.RUNNING and now > job["deadline"] + job["grace"] / 2:
        raise TrainChainError("job.closed", f"Job {job['id']} has ended.")


def _insist_audited(db: Connection, lease: Row, now: float) -> None:
    """Nobody's pay waits for a replay whose answer is known. Raises `job.closed`."""
    replay, job = one(db, schema.replays, lease=lease["id"]), one(db, schema.jobs, id=lease["job"])
    assert job is not None
    known = replay is not None and replay["ringer"] and job["state"] in ENDED
    if known and (now > job["deadline"] + job["grace"] / 2 or vouchers.is_over(db, job["id"])):
        raise TrainChainError("job.closed", f"Job {job['id']} has ended.")


def insist_in_time(db: Connection, job: Row, lease: Row, shard: Row) -> None:
    """Work may come while its round is open, and one round late. Raises `contribution.too_late`, `job.closed`."""
    if shard["state"] != Shard.ABANDONED:
        return
    if job["state"] in (Job.SETTLED, Job.CLOSED):
        raise TrainChainError("job.closed", f"Job {job['id']} has ended and is settled.")
    open_ = one(db, schema.rounds, job=job["id"], round=job["round"])
    raise TrainChainError(
        "contribution.too_late",
        f"This lease is of round {lease['round']}, and round {job['round']} is {open_ and open_['state']}: "
        "work is taken one round late at most.",
    )


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
