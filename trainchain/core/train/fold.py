"""A base with an adapter folded into its weights, written as a folder that transformers loads without PEFT.

PEFT computes each module's sum, in float32 whatever the base is stored in, one module at a time; what is not weights is
the base's own files, unchanged.
"""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from trainchain.core.adapter import Adapter
from trainchain.core.errors import TrainChainError
from trainchain.core.models import Lora
from trainchain.core.train.model import check_folder, default_attention, load_config, load_model

INDEX = "model.safetensors.index.json"
SHARD = "5GB"
"""The largest file of weights that is written; larger models are several files and an index."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def fold(base: Path, adapter: Adapter, lora: Lora, target: Path) -> str:
    """Write the folded model into the empty folder `target`; returns the dtype of its weights, as in `bf16`.

    Where the base's files mix dtypes it is the widest of them. Needs memory for the weights and a module in float32.
    Raises TrainChainError: model.unreadable; adapter.unfit for an adapter of another base; merge.unmergeable for a sum
    that is not finite in that dtype; OSError for a full disk.
    """
    check_folder(base)
    dtype = stored_dtype(base)
    model = load_model(base, dtype=dtype, attention=default_attention(load_config(base)))
    modules = dict(model.named_modules())
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(modules.get(name), Conv1D) for name in lora.targets),
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise _unfit(f"its modules are not those of the base ({str(error).splitlines()[0]})") from None
    shapes = {
        name.replace(".default.", "."): tuple(parameter.shape)
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    for name in sorted(shapes.keys() | adapter.keys()):
        found = tuple(adapter[name].shape) if name in adapter else None
        if found != shapes.get(name):
            raise _unfit(f"{name} is {found or 'not there'}, and the base asks for {shapes.get(name) or 'none'}")
    set_peft_model_state_dict(adapted, {name: torch.from_numpy(tensor) for name, tensor in adapter.items()})
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            _fold_module(name, module, dtype)
    plain = adapted.unload()
    plain.generation_config = GenerationConfig()  # the base's own file is kept, also where it would be found odd here
    try:
        plain.save_pretrained(target, max_shard_size=SHARD)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))  # its word for what the system refused
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(target)) from None
    for file in target.iterdir():
        if file.suffix != ".safetensors" and file.name != INDEX:
            file.unlink()
    for file in sorted(base.iterdir()):
        if file.is_file() and file.suffix != ".safetensors" and file.name != INDEX and _is_kept(file):
            shutil.copyfile(file, target / file.name)
    return _NAMES[dtype]


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a model's weights as its files have them, the widest where they mix several.

    Raises `model.unreadable` for numbers of other kinds.
    """
    found: set[str] = set()
    for file in _weights(folder):
        try:
            with file.open("rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                header = json.loads(opened.read(min(length, 1 << 27)))
            found |= {str(entry["dtype"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError):
            raise TrainChainError("model.unreadable", f"{file.name} is not a safetensors file.") from None
    odd = sorted(found - _DTYPES.keys())
    if odd or not found:
        raise TrainChainError(
            "model.unreadable",
            f"The base in {folder} has weights of dtype {odd[0] if odd else None}: nothing can be folded into those.",
            hint="Serve base and adapter side by side, or take the base in fp32, bf16 or fp16.",
        )
    return _DTYPES[found.pop()] if len(found) == 1 else torch.float32


def _weights(folder: Path) -> list[Path]:
    """The files that transformers takes the weights from."""
    index = folder / INDEX
    if not index.exists():
        return [folder / "model.safetensors"]
    return sorted({folder / name for name in json.loads(index.read_bytes())["weight_map"].values()})


def _fold_module(name: str, module: LoraLayer, dtype: torch.dtype) -> None:
    weight = module.get_base_layer().weight
    weight.data = weight.data.float()
    try:
        module.merge(safe_merge=True)
    except ValueError:
        raise _not_finite(name, "fp32") from None
    weight.data = weight.data.to(dtype)
    if not torch.isfinite(weight.data).all():
        raise _not_finite(name, _NAMES[dtype])


def _is_kept(file: Path) -> bool:
    """Configuration and tokenizer; an owner's folder may hold anything."""
    return file.suffix in (".json", ".model", ".txt", ".jinja") and not file.name.startswith(".")


def _unfit(why: str) -> TrainChainError:
    return TrainChainError(
        "adapter.unfit", f"The adapter does not fit the base: {why}.", hint="Name the base that the job was trained on."
    )


def _not_finite(name: str, dtype: str) -> TrainChainError:
    return TrainChainError(
        "merge.unmergeable",
        f"Folded into {name.removeprefix('base_model.model.')} the adapter gives numbers that {dtype} does not hold.",
        hint="Serve base and adapter side by side.",
    )
