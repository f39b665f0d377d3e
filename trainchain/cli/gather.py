"""Everything that a job's pay is recomputed from, fetched from its hub and the chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainchain.core.errors import TrainChainError

if TYPE_CHECKING:
    from trainchain.chain.records import JobOnChain
    from trainchain.core.balance import Balance
    from trainchain.core.client import HubClient
    from trainchain.core.evidence import Evidence
    from trainchain.core.history import Accepted, Chain, History, Receipt, ToldAudit
    from trainchain.core.models import ResolvedRecipe
    from trainchain.core.rechecks import Told
    from trainchain.core.recount import Finding, Leaves

AWAY = 3


@dataclass(frozen=True)
class Gathered:
    """All that a job's pay is recomputed from. The chain was read first and the hub's view on both sides of the
    contributions: the job may go on meanwhile, and what is settled by then must be among what is told."""

    recipe: ResolvedRecipe
    chain: Chain
    """Its `hub` is the job's on chain."""
    operators: list[str]
    """The wallets that the hub says it audits with."""
    escrow: JobOnChain
    balance: Balance
    before: History
    early: list[ToldAudit]
    rows: list[Accepted]
    audits: list[ToldAudit]
    """And `early` is of before the contributions."""
    documents: dict[str, Evidence | None]
    """By the contribution's lease, the evidence of every verdict; None where it cannot be had or read."""
    fetch: Callable[[str], bytes | None]
    """Any other object that is public, or this reader's to read."""
    after: History
    files: dict[int, Leaves | None]
    """By the settlement's number; None for one that cannot be had, which `lacking` tells of."""
    lacking: list[Finding]
    kept: list[Receipt]
    """Receipts of this home."""

    @property
    def told(self) -> Told:
        """What is told of the work, for checking its audits again."""
        from trainchain.core.rechecks import Told

        parts = (self.recipe, self.after.job, self.chain, self.hubs, self.before, self.rows, self.early, self.audits)
        return Told(*parts, operators={wallet.lower() for wallet in self.operators})

    @property
    def hubs(self) -> set[str]:
        """Who was the job's hub at any time, in lower case."""
        return {hub.lower() for hub in self.balance.served(self.escrow.hub, self.escrow.grace)}


def gather(client: HubClient, job_id: str, kept: list[Receipt], *, rpc: str | None = None) -> Gathered:
    """Fetch what a job's pay is recomputed from. Raises TrainChainError: `chain.wrong`, `verify.chain` where the escrow
    does not hold this job, `session.required` for a private job's contributions, or what the hub says."""
    from trainchain.cli import delivery, wiring
    from trainchain.core.balance import balance
    from trainchain.core.history import Operator, read_history
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
    early = audits(client, job_id, recipe)
    rows = delivery.contributions(client, job_id, recipe)
    found = audits(client, job_id, recipe)
    after = read_history(look(), recipe)
    read = delivery.chain_checks().leaves
    files = {one.number: _leaves(client, one.number, one.data_hash, read) for one in log.settlements}
    return Gathered(
        recipe=recipe,
        chain=delivery.chain_told(client).model_copy(update={"hub": escrow.hub}),
        operators=list(
            parse(Operator, client.info(), code="hub.not_a_hub", what="What the hub says of itself").auditors
        ),
        escrow=escrow,
        balance=log,
        before=before,
        early=early,
        rows=rows,
        audits=found,
        documents={audit.lease: _document(client, audit) for audit in found if audit.code is not None},
        fetch=lambda digest: _had(client, digest),
        after=after,
        files={number: file for number, (file, _) in files.items()},
        lacking=[finding for _, finding in files.values() if finding is not None],
        kept=kept,
    )


def audits(client: HubClient, job_id: str, recipe: ResolvedRecipe) -> list[ToldAudit]:
    """Every audit that the hub tells of."""
    from trainchain.core.history import Audits
    from trainchain.core.models import parse

    rows: list[ToldAudit] = []
    after: Any = 0
    while after is not None:
        page = client.get(f"/v1/jobs/{job_id}/audits", signed=client.address is not None, after=after)
        told = parse(Audits, page, code="hub.not_a_hub", what="What the hub says of the audits")
        rows += told.audits
        if len(rows) > recipe.rounds * recipe.all_shards:
            raise TrainChainError("hub.not_a_hub", f"The hub tells of more audits than job {job_id} has shards.")
        following = page.get("next") if told.audits else None
        after = following if type(following) is int and following > after else None
    return rows


def _document(client: HubClient, audit: ToldAudit) -> Evidence | None:
    from trainchain.core.evidence import Evidence
    from trainchain.core.models import parse

    data = _had(client, audit.evidence) if audit.evidence else None
    if data is None:
        return None
    try:
        return parse(Evidence, data, code="verify.evidence", what="The evidence")
    except TrainChainError:
        return None


def _had(client: HubClient, digest: str) -> bytes | None:
    """An object, None where it cannot be had. A hub that is away is no finding."""
    try:
        return client.object(digest)
    except TrainChainError as error:
        if error.exit_code == AWAY:
            raise
        return None


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
