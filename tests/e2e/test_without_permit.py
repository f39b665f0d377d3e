"""A job paid in a token that knows no permit: `submit` approves and pays, and pays once though the chain hangs up."""

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Machine, write_recipe
from tests.fixtures_rpc import before, devnet_over_http
from trainchain.chain import escrow, wallet
from trainchain.chain.devnet.node import Devnet

COIN = 10**18
ODD = Path(__file__).parents[1] / "golden" / "odd_token.json"


@pytest.mark.long
def test_a_budget_in_a_token_without_permit_is_paid_once(machine: Machine, tiny_job: Path) -> None:
    odd = json.loads(ODD.read_text(encoding="utf-8"))
    node = Devnet(machine.root / "chain" / "x.sqlite")
    with devnet_over_http(node) as url, before(url) as proxy:
        chain = escrow.connect(url)
        made = chain.deploy(node.faucet())
        for person, file in (("operator", "hub-wallet.json"), ("owner", "wallet.json")):
            address = wallet.load_or_create(machine.root / person / "home" / file).address
            chain.transfer_gas(node.faucet(), address, COIN)
        owner = wallet.open(machine.root / "owner" / "home" / "wallet.json")
        factory = chain.w3.eth.contract(abi=odd["abi"], bytecode=odd["bytecode"])
        token = chain._sender.send(owner, factory.constructor(COIN))["contractAddress"]
        flags = ["--chain", proxy.url, "--escrow", made.escrow, "--token", token]
        hub = machine.start("operator", "serve-hub", "--listen", "127.0.0.1:0", *flags)
        hub_url = hub.wait_for(lambda event: event["event"] == "ready")["url"]
        recipe = str(write_recipe(tiny_job, "permitless", rounds=1))

        # The chain dies with the second transaction: the approval is done, the job's own is on its way.
        sent: list[str] = []

        def second(request: dict, really) -> object:
            sent.append(request["params"][0])
            if len(sent) == 2:
                proxy.dies_with("eth_getTransactionReceipt", forwarded=True)
            return really()

        proxy.tricks["eth_sendRawTransaction"] = second
        died = machine.run("owner", "submit", recipe, "--yes", "--json", hub=hub_url)
        assert (died.returncode, json.loads(died.stdout)["error"]["code"]) == (3, "chain.timeout"), died.stderr
        proxy.heal()
        job = machine.answer("owner", "submit", recipe, "--yes", hub=hub_url)["job"]

        chain.escrow = made.escrow
        assert (chain.job(job).funded, chain.job(job).token) == (COIN, token)
        assert (chain.token_balance(token, owner.address), chain.allowance(token, owner.address)) == (0, 0)
        assert chain.w3.eth.get_transaction_count(owner.address) == 3  # the token's own, the approval, the job
        assert machine.run("owner", "submit", recipe, "--yes", "--json", hub=hub_url).returncode == 6
        assert chain.job(job).funded == COIN
    node.close()
