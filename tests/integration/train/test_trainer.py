from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.fixtures_model import make_tokenizer
from tests.integration.train.conftest import Job
from trainchain.core.adapter import Adapter, apply, read_adapter, write_peft_folder
from trainchain.core.errors import TrainChainError
from trainchain.core.models import Counts
from trainchain.core.schedule import learning_rate
from trainchain.core.segments import proof, start_leaf, verify
from trainchain.core.train.data import TokenizedData, data_order, shard_batches
from trainchain.core.train.evaluate import WORST
from trainchain.core.train.packed import MicroBatch, micro_batch

LEASE = "0x" + "ab" * 32
MakeJob = Callable[..., Job]


def off(found: Adapter, wanted: Adapter) -> float:
    a, b = (np.concatenate([tensor.ravel() for _, tensor in sorted(x.items())]) for x in (found, wanted))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def some_adapter(job: Job, seed: int = 1) -> Adapter:
    random = np.random.default_rng(seed)
    return {name: random.normal(0, 0.2, tensor.shape).astype(np.float32) for name, tensor in job.start.items()}


def plain_peft(job: Job, adapter: Adapter, folder: Path) -> PeftModel:
    """What anybody gets who loads the published folder with the peft library."""
    write_peft_folder(folder, adapter, job.recipe, str(job.model))
    base = AutoModelForCausalLM.from_pretrained(job.model, attn_implementation="eager")
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


def plain_loss(model: PeftModel, documents: TokenizedData, rows: list[int]) -> torch.Tensor:
    """The summed loss by the library's own means: one document at a time, labels with -100."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.from_numpy(documents.ids[row].astype(np.int64))[None]
        labels = ids.masked_fill(~torch.from_numpy(documents.masks[row].copy())[None], -100)
        loss = model(input_ids=ids, labels=labels).loss
        total = total + loss * documents.supervised[row]
    return total


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_and_gradients_are_those_of_plain_peft(make_job: MakeJob, tmp_path: Path, attention: str) -> None:
    job = make_job(attention=attention)
    engine, adapter = job.engine(), some_adapter(job)
    engine._adapted.begin(adapter)
    rows = [0, 5, 3, 8, 1]

    packed = engine._adapted.loss_sum(micro_batch(engine.documents, rows, torch.device("cpu")))
    packed.backward()
    plain = plain_peft(job, adapter, tmp_path / "peft")
    loss = plain_loss(plain, engine.documents, rows)
    loss.backward()

    assert float(packed.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    ours = {name: p.grad for name, p in engine._adapted.model.named_parameters() if p.grad is not None}
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs) == {name.replace(".weight", ".default.weight") for name in adapter}
    for name, gradient in ours.items():
        assert float((gradient - theirs[name]).norm() / theirs[name].norm()) < 1e-5


def test_the_split_into_micro_batches_does_not_change_the_maths(make_job: MakeJob) -> None:
    results = [
        make_job(micro_batch_size=size, steps=2).engine().train(job.start, 1, 0, LEASE)
        for size in (1, 2, 3, 4)
        for job in [make_job(steps=2)]
    ]

    for result in results[1:]:
        assert result.losses == pytest.approx(results[0].losses, rel=1e-5)
        assert off(result.delta, results[0].delta) < 1e-3


def test_a_shard_is_the_same_to_the_bit_when_trained_again(make_job: MakeJob) -> None:
    job = make_job()
    engine = job.engine()
    first = engine.train(job.start, 1, 1, LEASE)
    engine.train(first.end, 2, 0, LEASE)
    engine.evaluate(some_adapter(job))
    again = engine.train(job.start, 1, 1, LEASE)

    assert again.state_root == first.state_root
    assert all(again.delta[name].tobytes() == first.delta[name].tobytes() for name in first.delta)
    assert make_job().engine().train(job.start, 1, 1, LEASE).leaves == first.leaves


def test_the_loss_goes_down_and_the_result_hangs_together(make_job: MakeJob) -> None:
    job = make_job(steps=30, rounds=1, shards=1)
    engine = job.engine()
    seen: list[tuple[int, int, int, float]] = []

    result = engine.train(job.start, 1, 0, LEASE, lambda *event: seen.append(event))

    first, last, mean = result.losses
    assert last < mean < first
    assert engine.evaluate(result.end) < engine.evaluate(None) - 0.5
    assert seen[-1][:3] == (30, 30, result.counts.tokens)
    assert result.counts == job.recipe.counts[0][0]
    assert off(apply(job.start, result.delta), result.end) < 1e-6
    assert result.leaves[0] == start_leaf(bytes.fromhex(LEASE[2:]), job.start)
    assert len(set(result.leaves)) == len(result.leaves) == 1 + 15
    assert verify(result.state_root, result.leaves[15], 15, 16, proof(result.leaves, 15))
    assert [segment.t for segment in result.segments] == list(range(2, 31, 2))
    reach = 3 * job.recipe.training.learning_rate * job.recipe.steps
    assert max(np.abs(tensor).max() for tensor in result.delta.values()) < reach


def test_one_shard_is_one_hand_written_loop(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(steps=3)
    engine, start = job.engine(), some_adapter(job)
    model = plain_peft(job, start, tmp_path / "peft")
    parameters = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    training = job.recipe.training
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    for number, step in enumerate(shard_batches(job.recipe, data_order(job.recipe, engine.documents), 1, 0), 1):
        rows = [row for sequence in step for row in sequence]
        optimizer.param_groups[0]["lr"] = learning_rate(job.recipe, 1, number)
        targets = sum(engine.documents.supervised[row] for row in rows)
        (plain_loss(model, engine.documents, rows) / targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    result = engine.train(start, 1, 0, LEASE)

    trained = {
        name.replace(".default.", "."): p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad
    }
    assert off(result.delta, {name: trained[name] - start[name] for name in start}) < 1e-2
    assert off(result.end, trained) < 1e-4


def test_evaluate_is_what_plain_peft_says(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job()
    engine, adapter = job.engine(), some_adapter(job)
    documents = engine.held_out()
    rows, targets = list(range(len(documents.ids))), sum(documents.supervised)
    model = plain_peft(job, adapter, tmp_path / "peft")

    with torch.no_grad():
        tuned = float(plain_loss(model, documents, rows)) / targets
        with model.disable_adapter():
            base = float(plain_loss(model, documents, rows)) / targets

    assert engine.evaluate(adapter) == pytest.approx(tuned, abs=1e-4)
    assert engine.evaluate(None) == pytest.approx(base, abs=1e-4)
    assert abs(tuned - base) > 1e-2
    assert len(rows) == 5


def test_bf16_trains_close_to_fp32(make_job: MakeJob) -> None:
    job = make_job(precision="bf16")
    exact = make_job().engine().train(job.start, 1, 0, LEASE)

    result = job.engine().train(job.start, 1, 0, LEASE)

    assert "/bf16/" in result.numeric_class
    assert all(tensor.dtype == np.float32 for tensor in result.end.values())
    assert result.losses == pytest.approx(exact.losses, rel=0.02)
    assert 0 < off(result.delta, exact.delta) < 0.5


def test_gpt2_trains_too(make_job: MakeJob, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    tokenizer = make_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    job = make_job(model=folder, steps=20, rounds=1)
    engine = job.engine()

    result = engine.train(job.start, 1, 0, LEASE)

    assert result.losses[1] < result.losses[0]


def test_other_counts_than_the_pinned_stop_before_training(make_job: MakeJob) -> None:
    job = make_job()
    counts = [list(round) for round in job.recipe.counts]
    counts[0][1] = Counts(rows=1, tokens=2, supervised=1)
    job.recipe = job.recipe.model_copy(update={"counts": counts})
    engine = job.engine()

    engine.train(job.start, 1, 0, LEASE)
    with pytest.raises(TrainChainError) as caught:
        engine.train(job.start, 1, 1, LEASE)

    assert caught.value.code == "data.count_mismatch"
    assert caught.value.facts["pinned"] == {"rows": 1, "tokens": 2, "supervised": 1}


def test_a_loss_that_is_no_number_ends_the_shard(make_job: MakeJob) -> None:
    job = make_job()
    start = {name: np.full_like(tensor, 1e30) for name, tensor in job.start.items()}

    for on_step in (None, lambda *_: None):
        with pytest.raises(TrainChainError) as caught:
            job.engine().train(start, 1, 0, LEASE, on_step)
        assert caught.value.code == "train.diverged"


def test_memory_that_runs_out_is_said(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    job = make_job()
    engine = job.engine()
    monkeypatch.setattr(engine._adapted, "step", full)

    with pytest.raises(TrainChainError) as caught:
        engine.train(job.start, 1, 0, LEASE)
    assert caught.value.code == "train.out_of_memory"


def test_an_adapter_of_other_targets_is_refused(make_job: MakeJob) -> None:
    job = make_job()
    engine = job.engine()
    other = read_adapter(make_job(targets=["q_proj"]).initial)

    with pytest.raises(TrainChainError) as caught:
        engine.train(other, 1, 0, LEASE)
    assert caught.value.code == "job.invalid"
    assert "down_proj.lora_A.weight is not there" in caught.value.message


def test_a_model_whose_documents_leak_is_refused(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()
    monkeypatch.setattr("trainchain.core.train.adapted.ATTENTION", {"sdpa": "sdpa"})
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)

    with pytest.raises(TrainChainError, match="does not keep packed documents apart") as caught:
        job.engine()
    assert caught.value.code == "model.unreadable"


def test_a_ruined_model_has_the_worst_held_out_loss(make_job: MakeJob) -> None:
    """What no evaluator could report on would be merged unjudged."""
    job = make_job()

    assert job.engine().evaluate({name: np.full_like(tensor, 1e30) for name, tensor in job.start.items()}) == WORST


def test_what_explodes_is_named(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = make_job(steps=4, segment_steps=4)
    engine = job.engine()
    figures = iter([(2.0, 1.0), (2.0, np.inf), (2.0, np.nan), (2.0, np.nan)])
    monkeypatch.setattr(engine._adapted, "step", lambda *_: tuple(map(torch.tensor, next(figures))))
    with pytest.raises(TrainChainError, match="the gradient of step 2 is inf") as caught:
        engine.train(job.start, 1, 0, LEASE, states=tmp_path / "states")
    assert caught.value.code == "train.diverged"
    assert not list((tmp_path / "states").glob("*.safetensors"))

    def spoil(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        engine._adapted._weights.data[-1] = torch.nan
        return torch.tensor(1.0), torch.tensor(1.0)

    monkeypatch.setattr(engine._adapted, "step", spoil)
    with pytest.raises(TrainChainError, match=r"lora_B\.weight is not finite after step 4"):
        engine.train(job.start, 1, 0, LEASE)


def test_weight_decay_clip_and_schedule_are_the_recipes(make_job: MakeJob) -> None:
    options = {"steps": 6, "lr_scheduler": "cosine", "warmup_steps": 2, "rounds": 2, "weight_decay": 0.1}
    job = make_job(**options, max_grad_norm=0.05)
    engine, start = job.engine(), some_adapter(job)
    rates: list[float] = []
    norms: list[float] = []
    step = engine._adapted.step

    def watch(batches: list[list[MicroBatch]], targets: int, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        found = step(batches, targets, rate)
        rates.append(rate)
        norms.append(float(engine._adapted._gradients.norm()))
        return found

    engine._adapted.step = watch  # type: ignore[method-assign]
    engine.train(start, 1, 0, LEASE)
    engine.train(start, 2, 0, LEASE)

    peak = job.recipe.training.learning_rate
    assert rates[:3] == [peak / 2, peak, peak]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.1 * peak
    assert norms == pytest.approx([0.05] * 12, rel=1e-3)
    parameter = engine._adapted._optimizer.param_groups[0]
    assert (parameter["weight_decay"], parameter["lr"]) == (0.1, rates[-1])
