"""LoRA adapters as PEFT saves them, with numbers from nowhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trainchain.core.adapter import CONFIG_FILE

TARGETS = ["q_proj", "down_proj"]


def save_adapter(base: Path, folder: Path, seed: int, *, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """An adapter of `base`, every trained number of which is drawn anew."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=draw)).to(dtype)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes), encoding="utf-8")
    return folder


def weight_changes(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    """What the adapter adds to each of the base's weights, as PEFT itself computes it."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = {name: tensor.detach().clone().numpy() for name, tensor in plain.named_parameters()}
    folded = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    after = {name: tensor.detach().float().numpy() for name, tensor in folded.named_parameters()}
    return {name: after[name] - before[name] for name in before if not np.array_equal(after[name], before[name])}


def off(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The largest relative distance over all weights."""
    assert found.keys() == wanted.keys()
    return max(float(np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name])) for name in wanted)


def each(
    changes: list[dict[str, np.ndarray]], combine: Callable[[list[np.ndarray]], np.ndarray]
) -> dict[str, np.ndarray]:
    return {name: combine([change[name] for change in changes]) for name in changes[0]}
