"""`trainchain run`: one command, a fine-tuned adapter, checked contributions, tokens in two wallets."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import COMMAND, PATIENCE, Machine, write_recipe
from trainchain.chain import escrow
from trainchain.chain.settlement import check_against_chain
from trainchain.core.digests import sha256_file
from trainchain.core.objects import ObjectStore


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_job: Path) -> dict[str, Any]:
    """One run to its end, looked at by several tests."""
    machine = Machine(tmp_path_factory.mktemp("run"))
    recipe = write_recipe(tiny_job, "one-machine")
    document = machine.answer("me", "run", str(recipe), "--keep", "state", "-o", "adapter")
    return {"document": document, "folder": machine.root / "me", "job": tiny_job}


def test_run_reports_everything_it_promises(finished: dict[str, Any]) -> None:
    document = finished["document"]

    assert document["job"].startswith("0x")
    assert len(document["spec_hash"]) == 64
    assert [row["round"] for row in document["rounds"]] == [1, 2]
    assert all(row["loss_before"] > 0 and row["loss_after"] > 0 for row in document["rounds"])
    assert document["loss_after"] < document["loss_before"]
    assert document["tokens"] == sum(worker["tokens"] for worker in document["workers"])
    assert sum(worker["accepted"] for worker in document["workers"]) == 4
    assert document["settlements"][-1]["tx"].startswith("0x")
    assert all(worker["claim_txs"] for worker in document["workers"])
    assert set(document["seconds"]) == {"total", "training", "merging", "chain", "waiting"}


def test_every_unit_of_the_budget_is_accounted_for(finished: dict[str, Any]) -> None:
    document = finished["document"]
    money = {name: int(value) for name, value in document["escrow"].items()}

    assert money["claimed"] + money["claimable"] + money["refundable"] == 10**18
    fees = sum(int(auditor["fees"]) for auditor in document["auditors"])
    assert money["claimed"] == sum(int(worker["claimed"]) for worker in document["workers"]) + fees
    assert all(worker["claimed"] == worker["reward"] for worker in document["workers"])


def test_one_worker_is_audited_by_the_hub_s_own_child(machine: Machine, tiny_job: Path) -> None:
    recipe = write_recipe(tiny_job, "audited-alone", check={}, shards=1, rounds=1, steps=8)

    done = machine.run("me", "run", str(recipe), "--workers", "1", "--keep", "state", "--json")

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["audits"] == {"drawn": 1, "passed": 1, "failed": 0, "unaudited": 0}
    assert "1 of 1 shards audited, all passed\n" in done.stderr
    money = {name: int(value) for name, value in document["escrow"].items()}
    assert money["claimed"] + money["claimable"] + money["refundable"] == 10**18
    assert money["claimable"] == 0, "what its replay earned the hub's child is claimed, too"
    (auditor,) = document["auditors"]
    assert auditor["replays"] == 1
    assert int(auditor["fees"]) > 0
    assert money["claimed"] == sum(int(worker["claimed"]) for worker in document["workers"]) + int(auditor["fees"])
    assert "  1 replay  earned " in done.stderr


def test_hub_leaves_file_and_chain_hold_the_same_amounts(finished: dict[str, Any]) -> None:
    document = finished["document"]
    home = finished["folder"] / "state" / "hub"
    chain = escrow.connect("embedded:local", home=home)

    settled = chain.settlements(document["job"])[-1]
    leaves = check_against_chain(ObjectStore(home / "objects").get(settled.data_hash[2:]), settled)

    assert leaves.amounts == {worker["wallet"]: int(worker["reward"]) for worker in document["workers"]}
    assert settled.total == sum(leaves.amounts.values()) == int(document["settlements"][-1]["total"])
    for worker in document["workers"]:
        assert chain.token_balance(chain.token, worker["wallet"]) == int(worker["reward"])


def test_the_folder_is_standard_peft_with_the_reported_loss(finished: dict[str, Any]) -> None:
    script = Path(__file__).with_name("plain_peft.py")
    job = finished["job"]
    arguments = [job / "base", finished["folder"] / "adapter", job / "held_out.jsonl", 10, 96]

    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["loss"] == pytest.approx(finished["document"]["loss_after"], abs=1e-3)
    assert measured["new"] > 0


def test_secrets_and_receipts_are_private(finished: dict[str, Any]) -> None:
    state = finished["folder"] / "state"
    secrets = [*state.rglob("*wallet*.json"), *state.rglob("receipts/*/*.json"), *state.rglob("*faucet*")]

    assert len([path for path in secrets if path.parent.parent.name == "receipts"]) == 4
    assert all(path.stat().st_mode & 0o077 == 0 for path in secrets)


def test_nothing_comes_from_the_owners_disk_but_by_digest(finished: dict[str, Any]) -> None:
    """Workers hold copies of their own, and no file of theirs names the owner's folder."""
    state, job = finished["folder"] / "state", finished["job"]

    model = next((state / "worker-1" / "cache" / "models").iterdir())
    assert (model / "model.safetensors").read_bytes() == (job / "base" / "model.safetensors").read_bytes()
    assert not (model / "model.safetensors").samefile(job / "base" / "model.safetensors")
    spec = finished["document"]["spec_hash"]
    recipe = (state / "worker-1" / "cache" / "objects" / spec[:2] / spec[2:]).read_text(encoding="utf-8")
    assert str(job) not in recipe


def test_only_the_hubs_own_child_sees_the_held_out_data(finished: dict[str, Any]) -> None:
    digest = sha256_file(finished["job"] / "held_out.jsonl")

    holders = {path.relative_to(finished["folder"] / "state").parts[0] for path in _copies(finished["folder"], digest)}

    assert holders == {"hub"}


def _copies(folder: Path, digest: str) -> list[Path]:
    return [path for path in (folder / "state").rglob(digest[2:]) if path.parent.name == digest[:2]]


def test_interrupted_run_leaves_no_child_and_goes_on_with_the_same_job(machine: Machine, tiny_job: Path) -> None:
    recipe = write_recipe(tiny_job, "interrupted", rounds=3, steps=200)  # long enough to be interrupted in
    arguments = ["run", str(recipe), "--keep", "state", "-o", "adapter"]
    folder = machine.root / "me"
    folder.mkdir()
    environment = machine.environment("me", None)
    with subprocess.Popen(
        [*COMMAND, *arguments], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    ) as first:
        assert first.stderr is not None
        for line in first.stderr:
            if "accepted" in line:
                break
        first.send_signal(signal.SIGINT)
        first.stderr.read()
        assert first.wait(60) == 130

    job = json.loads((folder / "state" / "run.json").read_text(encoding="utf-8"))["job"]
    leftover = [pid for pid in _processes() if str(folder) in _command(pid)]
    assert leftover == []

    document = machine.answer("me", *arguments)
    assert document["job"] == job
    assert sum(worker["accepted"] for worker in document["workers"]) == 6
    assert all(worker["claimed"] == worker["reward"] for worker in document["workers"])


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and int(path.name) != os.getpid()]


def _command(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ")
    except OSError:
        return ""
