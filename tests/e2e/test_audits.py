"""Audits with real processes: honest work passes, and neither worker nor auditor has to survive for it."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Background, Machine, write_recipe


def _is(name: str, **fields: Any) -> Any:
    wanted = {"event": name, **fields}
    return lambda event: wanted.items() <= event.items()


def _submit(machine: Machine, url: str, recipe: Path) -> str:
    return str(machine.answer("owner", "submit", str(recipe), "--yes", hub=url)["job"])


def _passed(worker: Background) -> dict[str, Any]:
    found = worker.wait_for(_is("audited"))
    assert (found["state"], found["code"], found["forfeited"]) == ("passed", "audit.passed", "0"), found
    return found


@pytest.mark.long
def test_honest_work_passes_and_its_evidence_is_told_in_words(machine: Machine, tiny_job: Path) -> None:
    _, url = machine.start_hub()
    job = _submit(machine, url, write_recipe(tiny_job, "audited", check={}, rounds=1, shards=1, steps=16))
    ada = machine.start("ada", "serve-gpu", "--threads", "1", "--shards", "1", hub=url)

    verdict = _passed(ada)

    assert ada.process.wait(60) == 0, "it stayed until the verdict, and no longer"
    assert [event["event"] for event in ada.events if event["event"] in ("drawn", "answered")] == ["drawn", "answered"]
    assert not list((machine.root / "ada" / "home" / "work").rglob("*.safetensors"))
    (row,) = machine.answer("owner", "jobs", "show", job, "--evidence", hub=url)["audits"]
    assert (row["lease"], row["state"], row["at_risk"]) == (verdict["lease"], "passed", 1)
    (replay,) = row["replays"]
    assert replay["auditor"] != row["worker"]
    listed = machine.run("owner", "jobs", "show", job, "--evidence", hub=url).stdout
    assert re.fullmatch(r"round 1  shard 0 +segment \d +0x\w{4}\.\.\w{4}  0x\w{10}  passed\n", listed)
    while machine.answer("owner", "jobs", "show", job, hub=url)["state"] != "settled":
        pass  # until then auditors may be tested with what has passed
    words = machine.run("owner", "jobs", "show", job, "--evidence", row["lease"][:12], hub=url)
    assert words.stdout.startswith("audit.passed  What was replayed is what was contributed.\n"), words.stderr
    for expected in (f"segment {row['segment']}, with 1 shard at risk", "the same to the last bit", replay["auditor"]):
        assert expected in words.stdout
    document = machine.answer("owner", "jobs", "show", job, "--evidence", row["lease"], hub=url)
    assert document["code"] == "audit.passed"
    nothing = machine.run("owner", "jobs", "show", job, "--evidence", "0xff", hub=url)
    assert (nothing.returncode, "names no audit" in nothing.stderr) == (2, True)


@pytest.mark.long
def test_a_worker_killed_before_it_answers_answers_when_it_is_back(machine: Machine, tiny_job: Path) -> None:
    _, url = machine.start_hub()
    recipe = write_recipe(tiny_job, "worker-gone", check={}, rounds=1, shards=1, steps=16)
    job = _submit(machine, url, recipe)
    ada = machine.start("ada", "serve-gpu", "--threads", "1", hub=url)
    ada.wait_for(_is("drawn"))
    ada.kill()

    again = machine.start("ada", "serve-gpu", "--threads", "1", hub=url)

    _passed(again)
    assert not [event for event in again.events if event["event"] == "step"], "nothing was trained again"
    assert again.stop() in (0, 130, 143)
    (row,) = machine.answer("owner", "jobs", "show", job, "--evidence", hub=url)["audits"]
    assert row["state"] == "passed"


@pytest.mark.long
def test_an_auditor_killed_while_it_replays_is_followed_by_another(machine: Machine, tiny_job: Path) -> None:
    """The owner's machines audit here; what one began another begins anew once its lease has run out."""
    hub = machine.start("operator", "serve-hub", "--listen", "127.0.0.1:0", "--no-evaluate")
    url = str(hub.wait_for(_is("ready"))["url"])
    recipe = write_recipe(tiny_job, "auditor-gone", check={}, rounds=1, shards=1, steps=300, segment_steps=300)
    job = _submit(machine, url, recipe)
    machine.answer("owner", "wallet", "show")
    for machine_name in ("first", "second"):
        home = machine.root / machine_name / "home"
        home.mkdir(parents=True)
        shutil.copy(machine.root / "owner" / "home" / "wallet.json", home / "wallet.json")
    ada = machine.start("ada", "serve-gpu", "--threads", "1", "--shards", "1", hub=url)
    first = machine.start("first", "serve-gpu", "--audit-only", "--threads", "1", hub=url)
    leased = first.wait_for(_is("leased", kind="replay", job=job))
    first.wait_for(_is("step"))

    first.kill()
    second = machine.start("second", "serve-gpu", "--audit-only", "--threads", "1", "--shards", "1", hub=url)

    replayed = second.wait_for(_is("replayed"))
    assert replayed["lease"] != leased["lease"]
    assert second.process.wait(60) == 0
    _passed(ada)
    assert ada.process.wait(60) == 0
