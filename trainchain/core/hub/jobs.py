"""Publishing a job: its resolved recipe, its objects, and the escrow that must cover it."""

from typing import Any

from pydantic import Field
from sqlalchemy import Connection, insert, select, update

from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import access, keys, schema
from trainchain.core.hub.keys import Wrapped
from trainchain.core.hub.service import EscrowJob, Hub
from trainchain.core.hub.store import Row, move, one, record
from trainchain.core.models import Digest, Hash32, Model, ResolvedRecipe
from trainchain.core.money import show
from trainchain.core.objects import Spool
from trainchain.core.recipe import MAX_STEPS
from trainchain.core.rewards import audit_price, job_price, round_cap, round_price, shard_reward
from trainchain.core.states import UNDONE, Job

MAX_FILES = 1000
MAX_BLOCKS = 100_000
MAX_OBJECT = 1 << 40


class Publication(Model):
    """What an owner publishes; with the owner's address the salt gives the job its id.

    `keys` has the key of every sealed file by its digest, wrapped for this hub (core/seal.py, `for_hub`).
    """

    recipe: ResolvedRecipe
    salt: Hash32
    keys: dict[Digest, Wrapped] = Field(default_factory=dict)


def publish(hub: Hub, owner: str, publication: Publication) -> dict[str, Any]:
    """Take a job in, unfunded; publishing the same again answers the same, and brings its keys anew.

    Raises `job.invalid`, `money.budget_too_small`, `key.invalid`.
    """
    recipe = publication.recipe
    _check(recipe)
    job_id, now = hub.chain.job_id(owner, publication.salt), hub.clock()
    keys.check(hub, job_id, recipe, publication.keys)
    text = recipe.canonical()
    spec_hash = hub.objects.put(text)
    with hub.store.write() as db:
        row = one(db, schema.jobs, id=job_id)
        if row is None:
            db.execute(
                insert(schema.jobs).values(
                    id=job_id,
                    name=recipe.name,
                    owner=owner,
                    salt=publication.salt,
                    spec_hash=spec_hash,
                    recipe=text.decode(),
                    anyone=recipe.access.workers == "anyone",
                    state=str(Job.UNFUNDED),
                    created=now,
                )
            )
            record(db, job_id, "job", "published", now, {"spec_hash": spec_hash})
            _name_objects(db, job_id, owner, recipe, spec_hash, len(text))
            access.admit(db, job_id, owner, recipe)
        elif row["spec_hash"] != spec_hash:
            raise TrainChainError("job.invalid", f"Job {job_id} was published with another recipe.")
        if row is None or row["state"] != Job.CLOSED:
            keys.keep(db, job_id, publication.keys)
    return {"job": job_id, "spec_hash": spec_hash, "missing": missing(hub, job_id)}


def _name_objects(
    db: Connection, job_id: str, owner: str, recipe: ResolvedRecipe, spec_hash: str, recipe_size: int
) -> None:
    """List what the job is made of. Bytes count as present only where this owner has brought them before:
    naming a digest must not open somebody else's data."""
    mine = (
        select(schema.objects.c.digest)
        .join(schema.jobs, schema.jobs.c.id == schema.objects.c.job)
        .where(schema.jobs.c.owner == owner, schema.objects.c.present)
    )
    have = set(db.execute(mine).scalars())
    rows = [
        {
            "digest": ref.sha256,
            "job": job_id,
            "size": ref.size,
            "public": ref.sha256 == recipe.lora.initial.sha256 and not recipe.private,
            "present": ref.sha256 in have,
        }
        for ref in recipe.files()
    ]
    rows.append({"digest": spec_hash, "job": job_id, "size": recipe_size, "public": True, "present": True})
    db.execute(insert(schema.objects), rows)


def _check(recipe: ResolvedRecipe) -> None:
    """What the types cannot say of a resolved recipe. Raises `job.invalid`, `money.budget_too_small`."""
    if len(recipe.counts) != recipe.rounds or any(len(row) != recipe.all_shards for row in recipe.counts):
        raise TrainChainError("job.invalid", "The counts do not fit rounds x shards (with the spare ones).")
    _check_files(recipe)
    _check_access(recipe)
    if recipe.steps > MAX_STEPS:
        raise TrainChainError("job.invalid", f"A shard has at most {MAX_STEPS} steps.")
    if recipe.merge.leave_one_out is not None and recipe.held_out is None:
        raise TrainChainError(
            "job.invalid", "`merge.leave_one_out` goes by the held-out loss, and there is no held-out data."
        )
    if not 0 < recipe.quorum <= 1 or not 0 < recipe.training.learning_rate <= 1:
        raise TrainChainError("job.invalid", "Quorum and learning rate lie between 0 and 1.")
    if (price := job_price(recipe)) > recipe.pay.budget:
        raise TrainChainError(
            "money.budget_too_small",
            f"The work and its audits cost up to {show(price)} TRAIN; the budget is {show(recipe.pay.budget)}.",
            hint="Raise `pay.budget`, lower `pay.per_million_tokens`, or train less.",
        )


def _check_files(recipe: ResolvedRecipe) -> None:
    """Where each file is to come from. Names of sources are only kept: no hub ever asks a source for anything."""
    data = [*recipe.datasets, *([recipe.held_out.dataset] if recipe.held_out else [])]
    given = [(recipe.base_model.source, ref) for ref in recipe.base_model.files]
    given += [(entry.source, entry.file) for entry in data if entry.file is not None]
    given.append((None, recipe.lora.initial))
    sealed = recipe.sealed
    if sealed is not None:
        given += [(None, ref) for ref in [*sealed.base, *([sealed.held_out] if sealed.held_out else [])]]
    base = [ref.name for ref in (sealed.base if sealed and sealed.base else recipe.base_model.files)]
    if not base or len(given) > MAX_FILES:
        raise TrainChainError("job.invalid", f"A job has from one to {MAX_FILES} files beside its sealed blocks.")
    if len(set(base)) < len(base):
        raise TrainChainError("job.invalid", "Two files of the base model have one name.")
    blocks = [(None, ref) for row in sealed.blocks for ref in row] if sealed else []
    for source, ref in [*given, *blocks]:
        if ref.size > MAX_OBJECT:
            raise TrainChainError("job.invalid", f"The file {ref.name} is larger than 1 TiB.")
        if (source is None) != (ref.path is None):
            raise TrainChainError(
                "job.invalid", f"The file {ref.name} needs a path in its source, and none where it has no source."
            )


def _check_access(recipe: ResolvedRecipe) -> None:
    """A job has keys exactly where it is sealed, and whoever chooses the workers seals."""
    sealed, wrong = recipe.sealed, None
    data = [*recipe.datasets, *([recipe.held_out.dataset] if recipe.held_out else [])]
    if (sealed is None) != (recipe.access.keys is None):
        wrong = "A job has `access.keys` exactly where it is sealed."
    elif recipe.access.workers != "anyone" and sealed is None:
        wrong = "A job that does not admit anyone is sealed."
    elif sealed is None:
        if any(entry.file is None for entry in data):
            wrong = "A data set has no file, and the job is not sealed."
    elif len(sealed.blocks) != recipe.rounds or any(len(row) != recipe.all_shards for row in sealed.blocks):
        wrong = "The sealed blocks do not fit rounds x shards (with the spare ones)."
    elif recipe.rounds * recipe.all_shards > MAX_BLOCKS:
        wrong = f"A sealed job has at most {MAX_BLOCKS} blocks."
    elif any(entry.file is not None for entry in data):
        wrong = "A sealed job names the file of a data set."
    elif (sealed.held_out is None) != (recipe.held_out is None):
        wrong = "A sealed job has a sealed held-out file exactly where it has held-out data."
    elif bool(sealed.base) != (recipe.base_model.source is None) or bool(sealed.base) == bool(recipe.base_model.files):
        wrong = "The base model of a sealed job is sealed, or it has a source and is named file by file."
    if wrong:
        raise TrainChainError("job.invalid", wrong)


def missing(hub: Hub, job_id: str) -> list[str]:
    with hub.store.read() as db:
        query = select(schema.objects.c.digest).where(
            schema.objects.c.job == job_id, schema.objects.c.present.is_(False)
        )
        return sorted(db.execute(query).scalars())


def object_cap(hub: Hub, owner: str, job_id: str, digest: str) -> int:
    """The size an upload must have. Raises `session.forbidden`, `object.unexpected`."""
    _insist_owner(hub, owner, job_id)
    with hub.store.read() as db:
        row = one(db, schema.objects, digest=digest, job=job_id)
    if row is None:
        raise TrainChainError("object.unexpected", f"Job {job_id} does not name an object {digest}.")
    return int(row["size"])


def keep_object(hub: Hub, job_id: str, digest: str, spool: Spool) -> dict[str, Any]:
    """Store an uploaded object of a job under its digest. Raises `object.digest`."""
    if spool.digest != digest:
        raise TrainChainError("object.digest", f"Sent as {digest}, the bytes are {spool.digest}.")
    hub.objects.keep(spool)
    with hub.store.write() as db:
        db.execute(
            update(schema.objects)
            .where(schema.objects.c.job == job_id, schema.objects.c.digest == digest)
            .values(present=True)
        )
    return {"digest": digest}


def fund(hub: Hub, job_id: str) -> dict[str, Any]:
    """Look at the escrow and open the job if it covers what comes next. Asks the chain; anyone may call it.

    Raises `job.incomplete`, `job.unfunded`, `job.invalid`.
    """
    job = hub.job(job_id)
    if lacking := missing(hub, job_id):
        raise TrainChainError("job.incomplete", f"{len(lacking)} objects of the job are not uploaded yet.")
    escrow = hub.chain.job(job_id)
    if escrow is None:
        raise TrainChainError("job.unfunded", f"The escrow has no job {job_id}.", hint="Create and fund it first.")
    recipe = hub.recipe(job)
    _check_escrow(hub, job, escrow, recipe)
    spent = owed(hub, job_id, expected=True)
    following = min(job["round"] + 1, recipe.rounds)
    with hub.store.write() as db:
        fields = {"funded": escrow.funded, "deadline": float(escrow.deadline), "grace": float(escrow.grace)}
        db.execute(update(schema.jobs).where(schema.jobs.c.id == job_id).values(**fields))
        row = one(db, schema.jobs, id=job_id)
        if row is None or row["state"] != Job.UNFUNDED:
            return {"job": job_id, "state": row["state"] if row else ""}
        if escrow.funded - spent < round_price(recipe, following):
            raise TrainChainError(
                "job.unfunded",
                f"The escrow holds {show(escrow.funded - spent)} TRAIN free; round {following} can cost "
                f"{show(round_price(recipe, following))}.",
            )
        after = Job.RUNNING if row["round"] else Job.OPEN
        move(db, schema.jobs, row, after, now=hub.clock())
    hub.bell.ring()
    return {"job": job_id, "state": str(after)}


def _check_escrow(hub: Hub, job: Row, escrow: EscrowJob, recipe: ResolvedRecipe) -> None:
    """The escrow must promise what the recipe says, to this hub, for long enough."""
    wrong = None
    if escrow.hub.lower() != hub.chain.address.lower():
        wrong = f"it names the hub {escrow.hub}, this one is {hub.chain.address}"
    elif escrow.token.lower() != hub.chain.token.lower():
        wrong = f"it pays in the token {escrow.token}, this hub's is {hub.chain.token}"
    elif escrow.spec_hash.removeprefix("0x") != recipe.spec_hash:
        wrong = "its spec hash is not that of the published recipe"
    elif escrow.round_cap < round_cap(recipe):
        wrong = f"its round cap of {show(escrow.round_cap)} is below the price of a round"
    elif escrow.grace < recipe.pay.grace or escrow.activation_delay > recipe.pay.activation_delay:
        wrong = "its grace time or its activation delay is worse for workers than the recipe's"
    elif escrow.deadline <= hub.clock():
        wrong = "its deadline has passed"
    elif escrow.halted:
        wrong = "its owner has halted it"
    elif escrow.next_hub:
        wrong = f"its owner has named another hub, {escrow.next_hub}"
    if wrong:
        raise TrainChainError("job.invalid", f"The escrow of job {job['id']} does not fit: {wrong}.")


def cancel(hub: Hub, owner: str, job_id: str) -> dict[str, Any]:
    """Stop a job: no new lease is given; held ones may still contribute and are paid. Raises `job.closed`."""
    _insist_owner(hub, owner, job_id)
    with hub.store.write() as db:
        job = one(db, schema.jobs, id=job_id)
        if job is None or job["state"] not in (Job.UNFUNDED, Job.OPEN, Job.RUNNING):
            raise TrainChainError("job.closed", f"Job {job_id} has ended already.")
        move(db, schema.jobs, job, Job.CANCELLED, now=hub.clock())
    hub.bell.ring()
    return {"job": job_id, "state": str(Job.CANCELLED)}


def _insist_owner(hub: Hub, wallet: str, job_id: str) -> None:
    if hub.job(job_id)["owner"].lower() != wallet.lower():
        raise TrainChainError("session.forbidden", "Only the job's owner may do that.")


def owed(hub: Hub, job_id: str, *, expected: bool = False) -> int:
    """Token units that shards and replays have earned so far, but for what is forfeited; with those `expected` of what
    is still out, and of the audits of every round that was opened."""
    shards, rounds, work, replays = schema.shards, schema.rounds, schema.contributions, schema.replays
    earned = select(work.c.reward).where(work.c.job == job_id, work.c.forfeited.is_(None))
    fees = select(replays.c.fee).where(
        replays.c.job == job_id, replays.c.place.is_not(None), replays.c.forfeited.is_(None)
    )
    out = select(shards.c.round, shards.c.shard).where(shards.c.job == job_id, shards.c.state.in_(UNDONE))
    with hub.store.read() as db:  # one snapshot: what comes in meanwhile is counted once
        total: int = sum(db.execute(earned).scalars())
        audits: int = sum(db.execute(fees).scalars())
        if expected:
            recipe = hub.recipe(db.execute(select(schema.jobs).where(schema.jobs.c.id == job_id)).mappings().one())
            opened = db.execute(select(rounds.c.round).where(rounds.c.job == job_id)).scalars()
            audits = max(audits, sum(audit_price(recipe, number) for number in opened))
            total += sum(shard_reward(recipe, round_, shard) for round_, shard in db.execute(out))
        return total + audits


def find(hub: Hub, name: str) -> str:
    """A job's id from its id, a unique prefix of it, or its name (the newest of that name)."""
    with hub.store.read() as db:
        rows = db.execute(select(schema.jobs.c.id, schema.jobs.c.name).order_by(schema.jobs.c.created.desc()))
        every = [(str(r.id), str(r.name)) for r in rows]
    if name.startswith("0x"):  # an id is never mistaken for a name that somebody made to look like one
        every = [(job, "") for job, _ in every]
    exact = [job for job, _ in every if job == name]
    prefixed = [
        job for job, _ in every if len(name) >= 3 and job.removeprefix("0x").startswith(name.removeprefix("0x"))
    ]
    named = [job for job, label in every if label == name]
    found = exact or named[:1] or prefixed
    if len(found) > 1:
        raise TrainChainError("job.ambiguous", f"{len(found)} jobs begin with {name!r}.", hint="Give more digits.")
    if not found:
        raise TrainChainError("job.unknown", f"This hub has no job called {name!r}.", hint="trainchain jobs ls")
    return found[0]


def spec_of(hub: Hub, job_id: str) -> bytes:
    text = hub.job(job_id)["recipe"].encode()
    assert sha256(text) == hub.job(job_id)["spec_hash"]
    return bytes(text)
