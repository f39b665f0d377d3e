"""AdamW's moments of a round's contributions, merged for the next round to go on with. Needs numpy.

A shard that starts with new moments takes its first steps by the noise of single gradients, and forgets where the
training was going: of what many short rounds lose against one machine this is nearly all (docs/merging.md).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trainchain.core.encodings import rank_one
from trainchain.core.segments import Moments


class Adam(NamedTuple):
    """What the moments are of: the rates of their decay, how many steps they have seen, how long a gradient can be."""

    beta1: float
    beta2: float
    steps: int
    longest: float = math.inf


def merge_moments(adam: Adam, weights: Sequence[float], moments: Sequence[Moments]) -> Moments:
    """The weighted mean of the first moments, none longer than their median; of the second the median, number by
    number; neither of longer gradients than there can be.

    Nobody replays all of them, so none is believed alone. No number of the first is more than the second, also as it
    travels, makes one learning rate of: else one moment out of place could move an adapter as far as it likes, and
    nobody who trains honestly from it would come with what the checks let pass.
    """
    heard = [(weight, each) for weight, each in zip(weights, moments, strict=True) if weight > 0]
    total = sum(weight for weight, _ in heard)
    lengths = [_length(each) for _, each in heard]
    longest = min(float(np.median(lengths)), adam.longest)
    scales = [longest / length if length > longest else 1.0 for length in lengths]
    parts = [weight / total * scale for (weight, _), scale in zip(heard, scales, strict=True)]
    names = sorted(heard[0][1].m)
    v = {name: np.median([each.v[name].astype(np.float64) for _, each in heard], axis=0) for name in names}
    energy = sum(float(np.sum(middle)) for middle in v.values())
    if energy > adam.longest**2:
        v = {name: middle * (adam.longest**2 / energy) for name, middle in v.items()}
    sent, m = rank_one(v), {}
    for name in names:
        mean = sum(part * each.m[name].astype(np.float64) for part, (_, each) in zip(parts, heard, strict=True))
        least = np.minimum(v[name], sent[name])
        most = (1 - adam.beta1**adam.steps) * np.sqrt(least / (1 - adam.beta2**adam.steps))
        m[name] = np.clip(mean, -most, most).astype(np.float32)
    return Moments(m, {name: middle.astype(np.float32) for name, middle in v.items()})


def _length(moments: Moments) -> float:
    return math.sqrt(sum(float(np.sum(np.square(tensor, dtype=np.float64))) for tensor in moments.m.values()))
