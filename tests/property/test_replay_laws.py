"""Distances between a claimed and a replayed end of a segment: relative, and blind to nothing that was changed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainchain.core.replays import Distances, distances
from trainchain.core.segments import State, Tensors, bf16, from_bf16

B1, B2 = 0.9, 0.999
seeds = st.integers(0, 2**32 - 1)


def tensors(seed: int, scale: float = 1.0) -> Tensors:
    random = np.random.default_rng(seed)
    return {
        name: (scale * random.standard_normal(shape)).astype(np.float32) for name, shape in (("a", (2, 5)), ("b", (3,)))
    }


def state(t: int, seed: int) -> State:
    return State(
        t, tensors(seed), tensors(seed + 1, 0.1), {name: np.square(x) for name, x in tensors(seed + 2, 0.1).items()}
    )


def moved(of: State, by: Tensors, part: str = "w") -> State:
    values = {name: getattr(of, part)[name] + by[name] for name in by}
    return State(of.t, **{**{kind: getattr(of, kind) for kind in "wmv"}, part: values})


def between(start: State, claimed: State, replayed: State) -> Distances:
    return distances(start, claimed, replayed, beta1=B1, beta2=B2)


@given(seeds)
def test_the_same_end_is_no_distance_away(seed: int) -> None:
    start, end = state(0, seed), state(5, seed + 9)

    assert between(start, end, end) == Distances(0.0, 0.0, 0.0, 0.0, 0.0)


@given(seeds, st.floats(1e-3, 1e3))
def test_distances_are_relative(seed: int, scale: float) -> None:
    """A cheat hides in no small step: what counts is the share of what the replay changed."""
    start, end, other = state(5, seed), state(10, seed + 9), state(10, seed + 5)
    here = between(start, other, end)

    def scaled(of: State) -> State:
        parts = ({name: x * np.float32(scale) for name, x in part.items()} for part in (of.w, of.m, of.v))
        return State(of.t, *parts)

    there = between(scaled(start), scaled(other), scaled(end))
    for name in ("gradients", "squares", "delta", "length"):
        assert np.isclose(getattr(here, name), getattr(there, name), rtol=1e-3, atol=1e-5)


@given(seeds, st.sampled_from("wmv"), st.floats(0.01, 10))
def test_whatever_is_changed_is_seen(seed: int, part: str, size: float) -> None:
    start, end = state(0, seed), state(5, seed + 9)
    claimed = moved(end, tensors(seed + 77, size), part)

    found = between(start, claimed, end)

    assert {"w": found.delta, "m": found.gradients, "v": found.squares}[part] > 0
    assert found.finite


def test_who_did_nothing_is_a_whole_change_away() -> None:
    start, end = state(0, 3), state(5, 12)
    lazy = State(5, start.w, end.m, end.v)

    found = between(start, lazy, end)

    assert found.delta == pytest.approx(1.0)
    assert found.length == pytest.approx(1.0)


def test_a_longer_step_in_the_same_direction_is_seen_by_its_length() -> None:
    start, end = state(0, 3), state(5, 12)
    longer = {name: start.w[name] + np.float32(1.1) * (end.w[name] - start.w[name]) for name in end.w}

    found = between(start, State(5, longer, end.m, end.v), end)

    assert found.length == pytest.approx(0.1, rel=1e-4)


def test_a_change_where_the_replay_changed_nothing_is_infinitely_far() -> None:
    start = state(0, 3)
    still = State(5, start.w, {n: np.float32(B1**5) * x for n, x in start.m.items()}, start.v)

    found = between(start, moved(still, tensors(1)), still)

    assert found.delta == float("inf")
    assert not found.finite


def test_other_tensors_or_steps_are_no_segment() -> None:
    start, end = state(0, 3), state(5, 12)

    with pytest.raises(ValueError, match="ends where it ends"):
        between(start, state(6, 1), end)
    with pytest.raises(ValueError, match="ends where it ends"):
        between(end, end, end)
    with pytest.raises(ValueError, match="other tensors"):
        between(State(0, {"a": start.w["a"]}, start.m, start.v), end, end)


@given(seeds, st.sampled_from("mv"))
def test_roundings_of_nearly_equal_moments_are_no_distance(seed: int, part: str) -> None:
    """An old second moment grows by less than a place in a segment: a flipped rounding is all that would count."""
    start, end = state(0, seed), state(5, seed + 9)
    random = np.random.default_rng(seed)
    rounded = {name: from_bf16(bf16(x)) for name, x in getattr(end, part).items()}
    nudged = {name: x * (1 + 1e-6 * random.uniform(-1, 1, x.shape)) for name, x in getattr(end, part).items()}
    other = {name: from_bf16(bf16(x.astype(np.float32))) for name, x in nudged.items()}

    one, two = (State(5, **{**{"w": end.w, "m": end.m, "v": end.v}, part: each}) for each in (rounded, other))

    assert between(start, one, two) == Distances(0.0, 0.0, 0.0, 0.0, 0.0)
