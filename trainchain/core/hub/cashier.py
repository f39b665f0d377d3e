"""Settling: what has vested goes on chain as a Merkle root of cumulative amounts. Safe to repeat.

What came late is settled with the round that took it in, so that what counts by a settled round never changes.

A settlement is written down before it is sent, and sent again as it is after a crash: what is settled is thus decided
once. The chain is asked outside any transaction.
"""

from sqlalchemy import Connection, delete, func, insert, or_, select, update

from trainchain.core.errors import TrainChainError
from trainchain.core.hub import earnings, jobs, keys, schema, vouchers
from trainchain.core.hub.contributions import drop_unnamed, publish_rest
from trainchain.core.hub.earnings import COUNTED
from trainchain.core.hub.service import EscrowJob, Hub, attempt, log
from trainchain.core.hub.store import Row, move, one, record
from trainchain.core.rewards import Earned, Key, Terms, added, totals
from trainchain.core.states import ENDED, Job, Round

_MOST = 2**128 - 1
LOOK_SECONDS = 60.0
"""Between two looks at the escrow of a job that nothing is due for."""
LOOKED_AT = frozenset({Job.UNFUNDED, Job.OPEN, Job.RUNNING, Job.SETTLED})
SETTLING = frozenset(Job) - {Job.CLOSED}


def tick(hub: Hub) -> bool:
    """Settle what is due, look for money that unfunded jobs wait for; True if anything moved.

    A job whose escrow was never seen holds up nothing: anybody may publish as many as they like.
    """
    moved = False
    with hub.store.read() as db:
        known = or_(schema.jobs.c.state != Job.UNFUNDED, schema.jobs.c.deadline.is_not(None))
        query = select(schema.jobs).where(schema.jobs.c.state.in_(SETTLING), known)
        rows = list(db.execute(query).mappings())
    for job in rows:
        moved = attempt(_settle, hub, job) or moved
        if job["state"] in LOOKED_AT and hub.clock() >= hub.looked.get(job["id"], 0.0) + LOOK_SECONDS:
            moved = attempt(_look_at_escrow, hub, job) or moved
        if job["state"] == Job.UNFUNDED:
            moved = attempt(_look_for_money, hub, job) or moved
    if moved:
        hub.bell.ring()
    return moved


def earned(hub: Hub, job_id: str) -> tuple[list[Earned], set[Key]]:
    """All that was accepted in a job, and the keys of what a settlement pays, sent or about to be."""
    with hub.store.read() as db:
        return _earned(db, job_id)


def _earned(db: Connection, job_id: str) -> tuple[list[Earned], set[Key]]:
    rows = earnings.earned(db, job_id)
    return list(rows), {row.key for row, number in rows.items() if number is not None}


def _settle(hub: Hub, job: Row) -> bool:
    unsent = select(schema.settlements).where(schema.settlements.c.job == job["id"], schema.settlements.c.tx.is_(None))
    with hub.store.read() as db:
        written = db.execute(unsent.order_by(schema.settlements.c.round).limit(1)).mappings().first()
    if written is not None:
        return _send(hub, job, written)
    if job["state"] == Job.SETTLED:
        return _close(hub, job)
    ended = vouchers.ended(hub, job)
    if ended:  # first: they need no chain
        vouchers.vest_all(hub, job["id"])
    terms = Terms(_number(hub, job, ended=ended), ended, _MOST)
    if terms.number <= job["settled_round"]:
        return False
    with hub.store.read() as db:
        mark = (terms.number, *earnings.mark(db, job["id"]))
        if not ended and hub.idle.get(job["id"]) == mark:
            return False
        rows, settled = _earned(db, job["id"])
    if not added(rows, settled, terms):
        hub.idle[job["id"]] = mark
        return ended and _finish(hub, job)
    escrow = hub.chain.job(job["id"])
    if escrow is None:
        return False
    if escrow.halted or _replaced(hub, escrow) or hub.clock() > escrow.deadline + escrow.grace:
        return _stopped(hub, job, escrow, ended=ended)
    if _dropped(hub, job, escrow):
        return True
    if hub.clock() < escrow.pending_at:
        return False
    if _count_advances(hub, job, escrow):
        escrow = hub.chain.job(job["id"]) or escrow
    terms = terms._replace(limit=min(escrow.round_cap, escrow.free))
    more = added(rows, settled, terms)
    if not more:
        # A voucher that was redeemed is reserved twice until its leaf is counted: what is left can be too little.
        log.warning("job %s: %d units are free in its escrow, too few to settle; vouchers pay", job["id"], escrow.free)
        return False
    paid = [row for row in rows if row.key in settled]
    written = _write(hub, job, terms, paid, more)
    return written is None or _send(hub, job, written)


def _number(hub: Hub, job: Row, *, ended: bool) -> int:
    """The number that the next settlement has: the last merged round, whose work nothing late can change any more.
    The last round's waits for the job's end, since late work of that counts in no other; from there on each
    settlement is numbered one on, as many as the escrow's cap needs."""
    rounds, contributions = schema.rounds, schema.contributions
    merged = select(func.max(rounds.c.round)).where(rounds.c.job == job["id"], rounds.c.state == Round.MERGED)
    counted = select(func.max(COUNTED)).where(contributions.c.job == job["id"])
    with hub.store.read() as db:
        if ended:
            return int(max(job["settled_round"] + 1, job["round"], db.execute(counted).scalar() or 0))
        return min(db.execute(merged).scalar() or 0, hub.recipe(job).rounds - 1)


def _write(hub: Hub, job: Row, terms: Terms, paid: list[Earned], more: list[Earned]) -> Row | None:
    """Write down a settlement that adds `more` to what is `paid`; None, and nothing written, where by now it would be
    another one: a verdict can come in while the chain is asked, and it counts from the next settlement written on."""
    made = hub.chain.settlement(job["id"], terms, totals([*paid, *more]))
    leaves = hub.objects.put(made.leaves)
    table, key = schema.settlements, {"job": job["id"], "round": terms.number}
    with hub.store.write() as db:
        rows, settled = _earned(db, job["id"])
        if settled != {row.key for row in paid} or added(rows, settled, terms) != more:
            return None
        if terms.ended and not vouchers.is_over(db, job["id"]):
            return None
        db.execute(
            insert(table).values(
                **key,
                root=made.root,
                total=made.total,
                leaves=leaves,
                ended=terms.ended,
                limit=terms.limit,
                tx=None,
                at=hub.clock(),
            )
        )
        earnings.settle(db, job["id"], more, terms.number)
        if one(db, schema.objects, digest=leaves, job=job["id"]) is None:
            size = len(made.leaves)
            db.execute(
                insert(schema.objects).values(digest=leaves, job=job["id"], size=size, public=True, present=True)
            )
        written = one(db, table, **key)
    assert written is not None
    return written


def _send(hub: Hub, job: Row, written: Row) -> bool:
    """Put a settlement that was written down on chain; one that the chain refuses is made anew from what is true
    by then."""
    number, now = written["round"], hub.clock()
    try:
        tx = hub.chain.settle(job["id"], number, hub.objects.get(written["leaves"]))
    except TrainChainError as error:
        if error.code == "chain.reverted":
            _unwrite(hub, job, number)
        raise
    with hub.store.write() as db:
        fresh = one(db, schema.settlements, job=job["id"], round=number)
        if fresh is None or fresh["tx"] is not None:
            return False
        here = (schema.settlements.c.job == job["id"]) & (schema.settlements.c.round == number)
        db.execute(update(schema.settlements).where(here).values(tx=tx, at=now))
        data = {"root": written["root"], "total": str(written["total"]), "tx": tx}
        record(db, job["id"], f"settlement/{number}", "settled", now, data)
        db.execute(update(schema.jobs).where(schema.jobs.c.id == job["id"]).values(settled_round=number))
    return True


def _unwrite(hub: Hub, job: Row, number: int) -> None:
    """Forget a settlement that cannot be sent, and with it those after it, whose amounts hold its own."""
    table = schema.settlements
    with hub.store.write() as db:
        db.execute(delete(table).where(table.c.job == job["id"], table.c.round >= number))
        earnings.unsettle(db, job["id"], number)
        before = select(func.max(table.c.round)).where(table.c.job == job["id"])
        last = db.execute(before).scalar() or 0
        db.execute(update(schema.jobs).where(schema.jobs.c.id == job["id"]).values(settled_round=last))


def _stopped(hub: Hub, job: Row, escrow: EscrowJob, *, ended: bool) -> bool:
    """The escrow takes no further root of ours: its owner halted it, another hub has taken over, or its time is over.
    What is not settled is left to the vouchers, which every worker has for all that it did once the job has ended."""
    if ended:
        return _finish(hub, job)
    return _cancel(hub, job, escrow)


def _cancel(hub: Hub, job: Row, escrow: EscrowJob) -> bool:
    """End a job that its owner halted or takes to another hub, while this one can still settle what was accepted: the
    other one owes nobody anything for that, and its coming voids this one's vouchers."""
    leaves = bool(escrow.next_hub) or _replaced(hub, escrow)
    if job["state"] in ENDED or not (escrow.halted or leaves):
        return False
    data = {"reason": "halted" if escrow.halted else "another hub"}
    with hub.store.write() as db:
        return move(db, schema.jobs, job, Job.CANCELLED, now=hub.clock(), data=data)


def _replaced(hub: Hub, escrow: EscrowJob) -> bool:
    return escrow.hub.lower() != hub.chain.address.lower()


def _look_at_escrow(hub: Hub, job: Row) -> bool:
    """A job that was halted, or goes to another hub, ends here too; one that was closed early has another deadline: the
    grace time runs, and what was accepted must have vested while the escrow still pays."""
    escrow = hub.chain.job(job["id"])
    hub.looked[job["id"]] = hub.clock()
    if escrow is None:
        return False
    if _dropped(hub, job, escrow):
        return True
    moved = job["deadline"] is not None and escrow.deadline < job["deadline"]
    if moved:
        with hub.store.write() as db:
            fields = {"deadline": float(escrow.deadline)}
            db.execute(update(schema.jobs).where(schema.jobs.c.id == job["id"]).values(**fields))
    return _cancel(hub, job, escrow) or moved


def _dropped(hub: Hub, job: Row, escrow: EscrowJob) -> bool:
    """Send again what the chain had and has no more: its last blocks can be replaced by others."""
    table = schema.settlements
    gone = (table.c.job == job["id"]) & (table.c.round > escrow.round) & table.c.tx.is_not(None)
    with hub.store.write() as db:
        found = db.execute(update(table).where(gone).values(tx=None)).rowcount > 0
    if found:
        log.warning("job %s: settlements after %d are no longer on chain; they are sent again", job["id"], escrow.round)
    return found


def _finish(hub: Hub, job: Row) -> bool:
    """Nothing is left to settle. What vouchers paid is counted first: until then it is reserved twice, and the owner
    could not have it back."""
    escrow = hub.chain.job(job["id"]) if job["settled_round"] else None
    if escrow is not None and escrow.advances:
        if hub.clock() < escrow.pending_at:
            return False
        _count_advances(hub, job, escrow)
    return _settled(hub, job)


def _count_advances(hub: Hub, job: Row, escrow: EscrowJob) -> bool:
    """Prove the leaves of those whom vouchers have paid; whether there was one to prove."""
    with hub.store.read() as db:
        last = one(db, schema.settlements, job=job["id"], round=job["settled_round"])
    if not escrow.advances or last is None:
        return False
    return hub.chain.count_advances(job["id"], hub.objects.get(last["leaves"])) is not None


def _settled(hub: Hub, job: Row) -> bool:
    """All that is owed stands on chain: nothing is accepted any more, and what no merge took in is opened."""
    now, recipe = hub.clock(), hub.recipe(job)
    with hub.store.write() as db:
        fresh = one(db, schema.jobs, id=job["id"])
        if fresh is None or not move(db, schema.jobs, fresh, Job.SETTLED, now=now):
            return False
        loose = publish_rest(db, job["id"], public=not recipe.private, now=now)
    for refused in loose:
        drop_unnamed(hub, refused)
    return True


def _close(hub: Hub, job: Row) -> bool:
    """Once deadline and grace are over nothing can change but claims and the owner's refund: no key is needed more,
    and what vouchers were paid since the last settlement is counted, so that the refund is whole."""
    now = hub.clock()
    if job["deadline"] is not None and now <= job["deadline"] + job["grace"]:
        return False
    with hub.store.write() as db:
        keys.forget(db, job["id"])
    escrow = hub.chain.job(job["id"]) if job["settled_round"] else None
    if escrow is not None:
        if now < escrow.pending_at:
            return False
        _count_advances(hub, job, escrow)
    with hub.store.write() as db:
        return move(db, schema.jobs, job, Job.CLOSED, now=now)


def _look_for_money(hub: Hub, job: Row) -> bool:
    try:
        return bool(jobs.fund(hub, job["id"])["state"] != Job.UNFUNDED)
    except TrainChainError as error:
        if error.code in ("job.unfunded", "job.incomplete", "job.invalid"):
            return False
        raise
