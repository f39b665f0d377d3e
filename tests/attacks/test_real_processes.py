"""Dishonest workers and auditors as processes of their own, beside honest ones, under a real hub with its auditor.

The owner's machine works and audits, too; a wallet's first shard is always drawn.
"""

import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Background, Machine, write_recipe

ROOT = Path(__file__).parents[2]
SIZES = {"rounds": 1, "shards": 4, "steps": 8}
CHECK = {"answer": "25s", "timeout": "60s"}


def start_cheat(machine: Machine, name: str, how: str, url: str, *more: str, patch: pytest.MonkeyPatch) -> Background:
    machine.settings[name] = {"PYTHONPATH": str(ROOT)}
    with patch.context() as changed:
        command = [sys.executable, "-m", "tests.attacks.cheating_worker", how]
        changed.setattr("tests.e2e.conftest.COMMAND", command)
        return machine.start(name, "serve-gpu", "--threads", "1", *more, hub=url)


def wallet_of(machine: Machine, name: str) -> str:
    return str(machine.answer(name, "wallet", "show")["address"])


def ask(url: str, path: str) -> Any:
    """What anybody is told."""
    return httpx.get(url + path, timeout=60, trust_env=False).raise_for_status().json()


def watch(url: str, job: str, state: str) -> dict[str, Any]:
    """The job's view once it is in a state; each event of the job is a look at it."""
    after = 0
    for _ in range(500):
        view: dict[str, Any] = ask(url, f"/v1/jobs/{job}")
        if view["state"] == state:
            return view
        events = ask(url, f"/v1/jobs/{job}/events?after={after}&wait=20")["events"]
        after = max([after, *(event["seq"] for event in events)])
    raise AssertionError(f"the job is {view['state']}, and never {state}")


def is_paid(machine: Machine, url: str, name: str) -> int:
    return int(machine.answer(name, "claim", hub=url)["balance"])


def audits_of(view: dict[str, Any], worker: str) -> list[dict[str, Any]]:
    shards = [shard for round_ in view["rounds_done"] for shard in round_["shards"]]
    return [shard for shard in shards if (shard.get("worker") or "").lower() == worker.lower()]


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "code"),
    [("free-rider", "audit.differs"), ("upload", "audit.wrong_delta"), ("silent", "audit.silent")],
)
def test_a_cheat_is_caught_and_paid_nothing_and_the_honest_are_paid(
    machine: Machine, tiny_job: Path, how: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = machine.start_hub()
    recipe = write_recipe(tiny_job, f"meets-{how}", **SIZES, check=CHECK)
    job = machine.answer("owner", "submit", str(recipe), "--yes", hub=url)["job"]
    mallory = start_cheat(machine, "mallory", how, url, "--shards", "1", patch=monkeypatch)
    mallory.wait_for(lambda event: event["event"] == "accepted")
    ada = machine.start("ada", "serve-gpu", "--threads", "1", "--shards", "2", hub=url)
    ada.wait_for(lambda event: event["event"] == "accepted")
    machine.start("owner", "serve-gpu", "--threads", "1", hub=url)

    view = watch(url, job, "settled")

    (caught,) = audits_of(view, wallet_of(machine, "mallory"))
    assert (caught["audit"]["code"], caught["forfeited"]) == (code, True)
    honest = audits_of(view, wallet_of(machine, "ada"))
    assert honest
    assert all(not shard["forfeited"] for shard in honest)
    assert {shard["audit"]["code"] for shard in honest if shard["audit"]} <= {"audit.passed"}
    assert is_paid(machine, url, "mallory") == 0
    assert is_paid(machine, url, "ada") == sum(int(shard["reward"]) for shard in honest)


@pytest.mark.long
def test_a_lazy_worker_is_caught_by_exactly_the_segments_it_did_not_train(
    machine: Machine, tiny_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = machine.start_hub()
    recipe = write_recipe(tiny_job, "meets-lazy", **SIZES, check=CHECK)
    job = machine.answer("owner", "submit", str(recipe), "--yes", hub=url)["job"]
    mallory = start_cheat(machine, "mallory", "lazy", url, "--shards", "3", patch=monkeypatch)
    mallory.wait_for(lambda event: event["event"] == "accepted")
    machine.start("owner", "serve-gpu", "--threads", "1", hub=url)

    view = watch(url, job, "settled")

    audits = ask(url, f"/v1/jobs/{job}/audits")["audits"]
    theirs = [audit for audit in audits if audit["worker"].lower() == wallet_of(machine, "mallory").lower()]
    decided = [audit for audit in theirs if audit["state"] != "void"]
    assert decided
    for audit in decided:
        assert (audit["code"] == "audit.differs") == (audit["segment"] >= SIZES["steps"] // 2)
    kept = [shard for shard in audits_of(view, wallet_of(machine, "mallory")) if not shard["forfeited"]]
    assert is_paid(machine, url, "mallory") == sum(int(shard["reward"]) for shard in kept)


@pytest.mark.long
def test_an_owner_whose_auditor_lies_takes_nothing_from_honest_workers(
    machine: Machine, tiny_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody else audits, the hub waits for another word as long as its recipe says, and pays."""
    hub = machine.start("operator", "serve-hub", "--listen", "127.0.0.1:0", "--no-evaluate")
    url = str(hub.wait_for(lambda event: event.get("event") == "ready")["url"])
    recipe = write_recipe(tiny_job, "refused", **SIZES, check=CHECK)
    job = machine.answer("owner", "submit", str(recipe), "--yes", hub=url)["job"]
    liar = start_cheat(machine, "owner", "liar", url, "--audit-only", patch=monkeypatch)
    ada = machine.start("ada", "serve-gpu", "--threads", "1", hub=url)
    liar.wait_for(lambda event: event["event"] == "replayed")

    view = watch(url, job, "settled")

    lied = [audit for audit in ask(url, f"/v1/jobs/{job}/audits")["audits"] if audit["replays"]]
    assert lied
    assert {audit["code"] for audit in lied} <= {"audit.unaudited", "audit.undecided"}
    honest = audits_of(view, wallet_of(machine, "ada"))
    assert len(honest) == SIZES["shards"]
    assert not any(shard["forfeited"] for shard in honest)
    assert is_paid(machine, url, "ada") == sum(int(shard["reward"]) for shard in honest)
    assert ada.process.poll() is None
