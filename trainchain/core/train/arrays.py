"""Arrays that are computed once and then mapped: a folder of plain files with their digests. No torch."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trainchain.core.digests import sha256_file

Kinds = Mapping[str, type[np.generic]]
"""The arrays of a folder by name, with their element types. All are flat."""
Arrays = Mapping[str, NDArray[Any]]
Facts = dict[str, Any]
"""JSON values that are kept beside the arrays."""

LAYOUT = 1
META = "meta.json"
STALE_SECONDS = 86400
"""A hidden folder untouched for so long was left behind by a killed process."""
_ATTEMPTS = 3


def open_arrays(folder: Path, kinds: Kinds) -> tuple[Facts, Arrays] | None:
    """What was published as `folder`, mapped read-only; None where it is absent, torn or altered."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["layout"] != LAYOUT or not isinstance(meta["facts"], dict):
            return None
        digests = {name: str(meta["sha256"][name]) for name in kinds}
        if any(sha256_file(folder / name) != digest for name, digest in digests.items()):
            return None
        return meta["facts"], {name: _map(folder / name, kind) for name, kind in kinds.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _map(path: Path, kind: type[np.generic]) -> NDArray[Any]:
    if not path.stat().st_size:
        return np.zeros(0, kind)
    # a plain view of the map: slices of np.memmap itself are many times slower to make
    return np.asarray(np.memmap(path, kind, mode="r"))


class ArrayWriter:
    """Writes a folder of arrays that nobody sees before `publish`; left without it, nothing remains.

    Raises OSError like the file system, on a full disk for example.
    """

    def __init__(self, folder: Path, kinds: Kinds) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._kinds = kinds
        self._work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        _sweep(self._work)
        self._files: dict[str, BinaryIO] = {name: (self._work / name).open("wb") for name in kinds}
        self._hashes = {name: hashlib.sha256() for name in kinds}

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            with suppress(OSError):
                file.close()
        shutil.rmtree(self._work, ignore_errors=True)

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Append to one of the arrays."""
        data = np.ascontiguousarray(array, self._kinds[name]).data
        self._files[name].write(data)
        self._hashes[name].update(data)

    def publish(self, facts: Facts) -> None:
        """Put the folder in its place, unless another process was faster; a damaged one is replaced."""
        for file in self._files.values():
            file.close()
        digests = {name: digest.hexdigest() for name, digest in self._hashes.items()}
        meta = {"layout": LAYOUT, "facts": facts, "sha256": digests}
        (self._work / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        for _ in range(_ATTEMPTS):
            with suppress(OSError):
                self._work.rename(self._folder)
                return
            if open_arrays(self._folder, self._kinds) is not None:
                return
            _set_aside(self._folder)
        self._work.rename(self._folder)


def _set_aside(folder: Path) -> None:
    """Take a folder out of the way in one move, so that nobody sees it half deleted."""
    with (
        suppress(OSError),
        tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as away,
    ):
        folder.rename(Path(away) / folder.name)


def _sweep(work: Path) -> None:
    """Delete what killed processes left beside `work`, whose own age tells the file system's clock."""
    now = work.stat().st_mtime
    for other in work.parent.glob(".*-*"):
        with suppress(OSError):
            touched = max(path.stat().st_mtime for path in (other, *other.iterdir()))
            if touched < now - STALE_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
