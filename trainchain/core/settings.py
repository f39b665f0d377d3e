"""This machine: where TrainChain keeps its files, and which hub it talks to. Flag, then environment, then default."""

import os
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_data_path

from trainchain.core.errors import TrainChainError

DEFAULT_HUB = "http://127.0.0.1:7070"


@dataclass(frozen=True)
class Settings:
    home: Path
    hub: str

    @classmethod
    def load(cls, home: Path | None = None, hub: str | None = None) -> "Settings":
        """Flags win over TRAINCHAIN_HOME and TRAINCHAIN_HUB, which win over the defaults."""
        folder = home or Path(os.environ.get("TRAINCHAIN_HOME") or user_data_path("trainchain"))
        url = hub or os.environ.get("TRAINCHAIN_HUB") or DEFAULT_HUB
        return cls(folder.expanduser().absolute(), url.rstrip("/"))

    @property
    def wallet_path(self) -> Path:
        return self.home / "wallet.json"

    def password(self) -> str | None:
        """What TRAINCHAIN_PASSWORD_FILE holds, its last line end removed; None where it is not set."""
        name = os.environ.get("TRAINCHAIN_PASSWORD_FILE")
        if not name:
            return None
        try:
            return Path(name).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError):
            raise TrainChainError(
                "wallet.locked",
                f"The password file {name} cannot be read.",
                hint="Check TRAINCHAIN_PASSWORD_FILE.",
            ) from None


def private_folder(path: Path) -> Path:
    """Make a folder that only this user can enter."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def write_private(path: Path, data: bytes) -> None:
    """Publish `data` at `path` with mode 0600: whole or not at all, on disk before this returns."""
    private_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
