"""Collecting money: a worker's rewards, an owner's unspent budget. Every proof is checked here first."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainchain.core.errors import TrainChainError

if TYPE_CHECKING:
    from trainchain.chain.escrow import ChainClient
    from trainchain.chain.wallet import Wallet
    from trainchain.core.client import HubClient
    from trainchain.core.settings import Settings


@dataclass(frozen=True)
class Due:
    """What one job's active settlement still owes a wallet."""

    job: str
    name: str
    round: int
    cumulative: int
    amount: int
    proof: list[str]


def known_jobs(client: HubClient, settings: Settings) -> list[str]:
    """Jobs this wallet has earned in: by the receipts on this disk and by the hub's word."""
    folder = settings.home / "receipts"
    here = {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()
    return sorted(here | {row["job"] for row in client.get("/v1/earned", signed=True)["jobs"]})


def due(
    client: HubClient, chain: ChainClient, wallet: Wallet, job_id: str, now: Callable[[], float] = time.time
) -> Due | None:
    """What the newest active settlement of a job owes this wallet; None where nothing is settled yet.

    The hub's leaves file must be the one whose root, total and digest stand on chain: `settlement.mismatch` if not.
    """
    from trainchain.chain.settlement import check_against_chain, proof_for

    # A hub's own chain makes a block only when somebody transacts: its time is the clock's, not the last block's.
    here = now() if client.info()["chain"]["embedded"] else chain.now()
    active = [one for one in chain.settlements(job_id) if one.active_at <= here]
    if not active:
        return None
    settled = active[-1]
    view = client.get(f"/v1/jobs/{job_id}")
    data = client.object(settled.data_hash.removeprefix("0x"))
    leaves = check_against_chain(data, settled)
    cumulative, proof = proof_for(leaves, wallet.address)
    left = chain.claimable(job_id, wallet.address, cumulative) if cumulative else 0
    return Due(job_id, view["name"], settled.round, cumulative, left, proof)


def claim_all(
    client: HubClient,
    chain: ChainClient,
    wallet: Wallet,
    jobs: list[str],
    *,
    dry_run: bool = False,
    now: Callable[[], float] = time.time,
) -> dict[str, Any]:
    """Claim what every job owes this wallet. Running it twice pays once."""
    found = [one for job in jobs if (one := due(client, chain, wallet, job, now)) is not None]
    if not dry_run and any(one.amount for one in found):
        _need_gas(client, chain, wallet)
    rows: list[dict[str, Any]] = []
    for one in found:
        paid = None
        if one.amount and not dry_run:
            paid = chain.claim(wallet, one.job, wallet.address, one.cumulative, one.proof)
        rows.append(
            {
                "job": one.job,
                "name": one.name,
                "through_round": one.round,
                "cumulative": str(one.cumulative),
                "claimable": str(one.amount),
                "claimed": str(paid.amount if paid else 0),
                "tx": paid.tx if paid else None,
            }
        )
    token = client.info()["chain"]["token"]
    return {
        "wallet": wallet.address,
        "claims": rows,
        "claimed": str(sum(int(row["claimed"]) for row in rows)),
        "balance": str(chain.token_balance(token, wallet.address)),
    }


def reclaim(client: HubClient, chain: ChainClient, wallet: Wallet, job_id: str) -> dict[str, Any]:
    """Give an owner back what a job never earned. Raises `money.too_early` until deadline and grace are over."""
    _need_gas(client, chain, wallet)
    paid = chain.reclaim(wallet, job_id)
    return {"job": job_id, "wallet": wallet.address, "refunded": str(paid.amount), "tx": paid.tx}


def _need_gas(client: HubClient, chain: ChainClient, wallet: Wallet) -> None:
    """On a hub's own chain gas is given away; elsewhere the wallet must hold some."""
    if chain.gas_balance(wallet.address) > 0:
        return
    if not client.info()["chain"]["embedded"]:
        raise TrainChainError(
            "money.insufficient", f"{wallet.address} has no gas to send a claim with.", hint="Send it a little first."
        )
    client.post("/v1/faucet")
