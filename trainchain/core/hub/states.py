"""Training states that were handed in: objects like others, but named by a table of their own, since nobody may read
them but an audit's parties, and nobody needs them once it is over."""

import math
from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from trainchain.core.adapter import tensor_header
from trainchain.core.encodings import Shapes
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import Row, one
from trainchain.core.models import ResolvedRecipe
from trainchain.core.objects import Spool
from trainchain.core.segments import State, StateDigests, read_state, segment_ends, state_digests

SPARE_BYTES = 4096
REMEMBERED = 1000
"""States whose digests are kept in memory."""


def state_size(shapes: Shapes) -> int:
    """The bytes of every state of an adapter of these shapes."""
    specs = {}
    for name, shape in shapes.items():
        for kind, dtype, width in (("w", "F32", 4), ("m", "BF16", 2), ("v", "BF16", 2)):
            specs[f"{kind}.{name}"] = (dtype, tuple(shape), math.prod(shape) * width)
    return len(tensor_header(specs)) + sum(size for _, _, size in specs.values())


def cap(hub: Hub, job: Row) -> int:
    """The most bytes of a state that are read."""
    return state_size(hub.shapes(job)) + SPARE_BYTES


def steps_at(recipe: ResolvedRecipe, index: int) -> int:
    """After how many steps of its shard a state is taken, by its index."""
    return 0 if index == 0 else segment_ends(recipe.steps, recipe.training.segment_steps)[index - 1]


def parsed(hub: Hub, job: Row, index: int, spool: Spool) -> StateDigests:
    """What was uploaded as a state, by its digests. Raises `state.invalid`."""
    if spool.size < state_size(hub.shapes(job)) - SPARE_BYTES:
        raise TrainChainError("state.invalid", f"A state of this job has more than the {spool.size} bytes sent.")
    found = state_digests(read_state(spool.rewound().read(), steps_at(hub.recipe(job), index), hub.shapes(job)))
    if len(hub.state_digests) >= REMEMBERED:
        hub.state_digests.clear()
    hub.state_digests[spool.digest] = found
    return found


def digests_of(hub: Hub, job: Row, index: int, digest: str) -> StateDigests:
    """Of a stored state."""
    return hub.state_digests.get(digest) or state_digests(read(hub, job, index, digest))


def keep(db: Connection, job_id: str, lease_id: str, index: int, digest: str, size: int) -> list[str]:
    """Name a stored state; returns the digests of what it takes the place of and nobody names any more."""
    table, before = schema.states, one(db, schema.states, lease=lease_id, index=index)
    if before is None:
        db.execute(insert(table).values(lease=lease_id, index=index, job=job_id, digest=digest))
    else:
        db.execute(update(table).where(table.c.lease == lease_id, table.c.index == index).values(digest=digest))
    if one(db, schema.objects, digest=digest, job=job_id) is None:
        db.execute(insert(schema.objects).values(digest=digest, job=job_id, size=size, public=False, present=True))
    return _unname(db, job_id, [before["digest"]] if before is not None and before["digest"] != digest else [])


def forget(db: Connection, job_id: str, which: ColumnElement[bool]) -> list[str]:
    """Forget these rows of a job's states; returns the digests of what nobody names any more."""
    table = schema.states
    rows = select(table.c.digest).where(table.c.job == job_id, which)
    digests = list(db.execute(rows).scalars())
    db.execute(delete(table).where(table.c.job == job_id, which))
    return _unname(db, job_id, digests)


def _unname(db: Connection, job_id: str, digests: Collection[str]) -> list[str]:
    objects, states = schema.objects, schema.states
    named = set(
        db.execute(select(states.c.digest).where(states.c.job == job_id, states.c.digest.in_(digests))).scalars()
    )
    gone = sorted(set(digests) - named)
    db.execute(delete(objects).where(objects.c.job == job_id, objects.c.digest.in_(gone), objects.c.public.is_(False)))
    return gone


def publish(db: Connection, job_id: str, leases: Collection[str]) -> None:
    """Open the states of these leases to everybody: they are evidence."""
    objects, states = schema.objects, schema.states
    found = select(states.c.digest).where(states.c.job == job_id, states.c.lease.in_(leases))
    db.execute(update(objects).where(objects.c.job == job_id, objects.c.digest.in_(found)).values(public=True))


def named(db: Connection, lease_id: str) -> dict[int, str]:
    """The states of a lease by their index."""
    table = schema.states
    rows = db.execute(select(table.c.index, table.c.digest).where(table.c.lease == lease_id))
    return {row[0]: row[1] for row in rows}


def read(hub: Hub, job: Row, index: int, digest: str) -> State:
    return read_state(hub.objects.get(digest), steps_at(hub.recipe(job), index), hub.shapes(job))


def any_of(leases: Any) -> ColumnElement[bool]:
    return schema.states.c.lease.in_(leases)
