"""A hub that is gone for ever costs its workers what was vesting, and no more. Real processes, a chain by URL."""

import csv
import io
import json
import shutil
import threading
from pathlib import Path
from typing import Any

from tests.e2e.conftest import Machine, write_recipe
from trainchain.chain import escrow, wallet
from trainchain.chain.devnet.node import Devnet
from trainchain.core import money
from trainchain.core.rewards import VESTING

COIN = 10**18
SHARDS = 12
"""More than vest late: the first three of them are due at once."""


def receipts(home: Path, job: str) -> list[dict[str, Any]]:
    found = [json.loads(path.read_bytes()) for path in (home / "receipts" / job).glob("*.json")]
    return sorted(found, key=lambda receipt: receipt["place"])


def test_a_hub_that_dies_for_ever_costs_at_most_the_vesting_pay(machine: Machine, tiny_job: Path) -> None:
    node = machine.start("node-operator", "devnet", "--port", "0")
    rpc = node.wait_for(lambda event: event["event"] == "ready")["url"]
    devnet = Devnet(machine.root / "node-operator" / "home" / "chain" / "devnet.sqlite")
    faucet = devnet.faucet()
    devnet.close()
    chain = escrow.connect(rpc)

    def give_gas(person: str, file: str = "wallet.json") -> str:
        address = wallet.load_or_create(machine.root / person / "home" / file).address
        chain.transfer_gas(faucet, address, COIN)
        return address

    give_gas("owner"), give_gas("operator", "hub-wallet.json")
    made = machine.answer("owner", "chain", "deploy", "--rpc", rpc)
    chain.escrow = made["escrow"]
    flags = ["--chain", rpc, "--escrow", made["escrow"], "--token", made["token"], "--no-evaluate"]
    hub = machine.start("operator", "serve-hub", "--listen", "127.0.0.1:0", *flags)
    url = hub.wait_for(lambda event: event["event"] == "ready")["url"]
    home = machine.root / "ada" / "home"

    # One job ends, and is settled; its worker copies the leaves file without being asked.
    done = write_recipe(tiny_job, "settled", rounds=1, shards=2, steps=1)
    settled = machine.answer("owner", "submit", str(done), "--yes", hub=url)["job"]
    ada = machine.start("ada", "serve-gpu", "--hub", url, "--threads", "1", "--job", settled)
    pause = threading.Event()
    while not list((home / "leaves" / settled).glob("*.json")):
        assert ada.process.poll() is None, ada.log.read_text(encoding="utf-8")
        pause.wait(0.2)
    ada.stop()
    # Of another one some pay has vested, and no settlement has come when the hub dies.
    more = write_recipe(tiny_job, "unsettled", rounds=2, shards=SHARDS + 2, steps=1)
    job = machine.answer("owner", "submit", str(more), "--yes", hub=url)["job"]
    flags = ["--hub", url, "--threads", "1", "--job", job, "--shards", str(SHARDS)]
    working = machine.start("ada", "serve-gpu", *flags)
    assert working.process.wait(120) == 0, working.log.read_text(encoding="utf-8")
    hub.kill()
    shutil.rmtree(machine.root / "operator")

    first, second = receipts(home, settled), receipts(home, job)
    assert [receipt["place"] for receipt in second] == list(range(1, SHARDS + 1))
    amounts = [int(receipt["amount"]) for receipt in second]
    whole, vested = sum(int(receipt["amount"]) for receipt in first), sum(amounts[:-VESTING])
    assert chain.job(job).settled == 0 < vested
    address = give_gas("ada")

    dry = machine.answer("ada", "claim", "--dry-run")
    assert (int(dry["claimable"]), int(dry["claimed"]), dry["failed"]) == (whole + vested, 0, [])
    assert dry["costs"][0]["gas"] > 0
    claimed = machine.answer("ada", "claim")
    assert {row["job"]: (row["kind"], int(row["claimed"])) for row in claimed["claims"]} == {
        settled: ("leaf", whole),
        job: ("voucher", vested),
    }
    assert chain.token_balance(made["token"], address) == whole + vested == int(claimed["balance"])
    again = machine.answer("ada", "claim")
    assert (again["claimed"], again["claimable"], again["failed"]) == ("0", "0", [])
    told = machine.answer("ada", "earnings")
    assert {name: int(amount) for name, amount in told["total"].items()} == {
        "accepted": whole + sum(amounts),
        "forfeited": 0,
        "held": 0,
        "vesting": sum(amounts[-VESTING:]),
        "settling": 0,
        "claimable": 0,
        "claimed": whole + vested,
    }
    assert {row["reason"] for row in told["shards"] if row["place"] == 4 and row["job"] == job} == {
        "vests after 1 more accepted shard, or when the job ends; by what lies on this disk: the hub does not answer"
    }
    table = list(csv.DictReader(io.StringIO(machine.run("ada", "earnings", "--csv").stdout)))
    assert [sum(money.parse(row[part]) for row in table) for part in ("accepted", "claimed")] == [
        whole + sum(amounts),
        whole + vested,
    ]
    screen = machine.run("ada", "earnings", "--by", "day").stdout.splitlines()
    assert screen[-1].startswith("total accepted ") or screen[-2].startswith("total accepted ")
    assert max(map(len, screen)) <= 80
    mistyped = machine.run("ada", "claim", "--to", address[:-1] + "x")
    assert (mistyped.returncode, mistyped.stdout) == (2, "")
