"""Relayed claims: the hub pays the gas of a batch, and every leaf pays its own account, whoever asked."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from sqlalchemy import func, select

from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema
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
    `job.unknown`; nothing was sent then.

    Only those who pay wait: whoever names another's account does not keep it from being paid.
    """
    if not hub.chain.relays:
        raise TrainChainError("claim.not_relayed", "This hub sends nobody's claims.")
    for job in {item.job for item in asked.items}:
        hub.job(job)
    claims = [Claim(item.job, item.account, item.cumulative, item.proof) for item in asked.items]
    _insist_waited(hub, claims)
    earned = _earned(hub, claims)
    claims = [claim for claim in claims if (claim.job, claim.account.lower()) in earned]
    paying = [claim for claim, pays in zip(claims, hub.chain.would_pay(claims), strict=True) if pays]
    if not paying:
        raise TrainChainError("claim.nothing", "None of these leaves pays anything: they are paid, or not valid.")
    _insist_waited(hub, paying, mark=True)
    unpaid = {claim.account.lower() for claim in paying}
    try:
        tx, amounts = hub.chain.claim_many(paying)
        unpaid -= {claim.account.lower() for claim, amount in zip(paying, amounts, strict=True) if amount}
    finally:
        with hub.relay_lock:
            hub.relaying -= 1
            for account in unpaid:
                hub.relayed.pop(account, None)
    paid = {(claim.job, claim.account, claim.cumulative): pay for claim, pay in zip(paying, amounts, strict=True)}
    return {"tx": tx, "paid": [str(paid.pop((i.job, i.account, i.cumulative), 0)) for i in asked.items]}


def _earned(hub: Hub, claims: Sequence[Claim]) -> set[tuple[str, str]]:
    """Of which jobs and accounts this hub ever accepted work. Anybody may publish a job, and settle leaves without end
    in an escrow of their own: it is not for this hub to pay their gas."""
    named, accounts = {claim.job for claim in claims}, {claim.account.lower() for claim in claims}
    found = set()
    with hub.store.read() as db:
        for table, who in ((schema.contributions, "worker"), (schema.replays, "auditor")):
            query = (
                select(table.c.job, table.c[who]).distinct().where(table.c.job.in_(named), table.c.place.is_not(None))
            )
            rows = db.execute(query.where(func.lower(table.c[who]).in_(accounts)))
            found |= {(job, wallet.lower()) for job, wallet in rows}
    return found


def _insist_waited(hub: Hub, claims: Sequence[Claim], *, mark: bool = False) -> None:
    """Raises `claim.too_often`; with `mark` one more is on its way, and the wait begins anew."""
    accounts, now = {claim.account.lower() for claim in claims}, hub.clock()
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
        if mark:
            hub.relayed |= dict.fromkeys(accounts, now)
            hub.relaying += 1
