"""What a key has sent that nobody has seen the end of, on disk before it leaves, and the lock on the key's turn."""

import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from trainchain.chain.hexes import from_hex, keccak, to_hex
from trainchain.core.errors import TrainChainError
from trainchain.core.settings import sync_folder, write_private

_MOST = 16
"""Of one purpose. Each nonce that ends takes with it whatever was signed for it."""
_turns: defaultdict[tuple[int, str], threading.Lock] = defaultdict(threading.Lock)
_turns_lock = threading.Lock()


@dataclass(frozen=True)
class Sent:
    """A signed transaction on its way. `purpose` tells what it was for, whatever its gas and its nonce."""

    purpose: str
    nonce: int
    raw: str

    @property
    def hash(self) -> str:
        return to_hex(keccak(from_hex(self.raw)))


class Journal:
    """One key's unfinished transactions on one chain. Without a folder, as for a key in no file, nothing is kept."""

    def __init__(self, folder: Path | None, chain_id: int, address: str) -> None:
        self._key = chain_id, address
        self.path = None if folder is None else folder / f"{chain_id}-{address.lower()}.json"

    @contextmanager
    def turn(self, patience: float) -> Iterator[None]:
        """Held from the nonce to the receipt: what waits behind a transaction could not come into a block before it.

        Raises `chain.timeout` where another thread or process with the same key does not come to an end.
        """
        with _turns_lock:
            own = _turns[self._key]
        if not own.acquire(timeout=patience):
            raise self._busy()
        try:
            if self.path is None:
                yield
                return
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = FileLock(self.path.with_suffix(".lock"), timeout=patience, mode=0o600)
            try:
                lock.acquire()
            except Timeout:
                raise self._busy() from None
            try:
                yield
            finally:
                lock.release()
        finally:
            own.release()

    def find(self, purpose: str) -> list[Sent]:
        """What was sent for this purpose and not seen to end, the newest first; for none, nothing."""
        return [one for one in reversed(self._read()) if purpose and one.purpose == purpose]

    def add(self, sent: Sent) -> None:
        """On disk when this returns; only then may it be sent."""
        if sent.purpose:
            kept = self._read()
            # What is refused again and again pushes out neither another purpose's nor its own first, which may come.
            gone = [one for one in kept if one.purpose == sent.purpose][1 : 2 - _MOST]
            self._write([*(one for one in kept if one not in gone), sent])

    def drop(self, sent: Sent) -> None:
        """This one can never come into a block."""
        self._write([one for one in self._read() if one != sent])

    def end(self, nonce: int) -> None:
        """The receipt of this nonce was seen: no other transaction with it can come any more."""
        self._write([one for one in self._read() if one.nonce != nonce])

    def _read(self) -> list[Sent]:
        if self.path is None:
            return []
        try:
            found = json.loads(self.path.read_bytes())
            if not isinstance(found, list):
                raise TypeError("not a list")
            return [Sent(str(one["purpose"]), int(one["nonce"]), str(one["raw"])) for one in found]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError):
            raise TrainChainError(
                "chain.journal",
                f"{self.path} should hold the transactions that are under way, and cannot be read.",
                hint="Look at the wallet's newest transactions; then remove the file.",
            ) from None

    def _write(self, kept: list[Sent]) -> None:
        if self.path is None:
            return
        if kept:
            write_private(self.path, json.dumps([asdict(one) for one in kept]).encode())
        elif self.path.exists():
            self.path.unlink()
            sync_folder(self.path.parent)  # or it could come back, and pass for a payment that is still to come

    def _busy(self) -> TrainChainError:
        return TrainChainError(
            "chain.timeout",
            f"Another transaction of {self._key[1]} is under way and does not come to an end.",
            hint="Nothing was sent. Try again.",
        )
