"""Draws: foreseen by nobody, repeated by everybody, as often as they should be and anywhere in a shard alike."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainchain.core.digests import sha256
from trainchain.core.draws import LEAST, draw, probability, secret_hash, trusted_first
from trainchain.core.segments import segment_ends, steps_at

words = st.binary(min_size=32, max_size=32)
SECRET = bytes(range(32))


def word(number: int) -> bytes:
    return bytes.fromhex(sha256(str(number).encode()))


@given(words, words, words, st.integers(1, 12), st.integers(1, 40), st.integers(1, 50))
def test_a_draw_is_a_function_of_what_it_is_given(
    secret: bytes, lease: bytes, root: bytes, at_risk: int, steps: int, size: int
) -> None:
    drawn = draw(secret, lease, root, at_risk=at_risk, steps=steps, segment_steps=size)

    assert drawn == draw(secret, lease, root, at_risk=at_risk, steps=steps, segment_steps=size)
    assert drawn is None or 0 <= drawn < -(-steps // size)


@given(words, words, words, st.integers(1, 40), st.integers(1, 50))
def test_the_segment_of_a_draw_is_the_one_that_the_drawn_step_is_in(
    secret: bytes, lease: bytes, root: bytes, steps: int, size: int
) -> None:
    """So a forged share of the steps is found as often as it is large, whatever the last segment's size."""
    step = draw(secret, lease, root, at_risk=1, steps=steps, segment_steps=1)
    segment = draw(secret, lease, root, at_risk=1, steps=steps, segment_steps=size)

    assert step is not None
    assert segment == step // size
    assert segment_ends(steps, size)[segment] > step >= segment * size


@given(st.integers(1, 12), st.integers(1, 200), st.integers(1, 200), st.data())
def test_no_choice_of_segments_to_forge_pays(at_risk: int, steps: int, size: int, data: st.DataObject) -> None:
    """Each segment is drawn as often as it has steps: what is saved is the probability that a drawn audit finds it."""
    ends = segment_ends(steps, size)
    forged = data.draw(st.sets(st.integers(0, len(ends) - 1)))
    saved = Fraction(sum(steps_at(i + 1, steps, size) - steps_at(i, steps, size) for i in forged), steps)
    found = Fraction(sum(step // size in forged for step in range(steps)), steps)

    assert saved == found
    assert saved <= found * probability(at_risk) * at_risk


def test_a_short_last_segment_is_drawn_as_seldom_as_it_is_little_work() -> None:
    found = Counter(draw(SECRET, word(n), word(-n), at_risk=1, steps=17, segment_steps=16) for n in range(10_000))

    assert found[0] + found[1] == 10_000
    assert abs(found[1] - 10_000 / 17) < 4 * (10_000 / 17) ** 0.5


@given(words, words, words, st.integers(1, 12))
def test_who_has_more_at_risk_is_drawn_no_more_often(secret: bytes, lease: bytes, root: bytes, at_risk: int) -> None:
    """One draw decides for every stake: what is drawn at a high one is drawn at any lower one, and the same segment."""
    more = draw(secret, lease, root, at_risk=at_risk + 1, steps=8, segment_steps=1)

    assert more is None or more == draw(secret, lease, root, at_risk=at_risk, steps=8, segment_steps=1)


@given(st.integers(1, 10**6))
def test_forging_any_share_loses_money(at_risk: int) -> None:
    """At the probability p, with L shards at risk, a forged share f gains f c and loses f p L: no c is above p L."""
    assert probability(at_risk) * at_risk >= (Fraction(3, 2) if at_risk > 1 else 1)


def test_the_first_shard_is_always_audited_and_the_tenth_seldom() -> None:
    assert probability(1) == 1
    assert probability(10) == LEAST == Fraction(3, 20)
    assert probability(4) == Fraction(3, 8)
    with pytest.raises(ValueError, match="at risk"):
        probability(0)


def test_draws_are_as_frequent_as_they_should_be_and_fall_anywhere() -> None:
    found = [draw(SECRET, word(n), word(-n), at_risk=10, steps=8, segment_steps=1) for n in range(20_000)]
    counts = Counter(found)

    drawn = len(found) - counts.pop(None)
    assert abs(drawn - 3_000) < 4 * 50.5, "four standard deviations"
    assert all(abs(counts[segment] - drawn / 8) < 4 * (drawn / 8) ** 0.5 for segment in range(8))


def test_another_secret_draws_otherwise() -> None:
    one = [draw(SECRET, word(n), word(-n), at_risk=3, steps=8, segment_steps=1) for n in range(200)]
    other = [draw(word(7), word(n), word(-n), at_risk=3, steps=8, segment_steps=1) for n in range(200)]

    assert one != other
    assert secret_hash(SECRET) != secret_hash(word(7))


@pytest.mark.parametrize("secret", [b"", SECRET[1:], SECRET + b"x"])
def test_a_secret_of_another_length_is_none(secret: bytes) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        secret_hash(secret)
    with pytest.raises(ValueError, match="32 bytes"):
        draw(secret, word(1), word(2), at_risk=1, steps=1, segment_steps=1)


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_there_is_no_draw_without_steps(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="step"):
        draw(SECRET, word(1), word(2), at_risk=1, steps=sizes[0], segment_steps=sizes[1])


@given(words, st.integers(0, 200))
def test_owner_and_operator_come_first_the_more_often_the_fewer_others_there_are(lease: bytes, others: int) -> None:
    assert trusted_first(SECRET, lease, 0)
    assert trusted_first(SECRET, lease, others) >= trusted_first(SECRET, lease, others + 1)


def test_owner_and_operator_come_first_every_second_time_where_many_have_earned_it() -> None:
    leases = [word(at) for at in range(4000)]
    for others, share in ((1, 0.95), (5, 0.75), (10, 0.5), (1000, 0.5)):
        assert sum(trusted_first(SECRET, lease, others) for lease in leases) / 4000 == pytest.approx(share, abs=0.03)
