"""What a verdict changes: the audit, what its worker loses, whom it proves wrong, and the document that says why.

All in the transaction that the verdict is written in.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, func, insert, select, update

from trainchain.core.digests import canonical_json
from trainchain.core.evidence import REJECTS, Evidence, Forfeit, Measured, ReplayEvidence
from trainchain.core.hub import earnings, schema, states, vouchers
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import Row, move, one
from trainchain.core.replays import Distances
from trainchain.core.rewards import Earned, forfeits
from trainchain.core.states import PENDING, Audit, Lease

RINGERS = 4
"""Audits of a job whose states are kept, to be handed out again."""
SAYS = {
    "audit.passed": "What was replayed is what was contributed.",
    "audit.unaudited": "Nobody replayed it in time: the work is accepted and paid, unaudited.",
    "audit.undecided": "The replays do not agree with each other: the work is accepted and paid.",
    "audit.silent": "The worker did not answer the draw in time.",
    "audit.wrong_start": "The worker committed to another start than the round's adapter and moments.",
    "audit.wrong_delta": "The end that the worker committed to is not what it contributed.",
    "audit.impossible": "The worker committed to a state that no training from the round's start has.",
    "audit.differs": "Independent replays agree with each other, and not with what was contributed.",
}
_STATES = {"audit.passed": Audit.PASSED, "audit.unaudited": Audit.UNAUDITED, "audit.undecided": Audit.UNAUDITED}


class Stale(Exception):
    """Somebody else moved the audit meanwhile; what was to be written is not."""


class Finding(NamedTuple):
    """What was found, as the evidence says it."""

    code: str
    expected: str | None = None
    found: str | None = None
    cold: bool | None = None
    tolerance: Measured | None = None
    replays: Sequence[ReplayEvidence] = ()
    wrong: Sequence[str] = ()
    """The leases of the replays that it proves wrong."""
    keep: bool = False
    """Whether a replay was equal, so that the answer is known beyond doubt."""


def measured(distances: Distances) -> Measured:
    """For a document, which has no word for infinity."""
    return Measured(**{name: min(value, sys.float_info.max) for name, value in vars(distances).items()})


def conclude(hub: Hub, db: Connection, audit: Row, finding: Finding, now: float, **fields: Any) -> list[str]:
    """Write a verdict down; returns the digests of objects that nobody names any more. Raises Stale."""
    fresh = one(db, schema.audits, lease=audit["lease"])
    if fresh is None or fresh["version"] != audit["version"]:
        raise Stale
    contribution, job = one(db, schema.contributions, lease=audit["lease"]), one(db, schema.jobs, id=audit["job"])
    assert contribution is not None
    assert job is not None
    number, table, lost = earnings.following(db, audit["job"]), schema.contributions, None
    rejects = finding.code in REJECTS
    if rejects:
        rows = forfeits(_queue(db, audit["job"], audit["worker"], "shard"))
        places = [row.place for row in rows]
        theirs = (table.c.job == audit["job"]) & (table.c.worker == audit["worker"]) & table.c.place.in_(places)
        db.execute(update(table).where(theirs).values(forfeited=number))
        lost = Forfeit(first=min(places), last=max(places), amount=sum(row.amount for row in rows))
    else:
        db.execute(update(table).where(table.c.lease == audit["lease"]).values(resolved=number))
    audit_row: Mapping[str, Any] = {**audit, **fields}
    document = canonical_json(_document(db, audit_row, contribution, finding, lost, now).model_dump(mode="json"))
    digest, private = hub.objects.put(document), hub.recipe(job).private
    if one(db, schema.objects, digest=digest, job=audit["job"]) is None:
        values = {"digest": digest, "job": audit["job"], "size": len(document), "present": True}
        db.execute(insert(schema.objects).values(public=not private, **values))
    after = _STATES.get(finding.code, Audit.FAILED)
    said = {"code": finding.code, "evidence": digest, "worker": audit["worker"]}
    said |= lost.model_dump(mode="json") if lost else {}
    values = {"code": finding.code, "evidence": digest, "decided": now, "wants": [], **fields}
    if not move(db, schema.audits, audit, after, now=now, data=said, **values):
        raise Stale
    forget = [] if rejects else _forget(db, audit, keep=finding.keep)
    _end_leases(db, audit["lease"], now)
    if rejects:
        if not private:
            states.publish(db, audit["job"], _leases_of(db, audit["lease"]))
        forget += _void(db, audit, now)
    for lease in finding.wrong:
        forfeit_fees(db, lease, number)
    vouchers.vest(hub, db, audit["job"], audit["worker"])
    return forget


def _document(
    db: Connection, audit: Mapping[str, Any], contribution: Row, finding: Finding, lost: Forfeit | None, now: float
) -> Evidence:
    round_ = one(db, schema.rounds, job=audit["job"], round=audit["round"])
    assert round_ is not None
    signed = contribution["signed"]
    return Evidence.model_validate(
        {
            "format": "trainchain.evidence/1",
            "code": finding.code,
            "says": SAYS[finding.code],
            "contribution": signed["contribution"],
            "signature": signed["signature"],
            "place": contribution["place"],
            "at_risk": audit["at_risk"],
            "secret_hash": round_["secret_hash"],
            "segment": audit["segment"],
            "micro_tokens": signed["micro_tokens"][audit["segment"]],
            "openings": audit["answer"]["openings"] if audit["answer"] else [],
            "expected": finding.expected,
            "found": finding.found,
            "states": {str(index): digest for index, digest in states.named(db, audit["lease"]).items()},
            "cold": finding.cold,
            "tolerance": finding.tolerance,
            "replays": list(finding.replays),
            "forfeits": lost,
            "drawn": audit["drawn"],
            "decided": now,
            "worker": audit["worker"],
        }
    )


def _leases_of(db: Connection, audit_lease: str) -> list[str]:
    """The leases under which an audit's states were handed in."""
    replays = schema.replays
    mine = select(replays.c.lease).where(replays.c.audit == audit_lease, replays.c.ringer.is_(False))
    return [audit_lease, *db.execute(mine).scalars()]


def _forget(db: Connection, audit: Row, *, keep: bool) -> list[str]:
    """Forget an audit's states; where its answer is known, and few are kept, but the worker's two of the segment."""
    table, leases = schema.states, _leases_of(db, audit["lease"])
    which: ColumnElement[bool] = table.c.lease.in_(leases)
    if keep and known(db, audit["job"]) <= RINGERS:  # itself counted
        which &= (table.c.lease != audit["lease"]) | table.c.index.not_in([audit["segment"], audit["segment"] + 1])
    return states.forget(db, audit["job"], which)


def known(db: Connection, job_id: str) -> int:
    """Of how many passed audits of a job states are kept."""
    audits, replays, table = schema.audits, schema.replays, schema.states
    given = select(replays.c.audit).join(table, table.c.lease == replays.c.lease).where(table.c.job == job_id)
    own = select(table.c.lease).where(table.c.job == job_id)
    kept = audits.c.lease.in_(own) | audits.c.lease.in_(given)
    passed = (audits.c.job == job_id) & (audits.c.state == Audit.PASSED)
    return int(db.execute(select(func.count()).select_from(audits).where(passed, kept)).scalar_one())


def _end_leases(db: Connection, audit_lease: str, now: float) -> None:
    """Nobody need go on with what is decided. Fees of what is not done are free for others."""
    leases, replays = schema.leases, schema.replays
    out = select(leases).join(replays, replays.c.lease == leases.c.id)
    out = out.where(replays.c.audit == audit_lease, replays.c.ringer.is_(False), leases.c.state == Lease.HELD)
    for lease in db.execute(out).mappings().all():
        move(db, leases, lease, Lease.EXPIRED, now=now, data={"worker": lease["worker"]})
    undone = (replays.c.audit == audit_lease) & replays.c.ringer.is_(False) & replays.c.done.is_(None)
    db.execute(update(replays).where(undone).values(fee=0))


def _void(db: Connection, audit: Row, now: float) -> list[str]:
    """What else of the worker's waits for a verdict is forfeited with it."""
    table, gone = schema.audits, []
    rows = select(table).where(
        table.c.job == audit["job"], table.c.worker == audit["worker"], table.c.state.in_(PENDING)
    )
    for row in db.execute(rows).mappings().all():
        move(db, table, row, Audit.VOID, now=now, data={"with": audit["lease"]}, wants=[], decided=now)
        _end_leases(db, row["lease"], now)
        gone += _forget(db, row, keep=False)
    return gone


def forfeit_fees(db: Connection, lease_id: str, number: int) -> None:
    """Take from an auditor whose replay is wrong all the fees that have not vested."""
    table, wrong = schema.replays, one(db, schema.replays, lease=lease_id)
    assert wrong is not None
    rows = forfeits(_queue(db, wrong["job"], wrong["auditor"], "replay"))
    mine = (table.c.job == wrong["job"]) & (table.c.auditor == wrong["auditor"])
    db.execute(update(table).where(mine, table.c.place.in_([row.place for row in rows])).values(forfeited=number))


def _queue(db: Connection, job_id: str, wallet: str, kind: str) -> list[Earned]:
    return [row for row in earnings.earned(db, job_id, wallet) if row.kind == kind]
