from hypothesis import given
from hypothesis import strategies as st

from trainchain.chain import merkle
from trainchain.chain.hexes import checksum, to_hex

addresses = st.binary(min_size=20, max_size=20).map(lambda raw: checksum(to_hex(raw)))
ledgers = st.dictionaries(addresses, st.integers(1, 2**128 - 1), min_size=1, max_size=40)


@given(ledgers, st.data())
def test_every_leaf_is_proven_and_no_other_amount_is(ledger, data):
    tree = merkle.Tree(ledger)
    account = data.draw(st.sampled_from(sorted(ledger)))
    proof, amount = tree.proof(account), ledger[account]
    assert merkle.verify(tree.root, account, amount, proof)
    assert not merkle.verify(tree.root, account, amount + 1, proof)
    assert not merkle.verify(tree.root, account, amount - 1, proof)
    other = data.draw(addresses.filter(lambda one: one != account))
    assert not merkle.verify(tree.root, other, amount, proof)
    if proof:
        assert not merkle.verify(tree.root, account, amount, proof[:-1])
        assert not merkle.verify(tree.root, account, amount, [*proof, proof[0]])
        flipped = proof[0][:-1] + ("0" if proof[0][-1] != "0" else "1")
        assert not merkle.verify(tree.root, account, amount, [flipped, *proof[1:]])


@given(ledgers, st.randoms(use_true_random=False))
def test_the_root_does_not_depend_on_order_or_spelling(ledger, random):
    pairs = [(account.lower(), amount) for account, amount in ledger.items()]
    random.shuffle(pairs)
    assert merkle.Tree(pairs).root == merkle.Tree(ledger).root


@given(ledgers, ledgers)
def test_other_amounts_have_another_root(one, two):
    assert (merkle.Tree(one).root == merkle.Tree(two).root) == (one == two)


@given(st.dictionaries(addresses, st.integers(1, 2**128 - 1), min_size=2, max_size=2))
def test_an_inner_node_cannot_pose_as_a_leaf(ledger):
    left, right = sorted(merkle.leaf(account, amount) for account, amount in ledger.items())
    root = merkle.Tree(ledger).root
    # A verifier that hashed leaves once would take these 64 bytes, cut as (address, amount), for an entry.
    forged, amount = to_hex(left[12:]), int.from_bytes(right, "big")
    assert not merkle.verify(root, forged, amount, [])
