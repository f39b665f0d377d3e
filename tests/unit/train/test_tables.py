"""Data files: what is read of them, what of damaged and hostile ones is said, and that memory stays bounded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures_model import chat_rows, make_tokenizer, write_jsonl
from trainchain.core.errors import TrainChainError
from trainchain.core.train import tables
from trainchain.core.train.data import load_documents
from trainchain.core.train.rows import format_of, read_batches, read_rows
from trainchain.core.train.tables import PARQUET_ROWS, check_suffix, field_names, place_of

TOKENIZER = make_tokenizer()
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.float64())]))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
CHATS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}), min_size=1, max_size=4
)


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def refusal(path: Path, form: Any = "text") -> TrainChainError:
    with pytest.raises(TrainChainError) as caught:
        load_documents([(path, form)], TOKENIZER, 64)
    assert caught.value.code in ("data.format", "source.unsupported", "source.missing")
    assert path.name in caught.value.message
    assert caught.value.hint
    return caught.value


@settings(max_examples=40, deadline=None)
@given(st.lists(CHATS, min_size=1, max_size=40), st.integers(1, 30), st.sampled_from(["snappy", "zstd", "none"]))
def test_parquet_and_json_lines_of_the_same_rows_are_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory, chats: list[Any], group: int, compression: str
) -> None:
    folder = tmp_path_factory.mktemp("same")
    spoken = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = [spoken, *({"messages": chat} for chat in chats)]
    lines = write_jsonl(folder / "rows.jsonl", rows)
    columns = {"id": list(range(len(rows))), "messages": pa.array([row["messages"] for row in rows], MESSAGES)}
    table = write_parquet(folder / "rows.parquet", columns, row_group_size=group, compression=compression)

    one, other = (load_documents([(path, "chat_template")], TOKENIZER, 48) for path in (lines, table))

    assert format_of(table) == format_of(lines) == "chat_template"
    assert {name: found.tolist() for name, found in one.arrays.items()} == {
        name: found.tolist() for name, found in other.arrays.items()
    }


def test_only_the_columns_of_a_format_are_decoded_and_nulls_are_left_out(tmp_path: Path) -> None:
    columns = {"blob": [b"\0" * 100] * 3, "text": ["a", None, "c"], "prompt": pa.nulls(3, pa.string())}
    path = write_parquet(tmp_path / "rows.parquet", columns)

    assert list(read_rows(path)) == [(1, {"text": "a"}), (2, {}), (3, {"text": "c"})]
    assert field_names(path) == ["blob", "text", "prompt"]


def test_parquet_comes_in_batches_up_to_a_limit(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", {"text": [str(row) for row in range(150)]}, row_group_size=7)

    assert [len(batch) for batch in read_batches(path)] == [64, 64, 22]
    assert [number for batch in read_batches(path, 70) for number, _ in batch] == list(range(1, 71))


def test_a_worker_s_copy_that_is_named_by_digest_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "0a1b", {"text": ["a"]})
    lines = write_jsonl(tmp_path / "2c3d", [{"text": "a"}])

    assert list(read_rows(table)) == list(read_rows(lines)) == [(1, {"text": "a"})]
    assert place_of(table, 3) == "0a1b row 3"
    assert place_of(lines, 3) == "2c3d line 3"


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_text_is_text_however_arrow_keeps_it(tmp_path: Path, kind: Any) -> None:
    texts = ["sea", "fish", "sea"] * 20
    path = write_parquet(tmp_path / "rows.parquet", {"text": pa.array(texts).cast(kind)})

    assert [row["text"] for _, row in read_rows(path)] == texts


@pytest.mark.parametrize("share", [0.0001, 0.02, 0.3, 0.7, 0.95, 0.9999])
def test_half_a_parquet_file_is_named(tmp_path: Path, share: float) -> None:
    path = write_parquet(tmp_path / "rows.parquet", {"text": [f"number {row}" for row in range(5000)]})
    whole = path.read_bytes()
    path.write_bytes(whole[: max(5, int(len(whole) * share))])

    error = refusal(path)
    assert "its end is missing" in error.message
    assert "fetch it" in error.hint


def test_every_flipped_byte_is_refused_or_changes_no_more_than_values(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", {"text": [f"number {row}" for row in range(60)]})
    whole = bytearray(path.read_bytes())
    for at in range(4, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 0x55
        path.write_bytes(damaged)
        try:
            list(read_rows(path))
        except TrainChainError as error:
            assert error.code == "data.format", at  # noqa: PT017
            assert "rows.parquet" in error.message  # noqa: PT017


def test_a_page_whose_checksum_does_not_hold_is_named_by_its_row(tmp_path: Path) -> None:
    columns = {"text": ["a" * 50 + f" {row}" for row in range(200)]}
    options: dict[str, Any] = {"write_page_checksum": True, "use_dictionary": False, "compression": "none"}
    path = write_parquet(tmp_path / "rows.parquet", columns, row_group_size=32, **options)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b" 100", b" 10x"))

    assert "row 97 cannot be read (" in refusal(path).message


@pytest.mark.parametrize(
    ("columns", "form", "says"),
    [
        ({"text": pa.nulls(1, pa.string())}, "text", "row 1 lacks the text `text`"),
        ({"text": [b"ab"]}, "text", "row 1 lacks the text `text`: it is bytes"),
        ({"text": [["a"]]}, "text", "row 1 lacks the text `text`: it is a list"),
        ({"text": [3]}, "text", "row 1 lacks the text `text`: it is a number"),
        ({"text": pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string()))}, "text", "it is a list"),
        ({"id": [3]}, "text", "row 1 lacks the text `text`"),
        ({"messages": ["[]"]}, "chat_template", "row 1 lacks `messages`, a list"),
        ({"messages": [{"role": ["user"], "content": ["a"]}]}, "chat_template", "one object of lists"),
        ({"messages": [[None]]}, "chat_template", "in message 1, which is null"),
        ({"messages": [[{"role": "user", "content": None}]]}, "chat_template", "lacks the text `content` in message 1"),
        ({"messages": [[{"role": "user", "content": b"a"}]]}, "chat_template", "it is bytes"),
        ({"messages": pa.nulls(1, MESSAGES)}, "chat_template", "row 1 lacks `messages`"),
        ({"messages": [[]]}, "chat_template", "row 1 lacks `messages`"),
    ],
)
def test_what_a_parquet_row_lacks_is_named(tmp_path: Path, columns: Any, form: Any, says: str) -> None:
    assert says in refusal(write_parquet(tmp_path / "rows.parquet", columns), form).message


def test_text_that_is_not_utf8_is_named_by_its_row(tmp_path: Path) -> None:
    raw = pa.array([b"good"] * 20 + [b"\xff\xfe"])
    texts = pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])

    assert (
        "row 21 has text that is not UTF-8" in refusal(write_parquet(tmp_path / "r.parquet", {"text": texts})).message
    )


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), path)

    assert "has the column `text` twice" in refusal(path).message


@pytest.mark.parametrize(
    ("name", "content", "says", "hint"),
    [
        ("rows.parquet", b'{"text": "a"}\n', "does not begin with PAR1", "damaged"),
        ("rows.parquet", b"", "does not begin with PAR1", "damaged"),
        ("rows.csv", b"text\na\n", "is neither", "read_csv('rows.csv')"),
        ("rows.tsv", b"text\na\n", "is neither", "delimiter"),
        ("rows.jsonl.gz", b"\x1f\x8b", "is neither", "gunzip -k rows.jsonl.gz"),
        ("rows.jsonl.zst", b"", "is neither", "unzstd rows.jsonl.zst"),
        ("rows.arrow", b"", "is neither", "open_stream('rows.arrow')"),
        ("rows.json", b'[{"text": "a"}]', "begins a JSON list", "< rows.json > rows.jsonl"),
        ("rows.jsonl", b'\xef\xbb\xbf [{"text": "a"}]', "begins a JSON list", "> lines-rows.jsonl"),
        ("rows.json", b'{\n  "text": "a"\n}\n', "line 1 is not JSON", "a line of its own"),
    ],
)
def test_a_file_of_another_kind_is_told_what_to_do(
    tmp_path: Path, name: str, content: bytes, says: str, hint: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    error = refusal(path)
    assert says in error.message
    assert hint in error.hint


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.pkl", "rows.PARQUET.bak"])
def test_a_suffix_that_is_none_of_ours_is_refused_where_a_recipe_names_it(name: str) -> None:
    with pytest.raises(TrainChainError, match=rf"`datasets`: {name} is neither") as caught:
        check_suffix(Path(name), "`datasets`: ")
    assert caught.value.code == "source.unsupported"
    for suffix in tables.SUFFIXES:
        check_suffix(Path("rows" + suffix))


def test_the_conversions_that_are_told_convert(tmp_path: Path) -> None:
    rows = [{"text": "a, b"}, {"text": "c"}]
    (tmp_path / "rows.csv").write_text('text\n"a, b"\nc\n')
    (tmp_path / "rows.tsv").write_text("text\na, b\nc\n")
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for name, made in [("csv", "parquet"), ("tsv", "parquet"), ("arrow", "parquet"), ("json", "jsonl")]:
        path = tmp_path / f"rows.{name}"
        with pytest.raises(TrainChainError) as caught:
            list(read_rows(path))
        command = caught.value.hint.split(": ", 1)[1].replace("python", sys.executable, 1)
        subprocess.run(command, shell=True, cwd=tmp_path, check=True, timeout=60)

        assert [row for _, row in read_rows(tmp_path / f"rows.{made}")] == rows, name
        (tmp_path / f"rows.{made}").unlink()


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        (
            {"question": "a", "answer": "b"},
            "jq -c '{prompt: .question, completion: .answer}' rows.jsonl > renamed-rows.jsonl",
        ),
        ({"instruction": "a", "output": "b", "input": ""}, "{prompt: .instruction, completion: .output}"),
        ({"conversation": []}, "{messages: .conversation}"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "better ones as prompt and completion"),
        ({"other": 1}, "docs/data.md"),
    ],
)
def test_rows_as_other_tools_have_them_are_told_their_other_names(
    tmp_path: Path, row: dict[str, Any], hint: str
) -> None:
    with pytest.raises(TrainChainError, match="has the fields") as caught:
        format_of(write_jsonl(tmp_path / "rows.jsonl", [row]))
    assert hint in caught.value.hint


def test_the_renaming_of_parquet_columns_renames_them(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "old.parquet", {"question": ["a"], "answer": ["b"]})
    with pytest.raises(TrainChainError, match="has the fields question, answer") as caught:
        format_of(path)
    command = caught.value.hint.removeprefix("Rename them: ").replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, timeout=60)

    assert list(read_rows(tmp_path / "renamed-old.parquet")) == [(1, {"prompt": "a", "completion": "b"})]


READ = """
import json, resource, sys
from pathlib import Path
from trainchain.core.errors import TrainChainError
from trainchain.core.train.rows import read_rows
import pyarrow.parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    said = sum(1 for _ in read_rows(Path(sys.argv[1])))
except TrainChainError as error:
    said = error.message
print(json.dumps([said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


def read_apart(path: Path) -> tuple[Any, float]:
    """What reading says in a process of its own, and how many MiB it took at most."""
    command = [sys.executable, "-c", READ, str(path)]
    said, grown = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)
    return said, grown


def test_rows_of_seventeen_mebibytes_are_refused_and_do_not_pile_up(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["x" * (17 << 20)]).take(pa.array([0] * 24))})
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path, compression="zstd")
    del table

    said, grown = read_apart(path)

    assert said == "rows.parquet row 1 is longer than 16 MiB."
    assert path.stat().st_size < 1 << 20
    assert grown < 3 * 17 * PARQUET_ROWS


def test_a_list_of_many_nulls_is_refused_before_it_is_made_of_objects(tmp_path: Path) -> None:
    many = 20_000_000
    nulls = pa.ListArray.from_arrays(pa.array([0, many], pa.int32()), pa.nulls(many))
    path = write_parquet(tmp_path / "rows.parquet", {"messages": nulls}, compression="zstd")
    del nulls

    said, grown = read_apart(path)

    assert said == "rows.parquet row 1 is longer than 16 MiB."
    assert path.stat().st_size < 10_000
    assert grown < 400


def test_a_column_that_nests_without_end_is_refused(tmp_path: Path) -> None:
    kind, value = pa.string(), "x"
    for _ in range(60):
        kind, value = pa.list_(kind), [value]  # type: ignore[list-item]

    assert (
        "too deeply nested" in refusal(write_parquet(tmp_path / "r.parquet", {"text": pa.array([value], kind)})).message
    )


def test_a_row_of_many_columns_is_read_and_a_file_of_too_many_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "rows.parquet", {f"column {at}": [at] for at in range(3000)} | {"text": ["a"]})
    assert list(read_rows(path)) == [(1, {"text": "a"})]

    monkeypatch.setattr(tables, "MAX_FOOTER", 100_000)
    assert "describes its columns and parts in" in refusal(path).message


def test_a_footer_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1" + b"\0" * 20 + (1 << 31).to_bytes(4, "little") + b"PAR1")

    assert "its end is missing" in refusal(path).message


def test_the_quickstart_s_rows_are_the_same_from_parquet(tmp_path: Path) -> None:
    rows = chat_rows(100)
    path = write_parquet(tmp_path / "rows.parquet", {"messages": [row["messages"] for row in rows]})

    assert [row for _, row in read_rows(path)] == rows
