"""What others' libraries make of our contracts, our embedded chain and our trees."""

import random
import sys
from collections.abc import Iterator

import pytest

from tests.fixtures_chain import ANVIL_KEY, SERVER, World, anvil, running, script
from trainchain.chain import merkle, settlement
from trainchain.chain.artifacts import load
from trainchain.chain.devnet.node import Devnet
from trainchain.chain.escrow import connect
from trainchain.chain.wallet import Wallet

SIZES = [1, 2, 3, 300, *random.Random(6).sample(range(4, 300), 36)]


@pytest.fixture(scope="module", params=["http", "anvil"])
def served(request, tmp_path_factory) -> Iterator[tuple[World, str]]:
    """A world on a chain that others reach, and its URL: our own chain served over RPC, and a node that is not ours."""
    if request.param == "anvil":
        with anvil() as client:
            yield World(client, Wallet(ANVIL_KEY), None), client._provider._url
        return
    file = tmp_path_factory.mktemp("chain") / "x.sqlite"
    node = Devnet(file)
    with running([sys.executable, "-c", SERVER, str(file)]) as process:
        url = f"http://127.0.0.1:{int(process.stdout.readline())}/"
        client = connect(url, timeout=20, retries=3)
        yield World(client, node.faucet(), node), url
        client.close()
    node.close()


@pytest.mark.parametrize("library", ["ethers", "viem"])
def test_a_library_of_others_claims_and_reads_why_a_claim_is_refused(served, library):
    world, url = served
    job_id, payer = world.job(), Wallet(b"\x21" * 32)
    world.client.transfer_gas(world.rich, payer.address, 10**18)
    anna = world.anna.address
    leaves = world.settle(job_id, 1, {world.anna: 70, world.ben: 50, world.hub: 3})
    cumulative, proof = settlement.proof_for(leaves, anna)
    before = world.holds(world.anna)
    asked = {
        "rpc": url,
        "key": "0x" + "21" * 32,
        "escrow": world.client.escrow,
        "abi": load("TrainEscrow").abi,
        "jobId": job_id,
        "account": anna,
        "cumulative": str(cumulative),
        "proof": proof,
        "wrong": "71",
    }

    told = script(f"claim_{library}.mjs", asked, needs=library)

    assert told["paid"] == {"jobId": job_id, "account": anna, "to": anna, "amount": "70", "cumulative": "70"}
    assert told["refusals"] == [
        {"name": "NothingToClaim", "values": {"account": anna, "claimed": "70"}},
        {"name": "BadProof", "values": {"account": anna, "cumulative": "71"}},
    ]
    assert world.holds(world.anna) == before + 70
    assert [one.tx for one in world.client.claims(job_id)] == [told["tx"]]


def test_trees_of_any_size_are_openzeppelins():
    drawn = random.Random(7)
    lists = [
        [
            (merkle.checksum(f"0x{drawn.getrandbits(160):040x}"), 1 + drawn.getrandbits(drawn.choice([1, 64, 127])))
            for _ in range(size)
        ]
        for size in SIZES
    ]
    asked = [[(account, str(amount)) for account, amount in leaves] for leaves in lists]
    for leaves, theirs in zip(lists, script("trees.mjs", asked, needs="@openzeppelin/merkle-tree"), strict=True):
        ours = merkle.Tree(leaves)
        assert ours.root == theirs["root"]
        assert [ours.proof(account) for account, _ in leaves] == theirs["proofs"]
