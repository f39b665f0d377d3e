"""verify JOB: recompute from public objects and the chain what a job pays, and name what does not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainchain.cli.options import Home, HubUrl, JobName, Json
from trainchain.cli.output import Output
from trainchain.core.errors import TrainChainError
from trainchain.core.money import show

if TYPE_CHECKING:
    from pathlib import Path

    from trainchain.chain.records import JobOnChain
    from trainchain.core.balance import Balance, Settled
    from trainchain.core.client import HubClient
    from trainchain.core.history import Accepted, Chain, History, Receipt
    from trainchain.core.models import ResolvedRecipe
    from trainchain.core.recount import Finding, Leaves, Line
    from trainchain.core.rewards import Earned

MAX_RECEIPT = 1 << 16
AWAY = 3


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
    evidence = delivery.as_reader(settings, out, lambda client: gather(client, job_id, kept, rpc=chain))
    document = report(evidence, out.line)
    found = [one for step in document["steps"] for one in step["findings"]]
    if found:
        more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
        error = TrainChainError(found[0]["code"], found[0]["message"] + more)
        out.error(error, **document)
        raise typer.Exit(error.exit_code)
    out.result("all of it holds", document)


@dataclass(frozen=True)
class Evidence:
    """All that a job's pay is recomputed from. The chain was read first and the hub's view on both sides of the
    contributions: the job may go on meanwhile, and what is settled by then must be among what is told."""

    recipe: ResolvedRecipe
    chain: Chain
    """Its `hub` is the job's on chain."""
    escrow: JobOnChain
    balance: Balance
    before: History
    rows: list[Accepted]
    after: History
    files: dict[int, Leaves | None]
    """By the settlement's number; None for one that cannot be had, which `lacking` tells of."""
    lacking: list[Finding]
    kept: list[Receipt]
    """Receipts of this home."""

    @property
    def hubs(self) -> set[str]:
        """Who was the job's hub at any time, in lower case."""
        return {hub.lower() for hub in self.balance.served(self.escrow.hub, self.escrow.grace)}


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


def gather(client: HubClient, job_id: str, kept: list[Receipt], *, rpc: str | None = None) -> Evidence:
    """Fetch what a job's pay is recomputed from. Raises TrainChainError: `chain.wrong`, `verify.chain` where the escrow
    does not hold this job, `session.required` for a private job's contributions, or what the hub says."""
    from trainchain.cli import delivery, wiring
    from trainchain.core.balance import balance
    from trainchain.core.history import read_history
    from trainchain.core.models import ResolvedRecipe, parse
    from trainchain.core.recount import CHAIN

    chain = wiring.chain_of(client, rpc)
    try:
        escrow = wiring.escrow_job(chain, job_id)
        log = balance(chain.events(job_id)) if escrow else None
    finally:
        chain.close()

    def look() -> dict[str, Any]:
        return client.get(f"/v1/jobs/{job_id}", signed=client.address is not None)

    view = look()
    if escrow is None or log is None:
        if view.get("state") == "unfunded":
            raise TrainChainError("job.unfunded", f"Job {job_id} was never funded: there is nothing to verify yet.")
        raise TrainChainError(CHAIN, f"The escrow {chain.escrow} has no job {job_id}, and the hub tells of one.")
    digest = escrow.spec_hash.removeprefix("0x")
    if (view.get("job"), view.get("spec_hash")) != (job_id, digest):
        told = str(view.get("spec_hash"))[:80]
        raise TrainChainError(CHAIN, f"Job {job_id} is in escrow under the recipe {digest}; the hub tells of {told}.")
    recipe = parse(ResolvedRecipe, client.object(digest), code="job.invalid", what=f"The recipe of {job_id}")
    before = read_history(view, recipe)
    rows = delivery.contributions(client, job_id, recipe)
    after = read_history(look(), recipe)
    read = delivery.chain_checks().leaves
    files = {one.number: _leaves(client, one.number, one.data_hash, read) for one in log.settlements}
    return Evidence(
        recipe=recipe,
        chain=delivery.chain_told(client).model_copy(update={"hub": escrow.hub}),
        escrow=escrow,
        balance=log,
        before=before,
        rows=rows,
        after=after,
        files={number: file for number, (file, _) in files.items()},
        lacking=[finding for _, finding in files.values() if finding is not None],
        kept=kept,
    )


def report(evidence: Evidence, say: Callable[[str], None]) -> dict[str, Any]:
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


def _recipe(evidence: Evidence) -> Step:
    chain = evidence.chain
    says = f"sha256 {evidence.recipe.spec_hash} stands in the escrow {chain.escrow} on chain {chain.chain_id}"
    return Step("recipe", says, [], ["the code there is that of TrainEscrow"])


def _contributions(evidence: Evidence) -> tuple[list[Earned], Step]:
    from trainchain.cli.delivery import chain_checks
    from trainchain.core.recount import earned

    args = (evidence.recipe, evidence.after.job, evidence.chain, evidence.rows, chain_checks().recover)
    rows, found = earned(*args, hubs=evidence.hubs)
    workers, total = len({row.worker for row in rows}), sum(row.amount for row in rows)
    says = f"{len(rows)} of {workers} workers, each with its receipt: {show(total)} TRAIN by the recipe's prices"
    return rows, Step("contributions", says, found)


def _verdicts(evidence: Evidence) -> Step:
    from trainchain.cli.delivery import chain_checks
    from trainchain.core.recount import promised, verdicts

    found = verdicts(evidence.before, evidence.rows, evidence.after)
    recover = chain_checks().recover
    found += promised(evidence.rows, evidence.kept, evidence.chain, recover, hubs=evidence.hubs)
    accepted = sum(len(row.accepted()) for row in evidence.after.rounds_done)
    mine = f"; {len(evidence.kept)} receipts of this home compared" if evidence.kept else ""
    return Step("verdicts", f"{accepted} accepted by the hub's view, {len(evidence.rows)} told of{mine}", found)


def _leaves_step(evidence: Evidence, rows: list[Earned], *, over: bool) -> Step:
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


def _roots(evidence: Evidence) -> Step:
    from trainchain.core.recount import OnChain, listed, roots

    settled = [OnChain(one.number, one.root, one.total) for one in evidence.balance.settlements]
    says = f"{len(settled)} on chain, {show(evidence.balance.total)} TRAIN settled by the last"
    found = roots(settled, evidence.files, cap=evidence.escrow.round_cap)
    return Step("roots", says, found + listed(evidence.after.settlements, evidence.balance.settlements))


def _money(evidence: Evidence, rows: list[Earned], *, over: bool) -> tuple[list[Line], Step]:
    from trainchain.core.recount import Sums, money, table

    log, escrow = evidence.balance, evidence.escrow
    last = next((evidence.files[one.number] for one in reversed(log.settlements)), None)
    lines = table(rows, last, log.paid, over=over)
    found = money(lines, log, Sums(escrow.funded, escrow.refunded, escrow.total, escrow.claimed))
    says = f"{show(log.claimed)} paid of {show(log.settled)} settled of {show(log.funded)} TRAIN funded"
    head = f"{'worker':<42} {'shards':>6}" + "".join(
        f" {name:>20}" for name in ("accepted", "vested", "settled", "paid")
    )
    shown = [
        f"{line.account:<42} {line.shards:>6}"
        + "".join(f" {show(amount):>20}" for amount in (line.accepted, line.vested, line.settled, line.paid))
        for line in lines
    ]
    return lines, Step("money", says, found, [head, *shown] if lines else [])


def _settlement(one: Settled, file: Leaves | None) -> dict[str, Any]:
    chain = {"number": one.number, "root": one.root, "total": str(one.total), "leaves": one.data_hash, "tx": one.tx}
    rule = {"ended": file.terms.ended, "limit": str(file.terms.limit)} if file else {"ended": None, "limit": None}
    return {**chain, **rule}


def _shown(line: Line) -> dict[str, Any]:
    amounts = {name: str(getattr(line, name)) for name in ("accepted", "vested", "settled", "paid")}
    return {"account": line.account, "shards": line.shards, **amounts}


def _leaves(
    client: HubClient, number: int, data_hash: str, read: Callable[[bytes], Leaves]
) -> tuple[Leaves | None, Finding | None]:
    """A settlement's leaves file, by the digest that stands on chain. A hub that is away is no finding."""
    from trainchain.core.recount import LEAVES, Finding

    digest = data_hash.removeprefix("0x")
    try:
        return read(client.object(digest)), None
    except TrainChainError as error:
        if error.exit_code == AWAY:
            raise
        says = f"The leaves file of settlement {number}, {digest} on chain, cannot be had: {error.message}"
        return None, Finding(LEAVES, says)


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
