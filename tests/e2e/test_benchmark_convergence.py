"""The benchmark of merged rounds on a tiny model: it runs to its end, and every side trains the same tokens."""

from pathlib import Path

import pytest

from tests.e2e.test_benchmark_train import figures_of, run
from tests.fixtures_model import chat_rows, make_tiny_model, write_jsonl

DOMAINS = ("Hotels_1", "Homes_1", "Buses_1", "Restaurants_1")


@pytest.mark.long
def test_a_quick_run_compares_every_side(tmp_path: Path) -> None:
    model, data = make_tiny_model(tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", chat_rows(120))
    rows = [{**row, "services": [DOMAINS[at % 4]]} for at, row in enumerate(chat_rows(160))]
    domains = write_jsonl(tmp_path / "domains.jsonl", rows)
    given = (
        "--model",
        model,
        "--train",
        data,
        "--eval",
        data,
        "--domains",
        domains,
        domains,
        "--state",
        tmp_path / "state",
    )

    code, document, _ = run("convergence.py", *given, "--quick")

    figures = figures_of(document)
    assert code == 0, figures
    assert figures["loss above one machine, ours"]["holds"] in (True, False)
    assert figures["loss above one machine, a domain a worker, factor mean"]["value"] is not None
    assert figures["bytes up, bf16 sync of every step as a multiple of ours, 10 steps a round"]["value"] > 10
    assert set(document["tuning"]) == {"one machine", "factor mean", "ours"}
