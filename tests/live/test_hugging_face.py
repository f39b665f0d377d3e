"""The real Hugging Face Hub, asked by our own code: what no server of the tests' own can prove.

Never run in CI: it needs the network, and the push needs a token that may write. To run it,

    TRAINCHAIN_LIVE=1 HF_TOKEN=... TRAINCHAIN_LIVE_REPO=you/scratch python -m pytest -m live tests/live
"""

import hashlib
import os
import struct
from pathlib import Path

import pytest

from trainchain.core.errors import TrainChainError
from trainchain.core.sources.address import parse
from trainchain.core.sources.hf import HuggingFace

LIVE = os.environ.get("TRAINCHAIN_LIVE") == "1"
REPO = os.environ.get("TRAINCHAIN_LIVE_REPO", "")
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not LIVE, reason="asks the real Hugging Face; never run in CI, only with TRAINCHAIN_LIVE=1"),
]
MODEL, DATA, GATED = "hf://HuggingFaceTB/SmolLM2-135M", "hf://datasets/rajpurkar/squad", "hf://meta-llama/Llama-3.2-1B"


def test_a_public_model_is_pinned_and_a_file_of_it_fetched_and_found_whole(tmp_path: Path) -> None:
    source = HuggingFace()

    found = source.find(parse(MODEL, "model"), "model")
    files = {file.path: file for file in found.files}

    assert found.license == "apache-2.0"
    weights = files["model.safetensors"]
    assert weights.sha256 is not None
    begin = source.head(found.source, weights.path, 8)
    assert begin is not None
    assert 0 < struct.unpack("<Q", begin)[0] < 10_000_000
    source.fetch(found.source, "config.json", tmp_path / "config", size=files["config.json"].size)
    part = tmp_path / "part"
    source.fetch(found.source, weights.path, part, size=weights.size)
    assert hashlib.sha256(part.read_bytes()).hexdigest() == weights.sha256


def test_a_public_data_set_is_parquet_with_known_hashes() -> None:
    found = HuggingFace().find(parse(DATA, "data"), "data")

    assert found.files
    assert all(file.sha256 for file in found.files if file.path.endswith(".parquet"))


def test_a_typo_a_revision_that_is_not_there_and_a_gated_model_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", os.devnull)
    for text, code in (
        ("hf://HuggingFaceTB/SmolLM2-135MM", "source.not_found"),
        (f"{MODEL}@no-such-branch", "source.not_found"),
        (GATED, "source.gated"),
    ):
        with pytest.raises(TrainChainError) as failed:
            HuggingFace().find(parse(text, "model"), "model")
        assert failed.value.code == code
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    with pytest.raises(TrainChainError) as failed:
        HuggingFace().find(parse(MODEL, "model"), "model")
    assert failed.value.code == "source.token"


@pytest.mark.skipif(not REPO, reason="set TRAINCHAIN_LIVE_REPO=you/scratch to try a push there")
def test_a_push_makes_one_commit_and_the_same_again_none(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(os.urandom(100_000))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nA test of TrainChain.\n")
    source, target = HuggingFace(), parse(REPO, "target")

    first = source.push(tmp_path, target, message="A test", private=True)
    again = source.push(tmp_path, target, message="A test", private=True)

    assert first.created
    assert again.created is False
    assert again.commit == first.commit
