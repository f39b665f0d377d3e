"""Canonical bytes of a training state, and the Merkle tree over a shard's states. Imports numpy and safetensors.

State t of a shard is (W, M, V): the adapter in fp32 and AdamW's moments rounded to bf16. A leaf is
SHA256(0x00 | lease (32) | i (u32 BE) | t (u32 BE) | H(W) | H(M) | H(V)); a node is SHA256(0x01 | left |
right), and a node without a sibling is promoted as it is.
"""

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors
from numpy.typing import NDArray

from trainchain.core.adapter import tensor_bytes, tensor_header
from trainchain.core.errors import TrainChainError

Tensors = Mapping[str, NDArray[np.float32]]
Encoding = Literal["fp32", "bf16"]

NO_END = "0x" + "00" * 32
"""What an auditor signs in place of an end's leaf where a replay diverged: nobody can train from the claimed start."""

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


@dataclass(frozen=True)
class State:
    """All that the next step depends on, after `t` steps of a shard; the moments hold bf16 values."""

    t: int
    w: Tensors
    m: Tensors
    v: Tensors


class Moments(NamedTuple):
    """AdamW's moments, by tensor: of the gradients, and of their squares."""

    m: Tensors
    v: Tensors


class StateDigests(NamedTuple):
    """H(W), H(M), H(V)."""

    w: bytes
    m: bytes
    v: bytes


def steps_at(index: int, steps: int, segment_steps: int) -> int:
    """After how many of a shard's steps its `index`-th state is taken."""
    return min(index * segment_steps, steps)


def segment_ends(steps: int, segment_steps: int) -> list[int]:
    """The steps after which a shard commits its state; the last segment may be shorter."""
    return [*range(segment_steps, steps, segment_steps), steps]


def state_digests(state: State) -> StateDigests:
    """Raises ValueError on a value that is not finite."""
    return StateDigests(tensor_digest(state.w, "fp32"), tensor_digest(state.m, "bf16"), tensor_digest(state.v, "bf16"))


def start_state(w: Tensors, moments: Moments | None = None) -> State:
    """The state before the first step: the moments that were handed on, in bf16; else they are zero."""
    if moments is None:
        zeros = {name: np.zeros(tensor.shape, np.float32) for name, tensor in w.items()}
        return State(0, w, zeros, zeros)
    m, v = ({name: from_bf16(bf16(tensor)) for name, tensor in part.items()} for part in moments)
    return State(0, w, m, v)


def leaf(lease: bytes, index: int, t: int, digests: StateDigests) -> bytes:
    """The leaf of the state after `t` steps, the shard's `index`-th."""
    if len(lease) != 32:
        raise ValueError("a lease id has 32 bytes")
    head = b"\x00" + lease + struct.pack(">II", index, t)
    return hashlib.sha256(head + digests.w + digests.m + digests.v).digest()


def start_leaf(lease: bytes, w: Tensors, moments: Moments | None = None) -> bytes:
    """Leaf 0, which everybody who has the start adapter, and the moments that go with it, can compute."""
    return leaf(lease, 0, 0, state_digests(start_state(w, moments)))


def state_bytes(state: State) -> bytes:
    """The state as safetensors: `w.NAME` in fp32, `m.NAME` and `v.NAME` in bf16. `t` is the file's name to say."""
    tensors: dict[str, NDArray[Any]] = {}
    for name, tensor in state.w.items():
        tensors["w." + name] = np.asarray(tensor, dtype="<f4")
        tensors["m." + name] = bf16(state.m[name])
        tensors["v." + name] = bf16(state.v[name])
    return tensor_bytes(tensors)


def state_size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The bytes of every state of an adapter of these shapes."""
    specs = {}
    for name, shape in shapes.items():
        for kind, dtype, width in (("w", "F32", 4), ("m", "BF16", 2), ("v", "BF16", 2)):
            specs[f"{kind}.{name}"] = (dtype, tuple(shape), math.prod(shape) * width)
    return len(tensor_header(specs)) + sum(size for _, _, size in specs.values())


def read_state(data: bytes, t: int, shapes: Mapping[str, tuple[int, ...]]) -> State:
    """Parse a state of an adapter of these shapes. Raises TrainChainError state.invalid, naming the tensor."""
    try:
        found = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except (safetensors.SafetensorError, ValueError, OverflowError, UnicodeDecodeError) as error:
        raise TrainChainError("state.invalid", f"The state is not safetensors: {str(error)[:200]}.") from None
    wanted = {f"{kind}.{name}" for kind in "wmv" for name in shapes}
    if odd := sorted(wanted ^ found.keys()):
        raise TrainChainError("state.invalid", f"The state lacks or should not have the tensor {odd[0][:200]!r}.")

    def tensor(kind: str, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        entry = found[f"{kind}.{name}"]
        dtype = "F32" if kind == "w" else "BF16"
        if entry["dtype"] != dtype or tuple(entry["shape"]) != shape:
            raise TrainChainError(
                "state.invalid", f"{kind}.{name} is {entry['dtype']} {entry['shape']}, not {dtype} {list(shape)}."
            )
        raw = bytes(entry["data"])
        values = np.frombuffer(raw, "<f4") if kind == "w" else from_bf16(np.frombuffer(raw, "<u2"))
        if not np.isfinite(values).all():
            raise TrainChainError("state.invalid", f"{kind}.{name} holds NaN or infinity.")
        return values.reshape(shape)

    w, m, v = ({name: tensor(kind, name, shape) for name, shape in sorted(shapes.items())} for kind in "wmv")
    return State(t, w, m, v)


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
