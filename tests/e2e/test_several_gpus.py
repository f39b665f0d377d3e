"""A machine with two GPUs, as far as its driver says: two children, one wallet, one process to stop."""

import os
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Machine, write_recipe
from tests.unit.test_devices import TWO, put_nvidia_smi

PAY = {"per_million_tokens": "0.10", "budget": "1"}
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the fake nvidia-smi is a shell script")


@pytest.fixture(autouse=True)
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put_nvidia_smi(tmp_path / "bin", f"cat <<END\n{TWO}END")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_each_gpu_has_a_child_and_all_have_one_wallet(machine: Machine, tiny_job: Path) -> None:
    _, url = machine.start_hub()
    recipe = write_recipe(tiny_job, "two-gpus", rounds=1, shards=4, steps=60)
    job = machine.answer("owner", "submit", str(recipe), "--yes", hub=url)["job"]

    ada = machine.start("ada", "serve-gpu", "--threads", "1", "--shards", "4", hub=url)
    serving = ada.wait_for(lambda event: event["event"] == "serving")
    assert ada.process.wait(180) == 0

    accepted = [event for event in ada.events if event["event"] == "accepted"]
    view = machine.answer("owner", "jobs", "show", job, hub=url)
    assert serving["devices"] == ["0", "1"]
    assert {event["device"] for event in accepted} == {"0", "1"}
    assert sorted(event["shard"] for event in accepted) == [0, 1, 2, 3]
    assert list(view["workers"]) == [serving["wallet"]]
    home = machine.root / "ada" / "home"
    assert {path.name for path in home.glob("trainer*.log")} == {"trainer-gpu-0.log", "trainer-gpu-1.log"}
    evaluator = machine.root / "operator" / "home" / "evaluator"
    assert {path.name for path in evaluator.glob("trainer*.log")} <= {"trainer-gpu-0.log"}


def test_one_signal_stops_all_and_gives_every_lease_back(machine: Machine, tiny_job: Path) -> None:
    _, url = machine.start_hub()
    recipe = write_recipe(tiny_job, "two-stopped", rounds=1, shards=4, steps=2000, pay=PAY)
    job = machine.answer("owner", "submit", str(recipe), "--yes", hub=url)["job"]
    ada = machine.start("ada", "serve-gpu", "--threads", "1", hub=url)
    for device in ("0", "1"):
        ada.wait_for(lambda event, device=device: event["event"] == "step" and event["device"] == device)

    assert ada.stop() == 143

    assert sorted(event["device"] for event in ada.events if event["event"] == "given_back") == ["0", "1"]
    (row,) = machine.answer("owner", "jobs", "show", job, hub=url)["rounds_done"]
    assert {shard["state"] for shard in row["shards"]} == {"open"}


@pytest.mark.long
def test_one_gpu_may_be_chosen(machine: Machine, tiny_job: Path) -> None:
    _, url = machine.start_hub()
    recipe = write_recipe(tiny_job, "one-of-two", rounds=1, shards=1)
    machine.answer("owner", "submit", str(recipe), "--yes", hub=url)

    ada = machine.start("ada", "serve-gpu", "--threads", "1", "--shards", "1", "--devices", "1", hub=url)
    ada.wait_for(lambda event: event["event"] == "accepted")

    assert ada.process.wait(60) == 0
    assert all("device" not in event for event in ada.events)
    assert (machine.root / "ada" / "home" / "trainer-gpu-1.log").exists()
