"""wallet new | import | show | backup: this home's key."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainchain.cli.options import Home, Json
from trainchain.cli.output import Output

if TYPE_CHECKING:
    from trainchain.chain.wallet import Wallet
    from trainchain.core.settings import Settings

app = typer.Typer(help="This home's wallet: the key that signs and is paid.", no_args_is_help=True)

_MOST_BYTES = 1 << 16
_LIKE_A_KEY = re.compile(r"(0x)?[0-9a-fA-F]{64}")


@app.command("new")
def new(home: Home = None, json_: Json = False) -> None:
    """Make a wallet. Its password is what TRAINCHAIN_PASSWORD_FILE holds, else the keyring's, else what is typed.

    \b
    Examples:
      trainchain wallet new
      TRAINCHAIN_PASSWORD_FILE=~/.password trainchain wallet new --home ./owner
      TRAINCHAIN_KEYRING=1 trainchain wallet new
    """
    import secrets

    from trainchain.chain.wallet import Wallet
    from trainchain.core.settings import Settings

    settings = Settings.load(home)
    _must_be_free(settings.wallet_path)
    _save(Wallet(secrets.token_bytes(32)), "", settings, Output(json_mode=json_))


@app.command("import")
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A keystore, or a private key in hex; - is stdin.")],
    home: Home = None,
    json_: Json = False,
) -> None:
    """Take over a key of another program.

    It may be a version 3 keystore, whose password is kept, or 64 hex digits.

    \b
    Examples:
      trainchain wallet import ~/.foundry/keystores/worker
      TRAINCHAIN_PASSWORD_FILE=~/.pw trainchain wallet import UTC--key.json
      trainchain wallet import - < key.txt
    """
    from trainchain.chain import wallet
    from trainchain.core.settings import Settings

    out, settings = Output(json_mode=json_), Settings.load(home)
    _must_be_free(settings.wallet_path)
    data = _bytes_of(file)
    place = "stdin" if file == "-" else file
    found, password = wallet.of_raw_key(data), ""
    raw = found is not None
    if found is None:
        found, password = _opened(data, place, settings)
    _must_be_private(found, settings)
    _save(found, password, settings, out)
    if raw and file != "-":
        out.note(f"warning  {file} still holds the key for whoever reads it; remove it")


@app.command("show")
def show(home: Home = None, json_: Json = False) -> None:
    """Print the wallet's address.

    \b
    Examples:
      trainchain wallet show
      trainchain wallet show --json
    """
    from trainchain.cli import passwords, wiring
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    settings = Settings.load(home)
    found, _, source = passwords.open_file(_path_of(settings), settings.password())
    if not out.json_mode:
        out.note(f"wallet   {wiring.friendly(settings.wallet_path)}, {_SAID[source]}")
    out.result(found.address, _document(found, settings.wallet_path, source))


@app.command("backup")
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the copy goes. Nothing is overwritten.")],
    no_password: Annotated[
        bool, typer.Option("--no-password", help="Let whoever has the copy have the money, too.")
    ] = False,
    home: Home = None,
    json_: Json = False,
) -> None:
    """Write a copy that opens with a password.

    `wallet import` and other programs read it. The password is the wallet's own
    where you know it, else what TRAINCHAIN_PASSWORD_FILE holds, else what is typed.

    \b
    Examples:
      trainchain wallet backup /media/usb/trainchain-wallet.json
      TRAINCHAIN_PASSWORD_FILE=~/.pw trainchain wallet backup copy.json
    """
    from trainchain.chain import wallet
    from trainchain.core.errors import TrainChainError
    from trainchain.core.settings import Settings, expanded

    out, settings = Output(json_mode=json_), Settings.load(home)
    source = _path_of(settings)
    target = expanded(file).absolute()
    if not target.parent.is_dir():
        raise TrainChainError("usage.file", f"There is no folder {target.parent}.", hint="Name a file in one.")
    _must_be_free(target)
    opened, password, came_from = _opened_for_backup(source, settings, no_password=no_password)
    opened.save(target, password, scrypt_n=wallet.BACKUP_SCRYPT_N)
    if wallet.open(target, password).address != opened.address:
        raise TrainChainError("wallet.unreadable", f"The copy at {target} does not read back; do not rely on it.")
    if not password:
        out.note(f"warning  {target} HAS NO PASSWORD: whoever reads it can take everything this wallet holds or earns")
    out.result(str(target), _document(opened, target, came_from))


_SAID = {
    "none": "no password: whoever reads the file has the key",
    "file": "password from TRAINCHAIN_PASSWORD_FILE",
    "keyring": "password in the system's keyring",
    "typed": "with a password",
}


def _save(found: "Wallet", password: str, settings: "Settings", out: Output) -> None:
    from trainchain.cli import passwords, wiring

    path = settings.wallet_path
    made, source = passwords.save(found, path, settings, ask=True, password=password)
    out.note(f"wallet   {wiring.friendly(path)}, {_SAID[source]}")
    out.note(f"back up  {passwords.how_to_back_up(settings)}")
    out.result(made.address, _document(made, path, source))


def _document(found: "Wallet", path: Path, source: str) -> dict[str, str]:
    return {"address": found.address, "file": str(path), "password": source}


def _path_of(settings: "Settings") -> Path:
    from trainchain.core.errors import TrainChainError

    if not settings.wallet_path.exists():
        raise TrainChainError(
            "wallet.missing", f"There is no wallet at {settings.wallet_path}.", hint="trainchain wallet new"
        )
    return settings.wallet_path


def _must_be_free(path: Path) -> None:
    """Asked for before anything else is: nobody types a password for nothing."""
    from trainchain.core.errors import TrainChainError

    if path.exists():
        raise TrainChainError(
            "wallet.exists", f"There is already a file {path}; it was left as it is.", hint="Choose another place."
        )


def _bytes_of(file: str) -> bytes:
    from trainchain.core.errors import TrainChainError
    from trainchain.core.settings import expanded

    if file == "-":
        if sys.stdin is None:  # as it is where a program was started with the stream closed
            raise TrainChainError("usage.file", "There is no stdin to read a key from.", hint="Name a file.")
        return sys.stdin.buffer.read(_MOST_BYTES)
    path = expanded(Path(file))
    if _LIKE_A_KEY.fullmatch(file.strip()) and not path.exists():
        raise TrainChainError(
            "usage.flag",
            "A key is never taken as an argument: other programs and the shell's history would have it.",
            hint="trainchain wallet import - < FILE",
        )
    try:
        with path.open("rb") as opened:
            return opened.read(_MOST_BYTES)
    except OSError as error:
        raise TrainChainError("usage.file", f"{file} cannot be read: {error.strerror}.") from None


def _opened(data: bytes, place: str, settings: "Settings") -> tuple["Wallet", str]:
    """A keystore of any program and its password: the one that is at hand, none, or a person's."""
    from trainchain.chain import wallet
    from trainchain.cli import passwords
    from trainchain.core.errors import TrainChainError

    given = settings.password()
    for password in dict.fromkeys([given or "", ""]):
        try:
            return wallet.unlock(data, password, place), password
        except TrainChainError as error:
            if error.code != "wallet.wrong_password":
                hint = "A version 3 keystore, or a private key of 64 hex digits, can be imported."
                raise TrainChainError(error.code, error.message, hint=hint) from None
            wrong = error
    if given is not None:
        raise TrainChainError(wrong.code, wrong.message, hint="Check TRAINCHAIN_PASSWORD_FILE.")
    typed = passwords.ask_once(
        f"Password of {place}: ", f"The keystore at {place} has a password, and nobody can be asked for it."
    )
    return wallet.unlock(data, typed, place), typed


def _must_be_private(found: "Wallet", settings: "Settings") -> None:
    from trainchain.chain.wallet import PUBLIC
    from trainchain.cli.wiring import address_in
    from trainchain.core.errors import TrainChainError

    if found.address in PUBLIC:
        raise TrainChainError(
            "chain.foreign_key",
            f"{found.address} is one of the keys that every development node prints: what it holds is anybody's.",
            hint="trainchain wallet new",
        )
    faucets = [address_in(path) for path in (settings.home / "chain").glob("*.faucet.json")]
    if found.only_chain is not None or found.address.lower() in faucets:
        raise TrainChainError(
            "chain.foreign_key",
            f"{found.address} is the faucet of an embedded chain; it is of use there only, and the hub has it.",
            hint="trainchain wallet new",
        )


def _opened_for_backup(path: Path, settings: "Settings", *, no_password: bool) -> tuple["Wallet", str, str]:
    """The wallet, and the password of its copy: one that a person knows, or none where that is what they want."""
    from trainchain.cli import passwords
    from trainchain.cli.output import may_ask
    from trainchain.core.errors import TrainChainError

    given = settings.password()
    try:
        opened, password, source = passwords.open_file(path, given)
    except TrainChainError as wrong:
        # The file may hold the copy's password alone, beside a wallet that has none, or one in the keyring.
        if wrong.code != "wallet.wrong_password" or not given or may_ask():
            raise
        try:
            opened, password, source = passwords.open_file(path, None)[0], given, "file"
        except TrainChainError as locked:
            raise wrong if locked.code == "wallet.locked" else locked from None
    if no_password:
        return opened, "", "none"
    if source in ("file", "typed"):
        return opened, password, source
    if not may_ask():
        raise TrainChainError(
            "wallet.locked",
            "The copy needs a password that you know, and nobody can be asked for one.",
            hint=f"{passwords.NAME_A_FILE}; --no-password does without",
        )
    typed = passwords.ask_twice("Password for the copy (empty for none): ")
    return opened, typed, "typed" if typed else "none"
