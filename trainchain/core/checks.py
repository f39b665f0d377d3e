"""The cheap checks of a contribution's bytes: what a delta must be before it may be merged and paid.

Imports numpy and safetensors. Nothing is believed: names, shapes and encoding come from the recipe, never the file.
"""

import math

import numpy as np

from trainchain.core.adapter import Adapter
from trainchain.core.encodings import SPREAD, Shapes, decode, encoded_size
from trainchain.core.errors import TrainChainError
from trainchain.core.models import ResolvedRecipe
from trainchain.core.schedule import learning_rate

SPARE_BYTES = 4096
REACH = 3.0
"""Adam moves an element by at most about the learning rate a step; three times that is the bound (design, 7.1)."""
SLACK = 1e-6
"""What rounding to fp32 may add."""


def delta_cap(encoding: str, shapes: Shapes) -> int:
    """The most bytes of a delta that are read: an honest one's, and some, so that what is wrong with more is named."""
    return encoded_size(encoding, shapes) + SPARE_BYTES


def reach(recipe: ResolvedRecipe, round: int) -> float:
    """How far an element may move in a shard of `round`, whose learning rates are the schedule's."""
    return REACH * math.fsum(learning_rate(recipe, round, step) for step in range(1, recipe.steps + 1)) + SLACK


def read_delta(data: bytes, encoding: str, shapes: Shapes, bound: float) -> Adapter:
    """Decode and check a delta. `bound` is the round's `reach`.

    Raises what `decode` raises, and `delta.out_of_reach`.
    """
    tensors = decode(data, encoding, shapes)
    for name, tensor in tensors.items():
        furthest = float(np.abs(tensor).max(initial=0.0))
        if furthest > bound * (1 + SPREAD):
            raise TrainChainError(
                "delta.out_of_reach",
                f"An element of {name} moved by {furthest:.4g}; the round's steps can move it by {bound:.4g}.",
            )
    return tensors
