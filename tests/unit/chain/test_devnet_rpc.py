import json
import threading
import urllib.error
import urllib.request

import pytest

from trainchain.chain.devnet.node import Devnet
from trainchain.chain.devnet.rpc import MAX_BATCH, METHODS, Rpc
from trainchain.chain.devnet.server import make_server
from trainchain.chain.wallet import Wallet

SOMEONE = "0x" + "11" * 20


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    made = Devnet(tmp_path_factory.mktemp("chain") / "x.sqlite", clock=lambda: 1_000_000.0, chain_id=4242)
    faucet = made.faucet()
    for nonce in range(3):
        fields = {"nonce": nonce, "to": SOMEONE, "value": 5, "gas": 21_000, "gasPrice": 10**10, "chainId": 4242}
        made.send(faucet.sign_transaction(fields))
    yield made
    made.close()


@pytest.fixture
def ask(node):
    rpc = Rpc(node)

    def one(method, *params):
        return rpc.handle({"jsonrpc": "2.0", "id": 7, "method": method, "params": list(params)})

    return one


def error(answer):
    assert "result" not in answer
    return answer["error"]["code"]


def test_the_public_door_has_these_methods_and_no_other(ask):
    assert len(METHODS) == 21
    for method in ("evm_mine", "evm_increaseTime", "eth_sendTransaction", "personal_sign", "debug_traceCall",
                   "eth_sign", "anvil_setBalance", "admin_peers", "advance", "__init__", ""):  # fmt: skip
        assert error(ask(method)) == -32601
    assert not any(method.startswith(("evm_", "debug_", "personal_", "admin_")) for method in METHODS)


def test_what_web3_and_wallets_ask_first(ask, node):
    faucet = node.faucet().address
    assert ask("eth_chainId")["result"] == hex(4242)
    assert ask("net_version")["result"] == "4242"
    assert ask("eth_blockNumber")["result"] == "0x3"
    assert ask("eth_getBalance", SOMEONE, "latest")["result"] == "0xf"
    assert ask("eth_getBalance", SOMEONE, "0x1")["result"] == "0x5"
    assert ask("eth_getBalance", SOMEONE)["result"] == "0xf"
    assert ask("eth_getTransactionCount", faucet, "pending")["result"] == "0x3"
    assert ask("eth_getCode", SOMEONE, "latest")["result"] == "0x"
    assert ask("eth_getStorageAt", SOMEONE, "0x0", "latest")["result"] == "0x" + "00" * 32
    assert ask("eth_getBlockByNumber", "0x63", False)["result"] is None
    block = ask("eth_getBlockByNumber", "earliest", False)["result"]
    assert (block["number"], block["transactions"]) == ("0x0", [])
    block = ask("eth_getBlockByNumber", "latest", True)["result"]
    assert ask("eth_getBlockByHash", block["hash"], True)["result"] == block
    tx = block["transactions"][0]
    assert ask("eth_getTransactionByHash", tx["hash"])["result"] == tx
    receipt = ask("eth_getTransactionReceipt", tx["hash"])["result"]
    assert (receipt["status"], receipt["gasUsed"], receipt["blockHash"]) == ("0x1", "0x5208", block["hash"])
    assert ask("eth_getTransactionReceipt", "0x" + "00" * 32)["result"] is None
    history = ask("eth_feeHistory", "0x2", "latest", [10, 50])["result"]
    assert (len(history["baseFeePerGas"]), len(history["reward"])) == (3, 2)
    assert ask("eth_getLogs", {"fromBlock": "0x0"})["result"] == []


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("eth_getBalance", []),
        ("eth_getBalance", ["0x12"]),
        ("eth_getBalance", [None]),
        ("eth_getBalance", [SOMEONE, "0x-1"]),
        ("eth_getBalance", [SOMEONE, {"a": 1}]),
        ("eth_getBlockByNumber", ["0x" + "f" * 80, False]),
        ("eth_getBlockByHash", ["0x12"]),
        ("eth_sendRawTransaction", ["zz"]),
        ("eth_sendRawTransaction", [[]]),
        ("eth_call", ["hello"]),
        ("eth_call", [{"to": SOMEONE, "value": "0x" + "f" * 80}]),
        ("eth_getLogs", [{"topics": "x"}]),
        ("eth_getLogs", [{"address": [SOMEONE] * 101}]),
        ("eth_getStorageAt", [SOMEONE, "x"]),
        ("eth_feeHistory", ["x", "latest", []]),
    ],
)
def test_bad_parameters_are_an_error_answer(ask, method, params):
    assert error(ask(method, *params)) in (-32602, -32000)


@pytest.mark.parametrize("request_", [5, "x", None, {}, {"method": 5}, {"method": "eth_chainId", "params": {}}])
def test_what_is_no_request_is_an_error_answer(node, request_):
    assert error(Rpc(node).handle(request_)) in (-32600, -32602)


def test_batches_are_answered_in_order_up_to_a_size(node):
    one = {"jsonrpc": "2.0", "id": "a", "method": "eth_chainId"}
    answers = Rpc(node).handle([one, {"id": 2, "method": "nope"}, 3])
    assert [answer["id"] for answer in answers] == ["a", 2, None]
    assert error(Rpc(node).handle([one] * (MAX_BATCH + 1))) == -32600
    assert error(Rpc(node).handle([])) == -32600


def test_a_range_of_logs_has_an_end(ask):
    assert error(ask("eth_getLogs", {"fromBlock": "0x0", "toBlock": "0x186a0"})) == -32005
    assert ask("eth_getLogs", {"fromBlock": "0x0", "toBlock": "0x1869f"})["result"] == []


def test_a_call_that_never_ends_is_cut_off(ask):
    forever = "0x5b600056"  # JUMPDEST, PUSH1 0, JUMP
    assert error(ask("eth_call", {"data": forever, "gas": "0x100000"})) == -32000


def test_a_contract_that_calls_itself_deeper_than_python_may_harms_nobody(ask, node):
    # As init code: copy this code to memory and CREATE it again, and so on, until the gas is gone.
    itself = "0x3860006000393860006000f0"
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask("eth_call", {"data": itself})))
    thread.start()
    thread.join()
    assert "result" in answers[0] or error(answers[0]) == -32000
    assert ask("eth_blockNumber")["result"] == "0x3"


def test_a_revert_carries_its_data(ask):
    # PUSH1 5, PUSH1 0, MSTORE, PUSH1 32, PUSH1 0, REVERT
    answer = ask("eth_call", {"data": "0x600560005260206000fd"})
    assert answer["error"] == {"code": 3, "message": "execution reverted", "data": "0x" + "00" * 31 + "05"}


@pytest.fixture
def served(node):
    server = make_server(node)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    host, port = server.server_address
    assert host == "127.0.0.1"
    yield f"http://127.0.0.1:{port}"
    server.shutdown()
    thread.join()
    server.server_close()


def post(url, body, kind="application/json"):
    request = urllib.request.Request(url, data=body, headers={"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as problem:
        with problem:
            return problem.code, json.loads(problem.read())


def test_the_server_answers_json_and_little_else(served):
    body = json.dumps({"id": 1, "method": "eth_chainId"}).encode()
    assert post(served, body)[1]["result"] == hex(4242)
    assert post(served, b"not json")[1]["error"]["code"] == -32700
    assert post(served, b"[" * 100_000)[1]["error"]["code"] == -32700
    assert post(served, body, "text/plain")[0] == 415
    assert post(served, b"x" * (256 * 1024 + 1))[0] == 413


def test_a_strangers_transaction_may_not_burn_a_whole_block(ask, node):
    fields = {"nonce": 3, "to": SOMEONE, "value": 0, "gas": 8_000_001, "gasPrice": 10**10, "chainId": 4242}
    raw = node.faucet().sign_transaction(fields)
    assert "gas limit too high" in ask("eth_sendRawTransaction", "0x" + raw.hex())["error"]["message"]


def test_a_stranger_cannot_send_without_money(ask):
    fields = {"nonce": 0, "to": SOMEONE, "value": 0, "gas": 21_000, "gasPrice": 10**10, "chainId": 4242}
    raw = Wallet(b"\x09" * 32).sign_transaction(fields)
    assert "insufficient funds" in ask("eth_sendRawTransaction", "0x" + raw.hex())["error"]["message"]
