"""The benchmark of paying on few leaves: it runs, prints one document, and what it promises of gas holds."""

from pathlib import Path

import pytest

from tests.e2e.test_benchmark_train import figures_of, run


@pytest.mark.long
def test_a_quick_look_at_what_paying_costs(tmp_path: Path) -> None:
    code, document, text = run("chain.py", "--quick", "--scratch", tmp_path)

    figures = figures_of(document)
    assert code == 0, figures
    assert all(figure["holds"] for figure in figures.values() if figure["unit"] == "gas")
    assert figures["settle 1,000 workers, after"]["value"] < figures["settle 1,000 workers, first"]["value"]
    assert figures["contribution signatures verified"]["peer"].startswith("eth_account: ")
    assert figures["embedded chain opened after import, median"]["value"] > 0
    assert str(tmp_path) not in text
    assert not list(tmp_path.iterdir())
