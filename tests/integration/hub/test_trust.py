"""What owner, worker and hub may do to each other: stop a job, halt its escrow, sit on shards, fill the disk."""

from typing import Any

import pytest

from tests.fixtures_hub import Person, Town, numbers
from trainchain.chain import eip712
from trainchain.cli import wiring
from trainchain.core import checks
from trainchain.core.adapter import adapter_bytes, read_adapter
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema
from trainchain.core.hub.leases import MAX_HELD
from trainchain.core.merge.updates import Update, merge, outer_step


def test_a_cancelled_job_lends_nothing_and_pays_what_was_held(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=2, shards=2)
    lease = anna.must_lease(job)

    assert job.owner.post(f"/v1/jobs/{job.id}/cancel").json()["state"] == "cancelled"
    town.tick()

    assert ben.lease(job) is None
    assert job.state == "cancelled"
    anna.contribute(lease).raise_for_status()
    town.tick()
    assert job.state == "settled"
    assert town.chain.settlements(job.id)[-1].total > 0


def test_only_the_owner_cancels_and_only_once(town: Town, anna: Person) -> None:
    job = town.publish()

    assert anna.post(f"/v1/jobs/{job.id}/cancel").json()["code"] == "session.forbidden"
    job.owner.post(f"/v1/jobs/{job.id}/cancel").raise_for_status()
    assert job.owner.post(f"/v1/jobs/{job.id}/cancel").json()["code"] == "job.closed"


def test_a_settled_job_is_closed_when_its_grace_time_is_over(town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=1)
    anna.contribute(anna.must_lease(job)).raise_for_status()
    town.tick()
    assert job.state == "settled"

    town.clock.forward(job.row["deadline"] + job.row["grace"] + 1 - town.clock())
    town.tick()

    assert job.state == "closed"


def test_no_round_opens_once_the_owner_halted_the_escrow(town: Town, anna: Person) -> None:
    job = town.publish(rounds=2, shards=1)
    lease = anna.must_lease(job)
    town.chain.halt(job.owner.wallet, job.id)

    anna.contribute(lease).raise_for_status()
    town.tick()

    assert job.row["round"] == 1
    assert anna.lease(job) is None
    assert job.state == "settled"


def test_a_worker_takes_no_shard_that_a_halted_escrow_would_not_pay(town: Town, anna: Person) -> None:
    job = town.publish()
    client = anna.client()
    chain = wiring.chain_of(client)
    check = wiring.job_checker(chain, client.info()["chain"], now=town.clock)
    check(job.id, job.recipe.spec_hash)

    town.chain.halt(job.owner.wallet, job.id)

    with pytest.raises(TrainChainError, match="halted"):
        check(job.id, job.recipe.spec_hash)
    with pytest.raises(TrainChainError, match="another recipe"):
        check(job.id, "00" * 32)
    client.close()


def test_a_receipt_by_anybody_but_the_hub_does_not_pass(town: Town, anna: Person) -> None:
    job = town.publish()
    lease = anna.must_lease(job)
    delta = adapter_bytes(numbers(11))
    anna.upload(lease, delta).raise_for_status()
    receipt = anna.hand_in(lease, anna.signed(anna.message(lease, delta))).json()
    fields = {key: receipt[key] for key in ("jobId", "round", "shard", "lease", "worker", "deltaHash", "place")}
    check = wiring.promise_checker(town.chain, town.keys.address)

    assert check("Receipt", {**fields, "amount": int(receipt["amount"])}, receipt["signature"])
    assert not check("Receipt", {**fields, "amount": int(receipt["amount"]) + 1}, receipt["signature"])
    forged = eip712.sign(town.chain.domain, "Receipt", {**fields, "amount": int(receipt["amount"])}, anna.wallet)
    assert not check("Receipt", {**fields, "amount": int(receipt["amount"])}, forged)


def test_a_wallet_holds_so_many_leases_and_no_more(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(shards=MAX_HELD + 1)

    held = [anna.must_lease(job) for _ in range(MAX_HELD)]

    assert anna.lease(job) is None
    assert ben.lease(job) is not None
    anna.contribute(held[0]).raise_for_status()
    assert len({lease["shard"] for lease in held}) == MAX_HELD


def test_beating_does_not_keep_a_shard_beyond_the_rounds_deadline(town: Town, anna: Person) -> None:
    job = town.publish()
    lease = anna.must_lease(job)
    path = f"/v1/leases/{lease['lease']}/beat"
    waited = 0.0
    while waited <= job.recipe.round_deadline:
        anna.post(path, {}).raise_for_status()
        town.clock.forward(15)
        waited += 15

    assert anna.post(path, {}).json()["code"] == "lease.lost"


def test_refused_uploads_do_not_pile_up(town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=1)
    lease = anna.must_lease(job)
    refused = [adapter_bytes(numbers(seed)) for seed in (21, 22, 23)]
    for delta in refused:
        anna.upload(lease, delta).raise_for_status()

    assert [town.hub.objects.size(sha256(delta)) is None for delta in refused] == [True, True, False]
    anna.contribute(lease).raise_for_status()
    town.tick()

    assert all(town.hub.objects.size(sha256(delta)) is None for delta in refused)
    assert [row for row in town.rows(schema.objects, job=job.id) if row["lease"]] != []


def test_who_trains_does_not_see_what_the_job_is_judged_by(town: Town, anna: Person) -> None:
    job = town.publish(held_out=True)
    evaluator = town.person(town.evaluator_keys)
    held_out, train = (sha256(job.files[name]) for name in ("held-out.jsonl", "train-0.jsonl"))
    anna.must_lease(job)
    evaluator.must_lease()

    assert anna.fetch(train) == job.files["train-0.jsonl"]
    assert anna.get(f"/v1/objects/{held_out}").json()["code"] == "object.unknown"
    assert job.owner.fetch(held_out) == evaluator.fetch(held_out) == job.files["held-out.jsonl"]


def test_bytes_that_go_while_they_are_judged_are_not_accepted(
    town: Town, anna: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a worker stops a job for good: what was accepted could never be merged."""
    job = town.publish(rounds=1, shards=1)
    lease = anna.must_lease(job)
    first, second = adapter_bytes(numbers(1)), adapter_bytes(numbers(2))
    anna.upload(lease, first).raise_for_status()
    judge = checks.read_delta

    def judge_and_upload(*arguments: Any) -> Any:
        monkeypatch.undo()
        judged = judge(*arguments)
        anna.upload(lease, second).raise_for_status()
        return judged

    monkeypatch.setattr(checks, "read_delta", judge_and_upload)
    answer = anna.hand_in(lease, anna.signed(anna.message(lease, first)))

    assert answer.json()["code"] == "delta.missing"
    anna.contribute(lease, second).raise_for_status()
    town.tick()
    assert job.state == "settled"


def test_a_delta_of_another_job_must_be_uploaded_for_this_one(town: Town, anna: Person, ben: Person) -> None:
    """The other job may drop its bytes before this one merges."""
    job, other = town.publish(rounds=1, shards=1), town.publish(rounds=1, shards=1)
    delta = adapter_bytes(numbers(3))
    ben.upload(ben.must_lease(other), delta).raise_for_status()
    lease = anna.must_lease(job)

    assert anna.hand_in(lease, anna.signed(anna.message(lease, delta))).json()["code"] == "delta.missing"
    assert anna.contribute(lease, delta).status_code == 200


def test_what_a_worker_uploaded_first_is_the_hub_s_once_it_is_merged(town: Town, anna: Person, ben: Person) -> None:
    """Who contributes all of a round knows its outer step, and could have it forgotten as an upload nobody took."""
    job = town.publish(rounds=2, shards=2, quorum=0.5, round_deadline=60)
    lease, unused = anna.must_lease(job), ben.must_lease(job)
    delta = numbers(4)
    start = read_adapter(anna.fetch(lease["start"]))
    step = outer_step(job.recipe.merge, start, merge(job.recipe.merge, start, [Update("a", 1, delta)]))
    ben.upload(unused, step.data).raise_for_status()
    anna.contribute(lease, delta).raise_for_status()
    town.clock.forward(61)
    town.tick()
    anna.contribute(anna.must_lease(job)).raise_for_status()
    town.tick()
    anna.work(job)
    town.tick()

    assert job.round(1)["outer_step"] == sha256(step.data)
    assert job.round(2)["state"] == "merged"
    assert anna.fetch(sha256(step.data)) == step.data
