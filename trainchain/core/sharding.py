"""The data order as a pure function of recipe and shard: the same on any machine. Standard library only.

Documents are shuffled anew each epoch and packed into sequences; the epochs' sequences form one endless
stream, of which every shard of every round takes the next piece.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence


def order(seed: int, epoch: int, rows: int) -> list[int]:
    """The rows 0..rows-1 in the epoch's order: sorted by sha256 of `seed|epoch|row`."""
    prefix = hashlib.sha256(f"{seed}|{epoch}|".encode())

    def key(row: int) -> bytes:
        digest = prefix.copy()
        digest.update(str(row).encode())
        return digest.digest()

    return sorted(range(rows), key=key)


def pack(lengths: Sequence[int], sequence_len: int) -> list[list[int]]:
    """Positions of `lengths` grouped into sequences, next-fit: what no longer fits opens the next one."""
    sequences: list[list[int]] = []
    room = 0
    for position, length in enumerate(lengths):
        if not 1 <= length <= sequence_len:
            raise ValueError(f"document {position} has length {length}, outside 1..{sequence_len}")
        if length > room:
            sequences.append([])
            room = sequence_len
        sequences[-1].append(position)
        room -= length
    return sequences


def shard_range(round: int, shard: int, *, shards: int, steps: int, batch_size: int) -> tuple[int, int]:
    """Which sequences of the stream (from, up to) are trained in `round` (from 1), `shard` (from 0)."""
    index = (round - 1) * shards + shard
    size = steps * batch_size
    return index * size, (index + 1) * size


class DataOrder:
    """The endless stream of packed sequences over documents of these lengths; rows are positions in it."""

    def __init__(self, lengths: Sequence[int], *, sequence_len: int, seed: int) -> None:
        if not lengths:
            raise ValueError("there are no documents to order")
        self._lengths = lengths
        self._sequence_len = sequence_len
        self._seed = seed
        self._starts = [0]
        self._cache: dict[int, list[list[int]]] = {}

    def epoch(self, epoch: int) -> list[list[int]]:
        """The sequences of one epoch, each a list of rows; every row stands in exactly one of them."""
        if epoch not in self._cache:
            while len(self._cache) > 1:
                self._cache.pop(next(iter(self._cache)))
            rows = order(self._seed, epoch, len(self._lengths))
            packed = pack([self._lengths[row] for row in rows], self._sequence_len)
            self._cache[epoch] = [[rows[position] for position in sequence] for sequence in packed]
        return self._cache[epoch]

    def sequences(self, start: int, stop: int) -> list[list[int]]:
        """The sequences start..stop-1 of the stream."""
        while self._starts[-1] < stop:
            self._starts.append(self._starts[-1] + len(self.epoch(len(self._starts) - 1)))
        found: list[list[int]] = []
        epoch = bisect_right(self._starts, start) - 1
        while start + len(found) < stop:
            first = start + len(found) - self._starts[epoch]
            found += self.epoch(epoch)[first : stop - self._starts[epoch]]
            epoch += 1
        return found

    def shard(self, round: int, shard: int, *, shards: int, steps: int, batch_size: int) -> list[list[list[int]]]:
        """Per optimizer step, its `batch_size` consecutive sequences."""
        start, stop = shard_range(round, shard, shards=shards, steps=steps, batch_size=batch_size)
        found = self.sequences(start, stop)
        return [found[at : at + batch_size] for at in range(0, len(found), batch_size)]
