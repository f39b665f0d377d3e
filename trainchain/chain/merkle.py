"""OpenZeppelin's StandardMerkleTree of ["address", "uint256"]: hashed twice, sorted pairs. No web3."""

from collections.abc import Iterable, Mapping, Sequence

from trainchain.chain.hexes import checksum, from_hex, is_address, keccak, to_hex
from trainchain.core.errors import TrainChainError

MAX_AMOUNT = 2**128 - 1


def leaf(account: str, cumulative: int) -> bytes:
    """The hash of one entry. Hashed twice, so that 64 bytes of two inner nodes can never pose as a leaf."""
    word = bytes(12) + from_hex(account, 20) + cumulative.to_bytes(32, "big")
    return keccak(keccak(word))


def verify(root: str, account: str, cumulative: int, proof: Sequence[str]) -> bool:
    """Whether `proof` leads from the account's leaf to `root`. Malformed input is simply False."""
    try:
        node = leaf(account, cumulative)
        for sibling in proof:
            node = _pair(node, from_hex(sibling, 32))
        return node == from_hex(root, 32)
    except (ValueError, TypeError, AttributeError, OverflowError):
        return False


class Tree:
    """A tree over cumulative amounts by account.

    Accounts are checksummed. Raises `settlement.mismatch` for no entries, for an account that stands there
    twice (in any spelling), for an amount that is not positive or beyond uint128.
    """

    def __init__(self, amounts: Mapping[str, int] | Iterable[tuple[str, int]]) -> None:
        pairs = amounts.items() if isinstance(amounts, Mapping) else amounts
        self.amounts = _checked(pairs)
        hashed = sorted((leaf(account, amount), account) for account, amount in self.amounts.items())
        size = 2 * len(hashed) - 1
        self._nodes = [b""] * size
        self._places: dict[str, int] = {}
        for i, (node, account) in enumerate(hashed):
            self._nodes[size - 1 - i] = node
            self._places[account] = size - 1 - i
        for i in range(size - 1 - len(hashed), -1, -1):
            self._nodes[i] = _pair(self._nodes[2 * i + 1], self._nodes[2 * i + 2])

    @property
    def root(self) -> str:
        return to_hex(self._nodes[0])

    @property
    def total(self) -> int:
        return sum(self.amounts.values())

    def proof(self, account: str) -> list[str]:
        """The siblings from the account's leaf up. Raises `settlement.mismatch` where it has none."""
        place = self._places.get(checksum(account)) if is_address(account) else None
        if place is None:
            raise TrainChainError("settlement.mismatch", f"{account} has no leaf in this settlement.")
        path = []
        while place > 0:
            path.append(to_hex(self._nodes[place + 1 if place % 2 else place - 1]))
            place = (place - 1) // 2
        return path


def _pair(a: bytes, b: bytes) -> bytes:
    return keccak(a + b if a < b else b + a)


def _checked(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    amounts: dict[str, int] = {}
    for account, amount in pairs:
        if not is_address(account):
            raise _mismatch(f"{account!r} is not an address.")
        if type(amount) is not int or not 0 < amount <= MAX_AMOUNT:
            raise _mismatch(f"{account} has the amount {amount!r}; it must be from 1 to 2^128 - 1.")
        if checksum(account) in amounts:
            raise _mismatch(f"{account} stands there twice.")
        amounts[checksum(account)] = amount
    if not amounts:
        raise _mismatch("A settlement needs at least one leaf.")
    return amounts


def _mismatch(message: str) -> TrainChainError:
    return TrainChainError("settlement.mismatch", message)
