from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from trainchain.core.digests import canonical_json, sha256
from trainchain.core.sharding import DataOrder, order, pack

lengths = st.lists(st.integers(1, 32), min_size=1, max_size=60)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 5), rows=st.integers(0, 200))
def test_an_epoch_is_a_permutation(seed: int, epoch: int, rows: int) -> None:
    assert sorted(order(seed, epoch, rows)) == list(range(rows))


@settings(deadline=None, max_examples=60)
@given(lengths=lengths)
def test_packing_keeps_order_and_never_overflows(lengths: list[int]) -> None:
    starts = pack(lengths, 32)
    sums = [sum(lengths[first:last]) for first, last in pairwise(starts)]

    assert starts[0] == 0
    assert starts[-1] == len(lengths)
    assert all(0 < tokens <= 32 for tokens in sums)
    assert all(tokens + lengths[first] > 32 for tokens, first in zip(sums, starts[1:-1], strict=False))


@settings(deadline=None, max_examples=60)
@given(
    lengths=lengths, shards=st.integers(1, 5), steps=st.integers(1, 4), batch=st.integers(1, 4), seed=st.integers(0, 9)
)
def test_each_document_once_an_epoch_however_many_shards(
    lengths: list[int], shards: int, steps: int, batch: int, seed: int
) -> None:
    stream = DataOrder(lengths, sequence_len=32, seed=seed)
    first, second = stream.epoch(0), stream.epoch(1)
    rounds = -(-(len(first) + len(second)) // (shards * steps * batch))

    seen = [
        sequence
        for round in range(1, rounds + 1)
        for shard in range(shards)
        for step in stream.shard(round, shard, shards=shards, steps=steps, batch_size=batch)
        for sequence in step
    ]

    assert seen[: len(first)] == first
    assert seen[len(first) : len(first) + len(second)] == second
    assert sorted(row for sequence in first for row in sequence) == list(range(len(lengths)))


@settings(deadline=None, max_examples=60)
@given(lengths=lengths, start=st.integers(0, 300), size=st.integers(0, 50))
def test_a_shard_alone_sees_what_it_would_see_after_all_others(lengths: list[int], start: int, size: int) -> None:
    fresh = DataOrder(lengths, sequence_len=32, seed=1)
    used = DataOrder(lengths, sequence_len=32, seed=1)
    whole = used.sequences(0, start + size)

    assert fresh.sequences(start, start + size) == whole[start:]


def test_the_order_is_the_same_on_every_machine() -> None:
    lengths = [1 + (row * 7) % 29 for row in range(500)]
    sequences = DataOrder(lengths, sequence_len=64, seed=42).sequences(0, 400)

    assert list(order(0, 0, 8)) == ORDER
    assert sha256(canonical_json(sequences)) == GOLDEN


ORDER = [1, 0, 2, 3, 7, 5, 4, 6]
GOLDEN = "21b0b6fdc70071414fbb7accd8f4d0c45fdd909bd3c32e760c9da979efd636f8"
