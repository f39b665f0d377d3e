"""A private job as its people live it: who is admitted, what lies on whose disk, and what is left of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Machine, write_recipe
from tests.fixtures_model import chat_rows, make_tiny_model, write_jsonl

SECRET = "Rosebud-7431"
IDENTITY = b"AGE-SECRET-KEY"


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and rows that nobody else has: a word stands in every row."""
    folder = tmp_path_factory.mktemp("secrets")
    make_tiny_model(folder / "base", seed=99)

    def marked(count: int) -> list[dict[str, Any]]:
        rows = json.loads(json.dumps(chat_rows(count)))
        for row in rows:
            row["messages"][-1]["content"] += " " + SECRET
        return rows

    write_jsonl(folder / "train.jsonl", marked(80))
    write_jsonl(folder / "held_out.jsonl", marked(12))
    return folder


def holding(folder: Path, *texts: bytes) -> list[str]:
    """Files below a folder that hold one of the texts."""
    found = []
    for path in folder.rglob("*"):
        try:
            if path.is_file() and any(text in path.read_bytes() for text in texts):
                found.append(path.relative_to(folder).as_posix())
        except FileNotFoundError:  # it went meanwhile
            continue
    return found


def address(machine: Machine, person: str) -> str:
    return str(machine.answer(person, "wallet", "new")["address"])


@pytest.mark.long
def test_only_who_is_admitted_trains_and_nothing_lies_in_clear(machine: Machine, secrets: Path) -> None:
    weights = (secrets / "base" / "model.safetensors").read_bytes()[-512:]
    clear = (SECRET.encode(), weights, IDENTITY)
    _, url = machine.start_hub()
    ada, _ = address(machine, "ada"), address(machine, "eve")
    access = {"workers": [ada], "keys": "owner"}
    recipe = write_recipe(secrets, "private", access=access, samples=["Who wrote this?"], sample_tokens=8)

    refused = machine.run("owner", "submit", str(recipe), "--yes", "--json", hub=url)
    assert refused.returncode == 1
    error = json.loads(refused.stdout)["error"]
    assert error["code"] == "access.not_your_hub"
    assert machine.answer("owner", "jobs", "ls", hub=url)["jobs"] == []
    hub_address = error["hint"].split("--own-hub ")[1].split(";")[0]
    submitted = machine.run("owner", "submit", str(recipe), "--yes", "--own-hub", hub_address, hub=url)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    assert holding(machine.root / "owner", *clear) == []

    outsider = machine.start("eve", "serve-gpu", "--hub", url, "--threads", "1")
    outsider.wait_for(lambda event: event["event"] == "waiting")
    killed = machine.start("ada", "serve-gpu", "--hub", url, "--threads", "1")
    killed.wait_for(lambda event: event["event"] == "step")
    assert holding(machine.root / "ada", *clear) == []
    killed.kill()
    worker = machine.start("ada", "serve-gpu", "--hub", url, "--threads", "1")
    worker.wait_for(lambda event: event["event"] == "accepted")  # the owner is gone: the hub wraps the key anew
    worker.wait_for(lambda event: event["event"] == "forgotten")

    shown = machine.answer("owner", "jobs", "show", job, hub=url)
    assert set(shown["workers"]) == {ada}
    for person in ("ada", "eve", "operator", "owner"):
        assert holding(machine.root / person, *clear) == [], person
    assert holding(Path("/dev/shm"), *clear) == [] if Path("/dev/shm").is_dir() else True
    assert list((machine.root / "ada" / "home" / "cache" / "private").iterdir()) == []
    assert not [event for event in outsider.events if event["event"] == "leased"]

    while any(row["loss"] is None for row in shown["evaluations"]):
        shown = machine.answer("owner", "jobs", "show", job, hub=url)
    assert [len(row["samples"]) for row in shown["evaluations"]] == [1, 1, 1]
    assert machine.run("owner", "pull", job, "-o", "adapter", hub=url).returncode == 0
    for person in ("eve", "nobody"):
        looked = machine.run(person, "pull", job, "-o", "adapter", "--json", hub=url)
        assert looked.returncode != 0, looked.stdout
        assert not (machine.root / person / "adapter").exists()
    assert machine.answer("eve", "jobs", "show", job, hub=url)["evaluations"][0]["samples"] is None


@pytest.mark.long
def test_one_machine_trains_a_job_for_its_owner_alone(machine: Machine, secrets: Path) -> None:
    recipe = write_recipe(secrets, "alone", access={"workers": "owner"}, rounds=1)

    done = machine.answer("owner", "run", str(recipe), "--keep", "state")

    assert len(done["workers"]) == 1
    assert done["workers"][0]["accepted"] == 2
    assert int(done["workers"][0]["claimed"]) == int(done["workers"][0]["reward"]) > 0
    assert holding(machine.root / "owner" / "state", SECRET.encode(), IDENTITY) == []


def test_a_list_of_workers_is_not_for_one_machine(machine: Machine, secrets: Path) -> None:
    recipe = write_recipe(secrets, "listed", access={"workers": ["0x" + "ab" * 20]})

    refused = machine.run("owner", "run", str(recipe), "--json")

    assert refused.returncode == 1
    assert json.loads(refused.stdout)["error"]["code"] == "access.denied"
