"""The typed client of a chain: deploy, create a job, settle, claim, reclaim. Everything else asks for this."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from web3 import Web3
from web3.logs import DISCARD

from trainchain.chain.artifacts import load
from trainchain.chain.eip712 import Domain
from trainchain.chain.hexes import bytes32, checksum, from_hex, keccak, to_hex
from trainchain.chain.provider import EmbeddedProvider, HttpProvider, open_provider
from trainchain.chain.records import ClaimItem, Deployment, JobCreated, JobParams, Paid
from trainchain.chain.tokens import TokenClient, hash_of
from trainchain.chain.transactions import telling
from trainchain.chain.wallet import Wallet
from trainchain.core.errors import TrainChainError
from trainchain.core.money import show

SUPPLY = 10**9 * 10**18
_SCAN = 32


def connect(
    url: str,
    *,
    home: Path | None = None,
    timeout: float = 10.0,
    retries: int = 3,
    escrow: str = "",
    first_block: int = 0,
    patience: float = 120.0,
    sleep: Callable[[float], None] = time.sleep,
) -> "ChainClient":
    """Open a chain: `embedded:NAME` (the file HOME/chain/NAME.sqlite, made where it is not there) or an RPC's URL.

    Raises `chain.unknown`, `chain.unreachable` or `chain.wrong`. `patience` is how long a sent transaction may take.
    An embedded chain knows its escrow by itself once one was deployed.
    """
    provider = open_provider(url, home=home, timeout=timeout, retries=retries, sleep=sleep)
    return ChainClient(provider, escrow=escrow, first_block=first_block, patience=patience, sleep=sleep)


class ChainClient(TokenClient):
    """A chain and the escrow on it. Every method that changes something takes the wallet that signs and pays gas."""

    def __init__(
        self,
        provider: EmbeddedProvider | HttpProvider,
        *,
        escrow: str = "",
        first_block: int = 0,
        patience: float = 120.0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._provider = provider
        self.node = provider.node if isinstance(provider, EmbeddedProvider) else None
        self.token = ""
        if self.node is not None and not escrow:
            self.token, escrow = self.node.recall("token"), self.node.recall("escrow")
        # Without web3's middleware: no name service, and a block's odd extra data is the chain's own business.
        w3 = Web3(provider, middleware=[])
        super().__init__(w3, escrow=escrow, first_block=first_block, patience=patience, sleep=sleep, clock=clock)

    def now(self) -> int:
        """The chain's time: an embedded chain's clock, else the newest block's timestamp."""
        return self.node.now() if self.node is not None else super().now()

    def close(self) -> None:
        """Let go of the chain's file or connection."""
        self._provider.close()

    @property
    def domain(self) -> Domain:
        """Where the signatures for this escrow count."""
        return Domain(self.chain_id, self.escrow)

    def faucet(self) -> Wallet | None:
        """The embedded chain's own wallet; None on any other chain."""
        return self.node.faucet() if self.node is not None else None

    def deploy(self, wallet: Wallet, *, supply: int = SUPPLY) -> Deployment:
        """Put the token and the escrow on the chain, or find those that this wallet put there before, and use them.

        A token it finds or makes belongs to this wallet; jobs may pay in any other one too.
        """
        if self.node is not None and self.token and self._is("TrainEscrow", self.escrow):
            return Deployment(self.token, self.escrow)
        for name, arguments in (("TrainToken", [supply]), ("TrainEscrow", [])):
            if not self._made_by(wallet.address, name):
                artifact = load(name)
                factory = self.w3.eth.contract(abi=artifact.abi, bytecode=artifact.bytecode)
                self._sender.send(wallet, factory.constructor(*arguments))
        # Looked up again, so that two that deploy at once agree on the older ones.
        made = self.deployed_by(wallet.address)
        self.token, self.escrow = made.token, made.escrow
        if self.node is not None:
            self.node.remember(token=made.token, escrow=made.escrow)
        return made

    def deployed_by(self, address: str) -> Deployment:
        """What an account put on this chain with `deploy`; "" for what it did not."""
        return Deployment(self._made_by(address, "TrainToken"), self._made_by(address, "TrainEscrow"))

    def create_job(self, wallet: Wallet, params: JobParams, amount: int) -> JobCreated:
        """Open a job and pay `amount` into it: one transaction where the token has our permit, else two.

        Repeating it is safe: a job with this owner and salt that has the same terms is returned as it is.
        """
        known = self._same_job(wallet.address, params)
        if known is not None:
            return known
        args, contract = _packed(params), self._contract()
        permit = self._permission(wallet, params.token, amount)
        if permit is None:
            call = contract.functions.createJob(args, amount)
        else:
            call = contract.functions.createJobWithPermit(args, amount, *permit)
        receipt = self._sender.send(wallet, call)
        made = self._events(receipt, "JobCreated")[0]
        return JobCreated(to_hex(bytes(made["jobId"])), hash_of(receipt))

    def fund(self, wallet: Wallet, job_id: str, amount: int) -> str:
        """Pay more into a job. Every call pays, but one that finishes a call whose answer was lost."""
        contract = self._contract()
        call = contract.functions.fund(bytes32(job_id), amount)
        again = self._sender.again(wallet, call)
        if again is not None:
            return hash_of(again)
        permit = self._permission(wallet, self.job(job_id).token, amount)
        if permit is not None:
            call = contract.functions.fundWithPermit(bytes32(job_id), amount, *permit)
        return self._send(wallet, call)

    def settle(
        self,
        wallet: Wallet,
        job_id: str,
        round: int,
        root: str,
        total: int,
        data_hash: str,
        *,
        hub_signature: str | None = None,
    ) -> str:
        """Put a round's root on chain, as the job's hub or with its Settlement signature; returns the transaction.

        Repeating it is safe: the transaction that settled the same before is returned. Raises `settlement.mismatch`
        where this round was settled otherwise.
        """
        if self.job(job_id).round >= round:
            earlier = [one for one in self.settlements(job_id) if one.round == round]
            if earlier and (earlier[0].root, earlier[0].total) == (to_hex(bytes32(root)), total):
                return earlier[0].tx
            if earlier:
                raise TrainChainError(
                    "settlement.mismatch",
                    f"Round {round} is settled with total {show(earlier[0].total)} and another root.",
                )
        args = (bytes32(job_id), round, bytes32(root), total, bytes32(data_hash))
        contract = self._contract()
        if hub_signature is None:
            call = contract.functions.settle(*args)
        else:
            call = contract.functions.settleWithSignature(*args, from_hex(hub_signature))
        return self._send(wallet, call)

    def claim(self, wallet: Wallet, job_id: str, account: str, cumulative: int, proof: Sequence[str]) -> Paid:
        """Have the account's leaf paid to it. Nothing is sent where there is nothing left to pay."""
        if self.claimable(job_id, account, cumulative) == 0:
            return Paid(None, 0)
        return self.count_leaf(wallet, job_id, account, cumulative, proof)

    def count_leaf(self, wallet: Wallet, job_id: str, account: str, cumulative: int, proof: Sequence[str]) -> Paid:
        """As `claim`, also where only a voucher's advance is left to count: that frees what is reserved twice."""
        call = self._contract().functions.claim(
            bytes32(job_id), checksum(account), cumulative, [bytes32(node) for node in proof]
        )
        return self._paid(self._sender.send(wallet, call), "Claimed")

    def claim_many(self, wallet: Wallet, items: Sequence[ClaimItem]) -> tuple[str | None, list[int]]:
        """Have many leaves paid in one transaction, each to its account; one that cannot be paid counts 0."""
        if not items:
            return None, []
        packed = _items(items)
        receipt = self._sender.send(wallet, self._contract().functions.claimMany(packed))
        paid = {
            (bytes(log["jobId"]), log["account"], log["cumulative"]): int(log["amount"])
            for log in self._events(receipt, "Claimed")
        }
        return hash_of(receipt), [paid.pop(item[:3], 0) for item in packed]

    def would_pay(self, items: Sequence[ClaimItem]) -> list[int]:
        """What each item of `claim_many` would be paid at this moment; nothing is sent."""
        with telling():
            return [int(amount) for amount in self._contract().functions.claimMany(_items(items)).call()]

    def gas_of_claims(self, sender: str, items: Sequence[ClaimItem]) -> int:
        """The gas that `claim_many` would take now."""
        return self._gas(sender, self._contract().functions.claimMany(_items(items)))

    def claim_to(self, wallet: Wallet, message: dict[str, Any], proof: Sequence[str], signature: str) -> Paid:
        """Have a leaf paid to another address. `message` is the ClaimTo that the account signed."""
        fields = ("jobId", "account", "to", "cumulative", "tip", "validUntil")
        values = [bytes32(message[name]) if name == "jobId" else message[name] for name in fields]
        nodes = [bytes32(node) for node in proof]
        call = self._contract().functions.claimTo(tuple(values), nodes, from_hex(signature))
        return self._paid(self._sender.send(wallet, call), "Claimed")

    def redeem_voucher(self, wallet: Wallet, job_id: str, account: str, cumulative: int, hub_signature: str) -> Paid:
        """Have the hub's promise paid. Claim what a settled leaf holds first."""
        if self.claimable(job_id, account, cumulative) == 0:
            return Paid(None, 0)
        call = self._redemption(job_id, account, cumulative, hub_signature)
        return self._paid(self._sender.send(wallet, call), "VoucherRedeemed")

    def gas_of_voucher(self, sender: str, job_id: str, account: str, cumulative: int, hub_signature: str) -> int:
        """The gas that `redeem_voucher` would take now."""
        return self._gas(sender, self._redemption(job_id, account, cumulative, hub_signature))

    def halt(self, wallet: Wallet, job_id: str) -> str:
        """Take no new settlement. Irrevocable; what is settled stays claimable."""
        return self._send(wallet, self._contract().functions.halt(bytes32(job_id)))

    def close_early(self, wallet: Wallet, job_id: str, other_signature: str) -> str:
        """Set the deadline to now, as owner or hub, with the other's CloseEarly signature."""
        call = self._contract().functions.closeEarly(bytes32(job_id), from_hex(other_signature))
        return self._send(wallet, call)

    def propose_hub(self, wallet: Wallet, job_id: str, hub: str) -> str:
        """Name another hub; it takes over after the job's grace time."""
        call = self._contract().functions.proposeHub(bytes32(job_id), checksum(hub))
        return self._send(wallet, call)

    def reclaim(self, wallet: Wallet, job_id: str) -> Paid:
        """Take back what was never settled. Raises `money.too_early` up to deadline + grace."""
        job = self.job(job_id)
        if job.free == 0:
            return Paid(None, 0)
        call = self._contract().functions.reclaim(bytes32(job_id))
        try:
            return self._paid(self._sender.send(wallet, call), "Reclaimed")
        except TrainChainError as problem:
            # The contract is asked, because only it knows the time of the block that this would be in.
            if "TooEarly(" not in problem.message:
                raise
        raise TrainChainError(
            "money.too_early",
            f"The budget can be reclaimed when the grace time is over, after {job.closes_after} s since 1970.",
            opens_after=job.closes_after,
        )

    def _same_job(self, owner: str, params: JobParams) -> JobCreated | None:
        job_id = self.job_id(owner, params.salt)
        try:
            job = self.job(job_id)
        except TrainChainError as problem:
            if problem.code == "chain.reverted":
                return None
            raise
        wanted = (checksum(params.token), checksum(params.hub), params.deadline, to_hex(bytes32(params.spec_hash)))
        if (job.token, job.hub, job.deadline, job.spec_hash) != wanted:
            return None  # the contract will refuse it, and say why
        logs = self._logs("JobCreated", job_id)
        return JobCreated(job_id, to_hex(bytes(logs[0]["transactionHash"]))) if logs else None

    def _made_by(self, deployer: str, name: str) -> str:
        """The oldest contract of that name among the wallet's first transactions and its last; "" for none."""
        with telling():
            count = self.w3.eth.get_transaction_count(checksum(deployer))
        for nonce in sorted({*range(min(count, _SCAN)), *range(max(0, count - _SCAN), count)}):
            address = _place(deployer, nonce)
            if self._is(name, address):
                return address
        return ""

    def _redemption(self, job_id: str, account: str, cumulative: int, hub_signature: str) -> Any:
        return self._contract().functions.redeemVoucher(
            bytes32(job_id), checksum(account), cumulative, from_hex(hub_signature)
        )

    def _gas(self, sender: str, call: Any) -> int:
        with telling():
            return int(call.estimate_gas({"from": checksum(sender)}))

    def _events(self, receipt: Any, event: str) -> list[Any]:
        found = self._contract().events[event]().process_receipt(receipt, errors=DISCARD)
        return [log["args"] for log in found if log["address"] == checksum(self.escrow)]

    def _paid(self, receipt: Any, event: str) -> Paid:
        return Paid(hash_of(receipt), sum(args["amount"] for args in self._events(receipt, event)))


def _items(items: Sequence[ClaimItem]) -> list[tuple[bytes, str, int, list[bytes]]]:
    return [
        (bytes32(one.job_id), checksum(one.account), one.cumulative, [bytes32(node) for node in one.proof])
        for one in items
    ]


def _place(deployer: str, nonce: int) -> str:
    """CREATE's address: the hash of the RLP of [deployer, nonce]."""
    number = nonce.to_bytes((nonce.bit_length() + 7) // 8, "big")
    written = number if 0 < nonce < 128 else bytes([128 + len(number)]) + number
    body = b"\x94" + from_hex(deployer, 20) + written
    return checksum(to_hex(keccak(bytes([192 + len(body)]) + body)[12:]))


def _packed(params: JobParams) -> tuple[Any, ...]:
    return (
        checksum(params.token),
        checksum(params.hub),
        params.deadline,
        params.grace,
        params.activation_delay,
        params.round_cap,
        bytes32(params.spec_hash),
        bytes32(params.salt),
    )
