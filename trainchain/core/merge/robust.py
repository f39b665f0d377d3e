"""What a round does about contributions that are unlike the others: how much of each goes into the merge. Needs numpy.

A contribution is judged by its product alone, B·A at its end minus B·A at its start, over all modules: by the inner
products of all such updates, which take no dense matrix. So turning factors against each other changes no judgement.
A rule changes the merge, never the pay.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainchain.core.merge.lowrank import ROUNDING, Factors, Matrix
from trainchain.core.merge.methods import Wanted, product_mean

COPY = "a copy"
"""Why an update that is another one's copy does not have its whole weight."""
CLIPPED = "clipped"
ALIKE = 0.3
"""Two updates are one, and share the weight of the heavier, where their cosine lacks less than this share of what is
usual of one: honest updates of a round are about as unlike each other as any two of them."""
USUAL = 1 / 3
"""The quantile of the pairs that is usual: of four with one attacker, or of eight with two, half the pairs are honest,
and copies make few."""
FEW = 3
"""Below as many updates nothing tells the odd one from the others."""
AWAY, FAR = 0.5, 1.15
"""Times the round's median, of the cosine to the others and of the distance to them: honest updates of shuffled shards
differ little in either."""


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
    lengths = lengths_of(judged.inner)
    longest = float(np.median(lengths))
    scales = np.minimum(1.0, np.divide(longest, lengths, out=np.ones_like(lengths), where=lengths > 0))
    alike = _alike(judged.inner)
    shares = []
    for at, scale in enumerate(scales):
        group = np.flatnonzero(alike[at]).tolist()
        heaviest, together = max(judged.weights[k] for k in group), sum(judged.weights[k] for k in group)
        weight = heaviest / together if len(group) > 1 else 1.0
        shares.append(Share(weight, float(scale), COPY if len(group) > 1 else CLIPPED if scale < 1 else ""))
    return shares


def gate(judged: Judged) -> list[Share]:
    """`clip`, and out goes, one after the other, what is odd beside those that are left, copies taken as one.

    Away: a cosine to the mean of the others of no more than half the round's median, or of zero. Far: a mean distance
    to the others above `FAR` times the median (Krum's score, arXiv 1703.02757, with every other one a neighbour).
    Never more than half.
    """
    groups, clipped = _groups(judged.inner), clip(judged)
    parts, far = np.array([share.weight for share in clipped]), FAR
    if len(groups) < FEW == len(clipped):
        # Of three, two that are so much alike are copies, or honest beside one who is not: he then points away.
        groups, parts, far = np.eye(FEW), np.ones(FEW), math.inf
    means = groups / groups.sum(axis=1, keepdims=True) * [share.scale for share in clipped]
    inner = means @ judged.inner @ means.T
    weights = groups @ (np.array(judged.weights) * parts)
    spare = (len(clipped) - 1) // 2
    here, out = list(range(len(groups))), dict[int, str]()
    while len(here) >= FEW and (found := _oddest(inner[np.ix_(here, here)], weights[here], far)) is not None:
        members = np.flatnonzero(groups[here.pop(found[0])])
        if len(out) + len(members) > spare:
            break
        out |= dict.fromkeys(members.tolist(), found[1])
    # Whoever is left out leaves no trace: the others are clipped as if they had been alone.
    left = [at for at in range(len(clipped)) if at not in out]
    again = iter(clip(Judged([judged.weights[at] for at in left], judged.inner[np.ix_(left, left)])))
    return [Share(0.0, 1.0, out[at]) if at in out else next(again) for at in range(len(clipped))]


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
    alike = _canonical(ends, wanted)
    return Factors(np.median([each.b for each in alike], axis=0), np.median([each.a for each in alike], axis=0))


def trimmed_mean(ends: Sequence[Factors], wanted: Wanted) -> Factors:
    """The mean of each number without the quarter at either end (Yin et al. 2018, arXiv 1803.01498)."""
    alike, cut = _canonical(ends, wanted), len(ends) // 4

    def middle(values: Sequence[Matrix]) -> Matrix:
        found: Matrix = np.mean(np.sort(values, axis=0)[cut : len(values) - cut], axis=0)
        return found

    return Factors(middle([each.b for each in alike]), middle([each.a for each in alike]))


COORDINATES: dict[str, Callable[[Sequence[Factors], Wanted], Factors]] = {
    "coordinate-median": coordinate_median,
    "trimmed-mean": trimmed_mean,
}
"""These take the place of the mean, and of the weights."""


def _canonical(ends: Sequence[Factors], wanted: Wanted) -> list[Factors]:
    """Each product in the one form it has whoever sends it."""
    return [product_mean([1.0], [end], wanted)[0] for end in ends]


def lengths_of(inner: Matrix) -> Matrix:
    found: Matrix = np.sqrt(np.maximum(np.diagonal(inner), 0.0))
    return found


def _cosines(inner: Matrix) -> Matrix:
    lengths = lengths_of(inner)
    scale = np.outer(lengths, lengths)
    return np.divide(inner, scale, out=np.zeros_like(inner), where=scale > 0)


def _squares(inner: Matrix) -> Matrix:
    diagonal = np.diagonal(inner)
    found: Matrix = np.maximum(diagonal[:, None] + diagonal[None, :] - 2 * inner, 0.0)
    return found


def _alike(inner: Matrix) -> NDArray[np.bool_]:
    """Which updates are copies of which; each is one of itself."""
    itself = np.eye(len(inner), dtype=bool)
    apart = 1.0 - _cosines(inner)
    usual = float(np.quantile(apart[~itself], USUAL)) if len(inner) > 1 else 0.0
    found: NDArray[np.bool_] = (apart + ROUNDING < ALIKE * usual) | itself
    return found


def _groups(inner: Matrix) -> Matrix:
    """Copies, and copies of those, together: a row of ones and zeros for each group."""
    alike = _alike(inner).astype(np.float64)
    further = np.minimum(alike @ alike, 1.0)
    while not np.array_equal(further, alike):
        alike, further = further, np.minimum(further @ further, 1.0)
    found: Matrix = np.unique(alike, axis=0)[::-1]
    return found


def _oddest(inner: Matrix, weights: Matrix, far: float) -> tuple[int, str] | None:
    """The update that is the least like the others, and why, if any is odd."""
    cosines, distances = against_others(inner, weights), _distances(inner)
    if cosines.min() <= max(0.0, AWAY * float(np.median(cosines))):
        return int(cosines.argmin()), "points away"
    if distances.max() > far * float(np.median(distances)):
        return int(distances.argmax()), "far off"
    return None


def against_others(inner: Matrix, weights: Matrix) -> Matrix:
    """The cosine of each update to the weighted sum of the others."""
    sums = inner @ weights
    own = np.diagonal(inner) * weights
    others = float(weights @ sums) - 2 * weights * sums + weights * own
    lengths = np.sqrt(np.maximum(np.diagonal(inner), 0.0) * np.maximum(others, 0.0))
    found: Matrix = np.divide(sums - own, lengths, out=np.zeros(len(inner)), where=lengths > 0)
    return found


def _distances(inner: Matrix) -> Matrix:
    """The mean distance of each update to the others."""
    found: Matrix = np.sqrt(_squares(inner)).sum(axis=1) / (len(inner) - 1)
    return found
