"""Audits and their verdicts as a hub writes them down, by hand: what they are about is nobody's matter here."""

import secrets
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from tests.fixtures_hub import Job, Person
from trainchain.core.hub import earnings, schema, vouchers
from trainchain.core.hub.service import Hub
from trainchain.core.rewards import at_risk, forfeits


def drawn(job: Job, who: Person, segment: int = 1) -> dict[str, Any]:
    """A contribution of this worker that an audit is drawn on as it is accepted, and all that is due then; returns its
    receipt."""
    real = vouchers.vest

    def after_the_draw(hub: Hub, db: Connection, job_id: str, worker: str) -> Any:
        work = schema.contributions
        mine = select(work).where(work.c.job == job_id, work.c.worker == worker).order_by(work.c.place.desc())
        row = db.execute(mine.limit(1)).mappings().one()
        place = {name: row[name] for name in ("lease", "job", "round", "shard", "worker")}
        lost = select(func.max(work.c.place)).where(work.c.worker == worker, work.c.forfeited.is_not(None))
        risk = at_risk(row["place"], db.execute(lost.where(work.c.job == job_id)).scalar() or 0)
        times = {"drawn": hub.clock(), "answer_by": hub.clock() + 3600}
        values = {"segment": segment, "at_risk": risk, "state": "drawn", "version": 0, "wants": []}
        db.execute(insert(schema.audits).values(**place, **times, **values))
        db.execute(update(work).where(work.c.lease == row["lease"]).values(resolved=None))
        return real(hub, db, job_id, worker)

    vouchers.vest = after_the_draw
    try:
        receipt = who.work(job)
    finally:
        vouchers.vest = real
    job.town.tick()
    return receipt


def verdict(job: Job, receipt: dict[str, Any], code: str = "audit.passed") -> None:
    """End an audit; one that rejects forfeits all that has not vested."""
    town, lease, rejects = (
        job.town,
        receipt["lease"],
        code not in ("audit.passed", "audit.unaudited", "audit.undecided"),
    )
    audits, work = schema.audits, schema.contributions
    (audit,) = town.rows(audits, lease=lease)
    town.clock.forward(1)
    with town.hub.store.write() as db:
        number = earnings.following(db, job.id)
        state = "failed" if rejects else "passed"
        db.execute(update(audits).where(audits.c.lease == lease).values(state=state, code=code, decided=town.clock()))
        if rejects:
            queue = [row for row in earnings.earned(db, job.id, audit["worker"]) if row.kind == "shard"]
            for row in forfeits(queue):
                here = (work.c.job == job.id) & (work.c.round == row.round) & (work.c.shard == row.shard)
                db.execute(update(work).where(here).values(forfeited=number))
        else:
            db.execute(update(work).where(work.c.lease == lease).values(resolved=number))
        vouchers.vest(town.hub, db, job.id, audit["worker"])
    town.clock.forward(1)


def replay(job: Job, receipt: dict[str, Any], auditor: Person, fee: int) -> None:
    """A replay of an audit that was accepted, with its fee."""
    town, table = job.town, schema.replays
    with town.hub.store.write() as db:
        mine = [row for row in earnings.earned(db, job.id, auditor.address) if row.kind == "replay"]
        values = {"place": len(mine) + 1, "counted": earnings.following(db, job.id), "done": town.clock()}
        db.execute(
            insert(table).values(
                lease="0x" + secrets.token_hex(32),
                audit=receipt["lease"],
                job=job.id,
                auditor=auditor.address,
                role="earned",
                ringer=False,
                fee=fee,
                **values,
            )
        )
        vouchers.vest(town.hub, db, job.id, auditor.address)


def forfeit_fees(job: Job, auditor: Person) -> None:
    """What is done to an auditor whose replay was proven wrong."""
    town, table = job.town, schema.replays
    with town.hub.store.write() as db:
        queue = [row for row in earnings.earned(db, job.id, auditor.address) if row.kind == "replay"]
        places = [row.place for row in forfeits(queue)]
        mine = (table.c.job == job.id) & (table.c.auditor == auditor.address) & table.c.place.in_(places)
        db.execute(update(table).where(mine).values(forfeited=earnings.following(db, job.id)))
