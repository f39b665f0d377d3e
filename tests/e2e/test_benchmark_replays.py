"""The benchmark of replays on a tiny model: honest ends pass, cheats do not, and every figure is told."""

from pathlib import Path

import pytest

from tests.e2e.test_benchmark_train import figures_of, run
from tests.fixtures_model import chat_rows, make_tiny_model, write_jsonl


@pytest.mark.long
def test_a_quick_run_tells_honest_ends_from_cheats(tmp_path: Path) -> None:
    model, data = make_tiny_model(tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", chat_rows(120))

    code, document, text = run("replays.py", "--model", model, "--data", data, "--quick")

    figures = figures_of(document)
    assert code == 0, figures
    assert figures["honest replays"]["value"] > 60
    assert figures["false rejections by the table"]["holds"]
    assert figures["pairs of one class and split that differ"]["holds"]
    for cheat in ("noise in place of training", "other rows", "half of each batch", "one step of the segment skipped"):
        for scene in ("fp32 sdpa fused", "bf16 sdpa fused"):
            assert figures[f"{scene}: {cheat}"]["value"] == 100.0
    assert set(document["classes"]) >= {"again", "two threads", "all AVX2", "a row at a time", "checkpointing"}
    assert str(tmp_path) not in text
