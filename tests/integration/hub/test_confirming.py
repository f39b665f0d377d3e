"""Where nobody but the operator has earned to audit, workers confirm what it got, and nobody else's word."""

import pytest

from tests.fixtures_checking import CHECKED, Yard, cheat_at, moved
from tests.fixtures_hub import Job, Person, Town
from trainchain.core.hub import schema
from trainchain.core.segments import State


@pytest.fixture
def yard(town: Town) -> Yard:
    return Yard(town)


@pytest.fixture
def job(town: Town) -> Job:
    return town.publish(rounds=2, shards=6, check=CHECKED)


def honest(yard: Yard, job: Job, who: Person) -> Person:
    """A worker of whose work an audit has passed in the job."""
    work = yard.work(who, job, drawn=True)
    yard.answer(work)
    yard.audit(yard.operator, job)
    assert yard.verdict(work)[0] == "passed"
    return who


def test_a_worker_confirms_what_the_operator_got_and_the_cheat_loses(
    yard: Yard, town: Town, job: Job, anna: Person, ben: Person
) -> None:
    honest(yard, job, ben)
    work = yard.work(anna, job, segment=1, cheat=cheat_at(2))
    yard.answer(work)
    assert yard.take(ben, job) is None, "nobody asks ben before the operator has looked"
    town.clock.forward(1000)
    assert yard.take(ben, job) is None

    yard.audit(yard.operator, job)
    yard.answer(work)
    yard.audit(ben, job)

    assert yard.verdict(work) == ("failed", "audit.differs")
    assert [replay["role"] for replay in yard.evidence(work)["replays"]] == ["operator", "confirms"]
    assert yard.given(work)["forfeited"] == 1
    assert [row["fee"] > 0 for row in town.rows(schema.replays, job=job.id) if row["auditor"] == ben.address] == [True]


def test_a_cheat_s_second_wallet_saves_it_nothing(yard: Yard, town: Town, job: Job, anna: Person, ben: Person) -> None:
    friend = honest(yard, job, town.person())
    work = yard.work(anna, job, segment=1, cheat=cheat_at(2))
    yard.answer(work)
    yard.audit(yard.operator, job)
    yard.answer(work)
    yard.audit(friend, job, lambda state: work.states[2])

    assert yard.verdict(work) == ("answered", None), "it only says what was claimed"
    honest(yard, job, ben)
    yard.audit(ben, job)
    assert yard.verdict(work) == ("failed", "audit.differs")
    wrong = {row["auditor"] for row in town.rows(schema.replays, job=job.id) if row["forfeited"] is not None}
    assert wrong == {friend.address}


def test_an_owner_and_a_wallet_of_its_own_take_nobody_s_pay(yard: Yard, town: Town, job: Job, anna: Person) -> None:
    def lie(state: State) -> State:
        return moved(state, 0.005)

    friend = honest(yard, job, town.person())
    work = yard.work(anna, job, segment=1)
    yard.answer(work)
    yard.audit(job.owner, job, lie)
    yard.answer(work)
    for _ in range(12):
        assert yard.take(friend, job) is None, "the owner's word is confirmed by nobody who has not earned it"
        town.clock.forward(100)

    yard.audit(yard.operator, job)
    assert yard.verdict(work) == ("answered", None)
    yard.audit(friend, job, lie)
    assert yard.verdict(work) == ("answered", None)
    town.clock.forward(job.recipe.check.timeout + job.recipe.check.answer + 1)
    town.tick()
    assert yard.verdict(work) == ("unaudited", "audit.undecided")
    assert yard.given(work)["forfeited"] is None
