"""How a delta travels. An encoding is a function of the delta alone, with one form of bytes: who has the delta can say
what its file must be, to the last bit. Imports numpy and safetensors.

`fp32` and `bf16` name every tensor. `int8` and `int4` cut each tensor's numbers, row by row, into blocks of 64 (the
last may be shorter) and hold, in the order of the tensors' names, `codes` and each block's `scales` (bf16): a number is
its code times its block's scale. Two codes of int4 share a byte, the first in the lower half, each raised by 8; an odd
tensor ends with a code of zero.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from trainchain.core.adapter import Adapter, adapter_bytes, tensor_bytes, tensor_header
from trainchain.core.errors import TrainChainError
from trainchain.core.segments import bf16, from_bf16

Shapes = Mapping[str, tuple[int, ...]]
Float = NDArray[np.float32]

BLOCK = 64
LEAST = 2.0**-100
"""A block none of whose numbers reaches this is zero: no scale is subnormal."""
SPREAD = 2.0**-8
"""A block's furthest number can come back by this share further from zero."""


BITS = {"int8": 8, "int4": 4}
ENCODINGS = ("fp32", "bf16", *BITS)


def encode(delta: Mapping[str, Float], encoding: str) -> bytes:
    """The one file of this delta. Raises ValueError on a number that is not finite."""
    for name, tensor in delta.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"tensor {name} holds a value that is not finite")
    if encoding == "fp32":
        return adapter_bytes(delta)
    if encoding == "bf16":
        return tensor_bytes({name: bf16(tensor) for name, tensor in delta.items()})
    parts = [_blocks(delta[name], BITS[encoding]) for name in sorted(delta)]
    codes, scales = (np.concatenate(part) for part in zip(*parts, strict=True))
    return tensor_bytes({"codes": codes, "scales": scales})


def decode(data: bytes, encoding: str, shapes: Shapes) -> Adapter:
    """The delta of a file, for tensors of these shapes. Nothing is believed: names, shapes and dtypes are the caller's.

    Raises TrainChainError: delta.not_safetensors, delta.missing_tensor, delta.extra_tensor, delta.wrong_dtype,
    delta.wrong_shape, delta.not_finite; delta.not_canonical where the same delta has other bytes.
    """
    try:
        found = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except (safetensors.SafetensorError, ValueError, OverflowError, UnicodeDecodeError) as error:
        raise TrainChainError(
            "delta.not_safetensors", f"The delta is not a safetensors file: {str(error)[:200]}."
        ) from None
    layout = _layout(encoding, shapes)
    if missing := sorted(layout.keys() - found.keys()):
        raise TrainChainError("delta.missing_tensor", f"The delta lacks the tensor {missing[0]!r}.")
    if extra := sorted(found.keys() - layout.keys()):
        raise TrainChainError("delta.extra_tensor", f"The adapter has no tensor {extra[0][:200]!r}.")
    raw: dict[str, NDArray[Any]] = {}
    for name, (dtype, stored, shape) in layout.items():
        entry = found[name]
        if entry["dtype"] != dtype:
            raise TrainChainError("delta.wrong_dtype", f"{name} is {entry['dtype']}, not {dtype}.")
        if tuple(entry["shape"]) != shape:
            raise TrainChainError("delta.wrong_shape", f"{name} is {tuple(entry['shape'])}, not {shape}.")
        raw[name] = np.frombuffer(bytes(entry["data"]), stored).reshape(shape)
    delta = _numbers(raw, encoding, shapes)
    for name, tensor in delta.items():
        if not np.isfinite(tensor).all():
            raise TrainChainError("delta.not_finite", f"{name} holds NaN or infinity.")
    if encode(delta, encoding) != data:
        raise TrainChainError("delta.not_canonical", f"The same numbers are written otherwise in {encoding}.")
    return delta


def encoded_size(encoding: str, shapes: Shapes) -> int:
    """How many bytes every delta of these shapes has."""
    sizes = {
        name: math.prod(shape) * np.dtype(stored).itemsize
        for name, (_, stored, shape) in _layout(encoding, shapes).items()
    }
    specs = {name: (dtype, shape, sizes[name]) for name, (dtype, _, shape) in _layout(encoding, shapes).items()}
    return len(tensor_header(specs)) + sum(sizes.values())


def ideal_size(encoding: str, shapes: Shapes) -> float:
    """The bytes of the numbers alone, with their blocks' scales."""
    numbers = sum(math.prod(shape) for shape in shapes.values())
    bits = BITS[encoding] + 16 / BLOCK if encoding in BITS else {"fp32": 32, "bf16": 16}[encoding]
    return numbers * bits / 8


def _layout(encoding: str, shapes: Shapes) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """What the file holds by name: dtype as safetensors and as numpy call it, shape."""
    if encoding not in BITS:
        dtype, stored = {"fp32": ("F32", "<f4"), "bf16": ("BF16", "<u2")}[encoding]
        return {name: (dtype, stored, tuple(shapes[name])) for name in sorted(shapes)}
    numbers = [math.prod(shape) for shape in shapes.values()]
    codes = sum(-(-count * BITS[encoding] // 8) for count in numbers)
    dtype, stored = ("I8", "|i1") if encoding == "int8" else ("U8", "|u1")
    return {
        "codes": (dtype, stored, (codes,)),
        "scales": ("BF16", "<u2", (sum(-(-count // BLOCK) for count in numbers),)),
    }


def _blocks(tensor: Float, bits: int) -> tuple[NDArray[Any], NDArray[np.uint16]]:
    """A tensor's codes and scales. The nearest bf16 is so near that a block's furthest number has the top code."""
    top = (1 << (bits - 1)) - 1
    flat = np.ravel(tensor).astype(np.float32)
    blocks = np.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    furthest = np.abs(blocks).max(axis=1, initial=0.0)
    least = np.where(furthest < LEAST, np.float32(0), furthest / np.float32(top))
    scales = bf16(least)
    wide = from_bf16(scales)[:, None]
    codes = (
        np.rint(np.divide(blocks, wide, out=np.zeros_like(blocks), where=wide > 0)).astype(np.int8).ravel()[: flat.size]
    )
    if bits == 8:
        return codes, scales
    halves = np.pad((codes + np.int8(8)).astype(np.uint8), (0, flat.size % 2), constant_values=8)
    return halves[0::2] | halves[1::2] << 4, scales


def _numbers(raw: Mapping[str, NDArray[Any]], encoding: str, shapes: Shapes) -> Adapter:
    """What `encode` was given, as far as the encoding holds it."""
    if encoding == "fp32":
        return dict(raw)
    if encoding == "bf16":
        return {name: from_bf16(bits) for name, bits in raw.items()}
    codes, scales = raw["codes"], from_bf16(raw["scales"])
    delta: Adapter = {}
    code = block = 0
    for name in sorted(shapes):
        count = math.prod(shapes[name])
        size, blocks = -(-count * BITS[encoding] // 8), -(-count // BLOCK)
        mine = codes[code : code + size]
        if encoding == "int4":
            mine = np.stack([mine & 15, mine >> 4], axis=1).ravel()[:count].astype(np.int8) - np.int8(8)
        wide = np.repeat(scales[block : block + blocks], BLOCK)[:count]
        delta[name] = (mine.astype(np.float32) * wide).reshape(shapes[name])
        code, block = code + size, block + blocks
    return delta
