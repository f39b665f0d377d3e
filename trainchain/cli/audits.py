"""What becomes of a job's audits, in words: for a worker as it happens, and of a job as its hub shows them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from trainchain.cli.wiring import short
from trainchain.core import money
from trainchain.core.errors import TrainChainError
from trainchain.core.evidence import REJECTS, Evidence, Measured, ReplayEvidence
from trainchain.core.markdown import count
from trainchain.core.models import parse
from trainchain.core.states import PENDING, Audit

if TYPE_CHECKING:
    from trainchain.core.client import HubClient

PAGE = 500
WORDS = {
    "audit.passed": "passed",
    "audit.unaudited": "nobody replayed it in time: it counts",
    "audit.undecided": "the replays do not agree: it counts",
    "audit.silent": "rejected: not answered in time",
    "audit.wrong_start": "rejected: another start than the round's",
    "audit.wrong_delta": "rejected: another end than was contributed",
    "audit.impossible": "rejected: a state that no training has",
    "audit.differs": "rejected: replays differ from it",
}
UNDECIDED = {"drawn": "waits for its worker", "answered": "waits for a replay", "void": "forfeited already"}

ROLES = {
    "earned": "who has earned it here",
    "operator": "the hub's",
    "owner": "the job's owner",
    "confirms": "a worker who confirms",
}


def describe(event: dict[str, Any]) -> str:
    """One line for a person, of a worker's event."""
    where = f"round {event.get('round')}  shard {event.get('shard')}"
    match event["event"]:
        case "drawn":
            return f"drawn    {where}  is audited: segment {event['segment']} will be replayed"
        case "answered":
            return f"answered {where}  the hub has what it takes to replay segment {event['segment']}"
        case "replayed":
            fee = f"  up to +{money.show(int(event['fee']))} TRAIN"
            done = f"{event['tokens']:,} tokens in {event['seconds']:.1f} s"
            return f"replayed {where}  segment {event['segment']}  {done}{fee}"
        case "audited" if event["code"] in REJECTS:
            known = event["forfeited"] is not None
            what = f"{money.show(int(event['forfeited']))} TRAIN" if known else "What had not vested in this job is"
            lost = f"{what} forfeited."
            return f"REJECTED {where}  {WORDS[event['code']].partition(': ')[2]}. {lost} {event['hint']}"
        case "audited":
            return f"audited  {where}  {standing(event)}"
        case _:
            shards = event["shards"]
            first = f"round {shards[0]['round']} shard {shards[0]['shard']}"
            more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
            until = time.strftime("%H:%M", time.localtime(event["until"]))
            return (
                f"auditing waiting for the verdict on {first}{more}: Ctrl-C leaves; come back before {until} "
                "or the work counts as failed"
            )


def standing(audit: dict[str, Any]) -> str:
    """How an audit stands, or ended."""
    return WORDS.get(str(audit.get("code")), UNDECIDED.get(str(audit["state"]), str(audit["state"])))


def of_job(client: HubClient, job_id: str, *, signed: bool) -> list[dict[str, Any]]:
    """All audits of a job, by round and shard."""
    found: list[dict[str, Any]] = []
    after: int | None = 0
    while after is not None:
        page = client.get(f"/v1/jobs/{job_id}/audits", signed=signed, after=after, limit=PAGE)
        found += page["audits"]
        after = page["next"]
    return found


def counted(view: dict[str, Any]) -> dict[str, int]:
    """By how they stand, of a job's view."""
    states = [shard["audit"]["state"] for row in view["rounds_done"] for shard in row["shards"] if shard.get("audit")]
    names = {"passed": Audit.PASSED, "failed": Audit.FAILED, "unaudited": Audit.UNAUDITED}
    return {"drawn": len(states), **{name: states.count(state) for name, state in names.items()}}


def pending(view: dict[str, Any]) -> int:
    """How many have no verdict yet."""
    return sum(
        (shard.get("audit") or {}).get("state") in PENDING for row in view["rounds_done"] for shard in row["shards"]
    )


def summary(counts: dict[str, int], accepted: int) -> str:
    """For a person: how many of the accepted shards were drawn, and what came of them."""
    if not counts["drawn"]:
        return f"none of {accepted} shards audited"
    came = [f"{counts[name]} {name}" for name in ("passed", "failed", "unaudited") if counts[name]]
    result = "all passed" if counts["passed"] == counts["drawn"] else ", ".join(came) or "no verdict yet"
    return f"{counts['drawn']} of {accepted} shards audited, {result}"


def listed(rows: list[dict[str, Any]]) -> str:
    """A line for each."""
    if not rows:
        return "no audits"
    return "\n".join(
        f"round {row['round']}  shard {row['shard']:<3} segment {row['segment']:<3} {short(row['worker'])}  "
        f"{row['lease'][:12]}  {standing(row)}"
        for row in rows
    )


def lease_of(rows: list[dict[str, Any]], text: str) -> str:
    """The audited lease that an id or its beginning names. Raises `usage.flag`."""
    found = [str(row["lease"]) for row in rows if row["lease"].startswith(text)]
    if len(found) != 1:
        what = "no audit" if not found else f"{len(found)} audits"
        raise TrainChainError(
            "usage.flag",
            f"{text[:80]!r} names {what} of this job.",
            hint="trainchain jobs show JOB --evidence  lists them.",
        )
    return found[0]


def in_words(document: dict[str, Any]) -> str:
    """An evidence document for a person."""
    evidence = parse(Evidence, document, code="hub.not_a_hub", what="The evidence")
    given = evidence.contribution
    lines = [
        f"{evidence.code}  {evidence.says}",
        f"claimed  round {given.round} shard {given.shard} by {evidence.worker}, lease {given.lease}",
        f"         delta {given.deltaHash}",
        f"         states {given.stateRoot}, {given.numericClass}",
        f"drawn    segment {evidence.segment}, with {count(evidence.at_risk, 'shard')} at risk",
    ]
    if evidence.expected or evidence.found:
        lines.append(f"found    {evidence.found}")
        lines.append(f"expected {evidence.expected or 'none that is finite'}")
    for number, replay in enumerate(evidence.replays, 1):
        lines += _replay(number, replay, evidence.tolerance)
    if evidence.replays and evidence.cold is not None:
        lines.append("start    " + ("new moments: the change is told less" if evidence.cold else "moments at work"))
    if lost := evidence.forfeits:
        lines.append(f"forfeits {money.show(lost.amount)} TRAIN: places {lost.first} to {lost.last} of the worker")
    return "\n".join(lines)


def _replay(number: int, replay: ReplayEvidence, tolerance: Measured | None) -> list[str]:
    signed = replay.signed.replay
    who = ROLES[replay.role]
    got = "the same to the last bit" if replay.equal else f"another end, leaf {signed.endLeaf}"
    lines = [f"replay {number} by {signed.auditor}, {who}, {signed.numericClass}", f"         got {got}"]
    if replay.distances is not None:
        lines += [f"         {line}" for line in _distances(replay.distances, tolerance)]
        if replay.within is not None:
            lines.append(f"         {'within' if replay.within else 'beyond'} the tolerance")
    return lines


def _distances(found: Measured, tolerance: Measured | None) -> list[str]:
    lines = []
    for name in Measured.model_fields:
        value, most = getattr(found, name), getattr(tolerance, name) if tolerance is not None else None
        if value is not None:
            lines.append(f"{name:<10} {value:<12.3g}" + ("" if most is None else f" of at most {most:.3g}"))
    return lines
