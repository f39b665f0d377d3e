"""`trainchain train`: one shard without a hub, the same bytes as a worker's, on from where it was interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import COMMAND, PATIENCE, Machine, write_recipe
from trainchain.core.adapter import adapter_bytes, delta, read_adapter, tensor_specs
from trainchain.core.digests import sha256, sha256_file
from trainchain.core.encodings import encode
from trainchain.core.segments import Moments, read_state

ONE = ["--threads", "1"]
SAME = ("spec_hash", "start", "delta", "end", "state_root", "leaves", "micro_tokens", "losses", "numeric_class")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_job: Path) -> dict[str, Any]:
    """Shard 1 of round 1, trained once, looked at by several tests."""
    machine = Machine(tmp_path_factory.mktemp("train"))
    recipe = write_recipe(tiny_job, "alone", samples=["Who wrote this?"])
    document = machine.answer("me", "train", str(recipe), "--shard", "1", "-o", "out", *ONE)
    return {"document": document, "machine": machine, "recipe": recipe, "folder": machine.root / "me"}


def test_the_folder_holds_adapter_delta_and_commitments(trained: dict[str, Any]) -> None:
    folder, document = trained["folder"] / "out", trained["document"]
    kept = json.loads((folder / "commitments.json").read_text(encoding="utf-8"))

    assert document == {"ok": True, "folder": "out", **kept}
    assert (kept["round"], kept["shard"], kept["lease"]) == (1, 1, "0x" + "00" * 32)
    assert (kept["segment_steps"], len(kept["leaves"]), len(kept["micro_tokens"]), kept["resumed"]) == (1, 4, 3, 0)
    assert kept["spec_hash"] == sha256_file(folder / "recipe.json")
    assert kept["start"] == sha256_file(folder / "states" / "start.safetensors")
    assert kept["delta"] == sha256_file(folder / "delta.safetensors")
    assert kept["end"] == sha256_file(folder / "adapter_model.safetensors")
    start = read_adapter(folder / "states" / "start.safetensors")
    end = read_adapter(folder / "adapter_model.safetensors")
    last = read_state((folder / "states" / "state-00003.safetensors").read_bytes(), 3, tensor_specs(start))
    assert (folder / "delta.safetensors").read_bytes() == encode(delta(end, start), "int4", Moments(last.m, last.v))
    assert not (trained["folder"] / "home" / "wallet.json").exists()


def test_the_adapter_loads_with_plain_peft(trained: dict[str, Any], tiny_job: Path) -> None:
    script = Path(__file__).with_name("plain_peft.py")
    arguments = [tiny_job / "base", trained["folder"] / "out", tiny_job / "held_out.jsonl", 10, 96]

    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )

    assert json.loads(done.stdout.splitlines()[-1])["loss"] > 0


def test_called_again_it_has_nothing_left_to_train(trained: dict[str, Any]) -> None:
    machine, document = trained["machine"], trained["document"]

    again = machine.run("me", "train", str(trained["recipe"]), "--shard", "1", "-o", "out", *ONE)
    kept = json.loads((trained["folder"] / "out" / "commitments.json").read_text(encoding="utf-8"))

    assert (again.returncode, again.stdout) == (0, "out\n"), "stdout is the folder and nothing else"
    assert (kept["resumed"], {name: kept[name] for name in SAME}) == (3, {name: document[name] for name in SAME})


def test_another_place_gives_the_same_bytes(trained: dict[str, Any]) -> None:
    other = trained["machine"].answer("you", "train", str(trained["recipe"]), "--shard", "1", *ONE)

    assert other["folder"] == "alone-round-1-shard-1"
    assert {name: other[name] for name in SAME} == {name: trained["document"][name] for name in SAME}


def test_a_later_round_starts_from_a_folder(trained: dict[str, Any]) -> None:
    arguments = ["train", str(trained["recipe"]), "--round", "2", "--shard", "0", "--start", "out", "-o", "second"]

    document = trained["machine"].answer("me", *arguments, *ONE, "--micro-tokens", "64", "--checkpointing")

    assert document["start"] == trained["document"]["end"]
    assert document["micro_tokens"] == [64] * 3


def refused(trained: dict[str, Any], *arguments: str) -> tuple[int, str, str]:
    done = trained["machine"].run("me", "train", str(trained["recipe"]), *arguments, "--json")
    assert "Traceback" not in done.stderr
    error = json.loads(done.stdout)["error"]
    return done.returncode, error["code"], error["message"] + " " + error["hint"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--shard", "2"], "no shard 2"),
        (["--shard", "0", "--round", "3"], "no round 3"),
        (["--shard", "0", "--round", "2"], "--start DIR"),
        (["--shard", "0", "--start", "nowhere"], "nowhere"),
        (["--shard", "0", "-o", "out"], "shard 1 of round 1"),
    ],
)
def test_what_makes_no_sense_is_refused(trained: dict[str, Any], arguments: list[str], word: str) -> None:
    code, reason, text = refused(trained, *arguments)

    assert (code, reason.startswith("usage.")) == (2, True)
    assert word in text


def test_an_adapter_of_another_base_is_refused(trained: dict[str, Any], tmp_path: Path) -> None:
    good = read_adapter(trained["folder"] / "out" / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").write_bytes(adapter_bytes({"base_model.model.x": good[min(good)]}))

    code, reason, text = refused(trained, "--shard", "0", "--start", str(tmp_path))

    assert (code, reason) == (2, "adapter.unfit")
    assert "lacks the tensor" in text
    assert not (trained["folder"] / "alone-round-1-shard-0").exists()


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.long), signal.SIGINT])
def test_interrupted_it_goes_on_from_the_last_segment(machine: Machine, tiny_job: Path, number: int) -> None:
    recipe = write_recipe(tiny_job, f"interrupted-{number}", rounds=1, shards=1, steps=320)
    arguments = ["train", str(recipe), "--shard", "0", *ONE]
    folder = machine.root / "me"
    folder.mkdir()
    with subprocess.Popen(
        [*COMMAND, *arguments, "-o", "out"],
        cwd=folder,
        env=machine.environment("me", None),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as first:
        until = time.monotonic() + PATIENCE
        while not (folder / "out" / "states" / "state-00002.safetensors").exists():
            assert first.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(first.pid, number)
        assert first.wait(60) == (130 if number == signal.SIGINT else -9)

    document = machine.answer("me", *arguments, "-o", "out")
    whole = machine.answer("me", *arguments, "-o", "whole")

    assert 1 <= document["resumed"] < 8
    assert whole["resumed"] == 0
    assert {name: document[name] for name in SAME} == {name: whole[name] for name in SAME}
    assert not (folder / "out" / "states" / "out").exists()
    assert sha256((folder / "out" / "recipe.json").read_bytes()) == document["spec_hash"]


@pytest.mark.long
def test_two_processes_train_one_shard_together(trained: dict[str, Any]) -> None:
    arguments = [
        "train",
        str(trained["recipe"]),
        "--shard",
        "1",
        "-o",
        "pair",
        "--processes",
        "2",
        "--micro-tokens",
        "96",
    ]

    document = trained["machine"].answer("me", *arguments, *ONE)

    one, two = (read_adapter(trained["folder"] / name / "adapter_model.safetensors") for name in ("out", "pair"))
    assert document["numeric_class"].endswith("/processes2")
    assert all(np.allclose(one[name], two[name], rtol=1e-2, atol=1e-5) for name in one)
