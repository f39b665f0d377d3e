"""The best factors of low rank of a sum of products of factors, which is never formed. Needs numpy; all in float64.

A sum of w_i B_i A_i is the product of [w_1 B_1 ... w_n B_n] and [A_1; ...; A_n]. Where these stacks are thin, QR of
both and an SVD of the small core give its SVD; where they are not, a block Krylov space does (Musco and Musco, 2015,
arXiv 1504.05477), in memory that does not grow with the square of their number.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

ROUNDING = 1e-10
"""Singular values below this share of the largest are rounding, not signal."""
THIN = 256
"""Columns of a stack up to which QR and a small SVD are the cheaper way."""
OVERSAMPLING = 8
PASSES = 12
SETTLED = 1e-14
"""The Krylov space is large enough when its leading pairs miss the product by less than this share of its energy."""
PROBES = 16


class Factors(NamedTuple):
    """One module's pair: B (out, r) and A (r, in)."""

    b: Matrix
    a: Matrix

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product: (out, in)."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def over(self, rows: Matrix) -> Matrix:
        """The product times each row (k, in). BLAS is fastest where the few rows stand on the left."""
        return (rows @ self.a.T) @ self.b.T

    def under(self, rows: Matrix) -> Matrix:
        """Each row (k, out) times the product."""
        return (rows @ self.b) @ self.a


class Dense(NamedTuple):
    """A product that had to be formed."""

    m: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.m.shape[0]), int(self.m.shape[1])

    def over(self, rows: Matrix) -> Matrix:
        return rows @ self.m.T

    def under(self, rows: Matrix) -> Matrix:
        return rows @ self.m


class Leading(NamedTuple):
    """The leading singular triples, u (out, k), s (k), vt (k, in), and the energy of all the others."""

    u: Matrix
    s: Matrix
    vt: Matrix
    rest: float


def stack(weights: Sequence[float], factors: Sequence[Factors]) -> Factors:
    """[w_1 B_1 ... w_n B_n] and [A_1; ...; A_n], whose product is the sum of w_i B_i A_i."""
    edges = np.cumsum([0, *(each.rank for each in factors)])
    # B lies column by column, as A row by row: each contribution is then one piece of memory in both.
    columns, rows = (np.empty((edges[-1], width)) for width in factors[0].shape)
    for weight, each, begin, end in zip(weights, factors, edges, edges[1:], strict=False):
        np.multiply(each.b.T, weight, out=columns[begin:end])
        rows[begin:end] = each.a
    return Factors(columns.T, rows)


def norm(product: Factors) -> float:
    """Frobenius norm of B·A from two small Gram matrices."""
    return float(np.sqrt(max(np.sum((product.b.T @ product.b) * (product.a @ product.a.T)), 0.0)))


def distance(one: Factors, other: Factors) -> float:
    """Between two products, as a share of the other's norm."""
    off = norm(Factors(np.hstack([other.b, -one.b]), np.vstack([other.a, one.a])))
    whole = norm(other)
    return off / whole if whole > 0 else 0.0


def leading(product: Factors | Dense, rank: int) -> Leading:
    """The `rank` largest singular triples of the product, or fewer where it has no more."""
    if isinstance(product, Dense):
        found, scale = _krylov(product, rank), 0.0
    else:
        found = _exact(product) if min(product.rank, *product.shape) <= THIN else _krylov(product, rank)
        scale = float(np.linalg.norm(product.b)) * float(np.linalg.norm(product.a))
    floor = ROUNDING * max(float(found.s.max(initial=0.0)), ROUNDING * scale)
    kept = min(rank, int(np.count_nonzero(found.s > floor)))
    rest = found.rest + float(np.sum(found.s[kept:] ** 2))
    return Leading(found.u[:, :kept], found.s[:kept], found.vt[:kept], rest)


def balanced(found: Leading) -> Factors:
    """Factors of the triples' product, each with half of every singular value."""
    root = np.sqrt(found.s)
    return Factors(found.u * root, root[:, None] * found.vt)


def _exact(product: Factors) -> Leading:
    q_left, r_left = np.linalg.qr(product.b)
    q_right, r_right = np.linalg.qr(product.a.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return Leading(q_left @ u, s, vt @ q_right.T, 0.0)


def _krylov(product: Factors | Dense, rank: int) -> Leading:
    """Blocks of (M M^T)^k M G, each made orthogonal to those before; the energy outside is told by a few probes.

    Vectors are rows. M has the leading pairs' right vectors exactly in the space but for what the next block has
    beyond it, so that this tells when there is nothing left to gain.
    """
    out, into = product.shape
    first = product.over(_signs(rank + OVERSAMPLING + PROBES, into))
    probes, fresh = first[:PROBES], first[PROBES:]
    whole = float(np.linalg.norm(fresh))
    basis, images = np.zeros((0, out)), np.zeros((0, into))
    for _ in range(PASSES):
        block = _orthonormal(fresh, basis, whole)
        if not len(block):
            break
        image = product.under(block)
        basis, images = np.vstack([basis, block]), np.vstack([images, image])
        following = product.over(image)
        fresh, whole = _without(following, basis), float(np.linalg.norm(following))
        energy, turns = np.linalg.eigh(images @ images.T)
        if _missed(energy[-rank:], turns[-len(block) :, -rank:], fresh) <= SETTLED:
            break
    if not len(basis):
        return Leading(basis.T, np.zeros(0), images, 0.0)
    most = turns[:, -(rank + OVERSAMPLING) :]
    right, small = np.linalg.qr(images.T @ most)
    u, s, vt = np.linalg.svd(small.T)
    rest = float(np.sum(_without(probes, basis) ** 2)) / PROBES + float(np.sum(energy[: -most.shape[1]].clip(0.0)))
    return Leading(basis.T @ (most @ u), s, vt @ right.T, rest)


def _missed(energy: Matrix, turns: Matrix, fresh: Matrix) -> float:
    """What M makes of the leading right vectors outside the space, as a share of what it makes of them inside.

    `fresh` is what the last block's images have there, `turns` that block's part in each vector: all others were
    multiplied before, and lie inside.
    """
    signal = energy > ROUNDING**2 * energy[-1]
    outside = turns[:, signal].T @ fresh / np.sqrt(energy[signal])[:, None]
    return float(np.sum(outside**2) / np.sum(energy)) if signal.any() else 0.0


def _without(rows: Matrix, basis: Matrix) -> Matrix:
    """The rows without what they have in the span of an orthonormal basis."""
    return rows - (rows @ basis.T) @ basis


def _orthonormal(rows: Matrix, basis: Matrix, whole: float) -> Matrix:
    """An orthonormal basis of the rows' span, across `basis`, without what is rounding beside a norm of `whole`."""
    q, r = np.linalg.qr(rows.T)
    u, s, _ = np.linalg.svd(r)
    found = _without((q @ u[:, s > ROUNDING * whole]).T, basis)
    fresh: Matrix = np.linalg.inv(np.linalg.cholesky(found @ found.T)) @ found
    return fresh


def _signs(rows: int, columns: int) -> Matrix:
    """+1 and -1, the same everywhere: raw bits of PCG64, whose stream is fixed, unlike what is drawn from it."""
    words = np.random.PCG64(0).random_raw(-(-rows * columns // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8))[: rows * columns]
    signs: Matrix = np.where(bits, 1.0, -1.0).reshape(rows, columns)
    return signs
