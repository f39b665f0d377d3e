"""Relayed claims: the hub pays the gas of a batch, and every leaf pays its own account, whoever asked."""

from typing import Annotated, Any

from pydantic import Field

from trainchain.core.errors import TrainChainError
from trainchain.core.hub.service import Claim, Hub
from trainchain.core.models import Address, Amount, Hash32, Model

MAX_ITEMS = 50
MAX_PROOF = 64
WAIT_SECONDS = 60.0
"""Between two relayed claims of an account: the gas is the operator's."""
MAX_AT_ONCE = 4
"""Each holds one of the hub's threads until its block comes: enough must be left for leases and contributions."""


class ClaimItem(Model):
    job: Hash32
    account: Address
    cumulative: Amount
    proof: Annotated[list[Hash32], Field(max_length=MAX_PROOF)]


class Claims(Model):
    items: Annotated[list[ClaimItem], Field(min_length=1, max_length=MAX_ITEMS)]


def relay(hub: Hub, asked: Claims) -> dict[str, Any]:
    """Send what of it pays as one transaction. Raises `claim.not_relayed`, `claim.too_often`, `claim.nothing`,
    `job.unknown`; nothing was sent then."""
    if not hub.chain.relays:
        raise TrainChainError("claim.not_relayed", "This hub sends nobody's claims.")
    for job in {item.job for item in asked.items}:
        hub.job(job)
    accounts = {item.account.lower() for item in asked.items}
    now = hub.clock()
    with hub.relay_lock:
        if hub.relaying >= MAX_AT_ONCE:
            raise TrainChainError(
                "claim.too_often", f"{hub.relaying} claims are on their way already.", hint="Try again in a minute."
            )
        hub.relayed = {who: at for who, at in hub.relayed.items() if now < at + WAIT_SECONDS}
        if early := accounts & set(hub.relayed):
            account = min(early)
            left = hub.relayed[account] + WAIT_SECONDS - now
            raise TrainChainError(
                "claim.too_often", f"A claim of {account} was sent a moment ago; the next one can be in {left:.0f} s."
            )
        hub.relayed |= dict.fromkeys(accounts, now)
        hub.relaying += 1
    try:
        tx, paid = hub.chain.claim_many([Claim(i.job, i.account, i.cumulative, i.proof) for i in asked.items])
        if tx is None:
            raise TrainChainError("claim.nothing", "None of these leaves pays anything: they are paid, or not valid.")
        # Whose leaf was not paid does not wait: else anybody could name it beside a leaf that is.
        accounts -= {item.account.lower() for item, amount in zip(asked.items, paid, strict=True) if amount}
    finally:
        with hub.relay_lock:
            hub.relaying -= 1
            for account in accounts:
                hub.relayed.pop(account, None)
    return {"tx": tx, "paid": [str(amount) for amount in paid]}
