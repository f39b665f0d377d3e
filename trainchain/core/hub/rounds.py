"""The life of a job, one step at a time: open a round, close it, merge it, go on. Safe to repeat and to interrupt.

Work is loaded, done outside any transaction, and applied only if the row is still where it was.
"""

import time

from sqlalchemy import Connection, insert, select, update

from trainchain.core.adapter import Adapter, adapter_bytes, read_adapter
from trainchain.core.checks import reach, read_delta
from trainchain.core.hub import jobs, schema
from trainchain.core.hub.contributions import drop_unnamed, merged_in, publish_round
from trainchain.core.hub.leases import sweep
from trainchain.core.hub.service import Hub, attempt
from trainchain.core.hub.store import Row, move, one
from trainchain.core.merge.updates import Merged, Update, merge
from trainchain.core.models import ResolvedRecipe
from trainchain.core.rewards import round_price
from trainchain.core.states import UNDONE, Evaluation, Job, Round, Shard

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
    covered = escrow.funded - jobs.owed(hub, job["id"], expected=True) >= round_price(recipe, number)
    with hub.store.write() as db:
        if not covered:
            return move(db, schema.jobs, job, Job.UNFUNDED, now=now, data={"round": number})
        if job["state"] == Job.OPEN:
            if not move(db, schema.jobs, job, Job.RUNNING, now=now, round=number):
                return False
            _ask_for_measures(db, job["id"], recipe, 0, start)
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


def _ask_for_measures(db: Connection, job_id: str, recipe: ResolvedRecipe, round_: int, adapter: str) -> None:
    """Have an adapter measured, if the recipe has held-out data to measure on or prompts to answer."""
    if recipe.held_out or recipe.samples:
        values = {"job": job_id, "round": round_, "state": str(Evaluation.OPEN), "adapter": adapter}
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


def merge_round(hub: Hub, job: Row, round_: Row) -> Merged:
    """The merged adapter of a round, from the contributions that it takes in: a pure function of objects that
    everybody may read once the round is merged. Of a private job only the owner and its workers may, so nobody else
    can recompute its merges."""
    recipe = hub.recipe(job)
    updates = [_update(hub, job, recipe, row) for row in merged_in(hub, job["id"], round_["round"])]
    before = _start_before(hub, round_) if recipe.merge.outer_momentum else None
    return merge(recipe.merge, read_adapter(hub.objects.get(round_["start"])), updates, before=before)


def _update(hub: Hub, job: Row, recipe: ResolvedRecipe, row: Row) -> Update:
    """What a contribution brings to the merge that takes it in: one that came late was trained from the round
    before's start, and its delta is added to this round's."""
    tokens = recipe.counts[row["round"] - 1][row["shard"]].tokens
    weight = tokens if row["merged_in"] == row["round"] else tokens * LATE_WEIGHT
    data, bound = hub.objects.get(row["delta"]), reach(recipe, row["round"])
    return Update(row["delta"], weight, read_delta(data, recipe.merge.encoding, hub.shapes(job), bound))


def _start_before(hub: Hub, round_: Row) -> Adapter | None:
    """What the round before this one started from."""
    with hub.store.read() as db:
        earlier = one(db, schema.rounds, job=round_["job"], round=round_["round"] - 1)
    return read_adapter(hub.objects.get(earlier["start"])) if earlier is not None else None


def _merge(hub: Hub, job: Row, recipe: ResolvedRecipe, round_: Row) -> bool:
    began = time.perf_counter()
    merged = merge_round(hub, job, round_)
    data = adapter_bytes(merged.adapter)
    digest = hub.objects.put(data)
    now, seconds = hub.clock(), time.perf_counter() - began
    with hub.store.write() as db:
        fields = {"adapter": digest, "merged": now, "merge_seconds": seconds}
        worst = max(merged.truncation.values(), default=0.0)
        if not move(
            db,
            schema.rounds,
            round_,
            Round.MERGED,
            now=now,
            data={"adapter": digest, "truncation": worst},
            merge_error=worst,
            **fields,
        ):
            return False
        if one(db, schema.objects, digest=digest, job=job["id"]) is None:
            db.execute(
                insert(schema.objects).values(
                    digest=digest, job=job["id"], size=len(data), public=not recipe.private, present=True
                )
            )
        for delta, share in merged.shares.items():
            db.execute(
                update(schema.contributions)
                .where(schema.contributions.c.job == job["id"], schema.contributions.c.delta == delta)
                .values(merge={"weight": share.weight, "scale": share.scale, "why": share.why})
            )
        _ask_for_measures(db, job["id"], recipe, round_["round"], digest)
        loose = publish_round(db, job["id"], round_["round"], public=not recipe.private)
    for refused in loose:
        drop_unnamed(hub, refused)
    return True
