"""Pay waits for verdicts: what a pending audit, a rejection and an auditor's fee do to vouchers and settlements."""

from collections.abc import Mapping
from typing import Any

import pytest

from tests.fixtures_audits import drawn, forfeit_fees, replay, verdict
from tests.fixtures_hub import Job, Person, Town
from trainchain.chain.settlement import read_leaves
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import cashier, jobs, schema
from trainchain.core.models import Check
from trainchain.core.rewards import FEES_VESTING, NEVER, VESTING, Terms, audit_price, recount, round_price, totals


def work(job: Job, who: Person, shards: int) -> list[dict[str, Any]]:
    receipts = []
    for _ in range(shards):
        receipts.append(who.work(job))
        job.town.tick()
    return receipts


def amount(receipts: list[dict[str, Any]]) -> int:
    return sum(int(receipt["amount"]) for receipt in receipts)


def promised(who: Person, job: Job) -> int:
    told = who.get(f"/v1/jobs/{job.id}/voucher").raise_for_status().json()["voucher"]
    return int(told["cumulative"]) if told else 0


def settled(job: Job, who: Person) -> int:
    rows, paid = cashier.earned(job.town.hub, job.id)
    return totals(row for row in rows if row.key in paid).get(who.address, 0)


def test_nothing_vests_from_a_pending_audit_on_and_all_of_it_after_its_verdict(town: Town, anna: Person) -> None:
    job = town.publish(rounds=8, shards=2)
    receipts = [*work(job, anna, 2), drawn(job, anna), *work(job, anna, 10)]
    assert promised(anna, job) == settled(job, anna) == 0

    verdict(job, receipts[2])
    town.tick()

    assert promised(anna, job) == amount(receipts[: 13 - VESTING])
    assert settled(job, anna) == amount(receipts[: 12 - VESTING]), "of the rounds that are merged"


@pytest.mark.parametrize("code", ["audit.unaudited", "audit.undecided"])
def test_what_nobody_could_say_anything_about_is_paid(town: Town, anna: Person, code: str) -> None:
    job = town.publish(rounds=1, shards=2)
    first = drawn(job, anna)
    anna.work(job)
    verdict(job, first, code)
    town.tick()

    assert job.state == "settled"
    assert settled(job, anna) == promised(anna, job) == jobs.owed(town.hub, job.id) > 0


def test_a_rejection_costs_what_has_not_vested_and_nothing_else(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=11, shards=2)
    receipts = [*work(job, anna, 11), drawn(job, anna), *work(job, anna, 4)]
    before = promised(anna, job)
    others = work(job, ben, 1)
    verdict(job, receipts[11], "audit.differs")
    assert before == promised(anna, job) == amount(receipts[:2])
    receipts += work(job, anna, 5)

    lost = [row for row in town.rows(schema.contributions, job=job.id) if row["forfeited"] is not None]
    assert sorted(row["place"] for row in lost) == list(range(3, 17))
    assert jobs.owed(town.hub, job.id) == amount(receipts[:2] + receipts[16:] + others)
    assert job.view()["spent"] == str(jobs.owed(town.hub, job.id))

    assert job.state == "settled"
    assert promised(anna, job) == settled(job, anna) == amount(receipts[:2] + receipts[16:])
    assert town.chain.job(job.id).settled == jobs.owed(town.hub, job.id)


def test_a_job_that_has_ended_waits_for_its_last_verdict(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=1, shards=2)
    first = drawn(job, anna)
    theirs = ben.work(job)
    town.tick()

    assert job.state == "finished"
    answer = ben.get(f"/v1/jobs/{job.id}/voucher").json()
    assert (answer["voucher"], answer["ended"]) == (None, False)
    assert town.chain.job(job.id).total == 0
    verdict(job, first, "audit.silent")
    town.tick()

    assert job.state == "settled"
    assert (promised(anna, job), promised(ben, job)) == (0, amount([theirs]))
    assert town.chain.job(job.id).settled == amount([theirs])


def recounted(job: Job) -> list[dict[str, int]]:
    rows, _ = cashier.earned(job.town.hub, job.id)
    written = job.town.rows(schema.settlements, job=job.id)
    return recount(rows, [Terms(row["round"], row["ended"], row["limit"]) for row in written])


def on_chain(job: Job) -> list[dict[str, int]]:
    hub = job.town.hub
    return [
        dict(read_leaves(hub.objects.get(row["leaves"])).amounts)
        for row in job.town.rows(schema.settlements, job=job.id)
    ]


def test_a_verdict_that_comes_while_the_chain_is_asked_is_in_what_is_settled(
    town: Town, anna: Person, ben: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = town.publish(rounds=11, shards=2)
    receipts = [drawn(job, ben)]
    left = receipts[:]
    honest = town.port.settlement

    def meanwhile(job_id: str, terms: Terms, amounts: Mapping[str, int]) -> Any:
        if left:
            verdict(job, left.pop())
        return honest(job_id, terms, amounts)

    monkeypatch.setattr(town.port, "settlement", meanwhile)
    for _ in range(9):
        work(job, anna, 1)
        receipts += work(job, ben, 1)
    first = work(job, anna, 1)

    assert not left
    assert settled(job, ben) == promised(ben, job) == amount(receipts[:1])
    assert first
    assert on_chain(job) == recounted(job)


def test_a_settlement_made_anew_knows_every_verdict_that_came_before_it(
    town: Town, anna: Person, ben: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two verdicts on one worker, one before and one after a settlement that the chain then refuses."""
    job = town.publish(rounds=14, shards=2)
    settle, refused = town.port.settle, [True]

    def reverts(job_id: str, number: int, leaves: bytes) -> str:
        if refused:
            raise TrainChainError("chain.unreachable", "The chain is away.")
        return settle(job_id, number, leaves)

    monkeypatch.setattr(town.port, "settle", reverts)
    early = drawn(job, ben)
    work(job, anna, 11)
    (written,) = town.rows(schema.settlements, job=job.id)
    verdict(job, early, "audit.differs")
    late = drawn(job, ben)
    cashier._unwrite(town.hub, job.row, written["round"])
    verdict(job, late, "audit.differs")
    refused.clear()
    town.tick()
    theirs = work(job, ben, 2)

    rows, _ = cashier.earned(town.hub, job.id)
    lost = [row.forfeited for row in rows if row.forfeited != NEVER]
    assert len(lost) == 2
    assert max(lost) <= written["round"]
    finish(job, anna)
    assert settled(job, ben) == promised(ben, job) == amount(theirs)
    assert on_chain(job) == recounted(job)


def test_what_audits_may_cost_is_kept_back_for_every_round_that_was_opened(town: Town) -> None:
    check = Check(auditors="any", answer=3600, timeout=1800, before_merge=0, spend=0.5)
    job = town.publish(rounds=2, shards=2, check=check)

    assert jobs.owed(town.hub, job.id) == 0
    assert jobs.owed(town.hub, job.id, expected=True) == round_price(job.recipe, 1)
    assert audit_price(job.recipe, 1) > 0


def audited(job: Job, who: Person, auditor: Person) -> None:
    """A shard that an auditor finds nothing wrong with."""
    receipt = drawn(job, who)
    replay(job, receipt, auditor, 7)
    verdict(job, receipt)
    job.town.tick()


def finish(job: Job, who: Person) -> None:
    while (lease := who.lease(job)) is not None:
        who.contribute(lease).raise_for_status()
        job.town.tick()
    assert job.state == "settled"


def test_fees_vest_twenty_replays_later_and_stand_in_the_same_voucher_and_leaf(
    town: Town, anna: Person, ben: Person
) -> None:
    job = town.publish(rounds=2, shards=FEES_VESTING + 2)
    for number in range(FEES_VESTING + 2):
        assert promised(ben, job) == max(0, number - FEES_VESTING) * 7
        audited(job, anna, ben)
    assert promised(ben, job) == 14

    mine = work(job, ben, 1)
    finish(job, anna)

    assert settled(job, ben) == promised(ben, job) == amount(mine) + 7 * (FEES_VESTING + 2)
    assert town.chain.job(job.id).settled == jobs.owed(town.hub, job.id)
    assert on_chain(job)[-1][ben.address] == amount(mine) + 7 * (FEES_VESTING + 2)
    assert on_chain(job) == recounted(job)


def test_an_auditor_found_wrong_loses_the_fees_that_have_not_vested(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=2, shards=FEES_VESTING + 1)
    for _ in range(FEES_VESTING + 1):
        audited(job, anna, ben)

    forfeit_fees(job, ben)
    finish(job, anna)

    assert settled(job, ben) == promised(ben, job) == 7
    assert town.chain.job(job.id).settled == jobs.owed(town.hub, job.id)
    assert on_chain(job) == recounted(job)


def told(who: Person) -> dict[str, Any]:
    (one,) = who.get("/v1/earned").raise_for_status().json()["jobs"]
    return dict(one)


def states(who: Person) -> list[str]:
    return [shard["state"] for shard in told(who)["shards"]]


def test_a_wallet_is_told_what_is_held_what_it_lost_and_why(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=12, shards=2)
    receipts = [*work(job, anna, 10), drawn(job, anna), *work(job, anna, 2)]
    voucher = anna.get(f"/v1/jobs/{job.id}/voucher").json()
    assert (voucher["through"], voucher["waits"], voucher["forfeited"]) == (13, 11, [])
    assert states(anna) == ["settled"] + ["held"] * 12
    assert (told(anna)["waits"], told(anna)["shards"][10]["audit"]) == (11, "drawn")

    verdict(job, receipts[10], "audit.differs")
    receipts += [drawn(job, anna)]
    verdict(job, receipts[13], "audit.silent")
    work(job, anna, 1)

    here = told(anna)
    first = {"first": 2, "last": 13, "lease": receipts[10]["lease"], "code": "audit.differs", "evidence": None}
    second = {"first": 14, "last": 14, "lease": receipts[13]["lease"], "code": "audit.silent", "evidence": None}
    assert here["rejections"] == anna.get(f"/v1/jobs/{job.id}/voucher").json()["forfeited"] == [first, second]
    assert [shard["state"] for shard in here["shards"]] == ["settled"] + ["forfeited"] * 13 + ["vesting"]
    assert here["forfeited"] == str(amount(receipts[1:14]))
    assert (here["vested"], here["waits"]) == (str(amount(receipts[:1])), None)
    assert here["fees"] == {"replays": 0, "accepted": "0", "vested": "0", "forfeited": "0", "last": None}


def test_an_auditor_is_answerits_fees_though_it_trains_nothing(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=1, shards=2)
    audited(job, anna, ben)
    assert told(ben)["vested"] == "0"
    audited(job, anna, ben)

    here = told(ben)
    assert (here["shards"], here["accepted"], here["vested"], here["settled"]) == ([], "0", "14", "14")
    assert here["fees"].pop("last") > 0
    assert here["fees"] == {"replays": 2, "accepted": "14", "vested": "14", "forfeited": "0"}
