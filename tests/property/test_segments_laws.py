import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainchain.core.errors import TrainChainError
from trainchain.core.segments import (
    Moments,
    State,
    bf16,
    from_bf16,
    leaf,
    proof,
    read_state,
    segment_ends,
    start_leaf,
    start_state,
    state_bytes,
    state_digests,
    state_root,
    tensor_digest,
    verify,
)

LEASE = bytes(range(32))
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
leaves = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=20)


@given(leaves=leaves, data=st.data())
def test_every_leaf_can_be_proved_and_no_other(leaves: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(leaves) - 1))
    root, path = state_root(leaves), proof(leaves, index)

    assert verify(root, leaves[index], index, len(leaves), path)
    assert not verify(root, bytes(32), index, len(leaves), path) or leaves[index] == bytes(32)
    assert not verify(root, leaves[index], index, len(leaves), [*path, bytes(32)])
    assert not any(
        verify(root, leaves[index], other, len(leaves), path)
        for other in range(-1, len(leaves) + 1)
        if other != index and (not 0 <= other < len(leaves) or leaves[other] != leaves[index])
    )


@given(value=floats)
def test_bf16_takes_the_nearest_value_ties_to_even(value: float) -> None:
    array = np.array([value], np.float32)

    assert from_bf16(bf16(array)).tolist() == torch.from_numpy(array).to(torch.bfloat16).float().tolist()


@given(value=floats, other=floats)
def test_a_state_differs_by_any_bit_of_its_weights(value: float, other: float) -> None:
    a, b = ({"x": np.array([item], np.float32)} for item in (value, other))

    equal = struct.pack("<f", value) == struct.pack("<f", other)
    assert (tensor_digest(a, "fp32") == tensor_digest(b, "fp32")) is equal


def test_names_and_shapes_are_part_of_the_state() -> None:
    one = {"a": np.zeros((2, 3), np.float32)}

    digests = {
        tensor_digest(tensors, encoding)
        for tensors in (one, {"b": one["a"]}, {"a": one["a"].T}, {"a": one["a"][:1], "b": one["a"][1:]})
        for encoding in ("fp32", "bf16")
    }
    assert len(digests) == 8


def test_the_start_leaf_is_no_steps_and_zero_moments() -> None:
    w = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    zeros = {"a": np.zeros((2, 3), np.float32)}

    def of(index: int, t: int, m: dict[str, np.ndarray]) -> bytes:
        return leaf(LEASE, index, t, state_digests(State(t, w, m, zeros)))

    assert start_leaf(LEASE, w) == of(0, 0, zeros)
    assert len({of(i, t, m) for i in (0, 1) for t in (0, 1) for m in (w, zeros)}) == 8


def test_the_start_leaf_has_the_moments_that_were_handed_on() -> None:
    state = some_state(0)
    moments = Moments(state.m, state.v)

    assert start_leaf(LEASE, state.w, moments) == leaf(LEASE, 0, 0, state_digests(state))
    finer = Moments({name: tensor * np.float32(1.0001) for name, tensor in state.m.items()}, state.v)
    assert all(
        np.array_equal(start_state(state.w, finer).m[name], from_bf16(bf16(tensor))) for name, tensor in finer.m.items()
    )


@given(st.integers(1, 200), st.integers(1, 200))
def test_segments_cover_all_steps_and_none_twice(steps: int, k: int) -> None:
    ends = segment_ends(steps, k)

    assert ends[-1] == steps
    assert len(ends) == -(-steps // k)
    assert all(0 < after - before <= k for before, after in pairwise([0, *ends]))


def some_state(t: int = 3) -> State:
    random = np.random.default_rng(t)

    def tensors() -> dict[str, np.ndarray]:
        return {"x.a": random.normal(size=(2, 3)).astype(np.float32), "x.b": random.normal(size=4).astype(np.float32)}

    m, v = ({name: from_bf16(bf16(tensor)) for name, tensor in tensors().items()} for _ in "mv")
    return State(t, tensors(), m, v)


SHAPES = {"x.a": (2, 3), "x.b": (4,)}


def test_a_state_comes_back_from_its_bytes() -> None:
    state = some_state()

    again = read_state(state_bytes(state), 3, SHAPES)

    assert state_digests(again) == state_digests(state)
    assert state_bytes(again) == state_bytes(state)


def _code_or_digests(data: bytes) -> object:
    try:
        return state_digests(read_state(data, 3, SHAPES))
    except TrainChainError as error:
        return error.code if error.code == "state.invalid" else "another code"


@given(st.data())
def test_bytes_of_a_state_that_were_touched_are_refused_or_give_other_digests(data: st.DataObject) -> None:
    state = some_state()
    whole = bytearray(state_bytes(state))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(whole)))

    for touched in (bytes(whole), bytes(whole[:cut])):
        if touched == state_bytes(state):
            continue
        assert _code_or_digests(touched) not in (state_digests(state), "another code")


@pytest.mark.parametrize("shapes", [{"x.a": (2, 3)}, {"x.a": (3, 2), "x.b": (4,)}, {**SHAPES, "x.c": (1,)}])
def test_a_state_of_another_adapter_is_refused_by_name(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(TrainChainError, match=r"x\.[abc]") as caught:
        read_state(state_bytes(some_state()), 3, shapes)

    assert caught.value.code == "state.invalid"


def test_the_canonical_bytes_do_not_change() -> None:
    w = {"b": np.array([[1.5, -2.0]], np.float32), "a": np.array([0.1], np.float32)}

    assert start_leaf(LEASE, w).hex() == LEAF
    assert state_root([start_leaf(LEASE, w), LEASE, LEASE]) == ROOT


def test_what_is_not_finite_has_no_state() -> None:
    with pytest.raises(ValueError, match="not finite"):
        tensor_digest({"a": np.array([np.nan], np.float32)}, "bf16")


LEAF = "341c33ce31efe2b9eef2de8242c9a19a7379ca545656c7ef6f61b2219ffd9ce8"
ROOT = "0x04d6a7c3ddac5d510ab70ea25a7c2a4f4f7b2a67ea3e7d0fbeefd7a5dcf500e8"
