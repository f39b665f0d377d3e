"""What the robust rules do to a round, whatever its numbers: updates share a direction, attackers do as they like."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainchain.core.merge.lowrank import Factors, Matrix
from trainchain.core.merge.robust import RULES, Judged, Share, inner_products

seeds = st.integers(0, 2**32 - 1)
OUT, IN, RANK = 30, 40, 4
HONEST = 0.45
"""The cosine between two honest updates."""


def start(random: np.random.Generator) -> Factors:
    return Factors(random.normal(size=(OUT, RANK)), random.normal(size=(RANK, IN)))


def honest(
    random: np.random.Generator, begin: Factors, count: int, *, length: float = 0.1, cosine: float = HONEST
) -> list[Factors]:
    """Ends of a round: what all have in common, and what each one's shard taught it alone."""
    shared = start(random)
    own = [start(random) for _ in range(count)]
    w, u = cosine**0.5, (1 - cosine) ** 0.5
    return [
        Factors(begin.b + length * (w * shared.b + u * o.b), begin.a + length * (w * shared.a + u * o.a)) for o in own
    ]


def judge(rule: str, begin: Factors, ends: list[Factors], weights: list[float] | None = None) -> list[Share]:
    return RULES[rule](Judged(weights or [1.0] * len(ends), inner_products(begin, ends)))


def scaled(begin: Factors, end: Factors, by: float) -> Factors:
    return Factors(begin.b + by * (end.b - begin.b), begin.a + by * (end.a - begin.a))


def product(factors: Factors) -> Matrix:
    return factors.b @ factors.a


@settings(deadline=None, max_examples=60)
@given(seed=seeds, count=st.integers(1, 8))
def test_inner_products_are_those_of_the_products(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    begin = start(random)
    ends = [start(random) for _ in range(count)]

    found = inner_products(begin, ends)

    dense = [product(end) - product(begin) for end in ends]
    wanted = [[float(np.vdot(one, other)) for other in dense] for one in dense]
    np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=60)
@given(seed=seeds, count=st.integers(3, 9), data=st.data())
def test_neither_order_nor_gauge_changes_a_judgement(rule: str, seed: int, count: int, data: st.DataObject) -> None:
    random = np.random.default_rng(seed)
    begin = start(random)
    ends = [scaled(begin, end, random.uniform(0.5, 2)) for end in honest(random, begin, count)]
    ends[0] = scaled(begin, ends[0], -5)
    order = data.draw(st.permutations(range(count)))
    turns = [random.normal(size=(RANK, RANK)) + 3 * np.eye(RANK) for _ in ends]
    turned = [Factors(end.b @ np.linalg.inv(turn), turn @ end.a) for end, turn in zip(ends, turns, strict=True)]

    one = judge(rule, begin, ends)
    other = judge(rule, begin, [turned[at] for at in order])

    for place, at in enumerate(order):
        assert other[place].why == one[at].why
        assert other[place].weight == pytest.approx(one[at].weight)
        assert other[place].scale == pytest.approx(one[at].scale, rel=1e-6)


@pytest.mark.parametrize("rule", ["none", "clip", "gate"])
@settings(deadline=None, max_examples=60)
@given(seed=seeds, count=st.integers(1, 16))
def test_an_honest_round_keeps_everybody(rule: str, seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    begin = start(random)

    shares = judge(rule, begin, honest(random, begin, count))

    assert all(share.weight == 1 and share.scale > 0.7 for share in shares)


Attack = Callable[[np.random.Generator, Factors, list[Factors]], Factors]


ATTACKS: dict[str, Attack] = {
    "sign flip": lambda random, begin, others: scaled(begin, others[-1], -1),
    "sign flip x10": lambda random, begin, others: scaled(begin, others[-1], -10),
    "gaussian": lambda random, begin, others: Factors(
        begin.b + 0.5 * random.normal(size=begin.b.shape), begin.a + 0.5 * random.normal(size=begin.a.shape)
    ),
    "free rider": lambda random, begin, others: begin,
    "turned free rider": lambda random, begin, others: Factors(begin.b * 10, begin.a / 10),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(("count", "bad"), [(4, 1), (8, 2)])
@settings(deadline=None, max_examples=25)
@given(seed=seeds)
def test_the_gate_leaves_out_who_attacks(attack: str, count: int, bad: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    begin = start(random)
    good = honest(random, begin, count - bad)
    ends = [ATTACKS[attack](random, begin, good) for _ in range(bad)] + good

    shares = judge("gate", begin, ends)

    assert all(share.weight == 0 and share.why for share in shares[:bad])
    assert sum(share.weight > 0 for share in shares) >= count - bad - 1


@settings(deadline=None, max_examples=60)
@given(seed=seeds, count=st.sampled_from([4, 8]), data=st.data())
def test_a_copy_drives_nobody_out(seed: int, count: int, data: st.DataObject) -> None:
    random = np.random.default_rng(seed)
    begin = start(random)
    good = honest(random, begin, count - count // 4)
    turn = random.normal(size=(RANK, RANK)) + 3 * np.eye(RANK)
    copies = [Factors(each.b @ np.linalg.inv(turn), turn @ each.a) for each in good[: count // 4]]

    shares = judge("gate", begin, data.draw(st.permutations([*copies, *good])))

    assert sorted(round(share.weight, 9) for share in shares) == [0.5] * (2 * len(copies)) + [1.0] * (
        count - 2 * len(copies)
    )


@settings(deadline=None, max_examples=60)
@given(seed=seeds, data=st.data())
def test_of_three_a_copy_drives_nobody_out(seed: int, data: st.DataObject) -> None:
    random = np.random.default_rng(seed)
    begin = start(random)
    good = honest(random, begin, 2, cosine=0.7)

    shares = judge("gate", begin, data.draw(st.permutations([good[0], *good])))

    assert sorted(share.weight for share in shares) == [0.5, 0.5, 1.0]


@settings(deadline=None, max_examples=60)
@given(seed=seeds, attack=st.sampled_from(sorted(ATTACKS)))
def test_who_is_left_out_leaves_no_trace(seed: int, attack: str) -> None:
    random = np.random.default_rng(seed)
    begin = start(random)
    good = honest(random, begin, 6)
    bad = [ATTACKS[attack](random, begin, good) for _ in range(2)]

    shares = judge("gate", begin, [*good, *bad])

    assert all(share.weight == 0 for share in shares[6:])
    for share, alone in zip(shares, judge("clip", begin, good), strict=False):
        assert (share.weight, share.why) == (alone.weight, alone.why)
        assert share.scale == pytest.approx(alone.scale)


@settings(deadline=None, max_examples=60)
@given(seed=seeds, attack=st.sampled_from(sorted(ATTACKS)), crew=st.sampled_from([(3, 1), (4, 1), (8, 2)]))
def test_the_honest_may_be_of_one_mind(seed: int, attack: str, crew: tuple[int, int]) -> None:
    """However alike they are, they are no copies of each other, and outweigh who is not."""
    random = np.random.default_rng(seed)
    begin = start(random)
    one = honest(random, begin, 1)[0]
    good = [
        Factors(one.b + 0.002 * random.normal(size=one.b.shape), one.a + 0.002 * random.normal(size=one.a.shape))
        for _ in range(crew[0] - crew[1])
    ]
    bad = [ATTACKS[attack](random, begin, good) for _ in range(crew[1])]

    shares = judge("gate", begin, [*bad, *good])

    assert all(share.weight == 0 for share in shares[: crew[1]])
    assert all(share.weight == 1 for share in shares[crew[1] :])


@settings(deadline=None, max_examples=60)
@given(seed=seeds, count=st.integers(1, 9))
def test_never_more_than_half_are_left_out(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    begin = start(random)
    ends = [scaled(begin, start(random), random.uniform(-5, 5)) for _ in range(count)]

    assert sum(share.weight == 0 for share in judge("gate", begin, ends)) <= (count - 1) // 2


@settings(deadline=None, max_examples=60)
@given(seed=seeds, copies=st.integers(1, 4))
def test_copies_have_the_weight_of_one(seed: int, copies: int) -> None:
    random = np.random.default_rng(seed)
    begin = start(random)
    good = honest(random, begin, 5)
    near = [scaled(begin, good[0], 1 + 0.01 * at) for at in range(1, copies + 1)]

    for rule in ("clip", "gate", "multi-krum"):
        shares = judge(rule, begin, [*near, *good])
        assert sum(share.weight for share in shares[: copies + 1]) <= 1 + 1e-9


@settings(deadline=None, max_examples=60)
@given(seed=seeds, by=st.floats(2, 1e6))
def test_nobody_is_longer_than_the_median(seed: int, by: float) -> None:
    random = np.random.default_rng(seed)
    begin = start(random)
    good = honest(random, begin, 5)
    inner = inner_products(begin, [*good[:4], scaled(begin, good[4], by)])

    shares = RULES["clip"](Judged([1.0] * 5, inner))

    lengths = np.sqrt(np.diagonal(inner))
    assert all(
        share.scale * length <= np.median(lengths) * (1 + 1e-9) for share, length in zip(shares, lengths, strict=True)
    )


def test_a_round_of_nothing_is_left_as_it_is() -> None:
    random = np.random.default_rng(0)
    begin = start(random)

    for rule in RULES:
        shares = judge(rule, begin, [begin] * 4)
        assert sum(share.weight for share in shares) > 0
