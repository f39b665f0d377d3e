"""Between a transaction's signing and its receipt much can go wrong; none of it may pay twice or pretend."""

import pytest

from tests.fixtures_chain import COIN, World
from trainchain.chain.devnet import faucet
from trainchain.chain.devnet.node import Devnet
from trainchain.chain.escrow import ChainClient
from trainchain.chain.provider import EmbeddedProvider
from trainchain.chain.wallet import Wallet
from trainchain.core.errors import TrainChainError

HEAP = Wallet(b"\x77" * 32).address


class Flaky(EmbeddedProvider):
    """A chain whose answers to some methods are replaced."""

    def __init__(self, node):
        super().__init__(node)
        self.tricks = {}

    def make_request(self, method, params):
        trick = self.tricks.get(method)
        return trick(params) if trick else super().make_request(method, params)

    def really(self, method, params):
        return super().make_request(method, params)


@pytest.fixture
def flaky(tmp_path):
    provider = Flaky(Devnet(tmp_path / "x.sqlite"))
    naps = []
    client = ChainClient(provider, patience=5.0, sleep=naps.append)
    client.naps = naps
    yield client, provider
    client.close()


def lost(provider, *, arrives):
    def trick(params):
        if arrives:
            provider.really("eth_sendRawTransaction", params)
        raise TrainChainError("chain.unreachable", "The line went dead.")

    return trick


@pytest.mark.parametrize("arrives", [True, False])
def test_an_answer_that_is_lost_may_mean_either(flaky, arrives):
    client, provider = flaky
    provider.tricks["eth_sendRawTransaction"] = lost(provider, arrives=arrives)
    with pytest.raises(TrainChainError) as caught:
        client.transfer_gas(client.faucet(), HEAP, 5)
    assert (caught.value.code, caught.value.exit_code) == ("chain.timeout", 3)
    assert caught.value.facts["tx"] in caught.value.message
    assert client.gas_balance(HEAP) == (5 if arrives else 0)


def test_a_transaction_that_no_block_takes_is_told_as_such(flaky):
    client, provider = flaky
    provider.tricks["eth_getTransactionReceipt"] = lambda params: {"jsonrpc": "2.0", "id": 1, "result": None}
    with pytest.raises(TrainChainError) as caught:
        client.transfer_gas(client.faucet(), HEAP, 5)
    assert caught.value.code == "chain.timeout"
    assert client.naps[0] == 0.05
    assert 5.0 <= sum(client.naps) < 8


@pytest.mark.parametrize("again", [False, True])
def test_a_node_that_answers_slowly_costs_no_more_patience_than_one_that_does_not(tmp_path, again):
    provider, time = Flaky(Devnet(tmp_path / "x.sqlite")), [0.0]
    client = ChainClient(provider, patience=120.0, sleep=lambda _: None, clock=lambda: time[0])
    asked = []

    def slowly(params):
        asked.append(params)
        time[0] += 50.0
        return {"jsonrpc": "2.0", "id": 1, "result": None}

    if again:
        provider.tricks["eth_sendRawTransaction"] = lost(provider, arrives=False)
        with pytest.raises(TrainChainError):
            client.transfer_gas(client.faucet(), HEAP, 5)
        taken = {"jsonrpc": "2.0", "id": 1, "result": "0x" + "11" * 32}
        provider.tricks["eth_sendRawTransaction"] = lambda params: taken
    provider.tricks["eth_getTransactionReceipt"] = slowly
    with pytest.raises(TrainChainError) as caught:
        client.transfer_gas(client.faucet(), HEAP, 5)
    assert (caught.value.code, len(asked)) == ("chain.timeout", 3)
    client.close()


def test_a_node_that_already_knows_it_is_taken_at_its_word(flaky):
    client, provider = flaky

    def known(params):
        provider.really("eth_sendRawTransaction", params)
        return {"jsonrpc": "2.0", "id": 1, "error": {"code": -32000, "message": "already known"}}

    provider.tricks["eth_sendRawTransaction"] = known
    client.transfer_gas(client.faucet(), HEAP, 5)
    assert client.gas_balance(HEAP) == 5


def test_a_nonce_that_another_process_took_is_drawn_again(flaky):
    client, provider = flaky
    stale = iter(["0x0", "0x0"])
    client.transfer_gas(client.faucet(), HEAP, 1)

    def nonce(params):
        result = next(stale, None)
        if result is None:
            return provider.really("eth_getTransactionCount", params)
        return {"jsonrpc": "2.0", "id": 1, "result": result}

    provider.tricks["eth_getTransactionCount"] = nonce
    client.transfer_gas(client.faucet(), HEAP, 1)
    assert client.gas_balance(HEAP) == 2
    assert client.naps == [0.05, 0.1]


def test_a_transaction_that_fails_in_its_block_gives_the_reason(flaky):
    client, provider = flaky
    world = World(client, client.faucet(), client.node)
    job_id = world.job()
    # Between the estimate and the block, the owner halts the job.
    answer = {"jsonrpc": "2.0", "id": 1, "result": hex(200_000)}

    def estimate(params):
        provider.tricks.clear()
        client.halt(world.owner, job_id)
        return answer

    provider.tricks["eth_estimateGas"] = estimate
    with pytest.raises(TrainChainError, match="JobHalted") as caught:
        world.settle(job_id, 1, {world.anna: 1})
    assert caught.value.code == "chain.reverted"


def test_a_log_too_long_for_the_node_is_asked_for_in_parts(flaky):
    client, provider = flaky
    world = World(client, client.faucet(), client.node)
    job_id = world.job()
    for round in (1, 2, 3):
        world.settle(job_id, round, {world.anna: round})
    asked = []

    def few(params):
        first, last = (int(params[0][key], 16) for key in ("fromBlock", "toBlock"))
        asked.append((first, last))
        if last - first > 1500:
            return {"jsonrpc": "2.0", "id": 1, "error": {"code": -32005, "message": "range too large"}}
        return provider.really("eth_getLogs", params)

    provider.tricks["eth_getLogs"] = few
    provider.tricks["eth_blockNumber"] = lambda params: {"jsonrpc": "2.0", "id": 1, "result": hex(5000)}
    assert [one.round for one in client.settlements(job_id)] == [1, 2, 3]
    assert len(asked) == 7


def test_the_faucet_gives_both_and_only_on_an_embedded_chain(flaky):
    client, _ = flaky
    made = client.deploy(client.faucet())
    sent = faucet.drip(client, client.faucet(), HEAP, COIN, 7)
    assert len(sent) == 2
    assert (client.gas_balance(HEAP), client.token_balance(made.token, HEAP)) == (COIN, 7)
    assert faucet.drip(client, client.faucet(), HEAP, 0, 0) == []
    client.node, node = None, client.node
    with pytest.raises(TrainChainError) as caught:
        faucet.drip(client, node.faucet(), HEAP, 1, 1)
    assert caught.value.code == "faucet.closed"
    client.node = node
