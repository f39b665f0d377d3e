"""A chain's RPC that lies, is slow, or dies in mid-transaction: one clear message each, and nothing is paid twice."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.fixtures_chain import ANVIL_KEY, COIN, World, anvil
from tests.fixtures_rpc import HANG_UP, Refusal, before, devnet_over_http
from trainchain.chain import wallet as wallets
from trainchain.chain.devnet.node import Devnet
from trainchain.chain.escrow import connect
from trainchain.chain.journal import Journal, Sent
from trainchain.chain.wallet import Wallet
from trainchain.core.errors import TrainChainError

HEAP = Wallet(b"\x55" * 32).address
SEND, RECEIPT, COUNT = "eth_sendRawTransaction", "eth_getTransactionReceipt", "eth_getTransactionCount"


@pytest.fixture(params=["devnet", "anvil"])
def line(request, tmp_path):
    """A proxy before a real chain, a wallet in a file with coin on that chain, and the way to open a client."""
    if request.param == "anvil":
        with anvil() as behind, before(behind._provider._url) as proxy:
            yield Line(proxy, tmp_path, Wallet(ANVIL_KEY))
        return
    node = Devnet(tmp_path / "chain" / "x.sqlite")
    with devnet_over_http(node) as url, before(url) as proxy:
        yield Line(proxy, tmp_path, node.faucet())
    node.close()


class Line:
    def __init__(self, proxy, folder, rich):
        self.proxy, self.folder, self.rich = proxy, folder, rich
        self.naps, self.clients = [], []
        self.path = folder / "home" / "wallet.json"
        self.wallet = wallets.create(self.path)
        self.open().transfer_gas(rich, self.wallet.address, 10 * COIN)

    def open(self, **changes):
        """A client as another process would have it."""
        settings = {"timeout": 20, "retries": 0, "patience": 3.0, "sleep": self.naps.append, **changes}
        return connect(self.proxy.url, **settings)

    def again(self):
        """The wallet as another process would open it."""
        return wallets.open(self.path)

    def sent(self):
        return self.open().w3.eth.get_transaction_count(self.wallet.address)

    def heap(self):
        return self.open().gas_balance(HEAP)

    def noted(self):
        return [path for path in (self.folder / "home").rglob("*") if path.suffix == ".json" and path != self.path]


def code_of(call, *args, **kwargs):
    with pytest.raises(TrainChainError) as caught:
        call(*args, **kwargs)
    return caught.value


def test_an_answer_that_is_lost_once_is_asked_for_again(line):
    def once(request, really):
        really()
        line.proxy.heal()
        return HANG_UP

    line.proxy.tricks[SEND] = once
    line.open(retries=1).transfer_gas(line.wallet, HEAP, 5)
    assert (line.heap(), line.sent(), line.noted()) == (5, 1, [])


@pytest.mark.parametrize("forwarded", [True, False])
def test_a_chain_that_dies_with_a_transaction_is_found_to_have_it(line, forwarded, caplog):
    line.proxy.dies_with(SEND, forwarded=forwarded)
    problem = code_of(line.open().transfer_gas, line.wallet, HEAP, 5)
    assert (problem.code, problem.exit_code) == ("chain.timeout", 3)
    assert problem.facts["tx"] in problem.message
    assert "Repeat the command" in problem.hint

    line.proxy.heal()
    assert line.open().transfer_gas(line.again(), HEAP, 5) == problem.facts["tx"]
    assert (line.heap(), line.sent(), line.noted()) == (5, 1, [])
    assert problem.facts["tx"] in caplog.text

    # Once it was seen to end, the same payment is another one.
    assert line.open().transfer_gas(line.again(), HEAP, 5) != problem.facts["tx"]
    assert (line.heap(), line.sent()) == (10, 2)


def test_a_chain_that_dies_before_the_receipt_is_no_reason_to_pay_twice(line):
    line.proxy.dies_with(RECEIPT, forwarded=False)
    problem = code_of(line.open().transfer_gas, line.wallet, HEAP, 5)
    assert problem.code == "chain.timeout"
    assert "Nothing was changed" not in problem.hint
    for _ in range(2):
        assert code_of(line.open, retries=0).code == "chain.unreachable"
    line.proxy.heal()
    assert line.open().transfer_gas(line.again(), HEAP, 5) == problem.facts["tx"]
    assert (line.heap(), line.sent()) == (5, 1)


def test_another_payment_in_between_loses_neither(line):
    line.proxy.dies_with(SEND, forwarded=True)
    first = code_of(line.open().transfer_gas, line.wallet, HEAP, 5)
    line.proxy.heal()
    line.open().transfer_gas(line.again(), HEAP, 7)
    assert line.open().transfer_gas(line.again(), HEAP, 5) == first.facts["tx"]
    assert (line.heap(), line.sent(), line.noted()) == (12, 2, [])


def test_a_transaction_that_the_chain_lost_is_handed_in_once_more(line):
    line.proxy.tricks[SEND] = lambda request, really: "0x" + "11" * 32  # "of course, I have it"
    first = code_of(line.open().transfer_gas, line.wallet, HEAP, 5)
    assert first.code == "chain.timeout"
    line.proxy.heal()
    assert line.open().transfer_gas(line.again(), HEAP, 5) == first.facts["tx"]
    assert (line.heap(), line.sent(), line.noted()) == (5, 1, [])


def test_one_that_has_become_too_cheap_is_signed_anew_in_its_place(line):
    raws = []

    def swallow(request, really):
        raws.append(request["params"][0])
        return "0x" + "11" * 32

    line.proxy.tricks[SEND] = swallow
    first = code_of(line.open().transfer_gas, line.wallet, HEAP, 5)

    def too_cheap(request, really):
        if request["params"][0] in raws:
            raise Refusal("max fee per gas less than block base fee")
        return really()

    line.proxy.tricks[SEND] = too_cheap
    line.proxy.tricks[COUNT] = lambda request, really: hex(int(really(), 16) + (request["params"][1] == "pending"))
    assert line.open().transfer_gas(line.again(), HEAP, 5) != first.facts["tx"]
    line.proxy.heal()
    provider = line.open().w3.provider
    assert "error" in provider.make_request(SEND, [raws[0]])  # its place is taken: it can never come
    assert (line.heap(), line.sent(), line.noted()) == (5, 1, [])


@pytest.mark.parametrize("words", ["replacement transaction underpriced", "nonce too low"])
def test_a_dearer_one_that_is_refused_takes_no_other_place(line, words):
    raws = []

    def swallow(request, really):
        raws.append(request["params"][0])
        return "0x" + "11" * 32

    line.proxy.tricks[SEND] = swallow
    first = code_of(line.open().transfer_gas, line.wallet, HEAP, 5)

    def refuse(request, really):
        raise Refusal("max fee per gas less than block base fee" if request["params"][0] in raws else words)

    line.proxy.tricks[SEND] = refuse
    line.proxy.tricks[COUNT] = lambda request, really: hex(int(really(), 16) + (request["params"][1] == "pending"))
    problem = code_of(line.open().transfer_gas, line.again(), HEAP, 5)
    assert (problem.code, problem.facts["tx"]) == ("chain.timeout", first.facts["tx"])
    assert line.proxy.asked.count(SEND) == 4  # the coin before, the first, once more, the dearer one

    line.proxy.heal()  # and only now the first one comes into its block
    assert line.open().transfer_gas(line.again(), HEAP, 5) == first.facts["tx"]
    assert (line.heap(), line.sent(), line.noted()) == (5, 1, [])


def test_a_place_that_another_program_took_is_given_up(line):
    line.proxy.tricks[SEND] = lambda request, really: "0x" + "11" * 32
    code_of(line.open().transfer_gas, line.wallet, HEAP, 5)
    line.proxy.heal()
    elsewhere = wallets.open(line.path)
    elsewhere.notes = None  # the same key in another program
    line.open().transfer_gas(elsewhere, HEAP, 100)
    line.open().transfer_gas(line.again(), HEAP, 5)
    assert (line.heap(), line.sent(), line.noted()) == (105, 2, [])


def test_funding_a_job_finishes_what_was_begun_and_pays_on_purpose_twice(line, odd_token):
    client = line.open()
    world = World(client, line.rich, None)
    world.owner = line.wallet
    made = client.deploy(line.rich)
    client.transfer_token(line.rich, made.token, line.wallet.address, 1000)
    factory = client.w3.eth.contract(abi=odd_token["abi"], bytecode=odd_token["bytecode"])
    odd = client._sender.send(line.wallet, factory.constructor(1000))["contractAddress"]
    for token in (made.token, odd):
        world.token = token
        job_id = world.job(amount=400)
        client.fund(line.wallet, job_id, 100)
        client.fund(line.wallet, job_id, 100)
        line.proxy.dies_with(RECEIPT, forwarded=True)
        problem = code_of(client.fund, line.wallet, job_id, 400)
        assert problem.code == "chain.timeout", problem.message
        line.proxy.heal()
        # A token with permit has paid: the owner holds nothing more. One without has been approved, and pays now.
        client.fund(line.again(), job_id, 400)
        assert (client.job(job_id).funded, client.token_balance(token, line.wallet.address)) == (1000, 0)
        assert line.noted() == []


def test_a_job_is_made_once_whatever_its_deadline_has_become(line):
    client = line.open()
    world = World(client, line.rich, None)
    client.transfer_token(line.rich, world.token, line.wallet.address, 1000)
    terms = world.params()
    line.proxy.dies_with(SEND, forwarded=False)
    problem = code_of(client.create_job, line.wallet, terms, 300)
    line.proxy.heal()
    later = world.params(salt=terms.salt, deadline=terms.deadline + 60)
    made = client.create_job(line.again(), later, 300)
    assert made.tx == problem.facts["tx"]
    assert client.job(made.job_id).deadline == terms.deadline
    assert client.token_balance(world.token, line.wallet.address) == 700


PAYER = """
import pathlib, sys
from trainchain.chain import wallet
from trainchain.chain.escrow import connect
client = connect(sys.argv[1], timeout=60, retries=3)
keys = wallet.open(pathlib.Path(sys.argv[2]))
for _ in range(int(sys.argv[4])):
    print(client.transfer_gas(keys, sys.argv[3], 5), flush=True)
"""


def payer(line, times=1):
    command = [sys.executable, "-c", PAYER, line.proxy.url, str(line.path), HEAP, str(times)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("forwarded", [True, False])
def test_a_process_that_is_killed_in_mid_transaction_pays_once(line, forwarded):
    processes = []

    def kill(request, really):
        if forwarded:
            really()
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        line.proxy.heal()
        return HANG_UP

    line.proxy.tricks[SEND] = kill
    processes.append(payer(line))
    assert processes[0].wait(60) == -signal.SIGKILL
    processes[0].stdout.close()
    assert len(line.noted()) == 1
    assert line.noted()[0].stat().st_mode & 0o077 == 0
    line.open().transfer_gas(line.again(), HEAP, 5)
    assert (line.heap(), line.sent(), line.noted()) == (5, 1, [])


def test_processes_with_one_key_take_turns(line):
    both = [payer(line, 4) for _ in "12"]
    said = [process.communicate(timeout=120)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len({tx for one in said for tx in one}) == 8
    assert (line.heap(), line.sent(), line.noted()) == (40, 8, [])


def test_a_key_that_is_busy_elsewhere_is_told_as_such(line):
    from filelock import FileLock

    client = line.open(patience=0.0)
    client.transfer_gas(line.wallet, HEAP, 1)
    (lock,) = (line.folder / "home").rglob("*.lock")
    with FileLock(lock):
        problem = code_of(client.transfer_gas, line.again(), HEAP, 1)
    assert (problem.code, problem.exit_code) == ("chain.timeout", 3)
    assert "Nothing was sent" in problem.hint
    assert line.sent() == 1


def test_a_chain_that_becomes_another_gets_nothing(line):
    client = line.open()
    assert client.chain_id
    line.proxy.tricks["eth_chainId"] = lambda request, really: "0x1"
    line.proxy.asked.clear()
    problem = code_of(client.transfer_gas, line.wallet, HEAP, 1)
    assert (problem.code, problem.exit_code) == ("chain.wrong", 1)
    assert f"{client.chain_id} and now for chain 1." in problem.message
    assert SEND not in line.proxy.asked
    line.proxy.heal()
    assert line.sent() == 0


def test_a_node_that_cannot_look_yet_is_asked_again(line):
    refusals = iter(["transaction indexing is in progress", "limit exceeded"])

    def not_yet(request, really):
        words = next(refusals, None)
        if words:
            raise Refusal(words)
        return really()

    line.proxy.tricks[RECEIPT] = not_yet
    line.open().transfer_gas(line.wallet, HEAP, 5)
    assert (line.heap(), line.sent(), line.noted()) == (5, 1, [])
    assert line.naps[-2:] == [0.05, 0.1]


def test_another_chain_in_between_makes_nobody_forget(line):
    client = line.open()
    token = World(client, line.rich, None).token
    client.transfer_token(line.rich, token, line.wallet.address, 100)
    line.proxy.dies_with(RECEIPT, forwarded=False)
    problem = code_of(client.transfer_token, line.wallet, token, HEAP, 100)
    line.proxy.heal()
    line.proxy.tricks["eth_chainId"] = lambda request, really: "0x1"
    line.proxy.tricks[COUNT] = lambda request, really: "0x99"
    assert code_of(client.transfer_token, line.again(), token, HEAP, 100).code == "chain.wrong"
    line.proxy.heal()
    assert client.transfer_token(line.again(), token, HEAP, 100) == problem.facts["tx"]
    assert client.token_balance(token, HEAP) == 100


def test_what_a_contract_cannot_have_said_is_refused(line):
    client = line.open()
    world = World(client, line.rich, None)
    job_id = world.job()
    world.settle(job_id, 1, {world.anna: 5})
    asked = (
        lambda: client.job(job_id),
        lambda: client.token_balance(world.token, HEAP),
        lambda: client.claimed_of(job_id, HEAP),
        lambda: client.job_id(HEAP, "0x" + "22" * 32),
        lambda: client.settle(world.hub, job_id, 2, "0x" + "33" * 32, 9, "0x" + "44" * 32),
    )
    for answer in ("0x", "0x" + "ff" * 7, "0xfg", None, {}):
        line.proxy.tricks["eth_call"] = lambda request, really, answer=answer: answer
        assert [code_of(one).code for one in asked] == ["chain.wrong"] * 5
    # A word of ones is a number, if a strange one, and no job.
    line.proxy.tricks["eth_call"] = lambda request, really: "0x" + "ff" * 32 * 40
    assert [code_of(one).code for one in (asked[0], asked[-1])] == ["chain.wrong"] * 2
    line.proxy.heal()
    settled = client.settlements(job_id)
    assert len(settled) == 1

    def log(**changes):
        def lying(request, really):
            return [{**one, **changes} for one in really()]

        return lying

    for lie in (
        log(data="0x"), log(data="0x" + "ff" * 999), log(topics=[]), log(topics=["0x" + "00" * 32]), log(logIndex=1),
        log(address=None), log(transactionHash="0x1"), lambda request, really: 5, lambda request, really: [[]],
    ):  # fmt: skip
        line.proxy.tricks["eth_getLogs"] = lie
        problem = code_of(client.settlements, job_id)
        assert problem.code == "chain.wrong"
    line.proxy.heal()
    assert client.settlements(job_id) == settled


def test_the_receipt_of_another_transaction_is_not_taken(line):
    client = line.open()
    other = client.transfer_gas(line.wallet, HEAP, 1)
    line.proxy.tricks[RECEIPT] = lambda request, really: request["params"].__setitem__(0, other) or really()
    problem = code_of(client.transfer_gas, line.wallet, HEAP, 2)
    assert (problem.code, problem.exit_code) == ("chain.wrong", 1)
    assert problem.facts["tx"] in problem.message
    line.proxy.heal()
    assert line.open().transfer_gas(line.again(), HEAP, 2) == problem.facts["tx"]
    assert (line.heap(), line.sent()) == (3, 2)


ABSURD = {
    "eth_estimateGas": [hex(2**200), "0x", "-0x1", "0x-1", 7, None, "0xzz", [], {}],
    "eth_getBlockByNumber": [{}, [], "0x1", {"number": "0x1", "hash": "0x", "timestamp": "0x1"}],
    "eth_maxPriorityFeePerGas": [hex(10**40), None, "much", 1.5],
    "eth_getBalance": [None, "0x" + "f" * 65, "0.5", True],
    COUNT: [hex(2**70), None, "0x", "one"],
    RECEIPT: [[], "0x1", {"status": "0x1"}, {"transactionHash": None}, 5],
    "eth_chainId": ["0x0", hex(2**200), {"id": 1}],
}


@pytest.mark.parametrize(("method", "answer"), [(name, one) for name, many in ABSURD.items() for one in many])
def test_numbers_that_make_no_sense_are_refused(line, method, answer):
    client = line.open()
    assert client.chain_id
    line.proxy.tricks[method] = lambda request, really: answer
    problem = code_of(client.transfer_gas, line.wallet, HEAP, 1)
    assert (problem.code, problem.exit_code) == ("chain.wrong", 1)
    assert method in problem.message
    line.proxy.heal()
    line.open().transfer_gas(line.again(), HEAP, 1)
    assert (line.heap(), line.sent(), line.noted()) == (1, 1, [])


@pytest.mark.parametrize("body", [b"<html>502</html>", b"", b"[" * 5000, b'{"jsonrpc": "2.0", "id": 1}'])
def test_what_a_proxy_says_in_a_node_s_place_is_no_answer(line, body):
    def instead(request, really):
        really()
        return body

    client = line.open()
    assert client.chain_id
    line.proxy.tricks[SEND] = instead
    problem = code_of(client.transfer_gas, line.wallet, HEAP, 1)
    assert problem.code == "chain.wrong"
    assert problem.facts["tx"] in problem.message
    line.proxy.heal()
    assert line.open().transfer_gas(line.again(), HEAP, 1) == problem.facts["tx"]
    assert (line.heap(), line.sent()) == (1, 1)


def test_too_little_gas_is_said_before_anything_is_sent(line):
    poor = wallets.create(line.folder / "poor" / "wallet.json")
    client = line.open()
    for call in (lambda: client.transfer_gas(poor, HEAP, 1), lambda: client.deploy(poor)):
        problem = code_of(call)
        assert (problem.code, problem.exit_code) == ("money.insufficient", 6)
    client.transfer_gas(line.wallet, poor.address, 30_000)
    line.proxy.asked.clear()
    problem = code_of(client.transfer_gas, poor, HEAP, 20_000)
    assert problem.code == "money.insufficient"
    assert SEND not in line.proxy.asked
    assert client.gas_balance(poor.address) == 30_000


def test_one_that_is_refused_for_ever_makes_nobody_forget_another(tmp_path):
    journal = Journal(tmp_path, 1, HEAP)
    other, tries = Sent("0xaa", 5, "0x01"), [Sent("0xbb", 6, f"0x{number:04x}") for number in range(100)]
    journal.add(other)
    for one in tries:
        journal.add(one)
    assert journal.find("0xaa") == [other]
    kept = journal.find("0xbb")
    assert (kept[0], kept[1], kept[-1], len(kept)) == (tries[-1], tries[-2], tries[0], 16)
    journal.end(6)
    assert (journal.find("0xbb"), journal.find("0xaa")) == ([], [other])


def test_a_note_that_cannot_be_read_stops_before_it_costs(line):
    client = line.open()
    client.transfer_gas(line.wallet, HEAP, 1)
    note = line.folder / "home" / "sent" / f"{client.chain_id}-{line.wallet.address.lower()}.json"
    for damage in ("", "{}", "[1]", json.dumps([{"purpose": "x"}])):
        note.write_text(damage, encoding="utf-8")
        problem = code_of(client.transfer_gas, line.again(), HEAP, 1)
        assert (problem.code, problem.exit_code) == ("chain.journal", 1)
        assert str(note) in problem.message
    assert line.sent() == 1
