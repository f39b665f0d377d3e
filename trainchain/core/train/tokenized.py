"""Tokenized documents as flat arrays, in memory or mapped from files. No torch."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainchain.core.models import Counts
from trainchain.core.train.arrays import Arrays, Facts, Kinds, open_arrays
from trainchain.core.train.rows import Document

Tokens = NDArray[np.int32]
Mask = NDArray[np.bool_]
Element = TypeVar("Element", bound=np.generic)

CODES = {"ids": "i", "masks": "B", "offsets": "q", "supervised": "i", "truncated": "q", "skipped": "q"}
KINDS: Kinds = {
    "ids": np.int32,
    "masks": np.bool_,
    "offsets": np.int64,
    "supervised": np.int32,
    "truncated": np.int64,
    "skipped": np.int64,
}
"""Ids and masks of all documents one after the other; `offsets` has where each begins and the last ends.

`truncated` and `skipped` hold two numbers for each such row: its file's index and its line.
"""
CHUNK = 1 << 20
"""Elements that a Collector holds of an array before it hands them on."""


class Place(NamedTuple):
    """A row: the index of its file among the sources, and its 1-based line."""

    source: int
    line: int


class Slices(Generic[Element]):
    """A flat array seen as one array a document; nothing is copied."""

    def __init__(self, flat: NDArray[Element], offsets: "memoryview[int]") -> None:
        self._flat = flat
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, at: int) -> NDArray[Element]:
        size = len(self)
        if not -size <= at < size:
            raise IndexError(f"document {at} of {size}")
        at %= size
        return self._flat[self._offsets[at] : self._offsets[at + 1]]

    def __iter__(self) -> Iterator[NDArray[Element]]:
        return (self[at] for at in range(len(self)))


@dataclass(frozen=True, eq=False)
class TokenizedData:
    """Documents with at least one supervised target, in file order, and what became of the other rows.

    The arrays may be mapped from files, and are read-only then. `source_rows` counts the rows read of each file.
    `folder` is where more that follows from these documents may be kept.
    """

    arrays: Arrays
    source_rows: Sequence[int]
    folder: Path | None = None

    @classmethod
    def of(cls, documents: Iterable[Document], sequence_len: int) -> "TokenizedData":
        """In memory, as if read from one file."""
        parts = Parts()
        collector = Collector(sequence_len, parts.write)
        collector.next_source()
        for line, document in enumerate(documents, 1):
            collector.add(document, line)
        facts = collector.close()
        return cls(parts.joined(), facts["rows"])

    @classmethod
    def mapped(cls, folder: Path) -> "TokenizedData | None":
        """What a Collector handed to an ArrayWriter; None where it is absent or damaged."""
        found = open_arrays(folder, KINDS)
        return None if found is None else cls(found[1], found[0]["rows"], folder.parent)

    def __len__(self) -> int:
        return len(self.supervised)

    @cached_property
    def ids(self) -> Slices[np.int32]:
        return Slices(self.arrays["ids"], self.arrays["offsets"].data)

    @cached_property
    def masks(self) -> Slices[np.bool_]:
        """Which tokens of a document the loss is taken on."""
        return Slices(self.arrays["masks"], self.arrays["offsets"].data)

    @cached_property
    def supervised(self) -> "memoryview[int]":
        """Each document's targets: masked tokens but for the first, which nothing predicts."""
        return self.arrays["supervised"].data

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """The documents' lengths in tokens."""
        return np.diff(self.arrays["offsets"])

    def lengths(self) -> list[int]:
        found: list[int] = self.sizes.tolist()
        return found

    def counts(self, documents: Sequence[int]) -> Counts:
        rows = np.asarray(documents, np.int64)
        return Counts(
            rows=len(rows),
            tokens=int(self.sizes[rows].sum()),
            supervised=int(self.arrays["supervised"][rows].sum(dtype=np.int64)),
        )

    @property
    def rows(self) -> int:
        return sum(self.source_rows)

    @property
    def truncated(self) -> int:
        return len(self.arrays["truncated"]) // 2

    @property
    def skipped(self) -> int:
        return len(self.arrays["skipped"]) // 2

    def truncated_at(self, limit: int) -> list[Place]:
        """The first rows that were cut."""
        return _places(self.arrays["truncated"], limit)

    def skipped_at(self, limit: int) -> list[Place]:
        """The first rows that hold no target; those that lost all theirs by the cut are in `truncated_at` too."""
        return _places(self.arrays["skipped"], limit)


def _places(flat: NDArray[Any], limit: int) -> list[Place]:
    return [Place(source, line) for source, line in flat[: 2 * limit].reshape(-1, 2).tolist()]


class Parts:
    """The arrays of a Collector in memory."""

    def __init__(self) -> None:
        self._parts: dict[str, list[NDArray[Any]]] = {name: [np.zeros(0, kind)] for name, kind in KINDS.items()}

    def write(self, name: str, part: NDArray[Any]) -> None:
        self._parts[name].append(part)

    def joined(self) -> Arrays:
        """All that was written; to be called once."""
        return {name: np.concatenate(self._parts.pop(name)) for name in KINDS}


class Collector:
    """Takes documents in file order, cuts them, and hands the arrays of KINDS on in chunks of bounded size."""

    def __init__(self, sequence_len: int, write: Callable[[str, NDArray[Any]], None]) -> None:
        self._sequence_len = sequence_len
        self._write = write
        self._rows: list[int] = []
        self._end = 0
        self._buffers = _buffers()
        self._buffers["offsets"].append(0)

    def next_source(self) -> None:
        """What is added from now on is of the next file."""
        self._rows.append(0)

    def add(self, document: Document, line: int) -> None:
        """Raises TypeError or OverflowError on an id that is no 32-bit number."""
        ids, mask = document
        buffers = self._buffers
        place = (len(self._rows) - 1, line)
        self._rows[-1] += 1
        if len(ids) > self._sequence_len:
            ids, mask = ids[: self._sequence_len], mask[: self._sequence_len]
            buffers["truncated"].extend(place)
        targets = sum(mask[1:])
        if targets:
            buffers["ids"].extend(ids)
            buffers["masks"].extend(mask)
            self._end += len(ids)
            buffers["offsets"].append(self._end)
            buffers["supervised"].append(targets)
        else:
            buffers["skipped"].extend(place)
        if max(map(len, buffers.values())) >= CHUNK:
            self._flush()

    def close(self) -> Facts:
        """Hand the rest on; the facts that belong to the arrays."""
        self._flush()
        return {"rows": self._rows}

    def _flush(self) -> None:
        for name, buffer in self._buffers.items():
            if buffer:
                self._write(name, np.frombuffer(buffer, KINDS[name]))
        self._buffers = _buffers()


def _buffers() -> "dict[str, array[int]]":
    return {name: array(code) for name, code in CODES.items()}
