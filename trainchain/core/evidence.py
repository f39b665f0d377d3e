"""The evidence document: why a contribution was rejected, or passed, in full. Anyone can check it again from objects
that everybody may read; of a private job its owner and its workers can."""

from typing import Annotated, Literal

from pydantic import Field

from trainchain.core.messages import Contribution, Opening, SignedReplay
from trainchain.core.models import Address, Amount, Count, Digest, Hash32, Model, Positive
from trainchain.core.verdicts import Role

Code = Literal[
    "audit.passed",
    "audit.unaudited",
    "audit.undecided",
    "audit.silent",
    "audit.wrong_start",
    "audit.wrong_delta",
    "audit.impossible",
    "audit.differs",
]
"""What was found; the last five reject."""
REJECTS = frozenset({"audit.silent", "audit.wrong_start", "audit.wrong_delta", "audit.impossible", "audit.differs"})


class Measured(Model):
    """Distances as in core/replays.py, or the tolerance of each; None where there is no bound."""

    gradients: float
    squares: float
    delta: float
    length: float
    furthest: float | None = None


class ReplayEvidence(Model):
    """One replay as it was signed; `state` is the object it got, None where its leaf was the claimed one. `distances`
    are from the claim."""

    signed: SignedReplay
    role: Role
    same_class: bool
    equal: bool
    within: bool | None
    state: Digest | None
    distances: Measured | None


class Forfeit(Model):
    """What a rejection costs: the worker's places in the job that had not vested, from the first to the last."""

    first: Positive
    last: Positive
    amount: Amount


class Evidence(Model):
    format: Literal["trainchain.evidence/1"]
    code: Code
    says: Annotated[str, Field(max_length=1000)]
    """The same in a sentence."""
    contribution: Contribution
    signature: Annotated[str, Field(max_length=200)]
    place: Positive
    at_risk: Positive
    secret_hash: Hash32
    segment: Count
    micro_tokens: Positive
    """Of the segment, as the worker said."""
    openings: list[Opening]
    expected: Digest | Hash32 | None = None
    """What should have been opened or contributed: the start's leaf for `audit.wrong_start`, the delta's digest for
    `audit.wrong_delta`."""
    found: Digest | Hash32 | None = None
    """What was, instead."""
    states: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Digest]
    """The worker's states that were handed in, by index; objects that are kept where they reject."""
    cold: bool | None
    tolerance: Measured | None
    replays: list[ReplayEvidence]
    forfeits: Forfeit | None
    drawn: float
    decided: float
    """Unix times."""
    worker: Address
