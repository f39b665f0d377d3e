"""One key in one file: a version 3 keystore, as other wallets read it. eth_account is imported late."""

import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from trainchain.chain import eip712
from trainchain.chain.hexes import bytes32
from trainchain.chain.recursion import restore_limit
from trainchain.chain.signin import text_digest
from trainchain.core.errors import TrainChainError
from trainchain.core.settings import sync_folder

# 16 MB and about 50 ms to open. The file's mode is the first guard; the password slows whoever got past it.
SCRYPT_N = 2**14
BACKUP_SCRYPT_N = 2**17
"""What leaves the machine has its password alone: 128 MB and half a second to open."""

_MOST_SCRYPT = 2**30
_MOST_PBKDF2 = 10**7
_MOST_DERIVED = 64
_MARK = "trainchain"
_RAW_KEY = re.compile(rb"\s*(?:0x)?([0-9a-fA-F]{64})\s*")

PUBLIC = frozenset(
    {
        "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266",
        "0x70997970C51812dc3A010C7d01b50e0d17dc79C8",
        "0x3C44CdDdB6a900fa2b585dd299e03d12FA4293BC",
        "0x90F79bf6EB2c4f870365E785982E1f101E93b906",
        "0x15d34AAf54267DB7D7c367839AAf71A00a2C6A65",
        "0x9965507D1a55bcC2695C58ba16FB37d819B0A4dc",
        "0x976EA74026E726554dB657fA54763abd0C3a0aa9",
        "0x14dC79964da2C08b23698B3D3cc7Ca32193d9955",
        "0x23618e81E3f5cdF7f54C3d65f7FBc0aBf5B21E8f",
        "0xa0Ee7A142d267C1f36714E4a8F75612F20a79720",
    }
)
"""Of the keys that every development node prints: what is sent there is anybody's."""


class Wallet:
    """An address that can sign. The key shows neither in repr, nor in a pickle, nor in an error.

    `notes` is the folder beside its file, where what it sends is written down first; None for a key in no file.
    `only_chain` is the one chain that an embedded chain's faucet signs for.
    """

    __slots__ = ("__secret", "address", "notes", "only_chain")

    def __init__(self, key: bytes | str, *, notes: Path | None = None, only_chain: int | None = None) -> None:
        from coincurve import PrivateKey

        self.__secret = key if isinstance(key, bytes) else bytes32(key)
        self.notes, self.only_chain = notes, only_chain
        public = PrivateKey(self.__secret).public_key.format(compressed=False)
        self.address = eip712.address_of(public)

    def __repr__(self) -> str:
        return f"Wallet({self.address})"

    def __reduce__(self) -> Any:
        raise TypeError("a wallet is not for pickling")

    def sign_digest(self, digest: bytes) -> str:
        return eip712.sign_digest(self.__secret, digest)

    def sign_typed(self, domain: eip712.Domain, type_name: str, message: dict[str, Any]) -> str:
        """Raises `chain.foreign_key` for a faucet's wallet and another chain than its own, as the next one does."""
        self._must_belong(domain.chain_id)
        return eip712.sign(domain, type_name, message, self)

    def sign_text(self, text: str) -> str:
        return self.sign_digest(text_digest(text))

    def sign_transaction(self, transaction: dict[str, Any]) -> bytes:
        """The raw bytes for `eth_sendRawTransaction`."""
        from eth_account import Account

        self._must_belong(transaction.get("chainId"))
        restore_limit()
        return bytes(Account.sign_transaction(transaction, self.__secret).raw_transaction)

    def keystore(self, password: str, *, scrypt_n: int = SCRYPT_N) -> dict[str, Any]:
        """The wallet as the JSON of a version 3 keystore. A faucet's names its chain, which other wallets pass over."""
        from eth_keyfile import create_keyfile_json

        restore_limit()
        made: dict[str, Any] = create_keyfile_json(self.__secret, password.encode(), kdf="scrypt", iterations=scrypt_n)
        return made if self.only_chain is None else {**made, _MARK: {"only_chain": self.only_chain}}

    def bound(self, chain_id: int) -> "Wallet":
        """The same key, for that chain only."""
        return Wallet(self.__secret, notes=self.notes, only_chain=chain_id)

    def save(self, path: Path, password: str, *, scrypt_n: int = SCRYPT_N) -> "Wallet":
        """Write the wallet to a new file and return it as it lies there. Raises `wallet.exists`."""
        if path.exists():
            raise _exists(path)
        _write(path, json.dumps(self.keystore(password, scrypt_n=scrypt_n)).encode())
        return Wallet(self.__secret, notes=_notes(path), only_chain=self.only_chain)

    def _must_belong(self, chain_id: int | None) -> None:
        if self.only_chain is not None and chain_id != self.only_chain:
            raise TrainChainError(
                "chain.foreign_key",
                f"{self.address} is the faucet of the embedded chain {self.only_chain}; it signs nothing for chain "
                f"{chain_id}.",
                hint="Use a wallet of your own: trainchain wallet new",
            )


def create(path: Path, password: str = "", *, key: bytes | None = None, only_chain: int | None = None) -> Wallet:
    """Make a wallet file, of a fresh key unless one is given. An unattended worker's has an empty password.

    Raises `wallet.exists` rather than overwrite anything.
    """
    return Wallet(key or secrets.token_bytes(32), only_chain=only_chain).save(path, password)


def open(path: Path, password: str = "") -> Wallet:
    """Read a wallet file. Raises `wallet.missing`, `wallet.unreadable` or `wallet.wrong_password`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise TrainChainError("wallet.missing", f"There is no wallet at {path}.") from None
    except OSError:
        raise _unreadable(str(path)) from None
    return unlock(data, password, str(path), notes=_notes(path))


def unlock(data: bytes, password: str, place: str, *, notes: Path | None = None) -> Wallet:
    """The wallet in a keystore's bytes, ours or another program's. Raises as `open` does, naming the `place`."""
    from eth_keyfile import decode_keyfile_json
    from eth_keyfile.keyfile import normalize_keys

    restore_limit()
    try:
        keystore = normalize_keys(json.loads(data))
        if keystore["version"] != 3 or not _affordable(keystore):
            raise _unreadable(place)
        key = bytes(decode_keyfile_json(keystore, password.encode()))
        mark = keystore.get(_MARK)
        wallet = Wallet(key.rjust(32, b"\0"), notes=notes, only_chain=mark and int(mark["only_chain"]))
        named = keystore.get("address")
    except TrainChainError:
        raise
    except Exception as problem:  # whatever a foreign file makes the library raise
        if "MAC mismatch" in str(problem):
            raise TrainChainError(
                "wallet.wrong_password", f"The password does not open the wallet at {place}."
            ) from None
        raise _unreadable(place) from None
    if named and str(named).lower().removeprefix("0x") != wallet.address.lower().removeprefix("0x"):
        raise TrainChainError("wallet.unreadable", f"The keystore at {place} names another address than its key's.")
    return wallet


def of_raw_key(data: bytes) -> Wallet | None:
    """The wallet of a private key in hex digits; None where the bytes are something else."""
    found = _RAW_KEY.fullmatch(data)
    if found is None:
        return None
    try:
        return Wallet(bytes.fromhex(found[1].decode()))
    except ValueError:
        raise TrainChainError("wallet.unreadable", "The 64 hex digits are not a private key: out of range.") from None


def load_or_create(path: Path, password: str = "", *, only_chain: int | None = None) -> Wallet:
    """Open the wallet at `path`, or make one there. Two processes that start at once get the same one."""
    if not path.exists():
        try:
            return create(path, password, only_chain=only_chain)
        except TrainChainError as problem:
            if problem.code != "wallet.exists":
                raise
    return open(path, password)


def _affordable(keystore: dict[str, Any]) -> bool:
    """Whether opening it takes less than a gigabyte and a minute: a file may be anybody's."""
    kdf = keystore["crypto"]["kdfparams"]
    scrypt = 128 * int(kdf.get("n", 0)) * int(kdf.get("r", 0)) * max(1, int(kdf.get("p", 1)))
    # Every 32 bytes of the derived key cost all the rounds again; no program asks for more.
    small = scrypt <= _MOST_SCRYPT and int(kdf.get("c", 0)) <= _MOST_PBKDF2
    return small and int(kdf["dklen"]) <= _MOST_DERIVED


def _notes(path: Path) -> Path:
    return path.parent / "sent"


def _write(path: Path, data: bytes) -> None:
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.chmod(0o700)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            # A link, unlike a rename, never replaces what another process put there meanwhile.
            os.link(draft, path)
        except FileExistsError:
            raise _exists(path) from None
        except OSError:
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def _exists(path: Path) -> TrainChainError:
    return TrainChainError("wallet.exists", f"There is already a wallet at {path}; it was left as it is.")


def _unreadable(place: str) -> TrainChainError:
    return TrainChainError("wallet.unreadable", f"The file at {place} is not a version 3 keystore.")
