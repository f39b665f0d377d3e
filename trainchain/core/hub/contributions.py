"""Taking a contribution in: who signed it, whether its lease stands, what its bytes are; then the signed receipt.

A refusal changes nothing: the lease stays as it was, and the round goes on.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from sqlalchemy import ColumnElement, Connection, Select, delete, insert, select, true, update

from trainchain.core import checks
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import draws, schema, vouchers
from trainchain.core.hub.leases import insist_in_time, mine
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import Row, move, one
from trainchain.core.messages import SignedContribution
from trainchain.core.models import MAX_ANSWER, Model
from trainchain.core.objects import Spool
from trainchain.core.rewards import shard_reward
from trainchain.core.states import ENDED, UNDONE, Evaluation, Lease, Round, Shard


class EvaluationReport(Model):
    """What an evaluating child found: mean negative log-likelihood per supervised token (null where the recipe has no
    held-out data), and the answer to each of the recipe's sample prompts."""

    loss: Annotated[float, Field(ge=0, le=1e6)] | None
    samples: list[Annotated[str, Field(max_length=MAX_ANSWER)]] = Field(max_length=16, default_factory=list)


def delta_cap(hub: Hub, worker: str, lease_id: str) -> int:
    """The most bytes the delta of this lease may have."""
    lease = mine(hub, worker, lease_id)
    if lease["kind"] != "train":
        raise TrainChainError("object.unexpected", "This lease does not ask for a delta.")
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
    has run out since, and even if the round has closed and the next one has not.
    """
    lease = mine(hub, worker, lease_id)
    job = hub.job(lease["job"])
    given = signed.contribution
    message = given.model_dump()
    if lease["kind"] != "train":
        raise TrainChainError("object.unexpected", "This lease does not ask for a contribution.")
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
    _not_seen(hub, lease, delta, signed)
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
    whole = recipe.training.batch_size * recipe.training.sequence_len
    if max(signed.micro_tokens) > whole:
        raise TrainChainError(
            "contribution.segments", f"micro_tokens has {max(signed.micro_tokens)}, and a whole batch has {whole}."
        )
    size = hub.objects.size(delta)
    if size is None:
        raise _missing(delta)
    if size > checks.delta_cap(recipe, hub.shapes(job)):
        raise TrainChainError("delta.too_large", f"The delta has {size} bytes.")
    checks.read_delta(hub.objects.get(delta), recipe, hub.shapes(job), lease["round"])

    reward = shard_reward(recipe, lease["round"], lease["shard"])
    fields = {
        "jobId": lease["job"],
        "round": lease["round"],
        "shard": lease["shard"],
        "lease": lease_id,
        "worker": worker,
        "deltaHash": given.deltaHash,
        "amount": reward,
    }
    receipt = _accept(hub, lease, delta, signed, fields)
    hub.bell.ring()
    return receipt


def _accept(hub: Hub, lease: Row, delta: str, signed: SignedContribution, fields: dict[str, Any]) -> dict[str, Any]:
    """Accept it, at the next place of its worker's, and draw whether it is audited; returns the receipt with the
    worker's newest voucher and the draw."""
    now = hub.clock()
    with hub.store.write() as db:
        shard = one(db, schema.shards, job=lease["job"], round=lease["round"], shard=lease["shard"])
        round_ = one(db, schema.rounds, job=lease["job"], round=lease["round"])
        current = one(db, schema.leases, id=lease["id"])
        job = one(db, schema.jobs, id=lease["job"])
        assert shard is not None
        assert round_ is not None
        assert current is not None
        assert job is not None
        insist_in_time(db, job, current, shard)
        _not_over(job, current)
        if shard["state"] not in UNDONE or current["state"] == Lease.DONE:
            raise TrainChainError("shard.already_accepted", f"Shard {lease['shard']} is already accepted.")
        if one(db, schema.contributions, job=lease["job"], delta=delta) is not None:
            raise TrainChainError("contribution.repeat", "The same bytes were already accepted for another shard.")
        # Another upload under this lease may have taken its place since it was read.
        if one(db, schema.objects, job=lease["job"], digest=delta) is None or hub.objects.size(delta) is None:
            raise _missing(delta)
        late = round_["state"] != Round.OPEN
        merged_in = lease["round"] + late if lease["round"] + late <= hub.recipe(job).rounds else None
        data = {"worker": lease["worker"], "reward": str(fields["amount"]), "merged_in": merged_in}
        place = vouchers.next_place(db, lease["job"], lease["worker"])
        move(db, schema.shards, shard, Shard.CONTRIBUTED, now=now, data={"delta": delta})
        contributed = one(db, schema.shards, job=lease["job"], round=lease["round"], shard=lease["shard"])
        assert contributed is not None
        move(db, schema.shards, contributed, Shard.ACCEPTED, now=now, data=data)
        move(db, schema.leases, current, Lease.DONE, now=now)
        receipt = _receipt(hub, {**fields, "place": place})
        audit = draws.drawn(hub, db, current, round_, signed.contribution, place)
        db.execute(
            insert(schema.contributions).values(
                lease=lease["id"],
                job=lease["job"],
                round=lease["round"],
                shard=lease["shard"],
                worker=lease["worker"],
                place=place,
                delta=delta,
                signed=signed.model_dump(),
                reward=fields["amount"],
                receipt=receipt,
                accepted=now,
                merged_in=merged_in,
                resolved=0 if audit is None else None,
            )
        )
        if audit is not None:
            draws.write_down(db, audit)
        voucher = vouchers.vest(hub, db, lease["job"], lease["worker"])
        return {**receipt, "voucher": voucher, "draw": draws.told(db, lease["id"])}


def _receipt(hub: Hub, fields: dict[str, Any]) -> dict[str, Any]:
    return {
        **fields,
        "amount": str(fields["amount"]),
        "hub": hub.chain.address,
        "chain_id": hub.chain.chain_id,
        "escrow": hub.chain.escrow,
        "signature": hub.chain.sign("Receipt", fields),
    }


def _missing(delta: str) -> TrainChainError:
    return TrainChainError("delta.missing", f"No bytes were uploaded as {delta}.", hint="Upload the delta first.")


def publish_round(db: Connection, job_id: str, round_: int, *, public: bool) -> list[str]:
    """Open the deltas that a round's merge took in to everybody who wants to recompute it, and forget those that
    nothing can take in any more; returns the digests of these. Before the merge a delta is nobody's but its worker's:
    it could be copied.

    Of a private job they open to its owner and its workers alone, who alone can then recompute the merge.
    """
    taken = schema.contributions.c.merged_in == round_
    if public:
        _open(db, job_id, select(schema.contributions.c.delta).where(schema.contributions.c.job == job_id, taken))
    return _forget_loose(db, job_id, schema.leases.c.round >= round_ - 1)


def publish_rest(db: Connection, job_id: str, *, public: bool, now: float) -> list[str]:
    """As `publish_round`, for what no merge took in, once the job is settled and takes no more."""
    if public:
        _open(db, job_id, select(schema.contributions.c.delta).where(schema.contributions.c.job == job_id))
    shards = schema.shards
    undone = db.execute(select(shards).where(shards.c.job == job_id, shards.c.state.in_(UNDONE))).mappings()
    for shard in undone.all():
        move(db, shards, shard, Shard.ABANDONED, now=now)
    return _forget_loose(db, job_id, true())


def _open(db: Connection, job_id: str, deltas: Select[Any]) -> None:
    objects = schema.objects
    db.execute(update(objects).where(objects.c.job == job_id, objects.c.digest.in_(deltas)).values(public=True))


def _forget_loose(db: Connection, job_id: str, which: ColumnElement[bool]) -> list[str]:
    """Forget the uploads that were not accepted and cannot be any more, of these leases."""
    leases, shards = schema.leases, schema.shards
    here = (shards.c.job == leases.c.job) & (shards.c.round == leases.c.round) & (shards.c.shard == leases.c.shard)
    over = shards.c.state.in_([Shard.ACCEPTED, Shard.ABANDONED])
    found = select(leases.c.id).join(shards, here).where(leases.c.job == job_id, over, which)
    loose = db.execute(_loose(job_id).where(schema.objects.c.lease.in_(found))).mappings().all()
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


def _not_seen(hub: Hub, lease: Row, delta: str, signed: SignedContribution) -> None:
    """A repeat is answered with the receipt and the draw it had, so that a worker whose answer was lost still gets
    them. The first that was accepted of a lease counts for ever; another story that its worker signs is kept."""
    with hub.store.read() as db:
        mine_ = one(db, schema.contributions, lease=lease["id"])
        copy = one(db, schema.contributions, job=lease["job"], delta=delta)
        taken = one(db, schema.contributions, job=lease["job"], round=lease["round"], shard=lease["shard"])
        voucher, draw = vouchers.newest(hub, db, lease["job"], lease["worker"]), draws.told(db, lease["id"])
    if mine_ is not None:
        first = mine_["signed"]["contribution"]
        if (first["deltaHash"], first["stateRoot"]) == (signed.contribution.deltaHash, signed.contribution.stateRoot):
            receipt = {**mine_["receipt"], "voucher": voucher, "draw": draw}
            raise TrainChainError("contribution.repeat", "This contribution was accepted before.", receipt=receipt)
        _keep_second(hub, lease["id"], signed)
    if taken is not None:
        raise TrainChainError(
            "shard.already_accepted", f"A contribution for shard {lease['shard']} is already accepted."
        )
    if copy is not None:
        raise TrainChainError("contribution.repeat", "The same bytes were already accepted for another shard.")


def _keep_second(hub: Hub, lease_id: str, signed: SignedContribution) -> None:
    table, told = (
        schema.contributions,
        {"contribution": signed.contribution.model_dump(), "signature": signed.signature},
    )
    with hub.store.write() as db:
        db.execute(update(table).where(table.c.lease == lease_id, table.c.second.is_(None)).values(second=told))


def _still_wanted(hub: Hub, lease: Row) -> Row:
    """The lease's round, where its work may still come. Raises `contribution.too_late`, `job.closed`."""
    job = hub.job(lease["job"])
    with hub.store.read() as db:
        round_ = one(db, schema.rounds, job=lease["job"], round=lease["round"])
        shard = one(db, schema.shards, job=lease["job"], round=lease["round"], shard=lease["shard"])
        assert round_ is not None
        assert shard is not None
        insist_in_time(db, job, lease, shard)
    _not_over(job, lease)
    return round_


def _not_over(job: Row, lease: Row) -> None:
    """A job that has ended takes work under held leases only: its last settlement waits for those and no others."""
    if job["state"] in ENDED and lease["state"] != Lease.HELD:
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
        row = one(db, schema.evaluations, job=lease["job"], lease=lease_id)
        current = one(db, schema.leases, id=lease_id)
        assert current is not None
        if row is not None and row["state"] == Evaluation.LEASED:
            now, data, found = hub.clock(), {"loss": report.loss}, report.model_dump()
            move(db, schema.evaluations, row, Evaluation.DONE, now=now, data=data, at=now, **found)
            move(db, schema.leases, current, Lease.DONE, now=now)
    hub.bell.ring()
    return {"loss": report.loss}


def merged_in(hub: Hub, job_id: str, round_: int) -> list[Row]:
    """The accepted contributions that the merge of a round takes in, in the order of their digests."""
    query = select(schema.contributions).where(schema.contributions.c.job == job_id)
    query = query.where(schema.contributions.c.merged_in == round_)
    with hub.store.read() as db:
        return list(db.execute(query.order_by(schema.contributions.c.delta)).mappings())
