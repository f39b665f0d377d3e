"""What the owner writes is what is pinned: every key of the recipe reaches the resolved one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from trainchain.cli.bring import Bringer
from trainchain.cli.plan import Plan, resolve
from trainchain.core.errors import TrainChainError

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart"
KEYS: dict[str, Any] = {
    "name": "pinned",
    "base_model": str(QUICKSTART / "base"),
    "datasets": [{"path": str(QUICKSTART / "train.jsonl")}],
    "sequence_len": 64,
    "rounds": 2,
    "shards": 2,
    "steps": 17,
    "pay": {"per_million_tokens": "1", "budget": "5"},
}


def plan(folder: Path, **changes: Any) -> Plan:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({**KEYS, **changes}), encoding="utf-8")
    bringer = Bringer(lambda: pytest.fail("nothing here has to be fetched"), print)
    return resolve(path, bringer, tokens=folder / "tokens")


def test_a_recipe_of_few_words_is_pinned_with_the_defaults(tmp_path: Path) -> None:
    found = plan(tmp_path, samples=["Who?"])
    training = found.resolved.training

    assert (training.lr_scheduler, training.warmup_steps, training.segment_steps) == ("constant", 0, 3)
    assert (training.precision, training.quantization, training.attention) == ("fp32", "none", "sdpa")
    assert training.adapter_path == "fused"
    assert (found.resolved.held_out, found.resolved.samples, found.resolved.sample_tokens) == (None, ["Who?"], 64)
    assert found.model_dir == QUICKSTART / "base"
    assert found.truncated > 0
    line = next(line for line in found.describe().splitlines() if line.startswith("rows "))
    assert line.startswith(f"rows     {found.truncated:,} are cut at 64 tokens: train.jsonl line 3, train.jsonl line ")
    assert line.endswith(", ..")


def test_every_key_of_the_training_is_pinned_as_it_is_written(tmp_path: Path) -> None:
    written = {
        "learning_rate": 3e-4,
        "lr_scheduler": "cosine",
        "warmup_steps": 7,
        "shard_warmup_steps": 2,
        "max_grad_norm": 0.5,
        "weight_decay": 0.01,
        "adam_beta1": 0.8,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-6,
        "attention": "eager",
        "adapter_path": "peft",
        "segment_steps": 4,
        "seed": 3,
        "sequence_len": 64,
        "micro_batch_size": 3,
    }

    found = plan(tmp_path, **written, adapter="qlora", fp16=True, gradient_accumulation_steps=2, sample_tokens=9)

    training = found.resolved.training.model_dump()
    assert {key: training[key] for key in written} == written
    assert (training["precision"], training["quantization"], training["batch_size"]) == ("fp16", "nf4", 6)
    assert (found.resolved.samples, found.resolved.sample_tokens) == ([], 9)


def test_spare_shards_are_pinned_and_priced_and_change_no_other(tmp_path: Path) -> None:
    few, found = plan(tmp_path), plan(tmp_path, merge={"spares": 0.5})

    assert (few.resolved.merge.spares, few.resolved.spares) == (0.1, 0), "a tenth of two is none"
    assert (found.resolved.spares, found.resolved.all_shards) == (1, 3)
    assert [row[:2] for row in found.resolved.counts] == few.resolved.counts
    assert [len(row) for row in found.resolved.counts] == [3, 3]
    assert found.price > few.price
    assert "and up to 1 spare a round" in found.describe_work()


@pytest.mark.parametrize(("written", "pinned"), [(True, "bf16"), (False, "fp32"), ("auto", "fp32")])
def test_the_precision_is_the_recipe_s(tmp_path: Path, written: object, pinned: str) -> None:
    assert plan(tmp_path, bf16=written).resolved.training.precision == pinned


def test_a_budget_below_the_price_is_refused_with_the_price(tmp_path: Path) -> None:
    with pytest.raises(TrainChainError) as refused:
        plan(tmp_path, pay={"per_million_tokens": "1000", "budget": "1"})

    assert (refused.value.code, refused.value.exit_code) == ("money.budget_too_small", 6)


@pytest.mark.parametrize(
    ("card", "named"),
    [
        ("---\nlicense: mit\n---\n# Bot\n", "mit"),
        ('---\nlanguage: [en]\nlicense: "apache-2.0"\n---\n', "apache-2.0"),
        ("---\nlicense: other\nlicense_name: our-own\n---\n", "other (our-own)"),
        ("---\nlanguage: en\n---\n# Compared with\nlicense: gpl-3.0\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\nlicense: no\n---\n", None),
        ("---\nlicense: {mit: true}\n---\n", None),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\n- license\n---\n", None),
        ("# Bot\nlicense: gpl-3.0\n", None),
    ],
)
def test_a_folder_s_licence_is_what_the_head_of_its_card_names(tmp_path: Path, card: str, named: str | None) -> None:
    """Not a word of its text: the licence stands in the card of the adapter, as a fact."""
    base = tmp_path / "base"
    shutil.copytree(QUICKSTART / "base", base)
    (base / "README.md").write_text(card, encoding="utf-8")

    _, manifest = Bringer(lambda: pytest.fail("nothing here has to be fetched"), print).model(str(base), weights=True)

    assert manifest.license == named
