"""A chain by URL: the same contracts and the same code, with gas that nobody gives away."""

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Machine, write_recipe
from trainchain.chain import escrow, wallet
from trainchain.chain.devnet.node import Devnet

COIN = 10**18


@pytest.mark.long
def test_the_whole_journey_on_a_chain_by_url(machine: Machine, tiny_job: Path) -> None:
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

    give_gas("deployer")
    made = machine.answer("deployer", "chain", "deploy", "--rpc", rpc)
    assert machine.answer("deployer", "chain", "deploy", "--rpc", rpc) == made
    give_gas("operator", "hub-wallet.json")
    chain_flags = ["--chain", rpc, "--escrow", made["escrow"], "--token", made["token"]]
    hub = machine.start("operator", "serve-hub", "--listen", "127.0.0.1:0", *chain_flags)
    url = hub.wait_for(lambda event: event["event"] == "ready")["url"]
    recipe = write_recipe(tiny_job, "other-chain", rounds=1)

    poor = machine.run("owner", "submit", str(recipe), "--yes", "--json", hub=url)
    assert (poor.returncode, json.loads(poor.stdout)["error"]["code"]) == (6, "money.insufficient")
    owner = give_gas("owner")
    chain.escrow = made["escrow"]
    deployer = wallet.open(machine.root / "deployer" / "home" / "wallet.json")
    chain.transfer_token(deployer, made["token"], owner, COIN)
    job = machine.answer("owner", "submit", str(recipe), "--yes", hub=url)["job"]
    ada = machine.start("ada", "serve-gpu", "--hub", url, "--threads", "1", "--shards", "2")
    ada.wait_for(lambda event: event["event"] == "accepted")
    while machine.answer("owner", "jobs", "show", job, hub=url)["state"] != "settled":
        pass

    dry = machine.run("ada", "claim", "--json", hub=url)
    assert (dry.returncode, json.loads(dry.stdout)["error"]["code"]) == (6, "money.insufficient")
    ada_address = give_gas("ada")
    claimed = machine.answer("ada", "claim", hub=url)
    assert int(claimed["claimed"]) == chain.token_balance(made["token"], ada_address) > 0
    money = machine.answer("owner", "jobs", "show", job, hub=url)["money"]
    assert int(money["claimed"]) + int(money["claimable"]) + int(money["refundable"]) == COIN

    node.stop()
    away = machine.run("ada", "claim", "--json", hub=url)
    assert (away.returncode, json.loads(away.stdout)["error"]["code"]) == (3, "chain.unreachable")
