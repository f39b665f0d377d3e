"""Where a wallet's password comes from: the file that is named, the system's keyring, a person, or nowhere."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Any

from trainchain.cli.output import may_ask
from trainchain.core.errors import TrainChainError

if TYPE_CHECKING:
    from pathlib import Path

    from trainchain.chain.wallet import Wallet
    from trainchain.core.settings import Settings

SERVICE = "trainchain"
NAME_A_FILE = "TRAINCHAIN_PASSWORD_FILE=FILE names a file that holds it"


def save(wallet: Wallet, path: Path, settings: Settings, *, ask: bool, password: str = "") -> tuple[Wallet, str]:
    """Write a wallet to a new file, and tell where its password lies: `file`, `keyring`, `typed` or `none`.

    A `password` that is known already is kept. Raises `wallet.exists`, and `wallet.keyring` before there is a file.
    """
    given = settings.password()
    if given is not None:
        return wallet.save(path, password or given), "file" if password or given else "none"
    if wanted():
        return _save_with_keyring(wallet, path, password), "keyring"
    if not password and ask and may_ask():
        password = ask_twice(f"New password for {path} (empty for none): ")
    return wallet.save(path, password), "typed" if password else "none"


def open_file(path: Path, given: str | None) -> tuple[Wallet, str, str]:
    """A wallet, its password, and where that came from: what is `given`, none, the keyring, a person who is there."""
    from trainchain.chain import wallet

    if given is not None:
        try:
            return wallet.open(path, given), given, "file" if given else "none"
        except TrainChainError as error:
            if error.code != "wallet.wrong_password":
                raise
            raise TrainChainError(error.code, error.message, hint="Check TRAINCHAIN_PASSWORD_FILE.") from None
    try:
        return wallet.open(path), "", "none"
    except TrainChainError as error:
        if error.code != "wallet.wrong_password":
            raise
    if wanted():
        from trainchain.cli.wiring import address_in

        kept = _ask_keyring("get_password", address_in(path) or "")
        if kept is not None:
            return wallet.open(path, str(kept)), str(kept), "keyring"
    typed = ask_once(f"Password of {path}: ", f"The wallet at {path} has a password, and nobody can be asked for it.")
    return wallet.open(path, typed), typed, "typed"


def how_to_back_up(settings: Settings) -> str:
    """The command, as it can be run from here."""
    import shlex

    from trainchain.cli.wiring import friendly
    from trainchain.core.settings import Settings

    if settings.home == Settings.load().home:
        return "trainchain wallet backup wallet-backup.json"
    near = friendly(settings.home)
    home = near if near.startswith("./") else str(settings.home)  # a shell knows ~ only where it is not quoted
    return f"trainchain wallet backup wallet-backup.json --home {shlex.quote(home)}"


def ask_once(question: str, otherwise: str) -> str:
    """A password from a person; `wallet.locked`, in the words of `otherwise`, where nobody sits there."""
    if not may_ask():
        raise TrainChainError("wallet.locked", otherwise, hint=NAME_A_FILE)
    return _typed(question)


def ask_twice(question: str) -> str:
    """A new password, typed twice."""
    first = _typed(question)
    if first and _typed("The same again: ") != first:
        raise TrainChainError("wallet.wrong_password", "The two passwords differ; nothing was written.")
    return first


def _typed(question: str) -> str:
    import getpass

    try:
        return getpass.getpass(question)
    except EOFError:  # Ctrl-D, or a terminal that went away
        raise TrainChainError("wallet.locked", "No password was typed.", hint=NAME_A_FILE) from None


def wanted() -> bool:
    """Whether TRAINCHAIN_KEYRING asks for the system's keyring."""
    told = os.environ.get("TRAINCHAIN_KEYRING", "")
    if told not in ("", "0", "1"):
        raise TrainChainError("usage.flag", f"TRAINCHAIN_KEYRING is {told[:20]!r}; it may be 1 or 0.")
    return told == "1"


def _save_with_keyring(wallet: Wallet, path: Path, password: str) -> Wallet:
    if path.exists():  # before anything is put into the keyring for it
        return wallet.save(path, "")
    address, password = wallet.address.lower(), password or secrets.token_urlsafe(32)
    _ask_keyring("set_password", address, password)
    if _ask_keyring("get_password", address) != password:
        raise TrainChainError(
            "wallet.keyring", "The system's keyring does not keep what it is given; no wallet was made.", hint=_WITHOUT
        )
    try:
        return wallet.save(path, password)
    except BaseException:
        _ask_keyring("delete_password", address)
        raise


_WITHOUT = "Unlock it, or do without: unset TRAINCHAIN_KEYRING."


def _ask_keyring(what: str, *arguments: str) -> Any:
    try:
        import keyring
    except ImportError:
        raise TrainChainError(
            "wallet.keyring",
            "TRAINCHAIN_KEYRING asks for the system's keyring, and the library for it is not installed.",
            hint="pip install 'trainchain[keyring]'",
        ) from None
    try:
        return getattr(keyring, what)(SERVICE, *arguments)
    except Exception as problem:  # each system's keyring has errors of its own, and their words may quote anything
        raise TrainChainError(
            "wallet.keyring", f"The system's keyring cannot be used ({type(problem).__name__}).", hint=_WITHOUT
        ) from None
