"""Who may work on what, for how long, and who may read it."""

import threading
from typing import Any

import pytest

from tests.fixtures_hub import INITIAL, Job, Person, Town, job_files, numbers
from trainchain.core.adapter import adapter_bytes
from trainchain.core.digests import sha256
from trainchain.core.hub import leases, rounds, schema
from trainchain.core.hub.service import LEASE_SECONDS
from trainchain.core.models import MAX_ANSWER


def code(answer: Any) -> str:
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    return str(answer.json()["code"])


def beat(person: Person, lease: dict[str, Any]) -> Any:
    return person.post(f"/v1/leases/{lease['lease']}/beat", {"step": 1, "steps": 4, "tokens_per_second": 9.5})


def test_of_two_that_race_for_one_shard_one_gets_it(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(shards=1)
    gate, won = threading.Barrier(2), []

    def race(person: Person) -> None:
        gate.wait(30)
        won.append(leases.take(town.hub, person.address, job.id))

    threads = [threading.Thread(target=race, args=(person,)) for person in (anna, ben)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert sorted(lease is None for lease in won) == [False, True]
    assert len(town.rows(schema.leases, job=job.id)) == 1


def test_a_lease_says_all_that_a_worker_must_know(town: Town, anna: Person) -> None:
    job = town.publish()

    lease = anna.must_lease(job)

    opened = job.round(1)
    assert lease | {"lease": ""} == {
        "lease": "",
        "kind": "train",
        "job": job.id,
        "name": "tiny",
        "spec_hash": job.recipe.spec_hash,
        "round": 1,
        "shard": 0,
        "start": sha256(INITIAL),
        "expires_in": LEASE_SECONDS,
        "secret_hash": opened["secret_hash"],
        "secret_signature": opened["secret_signature"],
    }


def test_every_shard_is_lent_once(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(shards=3)

    taken = [who.must_lease(job)["shard"] for who in (anna, ben, anna)]

    assert sorted(taken) == [0, 1, 2]
    assert ben.lease(job) is None


def test_an_expired_lease_gives_its_shard_to_another(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(shards=1)
    lost = anna.must_lease(job)
    town.clock.forward(LEASE_SECONDS)
    assert ben.lease(job) is None

    town.clock.forward(1)

    assert ben.must_lease(job)["shard"] == lost["shard"]
    assert town.row(schema.leases, id=lost["lease"])["state"] == "expired"


def test_the_first_to_lose_a_lease_still_counts_if_he_is_first(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(shards=1)
    late = anna.must_lease(job)
    town.clock.forward(LEASE_SECONDS + 1)
    second = ben.must_lease(job)

    accepted = anna.contribute(late)

    assert accepted.status_code == 200
    assert code(ben.contribute(second)) == "shard.already_accepted"
    assert code(beat(ben, second)) == "shard.already_accepted"
    assert [row["worker"] for row in town.rows(schema.contributions, job=job.id)] == [anna.address]


def test_one_whose_lease_ran_out_counts_though_nobody_took_it_on(town: Town, anna: Person) -> None:
    job = town.publish(shards=1)
    late = anna.must_lease(job)
    town.clock.forward(LEASE_SECONDS + 1)
    rounds.tick(town.hub)
    assert job.shards(1) == ["open"]

    assert anna.contribute(late).status_code == 200


def test_a_beat_keeps_a_lease(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(shards=1)
    lease = anna.must_lease(job)

    for _ in range(5):
        town.clock.forward(LEASE_SECONDS - 1)
        assert beat(anna, lease).json() == {"expires_in": LEASE_SECONDS}
        assert ben.lease(job) is None

    assert job.view()["rounds_done"][0]["shards"][0]["progress"]["step"] == 1


def test_a_beat_after_the_end_says_what_became_of_the_shard(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(shards=1, rounds=2)
    late = anna.must_lease(job)
    town.clock.forward(LEASE_SECONDS + 1)

    assert code(beat(anna, late)) == "lease.lost"
    ben.work(job)
    assert code(beat(anna, late)) == "shard.already_accepted"
    assert code(beat(ben, late)) == "lease.not_yours"


def test_a_beat_for_a_shard_that_two_rounds_went_on_without_says_so(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=3, round_deadline=60)
    late = anna.must_lease(job)
    for _ in range(2):
        ben.work(job)
        town.clock.forward(61)
        town.tick()

    assert code(beat(anna, late)) == "contribution.too_late"


def test_a_held_lease_of_an_ended_job_still_counts_and_is_paid(town: Town, anna: Person) -> None:
    job = town.publish(pay_deadline=100)
    lease = anna.must_lease(job)
    for _ in range(6):
        town.clock.forward(LEASE_SECONDS - 1)
        beat(anna, lease).raise_for_status()
        town.tick()
    assert job.state == "expired"

    anna.contribute(lease).raise_for_status()
    town.tick()

    assert job.state == "settled"
    assert town.chain.job(job.id).settled == town.row(schema.contributions, job=job.id)["reward"] > 0


def test_nobody_holds_the_last_settlement_up_by_beating_on(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(pay_deadline=100)
    lease = anna.must_lease(job)
    ben.work(job)
    answer = beat(anna, lease)
    while answer.status_code == 200:
        town.clock.forward(LEASE_SECONDS - 1)
        town.tick()
        answer = beat(anna, lease)
    assert code(answer) == "job.closed"

    town.clock.forward(LEASE_SECONDS + 1)
    town.tick()

    assert job.state == "settled"
    assert town.clock() < town.chain.job(job.id).closes_after
    assert code(anna.contribute(lease)) == "job.closed"


def test_a_lease_that_is_given_back_is_offered_at_once(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(shards=1)
    lease = anna.must_lease(job)
    assert code(ben.request("DELETE", f"/v1/leases/{lease['lease']}")) == "lease.not_yours"
    assert ben.lease(job) is None

    for _ in range(2):
        assert anna.request("DELETE", f"/v1/leases/{lease['lease']}").status_code == 200

    assert ben.must_lease(job)["shard"] == lease["shard"]


def test_giving_back_does_not_take_the_shard_from_who_has_it_now(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(shards=1)
    old = anna.must_lease(job)
    town.clock.forward(LEASE_SECONDS + 1)
    ben.must_lease(job)

    anna.request("DELETE", f"/v1/leases/{old['lease']}").raise_for_status()

    assert job.shards(1) == ["leased"]
    assert anna.lease(job) is None


def test_after_the_hub_was_away_nobody_has_lost_a_lease(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(shards=1)
    lease = anna.must_lease(job)
    town.clock.forward(10 * LEASE_SECONDS)

    leases.extend_all(town.hub)

    assert ben.lease(job) is None
    assert beat(anna, lease).status_code == 200


def test_an_unfunded_job_lends_nothing(town: Town, anna: Person) -> None:
    job = town.publish(escrow=0)

    assert job.state == "unfunded"
    assert code(anna.post(f"/v1/jobs/{job.id}/fund")) == "job.unfunded"
    assert anna.lease(job) is None


def test_a_job_lends_nothing_before_its_objects_are_there(town: Town, anna: Person) -> None:
    job = town.publish(escrow=0, upload=False)
    job.create_escrow(job.recipe.pay.budget)

    assert code(anna.post(f"/v1/jobs/{job.id}/fund")) == "job.incomplete"
    town.tick()
    assert anna.lease(job) is None


@pytest.mark.parametrize(
    "changes",
    [{"hub": "0x" + "11" * 20}, {"round_cap": 1}, {"spec_hash": "0x" + "22" * 32}],
    ids=str,
)
def test_an_escrow_that_promises_otherwise_opens_nothing(town: Town, anna: Person, changes: dict[str, Any]) -> None:
    job = town.publish(escrow=0)
    job.create_escrow(job.recipe.pay.budget, **changes)

    assert code(anna.post(f"/v1/jobs/{job.id}/fund")) == "job.invalid"
    town.tick()
    assert (job.state, anna.lease(job)) == ("unfunded", None)


def test_no_lease_is_given_after_the_deadline(town: Town, anna: Person) -> None:
    job = town.publish(pay_deadline=100)
    town.clock.forward(100)

    assert anna.lease(job) is None
    town.clock.forward(1)
    town.tick()
    assert job.state == "settled"
    assert anna.lease(job) is None


def test_a_lease_may_be_asked_for_one_job_only(town: Town, anna: Person) -> None:
    first, second = town.publish(), town.publish()

    assert anna.must_lease(second)["job"] == second.id
    assert anna.must_lease(first)["job"] == first.id


@pytest.fixture
def measured(town: Town) -> Job:
    return town.publish(held_out=True, shards=1, rounds=1)


def test_only_the_hub_s_evaluator_measures(town: Town, measured: Job, anna: Person) -> None:
    evaluator = town.person(town.evaluator_keys)

    offers = list(iter(evaluator.lease, None))
    mine = next(lease for lease in offers if lease["job"] == measured.id)

    assert {lease["kind"] for lease in offers} == {"evaluate"}
    assert (mine["round"], mine["shard"], mine["start"]) == (0, None, sha256(INITIAL))
    assert anna.must_lease(measured)["kind"] == "train"
    report = f"/v1/leases/{mine['lease']}/evaluation"
    assert code(anna.post(report, {"loss": 1.0})) == "lease.not_yours"
    assert code(evaluator.contribute(mine)) == "object.unexpected"
    for _ in range(2):
        assert evaluator.post(report, {"loss": 3.25}).json() == {"loss": 3.25}
    assert measured.view()["evaluations"] == [{"round": 0, "state": "done", "loss": 3.25, "samples": []}]


def asked(town: Town, **options: Any) -> tuple[Job, Person, str]:
    """A job whose base the evaluator holds a lease on, and where its report goes."""
    job, evaluator = town.publish(shards=1, rounds=1, **options), town.person(town.evaluator_keys)
    lease = next(lease for lease in iter(evaluator.lease, None) if lease["job"] == job.id)
    return job, evaluator, f"/v1/leases/{lease['lease']}/evaluation"


def test_prompts_are_answered_by_the_base_and_by_every_merged_adapter(town: Town, anna: Person) -> None:
    job, evaluator, report = asked(town, held_out=True, samples=["Who?", "Where?"])
    evaluator.post(report, {"loss": 3.0, "samples": ["me", ""]}).raise_for_status()
    anna.work(job)
    town.tick()
    lease = next(lease for lease in iter(evaluator.lease, None) if lease["job"] == job.id)

    answers = ["a small machine", "here\n\x1b[31m" + "x" * 9999]
    evaluator.post(f"/v1/leases/{lease['lease']}/evaluation", {"loss": 2.0, "samples": answers}).raise_for_status()

    view = job.view()
    assert view["samples"] == ["Who?", "Where?"]
    assert [row["samples"] for row in view["evaluations"]] == [["me", ""], answers]
    assert (view["rounds_done"][0]["loss"], view["rounds_done"][0]["samples"]) == (2.0, answers)


def test_a_job_with_prompts_and_no_held_out_data_is_sampled(town: Town) -> None:
    job, evaluator, report = asked(town, samples=["Who?"])

    assert code(evaluator.post(report, {"loss": 1.0, "samples": ["me"]})) == "http.bad_request"
    assert evaluator.post(report, {"loss": None, "samples": ["me"]}).json() == {"loss": None}
    assert job.view()["evaluations"] == [{"round": 0, "state": "done", "loss": None, "samples": ["me"]}]


@pytest.mark.parametrize(
    "told",
    [
        {"loss": None, "samples": ["me"]},
        {"loss": 1.0},
        {"loss": 1.0, "samples": []},
        {"loss": 1.0, "samples": ["me", "you"]},
        {"loss": 1.0, "samples": ["x" * (MAX_ANSWER + 1)]},
        {"loss": 1.0, "samples": [3]},
        {"loss": -1.0, "samples": ["me"]},
        {"samples": ["me"]},
    ],
    ids=lambda told: str(told)[:40],
)
def test_a_report_must_answer_what_the_recipe_asks_for(town: Town, told: dict[str, Any]) -> None:
    job, evaluator, report = asked(town, held_out=True, samples=["Who?"])

    assert code(evaluator.post(report, told)) == "http.bad_request"

    assert job.view()["evaluations"][0]["state"] == "leased"
    assert evaluator.post(report, {"loss": 1.0, "samples": ["x" * MAX_ANSWER]}).status_code == 200


def test_a_job_that_asks_for_nothing_is_not_measured(town: Town) -> None:
    assert town.publish().view()["evaluations"] == []


def test_a_worker_cannot_report_a_loss_under_a_training_lease(town: Town, measured: Job, anna: Person) -> None:
    lease = anna.must_lease(measured)

    assert code(anna.post(f"/v1/leases/{lease['lease']}/evaluation", {"loss": 0.0})) == "session.forbidden"
    assert [row["loss"] for row in measured.view()["evaluations"]] == [None]


def test_an_evaluation_that_nobody_finishes_is_offered_again(town: Town, measured: Job) -> None:
    evaluator = town.person(town.evaluator_keys)
    first = next(lease for lease in iter(evaluator.lease, None) if lease["job"] == measured.id)
    town.clock.forward(LEASE_SECONDS + 1)

    again = next(lease for lease in iter(evaluator.lease, None) if lease["job"] == measured.id)

    assert again["lease"] != first["lease"]
    assert evaluator.post(f"/v1/leases/{first['lease']}/evaluation", {"loss": 9.0}).status_code == 200
    assert [row["loss"] for row in measured.view()["evaluations"]] == [None]
    assert evaluator.post(f"/v1/leases/{again['lease']}/evaluation", {"loss": 2.0}).status_code == 200
    assert [row["loss"] for row in measured.view()["evaluations"]] == [2.0]


def test_what_is_private_opens_to_owner_and_lease_holders_only(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish()
    private = [sha256(data) for data in job.files.values()]
    anna.must_lease(job)

    for digest in private:
        path = f"/v1/objects/{digest}"
        assert code(town.http.get(town.url + path)) == "session.required"
        assert code(ben.get(path)) == "object.unknown"
        assert sha256(anna.fetch(digest)) == digest
        assert sha256(job.owner.fetch(digest)) == digest


def test_recipe_and_adapters_are_public(town: Town, anna: Person) -> None:
    job = town.publish(shards=1, rounds=1)
    receipt = anna.work(job)
    town.tick()

    for digest in (job.recipe.spec_hash, sha256(INITIAL), receipt["deltaHash"][2:], job.round(1)["adapter"]):
        assert sha256(town.http.get(f"{town.url}/v1/objects/{digest}").content) == digest
    assert town.http.get(f"{town.url}/v1/jobs/{job.id}/recipe").content == job.recipe.canonical()


def test_a_delta_is_private_until_its_round_is_merged(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(shards=1)
    lease, delta = anna.must_lease(job), adapter_bytes(numbers(4))
    anna.upload(lease, delta).raise_for_status()
    assert code(ben.get(f"/v1/objects/{sha256(delta)}")) == "object.unknown"
    anna.hand_in(lease, anna.signed(anna.message(lease, delta))).raise_for_status()
    assert code(ben.get(f"/v1/objects/{sha256(delta)}")) == "object.unknown"

    town.tick()

    assert ben.fetch(sha256(delta)) == delta


def test_naming_another_s_data_in_a_job_of_one_s_own_does_not_open_it(town: Town, anna: Person) -> None:
    theirs = town.publish()
    secret = theirs.files["train-0.jsonl"]

    mine = town.publish({**job_files(), "train-0.jsonl": secret}, owner=anna, escrow=0, upload=False)

    assert code(anna.get(f"/v1/objects/{sha256(secret)}")) == "object.unknown"
    mine.create_escrow(mine.recipe.pay.budget)
    assert code(anna.post(f"/v1/jobs/{mine.id}/fund")) == "job.incomplete"


def test_naming_another_s_data_as_a_public_adapter_does_not_open_it(town: Town, anna: Person, ben: Person) -> None:
    theirs = town.publish()
    secret = theirs.files["train-0.jsonl"]
    document = theirs.recipe.model_dump(mode="json")
    document["lora"]["initial"]["sha256"] = sha256(secret)

    anna.post("/v1/jobs", {"recipe": document, "salt": "0x" + "77" * 32}).raise_for_status()

    assert code(ben.get(f"/v1/objects/{sha256(secret)}")) == "object.unknown"
    assert code(town.http.get(f"{town.url}/v1/objects/{sha256(secret)}")) == "session.required"


def test_what_an_owner_brought_before_need_not_be_sent_again(town: Town, anna: Person) -> None:
    first = town.publish(owner=anna)

    second = town.publish(first.files, owner=anna, upload=False)

    assert second.state == "running"


def test_only_the_owner_brings_a_job_s_objects_and_only_those_it_names(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(owner=anna, escrow=0, upload=False)
    data = job.files["train-0.jsonl"]
    here = f"/v1/jobs/{job.id}/objects"

    assert code(ben.put(f"{here}/{sha256(data)}", data)) == "session.forbidden"
    assert code(anna.put(f"{here}/{sha256(b'else')}", b"else")) == "object.unexpected"
    assert code(anna.put(f"{here}/{sha256(data)}", data[:-1] + b"!")) == "object.digest"
    assert code(anna.put(f"{here}/{sha256(data)}", data[:-1])) == "object.digest"
    assert code(anna.put(f"{here}/{sha256(data)}", data + b"!")) == "http.too_large"
    assert anna.put(f"{here}/{sha256(data)}", data).status_code == 200


def test_publishing_twice_is_one_job(town: Town, anna: Person) -> None:
    job = town.publish(owner=anna)
    document = {"recipe": job.recipe.model_dump(mode="json"), "salt": job.salt}

    again = anna.post("/v1/jobs", document).json()

    assert again == {"job": job.id, "spec_hash": job.recipe.spec_hash, "missing": []}
    document["recipe"]["name"] = "other"
    assert code(anna.post("/v1/jobs", document)) == "job.invalid"


def test_a_job_is_found_by_id_prefix_and_name(town: Town) -> None:
    name = "only-one-of-this-name"
    job = town.publish(escrow=0, name=name)

    for word in (job.id, job.id[:30], job.id[2:30], name):
        assert town.ask(f"/v1/jobs/{word}")["job"] == job.id


def test_a_worker_that_waits_is_woken_when_there_is_work(town: Town, anna: Person) -> None:
    """A long poll: the answer comes with the job, not with the end of the wait."""
    job = town.publish(escrow=0)
    found: list[Any] = []
    waiting = threading.Thread(
        target=lambda: found.append(anna.post("/v1/leases", {"job": job.id, "wait": 25.0}).json())
    )
    headers = anna.headers
    waiting.start()
    job.create_escrow(job.recipe.pay.budget)
    town.http.post(f"{town.url}/v1/jobs/{job.id}/fund", headers=headers).raise_for_status()
    town.tick()
    waiting.join(30)

    assert found[0]["job"] == job.id
