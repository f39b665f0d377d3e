"""The chain is a file: processes die, start at once, and come back to it."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from itertools import pairwise

import pytest

from tests.fixtures_chain import running
from trainchain.chain.devnet.node import Devnet, Refused
from trainchain.chain.escrow import connect
from trainchain.chain.hexes import from_hex
from trainchain.chain.wallet import Wallet
from trainchain.core.errors import TrainChainError

HEAP = Wallet(b"\x66" * 32).address

WRITER = """
import pathlib, sys
from trainchain.chain.escrow import connect
from trainchain.chain.wallet import Wallet
client = connect("embedded:x", home=pathlib.Path(sys.argv[1]))
wallet = client.faucet() if sys.argv[2] == "faucet" else Wallet(bytes([int(sys.argv[2])]) * 32)
for _ in range(int(sys.argv[3])):
    client.transfer_gas(wallet, sys.argv[4], 1)
    print("sent", flush=True)
"""


DYING = """
import os, pathlib, signal, sqlite3, sys
from trainchain.chain.escrow import connect
really = sqlite3.connect
def opened(*args, **kwargs):
    db = really(*args, **kwargs)
    db.set_trace_callback(dying)
    return db
def dying(statement):
    global left
    left -= statement.lstrip().startswith(("INSERT", "COMMIT"))
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
sqlite3.connect = opened
for line in sys.stdin:
    home, left = line.split()
    left = int(left)
    if os.fork() == 0:
        client = connect("embedded:x", home=pathlib.Path(home))
        while True:
            client.transfer_gas(client.faucet(), sys.argv[1], 1)
            print("sent", flush=True)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
"""For each line a process that kills itself at the n-th statement which changes the file."""


def writer(home, who, times):
    return [sys.executable, "-c", WRITER, str(home), who, str(times), HEAP]


def consistent(home):
    """Head, index and balance tell one story; returns how many coins were sent."""
    node = Devnet(home / "chain" / "x.sqlite")
    head = node.head()
    blocks = [node.block(number, full=True) for number in range(head + 1)]
    sent = [tx for block in blocks for tx in block["transactions"]]
    assert all(len(block["transactions"]) == 1 for block in blocks[1:])
    for parent, block in pairwise(blocks):
        assert block["parentHash"] == parent["hash"]
    assert all(node.transaction(tx["hash"])[1]["status"] == "0x1" for tx in sent)
    coins = sum(int(tx["value"], 16) for tx in sent if tx["to"] == HEAP.lower())
    assert node.account(from_hex(HEAP))[0] == coins
    node.close()
    with closing(sqlite3.connect(home / "chain" / "x.sqlite")) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    return coins


def test_a_killed_writer_leaves_a_chain(tmp_path):
    told = 0
    for lines in (1, 4, 9):
        with running(writer(tmp_path, "faucet", 10_000)) as process:
            for _ in range(lines):
                assert process.stdout.readline() == "sent\n"
            process.kill()  # SIGKILL: nobody gets to tidy up
            process.wait()
            told += lines + process.stdout.read().count("sent")
        # The last one may be in the file without having been reported; the next process finds it, and reports it.
        assert consistent(tmp_path) - told in (0, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_twenty_killed_in_mid_write_leave_a_chain(tmp_path):
    """Five while the chain is made, the rest at every other statement of what two transactions write."""
    old = tmp_path / "old"
    connect("embedded:x", home=old).close()
    deaths = [(tmp_path / f"new{at}", at) for at in (1, 2, 5, 8, 10)] + [(old, at) for at in range(2, 32, 2)]
    coins = {}
    command = [sys.executable, "-c", DYING, HEAP]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for home, at in deaths:
            process.stdin.write(f"{home} {at}\n")
            process.stdin.flush()
            sent = 0
            while (line := process.stdout.readline()) == "sent\n":
                sent += 1
            assert line == f"{-signal.SIGKILL}\n"
            coins[home] = coins.get(home, 0) + sent
            # What was told is there; what was not yet in is not there by half.
            assert consistent(home) == coins[home]
        process.stdin.close()
    assert len(deaths) == 20
    client = connect("embedded:x", home=old)
    client.transfer_gas(client.faucet(), HEAP, 1)
    client.close()
    assert consistent(old) == coins[old] + 1 >= 7


def test_four_processes_write_at_once(tmp_path):
    client = connect("embedded:x", home=tmp_path)
    for number in (1, 2, 3, 4):
        client.transfer_gas(client.faucet(), Wallet(bytes([number]) * 32).address, 10**18)
    four = [subprocess.Popen(writer(tmp_path, who, 10), stdout=subprocess.DEVNULL) for who in "1234"]
    assert [process.wait(timeout=60) for process in four] == [0] * 4
    assert consistent(tmp_path) == 40
    assert client.gas_balance(HEAP) == 40  # an open chain sees what others wrote
    client.close()


def test_two_processes_share_one_wallet(tmp_path):
    both = [subprocess.Popen(writer(tmp_path, "faucet", 10), stdout=subprocess.DEVNULL) for _ in "12"]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert consistent(tmp_path) == 20


def test_threads_open_and_write_one_file(tmp_path):
    Devnet(tmp_path / "chain" / "x.sqlite").close()
    ids, problems = set(), []

    def work(number):
        try:
            client = connect("embedded:x", home=tmp_path)
            client.transfer_gas(client.faucet(), HEAP, number)
            ids.add(client.chain_id)
            client.close()
        except Exception as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(ids) == 1
    assert consistent(tmp_path) == 10


def test_a_reopened_chain_is_the_same_chain(tmp_path):
    client = connect("embedded:x", home=tmp_path)
    made = client.deploy(client.faucet())
    first = client.chain_id
    client.close()
    client = connect("embedded:x", home=tmp_path)
    assert (client.chain_id, client.escrow, client.token) == (first, made.escrow, made.token)
    assert client.deploy(client.faucet()) == made
    client.check_code()
    other = connect("embedded:y", home=tmp_path)
    assert other.chain_id != first
    assert 2**39 <= first < 2**40
    client.close()
    other.close()


def test_a_chain_without_its_faucet_still_works(tmp_path):
    client = connect("embedded:x", home=tmp_path)
    path = tmp_path / "chain" / "x.faucet.json"
    assert path.stat().st_mode & 0o077 == 0
    path.unlink()
    for _ in range(2):
        with pytest.raises(TrainChainError) as caught:
            client.faucet()
        assert caught.value.code == "wallet.missing"
        path.write_text(json.dumps(Wallet(b"\x01" * 32).keystore("")), encoding="utf-8")
    assert client.gas_balance(HEAP) == 0
    client.close()


def test_a_burst_of_blocks_keeps_to_the_clock(tmp_path):
    now = 1000.0
    node = Devnet(tmp_path / "x.sqlite", clock=lambda: now)
    faucet = node.faucet()
    for nonce in range(5):
        node.send(transfer(node, faucet, nonce))
    assert [int(node.block(n, full=False)["timestamp"], 16) for n in range(6)] == [1000] * 6
    assert {node.block(n, full=False)["gasLimit"] for n in range(6)} == {hex(30_000_000)}
    now = 900.0  # a clock that is set back does not turn the chain's
    node.send(transfer(node, faucet, 5))
    assert int(node.block(6, full=False)["timestamp"], 16) == 1000
    node.advance(500)
    node.send(transfer(node, faucet, 6))
    assert int(node.block(7, full=False)["timestamp"], 16) == 1400
    node.close()


def test_what_cannot_enter_a_block_is_refused_and_changes_nothing(tmp_path):
    node = Devnet(tmp_path / "x.sqlite", chain_id=77)
    faucet, poor = node.faucet(), Wallet(b"\x01" * 32)
    good = transfer(node, faucet, 0)
    tx_hash = node.send(good)
    assert node.send(good) == tx_hash
    for raw, why in (
        (b"", "not a signed"),
        (b"\x02\xc0", "not a signed"),
        (b"\xff" * 100, "not a signed"),
        (good[:-1], "not a signed"),
        (transfer(node, faucet, 0, value=2), "nonce too low"),
        (transfer(node, faucet, 2), "nonce too high"),
        (transfer(node, poor, 0), "insufficient funds"),
        (transfer(node, faucet.bound(78), 1, chainId=78), "invalid chain id"),
        (transfer(node, faucet, 1, gas=20_000), "gas"),
        (transfer(node, faucet, 1, gas=31_000_000), "gas"),
        (transfer(node, faucet, 1, maxFeePerGas=1), "fee|gas"),
    ):
        with pytest.raises(Refused, match=why):
            node.send(raw)
    assert node.head() == 1
    node.send(transfer(node, faucet, 1))
    node.close()


def transfer(node, wallet, nonce, **changes):
    fields = {
        "type": 2,
        "to": HEAP,
        "value": 1,
        "gas": 21_000,
        "nonce": nonce,
        "chainId": node.chain_id,
        "maxFeePerGas": 10**10,
        "maxPriorityFeePerGas": 1,
    }
    return wallet.sign_transaction({**fields, **changes})
