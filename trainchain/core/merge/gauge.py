"""Of the endlessly many factors of one product those that are nearest to given ones. Needs numpy.

Training goes on best from factors that look as those did which AdamW's moments were gathered with (docs/merging.md).
"""

import numpy as np

from trainchain.core.merge.lowrank import Factors, Matrix

STEPS = 50
SETTLED = 1e-6
"""A step that brings them nearer by less than this share of the distance is the last."""
LONGEST = 0.5
"""A step's spectral norm at most: I + X can then be inverted."""
SHORTEST = 1e-3


def aligned(factors: Factors, like: Factors) -> Factors:
    """The same product, all numbers of B and A together as near to `like`'s as an invertible matrix between the two
    brings them: Procrustes' problem over GL(r). Other shapes are left as they are.

    Begins with one scale and the rotation that then brings both closest, and goes on by Gauss-Newton: to first order
    the best step from (B, A) to (B(I + X), (I + X)^-1 A) solves a Sylvester equation of two symmetric matrices. It all
    happens in the spans of B and A, on matrices of r by r.
    """
    if like.rank != factors.rank or like.shape != factors.shape or not (like.a.any() and factors.a.any()):
        return factors
    basis_b, b = np.linalg.qr(factors.b)
    basis_a, a = np.linalg.qr(factors.a.T)
    want_b, want_a = basis_b.T @ like.b, like.a @ basis_a
    longer = np.linalg.norm(like.a) / np.linalg.norm(a)
    u, _, vt = np.linalg.svd(longer * want_a @ a + want_b.T @ b / longer)
    turn, back = longer * (u @ vt), (u @ vt).T / longer
    b, a = b @ back, turn @ a.T
    off = _off(b - want_b, a - want_a)
    for _ in range(STEPS):
        step = _step(b, a, want_b - b, a - want_a)
        share = min(1.0, LONGEST / max(float(np.linalg.norm(step, 2)), LONGEST))
        before = off
        while share > SHORTEST:
            by = np.eye(len(step)) + share * step
            next_b, next_a = b @ by, np.linalg.solve(by, a)
            if (nearer := _off(next_b - want_b, next_a - want_a)) < off:
                back, turn = back @ by, np.linalg.solve(by, turn)
                b, a, off = next_b, next_a, nearer
                break
            share /= 2
        if before - off <= SETTLED * before:
            break
    return Factors(factors.b @ back, turn @ factors.a)


def _step(b: Matrix, a: Matrix, off_b: Matrix, off_a: Matrix) -> Matrix:
    """X of b^T b X + X a a^T = b^T off_b + off_a a^T."""
    left, from_left = np.linalg.eigh(b.T @ b)
    right, from_right = np.linalg.eigh(a @ a.T)
    sums = left[:, None].clip(0.0) + right.clip(0.0)
    sums += np.finfo(float).eps * sums.max()
    found: Matrix = from_left @ ((from_left.T @ (b.T @ off_b + off_a @ a.T) @ from_right) / sums) @ from_right.T
    return found


def _off(b: Matrix, a: Matrix) -> float:
    return float(np.sum(b * b) + np.sum(a * a))
