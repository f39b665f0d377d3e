"""Taking a contribution in: who signed it, whether its lease stands, what its bytes are; then the signed receipt.

A refusal changes nothing: the lease stays as it was, and the round goes on.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from sqlalchemy import Connection, Select, delete, insert, select, update

from trainchain.core import checks
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema
from trainchain.core.hub.leases import mine
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import Row, move, one
from trainchain.core.models import MAX_ANSWER, Model, SignedContribution
from trainchain.core.objects import Spool
from trainchain.core.rewards import shard_reward
from trainchain.core.states import Evaluation, Job, Lease, Round, Shard


class EvaluationReport(Model):
    """What an evaluating child found: mean negative log-likelihood per supervised token (null where the recipe has no
    held-out data), and the answer to each of the recipe's sample prompts."""

    loss: Annotated[float, Field(ge=0, le=1e6)] | None
    samples: list[Annotated[str, Field(max_length=MAX_ANSWER)]] = Field(max_length=16, default_factory=list)


def delta_cap(hub: Hub, worker: str, lease_id: str) -> int:
    """The most bytes the delta of this lease may have."""
    lease = mine(hub, worker, lease_id)
    if lease["kind"] != "train":
        raise TrainChainError("object.unexpected", "This lease asks for a figure, not for a file.")
    _still_wanted(hub, lease)
    job = hub.job(lease["job"])
    return checks.delta_cap(hub.recipe(job), hub.shapes(job))


def keep_delta(hub: Hub, worker: str, lease_id: str, digest: str, spool: Spool) -> dict[str, Any]:
    """Store the uploaded delta of a lease. Raises `delta.wrong_digest`."""
    lease = mine(hub, worker, lease_id)
    if spool.digest != digest:
        raise TrainChainError("delta.wrong_digest", f"Sent as {digest}, the bytes are {spool.digest}.")
    hub.objects.keep(spool)
    with hub.store.write() as db:
        earlier = db.execute(_loose(lease["job"]).where(schema.objects.c.lease == lease_id)).mappings().all()
        _forget(db, [row for row in earlier if row["digest"] != digest])
        if one(db, schema.objects, digest=digest, job=lease["job"]) is None:
            db.execute(
                insert(schema.objects).values(
                    digest=digest, job=lease["job"], size=spool.size, public=False, present=True, lease=lease_id
                )
            )
    for row in earlier:
        drop_unnamed(hub, row["digest"])
    return {"digest": digest, "size": spool.size}


def contribute(hub: Hub, worker: str, lease_id: str, signed: SignedContribution) -> dict[str, Any]:
    """Judge a contribution and, where it holds, accept it and answer with the hub's signed receipt.

    The first valid contribution by anyone who held a lease on the shard in its round counts, even if that lease
    has run out since.
    """
    lease = mine(hub, worker, lease_id)
    job = hub.job(lease["job"])
    given = signed.contribution
    message = given.model_dump()
    if lease["kind"] != "train":
        raise TrainChainError("object.unexpected", "This lease asks for a figure, not for a contribution.")
    if given.worker.lower() != worker.lower():
        raise TrainChainError("contribution.wrong_worker", f"The contribution names the worker {given.worker}.")
    if hub.chain.recover("Contribution", message, signed.signature).lower() != worker.lower():
        raise TrainChainError("contribution.bad_signature", "The contribution is not signed by its worker.")
    if given.lease != lease_id:
        raise TrainChainError("lease.not_yours", "The contribution names another lease than it was sent to.")
    if given.jobId != lease["job"]:
        raise TrainChainError("contribution.wrong_job", f"The lease is of job {lease['job']}.")
    if (given.round, given.shard) != (lease["round"], lease["shard"]):
        raise TrainChainError(
            "contribution.wrong_round", f"The lease is of round {lease['round']}, shard {lease['shard']}."
        )
    delta = given.deltaHash.removeprefix("0x")
    _not_seen(hub, lease, delta)
    round_ = _still_wanted(hub, lease)
    if given.startHash.removeprefix("0x") != round_["start"]:
        raise TrainChainError("contribution.wrong_start", f"Round {round_['round']} starts from {round_['start']}.")
    recipe = hub.recipe(job)
    if given.encoding != recipe.merge.encoding:
        raise TrainChainError("contribution.encoding", f"The recipe's encoding is {recipe.merge.encoding}.")
    segments = -(-recipe.steps // recipe.training.segment_steps)
    if len(signed.micro_tokens) != segments:
        raise TrainChainError(
            "contribution.segments", f"micro_tokens has {len(signed.micro_tokens)} entries for {segments} segments."
        )
    size = hub.objects.size(delta)
    if size is None:
        raise TrainChainError("delta.missing", f"No bytes were uploaded as {delta}.", hint="Upload the delta first.")
    if size > checks.delta_cap(recipe, hub.shapes(job)):
        raise TrainChainError("delta.too_large", f"The delta has {size} bytes.")
    checks.read_delta(hub.objects.get(delta), recipe, hub.shapes(job), lease["round"])

    reward = shard_reward(recipe, lease["round"], lease["shard"])
    receipt_fields = {
        "jobId": lease["job"],
        "round": lease["round"],
        "shard": lease["shard"],
        "lease": lease_id,
        "worker": worker,
        "deltaHash": given.deltaHash,
        "amount": reward,
    }
    receipt = {
        **receipt_fields,
        "amount": str(reward),
        "hub": hub.chain.address,
        "chain_id": hub.chain.chain_id,
        "escrow": hub.chain.escrow,
        "signature": hub.chain.sign("Receipt", receipt_fields),
    }
    _accept(hub, lease, delta, signed, reward, receipt)
    hub.bell.ring()
    return receipt


def _accept(hub: Hub, lease: Row, delta: str, signed: SignedContribution, reward: int, receipt: dict[str, Any]) -> None:
    now = hub.clock()
    with hub.store.write() as db:
        shard = one(db, schema.shards, job=lease["job"], round=lease["round"], shard=lease["shard"])
        round_ = one(db, schema.rounds, job=lease["job"], round=lease["round"])
        current = one(db, schema.leases, id=lease["id"])
        job = one(db, schema.jobs, id=lease["job"])
        if shard is None or round_ is None or current is None or job is None or round_["state"] != Round.OPEN:
            raise TrainChainError("round.closed", f"Round {lease['round']} has closed.")
        _not_over(job, current)
        if shard["state"] not in (Shard.OPEN, Shard.LEASED) or current["state"] == Lease.DONE:
            raise TrainChainError("shard.already_accepted", f"Shard {lease['shard']} is already accepted.")
        if one(db, schema.contributions, job=lease["job"], delta=delta) is not None:
            raise TrainChainError("contribution.repeat", "The same bytes were already accepted for another shard.")
        data = {"worker": lease["worker"], "reward": str(reward)}
        move(db, schema.shards, shard, Shard.CONTRIBUTED, now=now, data={"delta": delta})
        contributed = one(db, schema.shards, job=lease["job"], round=lease["round"], shard=lease["shard"])
        assert contributed is not None
        move(db, schema.shards, contributed, Shard.ACCEPTED, now=now, data=data)
        move(db, schema.leases, current, Lease.DONE, now=now)
        db.execute(
            insert(schema.contributions).values(
                lease=lease["id"],
                job=lease["job"],
                round=lease["round"],
                shard=lease["shard"],
                worker=lease["worker"],
                delta=delta,
                signed=signed.model_dump(),
                reward=reward,
                receipt=receipt,
                accepted=now,
            )
        )


def publish_round(db: Connection, job_id: str, round_: int, *, public: bool) -> list[str]:
    """Open a merged round's accepted deltas to everybody who wants to recompute the merge, and forget its refused
    ones; returns the digests of those. Before the merge a delta is nobody's but its worker's: it could be copied.

    Of a private job they open to its owner and its workers alone, who alone can then recompute the merge.
    """
    accepted_here = select(schema.contributions.c.delta).where(
        schema.contributions.c.job == job_id, schema.contributions.c.round == round_
    )
    objects, leases = schema.objects, schema.leases
    if public:
        accepted_objects = update(objects).where(objects.c.job == job_id, objects.c.digest.in_(accepted_here))
        db.execute(accepted_objects.values(public=True))
    of_round = select(leases.c.id).where(leases.c.job == job_id, leases.c.round == round_)
    loose = db.execute(_loose(job_id).where(objects.c.lease.in_(of_round))).mappings().all()
    _forget(db, loose)
    return [row["digest"] for row in loose]


def drop_unnamed(hub: Hub, digest: str) -> None:
    """Delete bytes that no job names any more."""
    with hub.store.write() as db:
        if db.execute(select(schema.objects.c.job).where(schema.objects.c.digest == digest).limit(1)).first() is None:
            hub.objects.delete(digest)


def _loose(job_id: str) -> Select[Any]:
    """Uploaded deltas of a job that were not accepted."""
    taken = select(schema.contributions.c.delta).where(schema.contributions.c.job == job_id)
    return select(schema.objects).where(
        schema.objects.c.job == job_id, schema.objects.c.lease.is_not(None), schema.objects.c.digest.not_in(taken)
    )


def _forget(db: Connection, rows: Sequence[Row]) -> None:
    for row in rows:
        db.execute(
            delete(schema.objects).where(schema.objects.c.job == row["job"], schema.objects.c.digest == row["digest"])
        )


def _not_seen(hub: Hub, lease: Row, delta: str) -> None:
    """A repeat is answered with the receipt it had, so that a worker whose answer was lost still gets it."""
    with hub.store.read() as db:
        mine_ = one(db, schema.contributions, lease=lease["id"])
        copy = one(db, schema.contributions, job=lease["job"], delta=delta)
        taken = one(db, schema.contributions, job=lease["job"], round=lease["round"], shard=lease["shard"])
    if mine_ is not None and mine_["delta"] == delta:
        raise TrainChainError("contribution.repeat", "This contribution was accepted before.", receipt=mine_["receipt"])
    if taken is not None:
        raise TrainChainError(
            "shard.already_accepted", f"A contribution for shard {lease['shard']} is already accepted."
        )
    if copy is not None:
        raise TrainChainError("contribution.repeat", "The same bytes were already accepted for another shard.")


def _still_wanted(hub: Hub, lease: Row) -> Row:
    with hub.store.read() as db:
        round_ = one(db, schema.rounds, job=lease["job"], round=lease["round"])
    if round_ is None or round_["state"] != Round.OPEN:
        raise TrainChainError("round.closed", f"Round {lease['round']} has closed; its contributions are merged.")
    _not_over(hub.job(lease["job"]), lease)
    return round_


def _not_over(job: Row, lease: Row) -> None:
    """A job that has ended takes work under held leases only: its last settlement waits for those and no others."""
    if job["state"] != Job.RUNNING and lease["state"] != Lease.HELD:
        raise TrainChainError("job.closed", f"Job {job['id']} has ended, and the lease {lease['id']} ran out.")


def evaluated(hub: Hub, worker: str, lease_id: str, report: EvaluationReport) -> dict[str, Any]:
    """Record the held-out loss and the samples that an evaluating child found; a repeat is harmless."""
    lease = mine(hub, worker, lease_id)
    if lease["kind"] != "evaluate" or worker not in hub.evaluators:
        raise TrainChainError("session.forbidden", "This lease does not ask for a figure.")
    recipe = hub.recipe(hub.job(lease["job"]))
    if (report.loss is None) != (recipe.held_out is None) or len(report.samples) != len(recipe.samples):
        raise TrainChainError("http.bad_request", "The report does not answer what the recipe asks for.")
    with hub.store.write() as db:
        row = one(db, schema.evaluations, job=lease["job"], round=lease["round"])
        current = one(db, schema.leases, id=lease_id)
        assert row is not None
        assert current is not None
        if row["state"] == Evaluation.LEASED and row["lease"] == lease_id:
            data, found = {"loss": report.loss}, report.model_dump()
            move(db, schema.evaluations, row, Evaluation.DONE, now=hub.clock(), data=data, **found)
            move(db, schema.leases, current, Lease.DONE, now=hub.clock())
    hub.bell.ring()
    return {"loss": report.loss}


def accepted(hub: Hub, job_id: str, round_: int | None = None) -> list[Row]:
    """Accepted contributions of a job (or of one of its rounds), in the order of their digests."""
    query = select(schema.contributions).where(schema.contributions.c.job == job_id)
    if round_ is not None:
        query = query.where(schema.contributions.c.round == round_)
    with hub.store.read() as db:
        return list(db.execute(query.order_by(schema.contributions.c.delta)).mappings())
