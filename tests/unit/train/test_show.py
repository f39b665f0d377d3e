"""What `data inspect` counts and shows, and that nothing in a row can act on the terminal that it is shown on."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures_model import TEMPLATE, chat_rows, make_tokenizer, write_jsonl
from trainchain.cli.data_report import Page
from trainchain.core.errors import TrainChainError
from trainchain.core.train.data import count_all, load_documents
from trainchain.core.train.rows import encoder
from trainchain.core.train.show import BINS, Job, Report, examine, histogram, pieces_of

TOKENIZER = make_tokenizer()
JOB = Job(sequence_len=64, batch_size=2, seed=7, sequences=100, files=1)
SAYS = {"role": "assistant", "content": "Fish live in the sea."}
USER = {"role": "user", "content": "Where do fish live?"}


def report_of(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> Report:
    job = options.pop("job", JOB)
    return examine(write_jsonl(tmp_path / "rows.jsonl", rows), None, TOKENIZER, job, **options)


def page(report: Report, columns: int = 80, *, wide: bool = True, colour: bool = False) -> str:
    return Page(columns, wide=wide, colour=colour).draw(report, "name")


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=60), st.integers(8, 2000))
def test_every_row_stands_in_one_bin_and_bins_touch(lengths: list[int], sequence_len: int) -> None:
    bins = histogram(lengths, sequence_len)

    assert sum(found.rows for found in bins) == len(lengths)
    assert all(one.high + 1 == other.low for one, other in pairwise(bins))
    assert [found.cut for found in bins] == [found.low > sequence_len for found in bins]
    assert sum(found.rows for found in bins if found.cut) == sum(length > sequence_len for length in lengths)
    assert len(bins) <= BINS + 1
    assert all(found.low <= found.high for found in bins)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=6)), min_size=1, max_size=4))
def test_the_pieces_are_the_text_and_alternate(turns: list[tuple[str, str]]) -> None:
    chat = [{"role": role, "content": content} for role, content in turns]
    ((ids, mask),) = encoder("chat_template", TOKENIZER)([{"messages": chat}])

    pieces = pieces_of((ids, mask), TOKENIZER)

    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(ids)
    assert all(one.loss != other.loss for one, other in pairwise(pieces))
    said = "".join(content + "<|im_end|>" for role, content in turns if role == "assistant")
    assert "".join(piece.text for piece in pieces if piece.loss) == said


def test_it_counts_as_training_does(tmp_path: Path) -> None:
    rows = [*chat_rows(40), {"messages": [USER]}]
    found = report_of(tmp_path, rows)
    documents = load_documents([(tmp_path / "rows.jsonl", "chat_template")], TOKENIZER, 64)
    every = documents.counts(range(len(documents)))
    counts = count_all(documents, sequence_len=64, batch_size=1, seed=7, rounds=1, shards=1, steps=found.sequences)

    assert (found.tokens, found.supervised) == (every.tokens, every.supervised)
    assert counts[0][0] == every  # as many sequences as it says are one epoch
    assert found.rows == 41
    assert found.epochs == pytest.approx(100 / found.sequences)


def test_what_is_cut_and_left_out_is_named_by_its_line_and_why(tmp_path: Path) -> None:
    long = {"role": "user", "content": "fish " * 100}
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [USER, SAYS], "id": 1}])
    path.write_text(
        path.read_text()
        + "\n\n"
        + write_jsonl(
            tmp_path / "more.jsonl",
            [{"messages": [USER]}, {"messages": [long, SAYS]}, {"messages": [SAYS, long]}, {"messages": [SAYS]}],
        ).read_text()
    )

    found = examine(path, None, TOKENIZER, JOB)

    assert found.fields_not_used == ["id"]
    assert found.cut.rows == [6]
    assert [(places.rows, places.why) for places in found.left_out] == [
        ([4], "the chat template marks nothing as the assistant's"),
        ([5], "all that carries loss lies beyond token 64"),
    ]
    assert {row.row for sequence in found.packed for row in sequence} == {1, 6, 7}
    text = page(found)
    assert "1 row: longer than 64 tokens (line 6)" in text
    assert "(line 4)" in text
    assert "the fields id" in text


def test_the_first_token_of_a_row_carries_no_loss(tmp_path: Path) -> None:
    found = report_of(tmp_path, [{"text": "fish"}])

    assert found.examples[0].loss[0] is False
    assert found.supervised == sum(found.examples[0].loss) == len(found.examples[0].ids) - 1


def test_only_the_first_rows_are_read_where_that_is_asked(tmp_path: Path) -> None:
    found = report_of(tmp_path, [{"text": f"fish {row}"} for row in range(30)], limit=10)

    assert (found.rows, found.limited) == (10, True)
    assert "the first 10 rows of text" in page(found)
    assert "epoch" not in page(found)
    assert not report_of(tmp_path, [{"text": "fish"}], limit=10).limited


def test_a_long_file_is_told_of_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainchain.core.train.show.TOLD_EVERY", 10)
    heard: list[int] = []
    report_of(tmp_path, [{"text": "fish"}] * 25, tell=heard.append)

    assert heard == [10, 20]


def test_where_nothing_is_left_to_train_on_it_says_so_and_shows_the_rest(tmp_path: Path) -> None:
    found = report_of(tmp_path, [{"messages": [USER]}] * 3)

    assert (found.sequences, found.fill, found.epochs, found.packed) == (0, 0.0, 0.0, [])
    assert found.notes == ["Nothing is left to train on."]
    assert "3 rows: the chat template marks nothing" in page(found)


def test_notes_tell_what_an_owner_may_not_have_meant(tmp_path: Path) -> None:
    endless = make_tokenizer()
    endless.chat_template = TEMPLATE.replace(
        "{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
        "{{- message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
    )
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [USER, SAYS]}] * 2)
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": "fish " * 50}] * 9)

    assert "does not learn to stop" in examine(path, None, endless, JOB).notes[0]
    assert examine(path, None, TOKENIZER, JOB).notes == []
    assert "sequence_len 128, 95%" in examine(long, None, TOKENIZER, JOB).notes[0]
    much = Job(sequence_len=64, batch_size=50, seed=0, sequences=100, files=1)
    assert "too little data" in examine(path, None, TOKENIZER, much).notes[0]
    shared = Job(sequence_len=64, batch_size=50, seed=0, sequences=100, files=3)
    assert "names 3 data sets" in examine(path, None, TOKENIZER, shared).notes[0]


def test_parquet_rows_are_called_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["", "fish in the sea"], "id": [1, 2]}), path)

    found = examine(path, None, TOKENIZER, JOB)

    assert (found.unit, found.fields_not_used) == ("row", ["id"])
    assert "1 row: no text to learn (row 1)" in page(found)


def test_no_rows_and_bad_rows_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TrainChainError, match="has no rows"):
        report_of(tmp_path, [])
    with pytest.raises(TrainChainError, match="line 2 lacks the text"):
        report_of(tmp_path, [{"text": "a"}, {"text": 1}])
    with pytest.raises(TrainChainError, match="is neither"):
        examine(write_jsonl(tmp_path / "rows.txt", [{"text": "a"}]), None, TOKENIZER, JOB)
    with pytest.raises(TrainChainError, match=r"gone\.jsonl cannot be read"):
        examine(tmp_path / "gone.jsonl", None, TOKENIZER, JOB)


HOSTILE = "\x1b[2J\x1b]0;title\x07 \u202e \x9b31m \r \u200b \u4f60\u597d \U0001f600"


@pytest.mark.parametrize("wide", [True, False])
def test_nothing_in_a_row_acts_on_the_terminal(tmp_path: Path, wide: bool) -> None:
    rows = [{"messages": [{**USER, "content": HOSTILE}, {**SAYS, "content": HOSTILE}], "a\x1b[1m": 1}]
    text = page(report_of(tmp_path, rows), wide=wide)

    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e]", text)
    assert "\\x1b[2J" in text


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_page_fits_its_terminal(tmp_path: Path, columns: int) -> None:
    from rich.cells import cell_len

    rows = [{"messages": [{**USER, "content": f"{HOSTILE} {'x' * 300} " * 2}, SAYS]}, *chat_rows(60)]
    text = page(report_of(tmp_path, rows), columns)

    assert max(cell_len(line) for line in text.splitlines()) <= min(columns, 100)


def test_loss_is_in_green_or_between_brackets(tmp_path: Path) -> None:
    found = report_of(tmp_path, [{"messages": [USER, SAYS]}])

    assert "\u27e6Fish live in the sea.<|im_end|>\u27e7" in page(found)
    assert "[[Fish live in the sea.<|im_end|>]]" in page(found, wide=False)
    assert page(found, wide=False).isascii()
    assert "\x1b[32mFish live in the sea.<|im_end|>\x1b[0m" in page(found, colour=True)
    assert "\u27e6" not in page(found, colour=True)


def test_a_long_stretch_is_shown_from_both_its_ends(tmp_path: Path) -> None:
    job = Job(sequence_len=4096, batch_size=1, seed=0, sequences=1, files=1)
    text = page(report_of(tmp_path, [{"text": "begin " + "fish " * 400 + "end"}], job=job))

    assert "b\u27e6egin fish" in text  # nothing predicts the first token
    assert "end<|eos|>" in text
    assert re.search(r"\u2026 1,\d\d\d letters \u2026", text)
