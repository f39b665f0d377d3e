import json
from pathlib import Path

import pytest

from trainchain.chain import merkle
from trainchain.core.errors import TrainChainError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "merkle.json").read_text(encoding="utf-8"))
A, B = "0x" + "11" * 20, "0x" + "Ab" * 20


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{len(case['amounts'])} leaves")
def test_openzeppelins_own_library_gets_the_same_root_and_proofs(case):
    tree = merkle.Tree({account: int(amount) for account, amount in case["amounts"].items()})
    assert tree.root == case["root"]
    assert tree.total == sum(int(amount) for amount in case["amounts"].values())
    for account, proof in case["proofs"].items():
        assert tree.proof(account) == proof
        assert merkle.verify(tree.root, account, tree.amounts[account], proof)


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(A, 1), (A, 2)],
        [("0x" + "ab" * 20, 1), ("0x" + "AB" * 20, 2)],
        [(A, 0)],
        [(A, -1)],
        [(A, 2**128)],
        [(A, True)],
        [(A, 1.0)],
        [("0x11", 1)],
        [(B, 1)],
        [(None, 1)],
    ],
    ids=["none", "twice", "two spellings", "zero", "negative", "large", "bool", "float", "short", "sum", "null"],
)
def test_a_tree_refuses_what_is_not_one_positive_amount_an_account(pairs):
    with pytest.raises(TrainChainError) as caught:
        merkle.Tree(pairs)
    assert caught.value.code == "settlement.mismatch"


def test_an_account_without_a_leaf_has_no_proof():
    for stranger in ("0x" + "22" * 20, "nonsense"):
        with pytest.raises(TrainChainError, match="no leaf"):
            merkle.Tree({A: 1}).proof(stranger)


@pytest.mark.parametrize("proof", [["0x"], ["zz"], [None], [b"1"], ["0x" + "00" * 31]])
def test_a_malformed_proof_is_false(proof):
    assert not merkle.verify(merkle.Tree({A: 1}).root, A, 1, proof)


def test_malformed_roots_accounts_and_amounts_are_false():
    root = merkle.Tree({A: 1}).root
    assert merkle.verify(root, A, 1, [])
    assert not merkle.verify(root[2:], A, 1, [])
    assert not merkle.verify(root, "A", 1, [])
    assert not merkle.verify(root, A, -1, [])
    assert not merkle.verify(root, A, 2**256, [])
