"""Where the money is: roots that wait, vouchers that were faster than roots, ends of jobs."""

from dataclasses import replace

from trainchain.chain import settlement
from trainchain.chain.escrow import _packed
from trainchain.chain.hexes import keccak
from trainchain.chain.records import ClaimItem


def money(world, job_id):
    job = world.client.job(job_id)
    assert job.claimed <= job.settled <= job.funded - job.refunded
    return job.settled, job.claimed, job.free


def test_a_new_root_waits_and_the_old_one_pays_meanwhile(world, refused):
    client, job_id = world.client, world.job(activation_delay=100)
    first = world.settle(job_id, 1, {world.anna: 10, world.ben: 10})
    job = client.job(job_id)
    assert (job.root, job.pending_at) == ("0x" + "00" * 32, client.now() + 100)
    world.advance(99)
    refused("BadProof", world.claim, first, world.anna)
    world.advance(1)
    job = client.job(job_id)
    assert (int(job.pending_root, 16), job.pending_at) == (0, 0)
    second = world.settle(job_id, 2, {world.anna: 10, world.ben: 30})
    assert client.job(job_id).root == job.root
    world.advance(99)
    refused("BadProof", world.claim, second, world.ben)
    assert world.claim(first, world.anna).amount == 10
    world.advance(1)
    refused("BadProof", world.claim, first, world.ben)
    assert world.claim(second, world.ben).amount == 30


def test_a_watcher_leaves_under_the_old_root_before_a_bad_one_is_active(world, refused):
    job_id = world.job(activation_delay=100)
    honest = world.settle(job_id, 1, {world.anna: 10, world.ben: 10})
    world.advance(100)
    world.settle(job_id, 2, {world.hub: 20})
    assert world.claim(honest, world.anna).amount == 10
    world.advance(100)
    refused("BadProof", world.claim, honest, world.ben)


def test_a_halt_keeps_pending_roots_and_vouchers(world):
    client, job_id = world.client, world.job(activation_delay=100)
    leaves = world.settle(job_id, 1, {world.anna: 10})
    client.halt(world.owner, job_id)
    job = client.job(job_id)
    assert (job.halted, job.deadline) == (True, client.now())
    world.redeem(job_id, world.ben, 40)
    world.advance(100)
    assert world.claim(leaves, world.anna).amount == 10
    world.advance(401)
    assert client.reclaim(world.owner, job_id).amount == 950
    assert money(world, job_id) == (50, 50, 0)


def test_a_halt_after_the_deadline_does_not_move_it(world):
    client, job_id = world.client, world.job()
    deadline = client.job(job_id).deadline
    world.advance(deadline + 5 - client.now())
    client.halt(world.owner, job_id)
    assert client.job(job_id).deadline == deadline


def test_closing_early_leaves_the_grace_time_whole(world):
    client, job_id = world.client, world.job()
    signature = world.owner.sign_typed(client.domain, "CloseEarly", {"jobId": job_id})
    client.close_early(world.hub, job_id, signature)
    assert client.job(job_id).closes_after == client.now() + 500
    world.advance(500)
    leaves = world.settle(job_id, 1, {world.anna: 10})
    world.advance(1)
    assert client.reclaim(world.owner, job_id).amount == 990
    assert world.claim(leaves, world.anna).amount == 10


def test_settled_money_can_be_claimed_for_ever(world):
    job_id = world.job()
    leaves = world.settle(job_id, 1, {world.anna: 10})
    world.advance(10**8)
    world.client.reclaim(world.owner, job_id)
    assert world.claim(leaves, world.anna).amount == 10


def test_another_hub_takes_over_after_the_grace_time(world, refused):
    client, job_id = world.client, world.job(activation_delay=0, grace=500)
    client.propose_hub(world.owner, job_id, world.ben.address)
    job = client.job(job_id)
    assert (job.hub, job.next_hub) == (world.hub.address, world.ben.address)
    world.advance(499)
    refused("NotHub", world.settle, job_id, 1, {world.anna: 5}, wallet=world.ben)
    world.redeem(job_id, world.anna, 5)
    world.advance(1)
    assert client.job(job_id).hub == world.ben.address
    refused("BadSignature", world.redeem, job_id, world.anna, 6)
    refused("NotHub", world.settle, job_id, 1, {world.anna: 5})
    world.settle(job_id, 1, {world.anna: 5}, wallet=world.ben)
    client.propose_hub(world.owner, job_id, world.hub.address)
    client.propose_hub(world.owner, job_id, world.ben.address)  # taken back
    world.advance(500)
    assert client.job(job_id).hub == world.ben.address


def test_a_voucher_is_not_paid_again_by_a_leaf_nor_a_leaf_by_a_voucher(world):
    client, job_id = world.client, world.job()
    world.redeem(job_id, world.anna, 70)
    leaves = world.settle(job_id, 1, {world.anna: 70, world.ben: 30})
    assert world.claim(leaves, world.anna) == (None, 0)
    leaves = world.settle(job_id, 2, {world.anna: 90, world.ben: 30})
    assert world.claim(leaves, world.anna).amount == 20
    assert world.redeem(job_id, world.anna, 90) == (None, 0)
    assert world.redeem(job_id, world.anna, 95).amount == 5
    assert world.holds(world.anna) == client.claimed_of(job_id, world.anna.address) == 95


def test_a_voucher_takes_nothing_that_a_leaf_lives_on(world, refused):
    job_id = world.job(amount=100)
    leaves = world.settle(job_id, 1, {world.anna: 90})
    refused("NotCovered", world.redeem, job_id, world.ben, 11)
    assert world.redeem(job_id, world.ben, 10).amount == 10
    assert world.claim(leaves, world.anna).amount == 90
    assert money(world, job_id) == (100, 100, 0)


def test_a_batch_says_of_each_item_why_it_was_not_paid(world):
    client, poor, job_id = world.client, world.job(amount=10), world.job()
    short = world.settle(poor, 1, {world.anna: 8, world.ben: 9}, total=10)
    leaves = world.settle(job_id, 1, {world.anna: 5, world.ben: 6})
    world.claim(leaves, world.anna)
    items = [
        ClaimItem(where.job_id, who.address, *settlement.proof_for(where, who.address))
        for where, who in ((leaves, world.anna), (short, world.ben), (short, world.anna), (leaves, world.ben))
    ]
    items.append(replace(items[-1], cumulative=7))
    tx, amounts = client.claim_many(world.hub, items)
    assert amounts == [0, 9, 0, 6, 0]
    reasons = [
        bytes(log["reason"]) for log in client._events(client.w3.eth.get_transaction_receipt(tx), "ClaimSkipped")
    ]
    names = ("NothingToClaim(address,uint128)", "NotCovered(uint256,uint256)", "BadProof(address,uint128)")
    assert reasons == [keccak(name.encode())[:4] for name in names]


def test_a_permit_that_somebody_else_used_first_still_counts(world):
    """Whoever sees it in the open can spend it, and has given the allowance by that."""
    client, owner = world.client, world.owner
    contract, token = client._contract().functions, client._token(world.token).functions
    job_id = world.job(amount=0)
    for call in (
        lambda permit: contract.fundWithPermit(job_id, 70, *permit),
        lambda permit: contract.createJobWithPermit(_packed(world.params()), 70, *permit),
    ):
        permit = client._permission(owner, world.token, 70)
        client._sender.send(world.anna, token.permit(owner.address, client.escrow, 70, *permit))
        before = world.holds(client.escrow)
        client._sender.send(owner, call(permit))
        assert world.holds(client.escrow) == before + 70
    assert client.allowance(world.token, owner.address) == 0


def test_what_a_voucher_paid_is_reserved_until_a_leaf_counts_it(world):
    client, job_id = world.client, world.job(amount=200)
    world.redeem(job_id, world.anna, 70)
    assert money(world, job_id) == (70, 70, 130)
    leaves = world.settle(job_id, 1, {world.anna: 80, world.ben: 50})
    assert money(world, job_id) == (200, 70, 0)
    assert world.claim(leaves, world.anna).amount == 10
    assert money(world, job_id) == (130, 80, 70)
    assert client.advanced_of(job_id, world.anna.address) == 0
    assert world.claim(leaves, world.ben).amount == 50


def test_a_root_finds_no_room_where_vouchers_took_it(world, refused):
    """Who was paid by voucher goes on by voucher then: no money is promised twice, and none is stuck."""
    job_id = world.job(amount=100)
    world.redeem(job_id, world.anna, 70)
    refused("NotCovered", world.settle, job_id, 1, {world.anna: 70, world.ben: 20})
    leaves = world.settle(job_id, 1, {world.ben: 20})
    assert world.redeem(job_id, world.anna, 80).amount == 10
    assert world.claim(leaves, world.ben).amount == 20
    assert money(world, job_id) == (100, 100, 0)


def test_anyone_counts_a_leaf_that_has_nothing_left_to_pay(world, refused):
    job_id = world.job(amount=200)
    world.redeem(job_id, world.anna, 70)
    leaves = world.settle(job_id, 1, {world.anna: 60, world.ben: 50})
    assert money(world, job_id) == (180, 70, 20)
    assert world.count(leaves, world.anna, wallet=world.owner).amount == 0
    assert money(world, job_id) == (120, 70, 80)
    assert world.client.advanced_of(job_id, world.anna.address) == 10
    refused("NothingToClaim", world.count, leaves, world.anna)


def test_no_order_of_voucher_root_and_claim_starves_a_leaf(world):
    """The voucher falls between a root's making and its landing, and the root knows nothing of it."""
    job_id = world.job(amount=300)
    leaves = world.leaves(job_id, 1, {world.anna: 20, world.ben: 100})
    world.redeem(job_id, world.anna, 30)
    made = settlement.settle_leaves(settlement.leaves_file(job_id, 1, leaves.amounts))
    world.client.settle(world.hub, job_id, 1, made.root, made.total, made.data_hash)
    assert world.claim(leaves, world.ben).amount == 100
    assert world.count(leaves, world.anna).amount == 0
    assert money(world, job_id) == (130, 130, 170)


def test_everything_comes_out_at_the_end(world):
    client, job_id = world.client, world.job(amount=300)
    world.redeem(job_id, world.anna, 30)
    leaves = world.settle(job_id, 1, {world.anna: 50, world.ben: 100})
    world.redeem(job_id, world.ben, 120)
    world.advance(1501)
    client.reclaim(world.owner, job_id)
    assert client.job(job_id).free == 0
    for who in (world.anna, world.ben):
        world.count(leaves, who, wallet=world.owner)
    client.reclaim(world.owner, job_id)
    job = client.job(job_id)
    assert job.funded - job.refunded - job.claimed == 0
    assert (world.holds(world.anna), world.holds(world.ben)) == (50, 120)


def test_dust_is_paid_like_everything_and_moves_nothing(world, refused):
    """One unit to a leaf, to a voucher, into a job; and one that somebody sent the escrow without a job."""
    client, job_id, other = world.client, world.job(amount=3), world.job(amount=2)
    client.transfer_token(world.owner, world.token, client.escrow, 1)
    assert money(world, job_id) == (0, 0, 3)
    leaves = world.settle(job_id, 1, {world.anna: 1, world.ben: 1})
    assert world.claim(leaves, world.anna).amount == world.claim(leaves, world.ben).amount == 1
    assert world.redeem(job_id, world.ben, 2).amount == 1
    refused("NotCovered", world.redeem, job_id, world.anna, 2)
    client.fund(world.anna, job_id, 1)
    assert world.redeem(job_id, world.anna, 2).amount == 1
    assert money(world, job_id) == (4, 4, 0)
    world.advance(1501)
    assert (client.reclaim(world.owner, job_id).amount, client.reclaim(world.owner, other).amount) == (0, 2)


def test_who_gets_ahead_of_a_claim_only_pays_its_gas(world, refused):
    client, job_id = world.client, world.job()
    leaves = world.settle(job_id, 1, {world.anna: 10, world.ben: 20})
    amount, proof = settlement.proof_for(leaves, world.anna.address)
    fields = {"account": world.anna.address, "to": world.hub.address, "cumulative": amount, "tip": 3}
    message = {"jobId": job_id, **fields, "validUntil": client.now() + 10}
    signature = world.anna.sign_typed(client.domain, "ClaimTo", message)
    before = world.holds(world.hub), world.holds(world.owner)
    # The relay's transaction was seen, and another one sends it first: the tip is for whoever does the work.
    assert client.claim_to(world.owner, message, proof, signature).amount == 10
    assert (world.holds(world.hub), world.holds(world.owner)) == (before[0] + 7, before[1] + 3)
    refused("NothingToClaim", client.claim_to, world.ben, message, proof, signature)
    assert world.claim(leaves, world.ben, wallet=world.anna).amount == 20
    assert world.claim(leaves, world.ben) == (None, 0)
    voucher = world.voucher(job_id, world.ben, 25)
    assert client.redeem_voucher(world.anna, job_id, world.ben.address, 25, voucher).amount == 5
    assert world.redeem(job_id, world.ben, 25) == (None, 0)
    assert (world.holds(world.anna), world.holds(world.ben)) == (0, 25)
