"""This machine: where TrainChain keeps its files, and which hub it talks to. Flag, then environment, then default."""

import os
import re
import threading
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from platformdirs import user_data_path

from trainchain.core.errors import TrainChainError

DEFAULT_HUB = "http://127.0.0.1:7070"
DEFAULT_CACHE_CAP = 100 * 10**9
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40
}  # fmt: skip
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?((?:[KMGT]I?)?B)", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Settings:
    home: Path
    hub: str
    cache_folder: Path | None = None
    """Another place for the cache than in the home."""
    cache_cap: int = DEFAULT_CACHE_CAP
    """How many bytes the cache may hold."""

    @classmethod
    def load(cls, home: Path | None = None, hub: str | None = None, cache_cap: str | None = None) -> "Settings":
        """Flags win over TRAINCHAIN_HOME, _HUB, _CACHE and _CACHE_CAP, which win over the defaults."""
        folder = home or Path(os.environ.get("TRAINCHAIN_HOME") or user_data_path("trainchain"))
        url = hub or os.environ.get("TRAINCHAIN_HUB") or DEFAULT_HUB
        cache = os.environ.get("TRAINCHAIN_CACHE")
        told = os.environ.get("TRAINCHAIN_CACHE_CAP")
        cap = DEFAULT_CACHE_CAP
        if cache_cap is not None:
            cap = parse_size(cache_cap, "--cache-cap")
        elif told:
            cap = parse_size(told, "TRAINCHAIN_CACHE_CAP")
        return cls(
            expanded(folder).absolute(),
            url.rstrip("/"),
            expanded(Path(cache)).absolute() if cache else None,
            cap,
        )

    @property
    def cache(self) -> Path:
        """The folder of the cache that workers of this machine share."""
        return self.cache_folder or self.home / "cache"

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


def parse_size(text: str, what: str = "A size") -> int:
    """Bytes of a size as people write it: 80GB, 1.5 TB, 64GiB. Raises `usage.flag` for anything else."""
    found = _SIZE.fullmatch(text.strip())
    size = int(Decimal(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if not size:
        raise TrainChainError(
            "usage.flag", f"{what} is {text[:60]!r}, which is no size.", hint="Write it as 80GB, 500MB or 64GiB."
        )
    return size


def show_size(size: int) -> str:
    """A number of bytes for people, in the units that disks are sold in."""
    for unit in ("TB", "GB", "MB", "kB"):
        if size >= _UNITS[unit.upper()]:
            return f"{size / _UNITS[unit.upper()]:.1f} {unit}"
    return f"{size} B"


def expanded(path: Path) -> Path:
    """The path with a leading ~ or ~NAME replaced. Raises `usage.file` where there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise TrainChainError("usage.file", f"{path} is in nobody's home.", hint="Check that path.") from None


def private_folder(path: Path) -> Path:
    """Make a folder that only this user can enter."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def write_private(path: Path, data: bytes) -> None:
    """Publish `data` at `path` with mode 0600: whole or not at all, on disk before this returns."""
    private_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """A file's new name, too, is only kept through a loss of power once its folder is on disk."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
