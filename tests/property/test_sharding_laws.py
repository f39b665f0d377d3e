import json
from array import array
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainchain.core.digests import canonical_json, sha256
from trainchain.core.sharding import DataOrder, Epoch, order, pack, piece, spare_shards

GOLDEN_CASES = json.loads((Path(__file__).parents[1] / "golden" / "data_order.json").read_text(encoding="utf-8"))

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


shapes = st.fixed_dictionaries(
    {"shards": st.integers(1, 5), "steps": st.integers(1, 4), "batch_size": st.integers(1, 6)}
)


@settings(deadline=None, max_examples=100)
@given(lengths=lengths, shape=shapes, rounds=st.integers(1, 5), seed=st.integers(0, 2**63 - 1))
def test_over_all_shards_of_all_rounds_every_row_comes_once_an_epoch(
    lengths: list[int], shape: dict[str, int], rounds: int, seed: int
) -> None:
    stream = DataOrder(lengths, sequence_len=32, seed=seed)
    shards = [(round, shard) for round in range(1, rounds + 1) for shard in range(shape["shards"])]
    batches = [step for round, shard in shards for step in stream.shard(round, shard, **shape)]
    rows = [row for step in batches for sequence in step for row in sequence]
    epochs = [rows[at : at + len(lengths)] for at in range(0, len(rows), len(lengths))]

    assert len(batches) == rounds * shape["shards"] * shape["steps"]
    assert all(sorted(epoch) == list(range(len(lengths))) for epoch in epochs[:-1])
    assert len(set(epochs[-1])) == len(epochs[-1])


@settings(deadline=None, max_examples=100)
@given(lengths=lengths, shape=shapes, round=st.integers(1, 30), shard=st.integers(0, 4))
def test_no_shard_is_empty_and_no_step_of_it(lengths: list[int], shape: dict[str, int], round: int, shard: int) -> None:
    steps = DataOrder(lengths, sequence_len=32, seed=1).shard(round, shard % shape["shards"], **shape)

    assert len(steps) == shape["steps"]
    assert all(len(step) == shape["batch_size"] for step in steps)
    assert all(sequence for step in steps for sequence in step)
    assert all(sum(lengths[row] for row in sequence) <= 32 for step in steps for sequence in step)


@given(shards=st.integers(1, 40), rounds=st.integers(1, 12), share=st.floats(0, 1))
def test_every_piece_of_the_stream_is_one_shard_s_and_the_spare_ones_come_last(
    shards: int, rounds: int, share: float
) -> None:
    spares = spare_shards(share, shards)
    sizes = {"shards": shards, "rounds": rounds, "spares": spares}
    regular = [piece(round, shard, **sizes) for round in range(1, rounds + 1) for shard in range(shards)]
    spare = [piece(round, shard, **sizes) for round in range(1, rounds + 1) for shard in range(shards, shards + spares)]

    assert 0 <= spares <= shards
    assert regular == list(range(rounds * shards)), "with spares or without: each row has its turn"
    assert spare == list(range(rounds * shards, rounds * (shards + spares)))
    for shard in (-1, shards + spares):
        with pytest.raises(ValueError, match="has no shard"):
            piece(1, shard, **sizes)


@settings(deadline=None, max_examples=60)
@given(lengths=lengths, shape=shapes, round=st.integers(1, 3), spares=st.integers(1, 3))
def test_a_spare_shard_goes_on_where_the_job_s_data_end(
    lengths: list[int], shape: dict[str, int], round: int, spares: int
) -> None:
    stream = DataOrder(lengths, sequence_len=32, seed=1)
    size = shape["steps"] * shape["batch_size"]
    end = 3 * shape["shards"] * size
    found = [
        sequence
        for shard in range(shape["shards"], shape["shards"] + spares)
        for step in stream.shard(round, shard, rounds=3, spares=spares, **shape)
        for sequence in step
    ]

    first = end + (round - 1) * spares * size
    assert found == stream.sequences(first, first + spares * size)
    assert all(sum(lengths[row] for row in sequence) <= 32 for sequence in found)


@pytest.mark.parametrize(
    ("share", "shards", "spares"), [(0.1, 9, 0), (0.1, 10, 1), (0.1, 30, 3), (0.29, 100, 29), (0.7, 10, 7), (1.0, 4, 4)]
)
def test_a_share_of_the_shards_is_rounded_down(share: float, shards: int, spares: int) -> None:
    assert spare_shards(share, shards) == spares


@settings(deadline=None, max_examples=60)
@given(lengths=lengths, shape=shapes, asked=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), max_size=6))
def test_a_kept_epoch_and_the_order_of_asking_change_nothing(
    lengths: list[int], shape: dict[str, int], asked: list[tuple[int, int]]
) -> None:
    kept: dict[int, Epoch] = {}

    def keep(epoch: int, make: Callable[[], Epoch]) -> Epoch:
        if epoch not in kept:
            rows, starts = make()
            kept[epoch] = Epoch(memoryview(array("i", rows)), tuple(starts))
        return kept[epoch]

    def fresh(**options: Any) -> DataOrder:
        return DataOrder(lengths, sequence_len=32, seed=3, **options)

    used = fresh(keep=keep)
    for round, shard in ((round, shard % shape["shards"]) for round, shard in asked):
        wanted = fresh().shard(round, shard, **shape)
        assert used.shard(round, shard, **shape) == wanted
        assert fresh(keep=keep).shard(round, shard, **shape) == wanted


@pytest.mark.parametrize("length", [0, 33, -1])
def test_a_length_that_cannot_be_packed_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"document 1 has length {length}, outside 1..32"):
        pack([5, length], 32)
    with pytest.raises(ValueError, match="no documents"):
        DataOrder([], sequence_len=32, seed=0)


@pytest.mark.parametrize("case", GOLDEN_CASES["cases"], ids=lambda case: f"{case['rows']}-{case['seed']}")
def test_the_batches_of_all_shards_never_change(case: dict[str, Any]) -> None:
    first, factor, modulus = (case["length"][key] for key in ("first", "factor", "modulus"))
    lengths = [first + row * factor % modulus for row in range(case["rows"])]
    stream = DataOrder(lengths, sequence_len=case["sequence_len"], seed=case["seed"])
    shape = {key: case[key] for key in ("shards", "steps", "batch_size")}
    batches = [
        [stream.shard(round, shard, **shape) for shard in range(case["shards"])]
        for round in range(1, case["rounds"] + 1)
    ]

    assert sha256(canonical_json(batches)) == case["sha256"]


def test_the_order_is_the_same_on_every_machine() -> None:
    lengths = [1 + (row * 7) % 29 for row in range(500)]
    sequences = DataOrder(lengths, sequence_len=64, seed=42).sequences(0, 400)

    assert list(order(0, 0, 8)) == ORDER
    assert sha256(canonical_json(sequences)) == GOLDEN


ORDER = [1, 0, 2, 3, 7, 5, 4, 6]
GOLDEN = "21b0b6fdc70071414fbb7accd8f4d0c45fdd909bd3c32e760c9da979efd636f8"
