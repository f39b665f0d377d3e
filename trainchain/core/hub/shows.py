"""What the hub shows of audits: pure readings of its tables as JSON."""

from typing import Any

from sqlalchemy import select

from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import Row, one
from trainchain.core.states import PENDING, TESTED, Audit

MAX_AUDITS = 500
SECRET = PENDING | {Audit.PASSED}
"""What was got in these might yet be copied: by the next auditor, or by one who is put to the test with it."""


def own(hub: Hub, worker: str) -> list[dict[str, Any]]:
    """A wallet's own audits, those first that have no verdict yet, and the newest first."""
    audits, given = schema.audits, schema.contributions
    names = ("lease", "job", "round", "shard", "segment", "state", "wants", "answer_by", "code", "evidence")
    query = (
        select(*(audits.c[name] for name in names), given.c.place)
        .join(given, given.c.lease == audits.c.lease)
        .where(audits.c.worker == worker)
        .order_by(audits.c.state.not_in(PENDING), audits.c.drawn.desc(), audits.c.lease)
        .limit(MAX_AUDITS)
    )
    with hub.store.read() as db:
        return [dict(row) for row in db.execute(query).mappings()]


def audits_of(hub: Hub, job_id: str, after: int, limit: int) -> dict[str, Any]:
    """A job's audits by round and shard, with the replays that are done: whom to bribe, and what is known already, is
    told when it is too late. `after` is the `next` of the answer before, which is None where there are no
    more."""
    table, shards = schema.audits, hub.recipe(hub.job(job_id)).all_shards
    place = (table.c.round - 1) * shards + table.c.shard + 1
    query = select(table).where(table.c.job == job_id, place > after).order_by(place).limit(limit + 1)
    names = ("lease", "round", "shard", "worker", "segment", "at_risk", "state", "code", "evidence", "drawn")
    over = hub.job(job_id)["state"] in TESTED
    with hub.store.read() as db:
        rows = list(db.execute(query).mappings())
        mine = schema.replays.c.audit.in_([row["lease"] for row in rows])
        done = select(schema.replays).where(mine, schema.replays.c.done.is_not(None)).order_by(schema.replays.c.done)
        replays = list(db.execute(done).mappings())
    found = [
        {
            **{name: row[name] for name in names},
            "answered": row["answered"],
            "decided": row["decided"],
            "replays": [
                _replay(replay, shown=over or row["state"] not in SECRET)
                for replay in replays
                if replay["audit"] == row["lease"]
            ],
        }
        for row in rows[:limit]
    ]
    following = (rows[limit - 1]["round"] - 1) * shards + rows[limit - 1]["shard"] + 1 if len(rows) > limit else None
    return {"audits": found, "next": following}


def _replay(row: Row, *, shown: bool) -> dict[str, Any]:
    """What was signed is `shown` when nobody can copy it any more."""
    names = ("lease", "auditor", "role", "ringer", "done", "place", "counted", "forfeited")
    return {
        **{name: row[name] for name in names},
        "fee": str(row["fee"]),
        "numeric_class": row["signed"]["replay"]["numericClass"] if row["signed"] else None,
        "signed": row["signed"] if shown else None,
    }


def evidence(hub: Hub, job_id: str, lease_id: str, who: str | None = None) -> bytes:
    """The document that says why an audit ended as it did. Raises `object.unknown` where there is none for them."""
    with hub.store.read() as db:
        audit = one(db, schema.audits, lease=lease_id, job=job_id)
    if audit is None or audit["evidence"] is None:
        raise TrainChainError("object.unknown", f"No verdict was found on the lease {lease_id[:66]} in this job.")
    if audit["worker"] != who and is_kept_back(hub, audit["evidence"]):
        raise TrainChainError(
            "object.unknown",
            f"The audit of the lease {lease_id[:66]} has passed; its evidence is told once the job is settled.",
            hint="Until then auditors may be put to the test with it.",
        )
    return hub.objects.get(audit["evidence"])


def is_kept_back(hub: Hub, digest: str) -> bool:
    """Whether an object is the evidence of what may yet be an auditor's test, whose answer it opens."""
    audits, jobs = schema.audits, schema.jobs
    query = select(audits.c.lease).join(jobs, jobs.c.id == audits.c.job).where(audits.c.evidence == digest)
    query = query.where(audits.c.state == Audit.PASSED, jobs.c.state.not_in(TESTED))
    with hub.store.read() as db:
        return db.execute(query.limit(1)).first() is not None
