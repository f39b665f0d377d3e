"""`trainchain data inspect` by the command line that people type, on a terminal and off it."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fixtures_hf import Hub
from tests.fixtures_model import TEMPLATE, chat_rows, make_tiny_model, write_jsonl
from trainchain.cli.main import run_command

RECIPE = """\
name: small
base_model: ./base
datasets: [{path: ./train.jsonl}, {path: ./more.jsonl, type: text}]
test_datasets: [{path: ./held_out.jsonl}]
sequence_len: 64
micro_batch_size: 1
gradient_accumulation_steps: 2
rounds: 1
shards: 2
steps: 2
pay: {per_million_tokens: "2.50", budget: "5"}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def job(tmp_path: Path, base: Path) -> Path:
    """A folder with a recipe and all that it names."""
    (tmp_path / "base").mkdir()
    for file in base.iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    write_jsonl(tmp_path / "train.jsonl", chat_rows(30))
    write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": "a", "completion": "b", "id": 1}])
    write_jsonl(tmp_path / "more.jsonl", [{"text": "fish", "messages": []}])
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


class Said:
    """What a command answered, said beside it, and ended with."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


@pytest.fixture
def inspect(job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setenv("TRAINCHAIN_HOME", str(job / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.chdir(job)

    def run(*arguments: str) -> Said:
        code = run_command(["data", "inspect", "--recipe", "recipe.yaml", *arguments])
        return Said(code, *capsys.readouterr())

    return run


def test_the_recipe_s_first_data_is_shown_and_nothing_is_written(job: Path, inspect: Any) -> None:
    before = sorted(job.rglob("*"))

    said = inspect()

    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("data        train.jsonl  30 rows of chat messages\n")
    assert "carry loss" in said.out
    assert "names 2 data sets" in said.out
    assert "\x1b" not in said.out
    assert max(map(len, said.out.splitlines())) <= 80
    assert sorted(job.rglob("*")) == before


def test_json_is_one_document_with_all_of_it(inspect: Any) -> None:
    found = inspect("--json").document

    assert found["ok"] is True
    assert (found["file"], found["format"], found["unit"], found["rows"]) == (
        "train.jsonl",
        "chat_template",
        "line",
        30,
    )
    assert found["packing"]["batch_size"] == 2
    assert found["packing"]["job_sequences"] == 8
    assert sum(entry["rows"] for entry in found["histogram"]) == 30
    first = found["examples"][0]
    assert len(first["ids"]) == len(first["loss"]) <= 64
    assert set(first["loss"]) == {0, 1}
    assert [row["row"] for row in found["packed"][0]] == [example["row"] for example in found["examples"]]
    assert found["lengths"]["median"] <= found["lengths"]["p95"] <= found["lengths"]["longest"]
    assert (
        found["cut"]["count"]
        == len(found["cut"]["rows"])
        == sum(bin["rows"] for bin in found["histogram"] if bin["cut"])
    )


def test_a_file_that_the_recipe_names_is_read_as_the_recipe_says(inspect: Any) -> None:
    assert inspect("more.jsonl", "--json").document["format"] == "text"
    held_out = inspect("held_out.jsonl", "--json").document
    assert (held_out["format"], held_out["fields_not_used"]) == ("prompt_completion", ["id"])


def test_any_other_file_may_be_looked_at(job: Path, inspect: Any) -> None:
    rows = chat_rows(7)
    pq.write_table(pa.table({"messages": [row["messages"] for row in rows]}), job / "other.parquet")

    found = inspect("other.parquet", "--rows", "5", "--json").document

    assert (found["unit"], found["rows"], found["limited"]) == ("row", 5, True)


@pytest.mark.parametrize(
    ("name", "content", "code", "says"),
    [
        (
            "bad.jsonl",
            b'{"text": "a"}\n{"text": 1}\n',
            "data.format",
            "bad.jsonl line 2 lacks the text `text`: it is a",
        ),
        ("half.parquet", b"PAR1" + b"\0" * 50, "data.format", "half.parquet is no whole parquet file"),
        ("rows.csv", b"text\na\n", "source.unsupported", "rows.csv is neither"),
        ("rows.json", b'[{"text": "a"}]', "data.format", "begins a JSON list"),
        ("empty.jsonl", b"", "data.empty", "empty.jsonl has no rows"),
        ("gone.jsonl", None, "source.missing", "gone.jsonl cannot be read: No such file"),
    ],
)
def test_a_bad_file_is_one_clear_error(
    job: Path, inspect: Any, name: str, content: bytes | None, code: str, says: str
) -> None:
    if content is not None:
        (job / name).write_bytes(content)

    said = inspect(name, "--json")

    assert said.code == 2
    error = said.document["error"]
    assert error["code"] == code
    assert says in error["message"]
    assert f"error[{code}]" in said.err
    assert "Traceback" not in said.err


def test_a_template_without_marks_is_told_what_to_do_about_it(job: Path, inspect: Any) -> None:
    bare = TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    (job / "base" / "chat_template.jinja").write_text(bare)

    said = inspect()

    assert said.code == 2
    assert "does not mark what the assistant says" in said.err
    assert "<|im_end|>; docs/data.md" in said.err


def test_the_templates_of_the_documentation_take_the_place_of_the_base_s_own(job: Path, inspect: Any) -> None:
    root = Path(__file__).parents[3]
    page = (root / "docs" / "data.md").read_text(encoding="utf-8")
    shown = [block.partition("```")[0] for block in page.split("```jinja\n")[1:]]
    shipped = [root / "recipes" / "templates" / name for name in ("chatml.jinja", "llama3.jinja")]
    assert shown == [path.read_text(encoding="utf-8") for path in shipped]
    before = inspect("--json").document
    (job / "base" / "chat_template.jinja").unlink()
    (job / "recipe.yaml").write_text(f"{RECIPE}chat_template: {shipped[0]}\n")

    assert inspect("--json").document == before
    longer = RECIPE.replace("sequence_len: 64", "sequence_len: 256")
    (job / "recipe.yaml").write_text(f"{longer}chat_template: {shipped[1]}\n")
    said = [piece["text"] for piece in inspect("--json").document["examples"][0]["pieces"] if piece["loss"]]
    assert said
    assert all(text.endswith("<|eot_id|>") for text in said)


def test_a_base_and_rows_on_a_model_hub_are_looked_at_the_same(
    job: Path, base: Path, inspect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = inspect("--json").document
    table = job / "train.parquet"
    rows = [json.loads(line) for line in (job / "train.jsonl").read_text().splitlines()]
    pq.write_table(pa.table({"messages": [row["messages"] for row in rows]}), table)
    with Hub() as hub:
        hub.put("alice/tiny", base)
        hub.put("alice/rows", {"data/train-00000-of-00001.parquet": table.read_bytes()}, kind="dataset")
        hub.use(monkeypatch)
        recipe = RECIPE.replace("./base", "hf://alice/tiny").replace("./train.jsonl", "hf://datasets/alice/rows")
        (job / "recipe.yaml").write_text(recipe)

        said = inspect("--json")

    assert said.code == 0
    assert "source   hf://alice/tiny@" in said.err
    for field in ("tokens", "supervised", "histogram", "packing", "lengths"):
        assert said.document[field] == before[field]
    assert said.document["unit"] == "row"
    assert [row["row"] for row in said.document["packed"][0]] == [row["row"] for row in before["packed"][0]]
    assert said.document["examples"] == before["examples"]


def test_on_a_terminal_what_carries_loss_is_green_unless_colour_is_not_wanted(job: Path) -> None:
    for wanted, environment in [(True, {}), (False, {"NO_COLOR": "1"})]:
        keep, give = pty.openpty()
        kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        running = subprocess.Popen(
            [sys.executable, "-m", "trainchain", "data", "inspect", "-r", "recipe.yaml", "--rows", "3"],
            cwd=job,
            env={**kept, "TRAINCHAIN_HOME": str(job / "home"), "OMP_NUM_THREADS": "1", "TERM": "xterm", **environment},
            stdin=subprocess.DEVNULL,
            stdout=give,
            stderr=subprocess.PIPE,
        )
        os.close(give)
        out = b""
        try:
            while chunk := os.read(keep, 1 << 16):
                out += chunk
        except OSError:  # how Linux says that nobody holds the other end any more
            pass
        os.close(keep)
        _, err = running.communicate(timeout=60)

        assert (running.returncode, err) == (0, b"")
        assert (b"\x1b[32m" in out) is wanted
        assert ("\u27e6".encode() in out) is not wanted
