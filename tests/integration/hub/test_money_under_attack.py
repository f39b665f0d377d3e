"""Money that nobody may lose, steal or burn: work that is worth nothing, vouchers beside leaves, owners who change
hands, and strangers who would have the hub pay their gas."""

from typing import Any

import pytest

from tests.fixtures_hub import COIN, Job, Person, Town, job_files, recipe
from tests.integration.hub.test_vouchers import amounts, away, post, voucher_of, work
from trainchain.chain.settlement import leaves_file, proof_for, read_leaves, settle_leaves
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
    item = item_of(town, who, job)
    return town.chain.claim(who.wallet, job.id, who.address, int(item["cumulative"]), item["proof"]).amount


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


@pytest.fixture
def settled(town: Town) -> tuple[Job, Person, dict[str, Any]]:
    """A settled job, somebody whom it paid, and the claim that it owes them."""
    job, who = town.publish(rounds=1, shards=1), town.person()
    work(job, who, 1)
    return job, who, item_of(town, who, job)


def item_of(town: Town, who: Person, job: Job) -> dict[str, Any]:
    (leaves,) = [row["leaves"] for row in town.rows(schema.settlements, job=job.id) if row["tx"]][-1:]
    leaf, proof = proof_for(read_leaves(who.fetch(leaves)), who.address)
    return {"job": job.id, "account": who.address, "cumulative": str(leaf), "proof": proof}


def test_nobody_has_the_hub_pay_gas_for_what_it_never_accepted(town: Town) -> None:
    """An escrow of the thief's own, settled by the thief in any token, with as many leaves as the hub has gas for."""
    thief, friend = town.person(), town.person()
    town.give(thief.address, COIN)
    job = town.publish(owner=thief, escrow=0)
    job.create_escrow(COIN, hub=thief.address)
    made = settle_leaves(leaves := leaves_file(job.id, 1, {friend.address: 1, thief.address: 1}))
    town.chain.settle(thief.wallet, job.id, 1, made.root, made.total, made.data_hash)
    leaf, proof = proof_for(read_leaves(leaves), friend.address)
    blocks = town.chain.node.head()

    answer = post(town, {"job": job.id, "account": friend.address, "cumulative": str(leaf), "proof": proof})

    assert answer.json()["code"] == "claim.nothing"
    assert town.chain.node.head() == blocks, "nothing was sent"


def test_a_stranger_who_names_an_account_does_not_keep_it_from_being_paid(
    town: Town, settled: tuple[Job, Person, dict[str, Any]], anna: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, who, item = settled
    job = town.publish(rounds=1, shards=1)
    work(job, anna, 1)
    forged = {**item, "cumulative": "1"}
    honest, inside = town.port.would_pay, []

    def meanwhile(claims: Any) -> list[int]:
        monkeypatch.setattr(town.port, "would_pay", honest)
        inside.append(post(town, item))
        return honest(claims)

    assert post(town, forged, item_of(town, anna, job)).raise_for_status().json()["paid"][0] == "0"
    monkeypatch.setattr(town.port, "would_pay", meanwhile)

    assert post(town, forged).json()["code"] == "claim.nothing"

    assert inside[0].raise_for_status().json()["paid"] == [item["cumulative"]]
    assert town.chain.token_balance(town.token, who.address) == int(item["cumulative"])


def test_a_job_whose_owner_names_another_hub_ends_while_this_one_can_settle(town: Town, anna: Person) -> None:
    """The other owes nothing for what this one accepted, and this one's vouchers lapse when it takes over."""
    job = town.publish(rounds=12, shards=2)
    receipts = work(job, anna, 3)
    town.chain.propose_hub(job.owner.wallet, job.id, job.owner.address)
    town.clock.forward(LOOK_SECONDS)

    town.tick()

    assert job.state == "settled"
    assert anna.lease(job) is None
    assert town.chain.settlements(job.id)[-1].total == sum(amounts(receipts))


def test_a_hub_that_another_has_replaced_meanwhile_tries_to_settle_no_more(
    town: Town, anna: Person, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = town.publish(rounds=1, shards=1)
    with monkeypatch.context() as patch:
        patch.setattr(town.port, "settle", away)
        work(job, anna, 1)
    town.chain.propose_hub(job.owner.wallet, job.id, job.owner.address)
    town.clock.forward(job.recipe.pay.grace + 1)
    town.tick()
    caplog.clear()

    town.tick()

    assert job.state == "settled"
    assert town.chain.settlements(job.id) == []
    assert caplog.messages == []


def test_a_proposal_that_is_taken_back_changes_nothing(town: Town, anna: Person) -> None:
    job = town.publish(rounds=2, shards=1)
    town.chain.propose_hub(job.owner.wallet, job.id, town.keys.address)
    town.clock.forward(LOOK_SECONDS)
    town.tick()

    work(job, anna, 2)

    assert job.state == "settled"


def test_jobs_that_nobody_has_paid_for_cost_the_hub_no_look_at_the_chain(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may publish as many as they like; the pay of all others must not wait for them."""
    waiting = town.publish(escrow=0)
    asked: list[str] = []
    honest = town.port.job
    monkeypatch.setattr(town.port, "job", lambda job_id: (asked.append(job_id), honest(job_id))[1])
    town.clock.forward(LOOK_SECONDS)

    town.tick()

    assert waiting.state == "unfunded"
    assert waiting.id not in asked
    waiting.create_escrow(waiting.recipe.pay.budget)
    waiting.owner.post(f"/v1/jobs/{waiting.id}/fund").raise_for_status()
    town.tick()
    assert waiting.state == "running"
