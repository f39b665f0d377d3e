"""AdamW's moments of a round's contributions, merged for the next round to go on with. Needs numpy.

A shard that starts with new moments takes its first steps by the noise of single gradients, and forgets where the
training was going: of what many short rounds lose against one machine this is nearly all (docs/merging.md).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trainchain.core.adapter import Adapter
from trainchain.core.segments import Moments


class Adam(NamedTuple):
    """What the moments are of: the rates of their decay, and how many steps they have seen."""

    beta1: float
    beta2: float
    steps: int


def merge_moments(adam: Adam, weights: Sequence[float], moments: Sequence[Moments]) -> Moments:
    """The weighted mean of the first moments, none longer than their median; of the second the median, number by
    number.

    Nobody replays all of them, so none is believed alone. No number of the first is more than the second makes one
    learning rate of: else one moment out of place could move an adapter as far as it likes.
    """
    heard = [(weight, each) for weight, each in zip(weights, moments, strict=True) if weight > 0]
    total = sum(weight for weight, _ in heard)
    lengths = [_length(each) for _, each in heard]
    longest = float(np.median(lengths))
    scales = [longest / length if length > longest else 1.0 for length in lengths]
    parts = [weight / total * scale for (weight, _), scale in zip(heard, scales, strict=True)]
    m: Adapter = {}
    v: Adapter = {}
    for name in sorted(heard[0][1].m):
        middle = np.median([each.v[name].astype(np.float64) for _, each in heard], axis=0)
        mean = sum(part * each.m[name].astype(np.float64) for part, (_, each) in zip(parts, heard, strict=True))
        most = (1 - adam.beta1**adam.steps) * np.sqrt(middle / (1 - adam.beta2**adam.steps))
        m[name], v[name] = np.clip(mean, -most, most).astype(np.float32), middle.astype(np.float32)
    return Moments(m, v)


def _length(moments: Moments) -> float:
    return math.sqrt(sum(float(np.sum(np.square(tensor, dtype=np.float64))) for tensor in moments.m.values()))
