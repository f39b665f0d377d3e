"""The benchmarks of merging on little: they run, print one document each, and say what they measured."""

from pathlib import Path

import pytest

from tests.e2e.test_benchmark_train import figures_of, run
from tests.fixtures_model import chat_rows, make_tiny_model, write_jsonl


@pytest.mark.long
@pytest.mark.parametrize("more", [(), ("--llama",)])
def test_a_quick_merge_is_timed_beside_peft(tmp_path: Path, more: tuple[str, ...]) -> None:
    code, document, text = run("merge.py", "--quick", "--scratch", tmp_path, *more)

    figures = figures_of(document)
    assert code == 0, figures
    assert all(figures[name]["holds"] for name in ("merge, wall", "merge, CPU", "peak anonymous memory"))
    assert 0 < figures["peak anonymous memory"]["value"] < figures["peak resident memory"]["value"]
    assert 0 < figures["largest error of a module"]["value"] < 1
    assert figures["PEFT svd, all modules"]["value"] > 0
    assert str(tmp_path) not in text
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_adapters_that_do_not_fit_the_disk_are_not_begun(tmp_path: Path) -> None:
    code, document, _ = run("merge.py", "--adapters", "1000000", "--scratch", tmp_path)

    assert code == 1
    assert "do not fit" in figures_of(document)["error: a side"]["value"]


@pytest.mark.long
def test_a_quick_attack_is_measured(tmp_path: Path) -> None:
    model, data = make_tiny_model(tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", chat_rows(60))

    code, document, text = run("attacks.py", "--quick", "--model", model, "--train", data, "--eval", data)

    figures = figures_of(document)
    assert code == 0, figures
    for rule in ("gate", "none"):
        assert set(document["cost in % by rule, 1 of 4"][rule]) == {"nobody", "sign flip", "ALIE"}
    assert figures["1 of 4: gate, sign flip"]["peer"].startswith("of 6 honest 0 left out")
    assert figures["1 of 4: gate, nobody attacks"]["holds"] in (True, False)
    assert str(tmp_path) not in text
