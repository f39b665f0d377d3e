"""Merging a round's contributions into the next adapter. Needs numpy; a method is a function in `METHODS`.

Sums run in float64 in the order of the contributions' digests, so that arrival order cannot matter; the
result is float32. Weights are the hub's pinned counts, never a worker's word.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainchain.core.adapter import A_SUFFIX, B_SUFFIX, Adapter
from trainchain.core.errors import TrainChainError

Matrix = NDArray[np.float64]
RANK_TOLERANCE = 1e-10
"""Singular values below this share of the largest are rounding, not signal."""


class Update(NamedTuple):
    """One accepted contribution: its delta's digest, its weight, its delta."""

    digest: str
    weight: int
    delta: Adapter


class Merged(NamedTuple):
    """The next adapter, and per module the relative distance of its B·A from the exact mean of B·A."""

    adapter: Adapter
    truncation: dict[str, float]


class Factors(NamedTuple):
    """One module's pair: B (out, r) and A (r, in)."""

    b: Matrix
    a: Matrix


MergeMethod = Callable[[Factors, Sequence[float], Sequence[Factors]], tuple[Factors, float]]
"""(start, weights that sum to 1, ends) -> (next factors, relative error against the mean product)."""


def factor_mean(start: Factors, weights: Sequence[float], ends: Sequence[Factors]) -> tuple[Factors, float]:
    """The means of B and of A by themselves: FedAvg on LoRA (FedIT, arXiv 2305.05644). Cheap, not exact."""
    b, a = np.zeros_like(start.b), np.zeros_like(start.a)
    for weight, end in zip(weights, ends, strict=True):
        b += weight * end.b
        a += weight * end.a
    left, right = _stack(weights, ends)
    exact = _norm(left, right)
    off = _norm(np.hstack([left, -b]), np.vstack([right, a]))
    return Factors(b, a), (off / exact if exact > 0 else 0.0)


def product_mean(start: Factors, weights: Sequence[float], ends: Sequence[Factors]) -> tuple[Factors, float]:
    """The best rank-r factors of the mean of B·A (FlexLoRA's average, arXiv 2402.11505), never formed dense.

    QR of both stacks, SVD of the small core, singular values shared evenly by B and A, then the rotation
    that brings A closest to the start's A. The start's, not the mean of the A: a contribution then enters by
    its product alone, so nobody gains or harms by turning his factors against each other. Where the product
    has less than rank r (B may still be 0), rows of the start's A that it lacks are kept with zero columns
    in B: training goes on.
    """
    rank = start.a.shape[0]
    left, right = _stack(weights, ends)
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    scale = float(np.linalg.norm(r_left) * np.linalg.norm(r_right))
    kept = min(rank, int(np.count_nonzero(s > RANK_TOLERANCE * max(s[0], RANK_TOLERANCE * scale))))
    root = np.sqrt(s[:kept])
    b = np.hstack([(q_left @ u[:, :kept]) * root, np.zeros((left.shape[0], rank - kept))])
    rows = vt[:kept] @ q_right.T
    a = np.vstack([root[:, None] * rows, _missing(start.a, rows, rank - kept)])
    turn_u, _, turn_vt = np.linalg.svd(start.a @ a.T)
    turn = turn_u @ turn_vt
    whole = float(np.linalg.norm(s))
    lost = float(np.linalg.norm(s[kept:])) / whole if kept and whole > 0 else 0.0
    return Factors(b @ turn.T, turn @ a), lost


METHODS: dict[str, MergeMethod] = {"product-mean": product_mean, "factor-mean": factor_mean}


def merge(method: str, start: Adapter, updates: Sequence[Update]) -> Merged:
    """The adapter of the next round. Raises TrainChainError merge.unmergeable on what does not fit."""
    if method not in METHODS:
        raise TrainChainError(
            "merge.unmergeable", f"There is no merge method {method!r}; there are: {', '.join(METHODS)}."
        )
    updates = sorted(updates, key=lambda update: (update.digest, update.weight))
    _check(start, updates)
    total = sum(update.weight for update in updates)
    weights = [update.weight / total for update in updates]
    adapter: Adapter = {}
    truncation: dict[str, float] = {}
    for a_name in sorted(name for name in start if name.endswith(A_SUFFIX)):
        module = a_name.removesuffix(A_SUFFIX)
        b_name = module + B_SUFFIX
        base = Factors(start[b_name].astype(np.float64), start[a_name].astype(np.float64))
        ends = [Factors(base.b + update.delta[b_name], base.a + update.delta[a_name]) for update in updates]
        merged, truncation[module] = METHODS[method](base, weights, ends)
        adapter[a_name] = merged.a.astype(np.float32)
        adapter[b_name] = merged.b.astype(np.float32)
    return Merged(dict(sorted(adapter.items())), truncation)


def _stack(weights: Sequence[float], ends: Sequence[Factors]) -> tuple[Matrix, Matrix]:
    """[w_1 B_1 ... w_n B_n] and [A_1; ...; A_n], whose product is the mean of B·A."""
    left = np.hstack([weight * end.b for weight, end in zip(weights, ends, strict=True)])
    return left, np.vstack([end.a for end in ends])


def _norm(left: Matrix, right: Matrix) -> float:
    """Frobenius norm of left·right from two small Gram matrices."""
    return float(np.sqrt(max(np.sum((left.T @ left) * (right @ right.T)), 0.0)))


def _missing(reference: Matrix, rows: Matrix, count: int) -> Matrix:
    """The `count` strongest directions of `reference` outside the span of the orthonormal `rows`."""
    rest = reference - (reference @ rows.T) @ rows
    _, s, vt = np.linalg.svd(rest, full_matrices=False)
    found: Matrix = s[:count, None] * vt[:count]
    return found


def _check(start: Adapter, updates: Sequence[Update]) -> None:
    if not updates or any(update.weight <= 0 for update in updates):
        raise TrainChainError("merge.unmergeable", "There is nothing to merge: every update needs a weight above zero.")
    modules = {name.removesuffix(A_SUFFIX) for name in start if name.endswith(A_SUFFIX)}
    if set(start) != {module + suffix for module in modules for suffix in (A_SUFFIX, B_SUFFIX)}:
        raise TrainChainError("merge.unmergeable", "The start adapter is not made of lora_A and lora_B pairs.")
    for update in updates:
        if set(update.delta) != set(start):
            raise TrainChainError(
                "merge.unmergeable", f"Update {update.digest} has other tensors than the start adapter."
            )
        for name, tensor in update.delta.items():
            if tensor.shape != start[name].shape or not np.isfinite(tensor).all():
                raise TrainChainError(
                    "merge.unmergeable", f"Update {update.digest}: {name} has another shape or is not finite."
                )
