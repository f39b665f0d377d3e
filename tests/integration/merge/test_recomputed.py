"""A round's merge computed again by somebody else: another process, other kernels, more threads."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainchain.core.adapter import Adapter, adapter_bytes, read_adapter

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from tests.fixtures_merge import PLAIN_MERGE
from trainchain.core.adapter import adapter_bytes
from trainchain.core.merge.updates import Update, merge

random = np.random.default_rng(7)
names = [f"base_model.model.layer{at}.lora_{side}.weight" for at in range(3) for side in "AB"]
shapes = {name: (8, 384) if "lora_A" in name else (320, 8) for name in names}
start = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
updates = [
    Update(f"{at:064x}", 100 + at, {name: 0.1 * random.normal(size=s).astype(np.float32) for name, s in shapes.items()})
    for at in range(int(sys.argv[2]))
]
way = PLAIN_MERGE.model_copy(update={"rule": "gate"})
Path(sys.argv[1]).write_bytes(adapter_bytes(merge(way, start, updates).adapter))
"""
FEW, MANY = 4, 40
"""Of rank 8 together below and above what QR and a small SVD are taken for."""


def recompute(folder: Path, name: str, count: int, **environment: str) -> bytes:
    target = folder / name
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(target), str(count)],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd()), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target.read_bytes()


def products(adapter: Adapter) -> list[np.ndarray]:
    modules = sorted(name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight"))
    return [
        adapter[f"{module}.lora_B.weight"].astype(np.float64) @ adapter[f"{module}.lora_A.weight"].astype(np.float64)
        for module in modules
    ]


@pytest.mark.parametrize("count", [FEW, MANY])
def test_the_same_build_on_one_thread_gives_the_same_bytes(tmp_path: Path, count: int) -> None:
    assert recompute(tmp_path, "one", count) == recompute(tmp_path, "other", count)


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize(
    "elsewhere",
    [{"OPENBLAS_CORETYPE": "PRESCOTT"}, {"OPENBLAS_CORETYPE": "SANDYBRIDGE"}, {"OPENBLAS_NUM_THREADS": "2"}],
    ids=lambda given: "-".join(given.values()),
)
def test_elsewhere_every_product_is_the_same_to_a_millionth(
    tmp_path: Path, count: int, elsewhere: dict[str, str]
) -> None:
    here, there = recompute(tmp_path, "here", count), recompute(tmp_path, "there", count, **elsewhere)

    for mine, theirs in zip(products(read_adapter(here)), products(read_adapter(there)), strict=True):
        assert np.linalg.norm(theirs - mine) <= 1e-6 * np.linalg.norm(mine)
    assert adapter_bytes(read_adapter(there)) == there
