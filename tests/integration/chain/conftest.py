"""Chains to test on: a file in this process, a file behind another process's HTTP, a node that is not ours."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures_chain import ANVIL_KEY, SERVER, Refusals, World, anvil, no_sleep, running
from trainchain.chain.devnet.node import Devnet
from trainchain.chain.escrow import ChainClient, connect
from trainchain.chain.provider import EmbeddedProvider
from trainchain.chain.wallet import Wallet

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def refused() -> Refusals:
    return Refusals()


@pytest.fixture(scope="module", params=["embedded", "anvil"])
def still(request, tmp_path_factory) -> Iterator[tuple[ChainClient, Wallet, Devnet | None]]:
    """A chain whose time stands still, here and at a node that is not ours."""
    if request.param == "anvil":
        with anvil() as client:
            yield client, Wallet(ANVIL_KEY), None
        return
    node = Devnet(tmp_path_factory.mktemp("chain") / "x.sqlite", clock=lambda: 1_800_000_000.0)
    client = ChainClient(EmbeddedProvider(node), sleep=no_sleep)
    yield client, node.faucet(), node
    client.close()


@pytest.fixture
def world(still) -> World:
    return World(*still)


@pytest.fixture(scope="module", params=["embedded", "http", "anvil"])
def backend(request, tmp_path_factory) -> Iterator[tuple[ChainClient, Wallet, Devnet | None]]:
    """The same chain client over a file, over HTTP to another process, and against a node that is not ours."""
    home = tmp_path_factory.mktemp("home")
    if request.param == "anvil":
        with anvil() as client:
            yield client, Wallet(ANVIL_KEY), None
        return
    file = home / "chain" / "x.sqlite"
    node = Devnet(file)
    if request.param == "embedded":
        client = connect("embedded:x", home=home)
        yield client, node.faucet(), node
        client.close()
    else:
        with running([sys.executable, "-c", SERVER, str(file)]) as process:
            port = int(process.stdout.readline())
            client = connect(f"http://127.0.0.1:{port}/", timeout=20, retries=3)
            yield client, node.faucet(), node
            client.close()
    node.close()


@pytest.fixture(scope="session")
def odd_token() -> dict:
    return json.loads((GOLDEN / "odd_token.json").read_text(encoding="utf-8"))
