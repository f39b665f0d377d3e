import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainchain.core.train import tokenized
from trainchain.core.train.arrays import ArrayWriter
from trainchain.core.train.rows import Document
from trainchain.core.train.tokenized import KINDS, Collector, Parts, Place, TokenizedData

LENGTH = 6
documents = st.lists(
    st.lists(st.tuples(st.integers(0, 500), st.booleans()), max_size=9).map(
        lambda pairs: ([token for token, _ in pairs], [mark for _, mark in pairs])
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=100)
@given(rows=documents, chunk=st.integers(1, 40))
def test_flat_arrays_hold_the_cut_documents_whatever_the_chunks(rows: list[Document], chunk: int) -> None:
    cut = [(ids[:LENGTH], mask[:LENGTH]) for ids, mask in rows]
    kept = [(ids, mask) for ids, mask in cut if any(mask[1:])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenized, "CHUNK", chunk)
        found = TokenizedData.of(rows, LENGTH)

    assert [ids.tolist() for ids in found.ids] == [ids for ids, _ in kept]
    assert [mask.tolist() for mask in found.masks] == [mask for _, mask in kept]
    assert list(found.supervised) == [sum(mask[1:]) for _, mask in kept]
    assert found.lengths() == [len(ids) for ids, _ in kept]
    assert len(found) == len(found.ids) == len(found.masks) == len(kept)
    assert found.rows == len(rows)
    lines = [line for line, (ids, _) in enumerate(rows, 1) if len(ids) > LENGTH]
    assert found.truncated_at(1000) == [Place(0, line) for line in lines]
    assert found.truncated == len(lines)
    assert found.skipped == len(rows) - len(kept)
    assert found.counts(range(len(kept))).tokens == sum(found.lengths())
    assert found.counts([]).model_dump() == {"rows": 0, "tokens": 0, "supervised": 0}


def test_a_row_that_is_cut_and_skipped_is_named_in_both() -> None:
    late = ([1] * 9, [False] * 8 + [True])
    found = TokenizedData.of([([1, 2], [False, True]), ([1], [True]), late], LENGTH)

    assert found.skipped_at(5) == [Place(0, 2), Place(0, 3)]
    assert found.skipped_at(1) == [Place(0, 2)]
    assert found.truncated_at(5) == [Place(0, 3)]


def test_documents_are_found_by_their_place() -> None:
    found = TokenizedData.of([([1, 2], [False, True]), ([3, 4, 5], [False, True, True])], LENGTH)

    assert found.ids[-1].tolist() == [3, 4, 5]
    assert found.ids[np.int64(0)].tolist() == [1, 2]
    assert type(found.supervised[0]) is int
    assert found.counts([1, 1, 0]).model_dump() == {"rows": 3, "tokens": 8, "supervised": 5}
    for at in (2, -3):
        with pytest.raises(IndexError):
            found.ids[at]


@pytest.mark.parametrize("token", [None, 2**31, "1"])
def test_an_id_that_is_no_32_bit_number_is_not_taken(token: object) -> None:
    with pytest.raises((TypeError, OverflowError)):
        TokenizedData.of([([1, token], [True, True])], LENGTH)  # type: ignore[list-item]


def rows_of(count: int) -> Iterator[Document]:
    return (([row % 500] * 100, [True] * 100) for row in range(count))


def test_memory_does_not_grow_with_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized, "CHUNK", 10_000)

    def peak(count: int) -> int:
        with ArrayWriter(tmp_path / str(count), KINDS) as writer:
            tracemalloc.start()
            collector = Collector(100, writer.write)
            collector.next_source()
            for line, document in enumerate(rows_of(count), 1):
                collector.add(document, line)
            facts = collector.close()
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            writer.publish(facts)
        found = TokenizedData.mapped(tmp_path / str(count))
        assert found is not None
        assert len(found.arrays["ids"]) == 100 * count
        return most

    assert peak(6_000) < 1.5 * peak(600)


def test_nothing_is_nothing() -> None:
    found = TokenizedData.of([], LENGTH)

    assert (len(found), found.rows, found.lengths(), list(found.ids)) == (0, 0, [], [])
    assert set(Parts().joined()) == set(KINDS)
