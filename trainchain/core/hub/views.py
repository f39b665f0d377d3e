"""What the hub shows: pure readings of its tables as JSON. Amounts are decimal strings of token units."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select

from trainchain.core.hub import access, earnings, jobs, schema, vouchers
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import Row
from trainchain.core.rewards import audit_price, job_price
from trainchain.core.states import Shard

MAX_EVENTS = 500
MAX_CONTRIBUTIONS = 1000
TOLD = (
    "lease",
    "round",
    "shard",
    "worker",
    "delta",
    "receipt",
    "accepted",
    "merged_in",
    "resolved",
    "forfeited",
    "second",
)
MAX_TOLD = 1_000_000
"""An answer that holds this many numbers of losses and micro-batches ends with the contribution that they reach."""


def summary(hub: Hub, job: Row) -> dict[str, Any]:
    recipe = hub.recipe(job)
    return {
        "job": job["id"],
        "name": job["name"],
        "owner": job["owner"],
        "state": job["state"],
        "round": job["round"],
        "rounds": recipe.rounds,
        "created": job["created"],
        "spent": str(jobs.owed(hub, job["id"])),
        "budget": str(recipe.pay.budget),
        "private": recipe.private,
    }


def list_jobs(hub: Hub) -> list[dict[str, Any]]:
    with hub.store.read() as db:
        rows = list(db.execute(select(schema.jobs).order_by(schema.jobs.c.created.desc()).limit(200)).mappings())
    return [summary(hub, job) for job in rows]


def show_job(hub: Hub, job_id: str, asker: str | None = None) -> dict[str, Any]:
    """One job with its rounds, shards, losses, contributions, workers and settlements.

    What an adapter of a private job answers is shown to the job's owner alone.
    """
    job = hub.job(job_id)
    recipe = hub.recipe(job)
    answers = not recipe.private or access.is_owner(job, asker)
    with hub.store.read() as db:

        def rows(table: Any, *order: Any) -> list[Row]:
            return list(db.execute(select(table).where(table.c.job == job_id).order_by(*order)).mappings())

        rounds = rows(schema.rounds, schema.rounds.c.round)
        shards = rows(schema.shards, schema.shards.c.round, schema.shards.c.shard)
        contributions = rows(schema.contributions, schema.contributions.c.accepted)
        evaluations = rows(schema.evaluations, schema.evaluations.c.round, schema.evaluations.c.candidate)
        settlements = rows(schema.settlements, schema.settlements.c.round)
        audits = {a["lease"]: a for a in rows(schema.audits, schema.audits.c.drawn)}
        replays = [r for r in rows(schema.replays, schema.replays.c.done) if r["done"] is not None]
        held = {r["id"]: r for r in rows(schema.leases, schema.leases.c.taken) if r["state"] == "held"}
        last = db.execute(select(func.max(schema.events.c.seq)).where(schema.events.c.job == job_id)).scalar()
    given = {(c["round"], c["shard"]): c for c in contributions}
    adapters = {0: recipe.lora.initial.sha256, **{row["round"]: row["adapter"] for row in rounds}}
    places = {c["delta"]: [c["round"], c["shard"]] for c in contributions}
    judged = [e for e in evaluations if e["merge"] is not None]
    evaluations = [e for e in evaluations if e["adapter"] == adapters[e["round"]]]
    found = {e["round"]: e for e in evaluations}
    view_rounds = []
    for row in rounds:
        members = []
        measured = found.get(row["round"])
        for shard in (s for s in shards if s["round"] == row["round"]):
            counts = recipe.counts[row["round"] - 1][shard["shard"]]
            entry: dict[str, Any] = {
                "shard": shard["shard"],
                "state": shard["state"],
                "spare": shard["spare"],
                "tokens": counts.tokens,
            }
            contribution, lease = given.get((row["round"], shard["shard"])), held.get(shard["lease"])
            if contribution is not None:
                entry |= {
                    "worker": contribution["worker"],
                    "reward": str(contribution["reward"]),
                    "delta": contribution["delta"],
                    "seconds": contribution["signed"]["seconds"],
                    "losses": contribution["signed"]["losses"],
                    "micro_tokens": contribution["signed"]["micro_tokens"],
                    "numeric_class": contribution["signed"]["contribution"]["numericClass"],
                    "merged_in": contribution["merged_in"],
                    "merge": contribution["merge"],
                    "audit": _verdict(audits.get(contribution["lease"])),
                    "forfeited": contribution["forfeited"] is not None,
                }
            elif lease is not None:
                entry |= {"worker": lease["worker"], "progress": lease["progress"]}
            members.append(entry)
        view_rounds.append(
            {
                "round": row["round"],
                "state": row["state"],
                "start": row["start"],
                "adapter": row["adapter"],
                "outer_step": row["outer_step"],
                "secret_hash": row["secret_hash"],
                "secret_signature": row["secret_signature"],
                "secret": row["secret"] if _is_drawn_out(shards, row["round"]) else None,
                "opened": row["opened"],
                "closed": row["closed"],
                "merged": row["merged"],
                "merge_seconds": row["merge_seconds"],
                "merge_error": row["merge_error"],
                "loss": measured["loss"] if measured else None,
                "samples": measured["samples"] if measured and answers else None,
                "judged": [
                    {
                        "left_out": [places[digest] for digest in e["merge"]["left_out"]],
                        "state": e["state"],
                        "loss": e["loss"],
                    }
                    for e in judged
                    if e["round"] == row["round"]
                ],
                "shards": members,
            }
        )
    workers: dict[str, dict[str, Any]] = {}
    for contribution in contributions:
        entry = workers.setdefault(contribution["worker"], {"accepted": 0, "tokens": 0, "reward": 0})
        entry["accepted"] += 1
        entry["tokens"] += recipe.counts[contribution["round"] - 1][contribution["shard"]].tokens
        entry["reward"] += contribution["reward"]
    auditors: dict[str, dict[str, int]] = {}
    for replay in replays:
        mine = auditors.setdefault(replay["auditor"], {"replays": 0, "fees": 0})
        mine["replays"] += 1
        mine["fees"] += replay["fee"] if replay["forfeited"] is None else 0
    return {
        **summary(hub, job),
        "spec_hash": job["spec_hash"],
        "deadline": job["deadline"],
        "grace": job["grace"],
        "funded": str(job["funded"]),
        "price": str(job_price(recipe)),
        "audit_price": str(sum(audit_price(recipe, number) for number in range(1, recipe.rounds + 1))),
        "settled_round": job["settled_round"],
        "samples": recipe.samples,
        "evaluations": [
            {
                "round": e["round"],
                "state": e["state"],
                "loss": e["loss"],
                "samples": e["samples"] if answers else None,
            }
            for e in evaluations
        ],
        "rounds_done": view_rounds,
        "workers": {w: {**v, "reward": str(v["reward"])} for w, v in workers.items()},
        "auditors": {a: {**v, "fees": str(v["fees"])} for a, v in auditors.items()},
        "settlements": [
            {
                "round": s["round"],
                "root": s["root"],
                "total": str(s["total"]),
                "leaves": s["leaves"],
                "tx": s["tx"],
                "at": s["at"],
            }
            for s in settlements
            if s["tx"] is not None
        ],
        "last_event": last or 0,
    }


def _verdict(audit: Row | None) -> dict[str, Any] | None:
    return None if audit is None else {name: audit[name] for name in ("state", "code", "evidence")}


def _is_drawn_out(shards: Sequence[Row], round_: int) -> bool:
    """Whether nothing can be drawn with a round's secret any more: it may be told, and its draws repeated."""
    return all(shard["state"] in (Shard.ACCEPTED, Shard.ABANDONED) for shard in shards if shard["round"] == round_)


def events_after(hub: Hub, job_id: str, after: int) -> list[dict[str, Any]]:
    events = schema.events
    query = select(events).where(events.c.job == job_id, events.c.seq > after).order_by(events.c.seq).limit(MAX_EVENTS)
    with hub.store.read() as db:
        return [
            {"seq": e["seq"], "at": e["at"], "subject": e["subject"], "event": e["kind"], **e["data"]}
            for e in db.execute(query).mappings()
        ]


def contributions_of(hub: Hub, job_id: str, round_: int | None, after: int, limit: int) -> dict[str, Any]:
    """Accepted contributions (of one round), by round and shard, as they were signed and as they were answered.

    `after` is the `next` of the answer before, which is None where there are no more. Who may not ask for a private
    job's is for the caller to say (`access.insist_reader`).
    """
    table, shards = schema.contributions, hub.recipe(hub.job(job_id)).all_shards
    place = (table.c.round - 1) * shards + table.c.shard + 1
    query = select(table).where(table.c.job == job_id, place > after).order_by(place).limit(limit + 1)
    if round_ is not None:
        query = query.where(table.c.round == round_)
    found: list[dict[str, Any]] = []
    following, told = None, 0
    with hub.store.read() as db:
        for row in db.execute(query).mappings():
            if len(found) == limit or told >= MAX_TOLD:
                following = (found[-1]["round"] - 1) * shards + found[-1]["shard"] + 1
                break
            plain = {name: row[name] for name in TOLD}
            found.append({**plain, **row["signed"], "reward": str(row["reward"])})
            told += len(row["signed"]["losses"]) + len(row["signed"]["micro_tokens"])
    return {"contributions": found, "next": following}


def earned(hub: Hub, worker: str) -> list[dict[str, Any]]:
    """What a wallet has earned here: by job, and in it by shard in the order of acceptance; with what it lost and why,
    and with the fees of what it replayed for others."""
    table, replays = schema.contributions, schema.replays
    with hub.store.read() as db:
        query = select(table, schema.audits.c.state, schema.audits.c.code, schema.audits.c.evidence)
        query = query.outerjoin(schema.audits, schema.audits.c.lease == table.c.lease)
        mine = list(db.execute(query.where(table.c.worker == worker).order_by(table.c.place)).mappings())
        done = select(replays).where(replays.c.auditor == worker, replays.c.place.is_not(None))
        fees = list(db.execute(done.order_by(replays.c.place)).mappings())
        signed = select(schema.vouchers).where(schema.vouchers.c.account == worker)
        newest = {row["job"]: row for row in db.execute(signed).mappings()}
    found = []
    for job_id in sorted({row["job"] for row in [*mine, *fees]}):
        work, replayed = ([row for row in rows if row["job"] == job_id] for rows in (mine, fees))
        found.append(_earned_in(hub, worker, hub.job(job_id), work, replayed, newest.get(job_id)))
    return found


def _earned_in(
    hub: Hub, worker: str, job: Row, rows: list[Row], fees: list[Row], voucher: Row | None
) -> dict[str, Any]:
    over = vouchers.ended(hub, job)
    with hub.store.read() as db:
        waits, lost = earnings.waits(db, job["id"], worker), earnings.rejections(db, job["id"], worker)
    accepted, gone = sum(row["reward"] for row in rows), _sum(rows, "reward", "forfeited")
    given, taken = sum(row["fee"] for row in fees), _sum(fees, "fee", "forfeited")
    vested = accepted - gone + given - taken if over else voucher["cumulative"] if voucher else 0
    shards, replays = (len(rows), len(fees)) if over else (voucher["shards"], voucher["fees"]) if voucher else (0, 0)
    ripe = sum(row["fee"] for row in fees if row["forfeited"] is None and row["place"] <= replays)
    return {
        "job": job["id"],
        "name": job["name"],
        "token": hub.chain.token,
        "state": job["state"],
        "ended": over,
        "accepted": str(accepted),
        "vested": str(vested),
        "settled": str(_sum(rows, "reward", "settled_in") + _sum(fees, "fee", "settled_in")),
        "forfeited": str(gone),
        "waits": waits,
        "rejections": lost,
        "fees": {
            "replays": len(fees),
            "accepted": str(given),
            "vested": str(ripe),
            "forfeited": str(taken),
            "last": fees[-1]["done"] if fees else None,
        },
        "shards": [
            {
                "round": row["round"],
                "shard": row["shard"],
                "lease": row["lease"],
                "amount": str(row["reward"]),
                "place": row["place"],
                "accepted": row["accepted"],
                "audit": row["code"] or row["state"],
                "evidence": row["evidence"],
                "state": _state(row, shards, waits),
                "settlement": row["settled_in"],
            }
            for row in rows
        ],
    }


def _state(row: Row, reach: int, waits: int | None) -> str:
    """Where a shard's pay is: while a verdict is due nothing more vests, be it before or after it."""
    if row["settled_in"] is not None:
        return "settled"
    if row["forfeited"] is not None:
        return "forfeited"
    return "vested" if row["place"] <= reach else "held" if waits is not None else "vesting"


def _sum(rows: list[Row], amount: str, stamp: str) -> int:
    return sum(row[amount] for row in rows if row[stamp] is not None)
