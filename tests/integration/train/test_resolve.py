import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_architectures import FAMILIES
from tests.fixtures_model import chat_rows, write_jsonl
from trainchain.core.adapter import read_adapter
from trainchain.core.errors import TrainChainError
from trainchain.core.train.data import load_documents, vocabulary
from trainchain.core.train.model import load_config, load_tokenizer
from trainchain.core.train.resolve import Inspection, inspect

SIZES: dict[str, Any] = {
    "held_out_rows": 4,
    "sequence_len": 64,
    "batch_size": 2,
    "seed": 0,
    "rounds": 2,
    "shards": 3,
    "steps": 2,
    "targets": "all-linear",
    "r": 4,
}


def look(model: Path, data: Path, held_out: Path | None = None, **options: Any) -> Inspection:
    return inspect(model, [(data, None)], (held_out, None) if held_out else None, **{**SIZES, **options})


def test_inspection_holds_all_that_submit_pins(tiny: Path, tmp_path: Path) -> None:
    chats = write_jsonl(tmp_path / "chats.jsonl", chat_rows(20))
    texts = write_jsonl(
        tmp_path / "texts.jsonl", [{"text": "Fish live in the sea. " * 20}, {"text": "x"}, {"text": ""}]
    )
    test = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "a", "completion": "b"}] * 6)

    found = inspect(tiny, [(chats, None), (texts, "text")], (test, None), **SIZES)

    assert [(facts.format, facts.rows) for facts in found.datasets] == [("chat_template", 20), ("text", 3)]
    assert found.held_out is not None
    assert (found.held_out.file.rows, found.held_out.rows) == (6, 4)
    assert found.held_out.counts.model_dump() == {"rows": 4, "tokens": 12, "supervised": 8}
    assert len(found.targets) == 14
    assert len(read_adapter(found.initial)) == 28
    assert [len(round) for round in found.counts] == [3, 3]
    assert all(0 < shard.supervised < shard.tokens for round in found.counts for shard in round)
    assert (found.dtype, found.skipped) == ("fp32", 1)
    assert found.truncated >= 1
    assert found.truncated_at == [f"chats.jsonl line {line}" for line in (3, 8, 11)]
    assert found.skipped_at == ["texts.jsonl line 3"]
    assert inspect(tiny, [(chats, None), (texts, "text")], (test, None), **SIZES) == found


def test_what_an_engine_will_load_is_tokenized_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = write_jsonl(tmp_path / "chats.jsonl", chat_rows(20))
    test = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    cache = tmp_path / "cache"
    plain = look(tiny, chats, test)

    assert look(tiny, chats, test, cache=cache) == plain
    monkeypatch.setattr("trainchain.core.train.rows.encoder", lambda *_: pytest.fail("tokenized again"))
    assert look(tiny, chats, test, cache=cache) == plain
    assert plain.held_out is not None
    tokenizer, size = load_tokenizer(tiny), vocabulary(load_config(tiny))
    held_out = load_documents(
        [(test, "prompt_completion")], tokenizer, 64, limit=plain.held_out.rows, vocab_size=size, cache=cache
    )
    assert held_out.counts(range(3)) == plain.held_out.counts
    assert load_documents([(chats, "chat_template")], tokenizer, 64, vocab_size=size, cache=cache).rows == 20


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["whale"])
    tokenizer.save_pretrained(folder)
    fish, whales = ([{"text": f"Many {kind} swim in the sea."}] * 20 for kind in ("fish", "whale"))

    assert look(folder, write_jsonl(tmp_path / "fish.jsonl", fish)).truncated == 0
    with pytest.raises(TrainChainError, match=r"whales\.jsonl line 1 has the token \d+ \('whale'\)") as caught:
        look(folder, write_jsonl(tmp_path / "whales.jsonl", whales))
    assert caught.value.code == "model.unreadable"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"targets": ["nothing"]}, "recipe.invalid"),
        ({"sequence_len": 4096}, "recipe.invalid"),
        ({"sequence_len": 2}, "data.empty"),
        ({"batch_size": 500}, "data.too_small"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused(
    tiny: Path, tmp_path: Path, options: dict[str, Any], code: str
) -> None:
    data = write_jsonl(tmp_path / "chats.jsonl", chat_rows(20))

    with pytest.raises(TrainChainError) as caught:
        look(tiny, data, **options)
    assert caught.value.code == code


def test_bad_held_out_rows_are_refused_too(tiny: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "chats.jsonl", chat_rows(20))
    test = write_jsonl(tmp_path / "test.jsonl", [*chat_rows(1), {"messages": 3}])

    with pytest.raises(TrainChainError, match=r"test\.jsonl line 2"):
        look(tiny, data, test)
    with pytest.raises(TrainChainError, match="does not exist"):
        look(tmp_path / "gone", data)


def test_a_model_that_caps_its_scores_gets_the_kernel_that_can(tmp_path: Path) -> None:
    model = FAMILIES["gemma2"].make(tmp_path / "gemma2")
    data = write_jsonl(tmp_path / "train.jsonl", chat_rows(24))
    sizes = {"held_out_rows": 0, "sequence_len": 96, "batch_size": 4, "seed": 0, "rounds": 1, "shards": 1, "steps": 1}

    assert inspect(model, [(data, None)], None, targets="all-linear", r=2, **sizes).attention == "eager"
    with pytest.raises(TrainChainError, match="attention is sdpa, but the base model's attention needs eager"):
        inspect(model, [(data, None)], None, targets="all-linear", r=2, attention="sdpa", **sizes)
