"""Replays as they come in: who signed what end, what it is beside the claim, and what follows from all of them.

Comparing is done outside any transaction; the replay is done, the audit goes on and its verdict falls in one.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, func, select, update

from trainchain.core.errors import TrainChainError
from trainchain.core.hub import auditors, draws, earnings, schema, states, vouchers
from trainchain.core.hub.contributions import drop_unnamed
from trainchain.core.hub.leases import mine
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import Row, move, one
from trainchain.core.hub.verdicts import RINGERS, Stale, conclude, forfeit_fees, known
from trainchain.core.hub.weighing import Case, Measure, Weighed, case_of, done_replays, leaf_at, opened, weigh
from trainchain.core.messages import SignedReplay
from trainchain.core.objects import Spool
from trainchain.core.segments import NO_END
from trainchain.core.states import ENDED, Audit, Lease
from trainchain.core.verdicts import Decision

RETRIES = 8


def hand_in(hub: Hub, auditor: str, lease_id: str, signed: SignedReplay) -> dict[str, bool]:
    """Take what an auditor got: its signed end, and once the hub has seen the state where that is another than the
    claimed one, the replay. The first end that it signs counts.

    Raises `object.unexpected`, `replay.invalid`, `audit.too_late`.
    """
    lease = mine(hub, auditor, lease_id)
    if lease["kind"] != "replay":
        raise TrainChainError("object.unexpected", "This lease does not ask for a replay.")
    with hub.store.read() as db:
        replay = one(db, schema.replays, lease=lease_id)
        if replay is None:
            raise TrainChainError("audit.too_late", f"The replay under the lease {lease_id} was begun anew.")
        case = case_of(hub, db, replay["audit"])
    _insist_signed(hub, case, replay, signed)
    if replay["signed"] is not None and replay["end_leaf"] != signed.replay.endLeaf:
        raise TrainChainError(
            "replay.invalid", f"Another end, {replay['end_leaf']}, was signed under this lease before."
        )
    with hub.store.write() as db:
        fresh = one(db, schema.replays, lease=lease_id)
        if fresh is None or fresh["done"] is None:
            _insist_wanted(db, lease_id)
        if fresh is not None and fresh["signed"] is None:
            table = schema.replays
            values = {"signed": signed.model_dump(), "end_leaf": signed.replay.endLeaf}
            db.execute(update(table).where(table.c.lease == lease_id).values(**values))
    with hub.judging(lease_id):
        return _go_on(hub, lease_id)


def state_cap(hub: Hub, auditor: str, lease: Row, index: int) -> int:
    """The most bytes of a replayed end that are read. Raises `audit.none` where it is not asked for."""
    with hub.store.read() as db:
        replay = one(db, schema.replays, lease=lease["id"])
        if replay is None:
            raise TrainChainError("audit.too_late", f"The replay under the lease {lease['id']} was begun anew.")
        case = case_of(hub, db, replay["audit"])
        if replay["signed"] is None or index != case.audit["segment"] + 1:
            raise TrainChainError(
                "audit.none", f"The state {index} is not asked for: sign the end of the replay first."
            )
        if replay["done"] is None:
            _insist_wanted(db, lease["id"])
        elif not _may_keep(db, case, replay):
            raise TrainChainError("audit.none", "The replay is done; its end is not asked for.")
    return states.cap(hub, case.job)


def keep_state(hub: Hub, lease: Row, index: int, spool: Spool) -> dict[str, Any]:
    """Store a replayed end. Raises `state.invalid`, `replay.invalid` where it is not what was signed."""
    with hub.store.read() as db:
        replay = one(db, schema.replays, lease=lease["id"])
        assert replay is not None
        case = case_of(hub, db, replay["audit"])
    found = leaf_at(case, index, states.parsed(hub, case.job, index, spool))
    if found != replay["end_leaf"]:
        raise TrainChainError("replay.invalid", f"The state's leaf is {found}; signed was {replay['end_leaf']}.")
    digest = hub.objects.keep(spool)
    dropped = [digest]
    try:
        with hub.store.write() as db:
            fresh = one(db, schema.replays, lease=lease["id"])
            if fresh is None:
                raise TrainChainError("audit.too_late", f"The replay under the lease {lease['id']} was begun anew.")
            if fresh["done"] is None:
                _insist_wanted(db, lease["id"])
            elif not _may_keep(db, case_of(hub, db, fresh["audit"]), fresh):
                raise TrainChainError("audit.none", "The replay is done; its end is not asked for.")
            dropped = states.keep(db, lease["job"], lease["id"], index, digest, spool.size)
    finally:
        for other in dropped:
            drop_unnamed(hub, other)
    return {"digest": digest, "size": spool.size}


def _insist_signed(hub: Hub, case: Case, replay: Row, signed: SignedReplay) -> None:
    given, segment = signed.replay, case.audit["segment"]
    start = opened(case.audit["answer"], segment)
    assert start is not None
    wanted = {"jobId": case.job["id"], "lease": replay["lease"], "target": replay["audit"], "segment": segment}
    wanted |= {"startLeaf": leaf_at(case, segment, start)}
    for name, value in wanted.items():
        if getattr(given, name) != value:
            raise TrainChainError("replay.invalid", f"The replay's {name} is {getattr(given, name)}, not {value}.")
    signer = hub.chain.recover("Replay", given.model_dump(), signed.signature)
    if not signer.lower() == given.auditor.lower() == replay["auditor"].lower():
        raise TrainChainError("replay.invalid", "The replay is not signed by the wallet that holds its lease.")


def _insist_wanted(db: Connection, lease_id: str) -> None:
    """Under a lease that ran out a replay may still come, unless it went on without it."""
    lease = one(db, schema.leases, id=lease_id)
    assert lease is not None
    auditors.say_if_over(db, lease)
    replay, job = one(db, schema.replays, lease=lease_id), one(db, schema.jobs, id=lease["job"])
    known = replay is not None and replay["ringer"] and job is not None and job["state"] in ENDED
    if known and vouchers.is_over(db, lease["job"]):
        raise TrainChainError("audit.too_late", f"Job {lease['job']} has ended, and all fees of it are counted.")
    if lease["state"] == Lease.HELD:
        return
    replays, leases = schema.replays, schema.leases
    if replay is None or replay["ringer"]:
        raise TrainChainError("lease.lost", f"The lease {lease_id} ran out.")
    same = replay["audit"]
    other = select(leases.c.id).join(replays, replays.c.lease == leases.c.id)
    other = other.where(replays.c.audit == same, replays.c.ringer.is_(False), leases.c.state == Lease.HELD)
    if db.execute(other.limit(1)).first() is not None:
        raise TrainChainError("lease.lost", f"The lease {lease_id} ran out, and the replay was given to another.")


def _may_keep(db: Connection, case: Case, replay: Row) -> bool:
    """Whether a done replay's end is worth keeping, to be handed out again with a known answer."""
    audit = case.audit
    if replay["ringer"] or audit["code"] != "audit.passed" or not _is_equal(case, replay):
        return False
    start = audit["segment"] == 0 or audit["segment"] in states.named(db, audit["lease"])
    room = known(db, audit["job"]) < RINGERS + (audit["segment"] > 0)
    return start and room and auditors.kept_end(db, audit) is None


def _is_equal(case: Case, replay: Row) -> bool:
    index = case.audit["segment"] + 1
    claimed = opened(case.audit["answer"], index)
    return claimed is not None and leaf_at(case, index, claimed) == replay["end_leaf"]


def _go_on(hub: Hub, lease_id: str) -> dict[str, bool]:
    """Finish a signed replay if all it needs is there."""
    with hub.store.read() as db:
        replay = one(db, schema.replays, lease=lease_id)
        assert replay is not None
        case = case_of(hub, db, replay["audit"])
        index = case.audit["segment"] + 1
        seen = _is_equal(case, replay) or replay["end_leaf"] == NO_END or index in states.named(db, lease_id)
    if replay["done"] is None:
        if not seen:
            return {"done": False, "wants_state": True}
        if replay["ringer"]:
            _judge_ringer(hub, case, replay)
        else:
            go_on(hub, case.audit["lease"], coming=lease_id)
    with hub.store.read() as db:
        fresh = one(db, schema.replays, lease=lease_id)
        assert fresh is not None
        return {
            "done": fresh["done"] is not None,
            "wants_state": _may_keep(db, case_of(hub, db, replay["audit"]), fresh),
        }


def go_on(
    hub: Hub,
    audit_lease: str,
    *,
    coming: str | None = None,
    answer: dict[str, Any] | None = None,
    sent: Mapping[int, str] | None = None,
) -> None:
    """Bring an audit as far as it gets: with the replay that comes in, or with what its worker answers, of the states
    that it `sent`, where they were judged.

    Raises `audit.too_late` where it is decided meanwhile, `audit.answer_invalid` where other states came.
    """
    for _ in range(RETRIES):
        with hub.store.read() as db:
            case = case_of(hub, db, audit_lease)
            rows = done_replays(db, audit_lease, coming)
            seen = {row["lease"]: states.named(db, row["lease"]) for row in rows}
            own = states.named(db, audit_lease)
        if case.audit["state"] not in (Audit.DRAWN, Audit.ANSWERED):
            raise TrainChainError("audit.too_late", f"The audit of the lease {audit_lease} is decided.")
        if answer is not None and case.audit["state"] == Audit.ANSWERED:
            return  # by the same, sent twice
        if sent is not None and own != sent:
            raise TrainChainError("audit.answer_invalid", "Another state was uploaded while these were judged.")
        known_answer = answer or case.audit["answer"]
        weighed = weigh(hub, case, known_answer, rows, own, seen) if rows and known_answer is not None else None
        try:
            with hub.store.write() as db:
                if {lease: states.named(db, lease) for lease in (audit_lease, *seen)} != {audit_lease: own, **seen}:
                    raise Stale
                dropped = _apply(hub, db, case, weighed, coming, answer)
        except Stale:
            continue
        for digest in dropped:
            drop_unnamed(hub, digest)
        hub.bell.ring()
        return
    raise TrainChainError(
        "hub.failed", f"The audit of the lease {audit_lease} does not come to rest.", hint="Try again."
    )


def _apply(
    hub: Hub, db: Connection, case: Case, weighed: Weighed | None, coming: str | None, answer: dict[str, Any] | None
) -> list[str]:
    now, table = hub.clock(), schema.audits
    audit = one(db, table, lease=case.audit["lease"])
    if audit is None or audit["version"] != case.audit["version"]:
        raise Stale
    if coming is not None:
        _done(hub, db, case, coming, now)
    if answer is not None:
        since = audit["answered"] if answer.get("withheld") else now
        if not move(db, table, audit, Audit.ANSWERED, now=now, answer=answer, answered=since, wants=[]):
            raise Stale
        audit = one(db, table, lease=case.audit["lease"])
        assert audit is not None
    for told in weighed.finding.replays if weighed is not None else ():
        if told.distances is not None:
            here = schema.replays.c.lease == told.signed.replay.lease
            db.execute(update(schema.replays).where(here).values(distances=told.distances.model_dump()))
    if weighed is not None and weighed.lacking and audit["state"] == Audit.ANSWERED:
        by = draws.answer_by(case.recipe, case.job, now)
        values: dict[str, Any] = {"wants": [audit["segment"] + 1], "answer_by": by}
        if not move(db, table, audit, Audit.DRAWN, now=now, data=values, **values):
            raise Stale
    elif weighed is not None and not weighed.lacking and weighed.decision != Decision.MORE:
        return conclude(hub, db, audit, weighed.finding, now)
    else:
        db.execute(update(table).where(table.c.lease == audit["lease"]).values(version=audit["version"] + 1))
    return []


def _done(hub: Hub, db: Connection, case: Case, lease_id: str, now: float) -> None:
    table = schema.replays
    lease, replay = one(db, schema.leases, id=lease_id), one(db, table, lease=lease_id)
    assert lease is not None
    assert replay is not None
    if replay["done"] is not None:
        raise Stale
    _insist_wanted(db, lease_id)
    mine_ = (table.c.job == replay["job"]) & (table.c.auditor == replay["auditor"])
    place = (db.execute(select(func.max(table.c.place)).where(mine_)).scalar() or 0) + 1
    values: dict[str, Any] = {"done": now, "place": place, "counted": earnings.following(db, replay["job"])}
    if lease["state"] == Lease.EXPIRED:
        values["fee"] = auditors.fee_of(hub, db, case.job, case.audit) or 0
    db.execute(update(table).where(table.c.lease == lease_id).values(**values))
    move(db, schema.leases, lease, Lease.DONE, now=now)
    vouchers.vest(hub, db, replay["job"], replay["auditor"])


def _judge_ringer(hub: Hub, case: Case, replay: Row) -> None:
    """Hold a replay against the answer that is known: it pays, unless it is wrong."""
    index, wrong, values = case.audit["segment"] + 1, False, {}
    if replay["end_leaf"] == NO_END:
        wrong = True
    elif not _is_equal(case, replay):
        with hub.store.read() as db:
            end, own = auditors.kept_end(db, case.audit), states.named(db, case.audit["lease"])
            theirs = states.named(db, replay["lease"])[index]
        if end is not None:  # the job may have ended meanwhile
            distance, within = Measure(hub, case, own).apart(end, theirs)
            wrong, values = not within, {"distances": distance.model_dump()}
    with hub.store.write() as db:
        try:
            _done(hub, db, case, replay["lease"], hub.clock())
        except Stale:
            return
        table = schema.replays
        if values:
            db.execute(update(table).where(table.c.lease == replay["lease"]).values(**values))
        if wrong:
            forfeit_fees(db, replay["lease"], earnings.following(db, replay["job"]))
        dropped = states.forget(db, replay["job"], schema.states.c.lease == replay["lease"])
    for digest in dropped:
        drop_unnamed(hub, digest)
