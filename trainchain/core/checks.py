"""The cheap checks of a contribution's bytes: what a delta must be before it may be merged and paid.

Imports numpy and safetensors. Nothing is believed: names, shapes and dtypes come from the recipe, never the file.
"""

import math

import numpy as np
import safetensors

from trainchain.core.errors import TrainChainError
from trainchain.core.models import ResolvedRecipe
from trainchain.core.schedule import learning_rate

HEADER_BYTES = 4096
BYTES_PER_TENSOR = 256
REACH = 3.0
"""Adam moves an element by at most about the learning rate a step; three times that is the bound (design, 7.1)."""
SLACK = 1e-6
"""What rounding to fp32 may add."""

Shapes = dict[str, tuple[int, ...]]


def delta_cap(shapes: Shapes) -> int:
    """The most bytes an honest fp32 delta can have, safetensors header included."""
    numbers = sum(int(np.prod(shape)) for shape in shapes.values())
    return 4 * numbers + HEADER_BYTES + BYTES_PER_TENSOR * len(shapes)


def reach(recipe: ResolvedRecipe, round: int) -> float:
    """How far an element may move in a shard of `round`, whose learning rates are the schedule's."""
    return REACH * math.fsum(learning_rate(recipe, round, step) for step in range(1, recipe.steps + 1)) + SLACK


def read_delta(data: bytes, shapes: Shapes, bound: float) -> dict[str, np.ndarray]:
    """Parse and check a delta; returns its fp32 tensors by name. `bound` is the round's `reach`.

    Raises `delta.not_safetensors`, `delta.missing_tensor`, `delta.extra_tensor`, `delta.wrong_dtype`,
    `delta.wrong_shape`, `delta.not_finite`, `delta.out_of_reach`.
    """
    try:
        found = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except (safetensors.SafetensorError, ValueError, OverflowError, UnicodeDecodeError) as error:
        raise TrainChainError(
            "delta.not_safetensors", f"The delta is not a safetensors file: {str(error)[:200]}."
        ) from None
    if missing := sorted(shapes.keys() - found.keys()):
        raise TrainChainError("delta.missing_tensor", f"The delta lacks the tensor {missing[0]!r}.")
    if extra := sorted(found.keys() - shapes.keys()):
        raise TrainChainError("delta.extra_tensor", f"The adapter has no tensor {extra[0][:200]!r}.")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(shapes):
        entry = found[name]
        if entry["dtype"] != "F32":
            raise TrainChainError("delta.wrong_dtype", f"{name} is {entry['dtype']}, not F32.")
        if tuple(entry["shape"]) != shapes[name]:
            raise TrainChainError("delta.wrong_shape", f"{name} is {tuple(entry['shape'])}, not {shapes[name]}.")
        tensor = np.frombuffer(bytes(entry["data"]), dtype="<f4").reshape(shapes[name])
        if not np.isfinite(tensor).all():
            raise TrainChainError("delta.not_finite", f"{name} holds NaN or infinity.")
        furthest = float(np.abs(tensor).max(initial=0.0))
        if furthest > bound:
            raise TrainChainError(
                "delta.out_of_reach",
                f"An element of {name} moved by {furthest:.4g}; the round's steps can move it by {bound:.4g}.",
            )
        tensors[name] = tensor
    return tensors
