"""Money that nobody may lose, steal or burn: work that is worth nothing, vouchers beside leaves, owners who change
hands, and strangers who would have the hub pay their gas."""

import pytest

from tests.fixtures_hub import COIN, Job, Person, Town, job_files, recipe
from tests.integration.hub.test_vouchers import amounts, away, voucher_of, work
from trainchain.chain.settlement import proof_for, read_leaves
from trainchain.core.hub import schema
from trainchain.core.hub.cashier import LOOK_SECONDS
from trainchain.core.rewards import job_price


def test_a_job_whose_work_is_worth_nothing_comes_to_its_end(town: Town, anna: Person) -> None:
    job = town.publish(rounds=2, shards=1, per_million=1, budget=10)

    receipts = work(job, anna, 2)

    assert amounts(receipts) == [0, 0]
    assert job.state == "settled"
    assert town.chain.settlements(job.id) == []
    (told,) = [one for one in anna.get("/v1/earned").json()["jobs"] if one["job"] == job.id]
    assert (told["accepted"], told["settled"], told["ended"]) == ("0", "0", True)


def redeem(town: Town, who: Person, job: Job) -> int:
    """Have the hub's newest voucher paid with one's own gas."""
    town.chain.transfer_gas(town.rich, who.address, COIN)
    voucher = voucher_of(who, job)["voucher"]
    return town.chain.redeem_voucher(
        who.wallet, job.id, who.address, int(voucher["cumulative"]), voucher["signature"]
    ).amount


def claim(town: Town, who: Person, job: Job) -> int:
    """Have the leaf in the newest settlement paid with one's own gas."""
    town.chain.transfer_gas(town.rich, who.address, COIN)
    (leaves,) = [row["leaves"] for row in town.rows(schema.settlements, job=job.id) if row["tx"]][-1:]
    leaf, proof = proof_for(read_leaves(who.fetch(leaves)), who.address)
    return town.chain.claim(who.wallet, job.id, who.address, leaf, proof).amount


def test_vouchers_that_leave_nothing_to_settle_cost_the_hub_no_gas(
    town: Town, anna: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(job_files(), rounds=6, shards=2)
    job = town.publish(rounds=6, shards=2, escrow=job_price(made))
    receipts = work(job, anna, 11)
    assert job.row["settled_round"]
    monkeypatch.setattr(town.port, "settle", away)
    receipts += work(job, anna, 1)
    assert claim(town, anna, job) + redeem(town, anna, job) == sum(amounts(receipts))
    monkeypatch.undo()
    town.tick()
    blocks = town.chain.node.head()

    for _ in range(3):
        town.clock.forward(5)
        town.tick()

    assert town.chain.node.head() == blocks, "the hub sends nothing that changes nothing"
    town.clock.forward(job.recipe.pay.deadline + job.recipe.pay.grace)
    town.tick()
    assert job.state == "closed"
    on_chain = town.chain.job(job.id)
    assert on_chain.settled == on_chain.claimed == sum(amounts(receipts))


def test_a_voucher_that_is_paid_where_a_leaf_lies_keeps_nothing_from_the_owner(town: Town, anna: Person) -> None:
    job = town.publish(rounds=2, shards=1)
    earned = sum(amounts(work(job, anna, 2)))
    assert job.state == "settled"
    assert redeem(town, anna, job) == earned
    assert town.chain.job(job.id).settled == 2 * earned, "reserved twice"
    town.clock.forward(job.recipe.pay.deadline + job.recipe.pay.grace + 1)

    town.tick()

    assert job.state == "closed"
    assert town.chain.job(job.id).settled == earned
    assert town.chain.reclaim(job.owner.wallet, job.id).amount == job.recipe.pay.budget - earned


def test_of_a_halted_job_too_the_owner_gets_back_what_vouchers_paid_twice(
    town: Town, anna: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = town.publish(rounds=6, shards=2)
    with monkeypatch.context() as patch:
        patch.setattr(town.port, "settle", away)
        work(job, anna, 10)
        assert redeem(town, anna, job)
    town.tick()
    assert town.chain.job(job.id).total
    town.chain.halt(job.owner.wallet, job.id)
    town.clock.forward(LOOK_SECONDS)
    town.tick()
    assert job.state == "settled"
    town.clock.forward(job.recipe.pay.grace + 1)

    town.tick()

    on_chain = town.chain.job(job.id)
    assert on_chain.settled == on_chain.claimed
    assert job.state == "closed", "its time ran from the halt"
