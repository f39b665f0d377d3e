"""Draws, answers and verdicts, told over HTTP and held against real signatures; the training is a toy."""

import json
from typing import Any

import httpx
import pytest

from tests.fixtures_checking import CHECKED, ENDS, LONG, OWN, Yard, cheat_at, moved, nudged
from tests.fixtures_hub import Job, Person, Town, numbers
from tests.fixtures_merge import PLAIN_MERGE
from trainchain.chain import eip712
from trainchain.core.adapter import adapter_bytes
from trainchain.core.digests import sha256
from trainchain.core.draws import draw, secret_hash
from trainchain.core.evidence import Evidence
from trainchain.core.hub import schema
from trainchain.core.segments import state_bytes, state_root

COMPLETE = len(ENDS)


@pytest.fixture
def yard(town: Town) -> Yard:
    return Yard(town)


@pytest.fixture
def job(town: Town) -> Job:
    return town.publish(rounds=2, shards=6, check=CHECKED)


def code(answer: httpx.Response) -> str:
    assert answer.status_code >= 400, answer.text
    return str(answer.json()["code"])


def held_objects(town: Town, job: Job) -> set[str]:
    return {row["digest"] for row in town.rows(schema.states, job=job.id)}


def test_a_lease_promises_a_secret_that_nobody_is_told_before_its_time(yard: Yard, job: Job, anna: Person) -> None:
    town = yard.town
    lease = anna.must_lease(job)
    signed = {"jobId": job.id, "round": 1, "secretHash": lease["secret_hash"]}
    domain = eip712.Domain(town.chain.chain_id, town.chain.escrow)

    assert eip712.recover(domain, "RoundSecret", signed, lease["secret_signature"]) == town.keys.address
    (told,) = job.view()["rounds_done"]
    assert (told["secret_hash"], told["secret"]) == (lease["secret_hash"], None)
    works = [yard.work(anna, job, lease=lease)]
    while job.view()["round"] == 1:
        assert job.view()["rounds_done"][0]["secret"] is None
        works.append(yard.work(anna, job))
    first, second = job.view()["rounds_done"]
    assert second["secret"] is None
    secret = bytes.fromhex(first["secret"][2:])
    assert secret_hash(secret) == first["secret_hash"]
    audits = {row["lease"]: row for row in town.ask(f"/v1/jobs/{job.id}/audits")["audits"]}
    accepted = town.ask(f"/v1/jobs/{job.id}/contributions")["contributions"]
    assert len(accepted) == len(works) == 6
    for place, row in enumerate(accepted, 1):
        at_risk = min(place, 10)
        lease_id, root = (bytes.fromhex(row["contribution"][name][2:]) for name in ("lease", "stateRoot"))
        found = draw(secret, lease_id, root, at_risk=at_risk, steps=COMPLETE, segment_steps=1)
        audit = audits.get(row["lease"])
        assert found == (audit and audit["segment"])
        assert audit is None or audit["at_risk"] == at_risk
        assert (row["resolved"] is None) == (audit is not None)


def test_a_secret_is_not_told_while_late_work_may_come(yard: Yard, town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=3, shards=2, check=CHECKED)
    out = ben.must_lease(job)
    yard.work(anna, job)
    town.clock.forward(job.recipe.round_deadline + 1)
    town.tick()

    assert [row["state"] for row in job.view()["rounds_done"]] == ["merged", "open"]
    assert job.view()["rounds_done"][0]["secret"] is None
    late = yard.work(ben, job, lease=out)
    assert late.draw is not None
    assert job.view()["rounds_done"][0]["secret"] is not None


def test_the_first_shard_of_a_wallet_is_always_drawn_and_the_tenth_seldom(yard: Yard, job: Job) -> None:
    fresh = [yard.work(yard.town.person(), job) for _ in range(5)]

    assert all(work.draw is not None and work.draw["at_risk"] == 1 for work in fresh)


def test_what_is_not_drawn_stands_at_once(yard: Yard, job: Job, anna: Person) -> None:
    yard.passed(anna, job)
    work = yard.work(anna, job, drawn=False)

    assert work.draw is None
    assert yard.given(work)["resolved"] == 0
    assert code(yard.put(work, 1)) == "audit.none"
    assert (
        code(anna.post(f"/v1/leases/{work.id}/answer", {"openings": [work.opening(0), work.opening(4)]}))
        == "audit.none"
    )


@pytest.mark.parametrize("segment", range(COMPLETE))
def test_an_equal_replay_passes(yard: Yard, job: Job, anna: Person, segment: int) -> None:
    """From the states alone that an auditor may read; the claimed end is not among them."""
    town = yard.town
    work = yard.work(anna, job, segment=segment)
    assert work.draw is not None
    assert work.draw["wants"] == sorted({segment, COMPLETE} - {0})
    assert yard.given(work)["resolved"] is None

    assert yard.answer(work) == {"state": "answered", "wants": []}
    assert yard.post(work).json() == {"state": "answered", "wants": []}
    offer = yard.must_take(job.owner, job)
    end = yard.replayed(job.owner, job, offer)
    assert offer["state"] == (sha256(state_bytes(work.states[segment])) if segment else None)
    assert offer["micro_tokens"] == 128
    if segment + 1 == COMPLETE:
        assert code(job.owner.get(f"/v1/objects/{sha256(state_bytes(work.states[COMPLETE]))}")) == "object.unknown"
    answer = job.owner.post(f"/v1/leases/{offer['lease']}/replay", yard.signed(job.owner, offer, end))

    assert answer.json()["done"]
    assert yard.verdict(work) == ("passed", "audit.passed")
    assert yard.given(work)["resolved"] == 1
    evidence = Evidence.model_validate(yard.evidence(work))
    assert (evidence.code, evidence.forfeits, evidence.replays[0].equal) == ("audit.passed", None, True)
    told = f"{town.url}/v1/objects/{yard.row(work)['evidence']}"
    assert town.http.get(told).status_code == 404, "it holds the answer to what auditors may be tested with"
    job.owner.post(f"/v1/jobs/{job.id}/cancel").raise_for_status()
    town.tick()
    assert job.state == "settled"
    assert town.http.get(told).status_code == 200


def test_states_go_when_nobody_needs_them(yard: Yard, job: Job, anna: Person) -> None:
    """A few with a known answer stay until the job is settled."""
    town, before = yard.town, len(yard.town.rows(schema.audits, job=job.id))
    assert before == 0
    works = [yard.passed(town.person(), job) for _ in range(6)]
    kept = {row["lease"] for row in town.rows(schema.states, job=job.id)}
    passed_by = {row["lease"] for row in town.rows(schema.replays, job=job.id)}

    assert held_objects(town, job)
    assert len(kept & {work.id for work in works}) <= 4
    assert len(kept & passed_by) <= 4
    for digest in {sha256(state_bytes(state)) for work in works for state in work.states} - held_objects(town, job):
        assert town.hub.objects.size(digest) is None
    job.owner.post(f"/v1/jobs/{job.id}/cancel").raise_for_status()
    town.tick()
    assert job.state == "settled"
    town.tick()
    assert held_objects(town, job) == set()


REFUSALS: dict[str, Any] = {
    "a leaf too few": lambda w: {"openings": w.openings()["openings"][1:]},
    "a leaf twice": lambda w: {"openings": [*w.openings()["openings"][:-1], w.openings()["openings"][0]]},
    "another leaf's proof": lambda w: {
        "openings": [{**o, "proof": w.opening((o["index"] + 1) % 5)["proof"]} for o in w.openings()["openings"]]
    },
    "a longer proof": lambda w: {
        "openings": [{**o, "proof": [*o["proof"], "0x" + "00" * 32]} for o in w.openings()["openings"]]
    },
    "another digest": lambda w: {"openings": [{**o, "m": "0x" + "77" * 32} for o in w.openings()["openings"]]},
    "another index": lambda w: {"openings": [{**o, "index": o["index"] + 1} for o in w.openings()["openings"]]},
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_opening_that_does_not_hold_changes_nothing(yard: Yard, job: Job, anna: Person, name: str) -> None:
    work = yard.work(anna, job, segment=1)
    for index in work.draw["wants"]:  # type: ignore[index]
        yard.put(work, index).raise_for_status()
    before = yard.row(work)

    assert code(yard.post(work, REFUSALS[name](work))) == "audit.answer_invalid"
    assert yard.row(work) == before
    assert yard.post(work).json() == {"state": "answered", "wants": []}


def test_a_state_that_is_not_the_one_opened_changes_nothing(yard: Yard, job: Job, anna: Person) -> None:
    work = yard.work(anna, job, segment=2)
    yard.put(work, COMPLETE).raise_for_status()

    assert code(yard.post(work)) == "audit.answer_invalid", "a state is missing"
    yard.put(work, 2, nudged(work.states[2], 1e-3)).raise_for_status()
    assert code(yard.post(work)) == "audit.answer_invalid"
    assert yard.verdict(work) == ("drawn", None)
    other = sha256(state_bytes(nudged(work.states[2], 1e-3)))
    yard.put(work, 2).raise_for_status()
    assert yard.town.hub.objects.size(other) is None, "what was replaced is gone"
    assert yard.post(work).json()["state"] == "answered"


def test_what_is_no_state_is_not_kept(yard: Yard, job: Job, anna: Person, ben: Person) -> None:
    work = yard.work(anna, job, segment=2)
    good = state_bytes(work.states[2])

    assert code(yard.put(work, 2, b"")) == "state.invalid"
    assert code(yard.put(work, 2, good[:-1])) == "state.invalid"
    assert code(yard.put(work, 2, adapter_bytes(numbers(1)) + b"\0" * len(good))) in ("http.too_large", "state.invalid")
    assert code(yard.put(work, 2, good + b"\0" * 5000)) == "http.too_large"
    assert code(yard.put(work, 1)) == "audit.none"
    assert code(ben.put(f"/v1/leases/{work.id}/states/2", good)) == "lease.not_yours"
    assert code(ben.post(f"/v1/leases/{work.id}/answer", work.openings())) == "lease.not_yours"
    assert yard.town.rows(schema.states, job=job.id) == []


def test_silence_counts_as_failure(yard: Yard, job: Job, anna: Person) -> None:
    work = yard.work(anna, job, drawn=True)
    assert work.draw is not None
    town = yard.town

    town.clock.forward(job.recipe.check.answer)
    town.tick()
    assert yard.verdict(work) == ("drawn", None), "to the last second"
    town.clock.forward(1)
    assert code(yard.post(work)) == "audit.too_late"
    town.tick()

    assert yard.verdict(work) == ("failed", "audit.silent")
    given = yard.given(work)
    assert (given["resolved"], given["forfeited"]) == (None, 1)
    evidence = Evidence.model_validate(yard.evidence(work))
    assert evidence.forfeits is not None
    assert (evidence.forfeits.first, evidence.forfeits.last) == (1, 1)
    assert evidence.forfeits.amount == int(work.receipt["amount"])


def test_a_claimed_end_that_is_withheld_is_beside_no_replay(yard: Yard, job: Job, anna: Person) -> None:
    """Nor can it run down the auditors' clock: that begins anew with the answer."""
    town, timeout = yard.town, job.recipe.check.timeout
    silent = yard.work(anna, job, segment=1, cheat=cheat_at(2))
    slow = yard.work(town.person(), job, segment=1, cheat=cheat_at(2))
    for work in (silent, slow):
        yard.answer(work)
        yard.audit(job.owner, job)
        assert yard.row(work)["wants"] == [2]
    town.clock.forward(timeout + 1)
    yard.answer(slow)
    assert yard.verdict(slow) == ("answered", None)
    for _ in range(2):  # it is lent while the worker is asked, too
        yard.audit(yard.operator, job)
    assert yard.verdict(slow) == ("failed", "audit.differs")
    assert yard.verdict(silent) == ("drawn", None), "it may still show that its end is within the tolerance"
    town.clock.forward(job.recipe.check.answer - timeout)
    town.tick()

    assert yard.verdict(silent) == ("failed", "audit.silent")
    assert len(yard.evidence(silent)["replays"]) == 2
    assert len(yard.evidence(silent)["openings"]) == 4


def test_three_replays_that_do_not_agree_decide_nothing(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=40, check=CHECKED, **LONG)
    veteran = yard.veteran(job)
    work = yard.work(anna, job, segment=1, cheat=cheat_at(2))
    yard.answer(work)
    yard.audit(job.owner, job, lambda state: moved(state, 0.002))
    yard.answer(work)
    yard.audit(yard.operator, job, lambda state: moved(state, -0.002))
    assert yard.verdict(work) == ("answered", None)
    town.clock.forward(100)
    yard.audit(veteran, job, lambda state: moved(state, 0.006))
    assert yard.verdict(work) == ("answered", None), "a worker may still confirm the operator"
    town.clock.forward(job.recipe.check.timeout + job.recipe.check.answer)
    town.tick()

    assert yard.verdict(work) == ("unaudited", "audit.undecided")
    assert yard.given(work)["resolved"] == 1
    assert {row["forfeited"] for row in town.rows(schema.replays, audit=work.id)} == {None}


def test_a_wrong_start_is_seen_without_a_replay(yard: Yard, job: Job, anna: Person) -> None:
    """Whoever goes on from another adapter than the round's has it in the first leaf."""
    work = yard.work(anna, job, segment=2, cheat=cheat_at(0))
    yard.put(work, 2).raise_for_status()
    yard.put(work, COMPLETE).raise_for_status()

    assert yard.post(work).json() == {"state": "failed", "wants": []}
    assert yard.verdict(work) == ("failed", "audit.wrong_start")
    evidence = yard.evidence(work)
    assert evidence["found"] == "0x" + work.leaves[0].hex()
    assert evidence["expected"] not in (None, evidence["found"])
    assert [opening["index"] for opening in evidence["openings"]] == [0, 2, 3, COMPLETE]


@pytest.mark.parametrize("moments", ["fresh", "merged"])
def test_honest_training_with_an_arbitrary_upload_is_seen_without_a_replay(
    yard: Yard, town: Town, anna: Person, moments: str
) -> None:
    way = PLAIN_MERGE.model_copy(update={"moments": moments, "encoding": "int4" if moments == "merged" else "fp32"})
    job = town.publish(rounds=2, shards=2, check=CHECKED, merge=way)
    lease = anna.must_lease(job)
    arbitrary = yard.train(anna, job, lease, 12345).data
    work = yard.work(anna, job, lease=lease, drawn=True, delta=arbitrary)
    honest = yard.train(anna, job, lease, yard.data[work.id]).data
    assert honest != arbitrary

    assert yard.answer(work)["state"] == "failed"
    assert yard.verdict(work) == ("failed", "audit.wrong_delta")
    evidence = yard.evidence(work)
    assert (evidence["expected"], evidence["found"]) == (sha256(honest), sha256(arbitrary))


@pytest.mark.parametrize("encoding", ["fp32", "bf16", "int8", "int4"])
def test_honest_work_answers_in_every_encoding_and_with_merged_moments(
    yard: Yard, town: Town, anna: Person, encoding: str
) -> None:
    way = PLAIN_MERGE.model_copy(update={"moments": "merged", "encoding": encoding})
    job = town.publish(rounds=2, shards=1, check=CHECKED, merge=way)

    yard.passed(anna, job, segment=0)
    assert job.view()["round"] == 2
    work = yard.work(anna, job, drawn=True)
    assert yard.answer(work)["state"] == "answered"
    yard.audit(job.owner, job)
    assert yard.verdict(work) == ("passed", "audit.passed")


def test_two_independent_replays_reject_what_both_differ_from(yard: Yard, job: Job, anna: Person) -> None:
    """One alone asks for the claimed end, and then for another's word."""
    town = yard.town
    before = [yard.passed(anna, job), yard.work(anna, job, drawn=False)]
    work = yard.work(anna, job, segment=1, cheat=cheat_at(2))
    yard.answer(work)
    first = yard.audit(yard.operator, job)

    row = yard.row(work)
    assert (row["state"], row["wants"]) == ("drawn", [2])
    assert row["answer_by"] == town.clock() + job.recipe.check.answer
    assert code(yard.put(work, 2, nudged(work.states[2], 1e-3))) == "audit.answer_invalid"
    yard.put(work, 2).raise_for_status()
    assert yard.verdict(work) == ("answered", None)
    assert yard.take(yard.operator, job) is None, "each auditor once"
    second = yard.audit(job.owner, job)

    assert yard.verdict(work) == ("failed", "audit.differs")
    evidence = Evidence.model_validate(yard.evidence(work))
    assert [replay.signed.replay.lease for replay in evidence.replays] == [first["lease"], second["lease"]]
    assert [replay.role for replay in evidence.replays] == ["operator", "owner"]
    assert all(replay.within is False and not replay.equal for replay in evidence.replays)
    assert evidence.tolerance is not None
    assert evidence.replays[0].distances is not None
    assert evidence.replays[0].distances.delta > evidence.tolerance.delta
    for digest in [*evidence.states.values(), *(replay.state for replay in evidence.replays)]:
        assert town.http.get(f"{town.url}/v1/objects/{digest}").status_code == 200, "evidence is for everybody"
    assert evidence.forfeits is not None
    assert (evidence.forfeits.first, evidence.forfeits.last) == (1, 3)
    amount = sum(int(done.receipt["amount"]) for done in [*before, work])
    assert evidence.forfeits.amount == amount
    (told,) = [row for row in anna.get("/v1/earned").json()["jobs"] if row["job"] == job.id]
    assert [shard["state"] for shard in told["shards"]] == ["forfeited"] * 3


def test_one_replay_alone_never_rejects(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=2, shards=2, check=OWN)
    work = yard.work(anna, job, segment=1, cheat=cheat_at(2))
    yard.answer(work)
    yard.audit(job.owner, job)
    yard.put(work, 2).raise_for_status()

    town.clock.forward(job.recipe.check.timeout + 1)
    town.tick()
    assert yard.verdict(work) == ("answered", None), "the owner can still bring an auditor"
    town.clock.forward(job.recipe.check.answer)
    town.tick()
    assert yard.verdict(work) == ("unaudited", "audit.undecided")
    assert yard.given(work)["resolved"] == 1
    assert len(yard.evidence(work)["replays"]) == 1


def test_another_class_within_the_tolerance_passes(yard: Yard, job: Job, anna: Person) -> None:
    work = yard.work(anna, job, segment=1)
    yard.answer(work)
    yard.audit(job.owner, job, lambda state: nudged(state, 1e-6), numericClass="another machine")

    assert yard.row(work)["wants"] == [2]
    assert yard.answer(work) == {"state": "passed", "wants": []}
    assert yard.verdict(work) == ("passed", "audit.passed")
    (replay,) = yard.evidence(work)["replays"]
    assert (replay["within"], replay["equal"], replay["same_class"]) == (True, False, False)


def test_nobody_is_rejected_for_a_bit_within_a_class_neither(yard: Yard, job: Job, anna: Person) -> None:
    work = yard.work(anna, job, segment=1)
    yard.answer(work)
    yard.audit(job.owner, job, lambda state: nudged(state, 1e-6))
    yard.answer(work)

    assert yard.verdict(work) == ("passed", "audit.passed")
    (replay,) = yard.evidence(work)["replays"]
    assert (replay["within"], replay["equal"], replay["same_class"]) == (True, False, True)


def test_a_lying_auditor_is_outvoted_and_loses_its_fees(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=40, check=CHECKED, **LONG)
    liar = yard.veteran(job)
    work = yard.work(anna, job, segment=1)
    yard.answer(work)
    town.clock.forward(400)
    offer = yard.audit(liar, job, lambda state: moved(state, 0.005))
    fee = town.row(schema.replays, lease=offer["lease"])
    assert fee["fee"] > 0
    assert (fee["place"], fee["counted"]) == (1, 1)
    yard.answer(work)
    yard.audit(job.owner, job)
    assert yard.verdict(work) == ("answered", None)
    yard.audit(yard.operator, job)

    assert yard.verdict(work) == ("passed", "audit.passed")
    assert town.row(schema.replays, lease=offer["lease"])["forfeited"] == 1
    other = yard.work(town.person(), job)
    yard.answer(other)
    town.clock.forward(400)
    assert yard.take(liar, job) is None, "who lied audits nothing more here"
    yard.audit(job.owner, job)


def test_who_says_yes_for_a_friend_does_not_outvote_two(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=40, check=CHECKED, **LONG)
    friend = yard.veteran(job)
    work = yard.work(anna, job, segment=1, cheat=cheat_at(2))
    yard.answer(work)
    yard.audit(job.owner, job)
    yard.answer(work)
    town.clock.forward(400)
    offer = yard.must_take(friend, job)
    yard.replayed(friend, job, offer)  # only for the start, which it signs
    assert yard.send(friend, offer, work.states[2])["done"]
    assert yard.verdict(work) == ("answered", None)
    yard.audit(yard.operator, job)

    assert yard.verdict(work) == ("failed", "audit.differs")
    assert town.row(schema.replays, lease=offer["lease"])["forfeited"] == 1
    assert {row["forfeited"] for row in town.rows(schema.replays, job=job.id, auditor=job.owner.address)} == {None}


@pytest.mark.parametrize("check", [OWN, CHECKED], ids=["owner", "any"])
def test_an_owner_whose_auditor_refuses_honest_work_pays_for_it(
    yard: Yard, town: Town, anna: Person, check: Any
) -> None:
    job = town.publish(rounds=1, shards=2, check=check)
    work = yard.work(anna, job, segment=1)
    yard.answer(work)
    yard.audit(job.owner, job, lambda state: moved(state, 0.005))
    yard.answer(work)
    yard.audit(yard.operator, job)

    assert yard.verdict(work) == ("answered", None), "one to one: nothing is certain"
    town.clock.forward(job.recipe.check.timeout + 1)
    town.tick()
    assert yard.verdict(work) == ("answered", None), "the owner can still bring an auditor"
    town.clock.forward(job.recipe.check.answer)
    town.tick()
    assert yard.verdict(work) == ("unaudited", "audit.undecided")
    assert yard.given(work)["forfeited"] is None


def test_where_nobody_comes_the_work_is_paid_unaudited(yard: Yard, job: Job, anna: Person) -> None:
    town, work = yard.town, yard.work(anna, job, drawn=True)
    yard.answer(work)
    town.clock.forward(job.recipe.check.timeout)
    town.tick()
    assert yard.verdict(work) == ("answered", None)
    town.clock.forward(1)
    town.tick()

    assert yard.verdict(work) == ("unaudited", "audit.unaudited")
    assert yard.given(work)["resolved"] == 1
    assert held_objects(town, job) == set()
    (row,) = town.ask(f"/v1/jobs/{job.id}/audits")["audits"]
    assert (row["state"], row["code"], row["replays"]) == ("unaudited", "audit.unaudited", [])


def test_a_second_story_is_kept_and_the_first_one_counts(yard: Yard, job: Job, anna: Person) -> None:
    work = yard.work(anna, job, drawn=True)
    other = yard.train(anna, job, work.lease, 99)
    repeat = anna.contribute(work.lease, work.data, stateRoot=state_root(work.leaves))
    assert code(repeat) == "contribution.repeat"
    assert repeat.json()["receipt"]["draw"] == work.draw, "the same draw again"

    assert code(anna.contribute(work.lease, work.data, stateRoot=state_root(other.leaves))) == "shard.already_accepted"
    (told,) = yard.town.ask(f"/v1/jobs/{job.id}/contributions")["contributions"]
    assert told["second"]["contribution"]["stateRoot"] == state_root(other.leaves)
    assert told["contribution"]["stateRoot"] == state_root(work.leaves)
    yard.answer(work)
    yard.audit(job.owner, job)
    assert yard.verdict(work) == ("passed", "audit.passed")


def test_a_wallet_sees_its_own_audits_those_first_that_wait(yard: Yard, job: Job, anna: Person) -> None:
    done = yard.passed(anna, job)
    yard.town.clock.forward(1)
    work = yard.work(anna, job, drawn=True)

    first, second = anna.get("/v1/audits").json()["audits"]
    assert (first["lease"], first["state"], first["place"]) == (work.id, "drawn", 2)
    assert work.draw is not None
    assert {name: first[name] for name in work.draw if name != "at_risk"} == {
        name: value for name, value in work.draw.items() if name != "at_risk"
    }
    assert (second["lease"], second["code"]) == (done.id, "audit.passed")
    assert sha256(json.dumps(yard.evidence(done), sort_keys=True, separators=(",", ":")).encode()) == second["evidence"]
    (shard,) = [s for s in job.view()["rounds_done"][0]["shards"] if s["shard"] == done.lease["shard"]]
    assert shard["audit"] == {"state": "passed", "code": "audit.passed", "evidence": second["evidence"]}
    assert shard["forfeited"] is False
