"""A shard without a hub: what it may start from, which folder it may use, what it goes on from."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests import fixtures_child
from tests.fixtures_hub import INITIAL, STEPS, job_files, recipe
from trainchain.core.adapter import adapter_bytes, read_adapter, write_peft_folder
from trainchain.core.errors import TrainChainError
from trainchain.core.models import ResolvedRecipe
from trainchain.core.worker import alone
from trainchain.core.worker.child import Child, child_environment
from trainchain.core.worker.files import JobFiles

FILES = job_files()
RECIPE = recipe(FILES)
START = read_adapter(INITIAL)
FIRST, *_ = sorted(START)
Spoil = Callable[[Path], Any]


class Desk:
    """A recipe's files, and a child to train on them."""

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "out"
        self.notes = root / "notes"
        self.notes.mkdir()
        self.data = root / "train.jsonl"
        self.data.write_bytes(FILES["train-0.jsonl"])
        command = [sys.executable, fixtures_child.__file__, str(self.notes)]
        self.child = Child(command, child_environment(1), root / "trainer.log")
        self.steps: list[int] = []

    def train(self, *, shard: int = 0, round: int = 1, made: ResolvedRecipe = RECIPE) -> dict[str, Any]:
        data = {made.datasets[0].file.sha256: self.data}
        files = JobFiles(made, self.out / alone.RECIPE_FILE, self.root, data)
        options = {"cache": None, "checkpointing": False, "micro_tokens": 64}
        return alone.train(
            self.child, files, START, round, shard, self.out, options, lambda event: self.steps.append(event["step"])
        )


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.child.stop()


def refusal(work: Callable[[], Any], code: str) -> str:
    with pytest.raises(TrainChainError) as caught:
        work()
    assert (caught.value.code, caught.value.exit_code) == (code, 2)
    assert caught.value.hint
    return caught.value.message


def test_what_failed_goes_on_in_the_same_folder(desk: Desk) -> None:
    plan = [{"op": "train", "segment": 3, "code": "train.diverged"}]
    (desk.notes / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(TrainChainError, match=r"train\.diverged"):
        desk.train()

    commitments = desk.train()

    assert (commitments["resumed"], commitments["micro_tokens"]) == (2, [64] * STEPS)
    assert desk.steps == [1, 2, 3, 4]
    assert {path.name for path in desk.out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "commitments.json",
        "delta.safetensors",
        "recipe.json",
        "states",
    }


def test_a_folder_belongs_to_one_shard_of_one_recipe(desk: Desk) -> None:
    desk.train()
    before = {path: path.read_bytes() for path in desk.out.rglob("*") if path.is_file()}
    other = RECIPE.model_copy(update={"name": "other"})

    assert "its shard is another one" in refusal(lambda: desk.train(shard=1), "usage.flag")
    assert "its round is another one" in refusal(lambda: desk.train(round=2), "usage.flag")
    assert "its spec_hash is another one" in refusal(lambda: desk.train(made=other), "usage.flag")
    assert {path: path.read_bytes() for path in desk.out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["notes.txt", "states/shard.json"])
def test_a_folder_that_something_else_lies_in_is_left_alone(desk: Desk, name: str) -> None:
    (desk.out / name).parent.mkdir(parents=True)
    (desk.out / name).write_text("[mine]", encoding="utf-8")

    assert "is not empty" in refusal(desk.train, "usage.flag")

    assert [path for path in desk.out.rglob("*") if path.is_file()] == [desk.out / name]


def put(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    (folder / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(tensors))


def config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}), encoding="utf-8")


UNFIT: dict[str, tuple[Spoil, str]] = {
    "a tensor too few": (lambda f: put(f, {n: t for n, t in START.items() if n != FIRST}), "lacks the tensor"),
    "a tensor too many": (lambda f: put(f, {**START, "x": START[FIRST]}), "has the tensor 'x'"),
    "another shape": (lambda f: put(f, {**START, FIRST: START[FIRST].T.copy()}), "is (6, 2), not (2, 6)"),
    "half precision": (lambda f: put(f, {**START, FIRST: START[FIRST].astype(np.float16)}), "not float32"),
    "no safetensors": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x80\x05"), "not safetensors"),
    "another scale": (lambda f: config(f, lora_alpha=99), "scale"),
    "another rule of scale": (lambda f: config(f, use_rslora=True), "scale"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
    "a broken config": (lambda f: (f / "adapter_config.json").write_text("[]"), "adapter_config.json cannot be read"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_adapter_does_not_fit_with(tmp_path: Path, name: str) -> None:
    spoil, word = UNFIT[name]
    write_peft_folder(tmp_path, START, RECIPE, "base")
    assert alone.start_of(tmp_path, RECIPE, INITIAL).keys() == START.keys()

    spoil(tmp_path)

    assert word in refusal(lambda: alone.start_of(tmp_path, RECIPE, INITIAL), "adapter.unfit")


def test_another_library_s_order_of_tensors_is_the_same_start(tmp_path: Path) -> None:
    write_peft_folder(tmp_path, START, RECIPE, "base")
    put(tmp_path, dict(reversed(START.items())))

    assert adapter_bytes(alone.start_of(tmp_path, RECIPE, INITIAL)) == INITIAL
