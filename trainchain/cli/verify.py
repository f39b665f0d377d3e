"""verify JOB: recompute from public objects and the chain what a job pays, and name what does not hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainchain.cli.gather import Gathered, gather
from trainchain.cli.options import Home, HubUrl, JobName, Json
from trainchain.cli.output import Output
from trainchain.core.errors import TrainChainError
from trainchain.core.markdown import count
from trainchain.core.money import show

if TYPE_CHECKING:
    from pathlib import Path

    from trainchain.core.balance import Settled
    from trainchain.core.client import HubClient
    from trainchain.core.history import Receipt
    from trainchain.core.recount import Finding, Leaves, Line
    from trainchain.core.rewards import Earned

MAX_RECEIPT = 1 << 16
AMOUNTS = ("accepted", "forfeited", "vested", "settled", "paid")


def verify(
    job: JobName,
    chain: Annotated[
        str | None,
        typer.Option("--chain", metavar="URL", help="An RPC of your own, to ask that and not the hub's."),
    ] = None,
    hub: HubUrl = None,
    home: Home = None,
    json_: Json = False,
) -> None:
    """Recompute what JOB pays, from contributions to money on chain, and compare. Prints each step.

    Needs no wallet, but for a private job, whose contributions are for its owner
    and its workers. Exit code 4 if anything does not hold; all of it is named.

    \b
    Examples:
      trainchain verify @last
      trainchain verify 0x7f3a9c --chain https://rpc.example.org --json
    """
    from trainchain.cli import delivery
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    settings = Settings.load(home, hub)
    job_id = delivery.job_named(settings, job)
    kept = _receipts(settings.home / "receipts" / job_id, out)

    def recount(client: HubClient) -> dict[str, Any]:
        return report(gather(client, job_id, kept, rpc=chain), out.line)

    document = delivery.as_reader(settings, out, recount)
    found = [one for step in document["steps"] for one in step["findings"]]
    if found:
        more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
        error = TrainChainError(found[0]["code"], found[0]["message"] + more)
        out.error(error, **document)
        raise typer.Exit(error.exit_code)
    out.result("all of it holds", document)


@dataclass
class Step:
    """One step of the recount: what was done, and what did not hold."""

    name: str
    says: str
    findings: list[Finding]
    details: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        yield f"{self.name:<14} {'FAILS' if self.findings else 'holds'}  {self.says}"
        yield from (f"  {line}" for line in self.details)
        yield from (f"  {found.code:<14} {found.says}" for found in self.findings)

    def document(self) -> dict[str, Any]:
        found = [{"code": one.code, "message": one.says} for one in self.findings]
        return {"step": self.name, "holds": not self.findings, "says": self.says, "findings": found}


def report(evidence: Gathered, say: Callable[[str], None]) -> dict[str, Any]:
    """Recompute step by step, saying each as it is done; returns all of it as a document."""
    from trainchain.core.states import ENDED

    after, escrow = evidence.after, evidence.escrow
    over = after.state in ENDED
    say(f"job            {after.job}  {evidence.recipe.name}, {after.state}, {evidence.recipe.rounds} rounds")
    steps: list[Step] = []

    def done(step: Step) -> None:
        steps.append(step)
        for line in step.lines():
            say(line)

    done(_recipe(evidence))
    rows, step = _contributions(evidence)
    done(step)
    done(_verdicts(evidence))
    done(_draws(evidence))
    wrong, step = _evidence(evidence)
    done(step)
    fees, step = _forfeits(evidence, wrong)
    done(step)
    rows = [*rows, *fees]
    done(_leaves_step(evidence, rows, over=over))
    done(_roots(evidence))
    lines, step = _money(evidence, rows, over=over)
    done(step)
    return {
        "job": after.job,
        "name": evidence.recipe.name,
        "state": after.state,
        "chain": {"chain_id": evidence.chain.chain_id, "escrow": evidence.chain.escrow, "token": escrow.token},
        "hub": escrow.hub,
        "steps": [step.document() for step in steps],
        "settlements": [_settlement(one, evidence.files[one.number]) for one in evidence.balance.settlements],
        "workers": [_shown(line) for line in lines],
    }


def _recipe(evidence: Gathered) -> Step:
    chain = evidence.chain
    says = f"sha256 {evidence.recipe.spec_hash} stands in the escrow {chain.escrow} on chain {chain.chain_id}"
    return Step("recipe", says, [], ["the code there is that of TrainEscrow"])


def _contributions(evidence: Gathered) -> tuple[list[Earned], Step]:
    from trainchain.cli.delivery import chain_checks
    from trainchain.core.recount import earned

    args = (evidence.recipe, evidence.after.job, evidence.chain, evidence.rows, chain_checks().recover)
    rows, found = earned(*args, hubs=evidence.hubs)
    workers, total = len({row.worker for row in rows}), sum(row.amount for row in rows)
    says = f"{count(len(rows), 'shard')} by {count(workers, 'worker')}, each with its receipt: "
    says += f"{show(total)} TRAIN by the recipe's prices"
    return rows, Step("contributions", says, found)


def _verdicts(evidence: Gathered) -> Step:
    from trainchain.cli.delivery import chain_checks
    from trainchain.core.recount import promised, verdicts

    found = verdicts(evidence.before, evidence.rows, evidence.after)
    recover = chain_checks().recover
    found += promised(evidence.rows, evidence.kept, evidence.chain, recover, hubs=evidence.hubs)
    accepted = sum(len(row.accepted()) for row in evidence.after.rounds_done)
    mine = f"; {len(evidence.kept)} receipts of this home compared" if evidence.kept else ""
    return Step("verdicts", f"{accepted} accepted by the hub's view, {len(evidence.rows)} told of{mine}", found)


def _draws(evidence: Gathered) -> Step:
    from trainchain.cli.delivery import chain_checks
    from trainchain.core.rechecks import draws

    found = draws(evidence.told, evidence.kept, chain_checks().recover)
    secrets = sum(round_.secret is not None for round_ in evidence.before.rounds_done)
    rounds = len(evidence.before.rounds_done)
    says = f"{len(evidence.audits)} audits told of; the secrets of {secrets} of {rounds} rounds are published"
    if not evidence.recipe.audited:
        says = "this job's work is not audited" + (f", and {len(evidence.audits)} are told of" * bool(evidence.audits))
    return Step("draws", says, found)


def _evidence(evidence: Gathered) -> tuple[dict[str, float], Step]:
    from trainchain.cli.delivery import chain_checks
    from trainchain.core.rechecks import replays
    from trainchain.core.states import TESTED

    recover = chain_checks().recover
    found = replays(evidence.told, recover)
    if not evidence.documents:
        return {}, Step("evidence", "no verdict yet", found)
    from trainchain.core.evident import judge

    judged = judge(evidence.told, evidence.documents, recover, evidence.fetch)
    codes = Counter(audit.code for audit in evidence.audits if audit.code)
    details = [f"{code}: {number}" for code, number in sorted(codes.items())]
    details += [
        f"round {audit.round}, shard {audit.shard}, by {audit.worker}: {audit.code}, evidence {audit.evidence}"
        for audit in evidence.audits
        if audit.rejects
    ]
    read = sum(document is not None for document in evidence.documents.values())
    says = f"{read} of {len(evidence.documents)} verdicts decided again"
    if read < len(evidence.documents) and evidence.before.state not in TESTED:
        says += "; what passes is shown once the job is settled"
    return judged.wrong, Step("evidence", says, found + judged.findings, details)


def _forfeits(evidence: Gathered, wrong: dict[str, float]) -> tuple[list[Earned], Step]:
    from trainchain.core.rechecks import fees, forfeited

    found, (paid, more) = forfeited(evidence.told), fees(evidence.told, wrong)
    lost = sum(row.receipt.amount for row in evidence.rows if row.forfeited is not None)
    shards = sum(row.forfeited is not None for row in evidence.rows)
    says = f"{shards} shards, {show(lost)} TRAIN; {len(paid)} replays earned {show(sum(r.amount for r in paid))} TRAIN"
    return paid, Step("forfeits", says, found + more)


def _leaves_step(evidence: Gathered, rows: list[Earned], *, over: bool) -> Step:
    from trainchain.core.recount import leaves, rules

    cap = evidence.escrow.round_cap
    merged = max((row.round for row in evidence.after.merged()), default=0)
    read = [file for file in evidence.files.values() if file is not None]
    found = [*evidence.lacking, *rules(read, cap=cap, merged=merged, over=over)]
    found += leaves(evidence.after.job, rows, evidence.files)
    details = []
    for one in evidence.balance.settlements:
        file = evidence.files[one.number]
        if file is None:
            continue
        limit = f", at most {show(file.terms.limit)} more" + (
            f": below the round cap of {show(cap)}, with {show(one.free)} free in escrow"
            if file.terms.limit < cap
            else ""
        )
        what = "all that was accepted" if file.terms.ended else f"what had vested by round {one.number}"
        details.append(f"settlement {one.number}: {len(file.amounts)} leaves, {what}{limit}")
    return Step("leaves", f"{len(read)} of {len(evidence.files)} leaves files recomputed", found, details)


def _roots(evidence: Gathered) -> Step:
    from trainchain.core.recount import OnChain, listed, roots

    settled = [OnChain(one.number, one.root, one.total) for one in evidence.balance.settlements]
    says = f"{len(settled)} on chain, {show(evidence.balance.total)} TRAIN settled by the last"
    found = roots(settled, evidence.files, cap=evidence.escrow.round_cap)
    return Step("roots", says, found + listed(evidence.after.settlements, evidence.balance.settlements))


def _money(evidence: Gathered, rows: list[Earned], *, over: bool) -> tuple[list[Line], Step]:
    from trainchain.core.recount import Sums, money, table

    log, escrow = evidence.balance, evidence.escrow
    last = next((evidence.files[one.number] for one in reversed(log.settlements)), None)
    lines = table(rows, last, log.paid, over=over)
    found = money(lines, log, Sums(escrow.funded, escrow.refunded, escrow.total, escrow.claimed))
    says = f"{show(log.claimed)} paid of {show(log.settled)} settled of {show(log.funded)} TRAIN funded"
    head = f"{'worker':<42} {'shards':>6}" + "".join(f" {name:>20}" for name in AMOUNTS)
    shown = [
        f"{line.account:<42} {line.shards:>6}" + "".join(f" {show(getattr(line, name)):>20}" for name in AMOUNTS)
        for line in lines
    ]
    return lines, Step("money", says, found, [head, *shown] if lines else [])


def _settlement(one: Settled, file: Leaves | None) -> dict[str, Any]:
    chain = {"number": one.number, "root": one.root, "total": str(one.total), "leaves": one.data_hash, "tx": one.tx}
    rule = {"ended": file.terms.ended, "limit": str(file.terms.limit)} if file else {"ended": None, "limit": None}
    return {**chain, **rule}


def _shown(line: Line) -> dict[str, Any]:
    amounts = {name: str(getattr(line, name)) for name in AMOUNTS}
    return {"account": line.account, "shards": line.shards, **amounts}


def _receipts(folder: Path, out: Output) -> list[Receipt]:
    """The receipts that this home has of a job; what is none is told of and passed over."""
    from trainchain.core.history import Receipt
    from trainchain.core.models import parse

    found: list[Receipt] = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            data = path.read_bytes() if path.stat().st_size <= MAX_RECEIPT else b""
            found.append(parse(Receipt, data, code="receipt.invalid", what=str(path)))
        except (OSError, TrainChainError) as problem:
            out.note(f"passed over {path}: {problem}")
    return found
