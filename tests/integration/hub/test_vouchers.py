"""What a worker has in hand before any settlement: its place in the queue, its voucher; and claims sent by the hub."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.fixtures_hub import COIN, Job, Person, Town, job_files, recipe
from trainchain.chain import eip712
from trainchain.chain.settlement import check_against_chain, proof_for
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema
from trainchain.core.hub.cashier import LOOK_SECONDS
from trainchain.core.hub.relay import MAX_AT_ONCE, WAIT_SECONDS
from trainchain.core.messages import Voucher
from trainchain.core.models import ResolvedRecipe
from trainchain.core.rewards import VESTING, round_price, shard_reward


def work(job: Job, who: Person, shards: int) -> list[dict[str, Any]]:
    receipts = []
    for _ in range(shards):
        receipts.append(who.work(job))
        job.town.tick()
    return receipts


def amounts(receipts: list[dict[str, Any]]) -> list[int]:
    return [int(receipt["amount"]) for receipt in receipts]


def voucher_of(who: Person, job: Job) -> dict[str, Any]:
    answer: dict[str, Any] = who.get(f"/v1/jobs/{job.id}/voucher").raise_for_status().json()
    return answer


def away(*_: Any) -> Any:
    raise TrainChainError("chain.unreachable", "The chain is away.")


def test_every_receipt_has_its_place_and_pay_vests_nine_later(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=6, shards=4)
    receipts = work(job, anna, 8)
    other = ben.work(job)
    receipts += work(job, anna, 4)

    assert [receipt["place"] for receipt in receipts] == list(range(1, 13))
    assert (other["place"], other["voucher"]) == (1, None)
    assert [receipt["voucher"] for receipt in receipts[:VESTING]] == [None] * VESTING
    domain = eip712.Domain(town.chain.chain_id, town.chain.escrow)
    for number, receipt in enumerate(receipts[VESTING:], 1):
        voucher = Voucher.model_validate(receipt["voucher"])
        assert voucher.cumulative == sum(amounts(receipts[:number]))
        assert (voucher.jobId, voucher.account, voucher.hub) == (job.id, anna.address, town.keys.address)
        assert eip712.recover(domain, "Voucher", voucher.fields(), voucher.signature) == town.keys.address
    answer = voucher_of(anna, job)
    assert (answer["voucher"], answer["ended"]) == (receipts[-1]["voucher"], False)
    answer = voucher_of(ben, job)
    assert (answer["voucher"], answer["ended"]) == (None, False)


def test_a_repeated_contribution_gets_its_receipt_and_the_newest_voucher(town: Town, anna: Person) -> None:
    job = town.publish(rounds=6, shards=2)
    work(job, anna, 9)
    lease = anna.must_lease(job)
    receipt = anna.contribute(lease, 5).raise_for_status().json()

    again = anna.contribute(lease, 5)

    assert again.json()["code"] == "contribution.repeat"
    assert again.json()["receipt"] == receipt
    assert receipt["voucher"] is not None


def test_the_escrow_pays_a_voucher_without_the_hub(town: Town, anna: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    job = town.publish(rounds=6, shards=2)
    with monkeypatch.context() as patch:
        patch.setattr(town.port, "settle", away)
        receipts = work(job, anna, 11)
    voucher = receipts[-1]["voucher"]
    town.chain.transfer_gas(town.rich, anna.address, COIN)

    paid = town.chain.redeem_voucher(
        anna.wallet, job.id, anna.address, int(voucher["cumulative"]), voucher["signature"]
    )

    assert paid.amount == sum(amounts(receipts[:2])) == town.chain.token_balance(town.token, anna.address)
    assert town.chain.job(job.id).total == 0, "nothing was ever settled"
    town.tick()
    finish_with(job, anna)
    assert job.state == "settled"
    on_chain = town.chain.job(job.id)
    assert (on_chain.settled, on_chain.total) == (on_chain.total, sum(amounts(receipts)) + last_of(job))
    assert on_chain.settled - on_chain.total == 0, "what the voucher paid is counted, and the owner gets the rest back"


def finish_with(job: Job, who: Person) -> None:
    while (lease := who.lease(job)) is not None:
        who.contribute(lease).raise_for_status()
        job.town.tick()


def last_of(job: Job) -> int:
    return shard_reward(job.recipe, job.recipe.rounds, job.recipe.shards - 1)


def test_when_a_job_ends_everything_is_vouched_for_though_the_chain_is_away(
    town: Town, anna: Person, ben: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = town.publish(rounds=2, shards=2)
    monkeypatch.setattr(town.port, "settle", away)
    receipts = [*work(job, anna, 3), *work(job, ben, 1)]

    assert job.state == "finished"
    for who, theirs in ((anna, receipts[:3]), (ben, receipts[3:])):
        told = voucher_of(who, job)
        assert (told["ended"], int(told["voucher"]["cumulative"])) == (True, sum(amounts(theirs)))
    answer = voucher_of(town.person(), job)
    assert (answer["voucher"], answer["ended"]) == (None, True)


def test_a_held_lease_keeps_a_job_s_pay_from_vesting(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=2, shards=2)
    work(job, anna, 1)
    lease = ben.must_lease(job)
    job.owner.post(f"/v1/jobs/{job.id}/cancel").raise_for_status()
    town.tick()
    answer = voucher_of(anna, job)
    assert (answer["voucher"], answer["ended"]) == (None, False)

    ben.contribute(lease).raise_for_status()

    assert int(voucher_of(anna, job)["voucher"]["cumulative"]) == shard_reward(job.recipe, 1, 0)


def test_a_job_whose_owner_halts_its_escrow_ends_and_pays_by_vouchers(town: Town, anna: Person) -> None:
    job = town.publish(rounds=12, shards=2)
    receipts = work(job, anna, 9)
    town.chain.halt(job.owner.wallet, job.id)
    town.clock.forward(LOOK_SECONDS)

    town.tick()

    assert job.state == "settled"
    assert anna.lease(job) is None
    assert town.chain.settlements(job.id) == []
    voucher = voucher_of(anna, job)["voucher"]
    assert int(voucher["cumulative"]) == sum(amounts(receipts))
    town.chain.transfer_gas(town.rich, anna.address, COIN)
    town.chain.redeem_voucher(anna.wallet, job.id, anna.address, int(voucher["cumulative"]), voucher["signature"])
    assert town.chain.token_balance(town.token, anna.address) == sum(amounts(receipts))


def test_a_job_that_waits_for_money_ends_with_its_escrow_too(town: Town, anna: Person) -> None:
    job = town.publish(rounds=2, shards=1, escrow=round_price(a_job(rounds=2, shards=1), 1))
    receipts = work(job, anna, 1)
    assert job.state == "unfunded"
    town.chain.halt(job.owner.wallet, job.id)
    town.clock.forward(LOOK_SECONDS)

    town.tick()

    assert job.state == "settled"
    assert int(voucher_of(anna, job)["voucher"]["cumulative"]) == amounts(receipts)[0]


def a_job(**sizes: int) -> ResolvedRecipe:
    return recipe(job_files(), **sizes)


def test_a_job_that_was_closed_early_ends_and_is_settled_in_the_grace_time(town: Town, anna: Person) -> None:
    job = town.publish(rounds=12, shards=2)
    receipts = work(job, anna, 3)
    agreed = town.keys.sign_typed(town.chain.domain, "CloseEarly", {"jobId": job.id})
    town.chain.close_early(job.owner.wallet, job.id, agreed)
    town.clock.forward(LOOK_SECONDS)

    town.tick()

    assert job.state == "settled"
    assert town.chain.settlements(job.id)[-1].total == sum(amounts(receipts))


def test_a_job_whose_window_closed_while_its_hub_was_away_comes_to_its_end(town: Town, anna: Person) -> None:
    job = town.publish(rounds=2, shards=1)
    anna.work(job)
    town.clock.forward(job.recipe.pay.deadline + job.recipe.pay.grace + 1)

    town.tick()

    assert job.state == "closed"
    assert town.chain.settlements(job.id) == []


def test_what_a_wallet_has_earned_is_told_by_shard(town: Town, anna: Person) -> None:
    job = town.publish(rounds=6, shards=2)
    receipts = work(job, anna, 11)

    (told,) = [one for one in anna.get("/v1/earned").json()["jobs"] if one["job"] == job.id]

    shards = told.pop("shards")
    (settled,) = town.rows(schema.settlements, job=job.id)
    assert told == {
        "job": job.id,
        "name": "tiny",
        "token": town.token,
        "state": "running",
        "ended": False,
        "accepted": str(sum(amounts(receipts))),
        "vested": str(sum(amounts(receipts[:2]))),
        "settled": str(amounts(receipts)[0]),
        "forfeited": "0",
        "waits": None,
        "rejections": [],
        "fees": {"replays": 0, "accepted": "0", "vested": "0", "forfeited": "0", "last": None},
    }
    assert [(one["place"], one["lease"], one["amount"]) for one in shards] == [
        (receipt["place"], receipt["lease"], receipt["amount"]) for receipt in receipts
    ]
    assert [one["state"] for one in shards] == ["settled", "vested", *["vesting"] * VESTING]
    assert [one["settlement"] for one in shards[:2]] == [settled["round"], None]
    work(job, anna, 1)
    told = next(one for one in anna.get("/v1/earned").json()["jobs"] if one["job"] == job.id)
    assert {one["state"] for one in told["shards"]} == {"settled"}
    assert told["accepted"] == told["vested"] == told["settled"]
    assert told["ended"]


@pytest.fixture
def settled(town: Town) -> tuple[Job, Person, dict[str, Any]]:
    """A settled job, somebody whom it paid, and the claim that it owes them."""
    job, who = town.publish(rounds=1, shards=1), town.person()
    work(job, who, 1)
    row = town.row(schema.settlements, job=job.id)
    (on_chain,) = town.chain.settlements(job.id)
    cumulative, proof = proof_for(check_against_chain(who.fetch(row["leaves"]), on_chain), who.address)
    return job, who, {"job": job.id, "account": who.address, "cumulative": str(cumulative), "proof": proof}


def post(town: Town, *items: dict[str, Any]) -> Any:
    """Without a session: anybody may ask for anybody's pay."""
    return town.http.post(f"{town.url}/v1/claims", json={"items": items})


def test_a_relayed_claim_pays_its_account_and_no_gas_of_its(
    town: Town, settled: tuple[Job, Person, dict[str, Any]]
) -> None:
    _, who, item = settled

    answer = post(town, item).raise_for_status().json()

    assert answer["paid"] == [item["cumulative"]]
    assert town.chain.token_balance(town.token, who.address) == int(item["cumulative"])
    assert town.chain.gas_balance(who.address) == 0
    early = post(town, item)
    assert (early.status_code, early.json()["code"]) == (429, "claim.too_often")
    town.clock.forward(WAIT_SECONDS)
    again = post(town, item)
    assert (again.status_code, again.json()["code"]) == (409, "claim.nothing")
    assert post(town, item).json()["code"] == "claim.nothing", "what was not sent does not count"


def test_claims_that_wait_for_a_slow_chain_leave_the_hub_to_others(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    job = town.publish(rounds=1, shards=MAX_AT_ONCE + 1)
    people = [town.person() for _ in range(MAX_AT_ONCE + 1)]
    for who in people:
        work(job, who, 1)
    leaves = check_against_chain(
        people[0].fetch(town.rows(schema.settlements, job=job.id)[-1]["leaves"]), town.chain.settlements(job.id)[-1]
    )
    items = []
    for who in people:
        cumulative, proof = proof_for(leaves, who.address)
        items.append({"job": job.id, "account": who.address, "cumulative": str(cumulative), "proof": proof})
    begun, go = threading.Semaphore(0), threading.Event()

    def slowly(_: Any) -> Any:
        begun.release()
        assert go.wait(60)
        raise TrainChainError("chain.timeout", "No block came.")

    with ThreadPoolExecutor() as pool, monkeypatch.context() as patch:
        patch.setattr(town.port, "claim_many", slowly)
        waiting = [pool.submit(post, town, item) for item in items[:MAX_AT_ONCE]]
        for _ in waiting:
            assert begun.acquire(timeout=60)
        more = post(town, items[-1])
        go.set()
        assert [answer.result().json()["code"] for answer in waiting] == ["chain.timeout"] * MAX_AT_ONCE
    assert (more.status_code, more.json()["code"]) == (429, "claim.too_often")
    assert post(town, items[-1]).json()["paid"] == [items[-1]["cumulative"]]


def test_a_bad_item_does_not_keep_the_others_from_being_paid(
    town: Town, settled: tuple[Job, Person, dict[str, Any]], anna: Person
) -> None:
    _, who, item = settled
    blocks = town.chain.node.head()
    forged = {**item, "account": anna.address}

    assert post(town, forged).json()["code"] == "claim.nothing"
    assert town.chain.node.head() == blocks, "nothing was sent"
    answer = post(town, forged, item).raise_for_status().json()

    assert answer["paid"] == ["0", item["cumulative"]]
    assert town.chain.token_balance(town.token, who.address) == int(item["cumulative"])
    assert post(town, item).json()["code"] == "claim.too_often"
    assert post(town, forged).json()["code"] == "claim.nothing", "who was not paid need not wait"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"job": "0x" + "ab" * 32}, "job.unknown"),
        ({"job": "a job"}, "http.bad_request"),
        ({"account": "0x12"}, "http.bad_request"),
        ({"cumulative": "-1"}, "http.bad_request"),
        ({"proof": ["0x" + "ab" * 32] * 65}, "http.bad_request"),
        ({"more": 1}, "http.bad_request"),
    ],
)
def test_a_malformed_claim_is_refused(
    town: Town, settled: tuple[Job, Person, dict[str, Any]], changes: dict[str, Any], code: str
) -> None:
    blocks = town.chain.node.head()

    assert post(town, {**settled[2], **changes}).json()["code"] == code
    assert town.chain.node.head() == blocks


def test_a_batch_has_an_end(town: Town, settled: tuple[Job, Person, dict[str, Any]]) -> None:
    assert post(town, *[settled[2]] * 51).json()["code"] == "http.bad_request"
    assert post(town).json()["code"] == "http.bad_request"


def test_a_hub_that_does_not_relay_says_so(
    town: Town, settled: tuple[Job, Person, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert town.ask("/v1/hub")["chain"]["relays"] is True
    monkeypatch.setattr(town.port, "relays", False)

    answer = post(town, settled[2])

    assert (answer.status_code, answer.json()["code"]) == (403, "claim.not_relayed")
    assert town.ask("/v1/hub")["chain"]["relays"] is False
