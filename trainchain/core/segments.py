"""Canonical bytes of a training state, and the Merkle tree over a shard's states. Standard library and numpy.

State t of a shard is (W, M, V): the adapter in fp32 and AdamW's moments rounded to bf16. A leaf is
SHA256(0x00 | lease (32) | i (u32 BE) | t (u32 BE) | H(W) | H(M) | H(V)); a node is SHA256(0x01 | left |
right), and a node without a sibling is promoted as it is.
"""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Tensors = Mapping[str, NDArray[np.float32]]
Encoding = Literal["fp32", "bf16"]

_TAG = {"fp32": b"f32 ", "bf16": b"bf16"}


def bf16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bf16 bits nearest to finite fp32 values, ties to even."""
    bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded: NDArray[np.uint16] = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype("<u2")
    return rounded


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The fp32 values of bf16 bits, exactly."""
    return (bits.astype("<u4") << np.uint32(16)).view("<f4")


def tensor_digest(tensors: Tensors, encoding: Encoding) -> bytes:
    """H(W), H(M) or H(V): sha256 over the tensors in name order, with names and shapes, little-endian.

    Raises ValueError on a value that is not finite: such a state has no canonical form.
    """
    digest = hashlib.sha256(b"TCS1" + _TAG[encoding])
    for name in sorted(tensors):
        tensor = tensors[name]
        if not np.isfinite(tensor).all():
            raise ValueError(f"tensor {name} holds a value that is not finite")
        label = name.encode()
        digest.update(struct.pack(">I", len(label)) + label)
        digest.update(struct.pack(f">I{tensor.ndim}I", tensor.ndim, *tensor.shape))
        values: NDArray[Any] = bf16(tensor) if encoding == "bf16" else np.ascontiguousarray(tensor, dtype="<f4")
        digest.update(values.tobytes())
    return digest.digest()


def leaf(lease: bytes, index: int, t: int, w: Tensors, m: Tensors, v: Tensors) -> bytes:
    """The leaf of the state after `t` steps, the shard's `index`-th; the moments are rounded to bf16 here."""
    if len(lease) != 32:
        raise ValueError("a lease id has 32 bytes")
    head = b"\x00" + lease + struct.pack(">II", index, t)
    return hashlib.sha256(
        head + tensor_digest(w, "fp32") + tensor_digest(m, "bf16") + tensor_digest(v, "bf16")
    ).digest()


def start_leaf(lease: bytes, w: Tensors) -> bytes:
    """Leaf 0, which everybody who has the start adapter can compute: no steps, zero moments."""
    zeros = {name: np.zeros(tensor.shape, np.float32) for name, tensor in w.items()}
    return leaf(lease, 0, 0, w, zeros, zeros)


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _above(level: Sequence[bytes]) -> list[bytes]:
    pairs = [_node(level[at], level[at + 1]) for at in range(0, len(level) - 1, 2)]
    return pairs + list(level[len(pairs) * 2 :])


def state_root(leaves: Sequence[bytes]) -> str:
    """The root as it is signed: 0x and 64 hex digits."""
    if not leaves:
        raise ValueError("a tree needs a leaf")
    level = list(leaves)
    while len(level) > 1:
        level = _above(level)
    return "0x" + level[0].hex()


def proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The siblings from leaf `index` up to the root, without those that are missing."""
    if not 0 <= index < len(leaves):
        raise ValueError(f"no leaf {index} among {len(leaves)}")
    path: list[bytes] = []
    level = list(leaves)
    while len(level) > 1:
        if index ^ 1 < len(level):
            path.append(level[index ^ 1])
        level, index = _above(level), index >> 1
    return path


def verify(root: str, leaf: bytes, index: int, count: int, path: Sequence[bytes]) -> bool:
    """Whether `leaf` is number `index` of the `count` leaves under `root`."""
    if not 0 <= index < count:
        return False
    siblings = iter(path)
    node = leaf
    while count > 1:
        if index ^ 1 < count:
            sibling = next(siblings, None)
            if sibling is None:
                return False
            node = _node(sibling, node) if index & 1 else _node(node, sibling)
        index, count = index >> 1, (count + 1) >> 1
    return next(siblings, None) is None and "0x" + node.hex() == root
