"""The quickstart's files: small, well-formed, and the ones that its script makes. Imports no torch."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "quickstart"
BASE_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_make", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def test_the_folder_is_small() -> None:
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if "__pycache__" not in path.parts and path.is_file()]
    assert sum(sizes) < 8_000_000


def test_the_base_is_data_only() -> None:
    assert {path.name for path in (FOLDER / "base").iterdir()} == BASE_FILES


@pytest.mark.parametrize(("name", "count"), [("train.jsonl", 2000), ("held_out.jsonl", 200)])
def test_every_row_is_a_question_and_its_answer(name: str, count: int) -> None:
    every = rows(name)
    assert len(every) == count
    for row in every:
        assert set(row) == {"messages"}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(set(message) == {"role", "content"} for message in row["messages"])
        assert all(isinstance(message["content"], str) and message["content"] for message in row["messages"])


def test_no_question_is_asked_twice() -> None:
    questions = [row["messages"][0]["content"] for name in ("train.jsonl", "held_out.jsonl") for row in rows(name)]
    assert len(set(questions)) == len(questions)


def test_the_data_is_what_the_script_makes(make: ModuleType) -> None:
    for name, data in make.data_files(make.SEED).items():
        assert (FOLDER / name).read_bytes() == data, f"{name} is not what make.py writes: run make.py --check"


@pytest.mark.parametrize(("change", "status"), [(b"", 0), (b"\n", 1)])
def test_check_tells_by_its_exit_status(
    make: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: bytes, status: int
) -> None:
    for name, data in make.data_files(make.SEED).items():
        (tmp_path / name).write_bytes(data + change)
    monkeypatch.setattr(sys, "argv", ["make.py", "--check", "--folder", str(tmp_path)])
    assert make.main() == status


def test_another_seed_makes_other_data(make: ModuleType) -> None:
    assert make.data_files(make.SEED + 1) != make.data_files(make.SEED)


def test_the_base_never_sees_the_task(make: ModuleType) -> None:
    task_text = {text for chat in make.task(make.SEED, 300) for text in chat}
    general = make.general(make.SEED)
    for _ in range(3000):
        doc = next(general)
        text = doc if isinstance(doc, str) else "\n".join(doc)
        assert "Northwind" not in text
        assert text not in task_text


def test_the_chat_template_marks_the_answer() -> None:
    config = json.loads((FOLDER / "base" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "{%- generation -%}" in config["chat_template"]


def test_the_recipe_names_files_that_are_here() -> None:
    recipe = yaml.safe_load((FOLDER / "recipe.yaml").read_text(encoding="utf-8"))
    paths = [recipe["base_model"], recipe["datasets"][0]["path"], recipe["test_datasets"][0]["path"]]
    assert all((FOLDER / path).exists() for path in paths)
    config = json.loads((FOLDER / "base" / "config.json").read_text(encoding="utf-8"))
    assert recipe["sequence_len"] <= config["max_position_embeddings"]
    assert recipe["test_datasets"][0]["rows"] <= len(rows("held_out.jsonl"))


def test_the_budget_exceeds_the_price() -> None:
    recipe = yaml.safe_load((FOLDER / "recipe.yaml").read_text(encoding="utf-8"))
    batch = recipe["micro_batch_size"] * recipe["gradient_accumulation_steps"] * recipe["sequence_len"]
    most = recipe["rounds"] * recipe["shards"] * recipe["steps"] * batch
    assert float(recipe["pay"]["budget"]) > 2 * most * float(recipe["pay"]["per_million_tokens"]) / 1e6
