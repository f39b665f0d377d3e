"""The benchmark of a real job: it runs, prints one document, and the promises that do not depend on luck hold."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
BASE = SHARED / "models" / "trainchain-tiny-base"
GSM8K = SHARED / "data" / "gsm8k"
SCRIPT = ROOT / "benchmarks" / "real_job.py"


def run(*arguments: str, seconds: float) -> tuple[int, dict[str, Any], str]:
    """Exit code, document, and the document's text; a script that takes too long is asked to end first."""
    command = [sys.executable, str(SCRIPT), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", cwd=ROOT) as process:
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.communicate(timeout=30)
            raise
    return process.returncode, json.loads(text), text


@pytest.mark.real
@pytest.mark.long
@pytest.mark.skipif(
    not BASE.is_dir(), reason="the shared base model is not here: ../shared/models/trainchain-tiny-base"
)
@pytest.mark.skipif(not GSM8K.is_dir(), reason="the shared data is not here: ../shared/data/gsm8k")
def test_a_quick_real_job_learns_and_keeps_its_books() -> None:
    files = ["--model", str(BASE), "--train", str(GSM8K / "train.jsonl"), "--eval", str(GSM8K / "test.jsonl")]

    code, document, text = run(*files, "--quick", seconds=560)

    figures = {figure["name"]: figure for figure in document["figures"]}
    assert code == 0, figures
    assert all(set(figure) == {"name", "value", "unit", "target", "peer", "holds"} for figure in document["figures"])
    before = figures["held-out loss before"]["value"]
    for side in ("trainchain", "single machine"):
        assert figures[f"held-out loss after, {side}"]["value"] < 0.8 * before
    for exact in (
        "reported loss against measured",
        "tokens trained",
        "bytes up against the encoded adapter",
        "the escrow's sum",
    ):
        assert figures[exact]["holds"], figures[exact]
    assert figures["loss gap to the single machine"]["holds"] in (True, False)
    assert figures["contributions accepted"]["value"] == 8
    assert str(ROOT.parent) not in text


@pytest.mark.long
def test_a_run_that_fails_is_an_error_figure_that_names_no_path(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")

    code, document, text = run("--model", absent, "--train", absent, "--eval", absent, "--quick", seconds=120)

    assert code == 1
    assert [(figure["name"], figure["holds"]) for figure in document["figures"]] == [("error: trainchain run", False)]
    assert "source.missing" in document["figures"][0]["value"]
    assert str(tmp_path) not in text
