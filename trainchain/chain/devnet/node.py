"""The embedded chain: an EVM over one SQLite file. One transaction is one block, sealed at once.

Any number of threads and processes may open the same file; whatever is killed, the file is a chain.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eth.db.atomic import AtomicDB
from eth.exceptions import HeaderNotFound
from eth.vm.spoof import SpoofTransaction
from eth_utils.exceptions import ValidationError

from trainchain.chain import wallet
from trainchain.chain.devnet import views
from trainchain.chain.devnet.engine import GAS_LIMIT, engine, write_genesis
from trainchain.chain.devnet.store import Store
from trainchain.chain.hexes import from_hex, to_hex
from trainchain.core.errors import TrainChainError

_SUPPLY = 10**27


class Refused(Exception):
    """A transaction that cannot enter a block."""


@dataclass(frozen=True)
class Outcome:
    """What a simulated call came to."""

    output: bytes
    failed: bool
    reverted: bool
    gas: int


class Devnet:
    """One chain file; made, with a random chain id and a funded faucet key, where it is not there yet."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, chain_id: int | None = None) -> None:
        self.path = path
        self._clock = clock
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._faucet_path = path.with_suffix(".faucet.json")
        self._store = Store(path)
        self._make_genesis(chain_id)
        with self._store.reading():
            self.chain_id = int(self._store.note("chain_id") or "0")
            self._faucet_address = self._store.note("faucet") or ""
        self._engine = engine(self.chain_id)
        self._chain: Any = None
        self._head = ""

    def close(self) -> None:
        self._store.close()

    def faucet(self) -> wallet.Wallet:
        """The wallet that the genesis block funded; it signs for this chain only. Raises `wallet.missing` where its
        file is lost."""
        found = wallet.open(self._faucet_path)
        if found.address != self._faucet_address:
            raise TrainChainError("wallet.missing", f"{self._faucet_path.name} is not the faucet of this chain.")
        return found.bound(self.chain_id)

    def now(self) -> int:
        """The chain's time: the clock plus what `advance` added."""
        with self._store.lock:
            return int(self._clock()) + int(self._store.note("offset") or "0")

    def advance(self, seconds: int) -> None:
        """Move the chain's time ahead, for good. For tests; no door leads here."""
        with self._store.writing():
            self._store.set_note("offset", str(int(self._store.note("offset") or "0") + seconds))

    def remember(self, **notes: str) -> None:
        """Keep something beside the chain, for whoever opens the file next."""
        with self._store.writing():
            for name, value in notes.items():
                self._store.set_note(f"note.{name}", value)

    def recall(self, name: str) -> str:
        """What was remembered under that name, or ""."""
        with self._store.lock:
            return self._store.note(f"note.{name}") or ""

    def send(self, raw: bytes, *, most_gas: int = GAS_LIMIT) -> str:
        """Seal a signed transaction into a block of its own and return its hash. Raises Refused.

        A transaction that is already in is answered with its hash, so a client may safely repeat itself.
        """
        try:
            with self._store.writing():
                return self._seal(raw, most_gas)
        except BaseException:
            with self._store.lock:
                self._chain = None
            raise

    def call(
        self,
        sender: bytes,
        to: bytes | None,
        data: bytes,
        value: int,
        gas: int,
        block: int | None = None,
    ) -> Outcome:
        """Run a message on the state after `block` (the newest by default) and forget it."""
        with self._store.reading():
            return self._simulate(sender, to, data, value, gas, block)

    def estimate(self, sender: bytes, to: bytes | None, data: bytes, value: int, limit: int) -> Outcome:
        """As `call`, with the gas that a transaction needs. What runs may need more than it uses in the end:
        refunds come last, and a callee gets 63/64 only. So the guess is tried, and raised until it does."""
        with self._store.reading():
            outcome = self._simulate(sender, to, data, value, limit, None)
            gas = outcome.gas
            while not outcome.failed and gas < limit:
                if not self._simulate(sender, to, data, value, gas, None).failed:
                    break
                gas = min(limit, gas + gas // 8)
            return Outcome(outcome.output, outcome.failed, outcome.reverted, gas)

    def account(self, address: bytes, block: int | None = None) -> tuple[int, int, bytes]:
        """Balance, nonce and code."""
        with self._store.reading():
            state = self._state(block)
            return state.get_balance(address), state.get_nonce(address), state.get_code(address)

    def storage(self, address: bytes, slot: int, block: int | None = None) -> int:
        with self._store.reading():
            value: int = self._state(block).get_storage(address, slot)
            return value

    def head(self) -> int:
        """The newest block's number."""
        with self._store.reading():
            number: int = self._open().get_canonical_head().block_number
            return number

    def base_fee(self) -> int:
        """What the next block will ask per gas."""
        with self._store.reading():
            fee: int = self._open().header.base_fee_per_gas
            return fee

    def block(self, key: int | str, *, full: bool) -> dict[str, Any] | None:
        """A block by number or hash, as JSON-RPC shows it; `full` has transactions, not their hashes."""
        with self._store.reading():
            chain = self._open()
            try:
                if isinstance(key, int):
                    header = chain.get_canonical_block_header_by_number(key)
                else:
                    header = chain.get_block_header_by_hash(from_hex(key, 32))
            except HeaderNotFound:
                return None
            return views.block(header, self._store.transactions_of(header.block_number), full=full)

    def transaction(self, tx_hash: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """A transaction and its receipt."""
        with self._store.reading():
            return self._store.transaction(tx_hash)

    def logs(
        self, first: int, last: int, addresses: list[str], topics: list[list[str]], limit: int
    ) -> list[dict[str, Any]]:
        with self._store.reading():
            return self._store.logs(first, last, addresses, topics, limit)

    def _make_genesis(self, chain_id: int | None) -> None:
        with self._store.lock:
            if self._store.note("chain_id") is not None:
                return
        # Random, so that two devnets never share a signature domain; 40 bits fit a JavaScript number. Processes that
        # start at once take the one that is in the faucet's file.
        key = wallet.load_or_create(self._faucet_path, only_chain=chain_id or 2**39 + secrets.randbelow(2**39))
        faucet, chosen = key.address, key.only_chain or chain_id or 2**39 + secrets.randbelow(2**39)
        with self._store.writing():
            if self._store.note("chain_id") is not None:
                return  # another process was first
            database, time = AtomicDB(self._store), int(self._clock())
            write_genesis(database, chosen, time=time, funded=from_hex(faucet), coins=_SUPPLY)
            self._store.set_note("chain_id", str(chosen))
            self._store.set_note("faucet", faucet)

    def _open(self) -> Any:
        """py-evm's chain at the file's head; made anew where another process has moved it."""
        head = self._store.note("head") or ""
        if self._chain is None or head != self._head:
            self._chain = self._engine(AtomicDB(self._store))
            self._head = head
        return self._chain

    def _time(self, parent: Any) -> int:
        stamp: int = parent.timestamp
        return max(stamp, self.now())

    def _state(self, block: int | None) -> Any:
        return self._vm(block).state

    def _vm(self, block: int | None) -> Any:
        """A machine for the block that would follow `block`, at no cost."""
        chain = self._open()
        if block is None:
            parent = chain.get_canonical_head()
            header = chain.create_header_from_parent(parent).copy(timestamp=self._time(parent))
        else:
            parent = chain.get_canonical_block_header_by_number(block)
            header = chain.create_header_from_parent(parent).copy(timestamp=parent.timestamp)
        return chain.get_vm(header.copy(base_fee_per_gas=0, gas_limit=GAS_LIMIT))

    def _simulate(
        self, sender: bytes, to: bytes | None, data: bytes, value: int, gas: int, block: int | None
    ) -> Outcome:
        vm = self._vm(block)
        if value > vm.state.get_balance(sender):
            raise Refused(f"insufficient funds for gas * price + value: address {to_hex(sender)}")
        nonce = vm.state.get_nonce(sender)
        unsigned = vm.create_unsigned_transaction(
            nonce=nonce, gas_price=0, gas=gas, to=to or b"", value=value, data=data
        )
        spoofed = SpoofTransaction(unsigned, from_=sender)
        try:
            computation = vm.state.apply_transaction(spoofed)
        except (ValidationError, RecursionError) as problem:
            raise Refused(_plainly(problem)) from None
        used = gas - computation.get_gas_remaining()
        return Outcome(
            output=computation.output,
            failed=computation.is_error,
            reverted=computation.is_error and not computation._error.burns_gas,
            gas=min(gas, used * 64 // 63 + 5_000),
        )

    def _seal(self, raw: bytes, most_gas: int) -> str:
        chain = self._open()
        parent = chain.get_canonical_head()
        # Left alone, py-evm would lower the gas limit a little with every block that is not full.
        chain.header = chain.header.copy(timestamp=self._time(parent), gas_limit=GAS_LIMIT)
        vm = chain.get_vm()
        try:
            tx = vm.get_transaction_builder().decode(raw)
            sender = tx.sender
        except Exception as problem:  # rlp, eth_keys and py-evm each have errors of their own for bad bytes
            raise Refused(f"not a signed transaction: {type(problem).__name__}") from None
        tx_hash = to_hex(tx.hash)
        if self._store.transaction(tx_hash) is not None:
            return tx_hash
        if tx.gas > most_gas:
            raise Refused(f"gas limit too high: {tx.gas}, at most {most_gas} is taken here")
        self._check(vm, tx, sender)
        try:
            result, receipts, computations = chain.mine_all([tx])
        except (ValidationError, RecursionError) as problem:  # contracts may call deeper than Python does
            raise Refused(_plainly(problem)) from None
        shown = views.transaction(tx, sender, result.imported_block.header)
        receipt = views.receipt(shown, receipts[0], computations[0], result.imported_block.header)
        self._store.add_transaction(shown, receipt)
        self._head = receipt["blockHash"]
        self._store.set_note("head", self._head)
        return tx_hash

    def _check(self, vm: Any, tx: Any, sender: bytes) -> None:
        # In the words that clients know from other nodes, where py-evm has its own.
        if tx.chain_id != self.chain_id:
            raise Refused(f"invalid chain id: the transaction is for {tx.chain_id}, this is {self.chain_id}")
        expected = vm.state.get_nonce(sender)
        if tx.nonce != expected:
            word = "low" if tx.nonce < expected else "high"
            raise Refused(f"nonce too {word}: address {to_hex(sender)}, tx: {tx.nonce} state: {expected}")
        kind = getattr(tx, "type_id", None) or 0
        if kind > 2:
            raise Refused(f"transaction type {kind} is not offered here")
        most = tx.gas * (tx.max_fee_per_gas if kind == 2 else tx.gas_price) + tx.value
        if vm.state.get_balance(sender) < most:
            raise Refused(f"insufficient funds for gas * price + value: address {to_hex(sender)}")


def _plainly(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300] or "the transaction is not valid"
