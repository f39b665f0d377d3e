"""What only a CUDA device can show. Run with `pytest -m gpu tests/gpu` on a machine that has one."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fixtures_model import chat_rows, make_tiny_model, resolve_recipe, write_jsonl
from trainchain.core.adapter import Adapter, read_adapter
from trainchain.core.digests import sha256_file
from trainchain.core.segments import read_state, segment_ends, start_state, state_digests
from trainchain.core.train.trainer import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
LEASE = "0x" + "ab" * 32
Make = Callable[..., tuple[Engine, Adapter]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    model = make_tiny_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "train.jsonl", chat_rows(24))

    def engine(**options: Any) -> tuple[Engine, Adapter]:
        recipe, initial = resolve_recipe(model, data, None, **options)
        return Engine(recipe, model, {sha256_file(data): data}, threads=1), read_adapter(initial)

    return engine


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_card_gives_the_same_bytes_again(make: Make, tmp_path: Path, precision: str, attention: str) -> None:
    if (precision, attention) == ("fp32", "varlen"):
        pytest.skip("the flash kernel has no fp32")
    engine, start = make(precision=precision, attention=attention, steps=6, segment_steps=2)
    whole = engine.train(start, 1, 0, LEASE, states=tmp_path / "states")
    again, _ = make(precision=precision, attention=attention, steps=6, segment_steps=2)

    assert again.train(start, 1, 0, LEASE).leaves == whole.leaves
    shapes, states = engine._adapted.shapes, [start_state(start)]
    for number, t in enumerate(segment_ends(6, 2), 1):
        path = tmp_path / "states" / f"state-{number:05}.safetensors"
        states.append(read_state(path.read_bytes(), t, shapes))
    for number, (before, after) in enumerate(pairwise(states)):
        assert state_digests(again.replay(before, 1, 0, number)) == state_digests(after)


def test_varlen_and_sdpa_agree(make: Make) -> None:
    results = []
    for attention in ("sdpa", "varlen"):
        engine, start = make(precision="bf16", attention=attention)
        results.append(engine.train(start, 1, 0, LEASE))

    assert results[0].losses == pytest.approx(results[1].losses, rel=0.01)


def test_the_card_and_the_processor_agree_in_fp32(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, start = make()
    card = engine.train(start, 1, 0, LEASE)
    monkeypatch.setattr("accelerate.state.PartialState._shared_state", {})
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    plain, _ = make()
    processor = plain.train(start, 1, 0, LEASE)

    assert (engine._adapted.device.type, plain._adapted.device.type) == ("cuda", "cpu")
    assert card.losses == pytest.approx(processor.losses, rel=1e-4)
    a, b = (np.concatenate([x.ravel() for x in result.delta.values()]) for result in (card, processor))
    assert float(np.linalg.norm(a - b) / np.linalg.norm(b)) < 1e-2


def test_an_nf4_base_trains_on_the_card(make: Make) -> None:
    engine, start = make(precision="bf16", quantization="nf4", adapter_path="peft", steps=20, rounds=1)

    result = engine.train(start, 1, 0, LEASE)

    assert result.losses[1] < result.losses[0]
