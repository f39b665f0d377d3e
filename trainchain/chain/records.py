"""What goes into the escrow contract and comes out of it, as plain frozen records. Standard library only.

Hashes are 0x-hex, addresses checksummed, amounts in the token's units, times in seconds since 1970.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Deployment:
    """Where the two contracts of a chain are."""

    token: str
    escrow: str


@dataclass(frozen=True)
class JobParams:
    """The terms of a job. `salt` makes its id; the same owner and salt work once."""

    token: str
    hub: str
    deadline: int
    grace: int
    activation_delay: int
    round_cap: int
    spec_hash: str
    salt: str


@dataclass(frozen=True)
class JobOnChain:
    """A job as a call at this moment would find it. `settled` counts `total` and what vouchers advanced."""

    job_id: str
    owner: str
    token: str
    hub: str
    deadline: int
    grace: int
    activation_delay: int
    round_cap: int
    spec_hash: str
    funded: int
    refunded: int
    settled: int
    claimed: int
    total: int
    round: int
    root: str
    pending_root: str
    pending_at: int
    next_hub: str
    next_hub_at: int
    halted: bool

    @property
    def free(self) -> int:
        """What is neither settled nor given back."""
        return self.funded - self.refunded - self.settled

    @property
    def closes_after(self) -> int:
        """The last moment for settlements and vouchers; the owner reclaims strictly later."""
        return self.deadline + self.grace


class JobCreated(NamedTuple):
    job_id: str
    tx: str


class Paid(NamedTuple):
    """What a claim paid. No transaction was sent where `tx` is None."""

    tx: str | None
    amount: int


@dataclass(frozen=True)
class ClaimItem:
    job_id: str
    account: str
    cumulative: int
    proof: list[str]


@dataclass(frozen=True)
class Settled:
    """One settlement, from the contract's log."""

    job_id: str
    round: int
    root: str
    total: int
    data_hash: str
    active_at: int
    tx: str
    block: int


@dataclass(frozen=True)
class Claimed:
    """One payment, from the contract's log; `voucher` where a voucher and not a leaf paid it."""

    job_id: str
    account: str
    to: str
    amount: int
    cumulative: int
    voucher: bool
    tx: str
    block: int


@dataclass(frozen=True)
class Event:
    """One entry of the contract's log about a job: its arguments by their names in the contract, bytes as 0x-hex."""

    name: str
    args: dict[str, Any]
    tx: str
    block: int
