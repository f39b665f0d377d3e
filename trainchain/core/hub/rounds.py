"""The life of a job, one step at a time: open a round, close it, merge it, go on. Safe to repeat and to interrupt.

Work is loaded, done outside any transaction, and applied only if the row is still where it was.
"""

import time
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from sqlalchemy import Connection, insert, select, update

from trainchain.core.adapter import Adapter, adapter_bytes, read_adapter, tensor_specs
from trainchain.core.checks import read_delta
from trainchain.core.draws import SECRET_BYTES, secret_hash
from trainchain.core.encodings import decode
from trainchain.core.hub import audits, jobs, judging, schema
from trainchain.core.hub.contributions import drop_unnamed, merged_in, publish_round
from trainchain.core.hub.judging import Candidate
from trainchain.core.hub.leases import sweep
from trainchain.core.hub.service import Hub, attempt
from trainchain.core.hub.store import Row, move, one
from trainchain.core.merge.moments import Adam
from trainchain.core.merge.robust import COPY, Share
from trainchain.core.merge.updates import Merged, Update, judge, merge, outer_step
from trainchain.core.models import ResolvedRecipe
from trainchain.core.rewards import round_price
from trainchain.core.segments import Moments
from trainchain.core.states import PENDING, UNDONE, Audit, Evaluation, Job, Round, Shard

LIVE = (Job.OPEN, Job.RUNNING)
LATE_WEIGHT = 0.5
"""What a contribution counts in the merge of the round after its own, of the weight it would have had in that."""


def live_jobs(hub: Hub) -> list[Row]:
    query = select(schema.jobs).where(schema.jobs.c.state.in_([*LIVE, Job.UNFUNDED]))
    with hub.store.read() as db:
        return list(db.execute(query.order_by(schema.jobs.c.created)).mappings())


def tick(hub: Hub) -> bool:
    """Do what is due for every job; True if anything moved."""
    moved = False
    with hub.store.write() as db:
        moved = sweep(db, hub.clock()) > 0
    moved = audits.tick(hub) or moved
    for job in live_jobs(hub):
        moved = attempt(advance, hub, job) or moved
    if moved:
        hub.bell.ring()
    return moved


def advance(hub: Hub, job: Row) -> bool:
    """One step of one job; True if it moved."""
    now, recipe = hub.clock(), hub.recipe(job)
    if job["deadline"] is not None and now > job["deadline"]:
        with hub.store.write() as db:
            return move(db, schema.jobs, job, Job.EXPIRED, now=now)
    if job["state"] == Job.UNFUNDED:
        return False
    if job["state"] == Job.OPEN:
        return _open_round(hub, job, recipe, recipe.lora.initial.sha256)
    with hub.store.read() as db:
        round_ = one(db, schema.rounds, job=job["id"], round=job["round"])
    assert round_ is not None
    if round_["state"] == Round.OPEN:
        return _close(hub, recipe, round_, now)
    if round_["state"] == Round.MERGING:
        return _merge(hub, job, recipe, round_)
    if job["round"] < recipe.rounds:
        return _open_round(hub, job, recipe, round_["adapter"])
    with hub.store.write() as db:
        return move(db, schema.jobs, job, Job.FINISHED, now=now)


def _open_round(hub: Hub, job: Row, recipe: ResolvedRecipe, start: str) -> bool:
    """Open the next round, if the escrow covers all it can cost; else the job waits for money."""
    now, number = hub.clock(), job["round"] + 1
    escrow = hub.chain.job(job["id"])
    if escrow is None or escrow.halted or escrow.deadline <= now:
        with hub.store.write() as db:
            return move(db, schema.jobs, job, Job.EXPIRED, now=now, data={"why": "the escrow takes no more work"})
    secret = _secret(hub, job["id"], number)
    covered = escrow.funded - jobs.owed(hub, job["id"], expected=True) >= round_price(recipe, number)
    with hub.store.write() as db:
        if not covered:
            return move(db, schema.jobs, job, Job.UNFUNDED, now=now, data={"round": number})
        if job["state"] == Job.OPEN:
            if not move(db, schema.jobs, job, Job.RUNNING, now=now, round=number):
                return False
            _ask_for_measures(db, job["id"], recipe, 0, start, now)
        else:
            taken = db.execute(
                update(schema.jobs)
                .where(schema.jobs.c.id == job["id"], schema.jobs.c.version == job["version"])
                .values(round=number, version=job["version"] + 1)
            )
            if taken.rowcount == 0:
                return False
        db.execute(
            insert(schema.rounds).values(
                job=job["id"],
                round=number,
                state=str(Round.OPEN),
                start=start,
                **secret,
                opened=now,
                deadline=now + recipe.round_deadline,
            )
        )
        db.execute(
            insert(schema.shards),
            [
                {
                    "job": job["id"],
                    "round": number,
                    "shard": shard,
                    "state": str(Shard.OPEN),
                    "spare": shard >= recipe.shards,
                }
                for shard in range(recipe.all_shards)
            ],
        )
    return True


def _secret(hub: Hub, job_id: str, round_: int) -> dict[str, str]:
    """What draws a round's audits, and the hub's word for it (core/draws.py)."""
    secret = bytes.fromhex(hub.random_hex(SECRET_BYTES))
    hashed = secret_hash(secret)
    message = {"jobId": job_id, "round": round_, "secretHash": hashed}
    return {
        "secret": "0x" + secret.hex(),
        "secret_hash": hashed,
        "secret_signature": hub.chain.sign("RoundSecret", message),
    }


def _ask_for_measures(
    db: Connection, job_id: str, recipe: ResolvedRecipe, round_: int, adapter: str, now: float
) -> None:
    """Have an adapter measured, if the recipe has held-out data to measure on or prompts to answer."""
    if recipe.held_out or recipe.samples:
        values = {"job": job_id, "round": round_, "state": str(Evaluation.OPEN), "adapter": adapter, "at": now}
        db.execute(insert(schema.evaluations).values(**values))


def _close(hub: Hub, recipe: ResolvedRecipe, round_: Row, now: float) -> bool:
    """Close a round when as many shards are in as it has beside its spares, or at its deadline with a quorum of them.

    What is still being trained may come one round late: the work of the round before may not any more.
    """
    table = schema.shards
    lately = table.c.round.in_([round_["round"] - 1, round_["round"]])
    with hub.store.write() as db:
        shards = db.execute(select(table).where(table.c.job == round_["job"], lately)).mappings().all()
        done = sum(shard["state"] == Shard.ACCEPTED for shard in shards if shard["round"] == round_["round"])
        enough = done >= recipe.quorum * recipe.shards and done > 0
        if done < recipe.shards and not (now > round_["deadline"] and enough):
            return False
        if not move(db, schema.rounds, round_, Round.MERGING, now=now, closed=now):
            return False
        for shard in shards:
            was_lent = shard["version"] > 0  # so somebody may come with it
            if shard["state"] in UNDONE and not (was_lent and shard["round"] == round_["round"]):
                move(db, schema.shards, shard, Shard.ABANDONED, now=now)
    return True


def merge_round(hub: Hub, job: Row, round_: Row, left_out: Collection[str] = ()) -> Merged:
    """The merged adapter of a round, from the contributions that it takes in, but those `left_out`; where none is left
    the adapter stays where it is. A pure function of objects that everybody may read once the round is merged. Of a
    private job only the owner and its workers may, so nobody else can recompute its merges."""
    recipe, training = hub.recipe(job), hub.recipe(job).training
    rows = merged_in(hub, job["id"], round_["round"])
    if all(row["delta"] in left_out for row in rows):
        return _unmoved(hub, recipe, round_)
    judged = _judged_before(hub, job, recipe, round_, rows)
    updates = [
        _update(hub, job, recipe, row)._replace(share=judged.get(row["delta"]))
        for row in rows
        if row["delta"] not in left_out
    ]
    before = _start_before(hub, round_) if recipe.merge.outer_momentum else None
    steps = round_["round"] * recipe.steps
    adam = Adam(training.adam_beta1, training.adam_beta2, steps, training.max_grad_norm)
    return merge(recipe.merge, read_adapter(hub.objects.get(round_["start"])), updates, before=before, adam=adam)


def _unmoved(hub: Hub, recipe: ResolvedRecipe, round_: Row) -> Merged:
    """What becomes of a round all of whose work was rejected: nothing, and the next goes on from where it began."""
    start, moments = read_adapter(hub.objects.get(round_["start"])), None
    if recipe.merge.hands_on:
        with hub.store.read() as db:
            last = one(db, schema.rounds, job=round_["job"], round=round_["round"] - 1)
        if last is None:
            moments = Moments(*([{name: np.zeros_like(tensor) for name, tensor in start.items()}] * 2))
        else:
            step, encoding = hub.objects.get(last["outer_step"]), recipe.merge.encoding
            moments = decode(step, encoding, tensor_specs(start), moments=True).moments
    return Merged(start, moments, {}, {})


def _judged_before(hub: Hub, job: Row, recipe: ResolvedRecipe, round_: Row, rows: Sequence[Row]) -> dict[str, Share]:
    """What the rule makes of what came late, by digest: among the contributions of its own round, from that round's
    start. Beside those of this round it would always be the odd one. A copy that comes late counts for nothing."""
    late = {row["delta"] for row in rows if row["round"] != round_["round"]}
    start = _start_before(hub, round_) if late else None
    if start is None:
        return {}
    contributions = schema.contributions
    query = select(contributions).where(contributions.c.job == job["id"], contributions.c.round == round_["round"] - 1)
    with hub.store.read() as db:
        fellows = list(db.execute(query.order_by(contributions.c.delta)).mappings())
    found = judge(recipe.merge, start, [_update(hub, job, recipe, row) for row in fellows])
    return {
        digest: share._replace(weight=0.0) if share.why == COPY else share
        for digest, share in found.items()
        if digest in late
    }


def _update(hub: Hub, job: Row, recipe: ResolvedRecipe, row: Row) -> Update:
    """What a contribution brings to the merge that takes it in: one that came late was trained from the round
    before's start, and its delta is added to this round's."""
    tokens = recipe.counts[row["round"] - 1][row["shard"]].tokens
    weight = tokens if row["merged_in"] == row["round"] else tokens * LATE_WEIGHT
    found = read_delta(hub.objects.get(row["delta"]), recipe, hub.shapes(job), row["round"])
    return Update(row["delta"], weight, *found)


def _start_before(hub: Hub, round_: Row) -> Adapter | None:
    """What the round before this one started from."""
    with hub.store.read() as db:
        earlier = one(db, schema.rounds, job=round_["job"], round=round_["round"] - 1)
    return read_adapter(hub.objects.get(earlier["start"])) if earlier is not None else None


def _merge(hub: Hub, job: Row, recipe: ResolvedRecipe, round_: Row) -> bool:
    """Merge a round; where the recipe wants it judged, have candidates measured until one is chosen."""
    if _waits_for_verdicts(hub, recipe, round_):
        return False
    if recipe.merge.leave_one_out is None:
        return _merged(hub, job, recipe, round_, _candidate(hub, job, round_), {})
    verdict = judging.look(hub, recipe, round_)
    if verdict.chosen is not None:
        candidate, loss = verdict.chosen
        data = {"judged": verdict.why, "loss": loss, "left_out": list(candidate.left_out)}
        return _merged(hub, job, recipe, round_, candidate, data)
    wanted = verdict.wanted
    if len(wanted) > judging.MOST_TRIED:
        rejected = _rejected(hub, round_)
        rows = [row for row in merged_in(hub, job["id"], round_["round"]) if row["delta"] not in rejected]
        updates = [_update(hub, job, recipe, row) for row in rows]
        wanted = judging.oddest(read_adapter(hub.objects.get(round_["start"])), updates, wanted)
    made = [_candidate(hub, job, round_, left_out) for left_out in wanted]
    return bool(made) and judging.ask(hub, round_, made)


def _waits_for_verdicts(hub: Hub, recipe: ResolvedRecipe, round_: Row) -> bool:
    """Whether a round that has closed waits for a verdict on something that it takes in, as long as its recipe says."""
    if hub.clock() >= round_["closed"] + recipe.check.before_merge:
        return False
    audits, given = schema.audits, schema.contributions
    pending = select(audits.c.lease).join(given, given.c.lease == audits.c.lease)
    pending = pending.where(audits.c.job == round_["job"], audits.c.state.in_(PENDING))
    with hub.store.read() as db:
        return db.execute(pending.where(given.c.merged_in == round_["round"]).limit(1)).first() is not None


def _rejected(hub: Hub, round_: Row) -> tuple[str, ...]:
    """The contributions among those that a round takes in that an audit has rejected, by their digests."""
    audits, given = schema.audits, schema.contributions
    failed = select(given.c.delta).join(audits, given.c.lease == audits.c.lease)
    failed = failed.where(given.c.job == round_["job"], given.c.merged_in == round_["round"])
    with hub.store.read() as db:
        return tuple(sorted(db.execute(failed.where(audits.c.state == Audit.FAILED)).scalars()))


def _candidate(hub: Hub, job: Row, round_: Row, left_out: tuple[str, ...] = ()) -> Candidate:
    """What the round is merged to without some contributions, and those that were rejected; its bytes are kept."""
    began, rejected = time.perf_counter(), _rejected(hub, round_)
    merged = merge_round(hub, job, round_, {*left_out, *rejected})
    step = outer_step(hub.recipe(job).merge, read_adapter(hub.objects.get(round_["start"])), merged)
    data = adapter_bytes(step.adapter)
    adapter, outer = hub.objects.put(data), hub.objects.put(step.data)
    return Candidate(
        left_out=left_out,
        adapter=adapter,
        outer_step=outer,
        sizes={adapter: len(data), outer: len(step.data)},
        error=max(merged.truncation.values(), default=0.0),
        seconds=time.perf_counter() - began,
        shares={digest: share._asdict() for digest, share in merged.shares.items()},
        rejected=rejected,
    )


def _merged(
    hub: Hub, job: Row, recipe: ResolvedRecipe, round_: Row, candidate: Candidate, judged: Mapping[str, object]
) -> bool:
    """Apply a merge: the candidate is the round's adapter."""
    now = hub.clock()
    fields: dict[str, object] = {"merged": now, "merge_seconds": candidate.seconds}
    fields |= {"adapter": candidate.adapter, "outer_step": candidate.outer_step}
    data = {"adapter": candidate.adapter, "truncation": candidate.error, **judged}
    with hub.store.write() as db:
        if not move(db, schema.rounds, round_, Round.MERGED, now=now, data=data, merge_error=candidate.error, **fields):
            return False
        judging.name_objects(db, job["id"], candidate, public=not recipe.private)
        others = judging.settle(db, round_, candidate)
        if recipe.merge.leave_one_out is None:
            _ask_for_measures(db, job["id"], recipe, round_["round"], candidate.adapter, now)
        loose = publish_round(db, job["id"], round_["round"], public=not recipe.private)
    for digest in [*loose, *others]:
        drop_unnamed(hub, digest)
    return True
