"""Whatever is wrong, a real `trainchain` says one clear thing, ends with its code, and leaves nothing behind."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_hub import Town

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart"
RECIPE = """\
name: small
base_model: ./base
datasets: [{path: ./train.jsonl}]
sequence_len: 64
micro_batch_size: 1
gradient_accumulation_steps: 1
rounds: 1
shards: 1
steps: 2
pay: {per_million_tokens: "2.50", budget: "5"}
"""
ROWS = "".join(json.dumps({"prompt": f"{n} and {n}?", "completion": f"{2 * n}."}) + "\n" for n in range(40))


@dataclass
class Ended:
    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> dict[str, Any]:
        document = json.loads(self.stdout)
        assert document["ok"] is False
        found: dict[str, Any] = document["error"]
        return found


class Desk:
    """A folder to stand in, a home, and a good recipe to spoil."""

    def __init__(self, root: Path) -> None:
        self.cwd, self.home, self.job = root / "cwd", root / "home", root / "job"
        self.cwd.mkdir()
        (self.job / "base").mkdir(parents=True)
        for file in (QUICKSTART / "base").iterdir():
            (self.job / "base" / file.name).hardlink_to(file)
        (self.job / "train.jsonl").write_text(ROWS, encoding="utf-8")
        self.recipe = self.job / "recipe.yaml"
        self.recipe.write_text(RECIPE, encoding="utf-8")

    def change(self, old: str, new: str) -> None:
        assert old in RECIPE
        self.recipe.write_text(RECIPE.replace(old, new), encoding="utf-8")

    def run(self, *arguments: str, **environment: str) -> Ended:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TRAINCHAIN_")}
        done = subprocess.run(
            [sys.executable, "-m", "trainchain", *arguments],
            cwd=self.cwd,
            env={**kept, "TRAINCHAIN_HOME": str(self.home), "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def submit(self, *arguments: str, hub: str = "http://127.0.0.1:9", **environment: str) -> Ended:
        return self.run("submit", str(self.recipe), "--hub", hub, "--json", *arguments, **environment)

    def left_behind(self) -> set[str]:
        """Files that were not there before; the wallet is made once, on purpose, and said."""
        here = {str(path.relative_to(self.cwd)) for path in self.cwd.rglob("*")}
        home = {str(path.relative_to(self.home)) for path in self.home.rglob("*") if path.is_file()}
        return (here | home) - {"wallet.json"}


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def insist(ended: Ended, code: str, exit_code: int, *words: str) -> None:
    """One message on stderr, one document on stdout, the exit code, and no traceback."""
    assert ended.code == exit_code, ended.stderr
    assert ended.error["code"] == code
    for word in words:
        assert word in ended.error["message"] + " " + ended.error["hint"]
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("error[") == 1
    assert f"error[{code}] {ended.error['message']}" in ended.stderr
    assert ended.stdout.count("\n") == 1


CHEAP: dict[str, tuple[Callable[[Desk], Any], str, int, str]] = {
    "an unknown key": (lambda d: d.change("\nsteps:", "\nstepz:"), "recipe.unknown_key", 2, "Write `steps` instead."),
    "a wrong type": (lambda d: d.change("rounds: 1", "rounds: many"), "recipe.invalid", 2, "recipe.yaml:7"),
    "another tool's key": (lambda d: d.change("sequence_len", "cutoff_len"), "recipe.unknown_key", 2, "sequence_len"),
    "a missing recipe": (lambda d: d.recipe.unlink(), "usage.file", 2, "recipe.yaml cannot be read"),
    "a recipe in another encoding": (
        lambda d: d.recipe.write_bytes(RECIPE.replace("small", "größer").encode("latin-1")),
        "usage.file",
        2,
        "not UTF-8",
    ),
    "a recipe that is no YAML": (lambda d: d.change("[{path", "[{{path"), "recipe.not_yaml", 2, "recipe.yaml:"),
    "missing data": (lambda d: (d.job / "train.jsonl").unlink(), "source.missing", 2, "train.jsonl"),
    "a missing model": (lambda d: d.change("./base", "./bass"), "source.missing", 2, "bass is not a folder"),
    "a model elsewhere": (
        lambda d: d.change("./base", "s3://bucket/model"),
        "source.unsupported",
        2,
        "s3://bucket/model",
    ),
    "data of another kind": (lambda d: d.change("./train.jsonl", "./recipe.yaml"), "source.unsupported", 2, "jsonl"),
}
WITH_TORCH: dict[str, tuple[Callable[[Desk], Any], str, int, str]] = {
    "empty data": (lambda d: (d.job / "train.jsonl").write_text(""), "data.empty", 2, "train.jsonl"),
    "a budget below the price": (
        lambda d: d.change('budget: "5"', 'budget: "0.0000001"'),
        "money.budget_too_small",
        6,
        "budget",
    ),
    "no weights but a pickle": (
        lambda d: (d.job / "base/model.safetensors").rename(d.job / "base/pytorch_model.bin"),
        "model.unreadable",
        2,
        "safetensors",
    ),
}
LONG: dict[str, tuple[Callable[[Desk], Any], str, int, str]] = {
    "no config": (lambda d: (d.job / "base/config.json").unlink(), "model.unreadable", 2, "config.json"),
    "no tokenizer": (lambda d: (d.job / "base/tokenizer.json").unlink(), "model.unreadable", 2, "tokenizer"),
    "an empty folder for a model": (lambda d: shutil.rmtree(d.job / "base") or (d.job / "base").mkdir(),
                                    "model.unreadable", 2, "config.json"),
    "data of another format": (
        lambda d: d.change("{path: ./train.jsonl}", "{path: ./train.jsonl, type: chat_template}"),
        "data.format",
        2,
        "train.jsonl line 1",
    ),
    "data of no format": (
        lambda d: (d.job / "train.jsonl").write_text('{"a": 1}\n'),
        "data.format",
        2,
        "train.jsonl line 1",
    ),
    "data that is no JSON": (lambda d: (d.job / "train.jsonl").write_bytes(b"\xff{"), "data.format", 2, "line 1"),
    "data that is too little": (lambda d: d.change("batch_size: 1", "batch_size: 900"), "data.too_small", 2, ""),
    "a sequence longer than the model's": (
        lambda d: d.change("sequence_len: 64", "sequence_len: 65536"),
        "recipe.invalid",
        2,
        "sequence_len",
    ),
    "targets that the model has not": (
        lambda d: d.change("rounds: 1", "lora_target_modules: [nothing]\nrounds: 1"),
        "recipe.invalid",
        2,
        "nothing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHEAP)
def test_a_recipe_is_refused_with(desk: Desk, name: str) -> None:
    spoil, code, exit_code, word = CHEAP[name]
    spoil(desk)

    insist(desk.submit(), code, exit_code, word)

    assert not desk.home.exists()
    assert desk.left_behind() == set()


@pytest.mark.parametrize("name", [*WITH_TORCH, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_a_job_is_refused_with(desk: Desk, name: str) -> None:
    spoil, code, exit_code, word = {**WITH_TORCH, **LONG}[name]
    spoil(desk)

    insist(desk.submit(), code, exit_code, word)

    assert not desk.home.exists()
    assert desk.left_behind() == set()


def test_without_json_the_answer_stays_empty(desk: Desk) -> None:
    desk.change("\nsteps:", "\nstepz:")

    ended = desk.run("submit", str(desk.recipe))

    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.splitlines() == [
        f"error[recipe.unknown_key] {desk.recipe}:9: `stepz` is not a key of a recipe.",
        "hint: Write `steps` instead.",
    ]


@pytest.mark.long
def test_run_refuses_what_submit_refuses(desk: Desk) -> None:
    (desk.job / "train.jsonl").write_text("", encoding="utf-8")

    insist(desk.run("run", str(desk.recipe), "--json"), "data.empty", 2)

    assert not desk.home.exists()
    assert desk.left_behind() == set()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.long
def test_a_hub_that_is_down_may_be_tried_again(desk: Desk) -> None:
    url = f"http://127.0.0.1:{closed_port()}"

    insist(desk.run("jobs", "ls", "--hub", url, "--json"), "hub.unreachable", 3, url, "serve-hub")

    assert not desk.home.exists()


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[str]:
    """Something that speaks HTTP and is no hub."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_an_address_that_is_no_hub_is_named(desk: Desk, web_server: str) -> None:
    insist(desk.run("jobs", "ls", "--hub", web_server, "--json"), "hub.not_a_hub", 1, web_server)

    assert not desk.home.exists()


@pytest.mark.parametrize("address", ["hub.example", "http://", "http://[::1", "http://127.0.0.1:port"])
def test_what_is_no_address_is_a_usage_error(desk: Desk, address: str) -> None:
    insist(desk.run("jobs", "ls", "--hub", address, "--json"), "usage.flag", 2, "--hub")


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    made = Town(tmp_path_factory.mktemp("town"))
    yield made
    made.close()


def lie(town: Town, monkeypatch: pytest.MonkeyPatch, **lies: Any) -> None:
    told = town.port.describe()
    monkeypatch.setattr(town.port, "describe", lambda: {**told, **lies})


@pytest.mark.parametrize("lies", [{"chain_id": 1}, {"escrow": "token"}, {"escrow": "0x" + "77" * 20}], ids=str)
def test_a_hub_that_lies_about_its_chain_gets_nothing(
    desk: Desk, town: Town, monkeypatch: pytest.MonkeyPatch, lies: dict[str, Any]
) -> None:
    lie(town, monkeypatch, **{name: town.token if value == "token" else value for name, value in lies.items()})

    insist(desk.run("claim", "--hub", town.url, "--json"), "chain.wrong", 1)

    assert desk.left_behind() == set()


def test_a_chain_that_is_down_may_be_tried_again(desk: Desk, town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    lie(town, monkeypatch, rpc=f"http://127.0.0.1:{closed_port()}")

    insist(desk.run("claim", "--hub", town.url, "--json"), "chain.unreachable", 3)

    assert desk.left_behind() == set()


def test_a_job_that_is_not_there_is_said_so(desk: Desk, town: Town) -> None:
    for arguments in (("jobs", "show", "nobody"), ("pull", "nobody")):
        insist(desk.run(*arguments, "--hub", town.url, "--json"), "job.unknown", 1, "nobody")

    assert not desk.home.exists()
    assert desk.left_behind() == set()


def test_last_means_nothing_before_the_first_job(desk: Desk, town: Town) -> None:
    insist(desk.run("jobs", "show", "@last", "--hub", town.url, "--json"), "job.unknown", 1)


def test_nothing_is_spent_where_nobody_can_be_asked(desk: Desk, town: Town) -> None:
    blocks = town.chain.node.head()

    insist(desk.submit(hub=town.url), "usage.flag", 2, "5 TRAIN", "--yes")

    assert town.chain.node.head() == blocks
    assert desk.left_behind() == set()


def test_a_wrong_password_is_said_so(desk: Desk, tmp_path: Path) -> None:
    for name in ("right", "wrong"):
        (tmp_path / name).write_text(f"{name}\n", encoding="utf-8")
    made = desk.run("wallet", "new", "--json", TRAINCHAIN_PASSWORD_FILE=str(tmp_path / "right"))
    address = json.loads(made.stdout)["address"]

    wrong = desk.run("wallet", "show", "--json", TRAINCHAIN_PASSWORD_FILE=str(tmp_path / "wrong"))
    none = desk.run("wallet", "show", "--json")
    gone = desk.run("wallet", "show", "--json", TRAINCHAIN_PASSWORD_FILE=str(tmp_path / "gone"))
    right = desk.run("wallet", "show", "--json", TRAINCHAIN_PASSWORD_FILE=str(tmp_path / "right"))

    insist(wrong, "wallet.wrong_password", 7, "TRAINCHAIN_PASSWORD_FILE")
    insist(none, "wallet.locked", 7, "TRAINCHAIN_PASSWORD_FILE")
    insist(gone, "wallet.locked", 7, "gone")
    assert json.loads(right.stdout) == {
        "ok": True, "address": address, "file": str(desk.home / "wallet.json"), "password": "file"
    }  # fmt: skip
    assert desk.left_behind() == set()


def test_a_wallet_is_never_overwritten(desk: Desk) -> None:
    desk.run("wallet", "new")
    before = (desk.home / "wallet.json").read_bytes()

    insist(desk.run("wallet", "new", "--json"), "wallet.exists", 7)

    assert (desk.home / "wallet.json").read_bytes() == before


def test_a_wallet_file_of_another_kind_is_left_alone(desk: Desk) -> None:
    desk.home.mkdir()
    (desk.home / "wallet.json").write_text('{"version": 1}', encoding="utf-8")

    insist(desk.run("wallet", "show", "--json"), "wallet.unreadable", 7)


def test_a_home_that_is_a_file_is_said_so(desk: Desk) -> None:
    desk.home.write_text("not a folder", encoding="utf-8")

    ended = desk.run("wallet", "new", "--json")

    assert ended.code == 2
    assert "Traceback" not in ended.stderr
    assert ended.error["code"] == "usage.file"


def test_an_address_that_is_taken_is_said_so(desk: Desk) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        insist(desk.run("serve-hub", "--listen", f"127.0.0.1:{port}", "--json"), "hub.address_in_use", 1, str(port))
    for listen in ("7070", "here:port", "127.0.0.1:99999"):
        insist(desk.run("serve-hub", "--listen", listen, "--json"), "usage.flag", 2, listen)

    assert not desk.home.exists()


def test_a_chain_that_is_none_is_said_so(desk: Desk) -> None:
    for url, code in (("ftp://chain", "chain.unknown"), ("embedded:../up", "chain.unknown")):
        insist(desk.run("chain", "deploy", "--rpc", url, "--json"), code, 1)

    assert not desk.home.exists()
