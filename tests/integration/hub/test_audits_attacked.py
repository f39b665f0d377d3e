"""What was tried against the hub's checking by workers, auditors and owners who mean no good, and by its own clock."""

from typing import Any

import numpy as np
import pytest

from tests.fixtures_checking import CHECKED, ENDS, OWN, Yard, cheat_at, moved
from tests.fixtures_hub import Job, Person, Town
from trainchain.core.digests import sha256
from trainchain.core.hub import audits, leases, schema, states
from trainchain.core.hub.steward import Steward
from trainchain.core.segments import NO_END, State, state_bytes

COMPLETE = len(ENDS)


@pytest.fixture
def yard(town: Town) -> Yard:
    return Yard(town)


@pytest.fixture
def job(town: Town) -> Job:
    return town.publish(rounds=1, shards=2, check=CHECKED)


def test_nobody_is_asked_to_replay_more_at_once_than_a_batch(yard: Yard, job: Job, anna: Person) -> None:
    lease = anna.must_lease(job)
    work = yard.train(anna, job, lease, 1)
    whole = job.recipe.training.batch_size * job.recipe.training.sequence_len
    document = anna.signed(anna.message(lease, work.data, stateRoot=work.root))
    answer = anna.hand_in(lease, {**document, "micro_tokens": [whole + 1] * COMPLETE})

    assert (answer.status_code, answer.json()["code"]) == (422, "contribution.segments")


def test_a_ringer_that_is_held_does_not_hold_up_a_job_s_end(yard: Yard, town: Town) -> None:
    job = town.publish(rounds=1, shards=60, check=CHECKED.model_copy(update={"timeout": 3600}))
    veteran = yard.veteran(job)
    yard.passed(town.person(), job)
    town.clock.forward(max(0, job.row["deadline"] - town.clock() - 300))
    yard.answer(yard.work(town.person(), job, drawn=True))
    town.clock.forward(250)
    yard.ringers(True)
    offer = yard.must_take(veteran, job)
    yard.ringers(False)
    assert town.row(schema.replays, lease=offer["lease"])["ringer"]
    end = yard.signed(veteran, offer, yard.replayed(veteran, job, offer))
    half = job.row["deadline"] + job.row["grace"] / 2
    codes = {}
    while town.clock() < half + 20:
        town.clock.forward(15)
        codes[town.clock() > half] = veteran.post(f"/v1/leases/{offer['lease']}/beat", {}).status_code
        town.tick()

    assert codes == {False: 200, True: 409}
    assert veteran.get(f"/v1/jobs/{job.id}/voucher").json()["ended"]
    assert job.view()["settlements"]
    assert veteran.post(f"/v1/leases/{offer['lease']}/replay", end).json()["code"] in ("lease.lost", "audit.too_late")


def test_a_hub_that_slept_ends_nothing_for_want_of_an_answer(yard: Yard, town: Town, job: Job, anna: Person) -> None:
    steward = Steward(town.hub)
    work = yard.work(anna, job, drawn=True)
    town.clock.forward(job.recipe.check.answer + 1)
    steward.tick()

    assert yard.verdict(work) == ("drawn", None)
    yard.answer(work)
    for _ in range(100):
        town.clock.forward(30)
        steward.tick()
    assert yard.verdict(work) == ("unaudited", "audit.unaudited"), "a hub that is there waits no longer than it says"


def test_one_lie_about_a_worker_who_went_home_rejects_nothing(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=14, check=OWN)
    works = [yard.passed(anna, job), *(yard.work(anna, job, drawn=False) for _ in range(8))]
    work = yard.work(anna, job, segment=1)
    yard.answer(work)
    yard.audit(job.owner, job, lambda end: moved(end, 0.005))
    assert yard.verdict(work) == ("drawn", None)
    town.clock.forward(job.recipe.check.answer + 1)
    town.tick()

    assert yard.verdict(work) == ("answered", None)
    assert yard.row(work)["wants"] == []
    town.clock.forward(job.recipe.check.timeout)
    town.tick()
    assert yard.verdict(work) == ("unaudited", "audit.undecided")
    assert not any(yard.given(each)["forfeited"] for each in [work, *works])
    assert [replay["within"] for replay in yard.evidence(work)["replays"]] == [False]


def test_two_who_differ_alike_reject_what_is_withheld(yard: Yard, town: Town, anna: Person) -> None:
    """Whoever forged a segment gains nothing by keeping its end to itself."""
    job = town.publish(rounds=1, shards=2, check=CHECKED)
    work = yard.work(anna, job, segment=1, cheat=cheat_at(2))
    yard.answer(work)
    yard.audit(job.owner, job)
    town.clock.forward(job.recipe.check.answer + 1)
    town.tick()
    assert yard.verdict(work) == ("answered", None)
    yard.audit(yard.operator, job)

    assert yard.verdict(work) == ("failed", "audit.silent")
    assert [replay["equal"] for replay in yard.evidence(work)["replays"]] == [False, False]


def diverged(yard: Yard, auditor: Person, job: Job) -> dict[str, Any]:
    offer = yard.must_take(auditor, job)
    document = yard.signed(auditor, offer, yard.replayed(auditor, job, offer), endLeaf=NO_END)
    answer: dict[str, Any] = auditor.post(f"/v1/leases/{offer['lease']}/replay", document).raise_for_status().json()
    yard.town.tick()
    return answer


def test_two_whose_training_breaks_down_reject_what_they_started_from(yard: Yard, job: Job, anna: Person) -> None:
    work = yard.work(anna, job, segment=1)
    yard.answer(work)

    assert diverged(yard, job.owner, job) == {"done": True, "wants_state": False}
    assert (yard.verdict(work), yard.row(work)["wants"]) == (("answered", None), [])
    assert diverged(yard, yard.operator, job)["done"]
    assert yard.verdict(work) == ("failed", "audit.differs")
    replays = yard.evidence(work)["replays"]
    assert [(replay["equal"], replay["within"], replay["state"]) for replay in replays] == [(False, False, None)] * 2


def test_no_state_is_swapped_while_the_answer_is_judged(
    yard: Yard, job: Job, anna: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = yard.work(anna, job, segment=1)
    for index in yard.row(work)["wants"]:
        yard.put(work, index).raise_for_status()
    judge, other = audits._contradiction, moved(work.states[1], 0.02)

    def slow(*of: Any) -> Any:
        found = judge(*of)
        yard.put(work, 1, other).raise_for_status()
        return found

    with monkeypatch.context() as patched:
        patched.setattr(audits, "_contradiction", slow)
        assert yard.post(work).json()["code"] == "audit.answer_invalid"
    assert yard.verdict(work) == ("drawn", None)
    yard.answer(work)
    assert yard.must_take(job.owner, job)["state"] == sha256(state_bytes(work.states[1]))


def every(part: Any, number: float) -> dict[str, Any]:
    return {name: np.full_like(tensor, number) for name, tensor in part.items()}


IMPOSSIBLE: dict[str, Any] = {
    "a negative square": lambda state: State(state.t, state.w, state.m, every(state.v, -1.0)),
    "weights out of reach": lambda state: State(state.t, every(state.w, 1e30), state.m, state.v),
    "moments too long": lambda state: State(state.t, state.w, every(state.m, 1e20), state.v),
    "squares too large": lambda state: State(state.t, state.w, state.m, every(state.v, 1e20)),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_state_that_nobody_can_train_from_is_seen_without_a_replay(
    yard: Yard, job: Job, anna: Person, name: str
) -> None:
    """Else every auditor fails to replay it, and forged work is paid for want of one."""
    poison = IMPOSSIBLE[name]
    lease = anna.must_lease(job)
    for data in range(500):
        forged = yard.train(anna, job, lease, data)
        forged.states[1] = poison(forged.states[1])
        if yard.foresee(forged, job) == 1:
            break
    yard.data[forged.id] = data
    forged.draw = anna.contribute(lease, forged.data, stateRoot=forged.root).raise_for_status().json()["draw"]

    assert yard.answer(forged)["state"] == "failed"
    assert yard.verdict(forged) == ("failed", "audit.impossible")


def test_who_answers_at_the_last_moment_of_a_job_is_audited(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=3, check=CHECKED)
    lease = anna.must_lease(job)
    town.clock.forward(job.recipe.pay.deadline - 15)
    lease = anna.lease(job) or lease
    work = yard.work(anna, job, lease=lease, drawn=True, cheat=lambda at, state: moved(state, 0.01) if at else state)
    answer_by, half = yard.row(work)["answer_by"], job.row["deadline"] + job.row["grace"] / 2
    assert answer_by <= job.row["deadline"] + job.row["grace"] / 4
    town.clock.forward(answer_by - town.clock() - 0.5)
    yard.answer(work)
    town.clock.at = half
    town.tick()
    assert yard.verdict(work) == ("answered", None)
    town.clock.forward(1)
    town.tick()
    assert yard.verdict(work) == ("unaudited", "audit.unaudited"), "and nobody is waited for"


def test_small_requests_do_not_make_the_hub_read_states(
    yard: Yard, job: Job, anna: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = yard.work(anna, job, segment=1)
    yard.put(work, 1).raise_for_status()
    yard.put(work, COMPLETE, moved(work.states[COMPLETE], 0.001)).raise_for_status()
    reads: list[Any] = []
    read = states.read
    monkeypatch.setattr(states, "read", lambda *of: reads.append(of) or read(*of))

    assert {yard.post(work).json()["code"] for _ in range(20)} == {"audit.answer_invalid"}
    assert len(reads) <= 2


def test_one_answer_is_judged_once_at_a_time(yard: Yard, town: Town, job: Job, anna: Person) -> None:
    work = yard.work(anna, job, drawn=True)
    for index in yard.row(work)["wants"]:
        yard.put(work, index).raise_for_status()
    with town.hub.judging(work.id):
        assert yard.post(work).json()["code"] == "hub.failed"
    assert yard.post(work).json()["state"] == "answered"


def test_a_replayed_end_that_comes_after_the_verdict_is_not_kept(
    yard: Yard, town: Town, job: Job, anna: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = yard.work(anna, job, segment=1)
    yard.answer(work)
    offer = yard.must_take(job.owner, job)
    end = moved(yard.replayed(job.owner, job, offer), 0.005)
    job.owner.post(f"/v1/leases/{offer['lease']}/replay", yard.signed(job.owner, offer, end)).raise_for_status()
    kept: list[str] = []
    keep = town.hub.objects.keep

    def slow(spool: Any) -> str:
        found = keep(spool)
        kept.append(found)
        if len(kept) == 1:
            leases.give_back(town.hub, job.owner.address, offer["lease"])
            yard.audit(yard.operator, job)
        return found

    monkeypatch.setattr(town.hub.objects, "keep", slow)
    answer = job.owner.put(f"/v1/leases/{offer['lease']}/states/2", state_bytes(end))

    assert yard.verdict(work) == ("passed", "audit.passed")
    assert answer.json()["code"] == "audit.too_late"
    assert town.hub.objects.size(kept[0]) is None
