"""Comparing a replayed segment with the claimed one. Imports numpy.

By the moments first: what a segment added to the first moment is its gradients, which stay put where the parameters'
delta does not, since Adam divides by the root of the second moment and blows up noise where that is small.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainchain.core.segments import State, Tensors

_TINY = 1e-30
PLACE = 2.0**-7
"""The last place of a bf16 number, as the largest share of it that it can be."""


@dataclass(frozen=True)
class Distances:
    """How far a claimed end of a segment is from the replayed one, relative to what the replay changed.

    `gradients` of what was added to the first moment, `squares` to the second, `delta` of the parameters' change;
    `length` is by how much the parameters' changes differ in length; `furthest` the largest difference of one element.

    Of each number of a moment one place of bf16 does not count: ends are rounded, and the roundings of nearly equal
    numbers can be so far apart. What a segment adds to an old second moment is about as little.
    """

    gradients: float
    squares: float
    delta: float
    length: float
    furthest: float

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for value in vars(self).values())


def distances(start: State, claimed: State, replayed: State, *, beta1: float, beta2: float) -> Distances:
    """Raises ValueError where the three are not of the same tensors, or both ends of other steps.

    Sums are in float64. A replay that changed nothing makes any change of the claim infinitely far.
    """
    if claimed.t != replayed.t or start.t >= replayed.t:
        raise ValueError("a segment ends where it ends, and after it begins")
    if not start.w.keys() == claimed.w.keys() == replayed.w.keys():
        raise ValueError("the states are of other tensors")
    steps = replayed.t - start.t
    changed, claims = _length(replayed.w, start.w), _length(claimed.w, start.w)
    return Distances(
        gradients=_ratio(_moved(claimed.m, replayed.m), _innovation(replayed.m, start.m, beta1**steps)),
        squares=_ratio(_moved(claimed.v, replayed.v), _innovation(replayed.v, start.v, beta2**steps)),
        delta=_ratio(_length(claimed.w, replayed.w), changed),
        length=_ratio(abs(claims - changed), changed),
        furthest=max((_apart(claimed.w[name], replayed.w[name]) for name in start.w), default=0.0),
    )


def _apart(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.abs(_wide(one) - _wide(other)).max(initial=0.0))


def _wide(tensor: NDArray[np.float32]) -> NDArray[np.float64]:
    return tensor.astype(np.float64)


def _length(these: Tensors, those: Tensors) -> float:
    return math.sqrt(sum(float(np.square(_wide(these[name]) - _wide(those[name])).sum()) for name in these))


def _moved(these: Tensors, those: Tensors) -> float:
    """The length of the difference of two moments, but for a place of each number."""
    total = 0.0
    for name in these:
        one, other = _wide(these[name]), _wide(those[name])
        apart = np.abs(one - other) - PLACE * np.maximum(np.abs(one), np.abs(other))
        total += float(np.square(np.maximum(apart, 0.0)).sum())
    return math.sqrt(total)


def _innovation(end: Tensors, start: Tensors, kept: float) -> float:
    """The length of what a segment added to a moment, of which `kept` is left of where it began."""
    return math.sqrt(sum(float(np.square(_wide(end[name]) - kept * _wide(start[name])).sum()) for name in end))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > _TINY else (0.0 if part <= _TINY else math.inf)
