"""The speed and learning benchmarks on a tiny model: every side trains the same, and what is absent is said."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_model import chat_rows, make_tiny_model, write_jsonl

ROOT = Path(__file__).parents[2]
HAS_TRL = all(importlib.util.find_spec(name) for name in ("trl", "datasets"))
OURS = ("trainchain, fused path", "trainchain, peft path")


def run(script: str, *arguments: str | Path, seconds: float = 560) -> tuple[int, dict[str, Any], str]:
    """Exit code, document, and the document's text; a script that takes too long is asked to end first."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", cwd=ROOT, env=environment) as process:
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.communicate(timeout=30)
            raise
    return process.returncode, json.loads(text), text


def figures_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    assert all(set(each) == {"name", "value", "unit", "target", "peer", "holds"} for each in document["figures"])
    return {figure["name"]: figure for figure in document["figures"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and a data file."""
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny_model(folder / "model"), write_jsonl(folder / "rows.jsonl", chat_rows(60))


@pytest.mark.long
def test_a_quick_speed_run_trains_every_side_the_same(tiny: tuple[Path, Path]) -> None:
    model, data = tiny

    code, document, text = run("train.py", "--model", model, "--data", data, "--quick", "--threads", "1")

    figures = figures_of(document)
    assert code == 0, figures
    for side in (*OURS, "plain loop, micro 1", "plain loop, micro 2"):
        assert figures[side]["value"] > 0
        assert figures[f"loss, {side}"]["value"] < figures["loss, before"]["value"]
    assert figures["loss, apart where the rows of a step are the same"]["holds"]
    assert figures[f"{OURS[0]}, against the plain loop's best"]["value"] > 0
    assert all(peak > 0 for peak in document["rounds"][0]["product_gflops"])
    assert figures["whole overhead of a resident shard of 1 step"]["holds"] in (True, False)
    if HAS_TRL:
        assert figures["TRL packed rows, micro 1"]["value"] > 0
        assert figures[f"{OURS[0]}, against TRL's best"]["peer"].startswith("TRL ")
    else:
        assert figures["TRL"]["value"].startswith("left out: no trl")
        assert f"{OURS[0]}, against TRL's best" not in figures
    assert str(model.parent) not in text


@pytest.mark.long
def test_a_quick_learning_run_goes_on_where_it_stopped(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = tiny
    arguments = ("--model", model, "--train", data, "--eval", data, "--quick", "--state", tmp_path / "state")

    code, first, text = run("learning.py", *arguments)
    trained = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "state").glob("trainchain-*.safetensors")}
    again, second, _ = run("learning.py", *arguments)

    figures = figures_of(first)
    assert code == again == 0, figures
    assert figures["held-out loss, trainchain, mean"]["value"] < figures["held-out loss before"]["value"]
    assert ("loss gap to tuned TRL, mean over seeds" in figures) == HAS_TRL
    assert ("TRL" in figures) == (not HAS_TRL)
    assert second["figures"] == first["figures"]
    assert len(trained) == 3
    assert trained == {name: (tmp_path / "state" / name).stat().st_mtime_ns for name in trained}
    assert str(tmp_path) not in text


@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "data", "name"), [("train.py", ("--data",), "the job"), ("learning.py", ("--train", "--eval"), "a run")]
)
def test_a_run_that_fails_is_an_error_figure_that_names_no_path(
    script: str, data: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    absent = tmp_path / "absent"

    code, document, text = run(script, "--model", absent, "--quick", *(part for key in data for part in (key, absent)))

    *_, last = document["figures"]
    assert code == 1
    assert (last["name"], last["holds"]) == (f"error: {name}", False)
    assert str(tmp_path) not in text
