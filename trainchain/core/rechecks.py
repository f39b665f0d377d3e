"""Checking a job's audits again, from what is public: what the published secrets draw, what was forfeited by the rule,
and what replays were paid. Whether a verdict follows from its evidence is for `core/evident.py`.

Pure, as `core/recount.py`. What a busy hub told a moment earlier or later accuses nobody: audits are asked for on both
sides of the contributions, and only what both times stood so is held against it.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trainchain.core.draws import draw, secret_hash
from trainchain.core.errors import TrainChainError
from trainchain.core.history import Accepted, Chain, History, Receipt, ToldAudit, ToldReplay, ToldRound
from trainchain.core.models import ResolvedRecipe
from trainchain.core.money import show
from trainchain.core.recount import Finding, Recover, queues
from trainchain.core.rewards import (
    FEES_VESTING,
    NEVER,
    VESTING,
    Earned,
    Terms,
    at_risk,
    audit_price,
    replay_fee,
    vested,
)
from trainchain.core.states import TESTED

DRAWS, EVIDENCE, FORFEITS = "verify.draws", "verify.evidence", "verify.forfeits"
OVER = frozenset({"accepted", "abandoned"})
TEN = VESTING + 1
EARNED = 10
"""Vested shards in a job with which a wallet may audit it."""


class Told(NamedTuple):
    """All that a hub tells of a job's work: `early` and `audits` were asked for before and after the contributions,
    `before` is its view from before them all."""

    recipe: ResolvedRecipe
    job: str
    chain: Chain
    hubs: Collection[str]
    """Who signs for the job, in lower case."""
    before: History
    rows: Sequence[Accepted]
    early: Sequence[ToldAudit]
    audits: Sequence[ToldAudit]
    operators: Collection[str] = ()
    """The hub's own wallets that audit, in lower case."""


class Batch(NamedTuple):
    """What one rejection cost: the places that are forfeited with it, and those that the rule says."""

    audit: ToldAudit
    places: list[int]
    rule: list[int]
    stamps: set[int | None]


def draws(told: Told, kept: Iterable[Receipt], recover: Recover) -> list[Finding]:
    """Whether every audit is what the round's secret draws, and every drawn one is told of; and whether both are what
    the receipts in `kept` were told."""
    found = [says for round_ in told.before.rounds_done for says in _secret(told, round_, recover)]
    audits, rows = {audit.lease: audit for audit in told.audits}, {row.contribution.lease: row for row in told.rows}
    secrets = {round_.round: round_.secret for round_ in told.before.rounds_done if round_.secret}
    lost = {worker: _lost(batches) for worker, batches in _batches(told).items()}
    for lease, row in rows.items():
        where, audit = _where(row), audits.get(lease)
        if audit is not None and (audit.round, audit.shard, audit.worker.lower()) != (*row.which, _worker(row)):
            found.append(f"The audit of {where} is told of as another's.")
        if (audit is None) != (row.resolved == 0):
            says = "waits for a verdict, and no audit is told of" if audit is None else "is told of as not audited"
            found.append(f"{where} {says}.")
        secret = secrets.get(row.which[0])
        if secret is not None:
            found += _drawn(told.recipe, row, audit, secret, lost.get(_worker(row), []))
    for audit in told.audits:
        if audit.lease not in rows and audit.round in secrets:
            found.append(f"An audit of round {audit.round}, shard {audit.shard} is of no contribution that is told of.")
    by_round = {round_.round: round_ for round_ in told.before.rounds_done}
    for receipt in kept:
        found += _promised(told, receipt, by_round.get(receipt.round), audits.get(receipt.lease), recover)
    return [Finding(DRAWS, says[0].upper() + says[1:]) for says in found]


def forfeited(told: Told) -> list[Finding]:
    """Whether exactly that is forfeited which the rule says of each rejection, and nothing without one."""
    found, known = [], {audit.lease for audit in told.early if audit.rejects}
    audits = {audit.lease: audit for audit in told.audits}
    for batches in _batches(told).values():
        for batch in batches:
            if batch.audit.lease not in known:
                continue
            who = f"the rejection of round {batch.audit.round}, shard {batch.audit.shard}, by {batch.audit.worker}"
            more, less = set(batch.places) - set(batch.rule), set(batch.rule) - set(batch.places)
            if more:
                found.append(f"With {who} the places {_listed(more)} are forfeited, which had vested.")
            if less:
                found.append(f"With {who} the places {_listed(less)} are not forfeited; the rule takes them.")
            if len(batch.stamps) > 1:
                found.append(f"With {who} places are forfeited at different times: {_listed(batch.stamps)}.")
    judged = {(worker, place) for worker, those in _batches(told).items() for one in those for place in one.places}
    early = {audit.lease: audit for audit in told.early}
    for row in told.rows:
        if row.forfeited is not None and (_worker(row), row.receipt.place) not in judged:
            found.append(f"{_where(row)} is forfeited, and no evidence rejects anything of that worker's.")
        audit, stands = audits.get(row.contribution.lease), early.get(row.contribution.lease)
        if audit is not None and row.resolved is not None and (audit.code is None or audit.rejects):
            found.append(f"{_where(row)} counts as if it had passed its audit, which is {audit.code or audit.state}.")
        if stands is not None and stands.code is not None and not stands.rejects and row.resolved is None:
            found.append(f"{_where(row)} waits for a verdict; its audit ended with {stands.code}.")
    return [Finding(FORFEITS, says[0].upper() + says[1:]) for says in found]


def replays(told: Told, recover: Recover) -> list[Finding]:
    """Whether every replay that is done was signed by its auditor, once it is told what, and made by one who might."""
    early = {replay.lease for audit in told.early for replay in audit.replays if replay.done is not None}
    batches, found = _batches(told), []
    for audit in told.audits:
        here = [replay for replay in audit.replays if replay.lease in early and replay.done is not None]
        who = Counter(replay.auditor.lower() for replay in here)
        who += Counter("its hub's operator" for replay in here if replay.role == "operator")
        which = f"round {audit.round}, shard {audit.shard}"
        if audit.code == "audit.passed" and all(replay.ringer or replay.done is None for replay in audit.replays):
            found.append(f"the audit of {which} has passed, and no replay of it is told of.")
        found += [f"{wallet} replayed {which} {times} times." for wallet, times in who.items() if times > 1]
        for replay in here:
            where = f"the replay of {which}, by {replay.auditor}"
            found += [f"{where} {says}." for says in _may(told, audit, replay, batches)]
            found += [f"{where} {says}." for says in _unsigned(told, audit, replay, recover)]
    return [Finding(EVIDENCE, says[0].upper() + says[1:]) for says in found]


def kept_back(told: Told, audit: ToldAudit) -> bool:
    """Whether what an audit found may not be told yet: of what has passed auditors may be put to the test."""
    return audit.code == "audit.passed" and told.before.state not in TESTED


def fees(told: Told, wrong: Mapping[str, float]) -> tuple[list[Earned], list[Finding]]:
    """What replays earned, and what of it does not hold. `wrong` are the leases of the replays that a verdict proves
    wrong, with when."""
    recipe, earned, found = told.recipe, [], []
    opened = {round_.round: round_.opened for round_ in told.before.rounds_done}
    done = [(audit, replay) for audit in told.audits for replay in audit.replays if replay.done is not None]
    given = sum(replay.fee for audit in told.audits for replay in audit.replays)
    shards: dict[str, int] = {}
    for row in told.rows:
        shards[_worker(row)] = shards.get(_worker(row), 0) + 1
    for audit, replay in done:
        where = f"the replay of round {audit.round}, shard {audit.shard}, by {replay.auditor}"
        if replay.place is None or replay.counted is None:
            found.append(f"{where} is done and has no place in its auditor's queue.")
            continue
        due = replay_fee(recipe, audit.round, audit.shard, audit.segment)
        reach = sum(audit_price(recipe, number) for number, at in opened.items() if at <= (replay.done or 0))
        # What was out then, and never came in, had its fee kept back too: only where money was plenty it is no excuse.
        paid = replay.auditor.lower() != told.before.owner.lower() and shards.get(replay.auditor.lower(), 0) >= TEN
        if replay.fee not in (0, due) or (replay.fee < due and paid and 2 * (given + due) <= reach):
            found.append(f"{where} is paid {show(replay.fee)}; the recipe gives {show(due)}.")
        stamp = NEVER if replay.forfeited is None else replay.forfeited
        which = (audit.round, audit.shard, replay.auditor, replay.place, replay.fee, replay.counted)
        earned.append(Earned(*which, "replay", 0, stamp))
    most = sum(audit_price(recipe, number) for number in range(1, recipe.rounds + 1))
    if sum(row.amount for row in earned) > most:
        found.append(
            f"replays are paid {show(sum(row.amount for row in earned))}; the recipe has {show(most)} for them."
        )
    found += _taken(done, wrong)
    return sorted(earned), [Finding(FORFEITS, says[0].upper() + says[1:]) for says in found] + [
        Finding(FORFEITS, one.says) for one in queues(earned, "replays")
    ]


def _unsigned(told: Told, audit: ToldAudit, replay: ToldReplay, recover: Recover) -> Iterator[str]:
    decided = any(one.lease == audit.lease and one.decided for one in told.early)
    if replay.signed is None:
        if decided and not kept_back(told, audit):
            yield "is told of without what was signed"
        return
    given = replay.signed.replay
    which = (given.jobId, given.lease, given.target, given.segment, given.auditor.lower())
    if which != (told.job, replay.lease, audit.lease, audit.segment, replay.auditor.lower()):
        yield "holds what was signed of something else"
    try:
        signer = recover(told.chain, "Replay", given.model_dump(), replay.signed.signature).lower()
    except TrainChainError:
        signer = ""
    if signer != replay.auditor.lower():
        yield "is not signed by that wallet"


def _may(told: Told, audit: ToldAudit, replay: ToldReplay, batches: Mapping[str, list[Batch]]) -> Iterator[str]:
    """Why the auditor of a replay was none, by what its role asks for."""
    wallet, at = replay.auditor.lower(), replay.done or 0.0
    if wallet == audit.worker.lower():
        yield "is by the wallet that contributed it"
    if replay.ringer and (audit.code != "audit.passed" or (audit.decided or 0.0) > at):
        yield "is told of as a test, and its answer was not known"
    if replay.ringer and replay.role != "earned":
        yield f"is told of as a test of one whose role is {replay.role}"
    if (replay.role == "owner") != (wallet == told.before.owner.lower()):
        yield f"is told of as of the role {replay.role}, and the job's owner is {told.before.owner}"
    elif replay.role == "operator" and wallet not in told.operators:
        yield "is told of as the operator's, and the hub has no such auditor"
    elif replay.role == "earned" and not _earned(told, wallet, at, batches.get(wallet, [])):
        yield f"is told of as earned, and fewer than {EARNED} shards of that wallet had vested"
    elif replay.role == "confirms" and not any(
        one.worker.lower() == wallet and one.code == "audit.passed" and (one.decided or 0.0) <= at
        for one in told.audits
    ):
        yield "is told of as a confirmation, and no audit of that wallet's work had passed"
    elif replay.role is None:
        yield "is told of without a role"


def _earned(told: Told, wallet: str, at: float, batches: Iterable[Batch]) -> bool:
    """Whether a wallet had what it takes to audit for pay. What has vested once stays so, so that the time at which
    the replay was lent need not be known."""
    lost = {place for batch in batches if (batch.audit.decided or 0.0) <= at for place in batch.rule}
    waits = {
        audit.lease
        for audit in told.audits
        if audit.code is None or audit.rejects or audit.decided is None or audit.decided > at
    }
    queue = [
        Earned(
            *(*row.which, wallet, row.receipt.place, 0, 0),
            resolved=NEVER if row.contribution.lease in waits else 0,
            forfeited=0 if row.receipt.place in lost else NEVER,
        )
        for row in told.rows
        if _worker(row) == wallet and row.accepted <= at
    ]
    return len(queue) >= EARNED + VESTING and len(vested(queue, Terms(0, False, 0))) >= EARNED


def _taken(done: Sequence[tuple[ToldAudit, Any]], wrong: Mapping[str, float]) -> Iterator[str]:
    """Fees fall only with a replay that is proven wrong, or that failed where the answer was known; then all that have
    not vested do."""
    queues_: dict[str, list[Any]] = {}
    for _, replay in done:
        if replay.place is not None:
            queues_.setdefault(replay.auditor.lower(), []).append(replay)
    for queue in queues_.values():
        queue.sort(key=lambda replay: replay.place)
        events = sorted(
            [(wrong[replay.lease], True) for replay in queue if replay.lease in wrong]
            + [(replay.done, False) for replay in queue if replay.ringer]
        )
        covered: set[int] = set()
        lost = 0
        for at, sure in events:
            newest = max((replay.place for replay in queue if replay.done <= at), default=0)
            rule = [replay for replay in queue if max(lost, newest - FEES_VESTING) < replay.place <= newest]
            if sure or (rule and rule[-1].forfeited is not None):
                for replay in rule:
                    if replay.forfeited is None:
                        yield f"{replay.auditor} was proven wrong, and its fee at place {replay.place} still stands."
                covered |= {replay.place for replay in rule}
                lost = newest
        for replay in queue:
            if replay.forfeited is not None and replay.place not in covered:
                yield f"the fee of {replay.auditor} at place {replay.place} is forfeited, and nothing proves it wrong."


def _secret(told: Told, round_: ToldRound, recover: Recover) -> Iterator[str]:
    number = round_.round
    if round_.secret_hash is None or round_.secret_signature is None:
        if told.recipe.audited:
            yield f"round {number} has no signed hash of the secret that draws its audits."
        return
    if not _signed(told, number, round_.secret_hash, round_.secret_signature, recover):
        yield f"the secret hash of round {number} is not signed by the job's hub."
    if round_.secret is not None:
        made = secret_hash(bytes.fromhex(round_.secret[2:]))
        if made != round_.secret_hash:
            yield f"the secret of round {number} hashes to {made}; the hub signed {round_.secret_hash}."
    elif round_.shards and all(shard.state in OVER for shard in round_.shards):
        yield f"the secret of round {number} is kept back, though nothing can be drawn with it any more."


def _signed(told: Told, number: int, hashed: str, signature: str, recover: Recover) -> bool:
    fields = {"jobId": told.job, "round": number, "secretHash": hashed}
    try:
        return recover(told.chain, "RoundSecret", fields, signature).lower() in told.hubs
    except TrainChainError:
        return False


def _drawn(
    recipe: ResolvedRecipe, row: Accepted, audit: ToldAudit | None, secret: str, lost: Sequence[int]
) -> Iterator[str]:
    where, given = _where(row), row.contribution
    risk = at_risk(row.receipt.place, max((last for last in lost if last < row.receipt.place), default=0))
    drawing, lease, root = (bytes.fromhex(text[2:]) for text in (secret, given.lease, given.stateRoot))
    sizes = {"steps": recipe.steps, "segment_steps": recipe.training.segment_steps}
    segment = draw(drawing, lease, root, at_risk=risk, **sizes) if recipe.audited else None
    if segment is not None and audit is None:
        yield f"{where} was to be audited in segment {segment}, and the draw was skipped."
    elif segment is None and audit is not None:
        yield f"{where} was not to be audited, and an audit was invented."
    elif audit is not None and audit.segment != segment:
        yield f"{where} was to be audited in segment {segment}; the draw was moved to {audit.segment}."
    elif audit is not None and audit.at_risk != risk:
        yield f"{where} was drawn with {audit.at_risk} shards at risk; there were {risk}."


def _promised(
    told: Told, receipt: Receipt, round_: ToldRound | None, audit: ToldAudit | None, recover: Recover
) -> Iterator[str]:
    """What a worker was told against what everybody is told."""
    where = f"round {receipt.round}, shard {receipt.shard}"
    signed = receipt.secret_hash is not None and _signed(
        told, receipt.round, receipt.secret_hash, receipt.secret_signature or "", recover
    )
    if round_ is not None and signed and round_.secret_hash != receipt.secret_hash:
        yield f"{receipt.worker} holds the signed secret hash {receipt.secret_hash} of round {receipt.round}; "
        f"told is {round_.secret_hash}."
    if "draw" not in receipt.model_fields_set:
        return
    drawn = None if receipt.draw is None else (receipt.draw.segment, receipt.draw.at_risk)
    now = None if audit is None else (audit.segment, audit.at_risk)
    if drawn != now:
        told_, shown = ("no audit" if one is None else f"segment {one[0]}, {one[1]} at risk" for one in (drawn, now))
        yield f"{receipt.worker} was told of {where}: {told_}; everybody is told: {shown}."


def _batches(told: Told) -> dict[str, list[Batch]]:
    """By worker in lower case, what each rejection cost, in their order."""
    found: dict[str, list[Batch]] = {}
    failed = sorted((one for one in told.audits if one.rejects and one.decided), key=lambda one: one.decided or 0)
    for worker in {audit.worker.lower() for audit in failed}:
        queue = sorted((row for row in told.rows if _worker(row) == worker), key=lambda row: row.receipt.place)
        places = {row.contribution.lease: row.receipt.place for row in queue}
        mine = [audit for audit in told.audits if audit.lease in places]
        gone, taken = 0, set[int]()
        for audit in (one for one in failed if one.worker.lower() == worker):
            at = audit.decided or 0.0
            there = [row for row in queue if row.accepted <= at and row.receipt.place > gone]
            open_ = [places[one.lease] for one in mine if one.decided is None or one.decided >= at]
            first = min((place for place in open_ if place > gone), default=places.get(audit.lease, gone + 1))
            rule = [row.receipt.place for row in there if row.receipt.place >= first - VESTING]
            lost = [row for row in queue if row.forfeited is not None and row.accepted <= at]
            lost = [row for row in lost if row.receipt.place not in taken]
            batch = Batch(audit, [row.receipt.place for row in lost], rule, {row.forfeited for row in lost})
            found.setdefault(worker, []).append(batch)
            taken |= set(batch.places)
            gone = max([gone, *rule])
    return found


def _lost(batches: Iterable[Batch]) -> list[int]:
    """The last place that each rejection took."""
    return [max(batch.rule) for batch in batches if batch.rule]


def _where(row: Accepted) -> str:
    return f"round {row.which[0]}, shard {row.which[1]}, by {row.contribution.worker}"


def _worker(row: Accepted) -> str:
    return row.contribution.worker.lower()


def _listed(these: Iterable[int | None]) -> str:
    shown = sorted(one for one in these if one is not None)
    return ", ".join(map(str, shown[:12])) + (", .." if len(shown) > 12 else "")
