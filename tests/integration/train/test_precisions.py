"""What the recipe's precision, base and kernel demand of a machine, and what comes out."""

import importlib.util
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.integration.train.conftest import Job
from trainchain.core.errors import TrainChainError
from trainchain.core.train.device import check_device

LEASE = "0x" + "ab" * 32
MakeJob = Callable[..., Job]


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp16", 0.005)])
@pytest.mark.parametrize("adapter_path", ["fused", "peft"])
def test_half_precision_trains_close_to_fp32(
    make_job: MakeJob, precision: str, tolerance: float, adapter_path: str
) -> None:
    job = make_job(precision=precision, adapter_path=adapter_path)
    exact = make_job().engine().train(job.start, 1, 0, LEASE)
    engine = job.engine()

    result = engine.train(job.start, 1, 0, LEASE)

    assert f"/{precision}/" in result.numeric_class
    assert result.numeric_class.endswith("/" + adapter_path)
    assert {parameter.dtype for parameter in engine._adapted.model.parameters()} == {
        torch.float32,
        {"bf16": torch.bfloat16, "fp16": torch.float16}[precision],
    }
    assert all(tensor.dtype == np.float32 for tensor in result.end.values())
    assert result.losses == pytest.approx(exact.losses, rel=tolerance)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_an_nf4_base_trains_close_to_the_whole_one(make_job: MakeJob) -> None:
    job = make_job(quantization="nf4", adapter_path="peft", steps=20, rounds=1, shards=1)
    exact = make_job(steps=20, rounds=1, shards=1).engine().train(job.start, 1, 0, LEASE)
    engine = job.engine()

    result = engine.train(job.start, 1, 0, LEASE)

    kinds = {type(module).__name__ for module in engine._adapted.base.modules()}
    assert "Linear4bit" in kinds
    assert "/nf4-fp32/" in result.numeric_class
    assert result.losses[1] < result.losses[0] - 0.5
    assert result.losses == pytest.approx(exact.losses, rel=0.1)
    assert job.engine().train(job.start, 1, 0, LEASE).leaves == result.leaves


def test_what_a_machine_lacks_is_said_before_anything_is_loaded(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainChainError, match="varlen attention kernel, which needs a CUDA") as caught:
        make_job(attention="varlen").engine()
    assert caught.value.code == "train.unsupported"

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    job = make_job(quantization="nf4")
    with pytest.raises(TrainChainError, match="bitsandbytes is not installed") as caught:
        check_device(torch.device("cpu"), job.recipe.training)
    assert caught.value.code == "train.unsupported"
    assert "trainchain[cuda]" in caught.value.hint


def test_the_prompts_of_a_recipe_are_answered(make_job: MakeJob) -> None:
    prompts = ["Where do fish live?", "What is the colour of the sky?"]
    job = make_job(samples=prompts, steps=60, rounds=1, shards=1, learning_rate=2e-2)
    engine = job.engine()
    result = engine.train(job.start, 1, 0, LEASE)
    before, after = engine.samples(None), engine.samples(result.end)

    assert len(before) == len(after) == 2
    assert before != after
    assert engine.samples(result.end) == after
    assert job.engine().samples(result.end) == after
    single = make_job(samples=prompts[:1], steps=60, rounds=1, shards=1, learning_rate=2e-2).engine()
    assert single.samples(result.end) == after[:1]
    assert make_job().engine().samples(None) == []
    again = engine.train(job.start, 1, 0, LEASE)
    assert again.leaves == result.leaves
