"""The table of tolerances: total, ordered, blind to scale, and never open to what is not a number."""

import math
from dataclasses import replace
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainchain.core.models import Training
from trainchain.core.replays import Distances, distances
from trainchain.core.segments import State, Tensors
from trainchain.core.tolerances import TABLE, Tolerance, beyond, cold, entry, tolerance

KINDS = ("precision", "quantization", "attention", "adapter_path")
PINNED = [
    dict(zip(KINDS, values, strict=True))
    for values in product(*(get_args(Training.model_fields[kind].annotation) for kind in KINDS))
]
NAMES = ("gradients", "squares", "delta", "length")
CHEATS_THAT_SAVE = {"gradients": 0.18}
"""What every cheat is at least off by that saves a tenth of the work; `docs/tolerances.md`."""
sizes = st.floats(0, 10)
found = st.builds(Distances, sizes, sizes, sizes, sizes, sizes)
limits = st.builds(Tolerance, sizes, sizes, sizes, sizes)


def training(**pinned: Any) -> Training:
    return Training.model_construct(**pinned)


@pytest.mark.parametrize("pinned", PINNED, ids=lambda pinned: "-".join(pinned.values()))
def test_every_recipe_has_a_tolerance_that_honest_ends_pass_and_cheats_do_not(pinned: dict[str, str]) -> None:
    pins = training(**pinned)
    for is_cold in (True, False):
        limit = tolerance(pins, cold=is_cold)
        assert beyond(Distances(0, 0, 0, 0, 0), limit) == []
        assert all(0 < value < 1 for value in vars(limit).values())
        assert limit.gradients < CHEATS_THAT_SAVE["gradients"]
        assert beyond(Distances(0, 0, 0.1, 0.1, 0), limit)  # a change a tenth longer or shorter
    assert all(getattr(tolerance(pins, cold=True), n) >= getattr(tolerance(pins, cold=False), n) for n in NAMES)
    assert len(entry(pins).origin) > 20


def test_no_line_of_the_table_is_never_read() -> None:
    read = {id(entry(training(**pinned))) for pinned in PINNED}

    assert [line for line in TABLE if id(line) not in read] == []


def test_what_is_not_in_the_table_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no tolerance for"):
        tolerance(training(precision="fp8", quantization="none", attention="sdpa", adapter_path="fused"), cold=True)


@given(found, limits, st.sampled_from(NAMES), st.floats(0, 5))
def test_further_away_is_never_nearer(apart: Distances, limit: Tolerance, name: str, more: float) -> None:
    further = replace(apart, **{name: getattr(apart, name) + more})
    wider = replace(limit, **{name: getattr(limit, name) + more})

    assert set(beyond(apart, limit)) <= set(beyond(further, limit))
    assert set(beyond(apart, wider)) <= set(beyond(apart, limit))


@given(found, limits, st.sampled_from(NAMES), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_finite_is_beyond_every_tolerance(
    apart: Distances, limit: Tolerance, name: str, odd: float
) -> None:
    assert name in beyond(replace(apart, **{name: odd}), limit)


@given(st.integers(0, 2**32 - 1), st.integers(-20, 20), st.floats(0, 0.3), st.sampled_from(PINNED), st.booleans())
def test_a_verdict_does_not_depend_on_scale(
    seed: int, power: int, noise: float, pinned: dict[str, str], is_cold: bool
) -> None:
    random = np.random.default_rng(seed)
    start, end, off = (_state(random) for _ in range(3))
    claimed = State(5, *(_sum(getattr(end, kind), getattr(off, kind), noise) for kind in "wmv"))

    def verdict(by: float) -> list[str]:
        states = (
            State(each.t, *({n: np.float32(by) * x for n, x in getattr(each, kind).items()} for kind in "wmv"))
            for each in (State(0, start.w, start.m, start.v), claimed, end)
        )
        return beyond(distances(*states, beta1=0.9, beta2=0.999), tolerance(training(**pinned), cold=is_cold))

    assert verdict(1.0) == verdict(2.0**power)


def _state(random: np.random.Generator) -> State:
    return State(5, *({"a": random.standard_normal((3, 4)).astype(np.float32)} for _ in range(3)))


def _sum(one: Tensors, other: Tensors, share: float) -> Tensors:
    return {name: one[name] + np.float32(share) * other[name] for name in one}


@given(st.integers(0, 99), st.booleans())
def test_a_start_is_cold_by_the_recipe_and_the_place_and_not_by_what_is_claimed(start: int, fresh: bool) -> None:
    assert cold(start=start, fresh=fresh) is (fresh and start in (0, 1))
