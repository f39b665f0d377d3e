"""What the chain client does, on every kind of chain it can be given."""

import threading
from dataclasses import replace

import pytest

from tests.fixtures_chain import World
from trainchain.chain import eip712, merkle, settlement
from trainchain.chain.artifacts import load
from trainchain.chain.records import ClaimItem, Deployment
from trainchain.chain.wallet import Wallet
from trainchain.core.errors import TrainChainError


@pytest.fixture
def world(backend) -> World:
    return World(*backend)


def code_of(call, *args, **kwargs):
    with pytest.raises(TrainChainError) as caught:
        call(*args, **kwargs)
    return caught.value.code


def test_deploying_twice_finds_the_first_and_the_code_is_checked(world):
    client = world.client
    assert client.deploy(world.rich) == Deployment(world.token, client.escrow)
    assert client.check_code() == client.check_code(client.escrow) == load("TrainEscrow").code_hash()
    for wrong in (world.token, world.anna.address, "", "0x12"):
        assert code_of(client.check_code, wrong) == "chain.wrong"


def test_a_job_is_created_once_in_one_transaction(world):
    params = world.params()
    before = world.client.w3.eth.get_transaction_count(world.owner.address)
    made = world.client.create_job(world.owner, params, 1000)
    assert world.client.w3.eth.get_transaction_count(world.owner.address) == before + 1
    assert world.client.create_job(world.owner, params, 1000) == made
    assert made.job_id == world.client.job_id(world.owner.address, params.salt)
    job = world.client.job(made.job_id)
    assert (job.owner, job.hub, job.token) == (world.owner.address, world.hub.address, world.token)
    assert (job.funded, job.settled, job.free, job.round, job.halted) == (1000, 0, 1000, 0, False)
    assert (job.deadline, job.grace, job.round_cap) == (params.deadline, 500, 400)
    assert job.spec_hash == "0x" + "ab" * 32
    other = replace(params, hub=world.anna.address)
    with pytest.raises(TrainChainError, match="JobExists"):
        world.client.create_job(world.owner, other, 1000)


def test_what_is_not_there_cannot_be_paid(world):
    params = world.params()
    assert code_of(world.client.create_job, world.owner, params, 1_000_001) == "money.insufficient"
    assert code_of(world.client.transfer_token, world.anna, world.token, world.ben.address, 1) == ("money.insufficient")
    poor = Wallet(b"\x55" * 32)
    assert code_of(world.client.transfer_gas, poor, world.ben.address, 1) == "money.insufficient"
    world.client.transfer_token(world.owner, world.token, poor.address, 10)
    assert code_of(world.client.transfer_token, poor, world.token, world.ben.address, 10) == ("money.insufficient")


def test_a_job_is_settled_claimed_and_reclaimed(world):
    client, job_id = world.client, world.job()
    client.fund(world.owner, job_id, 500)
    assert client.job(job_id).funded == 1500
    leaves = world.settle(job_id, 1, {world.anna: 100, world.ben: 50})
    data = settlement.leaves_file(job_id, 1, leaves.amounts)
    (settled,) = client.settlements(job_id)
    settlement.check_against_chain(data, settled)
    made = settlement.settle_leaves(data)
    again = client.settle(world.hub, job_id, 1, made.root, made.total, made.data_hash)
    assert again == settled.tx
    assert code_of(world.settle, job_id, 1, {world.anna: 101}) == "settlement.mismatch"

    assert client.claimable(job_id, world.anna.address, 100) == 100
    assert world.claim(leaves, world.anna, wallet=world.ben).amount == 100
    assert world.claim(leaves, world.anna) == (None, 0)
    assert world.holds(world.anna) == 100
    leaves = world.settle(job_id, 2, {world.anna: 120, world.ben: 300})
    assert world.claim(leaves, world.ben).amount == 300
    assert client.claimed_of(job_id, world.ben.address) == 300
    assert [(one.account, one.amount) for one in client.claims(job_id)] == [
        (world.anna.address, 100),
        (world.ben.address, 300),
    ]
    assert [one.round for one in client.settlements(job_id)] == [1, 2]

    assert code_of(client.reclaim, world.owner, job_id) == "money.too_early"
    world.advance(1502)
    before = world.holds(world.owner)
    assert client.reclaim(world.owner, job_id).amount == 1080
    assert client.reclaim(world.owner, job_id) == (None, 0)
    assert world.holds(world.owner) == before + 1080
    assert world.claim(leaves, world.anna).amount == 20


def test_anyone_may_hand_in_the_hubs_settlement(world):
    job_id = world.job()
    tree = merkle.Tree({world.anna.address: 7})
    message = {"jobId": job_id, "round": 1, "root": tree.root, "total": 7, "dataHash": "0x" + "01" * 32}
    signature = world.hub.sign_typed(world.client.domain, "Settlement", message)
    args = (job_id, 1, tree.root, 7, "0x" + "01" * 32)
    world.client.settle(world.ben, *args, hub_signature=signature)
    assert world.client.job(job_id).total == 7


def test_the_contract_hashes_what_is_signed_as_we_do(world):
    client, contract = world.client, world.client._contract().functions
    values = {"jobId": "0x" + "ab" * 32, "round": 2**64 - 1, "root": "0x" + "cd" * 32, "total": 2**128 - 1}
    message = {**values, "dataHash": "0x" + "ef" * 32}
    on_chain = bytes(contract.settlementDigest(*message.values()).call())
    assert on_chain == eip712.digest(client.domain, "Settlement", message)
    message = {"jobId": "0x" + "ab" * 32, "account": world.anna.address, "cumulative": 2**128 - 1}
    assert bytes(contract.voucherDigest(*message.values()).call()) == eip712.digest(client.domain, "Voucher", message)


def test_many_claims_are_one_transaction_and_a_bad_one_is_skipped(world):
    one, two = world.job(), world.job()
    first = world.settle(one, 1, {world.anna: 10, world.ben: 20})
    second = world.settle(two, 1, {world.anna: 5})
    items = []
    for leaves, who in ((first, world.anna), (first, world.ben), (second, world.anna)):
        amount, proof = settlement.proof_for(leaves, who.address)
        items.append(ClaimItem(leaves.job_id, who.address, amount, proof))
    bad = [replace(items[0], cumulative=11), replace(items[0], job_id="0x" + "99" * 32), items[1]]
    tx, amounts = world.client.claim_many(world.hub, [items[0], bad[0], items[1], bad[1], items[2], bad[2]])
    assert amounts == [10, 0, 20, 0, 5, 0]
    assert tx is not None
    assert (world.holds(world.anna), world.holds(world.ben)) == (15, 20)
    assert world.client.claim_many(world.hub, []) == (None, [])


def test_a_claim_can_go_elsewhere_with_a_tip(world):
    job_id = world.job()
    leaves = world.settle(job_id, 1, {world.anna: 100, world.ben: 1})
    amount, proof = settlement.proof_for(leaves, world.anna.address)
    message = {
        "jobId": job_id,
        "account": world.anna.address,
        "to": world.hub.address,
        "cumulative": amount,
        "tip": 3,
        "validUntil": world.client.now() + 500,
    }
    signature = world.anna.sign_typed(world.client.domain, "ClaimTo", message)
    assert world.client.claim_to(world.ben, message, proof, signature).amount == 100
    assert (world.holds(world.hub), world.holds(world.ben), world.holds(world.anna)) == (97, 3, 0)
    assert world.client.claims(job_id)[0].to == world.hub.address


def test_a_voucher_is_paid_and_listed(world):
    job_id = world.job()
    assert world.redeem(job_id, world.anna, 70).amount == 70
    assert world.redeem(job_id, world.anna, 70) == (None, 0)
    (paid,) = world.client.claims(job_id)
    assert (paid.voucher, paid.amount, paid.to) == (True, 70, world.anna.address)


def test_a_job_is_halted_closed_or_given_another_hub(world):
    client = world.client
    halted, closed, moved = world.job(), world.job(), world.job()
    client.halt(world.owner, halted)
    assert client.job(halted).halted
    signature = world.hub.sign_typed(client.domain, "CloseEarly", {"jobId": closed})
    client.close_early(world.owner, closed, signature)
    assert client.job(closed).deadline <= client.now()
    client.propose_hub(world.owner, moved, world.ben.address)
    world.advance(client.job(moved).grace)
    world.settle(moved, 1, {world.anna: 1}, wallet=world.ben)


def test_a_refusal_names_the_contracts_values(world):
    job_id = world.job()
    with pytest.raises(TrainChainError) as caught:
        world.settle(job_id, 1, {world.anna: 1}, wallet=world.ben)
    caller, hub = world.ben.address.lower(), world.hub.address.lower()
    assert caught.value.message == f"TrainEscrow refused: NotHub(caller={caller}, hub={hub})."
    with pytest.raises(TrainChainError, match=r"NoSuchJob\(jobId=0x9999"):
        world.client.job("0x" + "99" * 32)


def test_threads_share_one_wallet(world):
    people = [Wallet(bytes([place + 1]) * 32).address for place in range(6)]
    problems = []

    def send(address):
        try:
            world.client.transfer_token(world.owner, world.token, address, 1)
        except TrainChainError as problem:
            problems.append(problem)

    before = [world.holds(address) for address in people]
    threads = [threading.Thread(target=send, args=(address,)) for address in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert [world.holds(address) for address in people] == [amount + 1 for amount in before]
