"""Tokens that misbehave harm nobody but those who use them."""

import pytest

from trainchain.chain import settlement
from trainchain.chain.escrow import _packed
from trainchain.chain.hexes import from_hex, keccak
from trainchain.chain.records import ClaimItem
from trainchain.core.errors import TrainChainError


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


@pytest.mark.parametrize("temper", ["burns all gas", "answers at length", "says no", "says neither", "mumbles"])
def test_a_token_that_does_not_pay_stops_no_batch_and_loses_no_claim(world, odd, temper):
    client, odd_job = world.client, world.job(amount=500)
    world.token = client.token
    sound_job = world.job(amount=500)
    items, leaves = [], {}
    for job_id in (odd_job, sound_job):
        leaves[job_id] = world.settle(job_id, 1, {world.anna: 10, world.ben: 20})
        items.append(ClaimItem(job_id, world.anna.address, *settlement.proof_for(leaves[job_id], world.anna.address)))
    tempers = ["", "burns all gas", "answers at length", "says no", "says neither", "mumbles"]
    client._sender.send(world.owner, odd.setTemper(tempers.index(temper)))
    tx, amounts = client.claim_many(world.ben, items)
    assert (amounts, world.holds(world.anna)) == ([0, 10], 10)
    (skipped,) = client._events(client.w3.eth.get_transaction_receipt(tx), "ClaimSkipped")
    assert bytes(skipped["reason"]) == keccak(b"TransferFailed(address,address)")[:4]
    assert world.gas(tx) < 1_500_000
    with pytest.raises(TrainChainError) as caught:
        world.claim(leaves[odd_job], world.anna)
    assert caught.value.code == "chain.reverted"
    client._sender.send(world.owner, odd.setTemper(0))
    assert world.claim(leaves[odd_job], world.anna).amount == 10


def test_a_settlement_that_comes_while_the_token_is_called_is_not_undone_with_the_payment(world, odd):
    client, job_id = world.client, world.job(amount=500)
    leaves = world.settle(job_id, 1, {world.anna: 10})
    later = settlement.settle_leaves(settlement.leaves_file(job_id, 2, {world.anna.address: 30}))
    message = {"jobId": job_id, "round": 2, "root": later.root, "total": 30, "dataHash": later.data_hash}
    signature = from_hex(world.hub.sign_typed(client.domain, "Settlement", message))
    args = [job_id, 2, later.root, 30, later.data_hash, signature]
    call = client._contract().encode_abi("settleWithSignature", args)
    client._sender.send(world.owner, odd.setCall(client.escrow, call))
    client._sender.send(world.owner, odd.setTemper(6))
    items = [ClaimItem(job_id, world.anna.address, *settlement.proof_for(leaves, world.anna.address))]
    assert client.claim_many(world.ben, items)[1] == [0]
    job = client.job(job_id)
    assert (job.round, job.total, job.settled, job.claimed) == (2, 30, 30, 0)


@pytest.mark.parametrize(
    "name",
    ["claim", "claimMany", "claimTo", "redeemVoucher", "fund", "fundWithPermit", "createJob", "createJobWithPermit"],
)
@pytest.mark.parametrize("moment", ["paying out", "paying in"])
def test_a_token_that_calls_back_finds_the_door_shut(world, odd, name, moment):
    client, job_id = world.client, world.job(amount=500)
    leaves = world.settle(job_id, 1, {world.anna: 10, world.ben: 20})
    ben, zero = world.ben.address, "0x" + "00" * 32
    amount, proof = settlement.proof_for(leaves, ben)
    permit = (0, 0, zero, zero)
    arguments = {
        "claim": [job_id, ben, amount, proof],
        "claimMany": [[(job_id, ben, amount, proof)]],
        "claimTo": [(job_id, ben, ben, amount, 0, client.now()), proof, b""],
        "redeemVoucher": [job_id, ben, 30, world.voucher(job_id, world.ben, 30)],
        "fund": [job_id, 0],
        "fundWithPermit": [job_id, 0, *permit],
        "createJob": [_packed(world.params()), 0],
        "createJobWithPermit": [_packed(world.params()), 0, *permit],
    }
    again = client._contract().encode_abi(name, arguments[name])
    client._sender.send(world.owner, odd.setCall(client.escrow, again))
    if moment == "paying out":
        assert world.claim(leaves, world.anna).amount == 10
    else:
        client.fund(world.owner, job_id, 100)
    assert bytes(odd.answer().call()) == keccak(b"ReentrancyGuardReentrantCall()")[:4]
    assert (world.holds(world.anna), world.holds(world.ben)) == (10 if moment == "paying out" else 0, 0)


def test_the_door_is_shut_while_the_owner_reclaims(world, odd):
    client, job_id = world.client, world.job(amount=500)
    client._sender.send(world.owner, odd.setCall(client.escrow, client._contract().encode_abi("reclaim", [job_id])))
    world.advance(1501)
    assert client.reclaim(world.owner, job_id).amount == 500
    assert bytes(odd.answer().call()) == keccak(b"ReentrancyGuardReentrantCall()")[:4]
