"""Which GPUs this machine has, asked without loading PyTorch: one training child holds one of them."""

import os
import re
import subprocess
from collections.abc import Mapping

from trainchain.core.errors import TrainChainError

ASK_SECONDS = 30.0
GPU = re.compile(r"^GPU (\d+): ")
MIG = re.compile(r"^\s+MIG .*\(UUID: (MIG-[^)]+)\)")
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9/_-]{0,99}")


def visible(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The ids, as CUDA_VISIBLE_DEVICES takes them, of the CUDA devices this process may use. Empty where there is
    no NVIDIA driver: then one child finds by itself what there is, a GPU of another kind or the CPU."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return _first_valid(named)
    try:
        asked = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, errors="replace", timeout=ASK_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return listed(asked.stdout)


def listed(text: str) -> list[str]:
    """The ids in what `nvidia-smi -L` prints; of a GPU that is split by MIG, its parts."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if gpu := GPU.match(line):
            found.append([gpu.group(1)])
        elif (part := MIG.match(line)) and found:
            found[-1] = [*(i for i in found[-1] if i.startswith("MIG-")), part.group(1)]
    return [one for ids in found for one in ids]


def chosen(text: str) -> list[str]:
    """The ids that somebody wrote after --devices."""
    ids = [part.strip() for part in text.split(",")]
    if not all(ID.fullmatch(one) for one in ids) or len(set(ids)) < len(ids):
        raise TrainChainError(
            "usage.flag",
            f"--devices {text} is not a list of different GPU ids.",
            hint="trainchain serve-gpu --devices 0,1",
        )
    return ids


def one_device(number: int) -> list[str]:
    """The flags that give the `number`-th worker of a machine one GPU, in turn; none where there is no choice."""
    ids = visible()
    return ["--devices", ids[number % len(ids)]] if len(ids) > 1 else []


def environment_of(device: str) -> dict[str, str]:
    """What makes a child see this device and no other, numbered as nvidia-smi numbers them."""
    return {"CUDA_VISIBLE_DEVICES": device, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _first_valid(text: str) -> list[str]:
    """CUDA's own reading: the list ends at the first id that is none."""
    ids: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if not ID.fullmatch(part):
            break
        ids.append(part)
    return ids
