import json
import subprocess
import sys
from dataclasses import replace

import pytest

from trainchain.chain import settlement
from trainchain.chain.merkle import verify
from trainchain.chain.records import Settled
from trainchain.core.errors import TrainChainError

JOB = "0x" + "ab" * 32
ANNA, BEN, CARL = ("0x" + digits * 20 for digits in ("11", "22", "33"))


def made():
    return settlement.leaves_file(JOB, 3, {BEN: 5, ANNA: 2**100, CARL: 0}, ended=False, limit=9)


def settled(data):
    whole = settlement.settle_leaves(data)
    return Settled(JOB, 3, whole.root, whole.total, whole.data_hash, active_at=0, tx="0x", block=1)


def test_the_file_has_one_form_without_zeros():
    data = made()
    assert data == settlement.leaves_file("ab" * 32, 3, {ANNA: 2**100, BEN: 5}, ended=False, limit=9)
    assert json.loads(data) == {
        "format": "trainchain.leaves/2",
        "job": JOB,
        "round": 3,
        "ended": False,
        "limit": "9",
        "leaves": [[ANNA, str(2**100)], [BEN, "5"]],
    }


def test_a_proof_from_the_file_holds():
    data = made()
    leaves = settlement.read_leaves(data)
    amount, proof = settlement.proof_for(leaves, ANNA)
    assert amount == 2**100
    assert verify(settlement.settle_leaves(data).root, ANNA, amount, proof)
    assert settlement.proof_for(leaves, CARL) == (0, [])
    assert settlement.proof_for(leaves, "nobody") == (0, [])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"[" * 100_000,
        made() + b"\n",
        made().replace(b'"5"', b"5"),
        made().replace(b'"5"', b'"05"'),
        made().replace(b'"5"', b'"0"'),
        made().replace(b'"5"', b'"-5"'),
        made().replace(b'"5"', b'"1e5"'),
        made().replace(b'"5"', '"\u0665"'.encode()),
        made().replace(b'"5"', b'"' + b"9" * 39 + b'"'),
        made().replace(b"leaves/2", b"leaves/1"),
        made().replace(b'"ended":false', b'"ended":0'),
        made().replace(b'"ended":false', b'"ended":null'),
        made().replace(b'"ended":false,', b""),
        made().replace(b'"limit":"9"', b'"limit":9'),
        made().replace(b'"limit":"9"', b'"limit":"0"'),
        made().replace(b'"limit":"9"', b'"limit":"-9"'),
        made().replace(b'"limit":"9"', b'"limit":"' + str(2**128).encode() + b'"'),
        made().replace(b',"limit":"9"', b""),
        made().replace(b'"round":3', b'"round":-3'),
        made().replace(b'"round":3', b'"round":true'),
        made().replace(b'"round":3', b'"round":3,"round":3'),
        made().replace(b"0xab", b"0xAB"),
        made().replace(b"2222", b"1111"),
    ],
)
def test_any_other_bytes_are_refused(data):
    with pytest.raises(TrainChainError) as caught:
        settlement.read_leaves(data)
    assert caught.value.code == "settlement.mismatch"


def test_it_says_by_which_rule_it_was_added_up():
    leaves = settlement.read_leaves(settlement.leaves_file(JOB, 7, {BEN: 5}, ended=True, limit=2**128 - 1))
    assert (leaves.round, leaves.ended, leaves.limit) == (7, True, 2**128 - 1)
    one, other = (settlement.leaves_file(JOB, 7, {BEN: 5}, ended=ended) for ended in (True, False))
    whole = [settlement.settle_leaves(data) for data in (one, other)]
    assert whole[0].root == whole[1].root
    assert whole[0].data_hash != whole[1].data_hash


def test_a_settlement_with_nobody_in_it_is_refused():
    with pytest.raises(TrainChainError, match="at least one leaf"):
        settlement.leaves_file(JOB, 1, {ANNA: 0})


def test_a_file_is_checked_against_what_the_chain_says():
    data = made()
    assert settlement.check_against_chain(data, settled(data)).amounts == {ANNA: 2**100, BEN: 5}
    for change in ({"round": 4}, {"total": 1}, {"root": JOB}, {"data_hash": JOB}, {"job_id": "0x" + "cd" * 32}):
        with pytest.raises(TrainChainError, match="the chain has") as caught:
            settlement.check_against_chain(data, replace(settled(data), **change))
        assert caught.value.code == "settlement.mismatch"
        assert caught.value.exit_code == 4


def test_a_leaf_that_falls_or_goes_is_seen():
    before = settlement.read_leaves(made())
    settlement.check_successor(before, replace(before, amounts={ANNA: 2**100, BEN: 6, CARL: 1}))
    for amounts in ({ANNA: 2**100}, {ANNA: 2**100, BEN: 4}):
        with pytest.raises(TrainChainError, match="is left with"):
            settlement.check_successor(before, replace(before, amounts=amounts))


def test_the_leaf_modules_do_not_load_web3():
    code = (
        "import sys\n"
        "from trainchain.chain import artifacts, eip712, hexes, merkle, records, settlement, signin, wallet\n"
        "wallet.Wallet(b'1' * 32).sign_text('hello')\n"
        "print(sorted({'web3', 'eth_account', 'eth', 'eth_keyfile'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_recursion_limit_is_still_pythons_own():
    code = (
        "import json, sys, tempfile, pathlib\n"
        "from trainchain.chain import escrow, wallet\n"
        "client = escrow.connect('embedded:x', home=pathlib.Path(tempfile.mkdtemp()))\n"
        "client.deploy(client.faucet())\n"
        "print(sys.getrecursionlimit())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1000"
