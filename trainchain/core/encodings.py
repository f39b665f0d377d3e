"""How a delta travels, and AdamW's moments with it. An encoding is a function of these alone, with one form of bytes:
who has them can say what their file must be, to the last bit. Imports numpy and safetensors.

`fp32` and `bf16` name every tensor. `int8` and `int4` cut each tensor's numbers, row by row, into blocks of 64 (the
last may be shorter) and hold, in the order of the tensors' names, `codes` and each block's `scales` (bf16): a number is
its code times its block's scale. Two codes of int4 share a byte, the first in the lower half, each raised by 8; an odd
tensor ends with a code of zero.

The first moment goes the same way, under names that begin with `m.`, in bf16 where the delta is fp32. Of the second go
each tensor's means over its columns, `v.rows`, and over its rows as shares of their largest, `v.columns`: its factors
of rank one (Adafactor, arXiv 1804.04235), in thirds of a power of two, a byte each.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors
from numpy.typing import NDArray

from trainchain.core.adapter import Adapter, tensor_bytes, tensor_header
from trainchain.core.errors import TrainChainError
from trainchain.core.segments import Moments, bf16, from_bf16

Shapes = Mapping[str, tuple[int, ...]]
Float = NDArray[np.float32]

BLOCK = 64
LEAST = 2.0**-100
"""A block whose furthest number would come back below this is zero: no scale is subnormal."""
SPREAD = 2.0**-8
"""A block's furthest number can come back by this share further from zero."""
GRID, ONE = 3, 200
"""Of a factor of the second moment: codes to a power of two, and the code of 1. A code of 0 is zero."""
BITS = {"int8": 8, "int4": 4}
ENCODINGS = ("fp32", "bf16", *BITS)
FIRST_MOMENT = {"fp32": "bf16"}
"""What the first moment is encoded in where that is not what the delta is: it holds no more than bf16."""
M, ROWS, COLUMNS = "m.", "v.rows", "v.columns"


class Decoded(NamedTuple):
    delta: Adapter
    moments: Moments | None


def encode(delta: Mapping[str, Float], encoding: str, moments: Moments | None = None) -> bytes:
    """The one file of this delta. Raises ValueError on a number that is not finite, and on a negative second moment."""
    stored = _stored(delta, encoding)
    if moments is not None:
        first = _stored(moments.m, FIRST_MOMENT.get(encoding, encoding))
        stored |= {M + name: array for name, array in first.items()} | _factored(moments.v)
    return tensor_bytes(stored)


def decode(data: bytes, encoding: str, shapes: Shapes, *, moments: bool = False) -> Decoded:
    """The delta of a file, for tensors of these shapes, and where the file is to hold them the moments. Nothing is
    believed: names, shapes and dtypes are the caller's.

    Raises TrainChainError: delta.not_safetensors, delta.missing_tensor, delta.extra_tensor, delta.wrong_dtype,
    delta.wrong_shape, delta.not_finite; delta.not_canonical where the same numbers have other bytes.
    """
    try:
        found = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except (safetensors.SafetensorError, ValueError, OverflowError, UnicodeDecodeError) as error:
        raise TrainChainError(
            "delta.not_safetensors", f"The delta is not a safetensors file: {str(error)[:200]}."
        ) from None
    layout = _layout(encoding, shapes, moments)
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
    delta, with_ = _numbers(raw, encoding, shapes), None
    if moments:
        first = {name.removeprefix(M): array for name, array in raw.items() if name.startswith(M)}
        m = _numbers(first, FIRST_MOMENT.get(encoding, encoding), shapes)
        with_ = Moments(m, _products(raw[ROWS], raw[COLUMNS], shapes))
    for part in (delta, *(with_ or ())):
        for name, tensor in part.items():
            if not np.isfinite(tensor).all():
                raise TrainChainError("delta.not_finite", f"{name} holds NaN or infinity.")
    if encode(delta, encoding, with_) != data:
        raise TrainChainError("delta.not_canonical", f"The same numbers are written otherwise in {encoding}.")
    return Decoded(delta, with_)


def rank_one(v: Mapping[str, NDArray[Any]]) -> Adapter:
    """What is left of a second moment that has travelled."""
    factors = _factored(v)
    return _products(factors[ROWS], factors[COLUMNS], {name: tensor.shape for name, tensor in v.items()})


def encoded_size(encoding: str, shapes: Shapes, *, moments: bool = False) -> int:
    """How many bytes every delta of these shapes has."""
    layout = _layout(encoding, shapes, moments)
    sizes = {name: math.prod(shape) * np.dtype(stored).itemsize for name, (_, stored, shape) in layout.items()}
    specs = {name: (dtype, shape, sizes[name]) for name, (dtype, _, shape) in layout.items()}
    return len(tensor_header(specs)) + sum(sizes.values())


def ideal_size(encoding: str, shapes: Shapes, *, moments: bool = False) -> float:
    """The bytes of the numbers alone, with their blocks' scales."""
    numbers = sum(math.prod(shape) for shape in shapes.values())

    def bits(encoding: str) -> float:
        return BITS[encoding] + 16 / BLOCK if encoding in BITS else {"fp32": 32, "bf16": 16}[encoding]

    size = numbers * bits(encoding) / 8
    if moments:
        size += numbers * bits(FIRST_MOMENT.get(encoding, encoding)) / 8 + sum(map(sum, _sides(shapes)))
    return size


def _layout(encoding: str, shapes: Shapes, moments: bool) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """What the file holds by name: dtype as safetensors and as numpy call it, shape."""
    if moments:
        first = _layout(FIRST_MOMENT.get(encoding, encoding), shapes, False)
        rows, columns = map(sum, _sides(shapes))
        second = {ROWS: ("U8", "|u1", (rows,)), COLUMNS: ("U8", "|u1", (columns,))}
        return _layout(encoding, shapes, False) | {M + name: spec for name, spec in first.items()} | second
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


def _sides(shapes: Shapes) -> tuple[list[int], list[int]]:
    """How many rows and columns each tensor has, in the order of their names."""
    every = [shapes[name] for name in sorted(shapes)]
    return [shape[0] for shape in every], [math.prod(shape[1:]) for shape in every]


def _stored(tensors: Mapping[str, Float], encoding: str) -> dict[str, NDArray[Any]]:
    """What a file of these tensors holds."""
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"tensor {name} holds a value that is not finite")
    if encoding == "fp32":
        return {name: np.asarray(tensor, dtype="<f4") for name, tensor in tensors.items()}
    if encoding == "bf16":
        return {name: bf16(tensor) for name, tensor in tensors.items()}
    parts = [_blocks(tensors[name], BITS[encoding]) for name in sorted(tensors)]
    codes, scales = (np.concatenate(part) for part in zip(*parts, strict=True))
    return {"codes": codes, "scales": scales}


def _factored(v: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.uint8]]:
    rows, columns = [], []
    for name in sorted(v):
        wide = np.asarray(v[name], np.float64).reshape(len(v[name]), -1)
        if not np.isfinite(wide).all() or (wide < 0).any():
            raise ValueError(f"the second moment of {name} holds a value that is negative or not finite")
        across, along = wide.mean(axis=1), wide.mean(axis=0)
        rows.append(_on_grid(across))
        columns.append(_on_grid(along / max(along.max(initial=0.0), LEAST) if rows[-1].any() else np.zeros_like(along)))
    return {ROWS: np.concatenate(rows), COLUMNS: np.concatenate(columns)}


def _products(rows: NDArray[np.uint8], columns: NDArray[np.uint8], shapes: Shapes) -> Adapter:
    """The second moment whose means over rows and columns these are."""
    across, along = _off_grid(rows), _off_grid(columns)
    found: Adapter = {}
    heights, widths = _sides(shapes)
    row = column = 0
    for name, height, width in zip(sorted(shapes), heights, widths, strict=True):
        share = along[column : column + width]
        product = np.outer(across[row : row + height], share / max(float(share.mean()), LEAST))
        found[name] = product.reshape(shapes[name]).astype(np.float32)
        row, column = row + height, column + width
    return found


def _on_grid(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    power = np.log2(values, out=np.full_like(values, -np.inf), where=values > 0)
    codes: NDArray[np.uint8] = np.clip(np.rint(GRID * power) + ONE, 0, 255).astype(np.uint8)
    return codes


def _off_grid(codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    return np.where(codes > 0, np.exp2((codes.astype(np.float64) - ONE) / GRID), 0.0)


def _blocks(tensor: Float, bits: int) -> tuple[NDArray[Any], NDArray[np.uint16]]:
    """A tensor's codes and scales. The nearest bf16 is so near that a block's furthest number has the top code."""
    top = (1 << (bits - 1)) - 1
    flat = np.ravel(tensor).astype(np.float32)
    blocks = np.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    furthest = np.abs(blocks).max(axis=1, initial=0.0)
    scales = bf16(furthest / np.float32(top))
    scales[from_bf16(scales) * np.float32(top) < LEAST] = 0
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
        return {name: raw[name] for name in sorted(shapes)}
    if encoding == "bf16":
        return {name: from_bf16(raw[name]) for name in sorted(shapes)}
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
        with np.errstate(over="ignore", invalid="ignore"):  # who is to believe it looks for infinity and NaN
            delta[name] = (mine.astype(np.float32) * wide).reshape(shapes[name])
        code, block = code + size, block + blocks
    return delta
