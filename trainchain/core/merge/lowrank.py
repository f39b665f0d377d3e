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
SETTLED = 1e-13
"""The Krylov space is large enough when a pass adds less than this share to the energy that the rank holds."""
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

    def times(self, right: Matrix) -> Matrix:
        return self.b @ (self.a @ right)

    def under(self, left: Matrix) -> Matrix:
        return (left @ self.b) @ self.a


class Dense(NamedTuple):
    """A product that had to be formed."""

    m: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.m.shape[0]), int(self.m.shape[1])

    def times(self, right: Matrix) -> Matrix:
        return self.m @ right

    def under(self, left: Matrix) -> Matrix:
        return left @ self.m


class Leading(NamedTuple):
    """The leading singular triples, u (out, k), s (k), vt (k, in), and the energy of all the others."""

    u: Matrix
    s: Matrix
    vt: Matrix
    rest: float


def stack(weights: Sequence[float], factors: Sequence[Factors]) -> Factors:
    """[w_1 B_1 ... w_n B_n] and [A_1; ...; A_n], whose product is the sum of w_i B_i A_i."""
    left = np.hstack([weight * each.b for weight, each in zip(weights, factors, strict=True)])
    return Factors(left, np.vstack([each.a for each in factors]))


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
    """Blocks of (M M^T)^k M G, each made orthogonal to those before; the energy outside is told by a few probes."""
    out, into = product.shape
    signs = _signs(into, rank + OVERSAMPLING + PROBES)
    basis, images = np.zeros((out, 0)), np.zeros((0, into))
    block = product.times(signs[:, PROBES:])
    held = 0.0
    for _ in range(PASSES):
        block = _beyond(block, basis)
        if not block.shape[1]:
            break
        image = product.under(block.T)
        basis, images = np.hstack([basis, block]), np.vstack([images, image])
        now = float(np.sum(np.linalg.eigvalsh(images @ images.T)[-rank:]))
        if now - held <= SETTLED * now:
            break
        held = now
        block = product.times(image.T)
    u, s, vt = np.linalg.svd(images, full_matrices=False)
    probes = product.times(signs[:, :PROBES])
    probes -= basis @ (basis.T @ probes)
    return Leading(basis @ u, s, vt, float(np.sum(probes**2)) / PROBES)


def _beyond(block: Matrix, basis: Matrix) -> Matrix:
    """An orthonormal basis of what `block` has outside the span of `basis`, rounding left out."""
    whole = float(np.linalg.norm(block))
    u, s, _ = np.linalg.svd(block - basis @ (basis.T @ block), full_matrices=False)
    found = u[:, s > ROUNDING * whole]
    fresh: Matrix = np.linalg.qr(found - basis @ (basis.T @ found))[0]
    return fresh


def _signs(rows: int, columns: int) -> Matrix:
    """+1 and -1, the same everywhere: raw bits of PCG64, whose stream is fixed, unlike what is drawn from it."""
    words = np.random.PCG64(0).random_raw(-(-rows * columns // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8))[: rows * columns]
    signs: Matrix = np.where(bits, 1.0, -1.0).reshape(rows, columns)
    return signs
