"""Who replays which audit: nobody can choose whom they audit, and nobody is waited for.

An audit is offered to more and more of a line of auditors, which the round's secret has put in order.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, delete, func, insert, literal, or_, select, update

from trainchain.core import draws
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema, states
from trainchain.core.hub.offers import came_from, hold, offer
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import Row, one
from trainchain.core.models import ResolvedRecipe
from trainchain.core.rewards import VESTING, audit_price, replay_fee
from trainchain.core.states import PENDING, Audit, Job, Lease
from trainchain.core.verdicts import Role

EARNED = 10
"""Vested shards in a job with which a wallet may audit it."""
STEP = 20.0
"""Seconds in which the part of the line that is asked doubles."""
PATIENCE = 300.0
"""Seconds after which owner and operator replay beside a wallet that holds a replay and does not end it."""
RINGERS = 0.06
"""How many of the replays that a wallet is given are known already."""
LOOKS = 64
TRUSTED: tuple[Role, ...] = ("operator", "owner")
"""They replay also where no money is left for it."""


class Choice(NamedTuple):
    audit: Row
    role: Role
    fee: int


def choose(
    hub: Hub, db: Connection, auditor: str, job_id: str | None, skip: Sequence[str], now: float
) -> Choice | None:
    """The oldest audit that this wallet may replay now, with what that pays."""
    leases = schema.leases
    held = select(leases.c.id).where(
        leases.c.worker == auditor, leases.c.state == Lease.HELD, leases.c.kind == "replay", leases.c.expires >= now
    )
    query = _waiting(hub, auditor, job_id, skip, now)
    rows = db.execute(query).mappings().all()
    if not rows or db.execute(held.limit(1)).first() is not None:
        return None
    earned: dict[str, set[str]] = {}
    for audit in rows:
        job = one(db, schema.jobs, id=audit["job"])
        assert job is not None
        if job["id"] not in earned:
            earned[job["id"]] = _earned(db, job["id"]) if hub.recipe(job).check.auditors == "any" else set()
        asked = 2 ** min(int(max(now - _opened(db, audit), 0.0) // STEP), 30)
        role = next(
            (place[auditor] for place in _line(hub, db, job, audit, earned[job["id"]])[:asked] if auditor in place),
            None,
        )
        fee = fee_of(hub, db, job, audit)
        if role is not None and (fee is not None or role in TRUSTED):
            return Choice(audit, role, fee or 0)
    return None


def _waiting(hub: Hub, auditor: str, job_id: str | None, skip: Sequence[str], now: float) -> Select[Any]:
    """Audits that wait for a replay, of which this wallet has made none, in jobs where it might."""
    audits, replays, leases, jobs, given = (
        schema.audits,
        schema.replays,
        schema.leases,
        schema.jobs,
        schema.contributions,
    )
    made = select(replays.c.lease).where(replays.c.audit == audits.c.lease, replays.c.auditor == auditor)
    out = (
        select(replays.c.lease)
        .join(leases, leases.c.id == replays.c.lease)
        .where(replays.c.audit == audits.c.lease, replays.c.ringer.is_(False))
        .where(leases.c.state == Lease.HELD, leases.c.expires >= now)
    )
    accepted = select(func.count()).where(given.c.job == jobs.c.id, given.c.worker == auditor).scalar_subquery()
    doubted = (
        select(replays.c.lease)
        .where(replays.c.audit == audits.c.lease, replays.c.role == "operator", replays.c.ringer.is_(False))
        .where(replays.c.done.is_not(None), accepted > 0)
    )
    trusted, recent = replays.c.role.in_(TRUSTED), leases.c.taken > now - PATIENCE
    mine = literal(True) if auditor in hub.evaluators else func.lower(jobs.c.owner) == auditor.lower()
    query = (
        select(audits)
        .join(jobs, jobs.c.id == audits.c.job)
        .where(audits.c.state.in_(PENDING), audits.c.answered.is_not(None))  # also where the claimed end is due
        .where(audits.c.worker != auditor, jobs.c.id.not_in(skip))
        .where(or_(mine, accepted >= EARNED + VESTING, doubted.exists()))
        .where(~or_(out.where(~mine).exists(), out.where(mine, or_(trusted, recent)).exists()))
        .where(~made.where(or_(~mine, replays.c.done.is_not(None))).exists())
        .where(jobs.c.state.not_in([Job.SETTLED, Job.CLOSED]))
        .order_by(audits.c.answered)
        .limit(LOOKS)
    )
    return query if job_id is None else query.where(jobs.c.id == job_id)


def _opened(db: Connection, audit: Row) -> float:
    """Since when the next replay of an audit is wanted."""
    done = select(func.max(schema.replays.c.done)).where(
        schema.replays.c.audit == audit["lease"], schema.replays.c.ringer.is_(False)
    )
    return float(max(audit["answered"], db.execute(done).scalar() or 0.0))


def _line(hub: Hub, db: Connection, job: Row, audit: Row, earned: Collection[str]) -> list[dict[str, Role]]:
    """All who may replay an audit and why, in the order in which they are asked: those who have
    `earned` it in an order that nobody can arrange, with owner and operator among the first two, as one, since one of
    them may have no auditor; then, where the operator got something else than was claimed, workers who may confirm it.

    A numeric class is what a machine says of itself: if it came first, a cheat would name its friend's.
    """
    round_ = one(db, schema.rounds, job=audit["job"], round=audit["round"])
    assert round_ is not None
    secret, lease = (bytes.fromhex(text[2:]) for text in (round_["secret"], audit["lease"]))
    table = schema.replays
    trusted: dict[str, Role] = {job["owner"]: "owner", **dict.fromkeys(hub.evaluators, "operator")}
    given = select(table).where(table.c.audit == audit["lease"], table.c.ringer.is_(False))
    rows = db.execute(given).mappings().all()
    # Who is trusted may begin anew what it did not end; others could hold an audit up until its time is over.
    before = {row["auditor"] for row in rows if row["done"] is not None or row["auditor"] not in trusted}
    proven_wrong = select(table.c.auditor).where(table.c.job == job["id"], table.c.forfeited.is_not(None))
    never = before | {audit["worker"]} | set(db.execute(proven_wrong).scalars())
    if before & hub.evaluators:  # whatever wallets the operator has, it is one
        never |= hub.evaluators

    def place(wallet: str) -> bytes:
        return draws.turn(secret, lease, wallet)

    paid = sorted((wallet for wallet in earned if wallet not in trusted.keys() | never), key=place)
    asked: list[dict[str, Role]] = [{wallet: "earned"} for wallet in paid]
    both = {wallet: role for wallet, role in trusted.items() if wallet not in never}
    asked.insert(0 if draws.trusted_first(secret, lease, len(paid)) else 1, both)
    doubted = any(row["role"] == "operator" and row["done"] is not None for row in rows)
    if doubted and hub.recipe(job).check.auditors == "any":
        confirm = sorted(_audited(db, job["id"]) - never - trusted.keys() - set(paid), key=place)
        asked += [{wallet: "confirms"} for wallet in confirm]
    return [group for group in asked if group]


def _audited(db: Connection, job_id: str) -> set[str]:
    """Workers of a job of whose work audits have passed there, by others as often as by its owner alone: who is only
    ever vouched for by the owner may be the owner."""
    audits, replays = schema.audits, schema.replays
    others = (replays.c.audit == audits.c.lease) & replays.c.done.is_not(None) & (replays.c.role != "owner")
    by_others = select(replays.c.lease).where(others).exists()
    count = func.count()
    query = select(audits.c.worker).where(audits.c.job == job_id, audits.c.state == Audit.PASSED)
    enough = count.filter(by_others) >= func.max(1, count.filter(~by_others))
    return set(db.execute(query.group_by(audits.c.worker).having(enough)).scalars())


def _earned(db: Connection, job_id: str) -> set[str]:
    """Who has enough vested shards in a job to audit it."""
    table = schema.contributions
    forfeited, unresolved = table.c.forfeited.is_not(None), table.c.resolved.is_(None) & table.c.forfeited.is_(None)
    query = (
        select(
            table.c.worker,
            func.max(table.c.place).label("last"),
            func.max(table.c.place).filter(forfeited).label("lost"),
            func.count().filter(forfeited).label("forfeited"),
            func.min(table.c.place).filter(unresolved).label("pending"),
        )
        .where(table.c.job == job_id)
        .group_by(table.c.worker)
        .having(func.max(table.c.place) >= EARNED + VESTING)
    )
    found, vouched = set(), _audited(db, job_id)
    for row in db.execute(query).all():
        lost = row.lost or 0
        ripe = (row.pending or row.last + 1) - 1 - lost
        if row.worker in vouched and lost - row.forfeited + max(ripe - VESTING, 0) >= EARNED:
            found.add(row.worker)
    return found


def fee_of(hub: Hub, db: Connection, job: Row, audit: Row) -> int | None:
    """What a replay of an audit pays; None where the job's money for audits does not reach."""
    recipe, replays = hub.recipe(job), schema.replays
    fee = replay_fee(recipe, audit["round"], audit["shard"], audit["segment"])
    given = sum(db.execute(select(replays.c.fee).where(replays.c.job == job["id"])).scalars())
    return fee if fee <= _money(recipe, job["round"]) - given else None


def _money(recipe: ResolvedRecipe, rounds: int) -> int:
    return sum(audit_price(recipe, round_) for round_ in range(1, rounds + 1))


def lend(hub: Hub, db: Connection, choice: Choice, auditor: str, now: float) -> dict[str, Any]:
    """Give the replay out; of those who are not trusted now and then gets one whose answer is known, in its place."""
    audit, role, fee = choice
    job = one(db, schema.jobs, id=audit["job"])
    assert job is not None
    ringer = None
    if role == "earned" and int(hub.random_hex(2), 16) < RINGERS * 2**16:
        ringer = _ringer(hub, db, job, auditor)
    target = ringer or audit
    fee = fee if ringer is None else (fee_of(hub, db, job, ringer) or 0)
    lease_id, replays = "0x" + hub.random_hex(32), schema.replays
    db.execute(delete(replays).where(replays.c.audit == target["lease"], replays.c.auditor == auditor))
    hold(db, lease_id, "replay", target, auditor, now)
    db.execute(
        insert(replays).values(
            lease=lease_id,
            audit=target["lease"],
            job=job["id"],
            auditor=auditor,
            role=role,
            ringer=ringer is not None,
            fee=fee,
        )
    )
    round_ = one(db, schema.rounds, job=job["id"], round=target["round"])
    contribution = one(db, schema.contributions, lease=target["lease"])
    assert round_ is not None
    assert contribution is not None
    segment = target["segment"]
    made = offer(lease_id, "replay", job, target["round"], target["shard"], round_["start"]) | came_from(db, round_)
    return made | {
        "target": target["lease"],
        "segment": segment,
        "micro_tokens": contribution["signed"]["micro_tokens"][segment],
        "state": states.named(db, target["lease"])[segment] if segment else None,
    }


def _ringer(hub: Hub, db: Connection, job: Row, auditor: str) -> Row | None:
    """A passed audit of the job whose states are kept, that this wallet has nothing to do with yet."""
    audits, replays = schema.audits, schema.replays
    met = select(replays.c.lease).where(replays.c.audit == audits.c.lease, replays.c.auditor == auditor)
    query = select(audits).where(audits.c.job == job["id"], audits.c.state == Audit.PASSED, ~met.exists())
    rows = db.execute(query.where(audits.c.worker != auditor).order_by(audits.c.lease)).mappings().all()
    known = [row for row in rows if kept_end(db, row) is not None]
    return known[int(hub.random_hex(4), 16) % len(known)] if known else None


def kept_end(db: Connection, audit: Row) -> str | None:
    """The object of an audit's known end, where it and what it started from are kept."""
    start, end = audit["segment"], audit["segment"] + 1
    own = states.named(db, audit["lease"])
    if start and start not in own:
        return None
    replays, table = schema.replays, schema.states
    given = select(table.c.digest).join(replays, replays.c.lease == table.c.lease)
    given = given.where(replays.c.audit == audit["lease"], replays.c.ringer.is_(False), table.c.index == end)
    return own.get(end) or db.execute(given.limit(1)).scalar()


def gone(db: Connection, lease: Row) -> None:
    """A replay's lease is over before it was done: its fee is free for others."""
    table = schema.replays
    undone = (table.c.lease == lease["id"]) & table.c.done.is_(None)
    db.execute(update(table).where(undone).values(fee=0))


def say_if_over(db: Connection, lease: Row) -> None:
    """Raises `audit.too_late` where nobody waits for this replay any more."""
    replay = one(db, schema.replays, lease=lease["id"])
    audit = one(db, schema.audits, lease=replay["audit"]) if replay is not None else None
    if replay is None or audit is None or (not replay["ringer"] and audit["state"] not in PENDING):
        raise TrainChainError("audit.too_late", f"The audit that the lease {lease['id']} is of is decided.")
