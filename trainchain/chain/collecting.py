"""Collecting a wallet's pay: what its jobs owe it and why not more, what taking it costs, and taking it.

Nothing here needs a hub: a leaf is proven from a leaves file that was kept, a voucher is the proof itself.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

from trainchain.chain import eip712
from trainchain.chain.escrow import ChainClient
from trainchain.chain.hexes import checksum
from trainchain.chain.records import ClaimItem, JobOnChain, Paid, Settled
from trainchain.chain.settlement import Leaves, check_against_chain, check_successor, proof_for, read_leaves
from trainchain.chain.transactions import telling
from trainchain.chain.wallet import Wallet
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.money import show
from trainchain.core.settings import write_private

MANY = 50
"""Leaves in one transaction; a hub relays no more at once."""
VOUCHER_GAS = 130_000
"""What a voucher costs at most, where it cannot be tried before the leaf of its job is paid."""
VALID_SECONDS = 3600
Bring = Callable[[str], bytes]
"""Bring an object by its digest, checked; raises where it cannot be had."""


class Mirror:
    """Leaves files on this disk, each checked against the chain when it was written: whoever has the newest one needs
    no hub to prove a leaf."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, job_id: str) -> dict[int, bytes]:
        """By settlement, the oldest first."""
        folder, found = self._folder / job_id, {}
        numbers = [int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()] if folder.is_dir() else []
        for number in sorted(numbers):
            with contextlib.suppress(FileNotFoundError):  # another process may have forgotten it meanwhile
                found[number] = (folder / f"{number}.json").read_bytes()
        return found

    def leaves(self, job_id: str) -> list[Leaves]:
        """As `read`; torn files are passed over."""
        found = []
        for data in self.read(job_id).values():
            try:
                found.append(read_leaves(data))
            except TrainChainError:
                continue
        return found

    def leaf(self, job_id: str, account: str) -> int:
        """The account's amount in the newest settlement here; 0 where there is none."""
        leaves = self.leaves(job_id)
        return leaves[-1].amounts.get(checksum(account), 0) if leaves else 0

    def update(self, chain: ChainClient, job_id: str, account: str, bring: Bring) -> None:
        """Copy the newest settlement, and the active one, where they are not here.

        Raises `settlement.mismatch` where a file is not the one on chain, or where somebody's leaf fell.
        """
        here = self.leaves(job_id)
        job = chain.job(job_id)
        if job.round == (here[-1].round if here else 0):
            return
        settlements = chain.settlements(job_id)
        for settled in [one for one in settlements if one.root == job.root][-1:] + settlements[-1:]:
            if any(leaves.round == settled.round for leaves in here):
                continue
            data = bring(settled.data_hash.removeprefix("0x"))
            leaves = check_against_chain(data, settled)
            write_private(self._folder / job_id / f"{settled.round}.json", data)
            before = [one for one in here if one.round < settled.round]
            here.append(leaves)
            if before:
                check_successor(before[-1], leaves)
        self._forget(job_id, account, keep={leaves.round for leaves in here[-2:]})

    def _forget(self, job_id: str, account: str, keep: set[int]) -> None:
        """The newest are enough, and the one that gave this account most: evidence where a later one gives less."""
        leaves = self.leaves(job_id)
        most = max(leaves, key=lambda one: (one.amounts.get(checksum(account), 0), one.round))
        for one in leaves:
            if one.round not in {*keep, most.round}:
                (self._folder / job_id / f"{one.round}.json").unlink(missing_ok=True)


@dataclass(frozen=True)
class Known:
    """What is here of one job: leaves files, and the hub's voucher: what it promises and its signature."""

    job_id: str
    leaves: Sequence[bytes] = ()
    voucher: tuple[int, str] | None = None


@dataclass(frozen=True)
class Item:
    """One thing that can be taken. `round` is the leaf's settlement; `why` says what it is taken from."""

    kind: Literal["leaf", "voucher"]
    job_id: str
    account: str
    cumulative: int
    amount: int
    why: str
    round: int = 0
    proof: tuple[str, ...] = ()
    signature: str = ""


@dataclass
class Standing:
    """How a wallet stands in a job: paid, its leaf in the active settlement and in one that waits, what its voucher
    promises. `why` says why that is not all to be had now; `doubt` what does not hold."""

    job: JobOnChain
    paid: int
    leaf: int = 0
    round: int = 0
    pending: int = 0
    promised: int = 0
    items: list[Item] = field(default_factory=list)
    why: str = ""
    doubt: TrainChainError | None = None

    @property
    def claimable(self) -> int:
        return sum(item.amount for item in self.items)


def plan(chain: ChainClient, account: str, known: Known, bring: Bring, *, now: float, redeem: str = "") -> Standing:
    """What a job owes the account: its leaf in the active settlement, and what its voucher promises beyond that.

    A voucher is left to the hub to settle, unless `redeem` says why not, no settlement can come any more, or the time
    for it runs out. Raises what the chain raises; what does not hold of the hub's word stands in `doubt`.
    """
    job = chain.job(known.job_id)
    found = Standing(job, chain.claimed_of(known.job_id, account))
    settlements = chain.settlements(known.job_id) if job.round else []
    try:
        redeem = _leaf(found, settlements, account, known, bring) or redeem
    except TrainChainError as error:
        found.doubt = error
        redeem = redeem or "the settlement's leaves file cannot be had"
    if known.voucher is not None:
        _voucher(chain, found, account, known.voucher, now, redeem)
    covered = bool(found.items) or (known.voucher is not None and known.voucher[0] <= found.paid)
    if found.doubt is not None and found.doubt.exit_code == 3 and covered:
        found.doubt = None  # no hub settles more than it has promised: where the voucher pays, no leaf is missed
    return found


def cost(chain: ChainClient, account: str, items: Sequence[Item]) -> tuple[int, int]:
    """The gas that taking these takes, and what that costs now in the chain's coin."""
    asked: list[tuple[Callable[[], int], int]] = []
    for part in _parts([item for item in items if item.kind == "leaf"]):
        asked.append((partial(chain.gas_of_claims, account, _claims(part)), 60_000 * len(part)))
    for item in items:
        if item.kind == "voucher":
            promise = (item.job_id, item.account, item.cumulative, item.signature)
            asked.append((partial(chain.gas_of_voucher, account, *promise), VOUCHER_GAS))
    gas = 0
    for estimate, otherwise in asked:
        try:
            gas += estimate()
        except TrainChainError as error:
            if error.code not in ("chain.reverted", "money.insufficient"):
                raise
            gas += otherwise
    with telling():
        return gas, gas * int(chain.w3.eth.gas_price)


Relay = Callable[[Sequence[Item]], str]
"""Have a hub send these leaves' claim with its own gas; returns the transaction. Raises where it does not."""
Outcome = Paid | TrainChainError


def collect(
    chain: ChainClient,
    wallet: Wallet,
    items: Sequence[Item],
    *,
    relay: Relay | None = None,
    to: str | None = None,
    now: Callable[[], float] = time.time,
) -> list[Outcome]:
    """Take them, in as few transactions as can be; what became of each. What was paid meanwhile counts 0.

    `relay` sends for us; where it cannot, and for vouchers, the wallet sends with its own gas. `to` is another
    address that leaves are paid to.
    """
    done: dict[int, Outcome] = {}
    places = [at for at, item in enumerate(items) if item.kind == "leaf"]
    for start in range(0, len(places), MANY) if to is None else ():
        part = places[start : start + MANY]
        for at, outcome in zip(part, _leaves(chain, wallet, [items[at] for at in part], relay), strict=True):
            done[at] = outcome
    for at, item in enumerate(items):
        if at not in done:
            done[at] = _one(chain, wallet, item, to, now)
    return [done[at] for at in range(len(items))]


def when(moment: float) -> str:
    """A time as people read it everywhere."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _leaf(found: Standing, settlements: Sequence[Settled], account: str, known: Known, bring: Bring) -> str:
    """Take in the account's leaf of the active settlement; returns why its voucher should be used, "" for no reason.

    What the chain says of its own time decides which settlement is active: its root is the one that counts now.
    """
    here = {"0x" + sha256(data): data for data in known.leaves}
    before = max((_amount_in(data, account) for data in known.leaves), default=0)
    active = [one for one in settlements if one.root == found.job.root]
    newest = settlements[-1] if settlements else None
    if newest is not None and active and newest.round != active[-1].round and newest.data_hash in here:
        found.pending = _amount_in(here[newest.data_hash], account)
    if not active:
        return ""
    settled = next((one for one in reversed(active) if one.data_hash in here), active[-1])
    data = here.get(settled.data_hash) or bring(settled.data_hash.removeprefix("0x"))
    leaves = check_against_chain(data, settled)
    found.leaf, proof = proof_for(leaves, account)
    found.round = settled.round
    if found.leaf > found.paid:
        why = f"settlement {settled.round}"
        amount = found.leaf - found.paid
        found.items.append(Item("leaf", known.job_id, account, found.leaf, amount, why, settled.round, tuple(proof)))
    if found.leaf < before:
        found.doubt = TrainChainError(
            "settlement.mismatch",
            f"Settlement {settled.round} of job {known.job_id} leaves {account} {show(found.leaf)} TRAIN; "
            f"an earlier one, kept on this disk, gave {show(before)}.",
            hint="Stop working for this hub, and keep the folder leaves/ of the home as evidence.",
        )
        return "the hub's settlement leaves less than an earlier one"
    return ""


def _voucher(
    chain: ChainClient, found: Standing, account: str, voucher: tuple[int, str], now: float, redeem: str
) -> None:
    cumulative, signature = voucher
    job, paid = found.job, max(found.leaf, found.paid)
    if cumulative <= paid:
        return
    fields = {"jobId": job.job_id, "account": account, "cumulative": cumulative}
    try:
        signer = eip712.recover(chain.domain, "Voucher", fields, signature)
    except TrainChainError:
        signer = ""
    if signer != checksum(job.hub):
        found.doubt = found.doubt or TrainChainError(
            "voucher.invalid",
            f"The voucher of job {job.job_id} on this disk is not signed by {job.hub}, whom the escrow pays through.",
            hint="Keep it. Where the job's owner has named another hub, that one must promise and settle anew.",
        )
        return
    found.promised, amount = cumulative, cumulative - paid
    if now > job.closes_after:
        found.why = f"the time to redeem vouchers ended {when(job.closes_after)}; what was not settled is lost"
        return
    if not redeem and job.halted:
        redeem = "the owner has halted the job, so no settlement comes any more"
    if not redeem and int(job.next_hub, 16):
        redeem = f"the owner has named another hub, and this one's vouchers end {when(job.next_hub_at)}"
    if not redeem and now > job.deadline + job.grace // 2:
        redeem = f"half of the grace time is over, and it ends {when(job.closes_after)}"
    if not redeem:
        found.why = (
            f"vested, not settled yet: the hub does that; --vouchers takes it now, until {when(job.closes_after)}"
        )
    elif amount > job.free:
        found.why = f"the escrow has {show(job.free)} left that is not settled; the voucher promises {show(amount)}"
    else:
        found.items.append(
            Item("voucher", job.job_id, account, cumulative, amount, f"voucher: {redeem}", signature=signature)
        )


def _amount_in(data: bytes, account: str) -> int:
    try:
        return read_leaves(data).amounts.get(checksum(account), 0)
    except TrainChainError:
        return 0


def _leaves(chain: ChainClient, wallet: Wallet, items: Sequence[Item], relay: Relay | None) -> list[Outcome]:
    """One transaction for all, by relay or with own gas."""
    if relay is not None:
        try:
            return _relayed(chain, items, relay(items))
        except TrainChainError as error:
            if error.code not in ("claim.not_relayed", "claim.nothing", "hub.unreachable", "hub.failed"):
                return [error] * len(items)
    found: list[Outcome] = [Paid(None, 0)] * len(items)
    unpaid = [at for at, one in enumerate(items) if chain.claimable(one.job_id, one.account, one.cumulative)]
    if len(unpaid) == 1:
        found[unpaid[0]] = _one(chain, wallet, items[unpaid[0]], None, time.time)
        return found
    leaves = _claims(items)
    try:
        tx, paid = chain.claim_many(wallet, [leaves[at] for at in unpaid])
        for at, amount in zip(unpaid, paid, strict=True):
            found[at] = Paid(tx, amount) if amount else _unpaid(chain, items[at], None)
    except TrainChainError as error:
        for at in unpaid:
            found[at] = error
    return found


def _relayed(chain: ChainClient, items: Sequence[Item], tx: str) -> list[Outcome]:
    """Not the hub's word but the chain's decides what was paid."""
    found: list[Outcome] = []
    for item in items:
        if chain.claimable(item.job_id, item.account, item.cumulative) == 0:
            found.append(Paid(tx, item.amount))
        else:
            found.append(
                TrainChainError(
                    "chain.timeout",
                    f"The hub says that it sent {tx}, but the chain does not show it as paid yet.",
                    hint="trainchain claim --own-gas  does not need the hub; repeating a claim is safe.",
                )
            )
    return found


def _one(chain: ChainClient, wallet: Wallet, item: Item, to: str | None, now: Callable[[], float]) -> Outcome:
    try:
        if item.kind == "voucher":
            return chain.redeem_voucher(wallet, item.job_id, item.account, item.cumulative, item.signature)
        if to is None:
            return chain.claim(wallet, item.job_id, item.account, item.cumulative, item.proof)
        message = {
            "jobId": item.job_id,
            "account": checksum(item.account),
            "to": checksum(to),
            "cumulative": item.cumulative,
            "tip": 0,
            "validUntil": int(max(now(), chain.now())) + VALID_SECONDS,
        }
        signature = wallet.sign_typed(chain.domain, "ClaimTo", message)
        return chain.claim_to(wallet, message, item.proof, signature)
    except TrainChainError as error:
        return _unpaid(chain, item, error)


def _unpaid(chain: ChainClient, item: Item, error: TrainChainError | None) -> Outcome:
    """Another one who claims for this wallet may have been faster: then there is nothing left, and nothing wrong."""
    if error is not None and error.code != "chain.reverted":
        return error
    if chain.claimable(item.job_id, item.account, item.cumulative) == 0:
        return Paid(None, 0)
    return error or TrainChainError("chain.reverted", f"The escrow did not pay the leaf of job {item.job_id}.")


def _parts(items: Sequence[Item]) -> list[Sequence[Item]]:
    return [items[start : start + MANY] for start in range(0, len(items), MANY)]


def _claims(items: Sequence[Item]) -> list[ClaimItem]:
    return [ClaimItem(one.job_id, one.account, one.cumulative, list(one.proof)) for one in items]
