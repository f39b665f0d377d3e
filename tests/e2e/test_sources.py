"""A job whose base and data lie on a model hub, from publishing to the pushed adapter, each person with a token of
their own. The hub is one on loopback; the vendor's client is unmodified."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import Machine, write_recipe
from tests.fixtures_hf import Hub
from tests.fixtures_model import chat_rows


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as made:
        yield made


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.fixture
def recipe(hub: Hub, tiny_job: Path) -> Path:
    """Base, data and target on the model hub: the base gated, the data private."""
    card = b"---\nlicense: apache-2.0\n---\n# Tiny\n"
    model = {path.name: path.read_bytes() for path in (tiny_job / "base").iterdir()}
    hub.put("acme/tiny", {**model, "README.md": card, "pytorch_model.bin": b"pickle", "evil.py": b"1/0"}, gated=True)
    rows = chat_rows(92)
    data = {
        "data/train-00000-of-00002.parquet": parquet(rows[:40]),
        "data/train-00001-of-00002.parquet": parquet(rows[40:80]),
        "data/test-00000-of-00001.parquet": parquet(rows[80:]),
    }
    hub.put("acme/chats", data, kind="dataset", private=True)
    for person in ("owner", "ada"):
        hub.allow("acme/tiny", person)
        hub.allow("acme/chats", person, kind="dataset")
    hub.allow("acme/tiny", "operator")
    hub.allow("acme/chats", "operator", kind="dataset")
    return write_recipe(
        tiny_job,
        "from-a-hub",
        base_model="hf://acme/tiny",
        datasets=[{"path": "hf://datasets/acme/chats"}],
        test_datasets=[{"path": "hf://datasets/acme/chats", "rows": 10}],
        hub_model_id="owner/tiny-lora",
    )


def signed_in(machine: Machine, hub: Hub, *people: str) -> None:
    for person in people:
        own = {"HF_HOME": str(machine.root / person / "hf")}
        machine.settings[person] = hub.environment(None if person == "eve" else person) | own


@pytest.mark.long
def test_base_and_data_from_a_hub_and_the_adapter_back_to_it(machine: Machine, hub: Hub, recipe: Path) -> None:
    signed_in(machine, hub, "owner", "ada", "eve", "operator")
    _, url = machine.start_hub()
    submitted = machine.run("owner", "submit", str(recipe), "--yes", hub=url)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    weights = hub.read("acme/tiny")["model.safetensors"][-256:]
    here = [path for path in (machine.root / "owner").rglob("*") if path.is_file()]
    assert not [path for path in here if weights in path.read_bytes()], "a whole model to publish a job"

    eve = machine.start("eve", "serve-gpu", "--hub", url, "--threads", "1")
    refused = eve.wait_for(lambda event: event["event"] == "failed")
    assert (refused["code"], refused["unable"]) == ("source.gated", True)
    assert f"{hub.url}/acme/tiny" in refused["message"] + refused["hint"]
    eve.wait_for(lambda event: event["event"] == "waiting")
    ada = machine.start("ada", "serve-gpu", "--hub", url, "--threads", "1")
    ada.wait_for(lambda event: event["event"] == "accepted")

    shown = machine.answer("owner", "jobs", "show", job, hub=url)
    while shown["state"] != "settled" or any(row["loss"] is None for row in shown["evaluations"]):
        shown = machine.answer("owner", "jobs", "show", job, hub=url)
    pushed = machine.answer("owner", "push", job, hub=url)
    again = machine.answer("owner", "push", job, hub=url)

    assert (pushed["created"], again["created"]) == (True, False)
    assert pushed["commit"] == again["commit"] == hub.head("owner/tiny-lora")
    assert hub.repos["model", "owner/tiny-lora"].private
    files = hub.read("owner/tiny-lora")
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/tiny", hub.head("acme/tiny"))
    card = files["README.md"].decode()
    for truth in ("license: apache-2.0", hub.head("acme/tiny"), shown["spec_hash"], shown["settlements"][-1]["tx"]):
        assert truth in card, truth
    for round_ in shown["evaluations"]:
        assert f"{round_['loss']:.4f}" in card
    logs = b"".join(path.read_bytes() for path in machine.root.rglob("*.log"))
    assert not [token for token in hub.users if token.encode() in logs]


@pytest.mark.long
def test_one_machine_fetches_once_and_pushes_at_the_end(machine: Machine, hub: Hub, recipe: Path) -> None:
    signed_in(machine, hub, "owner")

    done = machine.answer("owner", "run", str(recipe), "--keep", "state")

    assert done["pushed"]["commit"] == hub.head("owner/tiny-lora")
    whole = [request for request in hub.requests if request.path.endswith("model.safetensors") and not request.range]
    assert len([request for request in whole if request.method == "GET"]) == 1


@pytest.mark.long
def test_bytes_that_are_not_the_published_ones_are_named_and_not_trained_on(
    machine: Machine, hub: Hub, recipe: Path
) -> None:
    signed_in(machine, hub, "owner", "ada", "operator")
    _, url = machine.start_hub()
    assert machine.run("owner", "submit", str(recipe), "--yes", hub=url).returncode == 0
    hub.tamper("acme/tiny", "model.safetensors")

    ada = machine.start("ada", "serve-gpu", "--hub", url, "--threads", "1")
    failed = ada.wait_for(lambda event: event["event"] == "failed")
    assert failed["code"] == "source.changed"
    assert "model.safetensors" in failed["message"]
    assert len([event for event in ada.events if event["event"] == "damaged"]) == 2
    hub.heal()

    assert ada.wait_for(lambda event: event["event"] == "accepted")
