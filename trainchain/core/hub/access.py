"""Whom a job admits, and who may read what of it.

Admission is asked in SQL, so that a private job at the front of the queue starves nobody who comes for another.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, func, insert, or_, select

from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import Row
from trainchain.core.models import ResolvedRecipe
from trainchain.core.states import Audit, Job, Round


def admit(db: Connection, job_id: str, owner: str, recipe: ResolvedRecipe) -> None:
    """Write down whom a new job admits, beside its column `anyone`; see `Access.admits`."""
    workers = recipe.access.workers
    if workers == "anyone":
        return
    named: Sequence[str] = [owner] if isinstance(workers, str) else workers
    rows = [{"job": job_id, "wallet": wallet} for wallet in sorted({wallet.lower() for wallet in named})]
    db.execute(insert(schema.admissions), rows)


def admits(wallet: str) -> ColumnElement[bool]:
    """Whether the job in a row of `jobs` admits this wallet."""
    named = select(schema.admissions.c.wallet).where(
        schema.admissions.c.job == schema.jobs.c.id, schema.admissions.c.wallet == wallet.lower()
    )
    return or_(schema.jobs.c.anyone, named.correlate(schema.jobs).exists())


def insist(hub: Hub, db: Connection, job_id: str, wallet: str) -> None:
    """Raises `access.denied` unless the job admits the wallet, or it is its owner's or the hub's own evaluator's: these
    two replay what others did."""
    if wallet in hub.evaluators:
        return
    known = or_(admits(wallet), func.lower(schema.jobs.c.owner) == wallet.lower())
    if db.execute(select(schema.jobs.c.id).where(schema.jobs.c.id == job_id, known)).first() is None:
        raise TrainChainError("access.denied", f"Job {job_id} does not admit the wallet {wallet}.")


def insist_reader(hub: Hub, job_id: str, wallet: str) -> None:
    """Raises `access.denied` unless the wallet is the job's owner's, or may work on it."""
    if not is_owner(hub.job(job_id), wallet):
        with hub.store.read() as db:
            insist(hub, db, job_id, wallet)


def is_owner(job: Row, wallet: str | None) -> bool:
    return wallet is not None and bool(job["owner"].lower() == wallet.lower())


def may_read(hub: Hub, wallet: str, digest: str) -> bool:
    """Whether a wallet may read an object that is not public: the job's owner, and whoever the job admits (or the
    hub's own evaluator) that was ever leased a part of it.

    Held-out data is for the owner and the hub's evaluating child alone: who trains must not see what it is judged by.
    Nor is a delta for others than its worker before it is merged, or the job settled: it could be copied. Nor, not even
    for the owner, a training state but for an audit's parties.
    """
    if _is_state(hub, digest):
        return _may_read_state(hub, wallet, digest)
    objects, jobs, leases = schema.objects, schema.jobs, schema.leases
    leased = select(leases.c.id).where(leases.c.job == objects.c.job, leases.c.worker == wallet).exists()
    over = jobs.c.state.in_([Job.SETTLED, Job.CLOSED])
    unmerged = (
        select(leases.c.id)
        .where(leases.c.id == objects.c.lease, leases.c.worker != wallet, ~over, ~_is_merged())
        .correlate(objects, jobs)
        .exists()
    )
    admitted: Any = True if wallet in hub.evaluators else admits(wallet)
    query = (
        select(jobs)
        .join(objects, jobs.c.id == objects.c.job)
        .where(objects.c.digest == digest, objects.c.present)
        .where(or_(jobs.c.owner == wallet, and_(leased, admitted, ~unmerged)))
    )
    with hub.store.read() as db:
        rows = list(db.execute(query).mappings())
    return any(
        job["owner"] == wallet or wallet in hub.evaluators or not hub.recipe(job).only_held_out(digest) for job in rows
    )


def _is_state(hub: Hub, digest: str) -> bool:
    query = select(schema.states.c.lease).where(schema.states.c.digest == digest).limit(1)
    with hub.store.read() as db:
        return db.execute(query).first() is not None


def _may_read_state(hub: Hub, wallet: str, digest: str) -> bool:
    """A state is for who handed it in; for who replays from it, never to it; and for all who may read the job's
    adapters where it is evidence of a rejection."""
    states, leases, replays, audits = schema.states, schema.leases, schema.replays, schema.audits
    here = states.c.digest == digest
    own = select(states.c.lease).join(leases, leases.c.id == states.c.lease).where(here, leases.c.worker == wallet)
    replayed = (
        select(states.c.lease)
        .join(audits, (audits.c.lease == states.c.lease) & (audits.c.segment == states.c.index))
        .join(replays, replays.c.audit == audits.c.lease)
        .where(here, replays.c.auditor == wallet)
    )
    given = select(states.c.lease).where(here, states.c.lease == audits.c.lease)
    theirs = select(states.c.lease).join(replays, replays.c.lease == states.c.lease)
    theirs = theirs.where(here, replays.c.audit == audits.c.lease)
    failed = select(audits.c.job).where(audits.c.state == Audit.FAILED, or_(given.exists(), theirs.exists()))
    jobs = schema.jobs
    leased = select(leases.c.id).where(leases.c.job == jobs.c.id, leases.c.worker == wallet).exists()
    reader = or_(jobs.c.owner == wallet, and_(leased, admits(wallet)))
    evidence = select(jobs.c.id).where(jobs.c.id.in_(failed), reader)
    with hub.store.read() as db:
        return any(db.execute(query.limit(1)).first() is not None for query in (own, replayed, evidence))


def _is_merged() -> ColumnElement[bool]:
    """Whether the object in a row of `objects` is a delta that a merge has taken in."""
    contributions, rounds = schema.contributions, schema.rounds
    place = and_(rounds.c.job == contributions.c.job, rounds.c.round == contributions.c.merged_in)
    given = and_(contributions.c.job == schema.objects.c.job, contributions.c.delta == schema.objects.c.digest)
    found = select(contributions.c.lease).join(rounds, place).where(given, rounds.c.state == Round.MERGED)
    return found.correlate(schema.objects).exists()


def is_public(hub: Hub, digest: str) -> bool:
    query = select(schema.objects.c.digest).where(
        schema.objects.c.digest == digest, schema.objects.c.public, schema.objects.c.present
    )
    with hub.store.read() as db:
        return db.execute(query.limit(1)).first() is not None


def is_private(hub: Hub, job_id: str) -> bool:
    """Whether the job's adapters, deltas and answers are for its owner and its workers alone."""
    return hub.recipe(hub.job(job_id)).private
