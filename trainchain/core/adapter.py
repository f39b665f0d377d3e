"""LoRA adapters as numpy arrays, as safetensors bytes that are the same everywhere, as PEFT folders."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from trainchain.core.errors import TrainChainError
from trainchain.core.models import ResolvedRecipe

Adapter = dict[str, NDArray[np.float32]]
"""By the names PEFT saves: `base_model.model.<module>.lora_A.weight` (r, in), `.lora_B.weight` (out, r)."""

DTYPES = {"<f4": "F32", "<u2": "BF16", "|i1": "I8", "|u1": "U8"}
PREFIX = "base_model.model."
A_SUFFIX = ".lora_A.weight"
B_SUFFIX = ".lora_B.weight"
WEIGHTS_FILE = "adapter_model.safetensors"
TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "adapter_config.json"


def read_adapter(source: Path | bytes) -> Adapter:
    """Every tensor of a safetensors file, which may hold nothing but fp32.

    Raises TrainChainError: delta.not_safetensors, delta.wrong_dtype; usage.file when a path cannot be read.
    """
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
        tensors = safetensors.numpy.load(data)
    except OSError as error:
        raise TrainChainError("usage.file", f"{error.filename} cannot be read: {error.strerror}.") from None
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise TrainChainError("delta.not_safetensors", f"The adapter is not safetensors: {error}.") from None
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32:
            raise TrainChainError("delta.wrong_dtype", f"Tensor {name} is {tensor.dtype}, not float32.")
    return dict(sorted(tensors.items()))


def adapter_bytes(tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    """The one safetensors form of these tensors: fp32 little-endian, names sorted, no metadata."""
    return tensor_bytes({name: np.asarray(tensor, dtype="<f4") for name, tensor in tensors.items()})


def tensor_bytes(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """The one safetensors form of fp32, int8 and uint8 arrays, and of uint16 arrays, which hold the bits of bf16.

    Written here and not by the library: digests of these bytes are signed and must not change with its
    version.
    """
    specs = {name: (DTYPES[array.dtype.str], array.shape, array.nbytes) for name, array in tensors.items()}
    return b"".join(
        [tensor_header(specs), *(np.ascontiguousarray(tensors[name]).tobytes() for name in sorted(tensors))]
    )


def tensor_header(specs: Mapping[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """What `tensor_bytes` begins with, of (safetensors dtype, shape, bytes) by name."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape, size) in sorted(specs.items()):
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def delta(end: Mapping[str, NDArray[np.float32]], start: Adapter) -> Adapter:
    """What training added, as float32."""
    return {name: np.subtract(end[name], start[name], dtype=np.float32) for name in sorted(start)}


def apply(start: Adapter, change: Adapter) -> Adapter:
    """`start` moved by `change`, as float32; the inverse of `delta` up to one rounding."""
    return {name: np.add(start[name], change[name], dtype=np.float32) for name in sorted(start)}


def tensor_specs(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The shapes a delta of the job must have, read off its initial adapter."""
    return {name: tuple(tensor.shape) for name, tensor in sorted(adapter.items())}


def peft_config(recipe: ResolvedRecipe, base_name: str, revision: str | None = None) -> dict[str, Any]:
    """The `adapter_config.json` with which PEFT, and all that reads PEFT folders, loads the adapter.

    `base_name` is a folder, or a repository's id, whose commit is `revision`.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": recipe.lora.r,
        "lora_alpha": recipe.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(recipe.lora.targets),
    }


def write_peft_folder(
    folder: Path, adapter: Adapter, recipe: ResolvedRecipe, base_name: str, revision: str | None = None
) -> None:
    """Write the standard layout, readable by PEFT alone: the weights and their `adapter_config.json`; and the chat
    template, where the recipe brought one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in {WEIGHTS_FILE: adapter_bytes(adapter), **beside_weights(recipe, base_name, revision)}.items():
        (folder / name).write_bytes(data)


def beside_weights(recipe: ResolvedRecipe, base_name: str, revision: str | None = None) -> dict[str, bytes]:
    """The files of the layout but for the weights: they follow from the recipe."""
    config = json.dumps(peft_config(recipe, base_name, revision), indent=2, sort_keys=True) + "\n"
    template = {} if recipe.chat_template is None else {TEMPLATE_FILE: recipe.chat_template.encode()}
    return {CONFIG_FILE: config.encode(), **template}
