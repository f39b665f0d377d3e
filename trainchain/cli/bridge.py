"""The chain as the hub sees it: the port of `core/hub/service.py`, filled from `trainchain.chain`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trainchain.cli.wiring import address_in, escrow_job
from trainchain.core.errors import TrainChainError

if TYPE_CHECKING:
    from pathlib import Path

    from trainchain.chain.escrow import ChainClient
    from trainchain.chain.records import Deployment
    from trainchain.chain.wallet import Wallet
    from trainchain.core.hub.service import Claim, EscrowJob, Settlement
    from trainchain.core.rewards import Terms

GAS = 10**18
LOW_GAS = 10**16
BATCH = 50


def open_hub_chain(
    url: str,
    escrow: str | None,
    token: str | None,
    public_url: str | None,
    home: Path,
    wallet: Wallet,
    *,
    relays: bool = False,
) -> HubChain:
    """Connect a hub to its chain. An embedded one is made, with token and escrow, where it is not there yet; there
    gas is free, and claims are always relayed."""
    from trainchain.chain import escrow as contract

    chain = contract.connect(url, home=home, escrow=escrow or "")
    faucet = chain.faucet()
    if faucet is not None:
        deployed = chain.deploy(faucet)
        if chain.gas_balance(wallet.address) < LOW_GAS:
            chain.transfer_gas(faucet, wallet.address, GAS)
        return HubChain(chain, wallet, deployed.token, "/chain", faucet)
    if not escrow or not token:
        found = _deployed(chain, escrow, home)
        if found is None:
            raise TrainChainError(
                "usage.flag",
                "A chain by URL needs --escrow and --token, where this home's wallet has deployed neither.",
                hint="trainchain chain deploy --rpc URL",
            )
        chain.escrow, token = found.escrow, token or found.token
    chain.check_code()
    parts = urlsplit(url)
    if public_url is None and (parts.path.strip("/") or parts.query or parts.username):
        raise TrainChainError(
            "usage.flag",
            "The chain's URL looks as if it carried a key; workers need one without.",
            hint="--public-chain URL names the RPC that workers and owners use",
        )
    return HubChain(chain, wallet, token, public_url or url, None, relays=relays)


def _deployed(chain: ChainClient, escrow: str | None, home: Path) -> Deployment | None:
    """What `chain deploy` put on the chain from this home; None where that is not all, or is another escrow."""
    deployer = address_in(home / "wallet.json")
    found = chain.deployed_by(deployer) if deployer else None
    if found is None or not (found.token and found.escrow) or (escrow or found.escrow).lower() != found.escrow.lower():
        return None
    return found


class HubChain:
    """One hub's account on one chain; see `trainchain.core.hub.service.Chain`."""

    def __init__(
        self,
        chain: ChainClient,
        wallet: Wallet,
        token: str,
        public_rpc: str,
        faucet: Wallet | None,
        *,
        relays: bool = False,
    ) -> None:
        self.chain_id = chain.chain_id
        self.escrow = chain.escrow
        self.token = token
        self.address = wallet.address
        self.relays = relays or faucet is not None
        self._chain = chain
        self._wallet = wallet
        self._public_rpc = public_rpc
        self._faucet = faucet
        self._rpc: Any = None
        if chain.node is not None:
            from trainchain.chain.devnet.node import Devnet
            from trainchain.chain.devnet.rpc import Rpc

            # A node of its own on the same file: a stranger's long call must not hold up the hub's own.
            self._rpc = Rpc(Devnet(chain.node.path), public=True)

    def describe(self) -> dict[str, Any]:
        return {
            "rpc": self._public_rpc,
            "chain_id": self.chain_id,
            "escrow": self.escrow,
            "token": self.token,
            "hub": self.address,
            "embedded": self._faucet is not None,
            "relays": self.relays,
        }

    def job_id(self, owner: str, salt: str) -> str:
        return self._chain.job_id(owner, salt)

    def job(self, job_id: str) -> EscrowJob | None:
        from trainchain.core.hub.service import EscrowJob

        found = escrow_job(self._chain, job_id)
        if found is None:
            return None
        return EscrowJob(
            owner=found.owner,
            token=found.token,
            hub=found.hub,
            deadline=found.deadline,
            grace=found.grace,
            activation_delay=found.activation_delay,
            round_cap=found.round_cap,
            spec_hash=found.spec_hash,
            funded=found.funded - found.refunded,
            free=found.free,
            advances=found.settled - found.total,
            round=found.round,
            pending_at=found.pending_at,
            halted=found.halted,
            next_hub=found.next_hub if int(found.next_hub, 16) and found.next_hub != found.hub else "",
        )

    def recover(self, kind: str, message: Mapping[str, Any], signature: str) -> str:
        from trainchain.chain import eip712

        return eip712.recover(self._chain.domain, kind, message, signature)

    def recover_sign_in(self, fields: Mapping[str, Any], signature: str) -> str:
        from trainchain.chain.signin import SignIn, recover_sign_in

        return recover_sign_in(SignIn(**fields), signature)

    def sign(self, kind: str, message: Mapping[str, Any]) -> str:
        from trainchain.chain import eip712

        return eip712.sign(self._chain.domain, kind, message, self._wallet)

    def settlement(self, job_id: str, terms: Terms, amounts: Mapping[str, int]) -> Settlement:
        from trainchain.chain.settlement import leaves_file, settle_leaves
        from trainchain.core.hub.service import Settlement

        leaves = leaves_file(job_id, terms.number, amounts, ended=terms.ended, limit=terms.limit)
        made = settle_leaves(leaves)
        return Settlement(made.root, made.total, leaves)

    def settle(self, job_id: str, number: int, leaves: bytes) -> str:
        from trainchain.chain.settlement import settle_leaves

        made = settle_leaves(leaves)
        return self._chain.settle(self._wallet, job_id, number, made.root, made.total, made.data_hash)

    def would_pay(self, claims: Sequence[Claim]) -> list[int]:
        from trainchain.chain.records import ClaimItem

        return self._chain.would_pay([ClaimItem(*one) for one in claims]) if claims else []

    def claim_many(self, claims: Sequence[Claim]) -> tuple[str | None, list[int]]:
        from trainchain.chain.records import ClaimItem

        return self._chain.claim_many(self._wallet, [ClaimItem(*one) for one in claims])

    def count_advances(self, job_id: str, leaves: bytes) -> str | None:
        from trainchain.chain.records import ClaimItem
        from trainchain.chain.settlement import proof_for, read_leaves

        read = read_leaves(leaves)
        advanced = sorted({one.account for one in self._chain.claims(job_id) if one.voucher} & set(read.amounts))
        due = [account for account in advanced if self._counts(job_id, account, read.amounts[account])]
        tx = None
        for first in range(0, len(due), BATCH):
            items = [ClaimItem(job_id, account, *proof_for(read, account)) for account in due[first : first + BATCH]]
            tx, _ = self._chain.claim_many(self._wallet, items)
        return tx

    def _counts(self, job_id: str, account: str, leaf: int) -> bool:
        """Whether this leaf holds anything that a voucher has paid; proving another one would only burn gas."""
        advanced = self._chain.advanced_of(job_id, account)
        return advanced > 0 and leaf > self._chain.claimed_of(job_id, account) - advanced

    def drip(self, address: str, tokens: int) -> dict[str, str]:
        if self._faucet is None:
            raise TrainChainError(
                "faucet.closed", "This hub settles on a chain of its own worth: nobody gives tokens away there."
            )
        sent = {}
        if self._chain.gas_balance(address) < LOW_GAS:
            sent["gas"] = self._chain.transfer_gas(self._faucet, address, GAS)
        if tokens:
            sent["tokens"] = self._chain.transfer_token(self._faucet, self.token, address, tokens)
        return sent

    def rpc(self, body: bytes) -> bytes:
        if self._rpc is None:
            raise TrainChainError("chain.denied", "This hub's chain has an RPC of its own.", hint=self._public_rpc)
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            raise TrainChainError("http.bad_request", "The request is not JSON.") from None
        return json.dumps(self._rpc.handle(request)).encode()
