"""Killed at the worst moment: a worker in mid-shard, the hub in mid-round. Real processes, real signals."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Machine, write_recipe


def _watch(machine: Machine, url: str, job: str, until: str) -> dict[str, Any]:
    while True:
        view: dict[str, Any] = machine.answer("owner", "jobs", "show", job, hub=url)
        if view["state"] == until:
            return view


def _paid_once(machine: Machine, url: str, view: dict[str, Any], people: tuple[str, ...]) -> None:
    """Everybody is paid exactly what was accepted, and the escrow adds up."""
    claimed = {}
    for name in people:
        found = machine.answer(name, "claim", hub=url)
        claimed[found["wallet"]] = int(found["balance"])
    rewards = {wallet: int(worker["reward"]) for wallet, worker in view["workers"].items()}
    assert {wallet: paid for wallet, paid in claimed.items() if paid} == rewards
    money = machine.answer("owner", "jobs", "show", view["job"], hub=url)["money"]
    assert int(money["claimed"]) == sum(rewards.values())
    assert int(money["claimed"]) + int(money["claimable"]) + int(money["refundable"]) == 10**18


@pytest.mark.long
def test_killed_worker_costs_its_shard_and_nothing_else(machine: Machine, tiny_job: Path) -> None:
    _, url = machine.start_hub()
    recipe = write_recipe(tiny_job, "worker-dies", rounds=1, shards=2, steps=400)
    job = machine.answer("owner", "submit", str(recipe), "--yes", hub=url)["job"]
    ada = machine.start("ada", "serve-gpu", "--hub", url, "--threads", "1")
    lost = ada.wait_for(lambda event: event["event"] == "step")

    ada.kill()
    bob = machine.start("bob", "serve-gpu", "--hub", url, "--threads", "1")
    taken = bob.wait_for(lambda event: event["event"] == "accepted" and event["shard"] == lost["shard"])

    view = _watch(machine, url, job, "settled")
    assert taken["round"] == lost["round"]
    assert [shard["state"] for shard in view["rounds_done"][0]["shards"]] == ["accepted", "accepted"]
    assert len(view["workers"]) == 1
    bob.stop()
    _paid_once(machine, url, view, ("ada", "bob"))


@pytest.mark.long
def test_killed_worker_that_comes_back_goes_on_from_its_last_segment(machine: Machine, tiny_job: Path) -> None:
    _, url = machine.start_hub()
    recipe = write_recipe(tiny_job, "worker-returns", rounds=1, shards=1, steps=320)
    job = machine.answer("owner", "submit", str(recipe), "--yes", hub=url)["job"]
    ada = machine.start("ada", "serve-gpu", "--threads", "1", hub=url)
    ada.wait_for(lambda event: event["event"] == "step" and event["step"] > 100)

    ada.kill()
    again = machine.start("ada", "serve-gpu", "--threads", "1", "--shards", "1", hub=url)
    accepted = again.wait_for(lambda event: event["event"] == "accepted")

    assert 1 <= accepted["resumed"] < 8
    assert again.process.wait(60) == 0
    view = _watch(machine, url, job, "settled")
    (shard,) = view["rounds_done"][0]["shards"]
    assert len(shard["micro_tokens"]) == 8
    alone = machine.answer("someone", "train", str(recipe), "--shard", "0", "--threads", "1")
    assert alone["delta"] == shard["delta"], "one that was interrupted gives the bytes of one that was not"


def test_killed_child_goes_on_under_the_same_lease_with_less_at_once(machine: Machine, tiny_job: Path) -> None:
    _, url = machine.start_hub()
    recipe = write_recipe(tiny_job, "child-dies", rounds=1, shards=1, steps=320)
    job = machine.answer("owner", "submit", str(recipe), "--yes", hub=url)["job"]
    ada = machine.start("ada", "serve-gpu", "--threads", "1", "--shards", "1", hub=url)
    ada.wait_for(lambda event: event["event"] == "step" and event["step"] > 100)

    (child,) = _children(ada.process.pid)
    os.kill(child, signal.SIGKILL)
    accepted = ada.wait_for(lambda event: event["event"] == "accepted")

    usual = 2 * 96
    (smaller,) = [event for event in ada.events if event["event"] == "smaller"]
    assert (smaller["code"], smaller["micro_tokens"]) == ("train.child_died", usual // 2)
    assert len([event for event in ada.events if event["event"] == "leased"]) == 1
    (shard,) = machine.answer("owner", "jobs", "show", job, hub=url)["rounds_done"][0]["shards"]
    resumed = accepted["resumed"]
    assert shard["micro_tokens"] == [usual] * resumed + [usual // 2] * (8 - resumed)
    assert 1 <= resumed < 8


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text(encoding="utf-8").split()]


def test_killed_hub_goes_on_with_the_same_round(machine: Machine, tiny_job: Path) -> None:
    hub, url = machine.start_hub()
    recipe = write_recipe(
        tiny_job, "hub-dies", rounds=2, shards=6, steps=300, pay={"per_million_tokens": "0.50", "budget": "1"}
    )
    workers = [machine.start(name, "serve-gpu", "--hub", url, "--threads", "1") for name in ("ada", "bob")]
    for worker in workers:
        worker.wait_for(lambda event: event["event"] == "serving")
    job = machine.answer("owner", "submit", str(recipe), "--yes", hub=url)["job"]
    first = workers[0].wait_for(lambda event: event["event"] == "accepted")
    workers[0].wait_for(lambda event: event["event"] == "leased" and event["shard"] != first["shard"])

    hub.kill()
    restarted, again = machine.start_hub(url.removeprefix("http://"))
    assert again == url
    before = machine.answer("owner", "jobs", "show", job, hub=url)

    kept = {shard["shard"]: shard["delta"] for shard in before["rounds_done"][0]["shards"] if "delta" in shard}
    assert first["shard"] in kept
    view = _watch(machine, url, job, "settled")
    for shard in view["rounds_done"][0]["shards"]:
        assert kept.get(shard["shard"], shard["delta"]) == shard["delta"]
    assert [row["state"] for row in view["rounds_done"]] == ["merged", "merged"]
    assert sum(worker["accepted"] for worker in view["workers"].values()) == 12
    for worker in workers:
        worker.stop()
    _paid_once(machine, url, view, ("ada", "bob"))
    assert restarted.stop() == 143
