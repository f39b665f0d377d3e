"""One key in one file: a version 3 keystore, as other wallets read it. eth_account is imported late."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

from trainchain.chain import eip712
from trainchain.chain.hexes import bytes32
from trainchain.chain.recursion import restore_limit
from trainchain.chain.signin import text_digest
from trainchain.core.errors import TrainChainError

# 16 MB and about 50 ms to open. The file's mode is the first guard; the password slows whoever got past it.
SCRYPT_N = 2**14


class Wallet:
    """An address that can sign. The key shows neither in repr, nor in a pickle, nor in an error."""

    __slots__ = ("__secret", "address")

    def __init__(self, key: bytes | str) -> None:
        from coincurve import PrivateKey

        self.__secret = key if isinstance(key, bytes) else bytes32(key)
        public = PrivateKey(self.__secret).public_key.format(compressed=False)
        self.address = eip712.address_of(public)

    def __repr__(self) -> str:
        return f"Wallet({self.address})"

    def __reduce__(self) -> Any:
        raise TypeError("a wallet is not for pickling")

    def sign_digest(self, digest: bytes) -> str:
        return eip712.sign_digest(self.__secret, digest)

    def sign_typed(self, domain: eip712.Domain, type_name: str, message: dict[str, Any]) -> str:
        return eip712.sign(domain, type_name, message, self)

    def sign_text(self, text: str) -> str:
        return self.sign_digest(text_digest(text))

    def sign_transaction(self, transaction: dict[str, Any]) -> bytes:
        """The raw bytes for `eth_sendRawTransaction`."""
        from eth_account import Account

        restore_limit()
        return bytes(Account.sign_transaction(transaction, self.__secret).raw_transaction)

    def keystore(self, password: str) -> dict[str, Any]:
        """The wallet as the JSON of a version 3 keystore."""
        from eth_keyfile import create_keyfile_json

        restore_limit()
        made: dict[str, Any] = create_keyfile_json(self.__secret, password.encode(), kdf="scrypt", iterations=SCRYPT_N)
        return made


def create(path: Path, password: str = "", *, key: bytes | None = None) -> Wallet:
    """Make a wallet file, of a fresh key unless one is given. An unattended worker's has an empty password.

    Raises `wallet.exists` rather than overwrite anything.
    """
    wallet = Wallet(key or secrets.token_bytes(32))
    if path.exists():
        raise _exists(path)
    _write(path, json.dumps(wallet.keystore(password)).encode())
    return wallet


def open(path: Path, password: str = "") -> Wallet:
    """Read a wallet file. Raises `wallet.missing`, `wallet.unreadable` or `wallet.wrong_password`."""
    from eth_keyfile import decode_keyfile_json

    restore_limit()
    try:
        keystore = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise TrainChainError("wallet.missing", f"There is no wallet at {path}.") from None
    except (OSError, ValueError):
        raise _unreadable(path) from None
    if not isinstance(keystore, dict) or keystore.get("version") != 3:
        raise _unreadable(path)
    try:
        return Wallet(bytes(decode_keyfile_json(keystore, password.encode())))
    except Exception as problem:  # whatever a foreign file makes the library raise
        if "MAC mismatch" in str(problem):
            raise TrainChainError(
                "wallet.wrong_password", f"The password does not open the wallet at {path}."
            ) from None
        raise _unreadable(path) from None


def load_or_create(path: Path, password: str = "") -> Wallet:
    """Open the wallet at `path`, or make one there. Two processes that start at once get the same one."""
    if not path.exists():
        try:
            return create(path, password)
        except TrainChainError as problem:
            if problem.code != "wallet.exists":
                raise
    return open(path, password)


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
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists(path: Path) -> TrainChainError:
    return TrainChainError("wallet.exists", f"There is already a wallet at {path}; it was left as it is.")


def _unreadable(path: Path) -> TrainChainError:
    return TrainChainError("wallet.unreadable", f"The file at {path} is not a version 3 keystore.")
