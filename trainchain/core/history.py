"""What a hub tells of a job, read strictly: no text of a stranger gets further than these fields.

Card and audit bundle of an adapter are made from it and from the resolved recipe. What the recipe pins (tokens,
rewards) is taken from there, never from the hub's word.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from trainchain.core.errors import TrainChainError
from trainchain.core.evidence import REJECTS, Code
from trainchain.core.messages import Contribution, SignedReplay
from trainchain.core.models import Address, Amount, Count, Digest, Hash32, Model, Positive, ResolvedRecipe, parse
from trainchain.core.rewards import shard_reward
from trainchain.core.verdicts import Role


class Told(Model):
    """As `Model`, but what a later hub says beyond it is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


State = Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]


class ToldVerdict(Told):
    """How the audit of a shard stands, and what it found."""

    state: State
    code: Code | None = None


class ToldShard(Told):
    shard: Count
    state: State
    worker: Address | None = None
    merged_in: Positive | None = None
    """The round whose merge takes an accepted one in: its own, or the next where it came late; None where none does."""
    audit: ToldVerdict | None = None
    forfeited: bool = False


class ToldRound(Told):
    round: Positive
    state: State
    start: Digest
    adapter: Digest | None
    outer_step: Digest | None = None
    merge_error: float | None
    opened: float = 0.0
    secret_hash: Hash32 | None = None
    secret_signature: Annotated[str, Field(max_length=200)] | None = None
    secret: Hash32 | None = None
    """What drew its audits, once nothing can be drawn with it any more."""
    shards: list[ToldShard]

    def accepted(self) -> list[ToldShard]:
        return [shard for shard in self.shards if shard.state == "accepted" and shard.worker is not None]


class ToldEvaluation(Told):
    """The held-out loss after `round`; round 0 is the base with the start adapter."""

    round: Count
    loss: float | None
    samples: list[str] | None = None


class ToldSettlement(Told):
    """What went on chain once all rounds through `round` were merged: cumulative amounts, their sum in `total`. After a
    job's end `round` goes on counting."""

    round: Count
    root: Hash32
    total: Amount
    leaves: Digest
    tx: Hash32


class History(Told):
    """A job as its hub shows it (`GET /v1/jobs/{id}`)."""

    job: Hash32
    owner: Address
    state: State
    spec_hash: Digest
    rounds_done: list[ToldRound]
    evaluations: list[ToldEvaluation]
    settlements: list[ToldSettlement]

    def merged(self) -> list[ToldRound]:
        """The rounds that have an adapter, in their order."""
        return sorted((row for row in self.rounds_done if row.adapter), key=lambda row: row.round)

    def through(self, round_: int) -> list[ToldRound]:
        """The rounds that an adapter of `round_` was made of."""
        return [row for row in self.merged() if row.round <= round_]

    def taken(self, round_: int) -> list[tuple[int, ToldShard]]:
        """What the merge of a round took in, each with the round that it was trained in."""
        every = ((row.round, shard) for row in self.rounds_done for shard in row.accepted())
        return [(trained, shard) for trained, shard in every if shard.merged_in == round_]

    def covered(self, round_: int) -> set[tuple[int, int]]:
        """Round and shard of all that is paid once a round is settled: what merges through it took in and, with the
        last round's settlement, what came too late for any."""
        taken = {(trained, shard.shard) for row in self.through(round_) for trained, shard in self.taken(row.round)}
        settled = max((row.round for row in self.settlements), default=0)
        rest = (row for row in self.rounds_done if row.round <= min(round_, settled))
        return taken | {(row.round, shard.shard) for row in rest for shard in row.accepted() if shard.merged_in is None}

    def verdicts(self, round_: int) -> Counter[str]:
        """How the audits of what an adapter was made of ended, by code; "" counts those that have not."""
        every = [shard for row in self.through(round_) for _, shard in self.taken(row.round)]
        return Counter(shard.audit.code or "" for shard in every if shard.audit is not None)

    def forfeited(self, recipe: ResolvedRecipe, round_: int) -> int:
        """Token units of what an adapter was made of, and is not paid."""
        every = [one for row in self.through(round_) for one in self.taken(row.round)]
        return sum(shard_reward(recipe, trained, shard.shard) for trained, shard in every if shard.forfeited)

    def loss(self, round_: int) -> float | None:
        """The held-out loss after a round, None where none was measured."""
        return next((row.loss for row in self.evaluations if row.round == round_), None)

    def settled(self, round_: int) -> list[ToldSettlement]:
        """The settlements up to a round and the next one after them, where there is one yet; of the last adapter all
        of them, since a job's end is settled in as many steps as the escrow's cap needs."""
        rows = sorted(self.settlements, key=lambda row: row.round)
        if round_ == max((row.round for row in self.merged()), default=0):
            return rows
        before = [row for row in rows if row.round <= round_]
        if before and before[-1].round == round_:
            return before
        return before + [row for row in rows if row.round > round_][:1]


class ToldDraw(Told):
    """That a contribution is audited, as its worker was told when it was accepted."""

    segment: Count
    at_risk: Positive


class Receipt(Told):
    """The hub's promise to pay, as it was signed; and as its worker keeps it, what was drawn, and the hash of the
    secret that drew."""

    jobId: Hash32
    round: Positive
    shard: Count
    lease: Hash32
    worker: Address
    deltaHash: Hash32
    amount: Amount
    place: Positive
    hub: Address
    chain_id: Positive
    escrow: Address
    signature: Annotated[str, Field(max_length=200)]
    draw: ToldDraw | None = None
    secret_hash: Hash32 | None = None
    secret_signature: Annotated[str, Field(max_length=200)] | None = None

    def fields(self) -> dict[str, Any]:
        """What the signature is over."""
        names = ("jobId", "round", "shard", "lease", "worker", "deltaHash", "amount", "place")
        return {name: getattr(self, name) for name in names}


class Accepted(Told):
    """One accepted contribution, as `GET /v1/jobs/{id}/contributions` tells of it."""

    contribution: Contribution
    signature: Annotated[str, Field(max_length=200)]
    losses: Annotated[list[float], Field(default_factory=list)]
    seconds: float = 0.0
    micro_tokens: Annotated[list[Positive], Field(default_factory=list)]
    receipt: Receipt
    accepted: float = 0.0
    merged_in: Positive | None = None
    resolved: Count | None = 0
    forfeited: Count | None = None

    @property
    def counted(self) -> int:
        """The round that it is settled with: whose merge took it in, or the last one where it came too late for any."""
        return self.merged_in or self.contribution.round

    @property
    def which(self) -> tuple[int, int]:
        """Round and shard."""
        return self.contribution.round, self.contribution.shard


class Contributions(Told):
    contributions: list[Accepted]


class ToldReplay(Told):
    """A replay that was handed out or, from `done` on, handed in; the last four as of a contribution. `signed` is told
    once the audit is decided; where it has passed, once the job is settled."""

    lease: Hash32
    auditor: Address
    role: Role | None = None
    signed: SignedReplay | None = None
    ringer: bool
    done: float | None
    fee: Amount
    place: Positive | None
    counted: Count | None
    forfeited: Count | None


class ToldAudit(Told):
    """An audit, as `GET /v1/jobs/{id}/audits` tells of it; `lease` is that of the contribution it is of."""

    lease: Hash32
    round: Positive
    shard: Count
    worker: Address
    segment: Count
    at_risk: Positive
    state: State
    code: Code | None
    evidence: Digest | None
    drawn: float
    decided: float | None
    replays: list[ToldReplay]

    @property
    def rejects(self) -> bool:
        return self.code in REJECTS


class Audits(Told):
    audits: list[ToldAudit]


@dataclass(frozen=True)
class Share:
    """What one worker brought to an adapter; `reward` is what of its pay is not forfeited."""

    worker: str
    accepted: int
    tokens: int
    reward: int


def shares(recipe: ResolvedRecipe, history: History, round_: int) -> list[Share]:
    """Each worker's part in the rounds through `round_`, in the order of addresses; tokens and rewards as pinned."""
    parts: dict[str, list[tuple[int, int]]] = {}
    for row in history.through(round_):
        for trained, shard in history.taken(row.round):
            tokens = recipe.counts[trained - 1][shard.shard].tokens
            reward = 0 if shard.forfeited else shard_reward(recipe, trained, shard.shard)
            parts.setdefault(str(shard.worker), []).append((tokens, reward))
    return [
        Share(worker, len(rows), sum(tokens for tokens, _ in rows), sum(reward for _, reward in rows))
        for worker, rows in sorted(parts.items(), key=lambda item: item[0].lower())
    ]


class Operator(Told):
    """The wallets with which whoever operates the hub audits (`GET /v1/hub`)."""

    auditors: list[Address] = Field(default_factory=list)


class Chain(Told):
    """Where the job's money stands: what signatures are bound to, and who signs for the hub (`GET /v1/hub`)."""

    chain_id: Positive
    escrow: Address
    hub: Address
    embedded: bool
    """Whether it is a chain of the hub's own."""


def read_history(document: Any, recipe: ResolvedRecipe) -> History:
    """A hub's view of the job of `recipe`. Raises `hub.not_a_hub` for what no hub says, or says of another job."""
    told = parse(History, document, code="hub.not_a_hub", what="What the hub says of the job")
    inside = all(
        row.round <= recipe.rounds and all(shard.shard < recipe.all_shards for shard in row.shards)
        for row in told.rounds_done
    )
    if told.spec_hash != recipe.spec_hash or not inside:
        raise TrainChainError("hub.not_a_hub", f"What the hub says of job {told.job} does not fit its recipe.")
    return told
