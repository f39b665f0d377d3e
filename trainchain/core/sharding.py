"""The data order as a pure function of recipe and shard: the same on any machine. Standard library only.

Documents are shuffled anew each epoch and packed into sequences; the epochs' sequences form one endless
stream, of which every shard of every round takes the next piece, and then the spare shards of every round.
"""

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple


class Epoch(NamedTuple):
    """All rows in the epoch's order, and where its sequences begin among them; the last start is the rows' number."""

    rows: Sequence[int]
    starts: Sequence[int]


def order(seed: int, epoch: int, rows: int) -> "array[int]":
    """The rows 0..rows-1 in the epoch's order: sorted by sha256 of `seed|epoch|row`."""
    fresh = hashlib.sha256(f"{seed}|{epoch}|".encode()).copy
    keys = []
    for row in range(rows):
        digest = fresh()
        digest.update(b"%d" % row)
        keys.append(digest.digest())
    return array("i", sorted(range(rows), key=keys.__getitem__))


def pack(lengths: Sequence[int], sequence_len: int) -> "array[int]":
    """Where each sequence begins among documents of these lengths, and at last their number.

    Next-fit: what no longer fits opens the next sequence.
    """
    for position, length in enumerate(lengths):
        if not 1 <= length <= sequence_len:
            raise ValueError(f"document {position} has length {length}, outside 1..{sequence_len}")
    before = list(accumulate(lengths, initial=0))
    starts = array("i", [0])
    while starts[-1] < len(lengths):
        first = starts[-1]
        # no more than sequence_len documents fit, as none is empty
        last = min(first + sequence_len, len(lengths))
        starts.append(bisect_right(before, before[first] + sequence_len, first + 1, last + 1) - 1)
    return starts


def spare_shards(share: float, shards: int) -> int:
    """How many spare shards a round of `shards` has: that share of them, rounded down."""
    return int(share * shards + 1e-9)  # 0.29 x 100 is a little less than 29 in binary


def piece(round: int, shard: int, *, shards: int, rounds: int = 0, spares: int = 0) -> int:
    """Which piece of the stream is trained in `round` (from 1), `shard` (from 0).

    Those from `shards` on are the round's spares. Their pieces come after those of all `rounds`, so that no row is left
    out where they are not used.
    """
    if 0 <= shard < shards:
        return (round - 1) * shards + shard
    if not (shards <= shard < shards + spares and round <= rounds):
        raise ValueError(f"round {round} of {rounds} has no shard {shard}: there are {shards} and {spares} to spare")
    return rounds * shards + (round - 1) * spares + shard - shards


def _make(epoch: int, make: Callable[[], Epoch]) -> Epoch:
    return make()


class DataOrder:
    """The endless stream of packed sequences over documents of these lengths; rows are positions in it.

    `keep(epoch, make)` returns what `make()` does, and may have kept it from an earlier time.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        sequence_len: int,
        seed: int,
        keep: Callable[[int, Callable[[], Epoch]], Epoch] = _make,
    ) -> None:
        if not len(lengths):
            raise ValueError("there are no documents to order")
        self._lengths = lengths
        self._sequence_len = sequence_len
        self._seed = seed
        self._keep = keep
        self._starts = [0]
        self._cache: dict[int, Epoch] = {}

    def epoch(self, epoch: int) -> list[list[int]]:
        """The sequences of one epoch, each a list of rows; every row stands in exactly one of them."""
        return self._cut(epoch, 0, self.size(epoch))

    def size(self, epoch: int) -> int:
        """How many sequences the epoch has."""
        return len(self._epoch(epoch).starts) - 1

    def sequences(self, start: int, stop: int) -> list[list[int]]:
        """The sequences start..stop-1 of the stream."""
        while self._starts[-1] < stop:
            self._starts.append(self._starts[-1] + self.size(len(self._starts) - 1))
        found: list[list[int]] = []
        epoch = bisect_right(self._starts, start) - 1
        while start + len(found) < stop:
            first = start + len(found) - self._starts[epoch]
            found += self._cut(epoch, first, min(stop - self._starts[epoch], self.size(epoch)))
            epoch += 1
        return found

    def shard(
        self, round: int, shard: int, *, shards: int, steps: int, batch_size: int, rounds: int = 0, spares: int = 0
    ) -> list[list[list[int]]]:
        """Per optimizer step, its `batch_size` consecutive sequences. `rounds` and `spares` place the spare shards."""
        size = steps * batch_size
        start = piece(round, shard, shards=shards, rounds=rounds, spares=spares) * size
        found = self.sequences(start, start + size)
        return [found[at : at + batch_size] for at in range(0, len(found), batch_size)]

    def _cut(self, epoch: int, first: int, last: int) -> list[list[int]]:
        rows, starts = self._epoch(epoch)
        return [list(rows[starts[at] : starts[at + 1]]) for at in range(first, last)]

    def _epoch(self, epoch: int) -> Epoch:
        if epoch not in self._cache:
            while len(self._cache) > 1:
                self._cache.pop(next(iter(self._cache)))
            self._cache[epoch] = self._keep(epoch, lambda: self._ordered(epoch))
        return self._cache[epoch]

    def _ordered(self, epoch: int) -> Epoch:
        rows = order(self._seed, epoch, len(self._lengths))
        return Epoch(rows, pack([self._lengths[row] for row in rows], self._sequence_len))
