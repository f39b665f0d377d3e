"""Tokens that misbehave harm nobody but those who use them."""

import pytest

from trainchain.chain import settlement
from trainchain.chain.hexes import keccak
from trainchain.chain.records import ClaimItem


@pytest.fixture
def odd(world, odd_token):
    """A token of the owner's, without permit and without return values; `world` pays in it."""
    client = world.client
    factory = client.w3.eth.contract(abi=odd_token["abi"], bytecode=odd_token["bytecode"])
    receipt = client._sender.send(world.owner, factory.constructor(10_000))
    token = client.w3.eth.contract(address=receipt["contractAddress"], abi=odd_token["abi"])
    world.token = token.address
    return token.functions


def test_a_token_without_permit_is_approved_first(world, odd):
    job_id = world.job(amount=500)
    assert world.client.job(job_id).funded == 500
    leaves = world.settle(job_id, 1, {world.anna: 10})
    assert world.claim(leaves, world.anna).amount == 10
    assert world.holds(world.anna) == 10


def test_what_arrives_after_a_fee_is_what_counts(world, odd):
    world.client._sender.send(world.owner, odd.setFee(10))
    job_id = world.job(amount=500)
    assert world.client.job(job_id).funded == 450
    world.client.fund(world.owner, job_id, 100)
    assert world.client.job(job_id).funded == 540 == world.holds(world.client.escrow)


def test_a_blocked_worker_does_not_stop_a_batch(world, odd):
    client, job_id = world.client, world.job(amount=500)
    leaves = world.settle(job_id, 1, {world.anna: 10, world.ben: 20})
    client._sender.send(world.owner, odd.setBlocked(world.anna.address, True))
    proofs = {who: settlement.proof_for(leaves, who.address) for who in (world.anna, world.ben)}
    items = [ClaimItem(job_id, who.address, *proof) for who, proof in proofs.items()]
    tx, amounts = client.claim_many(world.hub, items)
    assert amounts == [0, 20]
    receipt = client.w3.eth.get_transaction_receipt(tx)
    (skipped,) = client._events(receipt, "ClaimSkipped")
    assert bytes(skipped["reason"]) == keccak(b"TransferFailed(address,address)")[:4]
    job = client.job(job_id)
    assert (job.settled, job.claimed, client.claimed_of(job_id, world.anna.address)) == (30, 20, 0)
    client._sender.send(world.owner, odd.setBlocked(world.anna.address, False))
    assert world.claim(leaves, world.anna).amount == 10


def test_a_token_that_calls_back_finds_the_door_shut(world, odd):
    client, job_id = world.client, world.job(amount=500)
    leaves = world.settle(job_id, 1, {world.anna: 10, world.ben: 20})
    amount, proof = settlement.proof_for(leaves, world.ben.address)
    contract = client._contract()
    again = contract.encode_abi("claim", [job_id, world.ben.address, amount, proof])
    client._sender.send(world.owner, odd.setCall(client.escrow, again))
    assert world.claim(leaves, world.anna).amount == 10
    assert bytes(odd.answer().call()) == keccak(b"ReentrancyGuardReentrantCall()")[:4]
    assert (world.holds(world.anna), world.holds(world.ben)) == (10, 0)
