"""A LoRA adapter as PEFT keeps it in a folder, looked at without trusting it. Needs numpy and safetensors."""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from trainchain.core.adapter import A_SUFFIX, B_SUFFIX, CONFIG_FILE, PREFIX, WEIGHTS_FILE
from trainchain.core.digests import sha256, sha256_file
from trainchain.core.errors import TrainChainError
from trainchain.core.merge.lowrank import Factors, Matrix
from trainchain.core.segments import from_bf16

MAX_CONFIG = 1 << 20
MAX_TOKENIZER = 1 << 27
MAX_ALPHA = 1 << 64
PICKLE = "adapter_model.bin"
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations of LoRA that leave the base as it is."""
MORE_THAN_LORA = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)
"""What in a configuration makes of B·A something else than a change of a layer's weight."""
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
"""What decides which numbers a text is."""
TOKENIZER_FILES = (*VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
_MODULE = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_[AB]\.weight")


class Slot(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class AdapterFolder:
    """One adapter as its folder has it, looked at and not yet read. `scales` are by module."""

    path: Path
    config: Mapping[str, Any]
    slots: Mapping[str, Slot]
    scales: Mapping[str, float]

    @property
    def base(self) -> str:
        """What its configuration calls the base, to people."""
        name, revision = self.config.get("base_model_name_or_path"), self.config.get("revision")
        return str(name)[:200] + (f" at {str(revision)[:60]}" if revision else "")

    @cached_property
    def vocabulary(self) -> dict[str, str]:
        """The digests, by name, of what it brings of a tokenizer."""
        files = [self.path / name for name in VOCABULARY_FILES]
        return {file.name: _digest(file) for file in files if file.is_file()}

    @property
    def modules(self) -> list[str]:
        """In the order of their tensors in a file that is sorted by name."""
        return sorted(self.scales, key=lambda module: module + A_SUFFIX)

    def rank(self, module: str) -> int:
        return self.slots[module + A_SUFFIX].shape[0]

    def raw(self, file: BinaryIO, module: str) -> tuple[bytes, bytes]:
        """B and A as they lie in the file."""
        found = []
        for suffix in (B_SUFFIX, A_SUFFIX):
            slot = self.slots[module + suffix]
            file.seek(slot.offset)
            found.append(file.read(slot.size))
            if len(found[-1]) != slot.size:
                raise _unreadable(self.path, f"{WEIGHTS_FILE} was cut while it was read")
        return found[0], found[1]

    def count(self, module: str) -> int:
        """How many numbers its factors are."""
        return sum(math.prod(self.slots[module + suffix].shape) for suffix in (B_SUFFIX, A_SUFFIX))

    def factors(self, raw: tuple[bytes, bytes], module: str, room: Matrix | None = None) -> Factors:
        """In float64, the scale in B; in `room`, of `count` numbers, where that is given.

        Raises TrainChainError merge.unmergeable on numbers that are not finite.
        """
        room = np.empty(self.count(module)) if room is None else room
        made, at = [], 0
        for suffix, data, scale in zip((B_SUFFIX, A_SUFFIX), raw, (self.scales[module], 1.0), strict=True):
            slot = self.slots[module + suffix]
            values = _numbers(data, slot.dtype)
            if not np.isfinite(values).all():
                raise unmergeable(self.path, f"{module.removeprefix(PREFIX)} holds NaN or infinity")
            made.append(room[at : at + values.size].reshape(slot.shape))
            np.multiply(values.reshape(slot.shape), scale, out=made[-1], dtype=np.float64)
            at += values.size
        return Factors(made[0], made[1])


def look(path: Path) -> AdapterFolder:
    """Read the configuration and the header of an adapter's folder.

    Raises TrainChainError: adapter.unreadable for what is no LoRA folder of PEFT's; merge.unmergeable, naming it, for
    what no product of two matrices says (DoRA, biases, modules_to_save, embeddings, changed bases).
    """
    if not path.is_dir():
        raise TrainChainError(
            "adapter.unreadable",
            f"{path} is no folder here.",
            hint="To fetch one from Hugging Face first: hf download OWNER/NAME --local-dir DIR",
        )
    weights = path / WEIGHTS_FILE
    if not weights.exists() and (path / PICKLE).exists():
        raise TrainChainError(
            "adapter.unreadable",
            f"{path} has its weights as a pickle, {PICKLE}, which can run code when it is read.",
            hint="If you trust it, load it with PEFT and save it again: save_pretrained writes safetensors.",
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise _unreadable(path, f"it has no {name}")
    config, slots = _config(path), _slots(weights)
    _refuse_more_than_lora(path, config, slots)
    scales: dict[str, float] = {}
    for name in slots:
        if _MODULE.fullmatch(name) is None:
            raise unmergeable(path, f"it has the tensor {name[:200]!r}, which is no lora_A or lora_B of a linear layer")
        module = name.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX)
        a, b = slots.get(module + A_SUFFIX), slots.get(module + B_SUFFIX)
        if a is not None and b is not None and len(a.shape) == len(b.shape) > 2:
            raise unmergeable(path, f"{module.removeprefix(PREFIX)[:200]} is a convolution, not a linear layer")
        if (
            a is None
            or b is None
            or not len(a.shape) == len(b.shape) == 2
            or a.shape[0] != b.shape[1]
            or 0 in a.shape + b.shape
        ):
            raise _unreadable(
                path, f"{module.removeprefix(PREFIX)[:200]} is not a pair of matrices (out, r) and (r, in)"
            )
        scales[module] = _scale(path, config, module.removeprefix(PREFIX), a.shape[0])
    if not scales:
        raise _unreadable(path, f"{WEIGHTS_FILE} holds no tensor")
    return AdapterFolder(path, config, slots, scales)


def _digest(file: Path) -> str:
    """Of a vocabulary file; of a tokenizer.json without how long rows were to be when it was written."""
    if file.name == "tokenizer.json" and file.stat().st_size <= MAX_TOKENIZER:
        with suppress(ValueError, RecursionError):
            found = json.loads(file.read_bytes())
            if isinstance(found, dict):
                kept = {key: value for key, value in found.items() if key not in ("padding", "truncation")}
                return sha256(json.dumps(kept, sort_keys=True).encode())
    return sha256_file(file)


def _config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_CONFIG + 1)
        found = json.loads(data) if len(data) <= MAX_CONFIG else None
    except OSError as error:
        raise _unreadable(path, f"{CONFIG_FILE} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _unreadable(path, f"{CONFIG_FILE} is no JSON object")
    return found


def _slots(file: Path) -> dict[str, Slot]:
    """Where each tensor lies. The library checks the header; what it says is only then believed."""
    folder = file.parent
    try:
        with safe_open(file, framework="np"):
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except OSError as error:
        raise _unreadable(folder, f"{file.name} cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise _unreadable(folder, f"{file.name} is not safetensors, or was cut ({str(error)[:200]})") from None
    slots: dict[str, Slot] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            raise unmergeable(
                folder, f"{name[:200]} is {entry['dtype']}, which is no floating point of 16 bits or more"
            )
        slots[name] = Slot(entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return slots


def _refuse_more_than_lora(path: Path, config: Mapping[str, Any], slots: Mapping[str, Slot]) -> None:
    if config.get("peft_type") != "LORA":
        raise unmergeable(path, f"its peft_type is {str(config.get('peft_type'))[:60]!r}, not LORA")
    if config.get("use_dora") or any("lora_magnitude_vector" in name for name in slots):
        raise unmergeable(path, "it is a DoRA adapter: its magnitudes belong to one direction and have no mean")
    if config.get("bias", "none") != "none" or config.get("lora_bias") or any(".bias" in name for name in slots):
        raise unmergeable(path, "it trained biases, which are not part of B·A")
    if config.get("modules_to_save"):
        names = str(config["modules_to_save"])[:200]
        raise unmergeable(path, f"it has modules_to_save {names}: whole weights, not a change of low rank")
    if any("lora_embedding" in name for name in slots) or config.get("trainable_token_indices"):
        raise unmergeable(path, "it trained embeddings")
    if odd := next((key for key in MORE_THAN_LORA if config.get(key)), None):
        raise unmergeable(path, f"with its {odd} B·A is more, or other, than a change of a layer's weight")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise unmergeable(path, f"init_lora_weights {str(start)[:60]!r} changed its base")


def _scale(path: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """What the product is multiplied by: alpha / r, or alpha / sqrt(r) of rsLoRA (arXiv 2312.03732)."""
    told = _of_pattern(path, config, "rank_pattern", module, config.get("r"))
    alpha = _of_pattern(path, config, "alpha_pattern", module, config.get("lora_alpha"))
    if told != rank or isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < MAX_ALPHA:
        says = f"{CONFIG_FILE} says r {told!s:.40} and lora_alpha {alpha!s:.40}"
        raise _unreadable(path, f"{module[:200]} has rank {rank}; {says}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(path: Path, config: Mapping[str, Any], key: str, module: str, usual: Any) -> Any:
    """A value of one module: PEFT takes that of the first name in the pattern which means the module."""
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict) or not all(re.fullmatch(r"[\w.]+", name) for name in pattern):
        raise unmergeable(path, f"its {key} is not made of modules' names")
    return next((value for name, value in pattern.items() if _means(name, module)), usual)


def _means(name: str, module: str) -> bool:
    """Whether the module's last names are these. To PEFT a name is a regular expression: a dot is any mark."""
    end = f".{module}"[-len(name) - 1 :]
    return end[0] == "." and len(end) == len(name) + 1 and all(map(_is, name, end[1:]))


def _is(wanted: str, found: str) -> bool:
    return wanted in (".", found)


def _numbers(data: bytes, dtype: str) -> NDArray[np.floating[Any]]:
    values = np.frombuffer(data, _DTYPES[dtype])
    return from_bf16(values) if dtype == "BF16" else values


def _unreadable(path: Path, why: str) -> TrainChainError:
    return TrainChainError("adapter.unreadable", f"{path} is no adapter that PEFT could load: {why}.")


def unmergeable(path: Path, why: str) -> TrainChainError:
    return TrainChainError("merge.unmergeable", f"{path} cannot be merged exactly: {why}.")
