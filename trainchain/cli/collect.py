"""Collecting money: a worker's rewards over all hubs and jobs of a home, an owner's unspent budget.

What is owed is worked out from this disk and the chain; a hub that answers adds what it knows, and pays the gas.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from trainchain.cli.output import Output
from trainchain.cli.survey import Failure, Found, Source, Survey, survey
from trainchain.core.errors import TrainChainError
from trainchain.core.money import show

if TYPE_CHECKING:
    from trainchain.chain.collecting import Item, Relay
    from trainchain.chain.escrow import ChainClient
    from trainchain.chain.wallet import Wallet
    from trainchain.cli.survey import Dial
    from trainchain.core.client import HubClient
    from trainchain.core.settings import Settings

Document = dict[str, Any]


def claim_all(
    settings: Settings,
    out: Output,
    *,
    only: bool = True,
    job: str | None = None,
    dry_run: bool = False,
    own_gas: bool = False,
    to: str | None = None,
    vouchers: bool = False,
    now: Callable[[], float] = time.time,
    wallet: Wallet | None = None,
    dial: Dial | None = None,
) -> Document:
    """Take what every job owes this home's wallet. Running it twice, or twice at once, pays once.

    `failed` says what could not be done; raises it where nothing could be taken.
    """
    redeem = "asked for" if vouchers else ""
    with survey(settings, out, only=only, job=job, redeem=redeem, now=now, wallet=wallet, dial=dial) as known:
        return _claim(known, out, dry_run=dry_run, own_gas=own_gas or to is not None, to=to, now=now)


def exit_code(failed: Sequence[Document]) -> int:
    """Of a command that did what it could: a proof that does not hold weighs most."""
    from trainchain.core.errors import CODES

    codes = [CODES[one["code"]].exit_code for one in failed]
    return 4 if 4 in codes else next(iter(codes), 0)


def reclaim(client: HubClient, chain: ChainClient, wallet: Wallet, job_id: str) -> Document:
    """Give an owner back what a job never earned. Raises `money.too_early` until deadline and grace are over."""
    _need_gas(client, chain, wallet)
    paid = chain.reclaim(wallet, job_id)
    return {"job": job_id, "wallet": wallet.address, "refunded": str(paid.amount), "tx": paid.tx}


def _claim(
    known: Survey, out: Output, *, dry_run: bool, own_gas: bool, to: str | None, now: Callable[[], float]
) -> Document:
    rows, costs = [], []
    if to is not None and (
        left := sum(i.amount for one in known.found for i in one.standing.items if i.kind != "leaf")
    ):
        out.note(f"{show(left)} TRAIN stay: a voucher pays this wallet and no other address; claim without --to")
    for group in _groups(known.found, own_gas):
        paying = [(one, item) for one in group for item in one.standing.items if to is None or item.kind == "leaf"]
        relay = None if own_gas else _relay(group[0].source)
        outcomes: Sequence[Any] = [None] * len(paying)
        if paying and dry_run:
            costs.append(_cost(group[0].chain, known.wallet.address, [item for _, item in paying], relay))
        elif paying:
            outcomes = _send(group[0], known.wallet, [item for _, item in paying], relay, to, now)
        known.failures.extend(
            Failure(one.job, outcome)
            for (one, _), outcome in zip(paying, outcomes, strict=True)
            if isinstance(outcome, TrainChainError)
        )
        rows += [_row(one, item, outcome) for (one, item), outcome in zip(paying, outcomes, strict=True)]
        taken = {one.job for one, _ in paying}
        rows += [_row(one, None, None) for one in group if one.job not in taken and one.standing.round]
    if known.failures and not any(row["kind"] for row in rows):
        for failure in known.failures[1:]:
            out.note(f"error[{failure.error.code}] {failure.error.message}")
        raise known.failures[0].error
    return {
        "wallet": known.wallet.address,
        "to": to or known.wallet.address,
        "claims": rows,
        "jobs": [_explained(one) for one in known.found],
        "claimed": str(sum(int(row["claimed"]) for row in rows)),
        "claimable": str(sum(int(row["claimable"]) - int(row["claimed"]) for row in rows)),
        "costs": costs,
        "balance": _balance(known),
        "failed": [failure.document() for failure in known.failures],
    }


def _groups(found: list[Found], own_gas: bool) -> list[list[Found]]:
    """What can go in one transaction: of one escrow, and sent by one hub or by ourselves."""
    groups: dict[Any, list[Found]] = {}
    for one in found:
        by = one.source.url if one.source.relays and not own_gas else ""
        groups.setdefault((id(one.chain), by), []).append(one)
    return list(groups.values())


def _relay(source: Source) -> Relay | None:
    client = source.client
    if client is None or not source.relays:
        return None

    def relay(items: Sequence[Item]) -> str:
        leaves = [
            {"job": one.job_id, "account": one.account, "cumulative": str(one.cumulative), "proof": list(one.proof)}
            for one in items
        ]
        return str(client.post("/v1/claims", {"items": leaves}, signed=False).get("tx"))

    return relay


def _send(
    first: Found,
    wallet: Wallet,
    items: list[Item],
    relay: Relay | None,
    to: str | None,
    now: Callable[[], float],
) -> Sequence[Any]:
    from trainchain.chain.collecting import collect

    client = first.source.client
    if client is not None and (relay is None or any(item.kind == "voucher" for item in items)):
        try:
            _need_gas(client, first.chain, wallet)
        except TrainChainError as error:
            return [error] * len(items)
    return collect(first.chain, wallet, items, relay=relay, to=to, now=now)


def _cost(chain: ChainClient, account: str, items: list[Item], relay: Relay | None) -> Document:
    from trainchain.chain.collecting import cost

    own = [item for item in items if relay is None or item.kind == "voucher"]
    gas, coin = cost(chain, account, own) if own else (0, 0)
    return {"chain_id": chain.chain_id, "gas": gas, "coin": str(coin), "relayed": len(items) - len(own)}


def _row(one: Found, item: Item | None, outcome: Any) -> Document:
    standing = one.standing
    claimed = getattr(outcome, "amount", 0)
    return {
        "job": one.job,
        "name": one.name,
        "hub": one.source.url,
        "kind": item.kind if item else None,
        "through_round": item.round if item and item.kind == "leaf" else standing.round,
        "cumulative": str(item.cumulative if item else max(standing.leaf, standing.paid)),
        "claimable": str(item.amount if item else 0),
        "claimed": str(claimed),
        "tx": getattr(outcome, "tx", None),
        "from": item.why if item else None,
    }


def _explained(one: Found) -> Document:
    """What of a job's pay is not to be had yet, and why."""
    return {
        "job": one.job,
        "name": one.name,
        "hub": one.source.url,
        "answers": one.source.client is not None,
        "accepted": str(one.accepted),
        "vesting": str(one.vesting),
        "next_vests_after": one.next_vests_after,
        "waits": one.verdicts.waits,
        "unsettled": str(one.unsettled),
        "why": one.why,
    }


def _balance(known: Survey) -> str:
    """What the wallet holds of the tokens that it is paid in."""
    tokens: dict[tuple[int, str], ChainClient] = {}
    for one in known.found:
        tokens[one.chain.chain_id, one.standing.job.token] = one.chain
    for source in known.sources:
        if not tokens and source.client is not None:
            tokens[source.place.chain_id, source.place.token] = known.chain_of(source)
    return str(sum(chain.token_balance(token, known.wallet.address) for (_, token), chain in tokens.items()))


def _need_gas(client: HubClient, chain: ChainClient, wallet: Wallet) -> None:
    """On a hub's own chain gas is given away; elsewhere the wallet must hold some."""
    if chain.gas_balance(wallet.address) > 0:
        return
    if not client.info()["chain"].get("embedded"):
        raise TrainChainError(
            "money.insufficient", f"{wallet.address} has no gas to send a claim with.", hint="Send it a little first."
        )
    client.post("/v1/faucet")
