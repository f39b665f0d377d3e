"""The draw that falls on a contribution when it is accepted, and what is told of it (core/draws.py)."""

from typing import Any

from sqlalchemy import Connection, func, insert, select

from trainchain.core import rewards
from trainchain.core.draws import draw
from trainchain.core.hub import schema
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import Row, one, record
from trainchain.core.messages import Contribution
from trainchain.core.models import ResolvedRecipe
from trainchain.core.states import Audit

LEAST_TIME = 1 / 8
"""Of the grace time: so long a worker has to answer at least, however late in a job it hands something in."""


def drawn(hub: Hub, db: Connection, lease: Row, round_: Row, given: Contribution, place: int) -> dict[str, Any] | None:
    """The row of the audit that falls on a contribution at this place of its worker's; None where none does."""
    job = one(db, schema.jobs, id=lease["job"])
    assert job is not None
    recipe = hub.recipe(job)
    if not recipe.audited:
        return None
    table = schema.contributions
    mine = (table.c.job == job["id"]) & (table.c.worker == lease["worker"]) & table.c.forfeited.is_not(None)
    lost = db.execute(select(func.max(table.c.place)).where(mine)).scalar() or 0
    at_risk = rewards.at_risk(place, lost)
    secret, of, root = (bytes.fromhex(text[2:]) for text in (round_["secret"], lease["id"], given.stateRoot))
    sizes = {"steps": recipe.steps, "segment_steps": recipe.training.segment_steps}
    segment = draw(secret, of, root, at_risk=at_risk, **sizes)
    if segment is None:
        return None
    now = hub.clock()
    return {
        "lease": lease["id"],
        "job": lease["job"],
        "round": lease["round"],
        "shard": lease["shard"],
        "worker": lease["worker"],
        "segment": segment,
        "at_risk": at_risk,
        "state": str(Audit.DRAWN),
        "drawn": now,
        "wants": wanted(recipe, segment),
        "answer_by": answer_by(recipe, job, now),
    }


def write_down(db: Connection, audit: dict[str, Any]) -> None:
    """Keep a draw, and tell of it in an event."""
    db.execute(insert(schema.audits).values(**audit))
    data = {name: audit[name] for name in ("worker", "segment", "at_risk", "answer_by")}
    record(db, audit["job"], f"audit/{audit['lease']}", "drawn", audit["drawn"], data)


def wanted(recipe: ResolvedRecipe, segment: int) -> list[int]:
    """The states that a draw asks for: the shard's last, and the drawn segment's first where not everybody has it."""
    return sorted({segment, recipe.segments} - {0})


def answer_by(recipe: ResolvedRecipe, job: Row, now: float) -> float:
    """Until when a worker that is asked now may answer: early enough that the job's end waits for nobody, and that
    there is time to replay what is answered."""
    end = job["deadline"] + job["grace"] / 4
    return float(min(now + recipe.check.answer, max(end, now + job["grace"] * LEAST_TIME)))


def told(db: Connection, lease_id: str) -> dict[str, Any] | None:
    """What a contribution is answered of its draw, as often as it is handed in."""
    row = one(db, schema.audits, lease=lease_id)
    return None if row is None else {name: row[name] for name in ("segment", "at_risk", "wants", "answer_by")}
