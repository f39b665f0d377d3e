"""What a lease is made of: the row that says who holds it, and what its holder is told."""

from typing import Any

from sqlalchemy import Connection, insert

from trainchain.core.hub import schema
from trainchain.core.hub.service import LEASE_SECONDS
from trainchain.core.hub.store import Row, one
from trainchain.core.states import Lease


def hold(db: Connection, lease_id: str, kind: str, row: Row, worker: str, now: float) -> None:
    """Write down that `worker` holds the shard, the evaluation or the audit in `row`."""
    db.execute(
        insert(schema.leases).values(
            id=lease_id,
            kind=kind,
            job=row["job"],
            round=row["round"],
            shard=row.get("shard"),
            worker=worker,
            state=str(Lease.HELD),
            taken=now,
            expires=now + LEASE_SECONDS,
        )
    )


def offer(lease_id: str, kind: str, job: Row, round_: int, shard: int | None, start: str) -> dict[str, Any]:
    return {
        "lease": lease_id,
        "kind": kind,
        "job": job["id"],
        "name": job["name"],
        "spec_hash": job["spec_hash"],
        "round": round_,
        "shard": shard,
        "start": start,
        "expires_in": LEASE_SECONDS,
    }


def came_from(db: Connection, round_: Row) -> dict[str, Any]:
    """What a round's start came from: the last one's, and the encoded step from there; nothing in the first round."""
    last = one(db, schema.rounds, job=round_["job"], round=round_["round"] - 1)
    return {"before": last["start"], "outer_step": last["outer_step"]} if last is not None else {}
