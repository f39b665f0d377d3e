"""The leaves file of a settlement: who is owed how much, in bytes whose digest stands on chain. No web3."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from trainchain.chain.hexes import bytes32, checksum, is_address, to_hex
from trainchain.chain.merkle import MAX_AMOUNT, Tree
from trainchain.core.digests import canonical_json, sha256
from trainchain.core.errors import TrainChainError

FORMAT = "trainchain.leaves/2"
_AMOUNT = re.compile(r"[1-9]\d{0,38}")


class OnChain(Protocol):
    """What the chain says of one settlement; `records.Settled` does."""

    @property
    def job_id(self) -> str: ...
    @property
    def round(self) -> int: ...
    @property
    def root(self) -> str: ...
    @property
    def total(self) -> int: ...
    @property
    def data_hash(self) -> str: ...


@dataclass(frozen=True)
class Leaves:
    """A leaves file, read: cumulative amounts by checksummed address. `ended` and `limit` say by which rule they were
    added up (`core.rewards.Terms`)."""

    job_id: str
    round: int
    amounts: dict[str, int]
    ended: bool
    limit: int


@dataclass(frozen=True)
class Settlement:
    """What goes on chain for a leaves file; `data_hash` is the sha256 of its bytes. All hex with 0x."""

    root: str
    total: int
    data_hash: str


def leaves_file(
    job_id: str, round: int, amounts: Mapping[str, int], *, ended: bool = False, limit: int = MAX_AMOUNT
) -> bytes:
    """The one byte form of a settlement's cumulative amounts. Zero amounts are dropped."""
    tree = Tree({account: amount for account, amount in amounts.items() if amount != 0})
    return canonical_json(
        {
            "format": FORMAT,
            "job": to_hex(bytes32(job_id)),
            "round": round,
            "ended": ended,
            "limit": str(limit),
            "leaves": [[account, str(tree.amounts[account])] for account in sorted(tree.amounts)],
        }
    )


def read_leaves(data: bytes) -> Leaves:
    """Read a leaves file. Raises `settlement.mismatch` for any bytes that `leaves_file` would not have written."""
    try:
        found = json.loads(data)
        pairs = [(account, _amount(text)) for account, text in found["leaves"]]
        amounts = dict(pairs)
        leaves = Leaves(found["job"], found["round"], amounts, found["ended"], _amount(found["limit"]))
        if type(leaves.ended) is not bool:
            raise ValueError("ended is neither true nor false")
        if type(leaves.round) is not int or leaves.round < 0 or found["format"] != FORMAT:
            raise ValueError("not a leaves file of this format")
        if leaves_file(leaves.job_id, leaves.round, amounts, ended=leaves.ended, limit=leaves.limit) != data:
            raise ValueError("not in canonical form")
    except TrainChainError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise _mismatch(f"The leaves file cannot be read: {problem}.") from None
    return leaves


def settle_leaves(data: bytes) -> Settlement:
    """Root, total and digest of a leaves file."""
    tree = Tree(read_leaves(data).amounts)
    return Settlement(tree.root, tree.total, "0x" + sha256(data))


def proof_for(leaves: Leaves, account: str) -> tuple[int, list[str]]:
    """The account's cumulative amount and the proof of its leaf; (0, []) where it has none."""
    if not is_address(account) or checksum(account) not in leaves.amounts:
        return 0, []
    return leaves.amounts[checksum(account)], Tree(leaves.amounts).proof(account)


def check_against_chain(data: bytes, settled: OnChain) -> Leaves:
    """Check that a leaves file is the one that was settled. Raises `settlement.mismatch` naming what differs."""
    made, leaves = settle_leaves(data), read_leaves(data)
    pairs = {
        "job": (leaves.job_id, settled.job_id.lower()),
        "round": (leaves.round, settled.round),
        "digest": (made.data_hash, settled.data_hash.lower()),
        "total": (made.total, settled.total),
        "root": (made.root, settled.root.lower()),
    }
    for name, (here, there) in pairs.items():
        if here != there:
            raise _mismatch(f"The leaves file has the {name} {here}; the chain has {there}.")
    return leaves


def check_successor(before: Leaves, after: Leaves) -> None:
    """Check that no leaf fell: what the contract cannot see, and a watcher should. Raises `settlement.mismatch`."""
    for account, amount in before.amounts.items():
        left = after.amounts.get(account, 0)
        if left < amount:
            raise _mismatch(f"{account} had {amount} and is left with {left}.")


def _amount(text: str) -> int:
    if _AMOUNT.fullmatch(text) is None or int(text) > MAX_AMOUNT:
        raise ValueError("an amount is not a positive decimal number")
    return int(text)


def _mismatch(message: str) -> TrainChainError:
    return TrainChainError("settlement.mismatch", message)
