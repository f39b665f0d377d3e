"""The keys of sealed files: kept as the owner wrapped them for this hub, wrapped again for who holds a lease.

A key is in clear only in this process's memory, between the two wraps: never in the database, in a log, an event, an
error or on the disk.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from sqlalchemy import Connection, delete, insert, select

from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema
from trainchain.core.hub.leases import mine_in, say_if_over
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import Row
from trainchain.core.models import Digest, FileRef, Model, ResolvedRecipe, Sealed
from trainchain.core.seal import MAX_WRAPPED, for_hub, for_lease, wrap
from trainchain.core.states import Lease

Wrapped = Annotated[str, Field(max_length=MAX_WRAPPED)]
_IDENTITY = re.compile(r"AGE-SECRET-KEY-1[A-Z0-9]{58}")


class KeyRequest(Model):
    """A worker's exchange key and its wallet's signature over it (EIP-712 `ExchangeKey`)."""

    public_key: Digest
    signature: Annotated[str, Field(max_length=200)]


def check(hub: Hub, job_id: str, recipe: ResolvedRecipe, keys: Mapping[str, str]) -> None:
    """Insist on one key that opens for every sealed file of the recipe, and on no other. Raises `key.invalid`."""
    wanted = {ref.sha256 for ref in recipe.sealed.files()} if recipe.sealed else set()
    for digest in sorted(wanted ^ set(keys)):
        missing = "comes without its key" if digest in wanted else "is none of the job's, yet a key of it came"
        raise TrainChainError("key.invalid", f"The sealed file {digest} {missing}.")
    for digest, wrapped in keys.items():
        _open(hub, job_id, digest, wrapped)


def _open(hub: Hub, job_id: str, digest: str, wrapped: str) -> str:
    try:
        identity = hub.exchange.unwrap(wrapped, for_hub(hub.chain.chain_id, job_id, digest, hub.chain.address))
    except TrainChainError:
        identity = ""
    if not _IDENTITY.fullmatch(identity):
        raise TrainChainError(
            "key.invalid",
            f"The key of the sealed file {digest} is not wrapped for this hub and this job, or is no age identity.",
            hint="If the hub lost its exchange key: the owner cancels the job and submits the recipe again as another.",
        )
    return identity


def keep(db: Connection, job_id: str, keys: Mapping[str, str]) -> None:
    """Store a job's keys as they came, in place of those it had."""
    forget(db, job_id)
    if keys:
        rows = [{"job": job_id, "digest": digest, "wrapped": wrapped} for digest, wrapped in keys.items()]
        db.execute(insert(schema.keys), rows)


def forget(db: Connection, job_id: str) -> None:
    """Delete a job's keys; SQLite overwrites what is deleted (`secure_delete`)."""
    db.execute(delete(schema.keys).where(schema.keys.c.job == job_id))


def release(hub: Hub, worker: str, lease_id: str, request: KeyRequest) -> dict[str, Any]:
    """The keys that a held lease needs, each wrapped for the worker's exchange key, this lease and its file.

    Raises `lease.unknown`, `lease.not_yours`, `access.denied`, `object.unexpected` where the job is not sealed,
    `shard.already_accepted`, `contribution.too_late`, `job.closed`, `lease.lost` where it is not held any more,
    `key.invalid`.
    """
    now = hub.clock()
    with hub.store.read() as db:
        lease = mine_in(hub, db, worker, lease_id)
        job = db.execute(select(schema.jobs).where(schema.jobs.c.id == lease["job"])).mappings().one()
        sealed = hub.recipe(job).sealed
        if sealed is None:
            raise TrainChainError("object.unexpected", f"Job {job['id']} is not sealed: nothing of it needs a key.")
        say_if_over(db, lease_id, now)
        if lease["state"] != Lease.HELD or lease["expires"] < now:
            raise TrainChainError("lease.lost", f"The lease {lease_id} is not held any more; it opens nothing.")
        wanted = [ref.sha256 for ref in _needed(sealed, lease)]
        mine = select(schema.keys).where(schema.keys.c.job == job["id"], schema.keys.c.digest.in_(wanted))
        kept = {row["digest"]: row["wrapped"] for row in db.execute(mine).mappings()}
    _insist_signed(hub, worker, request)
    keys = []
    for digest in wanted:
        if digest not in kept:
            raise TrainChainError("key.invalid", f"The hub has no key of the sealed file {digest} any more.")
        purpose = for_lease(hub.chain.chain_id, job["id"], lease["round"], lease["shard"], lease_id, digest, worker)
        wrapped = wrap(_open(hub, job["id"], digest, kept[digest]), request.public_key, purpose)
        keys.append({"digest": digest, "wrapped": wrapped})
    return {"keys": keys}


def _needed(sealed: Sealed, lease: Row) -> list[FileRef]:
    """Who trains gets its own block and no other; who measures gets the held-out rows and no block."""
    if lease["kind"] == "evaluate":
        own = [sealed.held_out] if sealed.held_out else []
    else:
        own = [sealed.blocks[lease["round"] - 1][lease["shard"]]]
    return [*own, *sealed.base]


def _insist_signed(hub: Hub, worker: str, request: KeyRequest) -> None:
    message = {"account": worker, "publicKey": "0x" + request.public_key}
    try:
        signer = hub.chain.recover("ExchangeKey", message, request.signature)
    except TrainChainError:
        signer = ""
    if signer.lower() != worker.lower():
        raise TrainChainError("key.invalid", "The exchange key is not signed by the wallet that holds the lease.")
