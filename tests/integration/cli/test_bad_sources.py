"""Whatever is wrong with a source: one clear message and its exit code, no secret, nothing half-written."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_hf import Hub
from tests.fixtures_model import chat_rows, make_tiny_model
from trainchain.cli.main import run_command

RECIPE = """\
name: small
base_model: {base}
datasets: [{{path: "{data}"}}]
sequence_len: 64
micro_batch_size: 1
gradient_accumulation_steps: 1
rounds: 1
shards: 1
steps: 2
pay: {{per_million_tokens: "2.50", budget: "5"}}
"""
BASE, DATA = "hf://acme/tiny", "hf://datasets/acme/rows"
AT_ONCE = {"Retry-After": "0"}
Spoil = Callable[[Hub, pytest.MonkeyPatch], Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = make_tiny_model(tmp_path_factory.mktemp("model"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    rows = "".join(json.dumps(row) + "\n" for row in chat_rows(40)).encode()
    with Hub() as made:
        made.put("acme/tiny", model)
        made.put("acme/rows", {"train.jsonl": rows}, kind="dataset")
        made.use(monkeypatch, "owner")
        yield made


def without(model: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: data for name, data in model.items() if name not in names}


def changed(model: dict[str, bytes], name: str, **changes: Any) -> dict[str, bytes]:
    return {**model, name: json.dumps({**json.loads(model[name]), **changes}).encode()}


def revoke(hub: Hub, _: pytest.MonkeyPatch) -> None:
    hub.revoke(hub.token("owner"))
    hub.users.pop(os.environ["HF_TOKEN"], None)


def gate(hub: Hub, _: pytest.MonkeyPatch) -> None:
    hub.repos["model", "acme/tiny"].gated = True


def hide(hub: Hub, _: pytest.MonkeyPatch) -> None:
    hub.repos["model", "acme/tiny"].private = True


def busy(status: int) -> Spoil:
    return lambda hub, _: hub.fail("acme/tiny", times=99, status=status, headers=AT_ONCE)


def put(repo: str, make: Callable[[dict[str, bytes]], dict[str, bytes]], kind: str = "model") -> Spoil:
    def spoil(hub: Hub, _: pytest.MonkeyPatch) -> None:
        now = hub.read(repo, kind)
        hub.repos.pop((kind, repo))
        hub.put(repo, make(now), kind=kind)

    return spoil


def half(hub: Hub, _: pytest.MonkeyPatch) -> None:
    whole = hub.read("acme/tiny")["model.safetensors"]
    hub.put("acme/tiny", {"model.safetensors": whole[: len(whole) // 2]})


def lost_part(model: dict[str, bytes]) -> dict[str, bytes]:
    index = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    parts = {"model-00001-of-00002.safetensors": model["model.safetensors"]}
    return {**without(model, "model.safetensors"), **parts, "model.safetensors.index.json": json.dumps(index).encode()}


def endless(hub: Hub, _: pytest.MonkeyPatch) -> None:
    hub.repos["dataset", "acme/rows"].endless = 1_000_000


CASES: dict[str, tuple[Spoil, str, int, str]] = {
    "a token that was revoked": (revoke, "source.token", 7, "the token that was sent"),
    "terms that were not accepted": (gate, "source.gated", 1, "acme/tiny"),
    "a private repository, or a typo": (hide, "source.not_found", 1, "acme/tiny"),
    "too many requests": (busy(429), "source.unavailable", 3, "429"),
    "a hub that is broken": (busy(503), "source.unavailable", 3, "503"),
    "half of a file of weights": (half, "model.unreadable", 2, "acme/tiny"),
    "a part of the weights that is not there": (
        put("acme/tiny", lost_part), "source.incomplete", 1, "model-00002-of-00002.safetensors",
    ),
    "pickles only": (
        put("acme/tiny", lambda had: {**without(had, "model.safetensors"), "pytorch_model.bin": b"\x80"}),
        "model.unreadable", 2, "pytorch_model.bin",
    ),
    "a model with code of its own": (
        put("acme/tiny", lambda had: {
            **changed(had, "config.json", auto_map={"AutoModel": "evil.Model"}), "evil.py": b"raise SystemExit",
        }),
        "model.unreadable", 2, "auto_map",
    ),
    "a tokenizer that is none": (
        put("acme/tiny", lambda had: {**had, "tokenizer.json": b"{}"}), "model.unreadable", 2, "tokenizer",
    ),
    "a listing of a million files": (endless, "source.unsafe", 1, "10,000"),
    "a name that leads out": (
        put("acme/rows", lambda had: {"../../.bashrc.jsonl": b"{}"}, "dataset"), "source.unsafe", 1, "..",
    ),
    "a name that cannot be shown": (
        put("acme/rows", lambda had: {"a\x1b]0;b.jsonl": b"{}"}, "dataset"), "source.unsafe", 1, "\\x1b",
    ),
    "rows that are no parquet": (
        put("acme/rows", lambda had: {"a.parquet": b"PAR1 and nothing"}, "dataset"), "data.format", 2, "a.parquet",
    ),
    "no rows at all": (put("acme/rows", lambda had: {"README.md": b"# Rows"}, "dataset"), "data.empty", 2, "acme/rows"),
}  # fmt: skip


@pytest.mark.parametrize("within", ["", "/two rows", "/**/test-*"])
def test_of_several_held_out_files_one_is_named_so_that_it_can_be_written(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], within: str
) -> None:
    rows = hub.read("acme/rows", "dataset")["train.jsonl"]
    hub.put("acme/tests", {f"two rows/test-{number}.jsonl": rows for number in (0, 1)}, kind="dataset")
    recipe = tmp_path / "recipe.yaml"

    def ended(held_out: str) -> Any:
        entry = f'test_datasets: [{{path: "{held_out}", rows: 3}}]\n'
        recipe.write_text(RECIPE.format(base=BASE, data=DATA) + entry, encoding="utf-8")
        run_command(
            ["train", str(recipe), "--shard", "0", "-o", str(tmp_path / "out"), "--home", str(tmp_path), "--json"]
        )
        return json.loads(capsys.readouterr().out)

    error = ended(f"hf://datasets/acme/tests{within}")["error"]

    assert error["code"] == "recipe.invalid"
    assert ended(error["hint"].removeprefix("Name one: "))["ok"]


@pytest.mark.parametrize(("spoil", "code", "exit_code", "names"), CASES.values(), ids=CASES)
def test_what_is_wrong_with_a_source_is_one_clear_message(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Spoil,
    code: str,
    exit_code: int,
    names: str,
) -> None:
    spoil(hub, monkeypatch)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=BASE, data=DATA), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"

    ended = run_command(["train", str(recipe), "--shard", "0", "--home", str(home), "--json"])

    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert (error["code"], ended) == (code, exit_code), error
    assert names in error["message"]
    assert error["hint"]
    assert error["message"].isprintable()
    assert "Traceback" not in said.err
    for secret in ("hf_", "Signature", "X-Amz", str(home)):
        assert secret not in said.out + said.err, secret
    assert {path.name for path in tmp_path.iterdir()} - {"home"} == {"recipe.yaml"}
    left = [path for path in home.rglob("*") if path.is_file() and path.stat().st_size]
    assert not [path for path in left if "partial" in path.parts or path.name.startswith(".")]
