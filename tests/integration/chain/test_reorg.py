"""The last blocks of a chain are taken back, at a node that is not ours: whoever does it all again is paid once."""

from collections.abc import Iterator

import pytest

from tests.fixtures_chain import ANVIL_KEY, World, anvil
from trainchain.chain import settlement
from trainchain.chain.escrow import ChainClient
from trainchain.chain.wallet import Wallet

STEPS = ("create", "settle 1", "claim anna", "redeem ben", "settle 2", "claim anna again", "count ben")


@pytest.fixture(scope="module")
def node() -> Iterator[ChainClient]:
    with anvil() as client:
        yield client


@pytest.fixture
def world(node) -> World:
    return World(node, Wallet(ANVIL_KEY), None)


def take_back(world, depth, again=()) -> None:
    """The last blocks become others, with the transactions of `again`: each raw, and the new block that has it."""
    answer = world.client.w3.provider.make_request("anvil_reorg", [depth, [[raw, at] for raw, at in again]])
    assert "error" not in answer, answer


def work(world, params) -> dict[str, str | None]:
    """A job from its creation to its last claim, as its parties would go through it; which transactions did it."""
    client, anna, ben = world.client, world.anna, world.ben
    made = client.create_job(world.owner, params, 1000)
    done, job_id = {"create": made.tx}, made.job_id

    def settle(round, amounts):
        leaves = world.leaves(job_id, round, amounts)
        root = settlement.settle_leaves(settlement.leaves_file(job_id, round, leaves.amounts))
        done[f"settle {round}"] = client.settle(world.hub, job_id, round, root.root, root.total, root.data_hash)
        return leaves

    leaves = settle(1, {anna: 100, ben: 20})
    done["claim anna"] = world.claim(leaves, anna).tx
    done["redeem ben"] = world.redeem(job_id, ben, 50).tx
    leaves = settle(2, {anna: 150, ben: 70})
    done["claim anna again"] = world.claim(leaves, anna).tx
    done["count ben"] = world.claim(leaves, ben, wallet=anna).tx
    return done


@pytest.mark.parametrize("depth", range(1, len(STEPS) + 1))
def test_what_is_lost_of_the_last_blocks_is_done_again_and_pays_once(world, depth):
    client, params = world.client, world.params()
    first = work(world, params)
    job_id = client.job_id(world.owner.address, params.salt)
    before = client.job(job_id)
    take_back(world, depth)

    again = work(world, params)

    assert tuple(again) == STEPS
    kept = STEPS[: len(STEPS) - depth]
    # What can be looked up is found as it was; what was paid is not sent again; what is lost is sent anew.
    assert all(again[step] in (first[step], None) for step in kept)
    assert all(again[step] for step in STEPS if step not in kept)
    assert client.job(job_id) == before
    assert (world.holds(world.anna), world.holds(world.ben), world.holds(world.owner)) == (150, 70, 999_000)
    assert [(one.account, one.cumulative) for one in client.claims(job_id)] == [
        (world.anna.address, 100),
        (world.ben.address, 50),
        (world.anna.address, 150),
        (world.ben.address, 70),
    ]
    assert [one.round for one in client.settlements(job_id)] == [1, 2]
    sent = client.w3.eth.block_number
    work(world, params)
    assert client.w3.eth.block_number == sent


def test_a_settlement_that_comes_back_in_another_block_is_found_there(world):
    client, job_id = world.client, world.job()
    world.settle(job_id, 1, {world.anna: 7})
    (there,) = client.settlements(job_id)
    client.transfer_gas(world.rich, world.ben.address, 1)
    raw = client.w3.provider.make_request("eth_getRawTransactionByHash", [there.tx])["result"]
    take_back(world, 2, again=[(raw, 1)])

    leaves = world.settle(job_id, 1, {world.anna: 7})

    (here,) = client.settlements(job_id)
    assert (here.tx, here.block) == (there.tx, there.block + 1)
    assert world.claim(leaves, world.anna).amount == world.holds(world.anna) == 7


def test_a_claim_of_a_root_that_is_taken_back_is_refused_until_it_is_settled_again(world, refused):
    job_id = world.job()
    leaves = world.settle(job_id, 1, {world.anna: 7, world.ben: 5})
    take_back(world, 1)
    refused("BadProof", world.claim, leaves, world.anna)
    world.settle(job_id, 1, {world.anna: 7, world.ben: 5})
    assert world.claim(leaves, world.anna).amount == 7
