"""`chain deploy`: the same addresses however often, and at once; the wrong key, chain or URL is one clear message."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fixtures_chain import COIN
from tests.fixtures_command import Desk
from tests.fixtures_rpc import Refusal, before, devnet_over_http
from trainchain.chain import wallet as wallets
from trainchain.chain.devnet.node import Devnet
from trainchain.chain.escrow import _place, connect
from trainchain.chain.hexes import checksum, keccak, to_hex
from trainchain.cli.bridge import open_hub_chain
from trainchain.core.errors import TrainChainError

SECRET = "a1b2c3-secret-key"


@pytest.fixture
def proxy(tmp_path):
    node = Devnet(tmp_path / "chain" / "x.sqlite")
    with devnet_over_http(node) as url, before(url) as proxy:
        proxy.node = node
        yield proxy
    node.close()


@pytest.fixture
def desk(tmp_path, proxy):
    desk = Desk(tmp_path)
    address = wallets.create(desk.home / "wallet.json").address
    connect(proxy.url, retries=0).transfer_gas(proxy.node.faucet(), address, 100 * COIN)
    return desk


def test_two_at_once_and_one_later_agree(desk, proxy):
    with ThreadPoolExecutor(2) as both:
        first, second = both.map(lambda _: desk.answer("chain", "deploy", "--rpc", proxy.url), range(2))
    assert first == second == desk.answer("chain", "deploy", "--rpc", proxy.url)
    assert set(first) == {"ok", "chain_id", "token", "escrow"}
    client = connect(proxy.url, escrow=first["escrow"], retries=0)
    client.check_code()
    assert client.chain_id == first["chain_id"] == proxy.node.chain_id
    with ThreadPoolExecutor(2) as both:
        one, other = both.map(lambda _: desk.answer("chain", "deploy", "--rpc", "embedded:new"), range(2))
    assert one == other == desk.answer("chain", "deploy", "--rpc", "embedded:new")
    assert one["chain_id"] != first["chain_id"]


def test_a_hub_of_that_home_finds_escrow_and_token_by_itself(desk, proxy):
    made = desk.answer("chain", "deploy", "--rpc", proxy.url)
    hub = wallets.create(desk.home / "hub-wallet.json")

    for escrow, token in ((None, None), (made["escrow"], None), (made["escrow"].lower(), None)):
        chain = open_hub_chain(proxy.url, escrow, token, None, desk.home, hub)
        assert (chain.escrow.lower(), chain.token) == (made["escrow"].lower(), made["token"])
    other = "0x" + "77" * 20
    for escrow, home in (
        (other, desk.home),
        (None, desk.home / "elsewhere"),
        (made["escrow"], desk.home / "elsewhere"),
    ):
        with pytest.raises(TrainChainError) as caught:
            open_hub_chain(proxy.url, escrow, None, None, home, hub)
        assert caught.value.code == "usage.flag"


def test_a_wallet_that_has_sent_much_finds_what_it_deployed_late(desk, proxy):
    wallet = wallets.open(desk.home / "wallet.json")
    client = connect(proxy.url, retries=0)
    for _ in range(40):
        client.transfer_gas(wallet, wallet.address, 1)
    first = desk.answer("chain", "deploy", "--rpc", proxy.url)
    assert first["token"]
    assert first["escrow"]
    assert desk.answer("chain", "deploy", "--rpc", proxy.url) == first


def test_the_place_of_a_contract_is_the_one_that_others_compute():
    from eth_utils import to_canonical_address
    from rlp import encode

    deployer = "0x" + "5a" * 20
    for nonce in (0, 1, 127, 128, 255, 256, 65_535, 65_536, 10**9):
        made = keccak(encode([to_canonical_address(deployer), nonce]))[12:]
        assert _place(deployer, nonce) == checksum(to_hex(made))


def test_an_answer_that_is_lost_deploys_nothing_twice(desk, proxy):
    proxy.dies_with("eth_sendRawTransaction", forwarded=True)
    desk.run("chain", "deploy", "--rpc", proxy.url, "--json").failed_as("chain.timeout", 3)
    proxy.heal()
    made = desk.answer("chain", "deploy", "--rpc", proxy.url)
    wallet = wallets.open(desk.home / "wallet.json")
    assert connect(proxy.url, retries=0).w3.eth.get_transaction_count(wallet.address) == 2
    assert desk.answer("chain", "deploy", "--rpc", proxy.url) == made


def test_a_faucet_s_key_deploys_nowhere_else(tmp_path, proxy):
    desk = Desk(tmp_path / "thief")
    desk.folder.mkdir()
    other = Devnet(desk.home / "chain" / "y.sqlite")
    (desk.home / "wallet.json").write_bytes((desk.home / "chain" / "y.faucet.json").read_bytes())
    connect(proxy.url, retries=0).transfer_gas(proxy.node.faucet(), other.faucet().address, 100 * COIN)
    head = proxy.node.head()
    problem = desk.run("chain", "deploy", "--rpc", proxy.url, "--json").failed_as("chain.foreign_key", 7)
    assert str(other.chain_id) in problem["message"]
    assert proxy.node.head() == head
    other.close()


def test_no_part_of_the_url_that_may_be_a_key_is_said(desk, proxy):
    def quoting(request, really):
        raise Refusal(f"no such project: {SECRET}")

    url = proxy.url.replace("http://", f"http://me:{SECRET}@") + f"/v3/{SECRET}?key={SECRET}"
    shown = [desk.run("chain", "deploy", "--rpc", url, "--json").said]
    for method in ("eth_chainId", "eth_estimateGas", "eth_getCode", "eth_sendRawTransaction"):
        proxy.tricks[method] = quoting
        done = desk.run("chain", "deploy", "--rpc", url, "--json")
        shown.append(done.said)
    proxy.die()
    shown += [
        desk.run("chain", "deploy", "--rpc", url).said,
        desk.run("chain", "deploy", "--rpc", f"ws://h/{SECRET}").said,
    ]
    assert SECRET not in "\n".join(shown)
    assert "error[" in shown[-1]


def test_a_url_with_a_key_in_it_is_not_in_a_hint_either(tmp_path):
    desk = Desk(tmp_path)
    node = Devnet(tmp_path / "z.sqlite")
    with devnet_over_http(node) as behind, before(behind) as proxy:
        done = desk.run("serve-hub", "--listen", "127.0.0.1:0", "--chain", f"{proxy.url}/{SECRET}", "--json")
    node.close()
    assert done.code == 2
    assert SECRET not in done.said


def test_a_devnet_says_one_line_and_its_ids_are_its_own(tmp_path):
    ids = set()
    for name in ("one", "two"):
        desk = Desk(tmp_path)
        command = [*desk.command, "devnet", "--name", name, "--port", "0", "--json"]
        with subprocess.Popen(command, env=desk.environment(), stdout=subprocess.PIPE, text=True) as process:
            ready = json.loads(process.stdout.readline())
            ids.add(ready["chain_id"])
            assert connect(ready["url"], retries=0).chain_id == ready["chain_id"]
            process.terminate()
    assert len(ids) == 2
