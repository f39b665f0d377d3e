"""The same journey in separate terminals, by processes that share nothing but the hub's URL."""

import json
from pathlib import Path

from tests.e2e.conftest import Machine, write_recipe


def test_owner_and_two_workers_by_hand(machine: Machine, tiny_job: Path) -> None:
    hub, url = machine.start_hub()
    recipe = write_recipe(
        tiny_job, "by-hand", check={}, samples=["Who wrote this?", "Where do fish live?"], sample_tokens=8
    )
    workers = [machine.start(name, "serve-gpu", "--hub", url, "--threads", "1") for name in ("ada", "bob")]
    for worker in workers:  # both ask for work before there is any, so that each gets some
        worker.wait_for(lambda event: event["event"] == "serving")

    submitted = machine.run("owner", "submit", str(recipe), "--yes", hub=url)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    assert job.startswith("0x")
    assert len(job) == 66

    for worker in workers:
        worker.wait_for(lambda event: event["event"] == "accepted")
    shown = machine.answer("owner", "jobs", "show", "@last", hub=url)
    while shown["state"] != "settled" or any(row["loss"] is None for row in shown["evaluations"]):
        shown = machine.answer("owner", "jobs", "show", job[:10], hub=url)
    for worker in workers:
        assert worker.stop() == 143

    assert [row["state"] for row in shown["rounds_done"]] == ["merged", "merged"]
    assert [len(row["samples"]) for row in shown["evaluations"]] == [2, 2, 2]
    text = machine.run("owner", "jobs", "show", "@last", hub=url).stdout.splitlines()
    at = text.index("samples after round 2")
    assert [text[at + 1], text[at + 3]] == ["  > Who wrote this?", "  > Where do fish live?"]
    assert machine.run("owner", "jobs", "ls", hub=url).stdout.startswith(job[:12])
    pulled = machine.run("owner", "pull", "by-hand", "-o", "adapter", hub=url)
    assert pulled.stdout.strip() == "adapter"
    assert {path.name for path in (machine.root / "owner" / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "trainchain.json",
    }

    told = json.loads((machine.root / "owner" / "adapter" / "trainchain.json").read_text(encoding="utf-8"))
    assert [sample["answer"] for sample in told["samples"]] == shown["rounds_done"][1]["samples"]

    total = 0
    for name in ("ada", "bob"):
        looked = machine.answer(name, "claim", "--dry-run", hub=url)
        claimed = machine.answer(name, "claim", hub=url)
        again = machine.answer(name, "claim", hub=url)
        assert int(looked["claims"][0]["claimable"]) == int(claimed["claimed"]) > 0
        assert int(again["claimed"]) == 0
        assert claimed["balance"] == again["balance"] == claimed["claimed"]
        total += int(claimed["claimed"])
    money = machine.answer("owner", "jobs", "show", job, hub=url)["money"]
    assert int(money["claimed"]) == total
    assert int(money["claimed"]) + int(money["claimable"]) + int(money["refundable"]) == 10**18

    early = machine.run("owner", "jobs", "reclaim", job, "--json", hub=url)
    assert early.returncode == 8
    assert json.loads(early.stdout)["error"]["code"] == "money.too_early"
    chains = [path for path in machine.root.rglob("*.sqlite") if "chain" in path.parts]
    assert [path.relative_to(machine.root).parts[0] for path in chains] == ["operator"]
    loaded = Path(f"/proc/{hub.process.pid}/maps").read_text(encoding="utf-8")
    assert "libtorch" not in loaded
    assert [row["round"] for row in shown["evaluations"]] == [0, 1, 2]
    assert hub.stop() == 143
