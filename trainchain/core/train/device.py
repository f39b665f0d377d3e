"""The device's settings that decide the last bits of a result, and the errors of its memory."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainchain.core.errors import TrainChainError
from trainchain.core.models import ResolvedRecipe


def numeric_class(device: torch.device, recipe: ResolvedRecipe, threads: int) -> str:
    """What decides the last bits of a result: within one class replays are expected to be equal."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).replace(" ", "-")
    else:
        name = f"{device.type}-{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}-threads{threads}"
    return f"{name}/{recipe.training.precision}/torch-{torch.__version__}/{recipe.training.attention}"[:200]


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
