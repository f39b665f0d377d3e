import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_model import chat_rows, make_tokenizer, write_jsonl
from trainchain.core.errors import TrainChainError
from trainchain.core.train import data, rows
from trainchain.core.train.data import cache_key, count_all, load_documents
from trainchain.core.train.tokenized import TokenizedData

TOKENIZER = make_tokenizer()
TEXTS = [{"text": f"Fish number {row} lives in the sea. " * (1 + row % 4)} for row in range(40)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "texts.jsonl", TEXTS)


@pytest.fixture
def never_tokenized(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were tokenized in spite of a cache; a test that wants none asks for an empty list."""
    seen: list[Path] = []
    real = rows.read_batches

    def noted(path: Path, limit: int | None) -> Any:
        seen.append(path)
        return real(path, limit)

    monkeypatch.setattr(rows, "read_batches", noted)
    return seen


def load(path: Path, cache: Path | None = None, **options: Any) -> TokenizedData:
    return load_documents([(path, "text")], TOKENIZER, 32, cache=cache, **options)


def content(documents: TokenizedData) -> dict[str, Any]:
    arrays: dict[str, Any] = {name: array.tolist() for name, array in documents.arrays.items()}
    return arrays | {"rows": documents.source_rows}


def test_what_is_mapped_is_what_is_in_memory_and_is_tokenized_once(
    tmp_path: Path, texts: Path, never_tokenized: list[Path]
) -> None:
    chats = write_jsonl(tmp_path / "chats.jsonl", chat_rows(9))

    def both(cache: Path | None) -> TokenizedData:
        return load_documents([(texts, "text"), (chats, "chat_template")], make_tokenizer(), 32, cache=cache)

    plain, first = both(None), both(tmp_path / "cache")
    assert never_tokenized == [texts, chats] * 2
    again = both(tmp_path / "cache")

    assert never_tokenized == [texts, chats] * 2
    assert content(plain) == content(first) == content(again)
    assert plain.source_rows == [40, 9]
    assert plain.truncated > 0
    assert again.truncated_at(1)[0].source == 0
    assert not again.arrays["ids"].flags.writeable


def test_the_key_is_made_of_all_that_decides_the_tokens(tmp_path: Path, texts: Path) -> None:
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(texts.read_bytes())
    other = write_jsonl(tmp_path / "other.jsonl", [*TEXTS, {"text": "more"}])
    template, special, vocabulary = make_tokenizer(), make_tokenizer(), make_tokenizer()
    template.chat_template += " "
    special.eos_token = "<|im_end|>"
    vocabulary.add_tokens(["whale"])
    used = make_tokenizer()
    used(["a long text", "a"], truncation=True, max_length=2, padding=True)

    def key(path: Path = texts, form: Any = "text", tokenizer: Any = TOKENIZER, **options: Any) -> str | None:
        sizes = {"sequence_len": 32, "limit": None, "vocab_size": None, **options}
        return cache_key([(path, form)], tokenizer, **sizes)

    same = [key(), key(moved), key(tokenizer=make_tokenizer()), key(tokenizer=used)]
    others = [
        key(other),
        key(form="prompt_completion"),
        key(sequence_len=33),
        key(limit=40),
        key(vocab_size=320),
        *(key(tokenizer=tokenizer) for tokenizer in (template, special, vocabulary)),
    ]

    assert len(set(same)) == 1
    assert len({*same, *others}) == 1 + len(others)
    assert key(tokenizer=object()) is None


def test_other_libraries_have_other_keys(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache_key([(texts, "text")], TOKENIZER, 32, None, None)
    monkeypatch.setattr(data, "version", lambda name: "9.9" if name == "tokenizers" else "1")

    assert cache_key([(texts, "text")], TOKENIZER, 32, None, None) != before


def test_an_altered_cache_is_built_anew(tmp_path: Path, texts: Path, never_tokenized: list[Path]) -> None:
    whole = content(load(texts, tmp_path / "cache"))
    (ids,) = (tmp_path / "cache").glob("*/documents/ids")
    ids.write_bytes(bytes(ids.stat().st_size))

    assert content(load(texts, tmp_path / "cache")) == whole
    assert content(load(texts, tmp_path / "cache")) == whole
    assert len(never_tokenized) == 2


def test_many_at_once_see_the_same(tmp_path: Path, texts: Path) -> None:
    found: list[TokenizedData] = []
    threads = [threading.Thread(target=lambda: found.append(load(texts, tmp_path / "cache"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 4
    assert all(content(documents) == content(found[0]) for documents in found)
    (folder,) = (tmp_path / "cache").iterdir()
    assert [path.name for path in folder.iterdir()] == ["documents"]


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, texts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")

    assert content(load(texts, tmp_path / "cache")) == content(load(texts))
    assert "is not kept" in caplog.text


def test_a_bad_row_is_named_with_a_cache_too_and_leaves_none(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*TEXTS, {"text": 3}])

    with pytest.raises(TrainChainError, match=r"rows\.jsonl line 41 lacks the text"):
        load(path, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


SIZES: dict[str, int] = {"sequence_len": 32, "batch_size": 2, "seed": 5, "rounds": 3, "shards": 2, "steps": 4}


def test_a_kept_order_is_the_order(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = count_all(load(texts), **SIZES)
    monkeypatch.setattr(data, "KEPT_ORDER", 1)
    cache = tmp_path / "cache"

    first = count_all(load(texts, cache), **SIZES)
    kept = sorted(path for path in cache.glob("*/order-*"))
    monkeypatch.setattr("trainchain.core.sharding.order", lambda *_: pytest.fail("the order was made again"))
    again = count_all(load(texts, cache), **SIZES)

    assert first == again == wanted
    assert [path.name for path in kept] == ["order-32-5-0", "order-32-5-1"]
    batches = data._order(load(texts, cache), 32, 5).shard(1, 0, shards=2, steps=4, batch_size=2)
    assert json.loads(json.dumps(batches)) == batches


@pytest.mark.parametrize("cached", [False, True])
def test_a_token_outside_the_models_vocabulary_is_named(tmp_path: Path, cached: bool) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["whale"])
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a fish"}, {"text": "a whale"}])
    token = tokenizer.convert_tokens_to_ids("whale")
    cache = tmp_path / "cache" if cached else None

    for _ in range(2):
        with pytest.raises(TrainChainError) as caught:
            load_documents([(path, "text")], tokenizer, 32, vocab_size=token, cache=cache)
        assert caught.value.code == "model.unreadable"
        assert f"rows.jsonl line 2 has the token {token} ('whale')" in caught.value.message
        assert caught.value.facts == {"file": "rows.jsonl", "line": 2}
    assert load_documents([(path, "text")], tokenizer, 32, vocab_size=token + 1, cache=cache).rows == 2
    assert load_documents([(path, "text")], tokenizer, 2, vocab_size=token, cache=cache).rows == 2


def test_text_without_a_token_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a fish"}])
    monkeypatch.setattr(rows, "encoder", lambda *_: lambda rows: [([1, None], [True, True])] * len(rows))

    with pytest.raises(TrainChainError, match=r"rows\.jsonl line 1 has text that the tokenizer knows no token for"):
        load(path)


@pytest.mark.parametrize("cached", [False, True])
def test_of_data_that_teaches_nothing_the_first_row_is_named(tmp_path: Path, cached: bool) -> None:
    cache = tmp_path / "cache" if cached else None
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "x" * 100, "completion": "y"}])
    mute = write_jsonl(tmp_path / "mute.jsonl", [{"messages": [{"role": "user", "content": "Hello?"}]}])
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")

    for sources, says in (
        ([(long, "prompt_completion")], r"The first is long.jsonl line 1, whose targets all lie beyond that length\."),
        ([(mute, "chat_template")], r"The first is mute.jsonl line 1\."),
        ([(long, "prompt_completion"), (empty, "text")], r"empty.jsonl has no rows\."),
        ([], r"The recipe has no row"),
    ):
        for _ in range(2):
            with pytest.raises(TrainChainError, match=says) as caught:
                load_documents(sources, TOKENIZER, 32, cache=cache)  # type: ignore[arg-type]
            assert caught.value.code == "data.empty"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for cache in (None, tmp_path / "cache"):
        for path in (tmp_path / "gone.jsonl", tmp_path):
            with pytest.raises(TrainChainError, match=f"{path.name} cannot be read") as caught:
                load(path, cache)
            assert caught.value.code == "source.missing"
