"""Two jobs on the tiny model, as cheats and auditors see a shard of their second round."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.crooked import Crooked, crooked, quantized_model
from tests.attacks.lab import Lab
from tests.e2e.conftest import machine, tiny_job  # noqa: F401 (fixtures)
from tests.fixtures_model import chat_rows, make_tiny_model, resolve_recipe, write_jsonl
from trainchain.core.adapter import apply, read_adapter
from trainchain.core.digests import sha256_file
from trainchain.core.encodings import decode, encode
from trainchain.core.train.trainer import Engine

JOBS: dict[str, dict[str, Any]] = {
    "fp32": {"steps": 12, "segment_steps": 3, "merge": {}},
    "bf16": {"steps": 8, "segment_steps": 2, "merge": {"moments": "merged", "encoding": "int4"}},
}
"""Of four segments each: one whose shards begin with moments of their own, one that hands them on."""


@dataclass
class Scene:
    """A lab, and engines beside the recipe's: auditors' of another class, and cheats' with a base of fewer bits."""

    lab: Lab
    other_class: Crooked
    variant: Callable[..., Crooked]


@pytest.fixture(scope="session")
def make_scene(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scene]:
    made: dict[str, Scene] = {}

    def make(precision: str) -> Scene:
        if precision not in made:
            made[precision] = make_scene_in(tmp_path_factory.mktemp(precision), precision)
        return made[precision]

    return make


def make_scene_in(folder: Path, precision: str) -> Scene:
    model = make_tiny_model(folder / "model")
    data = write_jsonl(folder / "train.jsonl", chat_rows(96))
    recipe, initial = resolve_recipe(model, data, precision=precision, r=4, batch_size=4, **JOBS[precision])
    files, way, start = {sha256_file(data): data}, recipe.merge, read_adapter(initial)
    first = Engine(recipe, model, files, threads=1).train(start, 1, 0, "0x" + "00" * 32)
    shapes = {name: tensor.shape for name, tensor in start.items()}
    moments = first.moments if way.hands_on else None
    step = decode(encode(first.delta, way.encoding, moments), way.encoding, shapes, moments=way.hands_on)

    def variant(bits: int = 0, attention: str = "sdpa", micro_tokens: int | None = None, **training: Any) -> Crooked:
        base = quantized_model(model, folder / f"int{bits}", bits) if bits else model
        other = recipe.training.model_copy(update={"attention": attention, **training})
        return crooked(recipe.model_copy(update={"training": other}), base, files, micro_tokens)

    lab = Lab(recipe, model, files, apply(start, step.delta), step.moments)
    return Scene(lab, variant(attention="eager", micro_tokens=40), variant)


@pytest.fixture(scope="session")
def fp32(make_scene: Callable[[str], Scene]) -> Scene:
    return make_scene("fp32")


@pytest.fixture(scope="session")
def bf16(make_scene: Callable[[str], Scene]) -> Scene:
    return make_scene("bf16")
