"""Many adapters of a 7B model's shape merged on one core: time and memory, beside PEFT's own SVD combination.

The adapters are synthetic: a part that all share and a part of each one's own, both of full rank, in bf16, just
written and so in the page cache. `trainchain merge` runs as its own process, as a person would start it, with one BLAS
thread. Wall time is what a clock shows; CPU time, user and system, is what it took of the core, on a machine that does
other things too. Peak anonymous memory is the most RssAnon that /proc told, looked at 50 times a second: what it
allocated; peak resident memory (VmHWM) counts the shared libraries, too. PEFT merges a sample of the adapters in one
square module; its time for all is that times the modules, its growth with the number of adapters and with wider
modules left out, which favours it.

Prints one JSON document on stdout. Exits 0 whatever it finds, 1 where a side did not run to its end.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report
from launch import begin, log

PACKAGES = ("trainchain", "numpy", "torch", "peft", "safetensors")
LAYERS = 32
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDER = 11008 / 4096
"""Of a Llama 7B: what gate and up put out, and down takes in, beside all other widths."""
LOOKS_A_SECOND = 50
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PEFT_SAMPLE = """
import json, sys, time
from pathlib import Path
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

torch.set_num_threads(1)
folders, width, rank, module = [Path(p) for p in sys.argv[5:]], int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(width, width, bias=False)

    def forward(self, x):
        return self.proj(x)

model, names = None, []
for at, folder in enumerate(folders):
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["proj"])
    name = f"a{at}"
    if model is None:
        model = get_peft_model(Model(), config, adapter_name=name)
    else:
        model.add_adapter(name, config)
    names.append(name)
    tensors = load_file(folder / "adapter_model.safetensors")
    for side in "AB":
        weight = getattr(model.base_model.model.proj, f"lora_{side}")[name].weight
        weight.data = tensors[f"{module}.lora_{side}.weight"].float()
began = time.perf_counter()
model.add_weighted_adapter(names, [1 / len(names)] * len(names), "merged", combination_type="svd", svd_rank=rank)
Path(sys.argv[4]).write_text(json.dumps({"seconds": time.perf_counter() - began}))
"""


def main() -> int:
    begin("merge")
    given = _arguments()
    settings = {key: value for key, value in vars(given).items() if not isinstance(value, Path)}
    figures, more, code = [], {}, 0
    with tempfile.TemporaryDirectory(prefix="trainchain-bench-", dir=given.scratch) as temporary:
        folder = Path(temporary)
        try:
            adapters = _make(folder, given)
            ours = _ours(folder, adapters)
            figures += [
                report.at_most("merge, wall", ours["seconds"], "s", 60.0, digits=1),
                report.at_most("merge, CPU", ours["cpu_seconds"], "s", 60.0, digits=1),
                report.at_most("peak anonymous memory", ours["anonymous_mb"], "MB", 1000.0, digits=0),
                report.Figure("peak resident memory", round(ours["resident_mb"]), "MB"),
                report.Figure("largest error of a module", round(ours["error"], 4), ""),
            ]
            sample = adapters[: given.peft_adapters]
            theirs = _peft(folder, sample, given)
            whole = theirs["seconds"] * given.layers * len(MODULES)
            ratio = whole / ours["seconds"]
            figures.append(
                report.must(
                    "PEFT svd, all modules",
                    round(whole, 1),
                    "s",
                    "it is slower",
                    ratio > 1,
                    peer=f"{len(sample)} adapters, 1 module measured: {theirs['seconds']:.1f} s",
                )
            )
            figures.append(report.Figure("PEFT svd / ours", round(ratio, 1), "x"))
            figures.append(report.Figure("PEFT svd, peak anonymous memory", round(theirs["anonymous_mb"]), "MB"))
            more = {"methods": _methods(folder, adapters, given)} if given.methods else {}
        except (RuntimeError, OSError) as error:
            log.error("%s", error)
            figures.append(report.failure("a side", str(error)))
            code = 1
    report.write(report.document("merge", PACKAGES, settings, figures, **more))
    return code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merging many adapters on one core, against PEFT.")
    parser.add_argument("--adapters", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of seven modules each (%(default)s)")
    parser.add_argument("--width", type=int, default=4096, help="of every module, in and out (%(default)s)")
    parser.add_argument("--llama", action="store_true", help="gate, up and down as wide as a Llama 7B's: 11008 of 4096")
    parser.add_argument("--rank", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--peft-adapters", type=int, default=10, help="PEFT's sample (%(default)s)")
    parser.add_argument("--methods", action="store_true", help="time the other methods, too")
    parser.add_argument("--scratch", type=Path, help="a folder with room for the adapters: 60 to 80 MB each")
    parser.add_argument("--quick", action="store_true", help="6 adapters of 2 layers, 256 wide; 3 for PEFT")
    given = parser.parse_args()
    if given.quick:
        given.adapters, given.layers, given.width, given.rank, given.peft_adapters = 6, 2, 256, 8, 3
    return given


def _make(folder: Path, given: argparse.Namespace) -> list[Path]:
    """The adapters' folders. Numbers are drawn once and mixed by shifts: 5.9 GB of them would take longer than all."""
    import numpy as np

    from trainchain.core.adapter import tensor_header
    from trainchain.core.segments import bf16

    random = np.random.default_rng(0)
    shapes = _shapes(given)
    sizes = {name: math.prod(shape) for name, shape in sorted(shapes.items())}
    header = tensor_header({name: ("BF16", shape, 2 * sizes[name]) for name, shape in shapes.items()})
    each = len(header) + 2 * sum(sizes.values())
    if shutil.disk_usage(folder).free < 1.1 * (each * given.adapters):
        raise OSError(f"{given.adapters} adapters of {each / 1e6:.0f} MB do not fit: --scratch names another folder")
    drawn = random.normal(0, 0.02, 8 * max(sizes.values())).astype(np.float32)
    shared = {name: int(random.integers(0, len(drawn) - size)) for name, size in sizes.items()}
    made = []
    for number in range(given.adapters):
        path = folder / f"adapter-{number:03}"
        path.mkdir()
        config = {"peft_type": "LORA", "r": given.rank, "lora_alpha": 2 * given.rank, "base_model_name_or_path": "a/7b"}
        (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        with (path / "adapter_model.safetensors").open("wb") as file:
            file.write(header)
            for name, size in sizes.items():
                own = int(random.integers(0, len(drawn) - size))
                values = drawn[shared[name] : shared[name] + size] + drawn[own : own + size]
                file.write(bf16(values).tobytes())
        made.append(path)
    return made


def _shapes(given: argparse.Namespace) -> dict[str, tuple[int, int]]:
    shapes = {}
    wide = round(given.width * WIDER) if given.llama else given.width
    for layer in range(given.layers):
        for name in MODULES:
            module = f"base_model.model.model.layers.{layer}.{'mlp' if name[0] in 'gud' else 'self_attn'}.{name}"
            shapes[f"{module}.lora_A.weight"] = (given.rank, wide if name == "down_proj" else given.width)
            shapes[f"{module}.lora_B.weight"] = (wide if name in ("gate_proj", "up_proj") else given.width, given.rank)
    return shapes


def _run(command: list[str]) -> tuple[str, dict[str, float]]:
    """What it printed, and what it took."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=said, env=os.environ | ONE_CORE)
        peaks = {"RssAnon": 0.0, "VmHWM": 0.0}
        ended, status = 0, 0
        while not ended:
            _look(process.pid, peaks)
            time.sleep(1 / LOOKS_A_SECOND)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            last = said.read().decode(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"It ended with {process.returncode}: {''.join(last)}")
        printed.seek(0)
        taken = {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}
        return printed.read().decode(), taken | {"anonymous_mb": peaks["RssAnon"], "resident_mb": peaks["VmHWM"]}


def _look(pid: int, peaks: dict[str, float]) -> None:
    """Raise each peak to what the process has now, in MB. It has nothing when it is ending."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) * 1024 / 1e6)


def _ours(folder: Path, adapters: list[Path], *options: str) -> dict[str, float]:
    target = folder / f"merged{'-'.join(options)}"
    command = [sys.executable, "-m", "trainchain", "merge", *map(str, adapters), "-o", str(target), "--json", *options]
    out, taken = _run(command)
    return taken | {"error": max(json.loads(out)["errors"].values())}


def _peft(folder: Path, adapters: list[Path], given: argparse.Namespace) -> dict[str, float]:
    result = folder / "peft.json"
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    command = [sys.executable, "-c", PEFT_SAMPLE, str(given.width), str(given.rank), module, str(result)]
    _, taken = _run([*command, *map(str, adapters)])
    return taken | {"seconds": float(json.loads(result.read_text(encoding="utf-8"))["seconds"])}


def _methods(folder: Path, adapters: list[Path], given: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for method in ("factor-mean", "stacking"):
        found[method] = {key: round(value, 3) for key, value in _ours(folder, adapters, "--method", method).items()}
    return found


if __name__ == "__main__":
    sys.exit(main())
