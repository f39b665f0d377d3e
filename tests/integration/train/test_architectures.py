"""Each family of models: found, packed, trained, published, read back by PEFT alone, merged."""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.fixtures_architectures import FAMILIES, WINDOW, Family
from tests.fixtures_merge import PLAIN_MERGE
from tests.fixtures_model import resolve_recipe, write_jsonl
from tests.integration.train.conftest import Job
from trainchain.core.adapter import Adapter, read_adapter, write_peft_folder
from trainchain.core.digests import sha256_file
from trainchain.core.errors import TrainChainError
from trainchain.core.merge.updates import Update, merge
from trainchain.core.train.data import TokenizedData
from trainchain.core.train.model import find_targets, load_tokenizer
from trainchain.core.train.packed import micro_batch
from trainchain.core.train.trainer import Engine

MakeJob = Callable[..., Job]
LEASE = "0x" + "cd" * 32
SAMPLE = {"llama", "mistral", "gemma2", "phi", "gpt2", "opt", "granite", "mixtral"}
"""What `make test` runs of those that take longer."""
EACH = [
    pytest.param((name, path), id=f"{name}-{path}", marks=[] if name in SAMPLE else [pytest.mark.long])
    for name in FAMILIES
    for path in ("peft", "fused")
]


@dataclass
class Opened:
    job: Job
    engine: Engine

    def peft(self, adapter: Adapter, folder: Path) -> PeftModel:
        """What anybody gets who loads the published folder with the peft library."""
        write_peft_folder(folder, adapter, self.job.recipe, str(self.job.model))
        base = AutoModelForCausalLM.from_pretrained(self.job.model, attn_implementation="eager", dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but")  # peft sets it for GPT-2 itself
            return PeftModel.from_pretrained(base, folder, is_trainable=True).eval()

    def some_adapter(self) -> Adapter:
        random = np.random.default_rng(1)
        return {name: random.normal(0, 0.1, tensor.shape).astype(np.float32) for name, tensor in self.job.start.items()}


@pytest.fixture
def open_job(make_job: MakeJob, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    engines: list[Engine] = []

    def make(family: Family, path: str, folder: Path, **options: Any) -> Opened:
        chosen = {"attention": family.attention, "adapter_path": path, "steps": 20, "rounds": 1, "segment_steps": 10}
        job = make_job(folder, **{**chosen, **options})
        engines.append(job.engine())
        return Opened(job, engines[-1])

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def opened(request: pytest.FixtureRequest, open_job: Callable[..., Opened], tmp_path: Path) -> Opened:
    name, path = request.param
    return open_job(FAMILIES[name], path, FAMILIES[name].make(tmp_path / name))


def plain_loss(model: PeftModel, documents: TokenizedData, rows: list[int]) -> torch.Tensor:
    """The summed loss by the library's own means: one document at a time, labels with -100."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.from_numpy(documents.ids[row].astype(np.int64))[None]
        labels = ids.masked_fill(~torch.from_numpy(np.array(documents.masks[row], np.bool_))[None], -100)
        total = total + model(input_ids=ids, labels=labels, use_cache=False).loss * int(documents.supervised[row])
    return total


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_finds_every_linear_module_and_no_other(name: str, tmp_path: Path) -> None:
    folder = FAMILIES[name].make(tmp_path)

    targets = find_targets(folder, "all-linear")

    assert {target.rpartition(".")[2] for target in targets} == FAMILIES[name].linear
    base = AutoModelForCausalLM.from_pretrained(folder)
    head = base.get_output_embeddings()
    linear = {n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head}
    assert {module.rpartition(".")[2] for module in linear - set(targets)} == FAMILIES[name].left
    assert set(targets) <= linear
    assert find_targets(folder, sorted(FAMILIES[name].linear)) == targets


@pytest.mark.parametrize("opened", EACH, indirect=True)
def test_packed_loss_and_gradients_are_those_of_plain_peft(opened: Opened, tmp_path: Path) -> None:
    documents, adapted, adapter = opened.engine.documents, opened.engine._adapted, opened.some_adapter()
    rows = [0, 5, 3, 8, 1]
    assert adapted.adapter_path == opened.job.recipe.training.adapter_path
    assert min(len(documents.ids[row]) for row in rows) > 2 * WINDOW

    adapted.begin(adapter)
    packed = adapted.loss_sum(micro_batch(documents, rows, torch.device("cpu")))
    packed.backward()
    ours = adapted._parted(adapted._gradients)
    plain = opened.peft(adapter, tmp_path)
    loss = plain_loss(plain, documents, rows)
    loss.backward()

    assert float(packed.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    theirs = {n.replace(".default.", "."): p.grad.numpy() for n, p in plain.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs) == set(adapter)
    whole = np.sqrt(sum(float((gradient**2).sum()) for gradient in theirs.values()))
    for tensor, gradient in ours.items():
        assert float(np.linalg.norm(gradient - theirs[tensor])) < 1e-5 * max(
            float(np.linalg.norm(theirs[tensor])), 1e-3 * whole
        )


@pytest.mark.parametrize("opened", EACH, indirect=True)
def test_it_trains_and_what_is_published_is_what_was_trained(opened: Opened, tmp_path: Path) -> None:
    train_and_publish(opened, tmp_path)


def train_and_publish(opened: Opened, folder: Path, *, off: float = 1e-4) -> None:
    """Two shards: the loss falls, and PEFT alone reads the same loss from the first one's end and from the merge."""
    job, engine = opened.job, opened.engine
    documents = engine.held_out()
    rows, targets = list(range(len(documents.ids))), int(sum(documents.supervised))

    results = [engine.train(job.start, 1, shard, LEASE) for shard in (0, 1)]
    updates = [Update(result.state_root, result.counts.supervised, result.delta) for result in results]
    merged = merge(PLAIN_MERGE, job.start, updates).adapter

    base = engine.evaluate(None)
    for number, adapter in enumerate((results[0].end, merged)):
        ours = engine.evaluate(adapter)
        with torch.no_grad():
            theirs = float(plain_loss(opened.peft(adapter, folder / str(number)), documents, rows)) / targets
        assert ours == pytest.approx(theirs, abs=off)
        assert ours < base - 0.1
    assert all(result.losses[1] < result.losses[0] - 0.1 for result in results)


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi"])
@pytest.mark.parametrize("path", ["peft", "fused"])
def test_a_layer_computed_twice_drops_nothing_out(name: str, path: str, make_job: MakeJob, tmp_path: Path) -> None:
    dropout = {"gpt2": "attn_pdrop", "opt": "dropout", "phi": "attention_dropout"}
    folder = FAMILIES[name].make(tmp_path / "model", **{dropout[name]: 0.5})
    job = make_job(folder, adapter_path=path)
    found = []
    for again in (False, True):
        engine = Engine(job.recipe, folder, job.data, threads=1, checkpointing=again)
        found.append(engine.train(job.start, 1, 0, LEASE))
        engine.close()

    assert found[1].losses == pytest.approx(found[0].losses, rel=1e-6)
    off = [np.abs(found[1].delta[tensor] - change).max() for tensor, change in found[0].delta.items()]
    assert max(off) < 1e-4


def no_pad_token(folder: Path) -> None:
    for name, key in (("config.json", "pad_token_id"), ("tokenizer_config.json", "pad_token")):
        text = json.loads((folder / name).read_text())
        del text[key]
        (folder / name).write_text(json.dumps(text))
    assert load_tokenizer(folder).pad_token is None


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(folder).chat_template is None


ODD = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "more-embeddings-than-tokens": {"vocab_size": 331},
    "bf16-checkpoint": {"how": {"dtype": torch.bfloat16}},
    "several-files": {"how": {"max_shard_size": "30KB"}},
    "no-pad-token": {},
}


@pytest.mark.parametrize("oddity", ODD)
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.long)])
def test_odd_folders_are_bases_too(name: str, oddity: str, open_job: Callable[..., Opened], tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = family.make(tmp_path / "model", **ODD[oddity])
    if oddity == "no-pad-token":
        no_pad_token(folder)
    assert (folder / "model.safetensors.index.json").exists() == (oddity == "several-files")

    train_and_publish(open_job(family, "fused", folder), tmp_path)


def test_a_bf16_checkpoint_trains_in_bf16(open_job: Callable[..., Opened], tmp_path: Path) -> None:
    family = FAMILIES["qwen2"]
    folder = family.make(tmp_path / "model", how={"dtype": torch.bfloat16})

    train_and_publish(open_job(family, "fused", folder, precision="bf16", steps=8), tmp_path, off=0.05)


def test_without_a_chat_template_prompts_train_and_messages_are_refused(make_job: MakeJob, tmp_path: Path) -> None:
    folder = FAMILIES["llama"].make(tmp_path / "model")
    no_template(folder)
    rows = [{"prompt": f"{at} and", "completion": f" {at + 1}"} for at in range(40)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)

    recipe, initial = resolve_recipe(folder, data, steps=8, rounds=1, sequence_len=64)
    engine = Engine(recipe, folder, {sha256_file(data): data}, threads=1)
    result = engine.train(read_adapter(initial), 1, 0, LEASE)
    engine.close()

    assert result.losses[1] < result.losses[0]
    with pytest.raises(TrainChainError, match="tokenizer has no chat template") as caught:
        make_job(folder)
    assert caught.value.code == "data.format"
