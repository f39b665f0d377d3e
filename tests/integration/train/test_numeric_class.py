"""One class, one result: machines that this one can play (instruction sets, threads), in processes of their own."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures_model import resolve_recipe
from trainchain.core.digests import sha256_file
from trainchain.core.train.device import LONGEST_NAME, _plain
from trainchain.core.train.fingerprint import DIGITS, fingerprint

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "recipes" / "quickstart"
PLAIN: dict[str, str] = {}
ENVIRONMENTS = [
    PLAIN,
    PLAIN,
    {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"OMP_NUM_THREADS": "2"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    {"MKL_CBWR": "COMPATIBLE"},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"OMP_NUM_THREADS": "2", "MKL_DYNAMIC": "FALSE"},
]
"""The second stops amid its shard, and another process goes on."""
SHARD = """
import json, os, sys
from pathlib import Path
from trainchain.core.adapter import read_adapter
from trainchain.core.models import ResolvedRecipe
from trainchain.core.train import trainer

job = json.loads(Path(sys.argv[1]).read_text())
trainer.REPORT_SECONDS = 0.0

def stop(step, *_):
    if step == job["stop"]:
        os._exit(9)

for precision, path in job["recipes"].items():
    recipe = ResolvedRecipe.model_validate_json(Path(path).read_bytes())
    engine = trainer.Engine(
        recipe, Path(job["model"]), {k: Path(v) for k, v in job["data"].items()},
        threads=int(os.environ["OMP_NUM_THREADS"]), micro_tokens=job["micro_tokens"],
    )
    states = Path(job["states"]) / precision
    try:
        found = engine.train(read_adapter(Path(job["start"])), 1, 0, "0x" + "00" * 32, stop, states=states)
    except RuntimeError as error:  # a kernel that these settings forbid
        print(json.dumps([engine.numeric_class, None, 0, str(error)]))
        continue
    print(json.dumps([engine.numeric_class, found.state_root, found.resumed, found.losses]))
"""


def prepare(folder: Path) -> dict[str, Any]:
    """A job on the quickstart's base, one of whose shards takes a second."""
    with (QUICKSTART / "train.jsonl").open(encoding="utf-8") as lines:
        (folder / "train.jsonl").write_text("".join(islice(lines, 60)), encoding="utf-8")
    recipes = {}
    for precision in ("fp32", "bf16"):
        options = {"precision": precision, "steps": 6, "segment_steps": 2, "sequence_len": 192, "rounds": 1}
        recipe, initial = resolve_recipe(QUICKSTART / "base", folder / "train.jsonl", learning_rate=1e-3, **options)
        path = folder / f"{precision}.json"
        path.write_bytes(recipe.canonical())
        recipes[precision] = str(path)
    (folder / "start.safetensors").write_bytes(initial)
    data = {sha256_file(folder / "train.jsonl"): str(folder / "train.jsonl")}
    return {
        **{"recipes": recipes, "model": str(QUICKSTART / "base"), "data": data},
        **{"start": str(folder / "start.safetensors"), "micro_tokens": 256},
    }


def train(job: dict[str, Any], environment: dict[str, str], folder: Path, stop: int | None = None) -> list[Any]:
    """What a process under these settings makes of the shard, in both precisions; nothing of one that stops."""
    folder.mkdir(exist_ok=True)
    path = folder / "job.json"
    path.write_text(json.dumps(job | {"states": str(folder), "stop": stop}))
    command = [sys.executable, "-c", SHARD, str(path)]
    process = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == (9 if stop else 0), process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.long
def test_machines_of_one_class_compute_the_same_bits(tmp_path: Path) -> None:
    job = prepare(tmp_path)
    roots: dict[str, set[str]] = defaultdict(set)
    whole: list[Any] = []
    for number, environment in enumerate(ENVIRONMENTS):
        folder = tmp_path / str(number)
        if number == 1:
            assert train(job, environment, folder, stop=4) == []
        found = train(job, environment, folder)
        whole.append(found)
        for name, root, _, _ in found:
            assert len(name) <= 200
            assert name.isprintable()
            if root is not None:
                roots[name].add(root)

    assert {name: found for name, found in roots.items() if len(found) != 1} == {}
    # fp32 went on from its first segment's end; bf16 was not begun
    assert [resumed for _, _, resumed, _ in whole[1]] == [1, 0]
    assert [found[:2] for found in whole[1]] == [found[:2] for found in whole[0]]
    assert whole[2][0][0] != whole[0][0][0]
    assert whole[2][0][1] != whole[0][0][1]


def test_the_fingerprint_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()

    found = fingerprint(torch.device("cpu"), torch.bfloat16, before + 1)

    assert torch.get_num_threads() == before
    assert len(bytes.fromhex(found)) == DIGITS // 2


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ("NVIDIA GeForce RTX 4090", "NVIDIA-GeForce-RTX-4090"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA-A100-SXM4-40GB-MIG-3g.20gb"),
        ("odd/name\n\x1b[31m é ", "odd-name-31m"),
        ("x" * 500, "x" * LONGEST_NAME),
    ],
)
def test_a_driver_s_word_for_its_device_is_one_short_part_of_the_class(told: str, named: str) -> None:
    assert _plain(told) == named
