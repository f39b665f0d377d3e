"""What every kind of source offers, and what it tells of what it found. Standard library only."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from trainchain.core.errors import TrainChainError
from trainchain.core.sources.address import Address

Kind = Literal["model", "data"]

MODEL_FILES = (".safetensors", ".json", ".model", ".txt", ".jinja")
"""Endings of what a base is made of: weights, configuration, tokenizer. Never code, never pickles."""
DATA_FILES = (".parquet", ".jsonl", ".json", ".ndjson")
INDEX = "model.safetensors.index.json"
MOST_LISTED = 10_000
"""Entries of a source that are looked at; what has more is refused before more is asked for."""
MOST_KEPT = 1_000
"""Files of one model or data set."""
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_FORBIDDEN = re.compile(r'[\\:*?"<>|]')
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pkl")


@dataclass(frozen=True)
class FoundFile:
    """A file of a source. `sha256` is None where the source names none: it must be fetched to be pinned. `state` is
    then what the source changes with the bytes, an ETag, for there a file may be changed in place."""

    path: str
    size: int
    sha256: str | None
    state: str = ""


@dataclass(frozen=True)
class Found:
    """A source with its revision fixed. `page` is an address for people."""

    source: str
    license: str | None
    files: list[FoundFile]
    page: str | None


@dataclass(frozen=True)
class Pushed:
    """Where an adapter lies now. `created` is whether this call wrote anything."""

    url: str
    commit: str
    created: bool


class Source(Protocol):
    """One kind of source. Every method raises TrainChainError (source.*, disk.full) and nothing else."""

    def find(self, address: Address, kind: Kind) -> Found:
        """Resolve: fix the revision, list, keep what a model or data set is made of."""

    def fetch(self, source: str, path: str, partial: Path, *, size: int) -> None:
        """Bring one file of a pinned source to `partial`, going on where an earlier call broke off.

        Checks the size; the caller checks the hash. Raises `source.changed` where the size is another.
        """

    def head(self, source: str, path: str, count: int) -> bytes | None:
        """The first `count` bytes of a file, fewer if it is shorter; None where this kind cannot."""

    def push(self, folder: Path, target: Address, *, message: str, private: bool) -> Pushed:
        """Bring the files of `folder` to the target; the same bytes again write nothing."""


def check_names(paths: Iterable[str], where: str) -> None:
    """Raise `source.unsafe` for a name that could lead out of a folder, or that cannot be shown."""
    for path in paths:
        parts = path.split("/")
        plain = path.isprintable() and "\\" not in path and len(path) <= 512
        if not plain or any(part in ("", ".", "..") for part in parts):
            raise TrainChainError(
                "source.unsafe",
                f"{where} lists a file named {path[:200]!r}, which is no plain path in it.",
                hint="Nothing was fetched. Name another source, or tell its owner.",
            )


def check_kept(files: list[FoundFile], where: str) -> None:
    """Raise `source.unsafe` for files that cannot lie on every system's disk, twice the same name, or too many."""
    if len(files) > MOST_KEPT:
        raise too_many(where, MOST_KEPT)
    paths = {file.path for file in files}
    for path in paths:
        if _FORBIDDEN.search(path) or any(part != part.strip() for part in path.split("/")):
            raise TrainChainError(
                "source.unsafe",
                f"{where} has a file named {path!r}, which not every system can keep.",
                hint="Name the files that are wanted after the address, or rename this one.",
            )
    if len(paths) != len(files):
        raise TrainChainError("source.unsafe", f"{where} lists the same file twice.", hint="Name another source.")


def too_many(where: str, most: int) -> TrainChainError:
    return TrainChainError(
        "source.unsafe",
        f"{where} has more than {most:,} files; the rest was not asked for.",
        hint="Name a folder or a pattern after the address, so that fewer are meant.",
    )


def model_files(files: list[FoundFile], where: str) -> list[FoundFile]:
    """What of one folder's files is the model, judged by their names alone.

    Of weights that lie there twice (`consolidated.safetensors` beside shards) those that transformers loads are kept.
    Raises `model.unreadable` where there are no safetensors weights or no configuration.
    """
    names = {file.path.rpartition("/")[2]: file for file in files}
    weights = sorted(name for name in names if name.endswith(".safetensors") and not name.startswith("."))
    if not weights:
        others = sorted(name for name in names if name.endswith(_PICKLES))
        if others:
            raise TrainChainError(
                "model.unreadable",
                f"{where} has its weights only as {', '.join(others[:3])}{' ...' if len(others) > 3 else ''},"
                " which TrainChain does not load: a pickle can run code, and others are no weights to train.",
                hint="Name a repository or revision with .safetensors files, or load the model on a machine of your"
                " own, save it with save_pretrained(folder) and name the folder.",
            )
        raise TrainChainError(
            "model.unreadable",
            f"{where} has no .safetensors files.",
            hint="If they lie in a folder of it, add the folder's name to the address.",
        )
    if "config.json" not in names:
        adapter = "adapter_config.json" in names
        raise TrainChainError(
            "model.unreadable",
            f"{where} {'is an adapter, not a whole model' if adapter else 'has no config.json'}.",
            hint="Name the base model that it was trained on." if adapter else "Name a model that transformers loads.",
        )
    used = set(weights)
    if "model.safetensors" in names:
        used = {"model.safetensors"}
        names.pop(INDEX, None)  # which nobody reads then; it may count on parts that are not there
    elif INDEX in names:
        used = {name for name in weights if name.startswith("model-")} or used
    return [file for name, file in names.items() if (name in used if name in weights else is_model_file(name))]


def is_model_file(name: str) -> bool:
    """Whether a file of that name belongs to a model: no code, no pickles, nothing whose name no library looks for."""
    plain = name.endswith(".safetensors") or _PLAIN.fullmatch(name)
    return bool(plain) and name.endswith(MODEL_FILES) and not name.startswith(".")


def missing_shards(index: object, names: Iterable[str]) -> list[str]:
    """The files that a `model.safetensors.index.json` counts on and that are not among `names`.

    Raises `source.incomplete` for an index that is none.
    """
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise TrainChainError(
            "source.incomplete", "model.safetensors.index.json has no weight_map.", hint="Name another revision."
        )
    return sorted(set(shards.values()) - set(names))
