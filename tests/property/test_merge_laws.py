from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.fixtures_merge import PLAIN_MERGE
from trainchain.core.adapter import Adapter
from trainchain.core.errors import TrainChainError
from trainchain.core.merge import lowrank
from trainchain.core.merge.gauge import aligned
from trainchain.core.merge.lowrank import Dense, Factors, Matrix, balanced, leading, stack
from trainchain.core.merge.robust import COPY
from trainchain.core.merge.updates import Merged, Update
from trainchain.core.merge.updates import merge as merge_by

METHODS = ("product-mean", "factor-mean")
MODULE = "base_model.model.layer"
A, B = MODULE + ".lora_A.weight", MODULE + ".lora_B.weight"
seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 4), st.integers(4, 20), st.integers(4, 20))


def adapter(random: np.random.Generator, size: tuple[int, int, int], *, fresh: bool = False) -> Adapter:
    r, rows, columns = size
    b = np.zeros((rows, r)) if fresh else random.normal(size=(rows, r))
    return {A: random.normal(size=(r, columns)).astype(np.float32), B: b.astype(np.float32)}


def updates(random: np.random.Generator, size: tuple[int, int, int], count: int) -> list[Update]:
    return [Update(f"{at:064x}", int(random.integers(1, 100)), adapter(random, size)) for at in range(count)]


def merge(method: str, start: Adapter, given_: list[Update]) -> Merged:
    """The mean alone, of every contribution as it is."""
    return merge_by(PLAIN_MERGE.model_copy(update={"method": method}), start, given_)


def product(tensors: Mapping[str, NDArray[Any]]) -> Matrix:
    return tensors[B].astype(np.float64) @ tensors[A].astype(np.float64)


def end(start: Adapter, change: Adapter) -> dict[str, Matrix]:
    return {name: start[name].astype(np.float64) + change[name] for name in start}


def off(found: Matrix, wanted: Matrix) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def distance_to(found: Factors, other: Adapter) -> float:
    return float(np.linalg.norm(found.b - other[B]) ** 2 + np.linalg.norm(found.a - other[A]) ** 2)


@settings(deadline=None, max_examples=60)
@given(seed=seeds, size=sizes, count=st.integers(1, 6))
def test_product_mean_is_the_best_low_rank_form_of_the_mean(seed: int, size: tuple[int, int, int], count: int) -> None:
    random = np.random.default_rng(seed)
    start, given_ = adapter(random, size), updates(random, size, count)
    total = sum(update.weight for update in given_)

    merged = merge("product-mean", start, given_)

    exact = sum(update.weight / total * product(end(start, update.delta)) for update in given_)
    u, s, vt = np.linalg.svd(exact, full_matrices=False)
    best = (u[:, : size[0]] * s[: size[0]]) @ vt[: size[0]]
    assert off(product(merged.adapter), best) < 1e-6
    lost = np.linalg.norm(s[size[0] :]) / np.linalg.norm(s)
    assert merged.truncation[MODULE] == pytest.approx(lost, abs=1e-7)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=60)
@given(seed=seeds, size=sizes, count=st.integers(1, 5))
def test_copies_merge_to_themselves(method: str, seed: int, size: tuple[int, int, int], count: int) -> None:
    random = np.random.default_rng(seed)
    start, change = adapter(random, size), adapter(random, size)

    merged = merge(method, start, [Update(f"{at:064x}", at + 1, change) for at in range(count)])

    assert off(product(merged.adapter), product(end(start, change))) < 1e-5
    assert merged.truncation[MODULE] < 1e-6


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=60)
@given(seed=seeds, size=sizes, data=st.data())
def test_arrival_order_changes_no_bit(method: str, seed: int, size: tuple[int, int, int], data: st.DataObject) -> None:
    random = np.random.default_rng(seed)
    start, given_ = adapter(random, size), updates(random, size, 4)

    one = merge(method, start, given_).adapter
    other = merge(method, start, data.draw(st.permutations(given_))).adapter

    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


@settings(deadline=None, max_examples=60)
@given(seed=seeds, size=sizes)
def test_turned_factors_of_the_same_product_merge_alike(seed: int, size: tuple[int, int, int]) -> None:
    random = np.random.default_rng(seed)
    start, given_ = adapter(random, size), updates(random, size, 3)
    turn, _ = np.linalg.qr(random.normal(size=(size[0], size[0])))
    ended = end(start, given_[0].delta)
    turned = {A: 2 * turn @ ended[A] - start[A], B: ended[B] @ turn.T / 2 - start[B]}

    one = merge("product-mean", start, given_).adapter
    other = merge("product-mean", start, [given_[0]._replace(delta=turned), *given_[1:]]).adapter

    assert off(product(other), product(one)) < 1e-5


@settings(deadline=None, max_examples=60)
@given(seed=seeds, size=sizes, scales=st.tuples(st.integers(-6, 1), st.integers(-3, 1)))
def test_of_all_factors_of_a_product_the_nearest_are_found(
    seed: int, size: tuple[int, int, int], scales: tuple[int, int]
) -> None:
    tensors = adapter(np.random.default_rng(seed), size)
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    like = Factors(wide[B] * 10.0 ** scales[0], wide[A] * 10.0 ** scales[1])

    found = aligned(balanced(leading(like, size[0])), like)

    assert off(found.b @ found.a, like.b @ like.a) < 1e-9
    assert off(np.vstack([found.b, found.a.T]), np.vstack([like.b, like.a.T])) < 1e-4


@settings(deadline=None, max_examples=60)
@given(seed=seeds, size=sizes, moved=st.floats(0.001, 0.3))
@example(seed=862, size=(4, 16, 6), moved=0.20271317330468208)
def test_factors_are_nearer_than_those_that_the_product_came_from(
    seed: int, size: tuple[int, int, int], moved: float
) -> None:
    random = np.random.default_rng(seed)
    one, other = adapter(random, size), adapter(random, size)
    like = {name: one[name] + np.float32(moved) * other[name] for name in one}
    came = Factors(one[B].astype(np.float64), one[A].astype(np.float64))

    found = aligned(balanced(leading(came, size[0])), Factors(like[B], like[A]))

    assert off(found.b @ found.a, product(one)) < 1e-9
    assert distance_to(found, like) <= distance_to(came, like) * (1 + 1e-3)


@settings(deadline=None, max_examples=60)
@given(seed=seeds, size=sizes, count=st.integers(3, 6))
def test_copies_merge_to_their_own_factors(seed: int, size: tuple[int, int, int], count: int) -> None:
    """Three or more: beside one or two the start is heard."""
    random = np.random.default_rng(seed)
    start, change = adapter(random, size), adapter(random, size)

    merged = merge("product-mean", start, [Update(f"{at:064x}", at + 1, change) for at in range(count)]).adapter

    for name, ended in end(start, change).items():
        np.testing.assert_allclose(merged[name], ended, atol=1e-3 * float(np.abs(ended).max()))


@settings(deadline=None, max_examples=60)
@given(seed=seeds, size=sizes, longer=st.floats(0.05, 20.0))
def test_one_who_came_by_other_factors_pulls_no_others(seed: int, size: tuple[int, int, int], longer: float) -> None:
    """Two of three came by the same factors: the median is theirs."""
    random = np.random.default_rng(seed)
    start, change = adapter(random, size), adapter(random, size)
    ended = end(start, change)
    turn, _ = np.linalg.qr(random.normal(size=(size[0], size[0])))
    other = {A: longer * turn @ ended[A] - start[A], B: ended[B] @ turn.T / longer - start[B]}
    given_ = [Update("0" * 64, 1, change), Update("1" * 64, 1, change), Update("2" * 64, 1, other)]

    merged = merge("product-mean", start, given_).adapter

    for name, tensor in ended.items():
        np.testing.assert_allclose(merged[name], tensor, atol=1e-3 * float(np.abs(tensor).max()))


@settings(deadline=None, max_examples=60)
@given(seed=seeds, size=sizes)
def test_a_product_of_zero_leaves_an_adapter_that_can_learn(seed: int, size: tuple[int, int, int]) -> None:
    random = np.random.default_rng(seed)
    start = adapter(random, size, fresh=True)
    still = {name: np.zeros_like(tensor) for name, tensor in start.items()}

    merged = merge("product-mean", start, [Update("0" * 64, 1, still)])

    np.testing.assert_allclose(merged.adapter[A], start[A], atol=1e-5)
    assert not merged.adapter[B].any()
    assert merged.truncation[MODULE] == 0


@pytest.mark.parametrize("others", [0, 1])
def test_one_alone_or_of_two_cannot_leave_a_module_that_never_learns_again(others: int) -> None:
    """The start is heard beside them: from an A of zeros, with zeros in B, nothing is ever learned."""
    random = np.random.default_rng(0)
    start = adapter(random, (4, 12, 12))
    change = {A: -start[A], B: random.normal(size=(12, 4)).astype(np.float32)}

    merged = merge("product-mean", start, [Update("f" * 64, 1, change), *updates(random, (4, 12, 12), others)]).adapter

    assert np.linalg.matrix_rank(merged[A]) == 4


def test_a_rank_deficient_product_keeps_full_rank_in_a() -> None:
    random = np.random.default_rng(0)
    start = adapter(random, (4, 12, 12), fresh=True)
    change = {A: np.zeros((4, 12), np.float32), B: np.zeros((12, 4), np.float32)}
    change[B][:, 0] = random.normal(size=12)

    merged = merge("product-mean", start, [Update("0" * 64, 1, change)]).adapter

    assert off(product(merged), product(end(start, change))) < 1e-6
    assert np.linalg.matrix_rank(merged[A]) == 4


def test_factor_mean_is_the_mean_of_the_factors() -> None:
    random = np.random.default_rng(0)
    start, given_ = adapter(random, (2, 6, 5)), updates(random, (2, 6, 5), 3)
    total = sum(update.weight for update in given_)

    merged = merge("factor-mean", start, given_)

    for name in start:
        mean = sum(update.weight / total * end(start, update.delta)[name] for update in given_)
        np.testing.assert_allclose(merged.adapter[name], mean, rtol=1e-6)
    assert merged.truncation[MODULE] > 0.1


def test_what_does_not_fit_is_refused() -> None:
    random = np.random.default_rng(0)
    start, (good, *_) = adapter(random, (2, 6, 5)), updates(random, (2, 6, 5), 2)
    nan = {name: np.full_like(tensor, np.nan) for name, tensor in good.delta.items()}
    wrong = [
        [],
        [good._replace(weight=0)],
        [good._replace(delta={A: good.delta[A]})],
        [good._replace(delta=adapter(random, (3, 6, 5)))],
        [good._replace(delta=nan)],
    ]

    for case in wrong:
        with pytest.raises(TrainChainError) as caught:
            merge("product-mean", start, case)
        assert caught.value.code == "merge.unmergeable"


@pytest.mark.parametrize("shared", [True, False])
@settings(deadline=None, max_examples=30)
@given(seed=seeds, size=st.tuples(st.integers(1, 4), st.integers(20, 50), st.integers(20, 50)))
def test_a_krylov_space_finds_what_a_dense_svd_finds(shared: bool, seed: int, size: tuple[int, int, int]) -> None:
    random = np.random.default_rng(seed)
    rank, out, into = size
    b, a = random.normal(size=(out, rank)), random.normal(size=(rank, into))
    parts = [
        Factors(shared * b + random.normal(size=b.shape), shared * a + random.normal(size=a.shape)) for _ in range(12)
    ]
    product = stack([1 / 12] * 12, parts)

    found = lowrank._krylov(product, rank)

    u, s, vt = np.linalg.svd(product.b @ product.a, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert off((found.u[:, :rank] * found.s[:rank]) @ found.vt[:rank], best) < 1e-6
    rest = found.rest + float(np.sum(found.s[rank:] ** 2))
    assert rest == pytest.approx(float(np.sum(s[rank:] ** 2)), rel=0.25)


def test_a_krylov_space_takes_what_it_cannot_split() -> None:
    nothing = Dense(np.zeros((30, 40)))
    same = Dense(np.eye(40))

    assert len(leading(nothing, 4).s) == 0
    np.testing.assert_allclose(leading(same, 4).s, np.ones(4))


@settings(deadline=None, max_examples=60)
@given(seed=seeds, size=sizes, factor=st.integers(2, 1000))
def test_only_the_weights_shares_count(seed: int, size: tuple[int, int, int], factor: int) -> None:
    random = np.random.default_rng(seed)
    start, given_ = adapter(random, size), updates(random, size, 4)

    one = merge("product-mean", start, given_).adapter
    other = merge("product-mean", start, [each._replace(weight=each.weight * factor) for each in given_]).adapter

    assert off(product(other), product(one)) < 1e-5


@settings(deadline=None, max_examples=60)
@given(seed=seeds, size=sizes)
def test_a_weight_counts_as_that_many_copies(seed: int, size: tuple[int, int, int]) -> None:
    random = np.random.default_rng(seed)
    start, (one, other) = adapter(random, size), updates(random, size, 2)
    copies = [one._replace(digest=f"{at:064x}", weight=1) for at in range(3)]

    heavy = merge("product-mean", start, [one._replace(weight=3), other._replace(weight=1)]).adapter
    many = merge("product-mean", start, [*copies, other._replace(weight=1)]).adapter

    assert off(product(many), product(heavy)) < 1e-5


@settings(deadline=None, max_examples=60)
@given(seed=seeds, size=sizes, rate=st.floats(0.1, 2.0), momentum=st.floats(0.0, 0.9))
def test_the_outer_step_is_a_heavy_ball(seed: int, size: tuple[int, int, int], rate: float, momentum: float) -> None:
    random = np.random.default_rng(seed)
    before, start, given_ = adapter(random, size), adapter(random, size), updates(random, size, 3)
    way = PLAIN_MERGE.model_copy(update={"outer_learning_rate": rate, "outer_momentum": momentum})

    found = merge_by(way, start, given_, before=before).adapter

    whole = merge("product-mean", start, given_).adapter
    for name in start:
        wanted = start[name] + rate * (whole[name] - start[name]) + momentum * (start[name] - before[name])
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, size=sizes, by=st.floats(3, 1000))
def test_a_clipped_update_counts_by_its_direction(seed: int, size: tuple[int, int, int], by: float) -> None:
    """What is longer than the median counts as if it were as long: how much longer it was does not matter."""
    random = np.random.default_rng(seed)
    start, given_ = adapter(random, size, fresh=True), updates(random, size, 3)
    given_ = [each._replace(delta={A: np.zeros_like(each.delta[A]), B: each.delta[B]}) for each in given_]
    large = given_[0]._replace(delta={A: given_[0].delta[A], B: np.float32(by) * given_[0].delta[B]})
    larger = given_[0]._replace(delta={A: given_[0].delta[A], B: np.float32(10 * by) * given_[0].delta[B]})
    way = PLAIN_MERGE.model_copy(update={"rule": "clip"})

    one, other = (merge_by(way, start, [each, *given_[1:]]) for each in (large, larger))

    assume(one.shares[large.digest].why == "clipped")  # it is the longest, and nobody's near copy
    assume(COPY not in {share.why for share in one.shares.values()})
    assert off(product(other.adapter), product(one.adapter)) < 1e-4
    assert one.shares[large.digest].scale > other.shares[large.digest].scale


@pytest.mark.parametrize("rule", ["coordinate-median", "trimmed-mean"])
@settings(deadline=None, max_examples=40)
@given(seed=seeds, size=sizes)
def test_coordinate_rules_take_copies_for_what_they_are(rule: str, seed: int, size: tuple[int, int, int]) -> None:
    random = np.random.default_rng(seed)
    start, change = adapter(random, size), adapter(random, size)
    wild = Update("f" * 64, 1, adapter(random, size))
    way = PLAIN_MERGE.model_copy(update={"rule": rule})

    merged = merge_by(way, start, [*(Update(f"{at:064x}", 1, change) for at in range(4)), wild])

    assert off(product(merged.adapter), product(end(start, change))) < 1e-4


@pytest.mark.parametrize("rule", ["none", "clip", "gate", "multi-krum", "coordinate-median", "trimmed-mean"])
@settings(deadline=None, max_examples=20)
@given(seed=seeds, size=sizes, count=st.integers(1, 6), data=st.data())
def test_no_rule_sees_who_came_first(
    rule: str, seed: int, size: tuple[int, int, int], count: int, data: st.DataObject
) -> None:
    random = np.random.default_rng(seed)
    start, given_ = adapter(random, size), updates(random, size, count)
    way = PLAIN_MERGE.model_copy(update={"rule": rule})

    one = merge_by(way, start, given_)
    other = merge_by(way, start, data.draw(st.permutations(given_)))

    assert all(one.adapter[name].tobytes() == other.adapter[name].tobytes() for name in start)
    assert one.shares == other.shares


@pytest.mark.parametrize("size", [(8, 5, 3), (8, 3, 5), (4, 1, 9), (4, 9, 1)])
@pytest.mark.parametrize("full", [True, False])
def test_a_rank_above_what_a_module_can_have_keeps_its_shapes(size: tuple[int, int, int], full: bool) -> None:
    """The next round starts from tensors of the same shapes, whatever the product's rank."""
    random = np.random.default_rng(0)
    start, given_ = adapter(random, size, fresh=True), updates(random, size, 2)
    for update in given_:
        update.delta[B][1:] *= full

    merged = merge("product-mean", start, given_)

    assert {name: tensor.shape for name, tensor in merged.adapter.items()} == {A: start[A].shape, B: start[B].shape}
    wanted = sum(update.weight * product(end(start, update.delta)) for update in given_)
    assert off(product(merged.adapter), wanted / sum(update.weight for update in given_)) < 1e-6
