"""The cheap checks of a contribution's bytes: what a delta must be before it may be merged and paid.

Imports numpy and safetensors. Nothing is believed: names, shapes and encoding come from the recipe, never the file.
"""

import math

import numpy as np

from trainchain.core.encodings import SPREAD, Decoded, Shapes, decode, encoded_size
from trainchain.core.errors import TrainChainError
from trainchain.core.models import ResolvedRecipe
from trainchain.core.schedule import learning_rate, steps_before
from trainchain.core.segments import Moments, State, Tensors

SPARE_BYTES = 4096
REACH = 3.0
"""Adam whose moments are new moves an element by at most about the learning rate a step; three times that is the bound
(design, 7.1)."""
SLACK = 1e-6
"""What rounding to fp32 may add."""
LENGTH = 2.0
"""Moments are means of gradients that are clipped: no longer than those, whatever their encoding adds."""


def delta_cap(recipe: ResolvedRecipe, shapes: Shapes) -> int:
    """The most bytes of a delta that are read: an honest one's, and some, so that what is wrong with more is named."""
    return encoded_size(recipe.merge.encoding, shapes, moments=recipe.merge.hands_on) + SPARE_BYTES


def reach(recipe: ResolvedRecipe, round: int, first: int = 1, last: int | None = None) -> float:
    """How far an element may move in a shard of `round`, whose learning rates are the schedule's; or in its steps from
    `first` to `last`.

    Moments that were handed on may know nothing yet of a gradient that sets in. By Cauchy and Schwarz Adam then moves
    by up to (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) learning rates a step besides: 7.3 with the usual betas.
    """
    steps, furthest = range(first, (last or recipe.steps) + 1), REACH
    rates = math.fsum(learning_rate(recipe, round, step) for step in steps)
    if steps_before(recipe, round):
        b1, b2 = recipe.training.adam_beta1, recipe.training.adam_beta2
        furthest += (1 - b1) / math.sqrt((1 - b2) * (1 - b1**2 / b2)) if b1**2 < b2 else math.inf
    return furthest * rates + SLACK


def read_delta(data: bytes, recipe: ResolvedRecipe, shapes: Shapes, round: int) -> Decoded:
    """Decode and check a delta of a shard of `round`, with its moments where the recipe hands them on.

    Raises what `decode` raises, and `delta.out_of_reach`.
    """
    found, bound = decode(data, recipe.merge.encoding, shapes, moments=recipe.merge.hands_on), reach(recipe, round)
    for name, tensor in found.delta.items():
        furthest = float(np.abs(tensor).max(initial=0.0))
        if furthest > bound * (1 + SPREAD):
            raise TrainChainError(
                "delta.out_of_reach",
                f"An element of {name} moved by {furthest:.4g}; the round's steps can move it by {bound:.4g}.",
            )
    if found.moments is not None:
        check_moments(found.moments, recipe.training.max_grad_norm)
    return found


def impossible(state: State, start: Tensors, recipe: ResolvedRecipe, round: int) -> bool:
    """Whether no training from `start` has such a state after its steps: so far it cannot have moved, its moments are
    longer than those of clipped gradients, or a square is negative."""
    if any(bool((tensor < 0).any()) for tensor in state.v.values()):
        return True
    bound = reach(recipe, round, 1, state.t) * (1 + SPREAD)
    if any(float(np.abs(tensor - start[name]).max(initial=0.0)) > bound for name, tensor in state.w.items()):
        return True
    try:
        check_moments(Moments(state.m, state.v), recipe.training.max_grad_norm)
    except TrainChainError:
        return True
    return False


def check_moments(moments: Moments, max_grad_norm: float) -> None:
    """Raises `delta.out_of_reach` where moments are not of gradients that are clipped."""
    first = math.sqrt(sum(float(np.sum(np.square(m, dtype=np.float64))) for m in moments.m.values()))
    second = math.sqrt(sum(float(np.sum(v, dtype=np.float64)) for v in moments.v.values()))
    for length, which in ((first, "first"), (second, "second")):
        if length > LENGTH * max_grad_norm:
            raise TrainChainError(
                "delta.out_of_reach",
                f"The {which} moment is of gradients {length:.4g} long; they are clipped at {max_grad_norm:.4g}.",
            )
