"""The device's settings that decide the last bits of a result, and the errors of its memory."""

import importlib.util
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainchain.core.errors import TrainChainError
from trainchain.core.models import Training
from trainchain.core.train.fingerprint import fingerprint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LONGEST_NAME = 60
"""Characters of a device's name; the contribution takes 200 for the whole class."""


def numeric_class(device: torch.device, training: Training, threads: int, adapter_path: str, processes: int) -> str:
    """What decides the last bits of a result, but for the split into micro-batches, which each segment records.

    Within one class and one split, replays are expected to be equal. The device's part ends with its kernels'
    fingerprint.
    """
    if device.type == "cuda":
        built = f"rocm{torch.version.hip}" if torch.version.hip else f"cuda{torch.version.cuda}"
        name = f"{_plain(torch.cuda.get_device_name(device))}-{built}-cudnn{torch.backends.cudnn.version()}"
    else:
        name = f"{device.type}-{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}-threads{threads}"
    name = f"{name}-{fingerprint(device, DTYPES[training.precision], threads)}"
    precision = (
        training.precision if training.quantization == "none" else f"{training.quantization}-{training.precision}"
    )
    parts = [name, precision, f"torch-{torch.__version__}", training.attention, adapter_path]
    return "/".join([*parts, f"processes{processes}"] if processes > 1 else parts)


def _plain(name: str) -> str:
    """A driver's word for its device, as a part of a class: one that can be shown, and split again."""
    return re.sub(r"[^A-Za-z0-9.+]+", "-", name)[:LONGEST_NAME].strip("-")


def check_device(device: torch.device, training: Training) -> None:
    """Raise TrainChainError train.unsupported where the recipe's precision, kernel or base is not to be had."""

    def refuse(what: str, hint: str) -> TrainChainError:
        return TrainChainError("train.unsupported", f"The recipe demands {what}.", hint=hint)

    if training.quantization == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise refuse("an NF4 base, and bitsandbytes is not installed", "pip install 'trainchain[cuda]'")
    if training.attention == "varlen" and device.type != "cuda":
        raise refuse("the varlen attention kernel, which needs a CUDA device", "Take jobs with attention: sdpa.")
    if device.type == "cuda" and training.precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise refuse("bf16, which this GPU does not have", "Take jobs with fp16 or fp32.")


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn every way in which memory runs out into TrainChainError train.out_of_memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise TrainChainError(
            "train.out_of_memory",
            "The job does not fit this machine's memory.",
            hint="Free memory, or take jobs with a smaller model, micro-batch or sequence length.",
        ) from error


def set_modes(threads: int, seed: int) -> None:
    """Make torch deterministic where it can be, in full fp32 precision; for the whole process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
