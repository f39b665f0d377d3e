"""What travels between owner, hub, worker and auditor beside the recipe, as frozen and strict models."""

from typing import Annotated, Any, Literal

from pydantic import Field

from trainchain.core.models import Address, Amount, Count, Digest, Hash32, JobName, Model, Positive


class Lease(Model):
    """A hub's offer: what to train, to measure or to replay, from which start adapter. Everything in it becomes part
    of a path or of what is signed, so nothing in it is taken unparsed."""

    lease: Hash32
    kind: Literal["train", "evaluate", "replay"]
    job: Hash32
    name: JobName
    spec_hash: Digest
    round: Count
    shard: Count | None
    start: Digest
    before: Digest | None = None
    """What the last round started from, and"""
    outer_step: Digest | None = None
    """the encoded step from there to `start`, with the moments that training goes on with; None in the first round."""
    secret_hash: Hash32 | None = None
    """Of what draws the round's audits, and the hub's signature over it (EIP-712 `RoundSecret`); for `train` alone."""
    secret_signature: Annotated[str, Field(max_length=200)] | None = None
    target: Hash32 | None = None
    """For `replay` alone, as what follows: the lease of the contribution that is audited,"""
    segment: Count | None = None
    """which of its segments, from 0 on,"""
    micro_tokens: Positive | None = None
    """how its worker split it,"""
    state: Digest | None = None
    """and the object that it starts in; None for segment 0, which starts in the shard's own start."""
    expires_in: float


class Contribution(Model):
    """What one worker hands in for one leased shard: the EIP-712 fields, in their signed order.

    `startHash` and `deltaHash` are sha256 digests of safetensors bytes; `stateRoot` is the Merkle root of the
    shard's state leaves (`core/segments.py`).
    """

    jobId: Hash32
    round: Positive
    shard: Count
    lease: Hash32
    worker: Address
    startHash: Hash32
    deltaHash: Hash32
    stateRoot: Hash32
    encoding: Annotated[str, Field(max_length=16)]
    numericClass: Annotated[str, Field(max_length=200)]


class SignedContribution(Model):
    contribution: Contribution
    signature: Annotated[str, Field(max_length=200)]
    losses: Annotated[list[float], Field(max_length=64, default_factory=list)]
    """Training loss at the shard's first and last steps: shown, never trusted."""
    seconds: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    micro_tokens: Annotated[list[Positive], Field(max_length=100_000, default_factory=list)]
    """Per segment, how many tokens went through the model at once."""


class Draw(Model):
    """What the answer to a contribution says of its audit: the segment drawn, from 0 on, and the states that the hub
    wants by `answer_by`, by index: state i is the one after i segments."""

    segment: Count
    at_risk: Positive
    wants: Annotated[list[Count], Field(max_length=4)]
    answer_by: float


class Opening(Model):
    """A leaf of a shard's state tree with its way up to the signed root (core/segments.py)."""

    index: Count
    w: Hash32
    m: Hash32
    v: Hash32
    proof: Annotated[list[Hash32], Field(max_length=64)]


class Answer(Model):
    """What a worker opens to a draw: the leaves of the shard's start and end, and both of the drawn segment."""

    openings: Annotated[list[Opening], Field(min_length=2, max_length=4)]


class Replay(Model):
    """What an auditor got: the EIP-712 fields in their signed order. `lease` is the auditor's, `target` the
    contribution's; `startLeaf` and `endLeaf` are the leaves that what it trained from and what it got would have in
    the target's tree."""

    jobId: Hash32
    lease: Hash32
    target: Hash32
    segment: Count
    auditor: Address
    startLeaf: Hash32
    endLeaf: Hash32
    numericClass: Annotated[str, Field(max_length=200)]


class SignedReplay(Model):
    replay: Replay
    signature: Annotated[str, Field(max_length=200)]


class Voucher(Model):
    """The hub's cumulative promise: everything that has vested for the account in the job. The escrow pays it without
    the hub, until deadline and grace are over."""

    jobId: Hash32
    account: Address
    cumulative: Amount
    hub: Address
    chain_id: Positive
    escrow: Address
    signature: Annotated[str, Field(max_length=200)]

    def fields(self) -> dict[str, Any]:
        """What the signature is over."""
        return {"jobId": self.jobId, "account": self.account, "cumulative": self.cumulative}


class Lost(Model):
    """What a verdict cost a worker in a job: its places from the first to the last. `lease` is the one rejected."""

    first: Positive
    last: Positive
    lease: Hash32
    code: Annotated[str, Field(max_length=40)] | None
    evidence: Digest | None


class Verdicts(Model):
    """What a hub says of a worker's places in a job, `through` the last there is: the first that waits for a verdict,
    and what was forfeited."""

    through: Count = 0
    waits: Positive | None = None
    forfeited: Annotated[list[Lost], Field(max_length=10_000, default_factory=list)]

    def lost(self, place: int) -> Lost | None:
        return next((one for one in self.forfeited if one.first <= place <= one.last), None)
