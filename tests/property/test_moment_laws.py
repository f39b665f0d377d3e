"""What holds of merged moments, whatever a round's contributions say."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainchain.core.encodings import decode, encode, rank_one
from trainchain.core.merge.moments import Adam, merge_moments
from trainchain.core.segments import Moments

ADAM = Adam(0.9, 0.999, 40)
seeds = st.integers(0, 2**32 - 1)


def a_gradient(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Whose squares are of rank one, as second moments travel."""
    signs = random.choice([-1.0, 1.0], size=(rows, columns))
    return signs * np.outer(random.lognormal(size=rows), random.lognormal(size=columns))


def honest(random: np.random.Generator, gradient: np.ndarray) -> Moments:
    """After many steps with gradients that scatter about one."""
    v = np.square(gradient) * random.uniform(0.8, 1.2, gradient.shape) * (1 - ADAM.beta2**ADAM.steps) * 16
    m = gradient + 0.2 * np.abs(gradient) * random.normal(size=gradient.shape)
    return Moments({"a": m.astype(np.float32)}, {"a": v.astype(np.float32)})


def longest_step(found: Moments) -> float:
    """Of the next step, in learning rates, before it sees a gradient."""
    m = found.m["a"].astype(np.float64) / (1 - ADAM.beta1**ADAM.steps)
    v = found.v["a"].astype(np.float64) / (1 - ADAM.beta2**ADAM.steps)
    return float(np.max(np.abs(m) / np.sqrt(np.where(v > 0, v, np.inf)), initial=0.0))


@settings(deadline=None, max_examples=60)
@given(seed=seeds, count=st.integers(1, 6))
def test_copies_merge_to_themselves(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    one = honest(random, a_gradient(random, 3, 5))

    found = merge_moments(ADAM, [1.0] * count, [one] * count)

    np.testing.assert_allclose(found.m["a"], one.m["a"], rtol=1e-5)
    np.testing.assert_array_equal(found.v["a"], one.v["a"])


@settings(deadline=None, max_examples=60)
@given(seed=seeds, weights=st.lists(st.floats(0.1, 10), min_size=2, max_size=6))
def test_the_first_moment_is_the_weighted_mean_of_equally_long_ones(seed: int, weights: list[float]) -> None:
    random = np.random.default_rng(seed)
    gradient = a_gradient(random, 3, 5)
    every = [honest(random, gradient) for _ in weights]
    for each in every:
        each.m["a"][:] *= np.float32(np.linalg.norm(gradient)) / np.linalg.norm(each.m["a"])

    found = merge_moments(ADAM, weights, every)

    mean = np.average([each.m["a"].astype(np.float64) for each in every], axis=0, weights=weights)
    second = np.minimum(found.v["a"], rank_one(found.v)["a"])
    within = np.abs(mean) < (1 - ADAM.beta1**ADAM.steps) * np.sqrt(second / (1 - ADAM.beta2**ADAM.steps))
    np.testing.assert_allclose(found.m["a"][within], mean[within], rtol=1e-4)


@settings(deadline=None, max_examples=100)
@given(
    seed=seeds,
    m=st.sampled_from([0.0, 1e-3, 1.0, 1e6, -1e6]),
    v=st.sampled_from([0.0, 1e-20, 1.0, 1e12]),
    zero_rows=st.booleans(),
)
def test_one_liar_of_four_moves_no_number_further_than_one_learning_rate(
    seed: int, m: float, v: float, zero_rows: bool
) -> None:
    random = np.random.default_rng(seed)
    gradient = a_gradient(random, 4, 6)
    if zero_rows:  # where nobody has a gradient, a first moment of anybody's would be divided by nothing
        gradient[0] = 0.0
    every = [honest(random, gradient) for _ in range(3)]
    liar = Moments({"a": np.full((4, 6), m, np.float32)}, {"a": np.full((4, 6), v, np.float32)})

    found = merge_moments(ADAM, [1.0] * 4, [*every, liar])

    assert longest_step(found) <= 1 + 1e-4
    low, high = (pick([each.v["a"] for each in every], axis=0) for pick in (np.min, np.max))
    assert np.all((found.v["a"] >= low * 0.999) & (found.v["a"] <= high * 1.001))
    assert not zero_rows or not found.m["a"][0].any()


@settings(deadline=None, max_examples=60)
@given(seed=seeds, count=st.integers(1, 4), share=st.floats(1e-6, 1e6))
def test_one_number_of_one_liar_moves_nothing_far_as_it_travels(seed: int, count: int, share: float) -> None:
    """A row or a column that one number is nearly all of leaves next to nothing to the others that share it."""
    random = np.random.default_rng(seed)
    gradient = a_gradient(random, 8, 40)
    every = [honest(random, gradient) for _ in range(count)]
    every[0].v["a"][3, 5] = share * every[0].v["a"].sum()

    found, nothing = merge_moments(ADAM, [1.0] * count, every), {"a": np.zeros((8, 40), np.float32)}
    sent = decode(encode(nothing, "int4", found), "int4", {"a": (8, 40)}, moments=True).moments

    assert sent is not None
    assert longest_step(sent) <= 2.3


def test_moments_of_longer_gradients_than_there_can_be_are_cut() -> None:
    """Else those who train from them would be refused for what somebody else made up."""
    random = np.random.default_rng(0)
    one = honest(random, a_gradient(random, 3, 5))

    found = merge_moments(ADAM._replace(longest=0.5), [1.0, 1.0], [one, one])

    assert np.linalg.norm(found.m["a"]) <= 0.5 * (1 + 1e-6)
    assert np.sqrt(found.v["a"].sum()) <= 0.5 * (1 + 1e-6)
    assert longest_step(found) <= 1 + 1e-4


def test_whom_a_rule_leaves_out_is_not_heard() -> None:
    random = np.random.default_rng(0)
    one, other = (honest(random, a_gradient(random, 3, 5)) for _ in "ab")

    found = merge_moments(ADAM, [2.0, 0.0], [one, other])

    np.testing.assert_allclose(found.m["a"], one.m["a"], rtol=1e-5)
    np.testing.assert_array_equal(found.v["a"], one.v["a"])
