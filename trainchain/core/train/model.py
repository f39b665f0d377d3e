"""The base model from a local folder: its tokenizer, its weights, and the modules an adapter can be put on.

Nothing is fetched and no code of the folder runs: safetensors only, no `auto_map`.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from trainchain.core.adapter import A_SUFFIX, B_SUFFIX, PREFIX, Adapter
from trainchain.core.errors import TrainChainError

ALL_LINEAR = "all-linear"
Targets = dict[str, tuple[int, int]]
"""Full module names of the base, with (out, in)."""

_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer, which cuts nothing by itself."""
    check_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, model_max_length=sys.maxsize, **_LOCAL)
    except Exception as error:  # a stranger's folder: whatever it makes the library raise
        raise _unreadable(folder, f"its tokenizer cannot be loaded ({_brief(error)})") from None


def load_config(folder: Path) -> Any:
    check_folder(folder)
    try:
        return AutoConfig.from_pretrained(folder, **_LOCAL)
    except Exception as error:  # as above
        raise _unreadable(folder, f"its config.json is not understood ({_brief(error)})") from None


def load_model(folder: Path, *, dtype: torch.dtype, attention: str) -> Any:
    """The causal language model, in eval mode, on the CPU. A weight the files lack is an error."""
    check_folder(folder)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            **_LOCAL,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as above
        raise _unreadable(folder, f"the model cannot be loaded ({_brief(error)})") from None
    lacking = sorted(report["missing_keys"]) + [str(key) for key in sorted(report["mismatched_keys"])]
    if lacking:
        raise _unreadable(folder, f"{len(lacking)} weights are missing or misshapen, first {lacking[0]}")
    return model.eval()


def check_folder(folder: Path) -> None:
    """Raise TrainChainError model.unreadable unless the folder can hold a model we load; reads no weights."""
    if not folder.is_dir():
        raise TrainChainError("source.missing", f"The model folder {folder} does not exist.")
    config = _json(folder, "config.json")
    if config is None:
        raise _unreadable(folder, "there is no config.json")
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in (_json(folder, name) or {}):
            raise _unreadable(folder, f"{name} has an auto_map: it asks to run code of its own")
    index = _json(folder, "model.safetensors.index.json")
    listed = set((index or {}).get("weight_map", {}).values()) if index else {"model.safetensors"}
    absent = sorted(str(name) for name in listed if not (folder / str(name)).is_file())
    if absent:
        others = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.gguf")]
        kind = f"; it holds {others[0].name}, and only safetensors are read" if others else ""
        raise _unreadable(folder, f"there is no {absent[0]}{kind}")


def find_targets(folder: Path, wanted: str | Sequence[str]) -> Targets:
    """The linear modules `lora_target_modules` means, without loading weights; never embedding or output.

    A name stands for every module whose full name ends in it. Raises TrainChainError recipe.invalid on a
    name that fits none, listing those there are.
    """
    config = load_config(folder)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # as above
        raise _unreadable(folder, f"it is not a causal language model ({_brief(error)})") from None
    head = model.get_output_embeddings()
    found: Targets = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, torch.nn.Linear):
            found[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.weight.shape[1], module.weight.shape[0])
    if not found:
        raise _unreadable(folder, "the model has no linear modules to put an adapter on")
    if wanted == ALL_LINEAR:
        return found
    chosen: Targets = {}
    for target in [wanted] if isinstance(wanted, str) else wanted:
        fits = {name: shape for name, shape in found.items() if name == target or name.endswith("." + target)}
        if not fits:
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in found))
            raise TrainChainError(
                "recipe.invalid",
                f"lora_target_modules: the model has no linear module {target!r}; it has: {known}.",
                hint="Use all-linear, or names from that list.",
            )
        chosen |= fits
    return {name: found[name] for name in found if name in chosen}


def initial_adapter(targets: Targets, r: int, seed: int) -> Adapter:
    """PEFT's start (A uniform within 1/sqrt(in), B zero), drawn from raw bits: no library version matters."""
    adapter: Adapter = {}
    for module, (rows, columns) in targets.items():
        key = int.from_bytes(hashlib.sha256(f"{seed}|{module}".encode()).digest(), "big")
        bits = np.random.PCG64(key).random_raw(r * columns) >> np.uint64(40)
        unit = bits.astype(np.float64) * 2.0**-23 - 1.0
        bound = 1.0 / np.sqrt(columns)
        adapter[PREFIX + module + A_SUFFIX] = (unit * bound).astype(np.float32).reshape(r, columns)
        adapter[PREFIX + module + B_SUFFIX] = np.zeros((rows, r), np.float32)
    return dict(sorted(adapter.items()))


def _json(folder: Path, name: str) -> dict[str, Any] | None:
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(folder, f"{name} cannot be read ({_brief(error)})") from None
    if not isinstance(value, dict):
        raise _unreadable(folder, f"{name} is not a JSON object")
    return value


def _brief(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"


def _unreadable(folder: Path, what: str) -> TrainChainError:
    return TrainChainError(
        "model.unreadable",
        f"The model folder {folder} cannot be used: {what}.",
        hint="It needs config.json, a tokenizer and *.safetensors of a model that transformers itself knows.",
    )
