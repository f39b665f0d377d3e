"""The ways to merge one module's LoRA factors. Needs numpy.

A method is a function from the factors of n adapters, whose product B·A already has its scale in it, and their weights,
to the factors of one; and how far their product is from what the method stands for, as a share of that.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from trainchain.core.errors import TrainChainError
from trainchain.core.merge.gauge import aligned
from trainchain.core.merge.lowrank import Dense, Factors, Leading, Matrix, balanced, distance, leading, stack


class Wanted(NamedTuple):
    """What a result is to be like: its rank, the factors it is to be near to, and for the methods that sparsify the
    share of numbers that stay and the number their choice follows from."""

    rank: int
    like: Factors | None = None
    density: float = 0.2
    seeds: Sequence[int] = ()


MergeMethod = Callable[[Sequence[float], Sequence[Factors], Wanted], tuple[Factors, float]]
"""(weights that sum to 1, factors, wanted) -> (factors, relative error)."""


def factor_mean(weights: Sequence[float], factors: Sequence[Factors], wanted: Wanted) -> tuple[Factors, float]:
    """The means of B and of A by themselves: FedAvg (arXiv 1602.05629) on LoRA, as FedIT does (arXiv 2305.05644).

    Cheap, and not the mean of B·A: the error is its distance from that.
    """
    if len({each.rank for each in factors}) > 1:
        ranks = sorted({each.rank for each in factors})
        raise TrainChainError(
            "merge.unmergeable",
            f"factor-mean cannot mix ranks ({', '.join(map(str, ranks))}): it averages factors number by number.",
            hint="--method product-mean merges adapters of any ranks.",
        )
    b, a = np.zeros_like(factors[0].b), np.zeros_like(factors[0].a)
    for weight, each in zip(weights, factors, strict=True):
        b += weight * each.b
        a += weight * each.a
    mean = Factors(b, a)
    return mean, distance(mean, stack(weights, factors))


def product_mean(weights: Sequence[float], factors: Sequence[Factors], wanted: Wanted) -> tuple[Factors, float]:
    """The best factors of the wanted rank of the mean of B·A (FlexLoRA's average, arXiv 2402.11505).

    A contribution enters the product by its own alone, so nobody gains or harms by turning his factors against each
    other. Of that product's factors those come out that are nearest to `wanted.like`. Where the product has less than
    the rank (B may still be 0), the strongest directions of that A that it lacks are kept with zero columns in B:
    training goes on.
    """
    found = leading(stack(weights, factors), wanted.rank)
    best = _filled(found, wanted)
    return aligned(best, wanted.like) if wanted.like else best, _lost(found)


def stacking(weights: Sequence[float], factors: Sequence[Factors], wanted: Wanted) -> tuple[Factors, float]:
    """All adapters side by side: exact, and of the sum of their ranks (FLoRA, arXiv 2409.05976)."""
    return stack(weights, factors), 0.0


def residual(weights: Sequence[float], factors: Sequence[Factors]) -> Factors:
    """What the mean of B·A has that `factor_mean` lacks, to be folded into the base (FedEx-LoRA, arXiv 2410.09432)."""
    mean, _ = factor_mean(weights, factors, Wanted(factors[0].rank))
    exact = stack(weights, factors)
    return Factors(np.hstack([exact.b, -mean.b]), np.vstack([exact.a, mean.a]))


def ties(weights: Sequence[float], factors: Sequence[Factors], wanted: Wanted) -> tuple[Factors, float]:
    """Trim, elect sign, merge (TIES, arXiv 2306.01708), on the products, at the wanted rank again.

    Of every product the `density` numbers of largest magnitude stay; where their weighted sum is positive the mean is
    taken over the positive ones, else over the negative ones.
    """
    total = np.zeros(factors[0].shape)
    for weight, each in zip(weights, factors, strict=True):
        total += weight * _trimmed(each, wanted.density)
    sums, counts = np.zeros_like(total), np.zeros_like(total)
    for weight, each in zip(weights, factors, strict=True):
        kept = _trimmed(each, wanted.density)
        agrees = (kept != 0) & (np.sign(kept) == np.sign(total))
        sums += np.where(agrees, weight * kept, 0.0)
        counts += weight * agrees
    return _low(np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0), wanted)


def dare(weights: Sequence[float], factors: Sequence[Factors], wanted: Wanted) -> tuple[Factors, float]:
    """Drop numbers of each product at random, scale up the rest, take the mean (DARE, arXiv 2311.03099).

    `density` of them stay. What is dropped follows from each adapter's seed: the same again gives the same.
    """
    total = np.zeros(factors[0].shape)
    for weight, each, seed in zip(weights, factors, wanted.seeds, strict=True):
        words = np.random.PCG64(seed).random_raw(total.size).reshape(total.shape)
        total += (weight / wanted.density) * np.where(words < wanted.density * 2.0**64, each.b @ each.a, 0.0)
    return _low(total, wanted)


METHODS: dict[str, MergeMethod] = {
    "product-mean": product_mean,
    "factor-mean": factor_mean,
    "stacking": stacking,
    "ties": ties,
    "dare": dare,
}


def _filled(found: Leading, wanted: Wanted) -> Factors:
    """`balanced`, with the wanted rank where there is a reference to take the missing rows from."""
    made, lacks = balanced(found), wanted.rank - len(found.s)
    if not lacks or wanted.like is None:
        return made
    rest = wanted.like.a - (wanted.like.a @ found.vt.T) @ found.vt
    _, s, vt = np.linalg.svd(rest, full_matrices=False)
    b, a = np.zeros((made.b.shape[0], wanted.rank)), np.zeros((wanted.rank, made.a.shape[1]))
    b[:, : made.rank], a[: made.rank] = made.b, made.a
    kept = min(lacks, len(s))  # fewer where the rank is above what the module has columns for
    a[made.rank : made.rank + kept] = s[:kept, None] * vt[:kept]
    return Factors(b, a)


def _low(dense: Matrix, wanted: Wanted) -> tuple[Factors, float]:
    found = leading(Dense(dense), wanted.rank)
    return balanced(found), _lost(found)


def _trimmed(factors: Factors, density: float) -> Matrix:
    product = factors.b @ factors.a
    stay = max(1, round(density * product.size))
    size = np.abs(product)
    least = np.partition(size, product.size - stay, axis=None)[product.size - stay]
    return np.where(size >= least, product, 0.0)


def _lost(found: Leading) -> float:
    return _share(found.rest**0.5, (found.rest + float(np.sum(found.s**2))) ** 0.5)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
