"""What a round does about contributions that are unlike the others: how much of each goes into the merge. Needs numpy.

A contribution is judged by its product alone, B·A at its end minus B·A at its start, over all modules: by the inner
products of all such updates, which take no dense matrix. So turning factors against each other changes no judgement.
A rule changes the merge, never the pay.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from trainchain.core.merge.lowrank import Factors, Matrix
from trainchain.core.merge.methods import Wanted, product_mean

ALIKE = 0.98
"""Cosine above which two updates are one: they share the weight of the heavier."""
FEW = 3
"""Below as many updates nothing tells the odd one from the others."""
FAR = 1.15
"""Times the usual mean distance to the others: honest updates of shuffled shards keep close to it."""


class Share(NamedTuple):
    """What becomes of one contribution: its weight is multiplied by `weight`, its update by `scale`; and why."""

    weight: float = 1.0
    scale: float = 1.0
    why: str = ""


class Judged(NamedTuple):
    """What a rule goes by: the contributions' weights, and the inner products of their updates (n, n)."""

    weights: Sequence[float]
    inner: Matrix


Rule = Callable[[Judged], list[Share]]


def inner_products(start: Factors, ends: Sequence[Factors]) -> Matrix:
    """<D_i, D_j> of D_i = B_i A_i - B_0 A_0, of one module."""
    every = [start, *ends]
    b, a = np.hstack([each.b for each in every]), np.vstack([each.a for each in every])
    cells = (b.T @ b) * (a @ a.T)
    edges = np.cumsum([0, *(each.rank for each in every)])[:-1]
    full: Matrix = np.add.reduceat(np.add.reduceat(cells, edges, axis=0), edges, axis=1)
    found: Matrix = full[1:, 1:] - full[1:, :1] - full[:1, 1:] + full[0, 0]
    return found


def plain(judged: Judged) -> list[Share]:
    """Everything as it is."""
    return [Share() for _ in judged.weights]


def clip(judged: Judged) -> list[Share]:
    """No update longer than the round's median; copies share one weight (Sybils gain nothing, FoolsGold's concern,
    arXiv 1808.04866)."""
    lengths = _lengths(judged.inner)
    longest = float(np.median(lengths))
    scales = np.minimum(1.0, np.divide(longest, lengths, out=np.ones_like(lengths), where=lengths > 0))
    cosines = _cosines(judged.inner)
    shares = []
    for at, scale in enumerate(scales):
        group = [other for other in range(len(scales)) if other == at or cosines[at, other] > ALIKE]
        heaviest, together = max(judged.weights[k] for k in group), sum(judged.weights[k] for k in group)
        weight = heaviest / together if len(group) > 1 else 1.0
        shares.append(Share(weight, float(scale), "a copy" if len(group) > 1 else "clipped" if scale < 1 else ""))
    return shares


def gate(judged: Judged) -> list[Share]:
    """`clip`, and out goes what points away from the others or lies far from them.

    Away: a cosine to the mean of the others of no more than half the round's median, or of zero. Far: a mean distance
    to the others above `FAR` times the median (Krum's score, arXiv 1703.02757, with every other one a neighbour).
    Never more than half.
    """
    shares = clip(judged)
    count = len(shares)
    if count < FEW:
        return shares
    scale = np.array([share.scale for share in shares])
    inner = judged.inner * np.outer(scale, scale)
    weights = np.array(judged.weights) * [share.weight for share in shares]
    cosines, far = _against_others(inner, weights), _distances(inner)
    odd = (cosines <= max(0.0, 0.5 * float(np.median(cosines)))) | (far > FAR * float(np.median(far)))
    worst = sorted(np.flatnonzero(odd), key=lambda at: (cosines[at], at))[: (count - 1) // 2]
    for at in worst:
        away = cosines[at] <= max(0.0, 0.5 * float(np.median(cosines)))
        shares[at] = Share(0.0, 1.0, "points away" if away else "far off")
    return shares


def multi_krum(judged: Judged) -> list[Share]:
    """`clip`, then the n - f updates with the least summed distance to their n - f - 2 nearest (Multi-Krum, Blanchard
    et al. 2017, arXiv 1703.02757), f a quarter of them."""
    shares = clip(judged)
    count = len(shares)
    faulty = count // 4
    if count < FEW or not faulty:
        return shares
    scale = np.array([share.scale for share in shares])
    squares = _squares(judged.inner * np.outer(scale, scale))
    nearest = np.sort(squares, axis=1)[:, 1 : max(2, count - faulty - 1)]
    scores = nearest.sum(axis=1)
    for at in sorted(range(count), key=lambda at: (-scores[at], at))[:faulty]:
        shares[at] = Share(0.0, 1.0, "Krum score")
    return shares


RULES: dict[str, Rule] = {"none": plain, "clip": clip, "gate": gate, "multi-krum": multi_krum}


def coordinate_median(ends: Sequence[Factors], wanted: Wanted) -> Factors:
    """The median of each number over the contributions (Yin et al. 2018, arXiv 1803.01498)."""
    alike = _alike(ends, wanted)
    return Factors(np.median([each.b for each in alike], axis=0), np.median([each.a for each in alike], axis=0))


def trimmed_mean(ends: Sequence[Factors], wanted: Wanted) -> Factors:
    """The mean of each number without the quarter at either end (Yin et al. 2018, arXiv 1803.01498)."""
    alike, cut = _alike(ends, wanted), len(ends) // 4

    def middle(values: Sequence[Matrix]) -> Matrix:
        found: Matrix = np.mean(np.sort(values, axis=0)[cut : len(values) - cut], axis=0)
        return found

    return Factors(middle([each.b for each in alike]), middle([each.a for each in alike]))


COORDINATES: dict[str, Callable[[Sequence[Factors], Wanted], Factors]] = {
    "coordinate-median": coordinate_median,
    "trimmed-mean": trimmed_mean,
}
"""These take the place of the mean, and of the weights."""


def _alike(ends: Sequence[Factors], wanted: Wanted) -> list[Factors]:
    """Each product in the one form it has whoever sends it."""
    return [product_mean([1.0], [end], wanted)[0] for end in ends]


def _lengths(inner: Matrix) -> Matrix:
    found: Matrix = np.sqrt(np.maximum(np.diagonal(inner), 0.0))
    return found


def _cosines(inner: Matrix) -> Matrix:
    lengths = _lengths(inner)
    scale = np.outer(lengths, lengths)
    return np.divide(inner, scale, out=np.zeros_like(inner), where=scale > 0)


def _squares(inner: Matrix) -> Matrix:
    diagonal = np.diagonal(inner)
    found: Matrix = np.maximum(diagonal[:, None] + diagonal[None, :] - 2 * inner, 0.0)
    return found


def _distances(inner: Matrix) -> Matrix:
    """The mean distance of each update to the others."""
    found: Matrix = np.sqrt(_squares(inner)).sum(axis=1) / (len(inner) - 1)
    return found


def _against_others(inner: Matrix, weights: Matrix) -> Matrix:
    """The cosine of each update to the weighted mean of the others."""
    found = np.zeros(len(inner))
    for at in range(len(inner)):
        others = weights.copy()
        others[at] = 0.0
        length = np.sqrt(max(inner[at, at], 0.0) * max(float(others @ inner @ others), 0.0))
        found[at] = float(inner[at] @ others) / length if length > 0 else 0.0
    return found
