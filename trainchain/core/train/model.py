"""The base model from a local folder: its tokenizer, its weights, and the modules an adapter can be put on.

Nothing is fetched and no code of the folder runs: safetensors only, no `auto_map`. What cannot be trained is
refused by its name, before weights are loaded where the configuration and a forward pass without numbers show it.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from trainchain.core.adapter import A_SUFFIX, B_SUFFIX, PREFIX, Adapter
from trainchain.core.errors import TrainChainError

ALL_LINEAR = "all-linear"
Targets = dict[str, tuple[int, int]]
"""Full module names of the base, with (out, in)."""

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers that see nothing of a document but its own earlier tokens."""
_FOREIGN = {"s_aux": "attention sinks", "position_bias": "a bias by position"}
"""What a model may hand to its attention that attention document by document does not take."""
_LINE = 64
"""Bytes of a CPU's cache line."""
_WATCHED = "trainchain_watched"
_HINT = "It needs config.json, a tokenizer and *.safetensors of a model that transformers itself knows."
_OTHER_BASE = "Take a base whose only state across tokens is causal attention: Llama, Qwen, Mistral, Gemma, Phi ..."


def load_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """The tokenizer, which cuts nothing by itself; `chat_template` takes the place of its own."""
    check_folder(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=sys.maxsize, **_LOCAL)
    except Exception as error:  # a stranger's folder: whatever it makes the library raise
        raise _unreadable(folder, f"its tokenizer cannot be loaded ({_brief(error)})") from None
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def load_config(folder: Path) -> Any:
    """The configuration of a causal language model on text. Raises TrainChainError model.unreadable for others."""
    check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
        kind = config.model_type
        media = config.get_text_config() is not config or {"vision_config", "audio_config"} & set(config.sub_configs)
        encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    except Exception as error:  # as above
        raise _unreadable(folder, f"its config.json is not understood ({_brief(error)})") from None
    if getattr(config, "is_encoder_decoder", False):
        raise _unreadable(folder, f"{kind} is an encoder-decoder model", _OTHER_BASE)
    if media:
        raise _unreadable(folder, f"{kind} is a multimodal model", "Take the model of text alone.")
    if encoder:
        raise _unreadable(folder, f"{kind} is an encoder, which sees later tokens", _OTHER_BASE)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _unreadable(folder, f"{kind} is not a causal language model", _OTHER_BASE)
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYERS)
    if odd:
        raise _unreadable(folder, f"{kind} has layers of the kind {odd[0]}, which cannot train packed", _OTHER_BASE)
    return config


def default_attention(config: Any) -> Literal["sdpa", "eager"]:
    """The kernel a job on this model takes where its recipe names none: only eager can cap attention scores."""
    return "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else "eager"


def longest_document(config: Any) -> int | None:
    """The most positions a document may have, or None where the configuration names no limit.

    Beyond its original length longrope turns all positions of a row otherwise: no packed document may get there.
    """
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type") == "longrope":
            limits.append(parameters.get("original_max_position_embeddings"))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def load_model(folder: Path, *, dtype: torch.dtype, attention: str, quantization: str = "none") -> Any:
    """The causal language model, in eval mode, on the CPU. A weight the files lack or that is NaN is an error."""
    config = load_config(folder)
    if default_attention(config) == "eager" and "eager" not in attention:
        what = f"{config.model_type} needs the eager attention kernel"
        raise _unreadable(folder, what, "Write `attention: eager` in the recipe.")
    how: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if quantization == "nf4":
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model = _load(folder, **how)
    for name, weight in model.named_parameters():
        # The sum tells at a fraction of the cost; one that overflows is looked at again.
        if not torch.isfinite(weight.sum(dtype=torch.float32)) and not torch.isfinite(weight).all():
            raise _unreadable(folder, f"{name} holds NaN or infinity", "Fetch the files again.")
    return model


def leave_files(model: Any) -> None:
    """Copy what is mapped from the model's files, so that these can go: a mapped file keeps its place on the disk.

    A copy begins as far from a cache line's start as the tensor did: matrix products may round by that.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        mine = tensor.data
        if mine.device.type != "cpu" or not mine.numel() or not mine.is_contiguous():
            continue
        size = mine.element_size()
        room = torch.empty(mine.numel() + _LINE // size, dtype=mine.dtype)
        start = (mine.data_ptr() - room.data_ptr()) % _LINE // size
        tensor.data = room[start : start + mine.numel()].view(mine.shape).copy_(mine)


def _load(folder: Path, **how: Any) -> Any:
    config = load_config(folder)
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):  # no draw of random numbers, in whatever mode a layer is
            setattr(config, name, 0.0)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported, and refused by name below
            output_loading_info=True,
            **how,
            **_LOCAL,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as above
        raise _unreadable(folder, f"the model cannot be loaded ({_brief(error)})") from None
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise _unreadable(folder, f"{len(lacking)} weights are missing, first {lacking[0]}")
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise _unreadable(folder, f"{name} is {tuple(found)}, and config.json asks for {tuple(wanted)}")
    if model._is_stateful:
        kind = config.model_type
        raise _unreadable(folder, f"{kind} carries a state from token to token and cannot train packed", _OTHER_BASE)
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        raise _unreadable(folder, f"{config.model_type} has attention that sees later tokens", _OTHER_BASE)
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
            known = str(config.get("model_type")) in CONFIG_MAPPING
            hint = f"transformers knows {config.get('model_type')} without it: take auto_map out of {name}."
            raise _unreadable(
                folder, f"{name} has an auto_map: it asks to run code of its own", hint if known else _HINT
            )
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise _unreadable(
            folder,
            f"its weights are quantised ({method or 'quantization_config'})",
            "Take the folder of the original weights; `adapter: qlora` quantises them while it loads.",
        )
    if (folder / "adapter_config.json").exists():
        raise _unreadable(
            folder,
            "it holds an adapter_config.json: an adapter would be loaded as a part of the base",
            "Merge the adapter into the weights, or take its files out of the folder.",
        )
    index = _json(folder, "model.safetensors.index.json")
    listed = {"model.safetensors"}
    if index is not None:
        weights = index.get("weight_map")
        listed = {str(name) for name in weights.values()} if isinstance(weights, dict) else set()
        if not listed or any(Path(name).name != name for name in listed):
            raise _unreadable(folder, "model.safetensors.index.json has no weight_map to files beside it")
    absent = sorted(name for name in listed if not (folder / name).is_file())
    if absent:
        others = [path for end in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in sorted(folder.glob(end))]
        kind = f"; it holds {others[0].name}, and only safetensors are read" if others else ""
        raise _unreadable(folder, f"there is no {absent[0]}{kind}")


def find_targets(folder: Path, wanted: str | Sequence[str]) -> Targets:
    """The linear modules `lora_target_modules` means, without loading weights; never embedding or output.

    A name stands for every module whose full name ends in it. Raises TrainChainError: recipe.invalid on a
    name that fits none, listing those there are; model.unreadable on a model that cannot be trained packed.
    """
    # In bf16, for the sake of kernels that know no other dtype where there are no numbers.
    model = _load(folder, dtype=torch.bfloat16, device_map="meta").to("meta")
    _check_attention(folder, model)
    head = model.get_output_embeddings()
    found: Targets = {}
    barred: dict[str, str] = {}
    for name, module in model.named_modules():
        if module is head or isinstance(module, torch.nn.Embedding):
            barred[name] = "the output layer" if module is head else "an embedding"
        elif not isinstance(module, torch.nn.Linear | Conv1D):
            continue
        elif _taken_for_experts(name, model):
            barred[name] = "fused into experts by PEFT"
        elif isinstance(module, Conv1D):
            found[name] = (module.weight.shape[1], module.weight.shape[0])
        else:
            found[name] = (module.out_features, module.in_features)
    if not found:
        raise _unreadable(folder, "the model has no linear modules to put an adapter on")
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if names == [ALL_LINEAR]:
        return found
    chosen = {name for target in names for name in _named(target, found, barred)}
    return {name: found[name] for name in found if name in chosen}


def _named(target: str, found: Targets, barred: dict[str, str]) -> list[str]:
    def fits(name: str) -> bool:
        return name == target or name.endswith("." + target)

    names = [name for name in found if fits(name)]
    if names:
        return names
    known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in found))
    why = next((reason for name, reason in barred.items() if fits(name)), None)
    what = f"{target!r} is {why}" if why else f"the model has no linear module {target!r}"
    raise TrainChainError(
        "recipe.invalid",
        f"lora_target_modules: {what}; it has: {known}.",
        hint="Use all-linear, or names from that list.",
    )


def _taken_for_experts(name: str, model: Any) -> bool:
    """Whether PEFT, which reads the names of old mixture-of-experts adapters, puts the LoRA elsewhere."""
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return True
    return name not in config.target_modules


def _check_attention(folder: Path, model: Any) -> None:
    """See by a forward pass without numbers that attention is done by the function that we replace.

    In every layer, told of the documents and of the window, and of nothing that we do not know.
    """
    config = model.config
    calls, windows, wrong = 0, 0, ""

    def watched(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        nonlocal calls, windows, wrong
        calls += 1
        windows += kwargs.get("sliding_window") is not None
        foreign = [what for name, what in _FOREIGN.items() if kwargs.get(name) is not None]
        if kwargs.get("document_lengths") is None:
            wrong = wrong or "does not hand document_lengths down to its attention"
        elif foreign or attention_mask is not None:
            wrong = wrong or f"attends with {foreign[0] if foreign else 'a mask of its own'}"
        batch, heads, length, _ = query.shape
        return value.new_empty(batch, length, heads, value.shape[-1]), None

    AttentionInterface.register(_WATCHED, watched)
    config.pad_token_id = None  # else some look for it among the tokens, which have no numbers
    try:
        model.set_attn_implementation(_WATCHED)
        with torch.device("meta"), torch.no_grad():
            ids = torch.zeros(1, 6, dtype=torch.long)
            model(input_ids=ids, position_ids=ids, attention_mask=None, use_cache=False, document_lengths=(2, 4))
        done = True
    except Exception:  # some models look at numbers on their way: what they do is seen when the job is loaded
        done = False
    layers = getattr(config, "num_hidden_layers", 1)
    if done and calls < layers:
        wrong = wrong or f"computes attention in a way of its own in {layers - calls} of {layers} layers"
    if done and not windows and _slides(config):
        wrong = wrong or "does not tell its attention of the sliding window"
    if wrong:
        raise _unreadable(folder, f"{config.model_type} {wrong}, and cannot train packed", _OTHER_BASE)


def _slides(config: Any) -> bool:
    """Whether a document the model can hold is longer than a window that some layer has."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    longest = longest_document(config)
    narrow = isinstance(window, int) and (longest is None or window < longest)
    return narrow and (kinds is None or "sliding_attention" in kinds)


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


def _unreadable(folder: Path, what: str, hint: str = _HINT) -> TrainChainError:
    return TrainChainError("model.unreadable", f"The model folder {folder} cannot be used: {what}.", hint=hint)
