"""What becomes of a draw: its worker hands in states and opens leaves, auditors replay, and none of it for ever.

What is sent is held against the root that was signed before the draw. Nothing here needs torch.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sqlalchemy import or_, select, true, update

from trainchain.core.adapter import delta as delta_of
from trainchain.core.checks import impossible
from trainchain.core.digests import sha256
from trainchain.core.encodings import encode
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import draws, replays, schema, states, verdicts, weighing
from trainchain.core.hub.contributions import drop_unnamed
from trainchain.core.hub.leases import mine
from trainchain.core.hub.replays import go_on
from trainchain.core.hub.service import Hub, attempt
from trainchain.core.hub.store import Row, one
from trainchain.core.hub.weighing import Case, case_of, leaf_at, opened, start_of
from trainchain.core.messages import Answer
from trainchain.core.objects import Spool
from trainchain.core.segments import Moments, StateDigests, start_leaf, verify
from trainchain.core.states import PENDING, Audit, Job

LAST = 3 / 4
"""Of the grace time: then no audit of a job waits for an auditor any more."""


def state_cap(hub: Hub, wallet: str, lease_id: str, index: int) -> int:
    """The most bytes of a state that are read under a lease. Raises `audit.none` where nobody asks for it."""
    lease = mine(hub, wallet, lease_id)
    if lease["kind"] == "replay":
        return replays.state_cap(hub, wallet, lease, index)
    case = _asked(hub, lease)
    if index not in case.audit["wants"]:
        raise TrainChainError("audit.none", f"The state {index} is not asked for; {case.audit['wants']} are.")
    return states.cap(hub, case.job)


def keep_state(hub: Hub, wallet: str, lease_id: str, index: int, spool: Spool) -> dict[str, Any]:
    """Store a state that was asked for. Raises `state.invalid`, `audit.answer_invalid`, `replay.invalid`."""
    lease = mine(hub, wallet, lease_id)
    if lease["kind"] == "replay":
        return replays.keep_state(hub, lease, index, spool)
    case = _asked(hub, lease)
    answer, found = case.audit["answer"], states.parsed(hub, case.job, index, spool)
    if answer is not None:
        _insist_opened(index, opened(answer, index), found)
    digest = hub.objects.keep(spool)
    with hub.store.write() as db:
        audit = one(db, schema.audits, lease=lease_id)
        wanted = audit is not None and index in audit["wants"]
        dropped = states.keep(db, lease["job"], lease_id, index, digest, spool.size) if wanted else [digest]
    for other in dropped:
        drop_unnamed(hub, other)
    if not wanted:
        raise TrainChainError("audit.none", f"The state {index} is not asked for any more.")
    if answer is not None:
        with hub.judging(lease_id):
            go_on(hub, lease_id, answer=answer)
    return {"digest": digest, "size": spool.size}


def answer(hub: Hub, worker: str, lease_id: str, given: Answer) -> dict[str, Any]:
    """Take the leaves that a worker opens; with its states they answer the draw. A start or an end that is not what it
    contributed decides the audit at once: anyone can compute them again.

    Raises `audit.none`, `audit.too_late`, and `audit.answer_invalid`, which changes nothing.
    """
    lease = mine(hub, worker, lease_id)
    with hub.judging(lease_id):
        return _answer(hub, lease, given)


def _answer(hub: Hub, lease: Row, given: Answer) -> dict[str, Any]:
    lease_id = lease["id"]
    with hub.store.read() as db:
        before = one(db, schema.audits, lease=lease_id)
    if before is not None and before["answer"] is not None and not before["wants"]:
        return {"state": before["state"], "wants": []}
    case, told = _asked(hub, lease), given.model_dump()
    _insist_holds(case, given)
    with hub.store.read() as db:
        sent = states.named(db, lease_id)
    for index in case.audit["wants"]:
        if index not in sent:
            raise TrainChainError("audit.answer_invalid", f"The state {index} was not uploaded.")
        _insist_opened(index, opened(told, index), states.digests_of(hub, case.job, index, sent[index]))
    wrong = _contradiction(hub, case, told, sent) if case.audit["answer"] is None else None
    if wrong is None:
        go_on(hub, lease_id, answer=told, sent=sent)
    else:
        _conclude(hub, case.audit, wrong, sent=sent, answer=told)
    with hub.store.read() as db:
        after = one(db, schema.audits, lease=lease_id)
    assert after is not None
    return {"state": after["state"], "wants": after["wants"]}


def _asked(hub: Hub, lease: Row) -> Case:
    """The audit that a lease owes something to. Raises `audit.none`, `audit.too_late`."""
    with hub.store.read() as db:
        audit = one(db, schema.audits, lease=lease["id"])
        if audit is None or audit["state"] not in PENDING or not audit["wants"]:
            raise TrainChainError("audit.none", f"Nothing is asked for under the lease {lease['id']}.")
        case = case_of(hub, db, lease["id"])
    if hub.clock() > audit["answer_by"]:
        raise TrainChainError("audit.too_late", f"The draw was to be answered by {audit['answer_by']:.0f}.")
    return case


def _insist_holds(case: Case, given: Answer) -> None:
    """The leaves that are to be opened, each once, under the signed root."""
    segment, last = case.audit["segment"], case.recipe.segments
    wanted, found = sorted({0, segment, segment + 1, last}), sorted(opening.index for opening in given.openings)
    if wanted != found:
        raise TrainChainError("audit.answer_invalid", f"The leaves {found} are opened; {wanted} are wanted.")
    root = case.contribution["signed"]["contribution"]["stateRoot"]
    for opening in given.openings:
        digests = StateDigests(*(bytes.fromhex(part[2:]) for part in (opening.w, opening.m, opening.v)))
        path = [bytes.fromhex(part[2:]) for part in opening.proof]
        leaf = bytes.fromhex(leaf_at(case, opening.index, digests)[2:])
        if not verify(root, leaf, opening.index, last + 1, path):
            raise TrainChainError("audit.answer_invalid", f"The leaf {opening.index} is not under the root {root}.")


def _insist_opened(index: int, wanted: StateDigests | None, found: StateDigests) -> None:
    if wanted != found:
        raise TrainChainError("audit.answer_invalid", f"The state {index} that was uploaded is not the one opened.")


def _contradiction(hub: Hub, case: Case, told: Mapping[str, Any], sent: Mapping[int, str]) -> verdicts.Finding | None:
    """What is opened against what was leased and contributed."""
    start, moments = start_of(hub, case)
    first = opened(told, 0)
    assert first is not None
    found, expected = (
        leaf_at(case, 0, first),
        "0x" + start_leaf(bytes.fromhex(case.audit["lease"][2:]), start, moments).hex(),
    )
    if found != expected:
        return verdicts.Finding("audit.wrong_start", expected=expected, found=found)
    recipe, given = case.recipe, case.contribution["delta"]
    for index in case.audit["wants"]:
        with np.errstate(over="ignore"):
            if impossible(states.read(hub, case.job, index, sent[index]), start, recipe, case.audit["round"]):
                return verdicts.Finding("audit.impossible")
    end = states.read(hub, case.job, recipe.segments, sent[recipe.segments])
    ended = Moments(end.m, end.v) if recipe.merge.hands_on else None
    try:
        with np.errstate(over="ignore"):
            made = sha256(encode(delta_of(end.w, start), recipe.merge.encoding, ended))
    except ValueError:  # no delta has such an end
        return verdicts.Finding("audit.wrong_delta", found=given)
    return None if made == given else verdicts.Finding("audit.wrong_delta", expected=made, found=given)


def _conclude(
    hub: Hub, audit: Row, finding: verdicts.Finding, sent: Mapping[int, str] | None = None, **fields: Any
) -> bool:
    """Write down a verdict that needs no replay; False where the audit went on meanwhile, or other states were sent."""
    try:
        with hub.store.write() as db:
            if sent is not None and states.named(db, audit["lease"]) != sent:
                return False
            dropped = verdicts.conclude(hub, db, audit, finding, hub.clock(), **fields)
    except verdicts.Stale:
        return False
    for digest in dropped:
        drop_unnamed(hub, digest)
    hub.bell.ring()
    return True


def tick(hub: Hub) -> bool:
    """End what nobody came for in time, and forget what nobody needs any more; True if anything moved."""
    audits, jobs, moved = schema.audits, schema.jobs, False
    pending = select(audits.c.job).where(audits.c.state.in_(PENDING))
    with hub.store.read() as db:
        rows = list(db.execute(select(jobs).where(jobs.c.id.in_(pending))).mappings())
    for job in rows:
        moved = attempt(_end, hub, job) or moved
    return _forget_known(hub) or moved


def _end(hub: Hub, job: Row) -> bool:
    """Silence is a failure of the worker's; that nobody replays is none. A job's end waits for no auditor.

    Where a replay speaks against the work another is waited for longer: its owner can still bring an auditor. One that
    speaks against it is no rejection because its worker, who has answered, does not hand in one state more.
    """
    audits, now = schema.audits, hub.clock()
    silent = (audits.c.state == Audit.DRAWN) & (audits.c.answer_by < now)
    since = now - job["deadline"]
    over = since > job["grace"] * LAST
    check, replays = hub.recipe(job).check, schema.replays
    came = select(replays.c.lease).where(replays.c.audit == audits.c.lease, replays.c.done.is_not(None))
    doubted = came.where(replays.c.ringer.is_(False)).exists()
    late, later = (audits.c.answered < now - wait for wait in (check.timeout, check.timeout + check.answer))
    late = late & ~doubted
    if since > job["grace"] / 2:
        late = late | (audits.c.answered < now - job["grace"] * draws.LEAST_TIME)
    alone = (audits.c.state == Audit.ANSWERED) & (or_(late, later) if not over else true())
    query = select(audits).where(audits.c.job == job["id"], silent | alone).order_by(audits.c.drawn)
    moved = False
    with hub.store.read() as db:
        rows = list(db.execute(query).mappings())
    for row in rows:
        drawn = row["state"] == Audit.DRAWN
        if drawn and row["answer"] is not None:
            go_on(hub, row["lease"], answer={**row["answer"], "withheld": True})
            moved = True
            continue
        found = verdicts.Finding("audit.silent") if drawn else weighing.so_far(hub, row["lease"])
        moved = _conclude(hub, row, found) or moved
    return moved


def _forget_known(hub: Hub) -> bool:
    """Once a job is settled nobody is put to the test any more."""
    table, jobs, audits = schema.states, schema.jobs, schema.audits
    over = select(table.c.job).join(jobs, jobs.c.id == table.c.job).where(jobs.c.state.in_([Job.SETTLED, Job.CLOSED]))
    rejected = select(audits.c.lease).where(audits.c.state == Audit.FAILED)
    evidence = select(schema.replays.c.lease).where(schema.replays.c.audit.in_(rejected))
    which = table.c.lease.not_in(rejected) & table.c.lease.not_in(evidence)
    with hub.store.read() as db:
        found = list(db.execute(over.where(which).distinct()).scalars())
    for job_id in found:
        with hub.store.write() as db:
            dropped = states.forget(db, job_id, which)
        for digest in dropped:
            drop_unnamed(hub, digest)
    return bool(found)


def extend_all(hub: Hub) -> None:
    """After the hub was away, no draw may have lapsed for want of a hub to answer to, nor an audit unaudited."""
    audits, jobs, now = schema.audits, schema.jobs, hub.clock()
    with hub.store.write() as db:
        for row in db.execute(select(audits).where(audits.c.state.in_(PENDING))).mappings().all():
            job = one(db, jobs, id=row["job"])
            assert job is not None
            values = {"answered": now}
            if row["state"] == Audit.DRAWN:
                values = {"answer_by": max(row["answer_by"], draws.answer_by(hub.recipe(job), job, now))}
            db.execute(update(audits).where(audits.c.lease == row["lease"]).values(**values))
