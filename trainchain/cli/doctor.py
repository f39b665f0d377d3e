"""doctor: what this machine computes, and what that means for its work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Annotated, Any

import typer

from trainchain.cli.options import Json
from trainchain.cli.output import Output
from trainchain.core.errors import TrainChainError

SECONDS = 600.0
"""A device that has not replayed four small segments by then is not one to train on."""


def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Replay the golden segments, and tell this machine's numeric class.")
    ] = False,
    devices: Annotated[
        str | None, typer.Option(metavar="IDS", help="GPUs to look at, as 0,1. Default: every one there is.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each. Default: as serve-gpu takes them.")
    ] = None,
    json_: Json = False,
) -> None:
    """Look at this machine as a trainer. With --calibrate: how its replays compare with others'.

    Exit code 4 if a golden segment ends beyond the tolerance: work done here would be refused.

    \b
    Examples:
      trainchain doctor --calibrate
      trainchain doctor --calibrate --threads 1
      trainchain doctor --calibrate --json
    """
    out = Output(json_mode=json_)
    if not calibrate:
        hint = "trainchain doctor --calibrate"
        raise TrainChainError("usage.flag", "doctor was not told what to look at; it can --calibrate.", hint=hint)
    from trainchain.core.worker import devices as gpus

    named = gpus.chosen(devices) if devices else gpus.visible()
    used: list[str | None] = list(named) if devices or len(named) > 1 else [None]
    count = threads or max(1, (os.cpu_count() or 1) // len(used))
    found = [{"gpu": device, "threads": count, **_ask(device, count)} for device in used]
    for each in found:
        _tell(each, out)
    document = {"devices": found}
    if refused := [part for each in found for part in _refused(each)]:
        error = TrainChainError(
            "doctor.calibration",
            f"{' and '.join(refused)} ended beyond the tolerance: other machines would not confirm work done here.",
            hint="Update the device's driver, take clocks back to stock, and look for faulty memory.",
        )
        out.error(error, **document)
        raise typer.Exit(error.exit_code)
    out.result("every golden segment is within the tolerance", document)


def _ask(device: str | None, threads: int) -> dict[str, Any]:
    """What a process on this device makes of the golden segments."""
    from trainchain.core.worker.child import child_environment
    from trainchain.core.worker.devices import environment_of

    command = [sys.executable, "-m", "trainchain.core.train.calibrate", "--threads", str(threads)]
    environment = child_environment(threads) | (environment_of(device) if device is not None else {})
    try:
        process = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise TrainChainError("train.child_died", f"The golden segments took longer than {SECONDS:.0f} s.") from None
    if process.returncode:
        said = process.stderr.strip().splitlines()
        last = said[-1][:300] if said else "without a word"
        raise TrainChainError("train.child_died", f"The training process ended with {process.returncode}: {last}")
    found: dict[str, Any] = json.loads(process.stdout)
    if device is not None and any(part.get("numeric_class", "").startswith("cpu-") for part in found["precisions"]):
        raise TrainChainError(
            "train.unsupported",
            f"PyTorch sees no GPU {device} on this machine.",
            hint="nvidia-smi -L  lists them. PyTorch's CPU build sees none.",
        )
    return found


def _tell(found: dict[str, Any], out: Output) -> None:
    """For people: class, segments, what it means."""
    for part in found["precisions"]:
        gpu = "" if found["gpu"] is None else f"gpu {found['gpu']}  "
        if "absent" in part:
            out.line(f"{gpu}{part['precision']}  not to be had here: {part['absent']}")
            continue
        out.line(f"{gpu}{part['precision']}  {part['numeric_class']}")
        for segment in part["segments"]:
            out.line(f"  {segment['segment']}  {_said(segment)}")
        if all(segment["repeats"] for segment in part["segments"]):
            out.line("  Your replays will be compared by equality with machines of this class, within the tolerance")
            out.line("  with others.")
        else:
            out.line("  Two runs here differ in their last bits: machines of this class may not confirm each other.")


def _said(segment: dict[str, Any]) -> str:
    repeats = "runs are equal" if segment["repeats"] else "RUNS DIFFER"
    if segment["equal"]:
        return f"equal to the reference to the last bit; {repeats}"
    pairs = (
        f"{name} {'not finite' if value is None else f'{value:.1e}'} ({segment['tolerance'][name]:g})"
        for name, value in segment["distances"].items()
    )
    kind = "BEYOND the tolerance" if segment["beyond"] else "within the tolerance"
    return f"{kind}: {', '.join(pairs)}; {repeats}"


def _refused(found: dict[str, Any]) -> list[str]:
    return [
        segment["segment"] for part in found["precisions"] for segment in part.get("segments", []) if segment["beyond"]
    ]
