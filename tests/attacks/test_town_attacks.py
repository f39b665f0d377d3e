"""Cheats over HTTP against a real hub with real signatures and money, to each job's end; the training is a toy.

Whoever cheats is out by at least what a draw went by, and who works beside is paid to the last unit.
"""

from collections.abc import Iterator

import pytest

from tests.fixtures_checking import CHECKED, ENDS, Work, Yard, cheat_at, moved
from tests.fixtures_hub import Job, Person, Town
from trainchain.core.hub import auditors, schema
from trainchain.core.hub.auditors import STEP
from trainchain.core.rewards import VESTING
from trainchain.core.segments import State, state_root

HALF = len(ENDS) // 2


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    made = Town(tmp_path_factory.mktemp("town"))
    yield made
    made.close()


@pytest.fixture
def yard(town: Town) -> Yard:
    return Yard(town)


@pytest.fixture
def anna(town: Town) -> Person:
    return town.person()


@pytest.fixture
def ben(town: Town) -> Person:
    return town.person()


def judge(yard: Yard, job: Job, work: Work) -> tuple[str, str | None]:
    """Owner and operator replay what is answered, as often as it takes."""
    for auditor in (job.owner, yard.operator):
        if yard.row(work)["state"] != "answered":
            break
        yard.audit(auditor, job)
        if yard.row(work)["wants"]:
            yard.answer(work)
    return yard.verdict(work)


def finish(yard: Yard, job: Job) -> dict[str, int]:
    """The job's end: time passes, and the last settlement is written. What each is paid, but auditors' fees."""
    town = yard.town
    if job.state == "running":
        job.owner.post(f"/v1/jobs/{job.id}/cancel").raise_for_status()
    for _ in range(4):
        town.tick()
        town.clock.forward(1 + job.recipe.check.timeout)
    town.tick()
    assert job.state in ("settled", "closed")
    paid: dict[str, int] = {}
    for settlement in job.view()["settlements"]:
        paid |= dict(town.ask(f"/v1/objects/{settlement['leaves']}")["leaves"])
    audited = {job.owner.address, yard.operator.address}
    return {account: int(amount) for account, amount in paid.items() if account not in audited}


def forged(at: int, state: State) -> State:
    """No segment is what training gives."""
    return moved(state, 0.01) if at else state


def lazy(at: int, state: State) -> State:
    """Nor is any of the second half."""
    return moved(state, 0.01) if at > HALF else state


def worth(*works: Work) -> int:
    return sum(int(work.receipt["amount"]) for work in works)


def test_a_free_rider_is_caught_by_its_first_shard_and_others_are_paid(
    yard: Yard, town: Town, anna: Person, ben: Person
) -> None:
    job = town.publish(rounds=1, shards=4, check=CHECKED)
    good, bad = yard.passed(anna, job), yard.work(ben, job, cheat=forged)
    yard.answer(bad)

    assert judge(yard, job, bad) == ("failed", "audit.differs")
    assert finish(yard, job) == {anna.address: worth(good)}


@pytest.mark.parametrize("segment", range(len(ENDS)))
def test_a_lazy_half_is_caught_where_it_was_lazy(yard: Yard, town: Town, anna: Person, segment: int) -> None:
    job = town.publish(rounds=1, shards=2, check=CHECKED)
    work = yard.work(anna, job, segment=segment, cheat=lazy)
    yard.answer(work)

    forged = segment >= HALF
    assert judge(yard, job, work) == (("failed", "audit.differs") if forged else ("passed", "audit.passed"))
    assert finish(yard, job) == ({} if forged else {anna.address: worth(work)})


@pytest.mark.long
def test_fifty_wallets_of_one_person_get_fifty_shards_looked_at_and_nothing_else(yard: Yard, town: Town) -> None:
    """Ten here: each first shard is drawn, each is rejected, and a fresh wallet holds one lease at a time."""
    job = town.publish(rounds=1, shards=10, check=CHECKED)
    for _ in range(10):
        wallet = town.person()
        lease = wallet.must_lease(job)
        assert wallet.lease(job) is None
        work = yard.work(wallet, job, lease=lease, cheat=forged)
        yard.answer(work)
        assert judge(yard, job, work) == ("failed", "audit.differs")

    assert finish(yard, job) == {}


def test_who_keeps_silent_when_the_draw_is_bad_loses_what_had_not_vested(yard: Yard, town: Town, anna: Person) -> None:
    """And no more: what had vested before stays its own."""
    job = town.publish(rounds=1, shards=14, check=CHECKED)
    works = [yard.passed(anna, job), *(yard.work(anna, job, drawn=False) for _ in range(12))]
    bad = yard.work(anna, job, drawn=True, cheat=cheat_at(2))
    town.clock.forward(job.recipe.check.answer + 1)
    town.tick()

    assert yard.verdict(bad) == ("failed", "audit.silent")
    vested = len(works) - VESTING
    assert finish(yard, job) == {anna.address: worth(*works[:vested])}


def test_the_last_shard_before_a_job_ends_is_no_safer_than_another(yard: Yard, town: Town, anna: Person) -> None:
    """The owner cancels, or the last round is over: what is drawn still has its verdict before anything vests."""
    job = town.publish(rounds=1, shards=6, check=CHECKED)
    good = [yard.passed(anna, job), *(yard.work(anna, job, drawn=False) for _ in range(3))]
    bad = yard.work(anna, job, drawn=True, segment=0, cheat=cheat_at(1))
    job.owner.post(f"/v1/jobs/{job.id}/cancel").raise_for_status()
    town.tick()
    assert job.state == "cancelled", "it waits for the verdict"
    yard.answer(bad)

    assert judge(yard, job, bad) == ("failed", "audit.differs")
    assert finish(yard, job) == {}
    assert all(yard.given(work)["forfeited"] for work in good)


def test_silence_at_the_very_end_is_silence(yard: Yard, town: Town, anna: Person) -> None:
    """Who hands in forged work at the deadline and never answers is not paid for want of time."""
    job = town.publish(rounds=1, shards=3, check=CHECKED)
    lease = anna.must_lease(job)
    town.clock.forward(15)
    work = yard.work(anna, job, lease=lease, drawn=True, cheat=cheat_at(2))
    job.owner.post(f"/v1/jobs/{job.id}/cancel").raise_for_status()
    deadline = town.row(schema.jobs, id=job.id)["deadline"]
    town.clock.at = max(town.clock.at, deadline)
    town.tick()
    town.clock.forward(job.recipe.check.answer + job.recipe.pay.grace)
    town.tick()

    assert yard.verdict(work) == ("failed", "audit.silent")


def test_a_second_root_after_a_bad_draw_changes_nothing(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=2, check=CHECKED)
    work = yard.work(anna, job, drawn=True, segment=1, cheat=cheat_at(2))
    again = yard.train(anna, job, work.lease, yard.data[work.id])
    answer = anna.contribute(work.lease, again.data, stateRoot=state_root(again.leaves))
    assert answer.status_code >= 400
    assert yard.given(work)["second"] is not None, "both are kept, with both signatures"
    yard.answer(work)

    assert judge(yard, job, work) == ("failed", "audit.differs")


@pytest.mark.long
def test_an_auditor_who_sits_on_a_replay_holds_nobody_up(yard: Yard, town: Town, anna: Person) -> None:
    """It beats and never replays: its time is a share of what there is, and another goes on."""
    job = town.publish(rounds=1, shards=24, check=CHECKED)
    sitter = yard.veteran(job)
    work = yard.work(anna, job, drawn=True, cheat=forged)
    yard.answer(work)
    offer = yard.must_take(sitter, job)
    assert offer["target"] == work.id
    for _ in range(int(job.recipe.check.timeout // 15)):
        town.clock.forward(15)
        told = {"step": 0, "steps": 1, "tokens_per_second": 0}
        if sitter.post(f"/v1/leases/{offer['lease']}/beat", told).status_code >= 400:
            break
    town.clock.forward(STEP)
    town.tick()

    assert yard.row(work)["state"] == "answered", "there is time left for others"
    assert judge(yard, job, work) == ("failed", "audit.differs")


@pytest.mark.long
def test_a_made_up_class_does_not_choose_the_auditor(yard: Yard, town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cheat and its friend say that they are of a class of their own; three honest auditors are there as well."""
    monkeypatch.setattr(auditors.draws, "trusted_first", lambda *_: False)
    monkeypatch.setattr(auditors, "RINGERS", 0.0)
    job = town.publish(rounds=1, shards=90, check=CHECKED)
    for _ in range(3):
        yard.veteran(job)
    friend = yard.veteran(job)
    yard.work(friend, job, drawn=False, numericClass="ours alone")
    passed = []
    for _ in range(6):
        work = yard.work(town.person(), job, drawn=True, cheat=forged, numericClass="ours alone")
        yard.answer(work)
        if (offer := yard.take(friend, job)) is not None:
            yard.replayed(friend, job, offer)  # only for the start, which it signs
            yard.send(friend, offer, work.states[offer["segment"] + 1], numericClass="ours alone")
        passed.append(yard.verdict(work)[1] == "audit.passed")

    assert not all(passed), "the cheat's friend is asked first each time, and says yes"


def test_one_liar_and_a_worker_who_has_left_reject_nothing(yard: Yard, town: Town, anna: Person) -> None:
    """The worker answered its draw and went; a lying auditor makes the hub ask it for one state more."""
    job = town.publish(rounds=1, shards=2, check=CHECKED)
    work = yard.work(anna, job, segment=1)
    yard.answer(work)
    yard.audit(job.owner, job, lambda state: moved(state, 0.5))
    town.clock.forward(job.recipe.check.answer + 1)
    town.tick()

    assert yard.verdict(work)[1] != "audit.silent"
    assert finish(yard, job) == {anna.address: worth(work)}
