"""How much a cache's folder holds, who uses which part of it, and what goes when the room runs out.

All processes that share the folder agree through it: each keeps a note of what it uses, under a lock that the system
lets go of when the process ends, however it ends.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG
from typing import Literal

from filelock import FileLock, Timeout

from trainchain.core.digests import is_digest, sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.settings import private_folder, show_size

Kind = Literal["object", "model", "tokens"]
Held = Mapping[str, int]
"""Keys of entries, each with the bytes that it will have when it is whole."""
FOLDERS: dict[Kind, str] = {"object": "objects", "model": "models", "tokens": "tokens"}
PARTIAL, ABOUT, PRIVATE, LOCKS, IN_USE = "partial", "about", "private", "locks", "in-use"
ELSEWHERE = "Free space there, or name a folder on another disk with TRAINCHAIN_CACHE."
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True)
class Entry:
    """One thing in a cache that goes as a whole."""

    key: str
    kind: Kind
    name: str
    """An object's digest, or a folder's name."""
    size: int
    """Bytes on the disk. A model folder of hard links to objects has none of its own."""
    used: float
    """When it was last used, in Unix time."""
    belongs: str
    """Where it came from, for people; empty where nothing says it."""
    job: str | None
    """The private job whose cache it is in."""
    partial: bool
    """Whether it is an object that has not come whole yet."""
    root: Path
    """The folder of the cache that it is in."""
    paths: tuple[Path, ...]
    in_use: bool = False


def free_bytes(folder: Path) -> int:
    """What this user may still write to the folder's disk."""
    return shutil.disk_usage(folder).free


class Room:
    """The space of one cache's folder, private jobs' included, as seen by one of its users.

    `cap` in bytes; None for no cap but the disk's.
    """

    def __init__(self, folder: Path, cap: int | None, *, free: Callable[[Path], int] = free_bytes) -> None:
        self.folder = folder
        self.cap = cap
        self._free = free
        self._slots: dict[str, Held] = {}
        self._notes = private_folder(folder / IN_USE)
        self._note = self._notes / f"{os.getpid()}-{os.urandom(6).hex()}.json"
        self._living: FileLock | None = None

    def lock(self, name: str) -> FileLock:
        """Held by whoever changes what goes by that name; a few names share one, so nobody holds two."""
        return FileLock(private_folder(self.folder / LOCKS) / sha256(name.encode())[:3])

    def holds(self, key: str) -> bool:
        return any(key in held for held in self._slots.values())

    def hold(self, slot: str, wanted: Held) -> list[Entry]:
        """Use these from now on, instead of what the slot held, and make room for them; returns what had to go.

        The least recently used goes first; what a living process uses stays. Raises `cache.full` or `disk.full`,
        with nothing changed, where it cannot be done.
        """
        with self._locked():
            others = self._used_by_others()
            mine = _joined(held for name, held in self._slots.items() if name != slot)
            kept = _joined([others, mine, wanted])
            found = {entry.key: entry for entry in scan(self.folder)}
            here = {key: found[key].size if key in found else 0 for key in kept}
            whole = sum(max(size, here[key]) for key, size in kept.items())
            missing = sum(max(0, size - here[key]) for key, size in kept.items())
            gone = self._victims([entry for key, entry in found.items() if key not in kept], whole, missing, wanted)
            for entry in gone:
                _remove(entry)
            self._slots[slot] = dict(wanted)
            self._write()
        return gone

    def let_go(self, *slots: str, of: str = "") -> None:
        """End the use of what these slots hold (all, where none is named), as far as its key begins with `of`."""
        with self._locked():
            for slot in slots or tuple(self._slots):
                held = self._slots.pop(slot, {})
                if rest := {key: size for key, size in held.items() if not key.startswith(of)}:
                    self._slots[slot] = rest
            self._write()

    def leave(self, of: str, remove: Callable[[], None]) -> bool:
        """End the use of keys that begin with `of`, and `remove` them unless somebody else uses one; whether it did."""
        self.let_go(of=of)
        with self._locked():
            free = not any(key.startswith(of) for key in self._used_by_others())
            if free:
                remove()
        return free

    def entries(self) -> list[Entry]:
        """What the folder holds, the least recently used first."""
        with self._locked():
            used = {**self._used_by_others(), **_joined(self._slots.values())}
            return [replace(entry, in_use=entry.key in used) for entry in sorted(scan(self.folder), key=_age)]

    def remove(self, keys: Iterable[str]) -> int:
        """Remove these but for what is in use; returns the bytes that this freed."""
        wanted = set(keys)
        with self._locked():
            used = {**self._used_by_others(), **_joined(self._slots.values())}
            gone = [entry for entry in scan(self.folder) if entry.key in wanted and entry.key not in used]
            for entry in gone:
                _remove(entry)
        return sum(entry.size for entry in gone)

    def _victims(self, evictable: list[Entry], whole: int, missing: int, wanted: Held) -> list[Entry]:
        """What has to go, so that `whole` bytes fit the cap and `missing` ones the disk."""
        if self.cap is not None and whole > self.cap:
            needed = sum(wanted.values())
            others = f", and running processes use {show_size(whole - needed)} of it" if whole > needed else ""
            raise TrainChainError(
                "cache.full",
                f"{show_size(needed)} are needed at once; the cache's cap is {show_size(self.cap)}{others}.",
                hint=f"--cache-cap {_round_up(whole)} (or TRAINCHAIN_CACHE_CAP={_round_up(whole)}).",
                needed=needed,
                cap=self.cap,
            )
        free, total = self._free(self.folder), whole + sum(entry.size for entry in evictable)
        before, gone = free, []
        for entry in sorted(evictable, key=_age):
            if (self.cap is None or total <= self.cap) and free >= missing:
                break
            total, free = total - entry.size, free + entry.size
            gone.append(entry)
        if free < missing:
            raise _disk_full(self.folder, f"{show_size(missing)} more are needed, {show_size(before)} are free")
        return gone

    def _locked(self) -> FileLock:
        return FileLock(private_folder(self.folder / LOCKS) / "room")

    def _used_by_others(self) -> dict[str, int]:
        """What other living users hold. The notes of dead ones are removed."""
        found: list[Held] = []
        for path in self._notes.glob("*.json"):
            if path == self._note:
                continue
            living = FileLock(path.with_suffix(".lock"), timeout=0)
            try:
                with living:
                    path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)
            except Timeout:
                with suppress(OSError, ValueError):
                    found.append({str(key): int(size) for key, size in json.loads(path.read_bytes()).items()})
        return _joined(found)

    def _write(self) -> None:
        """Publish what this user holds. Called under the lock, so nobody takes a note that is new for a dead one's."""
        if self._living is None:
            living = FileLock(self._note.with_suffix(".lock"), thread_local=False)
            living.acquire(timeout=0)
            self._living = living
        draft = self._note.with_suffix(".tmp")
        draft.write_text(json.dumps(_joined(self._slots.values())), encoding="utf-8")
        draft.replace(self._note)


def scan(root: Path) -> list[Entry]:
    """Everything in a cache's folder, its private jobs' caches included."""
    found = list(_scan(root, None))
    for folder in _listed(root / PRIVATE):
        if folder.is_dir() and not folder.name.startswith("."):
            found += _scan(folder, folder.name)
    return found


def key_of(kind: Kind, name: str, job: str | None) -> str:
    return f"{PRIVATE}/{job}/{FOLDERS[kind]}/{name}" if job else f"{FOLDERS[kind]}/{name}"


@contextmanager
def full_disk(folder: Path, what: str, *, hint: str = ELSEWHERE) -> Iterator[None]:
    """Turn the system's word for a disk, quota or file that can take no more into `disk.full`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _disk_full(folder, f"{os.strerror(error.errno)}, while {what}", hint) from None


def _disk_full(folder: Path, why: str, hint: str = ELSEWHERE) -> TrainChainError:
    return TrainChainError("disk.full", f"The disk that {folder} is on has no room: {why}.", hint=hint)


def plain(text: str) -> str:
    """The text without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def delete(path: Path) -> None:
    """Remove a file, a link or a folder, whatever it is; no matter if it is gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _scan(root: Path, job: str | None) -> Iterator[Entry]:
    """What a cache put there, all of it named by digests: the folder may be one that others keep things in as well."""
    objects: dict[str, list[Path]] = {}
    for shelf in _listed(root / FOLDERS["object"]):
        for path in _listed(shelf):
            objects.setdefault(shelf.name + path.name, []).append(path)
    whole = set(objects)
    for path in _listed(root / PARTIAL):
        objects.setdefault(path.name, []).append(path)
    models: dict[str, list[Path]] = {}
    for path in _listed(root / FOLDERS["model"]):
        models.setdefault(_model_name(path), []).append(path)
    tokens = {path.name: [path] for path in _listed(root / FOLDERS["tokens"])}
    objects, models, tokens = (
        {name: paths for name, paths in found.items() if is_digest(name)} for found in (objects, models, tokens)
    )

    def entry(kind: Kind, name: str, paths: list[Path], linked: Iterable[int] = ()) -> Entry:
        stats = _stats(paths)
        inside = stats if kind == "object" else [*stats, *_stats(path for one in paths for path in one.rglob("*"))]
        sizes = {found.st_ino: found.st_size for found in inside if S_ISREG(found.st_mode)}
        return Entry(
            key_of(kind, name, job),
            kind,
            name,
            sum(size for inode, size in sizes.items() if inode not in linked),
            # linked files bear the times of their objects
            max((found.st_mtime for found in (stats if kind == "model" else inside)), default=0.0),
            _belongs(root, name) or ("tokenised data" if kind == "tokens" else ""),
            job,
            kind == "object" and name not in whole,
            root,
            tuple(paths),
        )

    linked = {found.st_ino for paths in objects.values() for found in _stats(paths)}
    yield from (entry("object", name, paths) for name, paths in objects.items())
    yield from (entry("model", name, paths, linked) for name, paths in models.items())
    yield from (entry("tokens", name, paths) for name, paths in tokens.items())


def _remove(entry: Entry) -> None:
    """Remove an entry; with an object go the model folders that link to it, or it would stay on the disk."""
    inodes = {found.st_ino for found in _stats(entry.paths) if entry.kind == "object" and found.st_nlink > 1}
    beside = _listed(entry.root / FOLDERS["model"]) if inodes else []
    linking = [path for path in beside if is_digest(_model_name(path))]
    gone = [model for model in linking if inodes & {found.st_ino for found in _stats(_listed(model))}]
    with suppress(OSError):  # on Windows what somebody has open stays
        for path in (*gone, *entry.paths):
            delete(path)
        (entry.root / ABOUT / entry.name).unlink(missing_ok=True)


def _model_name(path: Path) -> str:
    """The model's, also of a folder that is being made: .NAME.x."""
    return path.name.lstrip(".").partition(".")[0]


def _belongs(folder: Path, name: str) -> str:
    try:
        return plain(str(json.loads((folder / ABOUT / name).read_bytes())["belongs"]))[:300]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _joined(held: Iterable[Held]) -> dict[str, int]:
    every: dict[str, int] = {}
    for one in held:
        for key, size in one.items():
            every[key] = max(size, every.get(key, 0))
    return every


def _age(entry: Entry) -> tuple[float, str]:
    return entry.used, entry.key


def _round_up(size: int) -> str:
    unit, name = (10**9, "GB") if size > 10**9 else (10**6, "MB")
    return f"{math.ceil(size / unit)}{name}"


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _stats(paths: Iterable[Path]) -> list[os.stat_result]:
    found = []
    for path in paths:
        with suppress(OSError):
            found.append(path.lstat())
    return found
