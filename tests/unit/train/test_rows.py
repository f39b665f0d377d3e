from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_model import chat_rows, make_tokenizer, write_jsonl
from trainchain.core.errors import TrainChainError
from trainchain.core.models import Counts
from trainchain.core.train import tables
from trainchain.core.train.data import check_counts, count_all, load_documents
from trainchain.core.train.rows import detect_format, encoder, format_of, read_batches, read_rows

TOKENIZER = make_tokenizer()


def encode(form: Any, row: dict[str, Any]) -> tuple[str, str]:
    """All the text, and the text the loss is taken on."""
    ((ids, mask),) = encoder(form, TOKENIZER)([row])
    return TOKENIZER.decode(ids), TOKENIZER.decode([token for token, on in zip(ids, mask, strict=True) if on])


def test_a_chat_is_trained_on_what_the_assistant_says() -> None:
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Uno."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Dos."},
    ]

    text, supervised = encode("chat_template", {"messages": messages, "other": 1})

    assert text.startswith("<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nUno.<|im_end|>")
    assert supervised == "Uno.<|im_end|>Dos.<|im_end|>"


def test_a_completion_is_trained_on_with_its_end() -> None:
    text, supervised = encode("prompt_completion", {"prompt": "The sky is", "completion": " blue."})

    assert text == "The sky is blue.<|eos|>"
    assert supervised == " blue.<|eos|>"


def test_a_text_is_trained_on_with_its_end() -> None:
    assert encode("text", {"text": "Fish."}) == ("Fish.<|eos|>", "Fish.<|eos|>")


def test_the_format_is_read_off_the_fields() -> None:
    assert detect_format({"messages": []}) == "chat_template"
    assert detect_format({"prompt": "", "completion": "", "label": ""}) == "prompt_completion"
    assert detect_format({"text": ""}) == "text"
    assert detect_format({"prompt": ""}) is None


@pytest.mark.parametrize(
    ("form", "line", "says"),
    [
        ("text", "not json", "is not JSON"),
        ("text", "[1]", "is a JSON list, not an object"),
        ("text", '{"txt": "x"}', "lacks the text `text`"),
        ("text", '{"text": 3}', "lacks the text `text`"),
        ("prompt_completion", '{"prompt": "x"}', "lacks the text `completion`"),
        ("chat_template", '{"messages": []}', "lacks `messages`"),
        ("chat_template", '{"messages": [{"role": "user"}]}', "lacks the text `content` in message 1"),
        ("chat_template", '{"messages": ["hi"]}', "lacks the text `role` in message 1"),
        ("chat_template", '{"messages": "hi"}', "lacks `messages`"),
        ("chat_template", '{"messages": [{"role": "user", "content": ["a", "b"]}]}', "lacks the text `content`"),
        (
            "chat_template",
            '{"messages": [{"role": "a", "content": "\\ud800"}]}',
            "\\ud800, half a character, in `content`",
        ),
        ("text", '{"text": "sea \\udcff"}', "\\udcff, half a character, in `text`"),
        ("text", '{"text": null}', "lacks the text `text`"),
        ("text", "[" * 100_000, "is not JSON"),
        ("text", "null", "is a JSON NoneType, not an object"),
        ("text", '{"text": "x"', "is not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, form: Any, line: str, says: str) -> None:
    good = {"text": "ok", "prompt": "a", "completion": "b", "messages": chat_rows(1)[0]["messages"]}
    path = write_jsonl(tmp_path / "rows.jsonl", [good])
    path.write_text(path.read_text() + "\n" + line + "\n")

    with pytest.raises(TrainChainError, match=r"rows\.jsonl line 3 ") as caught:
        load_documents([(path, form)], TOKENIZER, 64)

    assert caught.value.code == "data.format"
    assert says in caught.value.message


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')

    with pytest.raises(TrainChainError, match=r"line 1 is not UTF-8 \(byte 0xff at 11\)"):
        list(read_rows(path))


def test_a_huge_row_is_named_and_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ROW", 100)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "' + b"x" * 88 + b'"}\n')
    assert len(list(read_rows(path))) == 1
    path.write_bytes(b'{"text": "x"}\n{"text": "' + b"x" * 1000)

    with pytest.raises(TrainChainError, match=r"rows\.jsonl line 2 is longer than") as caught:
        list(read_rows(path))
    assert caught.value.code == "data.format"
    assert "Split it" in caught.value.hint


def test_rows_come_in_batches_and_those_before_a_bad_line_come_first(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": str(row)} for row in range(150)])
    path.write_text(path.read_text() + "bad\n")
    batches = read_batches(path)

    assert [len(batch) for batch in islice(batches, 3)] == [64, 64, 22]
    with pytest.raises(TrainChainError, match="line 151"):
        next(batches)
    assert [line for batch in read_batches(path, 70) for line, _ in batch] == list(range(1, 71))
    huge = write_jsonl(tmp_path / "huge.jsonl", [{"text": "x" * 200_000}] * 4)
    assert [len(batch) for batch in read_batches(huge)] == [2, 2]


@pytest.mark.parametrize("form", ["chat_template", "prompt_completion", "text"])
def test_rows_at_once_are_the_documents_of_each_alone(form: Any) -> None:
    contents = ["", " ", "Fish.", "a" * 50, "\u00fc\u20ac\U0001f600", "<|im_end|>", "What is blue? "]
    rows = [
        {
            "text": content,
            "prompt": content,
            "completion": other,
            "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": other}],
        }
        for content in contents
        for other in contents
    ]
    encode = encoder(form, TOKENIZER)

    assert encode(rows) == [document for row in rows for document in encode([row])]


def test_the_first_bad_row_of_a_batch_is_the_one_that_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": 1}, {"text": 2}])
    path.write_text(path.read_text() + "bad\n")

    with pytest.raises(TrainChainError, match="line 2 lacks the text"):
        load_documents([(path, "text")], TOKENIZER, 64)


def test_what_the_tokenizer_raises_is_named_with_the_row(tmp_path: Path) -> None:
    class Picky:
        eos_token_id, bos_token_id = 2, 1

        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            if "whale" in texts:
                raise KeyError("whale")
            return {"input_ids": [[5, 6] for _ in texts]}

    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "fish"}, {"text": "whale"}])

    with pytest.raises(TrainChainError, match="line 2 is refused by the tokenizer: 'whale'"):
        load_documents([(path, "text")], Picky(), 64)


def test_a_byte_order_mark_is_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n\r\n')

    assert list(read_rows(path)) == [(1, {"text": "x"})]


def test_a_template_without_marks_says_what_to_do() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(TrainChainError) as caught:
        encoder("chat_template", tokenizer)
    assert caught.value.code == "data.format"
    assert "{% generation %}" in caught.value.hint

    tokenizer.chat_template = None
    with pytest.raises(TrainChainError, match="no chat template"):
        encoder("chat_template", tokenizer)


@pytest.mark.parametrize("changing", ["strftime_now('%d %b %Y')", "['a', 'b'] | random"])
def test_a_template_that_changes_by_itself_is_refused(changing: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = f"{{{{ {changing} }}}}{{% generation %}}{{% endgeneration %}}"

    with pytest.raises(TrainChainError, match="would be other tokens another time") as caught:
        encoder("chat_template", tokenizer)
    assert caught.value.code == "data.format"


def test_of_several_templates_the_default_one_is_used() -> None:
    tokenizer = make_tokenizer()
    template, row = tokenizer.chat_template, chat_rows(1)
    wanted = encoder("chat_template", tokenizer)(row)
    tokenizer.chat_template = {"default": template, "tool_use": "other"}

    assert encoder("chat_template", tokenizer)(row) == wanted
    tokenizer.chat_template = {"tool_use": template}
    with pytest.raises(TrainChainError, match="no chat template"):
        encoder("chat_template", tokenizer)


@pytest.mark.parametrize("form", ["text", "prompt_completion"])
def test_without_an_end_token_no_text_can_be_learned_to_its_end(form: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None

    with pytest.raises(TrainChainError, match=f"no end token, so {form} rows") as caught:
        encoder(form, tokenizer)
    assert caught.value.code == "data.format"
    assert "tokenizer_config.json" in caught.value.hint


@pytest.mark.parametrize("form", ["text", "prompt_completion", "chat_template"])
def test_a_tokenizer_without_a_padding_token_will_do_since_rows_are_packed(form: Any) -> None:
    row = {"text": "x", "prompt": "x", "completion": "y", "messages": chat_rows(1)[0]["messages"]}
    wanted = encoder(form, make_tokenizer())([row, row])
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None

    assert encoder(form, tokenizer)([row, row]) == wanted


def test_a_row_the_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}{% generation %}{% endgeneration %}"
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(1))

    with pytest.raises(TrainChainError, match="line 1 is refused by the chat template: roles must alternate"):
        load_documents([(path, "chat_template")], tokenizer, 64)


def test_cut_rows_are_counted_and_rows_that_teach_nothing_skipped(tmp_path: Path) -> None:
    rows = [
        {"prompt": "x", "completion": "y"},
        {"prompt": "x" * 100, "completion": "y"},
        {"prompt": "x", "completion": "y" * 100},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)

    found = load_documents([(path, "prompt_completion")], TOKENIZER, 16)

    assert (found.rows, found.truncated, found.skipped, len(found.ids)) == (3, 2, 1, 2)
    assert found.lengths() == [3, 16]
    assert list(found.supervised) == [2, 15]
    assert found.counts([0, 1]).model_dump() == {"rows": 2, "tokens": 19, "supervised": 17}


def test_the_first_token_of_a_document_is_never_a_target(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "abc"}, {"text": ""}])

    found = load_documents([(path, "text")], TOKENIZER, 16)

    assert list(found.supervised) == [len(found.ids[0]) - 1]
    assert found.skipped == 1


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_nothing_to_train_on_is_said(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)

    with pytest.raises(TrainChainError, match=r"rows\.jsonl has no row") as caught:
        load_documents([(path, "text")], TOKENIZER, 16)
    assert caught.value.code == "data.empty"


def test_an_unknown_format_and_a_missing_file_are_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "x"}])
    with pytest.raises(TrainChainError, match="has the fields question; known are: messages"):
        format_of(path)
    with pytest.raises(TrainChainError, match=r"gone\.jsonl") as caught:
        format_of(tmp_path / "gone.jsonl")
    assert caught.value.code == "source.missing"


def test_less_data_than_a_step_is_too_small(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "abcdefgh"}] * 3)
    documents = load_documents([(path, "text")], TOKENIZER, 12)

    sizes: dict[str, int] = {"sequence_len": 12, "seed": 0, "rounds": 2, "shards": 3, "steps": 5}
    counts = count_all(documents, batch_size=3, **sizes)
    assert [[shard.rows for shard in round] for round in counts] == [[15] * 3] * 2
    with pytest.raises(TrainChainError, match="fills 3 sequences of 12 tokens; one step takes 4") as caught:
        count_all(documents, batch_size=4, **sizes)
    assert caught.value.code == "data.too_small"


def test_other_counts_are_a_mismatch_with_both() -> None:
    counted, pinned = Counts(rows=1, tokens=5, supervised=3), Counts(rows=1, tokens=6, supervised=3)

    check_counts(counted, counted, "shard 0")
    with pytest.raises(TrainChainError) as caught:
        check_counts(counted, pinned, "shard 0")
    assert caught.value.code == "data.count_mismatch"
    assert caught.value.facts["counted"]["tokens"] == 5
    assert caught.value.facts["pinned"]["tokens"] == 6
