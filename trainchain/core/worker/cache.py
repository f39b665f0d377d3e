"""The worker's cache: objects by their sha256, from a hub or a source, hashed before every use.

One folder, shared by every process that is given it, and a separate one in it for each private job. Nothing is
trusted that lies there: what is not what its name says is told of, removed, and fetched again once.
"""

import copy
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from trainchain.core.digests import canonical_json, is_digest, sha256, sha256_file
from trainchain.core.errors import TrainChainError
from trainchain.core.settings import DEFAULT_CACHE_CAP, private_folder
from trainchain.core.worker.room import (
    ABOUT,
    FOLDERS,
    PARTIAL,
    PRIVATE,
    Entry,
    Room,
    delete,
    free_bytes,
    full_disk,
    key_of,
)

if TYPE_CHECKING:
    from trainchain.core.client import HubClient
    from trainchain.core.models import FileRef

log = logging.getLogger(__name__)

UNSIZED = 64 << 20
"""The most bytes of an object whose size nobody knows beforehand."""
LAST = "last"
_JOB = re.compile(r"0x[0-9a-f]{64}")

OnEvent = Callable[[dict[str, Any]], None]
Fetch = Callable[[str, str, Path, int], None]
"""(pinned source, path in it, where to put it, its size): brings the file there, on from what lies there."""


@dataclass(frozen=True)
class _Wanted:
    """A file as it must be, and the words for when it is not."""

    digest: str
    size: int | None
    name: str
    origin: str
    code: str
    belongs: str
    fetch: Callable[[Path], None]


@dataclass(frozen=True)
class _Found:
    digest: str
    size: int


class Cache:
    """A cache's folder, or the separate one in it of a private job.

    What a living process uses is never evicted: the files of `hold` until it is told otherwise, and the last object
    that was asked for by itself. `cap` in bytes, over everything in the folder; None for no cap but the disk's.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cap: int | None = DEFAULT_CACHE_CAP,
        on_event: OnEvent | None = None,
        fetch: Fetch | None = None,
        now: Callable[[], float] = time.time,
        free: Callable[[Path], int] = free_bytes,
    ) -> None:
        self.folder = private_folder(folder)
        self.tokens: Path | None = private_folder(folder / FOLDERS["tokens"])
        """Where training children keep a job's tokenised data; nowhere, for a private job."""
        self.job: str | None = None
        self.room = Room(self.folder, cap, free=free)
        self._on_event = on_event
        self._fetch = fetch or _from_source
        self._now = now

    def private(self, job_id: str) -> "Cache":
        """The cache of a private job: it shares the cap with this one, and no file."""
        if not _JOB.fullmatch(job_id):
            raise TrainChainError("job.unknown", f"{job_id[:80]!r} is not the id of a job.")
        place = copy.copy(self)
        place.folder = private_folder(private_folder(self.room.folder / PRIVATE) / job_id)
        place.job, place.tokens = job_id, None
        return place

    def private_jobs(self) -> list[str]:
        """The ids of private jobs that something lies here of."""
        folder = self.room.folder / PRIVATE
        return sorted(path.name for path in folder.iterdir() if _JOB.fullmatch(path.name)) if folder.is_dir() else []

    def forget(self, job_id: str) -> bool:
        """Remove all that lies here of a private job, unless another user of the folder is at it; whether it went."""
        folder = self.private(job_id).folder

        def remove() -> None:
            try:  # out of sight in one move
                folder.rename(folder.with_name(f".{job_id}.{os.urandom(4).hex()}"))
            except OSError:  # on Windows, where a file in it is open
                delete(folder)

        if not self.room.leave(f"{PRIVATE}/{job_id}/", remove):
            return False
        for left in folder.parent.glob(".0x*"):
            delete(left)
        return True

    def hold(self, slot: str, digests: Mapping[str, int], *, models: Mapping[str, int] | None = None) -> None:
        """Use these objects (with their sizes) and model folders, instead of what the slot held; make room for them.

        Raises `cache.full` or `disk.full` before anything is fetched or removed.
        """
        wanted = {key_of("object", digest, self.job): size for digest, size in digests.items()}
        wanted |= {key_of("model", name, self.job): size for name, size in (models or {}).items()}
        for entry in self.room.hold(slot, wanted):
            self.tell("evicted", name=entry.name, kind=entry.kind, bytes=entry.size)

    def let_go(self, *slots: str) -> None:
        """End the use of what the slots hold, or of everything."""
        self.room.let_go(*slots)

    def object(self, client: "HubClient", digest: str, size: int | None = None, *, belongs: str = "") -> Path:
        """The path of a hub's object, its bytes hashed just now.

        Raises `object.digest` where the hub sends other bytes twice.
        """

        def fetch(partial: Path) -> None:
            client.download(digest, partial, size=UNSIZED if size is None else size)

        origin = f"the hub {client.url}"
        return self._bring(_Wanted(digest, size, digest, origin, "object.digest", belongs or origin, fetch))

    def file(self, source: str, ref: "FileRef", *, belongs: str = "") -> Path:
        """The path of a file of a pinned source, its bytes hashed just now.

        Raises `source.changed` where the source sends other bytes twice, and what the source raises.
        """

        def fetch(partial: Path) -> None:
            self._fetch(source, ref.path or ref.name, partial, ref.size)

        name = f"{ref.name} of {source}"
        return self._bring(_Wanted(ref.sha256, ref.size, name, source, "source.changed", belongs or name, fetch))

    def pin(self, source: str, path: str, size: int, state: str = "") -> tuple[str, Path]:
        """The sha256 that a file of a pinned source has, where the source tells none, and the file.

        Fetched from its beginning, as nothing tells whether a part of it is right; the next time it is found here,
        unless its `state` at the source is another by then.
        """
        name = sha256(canonical_json([source, path, state]))
        known = self._pinned(name)
        if known is not None and _look(self._path(known)) == _Found(known, size):
            self.hold(LAST, {known: size})
            return known, self._path(known)
        words = f"{path} of {source}"
        want = _Wanted(
            name, size, words, source, "source.changed", words, lambda at: self._fetch(source, path, at, size)
        )
        self.hold(LAST, {name: size})
        partial = private_folder(self.folder / PARTIAL) / name
        with self.lock(name):
            delete(partial)
            self._download(want, partial)
            found = _look(partial)
            if found is None or found.size != size:
                delete(partial)
                raise TrainChainError("source.incomplete", f"Not all of {words} came.", hint="Try again.")
            target = self._path(found.digest)
            private_folder(target.parent)
            partial.replace(target)
        self.hold(LAST, {found.digest: size})
        self.touch(target)
        self.note(found.digest, {"belongs": words})
        self.note(f"pin-{name}", {"digest": found.digest})
        return found.digest, target

    def _pinned(self, name: str) -> str | None:
        try:
            digest = str(json.loads((self.folder / ABOUT / f"pin-{name}").read_bytes())["digest"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return digest if is_digest(digest) else None

    def keep(self, digest: str, data: bytes, *, belongs: str = "") -> Path:
        """Some bytes that have that digest, as an object like any other."""

        def write(partial: Path) -> None:
            partial.write_bytes(data)

        return self._bring(_Wanted(digest, len(data), digest, "memory", "object.digest", belongs, write))

    def read(self, digest: str) -> bytes | None:
        """A small object, if it lies here and is right."""
        path = self._path(digest)
        found = _look(path)
        return path.read_bytes() if found is not None and found.digest == digest else None

    def lock(self, name: str) -> FileLock:
        """Held while what goes by that name is changed; nobody may hold two."""
        return self.room.lock(name)

    def touch(self, path: Path) -> None:
        """Note that it is used now."""
        os.utime(path, (self._now(), self._now()))

    def note(self, name: str, about: Mapping[str, Any]) -> None:
        """Keep beside the cache what `name` is, for people and for `verify`."""
        (private_folder(self.folder / ABOUT) / name).write_text(json.dumps(about), encoding="utf-8")

    def tell(self, event: str, **fields: Any) -> None:
        if self._on_event is not None:
            self._on_event({"event": event, **fields})
        elif event == "damaged":
            log.warning("%(name)s (%(where)s) was not what it should be: %(found)s", fields)

    def _path(self, digest: str) -> Path:
        if not is_digest(digest):
            raise TrainChainError("object.unknown", "An object is named by 64 lower-case hex digits.")
        return self.folder / FOLDERS["object"] / digest[:2] / digest[2:]

    def _bring(self, want: _Wanted) -> Path:
        path = self._path(want.digest)
        partial = private_folder(self.folder / PARTIAL) / want.digest
        private_folder(path.parent)
        known = self.room.holds(key_of("object", want.digest, self.job))
        if not known:
            self.hold(LAST, {want.digest: want.size or 0})
        with self.lock(want.digest):
            wrong = self._wrong(want, path, "this cache")
            if wrong is not None:
                delete(partial)
            elif path.exists():
                self.touch(path)
                return path
            while True:
                self._download(want, partial)
                found = self._wrong(want, partial, want.origin)
                if found is None:
                    break
                if wrong is not None:
                    raise _other_bytes(want, found)
                wrong = found
            partial.replace(path)
            self.touch(path)
            self.note(want.digest, {"belongs": want.belongs})
        if not known and want.size is None:
            self.hold(LAST, {want.digest: path.stat().st_size})
        return path

    def _wrong(self, want: _Wanted, path: Path, where: str) -> _Found | None:
        """What lies there, told of and removed, if it is not what is wanted; None if it is, or nothing lies there."""
        if not os.path.lexists(path):
            return None
        found = _look(path)
        if found is not None and found.digest == want.digest:
            return None
        delete(path)
        found = found or _Found("no plain file", 0)
        self.tell(
            "damaged",
            name=want.name,
            where=where,
            digest=want.digest,
            found=found.digest,
            size=want.size,
            found_size=found.size,
        )
        return found

    def _download(self, want: _Wanted, partial: Path) -> None:
        """Fetch, on from what lies there. An interrupted download stays for the next time, unless the disk is full."""
        if os.path.lexists(partial):
            had = partial.lstat()
            if not S_ISREG(had.st_mode) or (want.size is not None and had.st_size > want.size):
                delete(partial)
        had_bytes = partial.stat().st_size if partial.exists() else 0
        began = self._now()
        try:
            if want.size is None or had_bytes < want.size:
                self.tell("fetching", name=want.name, bytes=want.size, resumed=had_bytes)
                with full_disk(self.folder, f"{want.name} was fetched"):
                    want.fetch(partial)
        except TrainChainError as error:
            if error.code == "disk.full" or (partial.exists() and not partial.stat().st_size):
                delete(partial)
            if error.code != "object.digest":  # more came than should: what it is, its digest says
                raise
        partial.touch()
        seconds, size = self._now() - began, partial.stat().st_size
        self.tell("fetched", name=want.name, bytes=size - had_bytes, resumed=had_bytes, seconds=round(seconds, 3))


def verify(cache: Cache) -> Iterable[tuple[Entry, str]]:
    """Hash every object and model folder; yields what is not what its name says, with what it is."""
    for entry in cache.room.entries():
        found = _damage(entry)
        if found is not None:
            yield entry, found


def _damage(entry: Entry) -> str | None:
    if entry.kind == "object" and not entry.partial:
        found = _look(entry.root / FOLDERS["object"] / entry.name[:2] / entry.name[2:])
        return None if found is None or found.digest == entry.name else found.digest
    if entry.kind == "model":
        try:
            files = json.loads((entry.root / ABOUT / entry.name).read_bytes())["files"]
            return odd_file(entry.root, entry.name, {str(name): str(digest) for name, digest in files.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # made of a private job's own files: it is made anew whenever it is used
    return None


def odd_file(root: Path, name: str, files: Mapping[str, str]) -> str | None:
    """The first entry of a model folder that is not the file it should be, or should not be there; None if all are."""
    folder = root / FOLDERS["model"] / name
    for path in sorted(folder.iterdir()):
        if path.name not in files:
            return path.name
    for file, digest in files.items():
        path, source = folder / file, root / FOLDERS["object"] / digest[:2] / digest[2:]
        if not os.path.lexists(path) or not S_ISREG(path.lstat().st_mode):
            return file
        if not (source.exists() and path.samefile(source)) and sha256_file(path) != digest:
            return file
    return None


def _look(path: Path) -> _Found | None:
    """A file's digest and size; None for what is no plain file."""
    try:
        found = path.lstat()
        return _Found(sha256_file(path), found.st_size) if S_ISREG(found.st_mode) else None
    except OSError:
        return None


def _other_bytes(want: _Wanted, found: _Found) -> TrainChainError:
    whole = "" if want.size is None or want.size == found.size else f" ({found.size} bytes instead of {want.size})"
    if want.code == "object.digest":
        return TrainChainError(
            want.code,
            f"{want.origin[0].upper()}{want.origin[1:]} sent other bytes than {want.digest}: "
            f"they are {found.digest}{whole}.",
            hint="Try again; if it stays so, do not trust this hub.",
        )
    return TrainChainError(
        want.code,
        f"{want.name} is not the file that the job was published with: its sha256 should be {want.digest} and is "
        f"{found.digest}{whole}, also when fetched again.",
        hint="The source was changed, or something on the way alters it; the job's owner has to publish it again.",
    )


def _from_source(source: str, path: str, partial: Path, size: int) -> None:
    from trainchain.core.sources.table import source_of

    source_of(source).fetch(source, path, partial, size=size)
