"""What a recipe's addresses point to, brought to the owner's machine as far as resolving needs it.

Of a base on a model hub the configuration and the tokenizer are fetched, and of the weights only their headers where
the hub tells their sha256: a large model is pinned in seconds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from trainchain.core.errors import TrainChainError
from trainchain.core.sources.address import is_address
from trainchain.core.sources.found import DATA_FILES, is_model_file
from trainchain.core.worker.volatile import lives

if TYPE_CHECKING:
    from trainchain.core.models import Base, FileRef
    from trainchain.core.sources.found import Found, FoundFile, Kind
    from trainchain.core.worker.cache import Cache

BROUGHT, FOLDING = ".brought-", ".folding-"
"""How the names begin of folders in the cache that hold links to its files under their own names, for a while."""
LONGEST_HEADER = 100_000_000
"""Bytes of a safetensors header, as the format limits it."""
SPLITS = {
    "train": ("train", "training"),
    "test": ("test",),
    "validation": ("validation", "valid", "val", "dev", "eval"),
}

Note = Callable[[str], None]


@dataclass(frozen=True)
class Data:
    """One file of rows: where it lies here, and what the recipe names of it."""

    path: Path
    source: str | None
    ref: FileRef


class Bringer:
    """Brings what addresses name into the cache of this machine; `note` tells a person what is fetched.

    The folders in which distant files lie under their own names last as long as this object.
    """

    def __init__(self, cache: Callable[[], Cache], note: Note) -> None:
        self._open_cache = cache
        self._note = note

    @cached_property
    def _cache(self) -> Cache:
        """Made when something is fetched: a recipe of folders and files leaves nothing behind."""
        return self._open_cache()

    def model(self, text: str, *, weights: bool) -> tuple[Path, Base]:
        """A model folder and its manifest. Without `weights` the numbers of a distant model's weights may be absent
        from the folder, which then holds their names and shapes alone.

        Raises TrainChainError: source.*, model.unreadable, cache.full, disk.full.
        """
        from trainchain.core.models import Base

        if not is_address(text):
            folder = _folder(text)
            files = [
                _local_ref(file, file.name)
                for file in sorted(folder.iterdir())
                if file.is_file() and is_model_file(file.name)
            ]
            return folder, Base(source=None, license=_license_of(folder), files=files)
        found = self._find(text, "model")
        refs = []
        folder = self.folder(self._cache.folder)
        for file in found.files:
            ref, path = self._pin(found, file, PurePosixPath(file.path).name, numbers=weights)
            if path is None:
                self._outline(found, file, folder / ref.name)
            else:
                _link(path, folder / ref.name)
            refs.append(ref)
        _check_index(found, folder)
        return folder, Base(source=found.source, license=found.license, files=sorted(refs, key=lambda ref: ref.name))

    def data(self, text: str, label: str, split: str | None, *, usual: Sequence[str]) -> list[Data]:
        """The files of rows that a path or an address names, in the order of their paths.

        Of an address that names several splits the one asked for is taken, else the first of `usual` there is.
        """
        if not is_address(text):
            local = _file(text)
            return [Data(local, None, _local_ref(local, f"{label}-0{local.suffix}"))]
        found = self._find(text, "data")
        chosen = _of_split(found, split, usual)
        if not chosen:
            raise TrainChainError(
                "data.empty", f"{text} has no files of rows.", hint=f"TrainChain reads {', '.join(DATA_FILES)}."
            )
        kept, folder = [], self.folder(self._cache.folder)
        for index, file in enumerate(chosen):
            ref, path = self._pin(found, file, f"{label}-{index}{PurePosixPath(file.path).suffix}", numbers=True)
            assert path is not None
            named = folder / f"{index}" / PurePosixPath(file.path).name
            named.parent.mkdir()
            _link(path, named)
            kept.append(Data(named, found.source, ref))
        return kept

    def folder(self, place: Path) -> Path:
        """A new folder in `place` that goes with this object."""
        made = scratch(place, BROUGHT)
        weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        return made

    def _find(self, text: str, kind: Kind) -> Found:
        from trainchain.core.sources.address import parse
        from trainchain.core.sources.table import source_of

        address = parse(text, kind)
        found = source_of(address).find(address, kind)
        size = sum(file.size for file in found.files)
        self._note(f"source   {found.source}  {len(found.files)} files, {size / 1e6:,.1f} MB")
        return replace(found, files=sorted(found.files, key=lambda file: file.path))

    def _pin(self, found: Found, file: FoundFile, name: str, *, numbers: bool) -> tuple[FileRef, Path | None]:
        """The file's manifest line, and where it lies here; None where only the header of its weights is wanted."""

        if file.sha256 is None:
            digest, path = self._cache.pin(found.source, file.path, file.size, file.state)
            return _ref(name, digest, path.stat().st_size, file.path), path
        ref: FileRef = _ref(name, file.sha256, file.size, file.path)
        if not numbers and file.path.endswith(".safetensors"):
            return ref, None
        return ref, self._cache.file(found.source, ref)

    def _outline(self, found: Found, file: FoundFile, target: Path) -> None:
        """A file of the weights' full length with its header alone: the rest are holes that nobody reads."""
        from trainchain.core.sources.table import source_of

        source = source_of(found.source)
        begin = source.head(found.source, file.path, 8)
        length = struct.unpack("<Q", begin)[0] if begin is not None and len(begin) == 8 else LONGEST_HEADER + 1
        header = source.head(found.source, file.path, 8 + length) if length <= min(LONGEST_HEADER, file.size) else None
        if header is None or len(header) != 8 + length:
            raise TrainChainError(
                "source.incomplete",
                f"{file.path} of {found.source} is not a whole safetensors file.",
                hint="Try again.",
            )
        with target.open("wb") as outline:
            outline.write(header)
            outline.truncate(file.size)


def scratch(place: Path, begin: str) -> Path:
    """A new folder in `place` whose name begins so. What killed processes left there of this kind goes."""
    sweep(place, begin)
    return Path(tempfile.mkdtemp(prefix=f"{begin}{os.getpid()}-", dir=place))


def sweep(place: Path, *begins: str) -> None:
    """Remove the scratch folders in `place` whose processes are gone."""
    for left in place.iterdir():
        for begin in begins:
            found = re.fullmatch(r"(\d{1,9})-[a-z0-9_]{8}", left.name.removeprefix(begin))
            if left.name.startswith(begin) and found and not lives(int(found[1])):
                shutil.rmtree(left, ignore_errors=True)


def _check_index(found: Found, folder: Path) -> None:
    """Raise `source.incomplete` where the weights' index names parts that the source has not."""
    from trainchain.core.sources.found import missing_shards

    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    try:
        document = json.loads(index.read_bytes())
    except (ValueError, RecursionError):
        document = None
    missing = missing_shards(document, [path.name for path in folder.iterdir()])
    if missing:
        raise TrainChainError(
            "source.incomplete",
            f"{found.source} has no {missing[0]}, which its index counts on ({len(missing)} parts are missing).",
            hint="Name a revision that is whole.",
        )


def _of_split(found: Found, split: str | None, usual: Sequence[str]) -> list[FoundFile]:
    splits = {file.path: split_of(file.path) for file in found.files}
    there = sorted({name for name in splits.values() if name})
    if split is not None:
        chosen = [file for file in found.files if splits[file.path] == split]
        if not chosen:
            raise TrainChainError(
                "source.incomplete",
                f"{found.source} has no files of the split {split!r}; it has {', '.join(there) or 'no splits'}.",
                hint="Leave `split:` out, or name a file or a pattern after the address.",
            )
        return chosen
    wanted = next((name for name in usual if name in there), None)
    return [file for file in found.files if wanted is None or splits[file.path] == wanted]


def split_of(path: str) -> str | None:
    """The split that a file's name or its folder's tells, as data sets on Hugging Face are laid out; None for none."""
    for part in reversed(PurePosixPath(path).parts):
        words = set(re.split(r"[^a-z]+", part.lower()))
        for name, synonyms in SPLITS.items():
            if words & set(synonyms):
                return name
    return None


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        hint = "Check the path."
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path.name) or not path.parent.exists():
            hint = "Check the path; a model on Hugging Face is written hf://org/name."
        raise TrainChainError("source.missing", f"`base_model`: {path} is not a folder.", hint=hint)
    return path


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise TrainChainError("source.missing", f"`datasets`: there is no file {path}.", hint="Check the path.")
    from trainchain.core.train.tables import check_suffix

    check_suffix(path, "`datasets`: ")
    return path


def _local_ref(path: Path, name: str) -> FileRef:
    from trainchain.core.digests import sha256_file

    return _ref(name, sha256_file(path), path.stat().st_size, None)


def _ref(name: str, digest: str, size: int, path: str | None) -> FileRef:
    from trainchain.core.models import FileRef, parse

    fields = {"name": name, "sha256": digest, "size": size, "path": path}
    try:
        return parse(FileRef, fields, code="source.unsafe", what=f"The file {(path or name)!r}")
    except TrainChainError as error:
        hint = "Give it a name of letters, digits, dots, dashes and underscores."
        raise TrainChainError(error.code, error.message, hint=hint) from None


def _license_of(folder: Path) -> str | None:
    """The licence that the front matter of the folder's own model card names."""
    import yaml

    from trainchain.core.sources.hf_listing import license_in

    try:
        text = (folder / "README.md").read_text(encoding="utf-8")[:20_000]
        found = re.match(r"---\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
        card = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return license_in(card) if isinstance(card, dict) else None


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
