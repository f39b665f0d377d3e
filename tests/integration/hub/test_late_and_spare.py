"""What comes late, what is spare, and workers of unlike speeds: nobody waits, and all who worked are paid."""

import heapq
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures_hub import REACH, Job, Person, Town, numbers, recipe
from tests.fixtures_merge import PLAIN_MERGE
from trainchain.chain.settlement import check_against_chain
from trainchain.cli import delivery
from trainchain.cli.jobs import describe
from trainchain.core.adapter import adapter_bytes, read_adapter
from trainchain.core.checks import reach
from trainchain.core.digests import sha256
from trainchain.core.hub import cashier, leases, rounds, schema
from trainchain.core.hub.service import LEASE_SECONDS
from trainchain.core.merge.updates import Update, merge, outer_step
from trainchain.core.rewards import round_price, shard_reward

SPARE = PLAIN_MERGE.model_copy(update={"spares": 0.1})


def a_slow_job(town: Town, **options: Any) -> Job:
    """Two shards a round; one of them and the deadline close it."""
    return town.publish(**{"rounds": 3, "shards": 2, "quorum": 0.5, "round_deadline": 60, **options})


def beat(who: Person, lease: dict[str, Any]) -> Any:
    told = {"step": 1, "steps": 4, "tokens_per_second": 100.0}
    return who.post(f"/v1/leases/{lease['lease']}/beat", told)


def pass_deadline(job: Job, who: Person | None = None, lease: dict[str, Any] | None = None) -> None:
    """Let the round's deadline go by; whoever holds a lease beats on."""
    for _ in range(5):
        job.town.clock.forward(13)
        if who and lease:
            beat(who, lease)
    job.town.tick()
    if who and lease:
        beat(who, lease).raise_for_status()


def one_late(town: Town, slow: Person, fast: Person, **options: Any) -> tuple[Job, dict[str, Any]]:
    """A job whose first round closed without the shard that `slow` still holds."""
    job = a_slow_job(town, **options)
    lease = slow.must_lease(job)
    fast.work(job)
    pass_deadline(job, slow, lease)
    assert job.round(1)["state"] == "merged"
    return job, lease


def finish(job: Job, *workers: Person) -> None:
    turn = 0
    while (lease := workers[turn % len(workers)].lease(job)) is not None:
        small = numbers(turn, reach(job.recipe, lease["round"]) / 2)
        workers[turn % len(workers)].contribute(lease, small).raise_for_status()
        job.town.tick()
        turn += 1


def paid(job: Job, through: int, who: Person) -> int:
    """What a settlement on chain gives an account, by a leaves file that anybody may fetch."""
    row = job.town.row(schema.settlements, job=job.id, round=through)
    (settled,) = (one for one in job.town.chain.settlements(job.id) if one.round == through)
    return check_against_chain(who.fetch(row["leaves"]), settled).amounts.get(who.address, 0)


def state_of(job: Job, lease: dict[str, Any]) -> str:
    return str(job.town.row(schema.shards, job=job.id, round=lease["round"], shard=lease["shard"])["state"])


def test_what_comes_one_round_late_counts_half_and_is_paid_in_full(town: Town, anna: Person, ben: Person) -> None:
    job, lease = one_late(town, anna, ben)
    assert (job.row["round"], state_of(job, lease)) == (2, "leased")
    assert beat(anna, lease).status_code == 200

    receipt = anna.contribute(lease).raise_for_status().json()

    assert int(receipt["amount"]) == shard_reward(job.recipe, 1, lease["shard"])
    assert (receipt["round"], job.row["round"]) == (1, 2)
    digest = receipt["deltaHash"][2:]
    assert ben.get(f"/v1/objects/{digest}").json()["code"] == "object.unknown", "it could be copied into round 2"
    for _ in range(2):
        ben.work(job)
    town.tick()
    assert (job.round(2)["state"], job.row["round"]) == ("merged", 3)
    rows = [row for row in town.rows(schema.contributions, job=job.id) if row["merged_in"] == 2]
    updates = [
        Update(
            row["delta"],
            job.recipe.counts[row["round"] - 1][row["shard"]].tokens * (0.5 if row["round"] == 1 else 1.0),
            ben.fetch_adapter(row["delta"]),
        )
        for row in rows
    ]
    assert [row["round"] for row in rows].count(1) == 1
    start = read_adapter(ben.fetch(job.round(2)["start"]))
    step = outer_step(job.recipe.merge, start, merge(job.recipe.merge, start, updates))
    assert sha256(adapter_bytes(step.adapter)) == job.round(2)["adapter"]
    shown = job.view()["rounds_done"][0]["shards"]
    assert [(one["merged_in"], one["spare"]) for one in shown] == [(2, False), (1, False)]
    assert shown[lease["shard"]]["merge"]["weight"] == 1.0
    assert town.rows(schema.settlements, job=job.id) == [], "nothing has vested yet"
    finish(job, ben)
    assert job.state == "settled"
    assert paid(job, job.row["settled_round"], anna) == int(receipt["amount"])


def test_a_late_delta_of_a_private_job_is_for_its_fellows_once_it_is_merged(
    town: Town, anna: Person, ben: Person
) -> None:
    job = town.publish_sealed(workers=[anna.address, ben.address], rounds=2, quorum=0.5, round_deadline=60)
    late = []
    for number in (1, 2):
        lease = anna.must_lease(job)
        ben.work(job)
        pass_deadline(job, anna, lease)
        assert job.round(number)["state"] == "merged"
        digest = anna.contribute(lease).raise_for_status().json()["deltaHash"][2:]
        assert ben.get(f"/v1/objects/{digest}").json()["code"] == "object.unknown"
        assert anna.fetch(digest)
        late.append(digest)
    assert ben.fetch(late[0]), "the second round has taken it in"

    town.tick()

    assert job.state == "settled"
    assert ben.fetch(late[1]), "no merge takes it in, and nothing can be done with it"
    assert town.http.get(f"{town.url}/v1/objects/{late[1]}").json()["code"] == "session.required"


def test_who_lost_the_lease_may_come_late_too(town: Town, anna: Person, ben: Person) -> None:
    job = a_slow_job(town)
    lease = anna.must_lease(job)
    ben.work(job)
    town.clock.forward(61)
    town.tick()
    assert (job.round(1)["state"], state_of(job, lease)) == ("merged", "open")
    assert ben.must_lease(job)["round"] == 2, "nothing of a closed round is lent"

    assert anna.contribute(lease).status_code == 200

    assert town.row(schema.contributions, lease=lease["lease"])["merged_in"] == 2


def test_what_comes_late_is_checked_against_its_own_round(town: Town, anna: Person, ben: Person) -> None:
    training = recipe({"model.safetensors": b"", "train-0.jsonl": b""}).training
    training = training.model_copy(update={"lr_scheduler": "cosine"})
    job, lease = one_late(town, anna, ben, training=training)
    far = reach(job.recipe, 1) * 0.999
    assert far > reach(job.recipe, 2)
    delta = {name: np.full_like(tensor, far) for name, tensor in numbers(3).items()}

    other = {"startHash": "0x" + job.round(2)["start"]}
    assert anna.contribute(lease, delta, **other).json()["code"] == "contribution.wrong_start"
    assert anna.contribute(lease, delta).status_code == 200

    finish(job, ben)
    assert job.state == "settled"


def test_who_comes_late_neither_closes_the_next_round_nor_makes_its_quorum(
    town: Town, anna: Person, ben: Person
) -> None:
    job, lease = one_late(town, anna, ben)
    anna.contribute(lease).raise_for_status()

    pass_deadline(job)
    assert job.round(2)["state"] == "open", "its quorum is one of its own shards"
    ben.work(job)
    town.tick()

    assert job.round(2)["state"] == "merged"


@pytest.mark.parametrize("held", [True, False])
def test_late_in_the_last_round_is_paid_and_settled_and_not_merged(
    town: Town, anna: Person, ben: Person, held: bool
) -> None:
    job, lease = one_late(town, anna, ben, rounds=1)
    assert (job.state, job.view()["settlements"]) == ("finished", []), "its last settlement waits for who is at it"
    adapter = job.round(1)["adapter"]
    for _ in range(2):
        town.clock.forward(LEASE_SECONDS - 1)
        assert beat(anna, lease).status_code == 200
        town.tick()
    assert job.state == "finished"

    if held:
        receipt = anna.contribute(lease).raise_for_status().json()
    else:
        town.clock.forward(LEASE_SECONDS + 1)
    town.tick()

    assert (job.state, job.round(1)["adapter"]) == ("settled", adapter)
    owed = shard_reward(job.recipe, 1, lease["shard"]) if held else 0
    assert paid(job, 1, anna) == owed
    if held:
        assert town.row(schema.contributions, lease=lease["lease"])["merged_in"] is None
        assert ben.fetch(receipt["deltaHash"][2:]), "nothing can be done with a copy any more"
    else:
        assert anna.contribute(lease).json()["code"] == "job.closed"
    assert town.chain.job(job.id).settled == owed + shard_reward(job.recipe, 1, 1)


def test_a_late_lease_may_be_held_for_another_deadline(town: Town, anna: Person, ben: Person) -> None:
    _, lease = one_late(town, anna, ben)
    answer, taken = beat(anna, lease), town.clock() - 65
    while answer.status_code == 200:
        town.clock.forward(LEASE_SECONDS - 1)
        answer = beat(anna, lease)

    assert answer.json()["code"] == "lease.lost"
    assert 120 < town.clock() - taken < 120 + LEASE_SECONDS


def test_a_hub_that_is_killed_loses_nothing_that_is_late(tmp_path: Path) -> None:
    town = Town(tmp_path)
    try:
        anna, ben = town.person(), town.person()
        job, lease = one_late(town, anna, ben)

        def again() -> None:
            tables = (schema.rounds, schema.shards, schema.contributions, schema.settlements)
            before = [town.rows(table, job=job.id) for table in tables]
            town.stop()
            town.start()
            leases.extend_all(town.hub)
            assert [town.rows(table, job=job.id) for table in tables] == before

        again()
        anna.contribute(lease).raise_for_status()
        again()
        for _ in range(2):
            ben.work(job)
        rounds.tick(town.hub)
        assert job.round(2)["state"] == "merging"
        again()
        town.tick()
        finish(job, ben)
        assert job.state == "settled"
        assert paid(job, 3, anna) == shard_reward(job.recipe, 1, lease["shard"])
        assert town.chain.job(job.id).settled == sum(round_price(job.recipe, number) for number in (1, 2, 3))
    finally:
        town.close()


def test_a_cancelled_job_pays_who_is_late(town: Town, anna: Person, ben: Person) -> None:
    job, lease = one_late(town, anna, ben)
    job.owner.post(f"/v1/jobs/{job.id}/cancel").raise_for_status()
    town.tick()
    assert job.state == "cancelled"

    anna.contribute(lease).raise_for_status()
    town.tick()

    assert job.state == "settled"
    assert paid(job, 2, anna) == shard_reward(job.recipe, 1, lease["shard"])


def test_a_job_that_ends_between_two_rounds_pays_who_came_late_to_the_first(
    town: Town, anna: Person, ben: Person
) -> None:
    job, lease = one_late(town, anna, ben, escrow=round_price(a_slow_job(town, escrow=0).recipe, 1))
    assert (job.state, job.row["settled_round"]) == ("unfunded", 0)
    town.clock.forward(LEASE_SECONDS + 1)
    town.tick()
    anna.contribute(lease).raise_for_status()
    assert job.state == "unfunded"

    town.clock.forward(job.recipe.pay.deadline)
    town.tick()

    assert job.state == "settled"
    assert paid(job, 2, anna) == shard_reward(job.recipe, 1, lease["shard"])


def test_a_round_opens_only_when_who_may_come_late_is_covered_too(town: Town, anna: Person, ben: Person) -> None:
    made = a_slow_job(town, escrow=0).recipe
    job, lease = one_late(town, anna, ben, escrow=round_price(made, 1) + round_price(made, 2) - 1)
    assert (job.state, job.row["round"]) == ("unfunded", 1)
    short = job.owner.post(f"/v1/jobs/{job.id}/fund")
    assert short.json()["code"] == "job.unfunded"
    anna.contribute(lease).raise_for_status()
    town.tick()
    assert job.state == "unfunded", "what was kept back for her is hers now"

    town.chain.fund(town.owner.wallet, job.id, 1)
    town.tick()

    assert (job.state, job.row["round"]) == ("running", 2)


def test_what_nobody_had_when_the_round_closed_is_not_kept_back(town: Town, ben: Person) -> None:
    made = a_slow_job(town, escrow=0).recipe
    job = a_slow_job(town, escrow=round_price(made, 1) + round_price(made, 2) - shard_reward(made, 1, 1))
    ben.work(job)
    pass_deadline(job)

    assert (job.shards(1), job.row["round"]) == (["accepted", "abandoned"], 2)


def test_the_evidence_of_each_round_s_adapter_holds_with_what_came_late(
    town: Town, anna: Person, ben: Person, tmp_path: Path
) -> None:
    """Late in the first round, which the second took in; late in the last round, which no merge did."""
    job, lease = one_late(town, anna, ben, rounds=2, shards=3, quorum=0.3)
    other = anna.must_lease(job)
    anna.contribute(lease).raise_for_status()
    ben.work(job)
    pass_deadline(job, anna, other)
    assert (other["round"], job.state) == (2, "finished")
    anna.contribute(other).raise_for_status()
    town.tick()
    assert job.state == "settled"
    client, own = ben.client(), [shard_reward(job.recipe, one["round"], one["shard"]) for one in (lease, other)]

    for number, accepted in ((1, [(1, 1)]), (2, [(1, 0), (1, 1), (2, 0), (2, 1)])):
        folder = tmp_path / str(number)
        folder.mkdir()
        delivery.assemble(client, delivery.look(client, job.id, number), folder, where=None)
        assert delivery.verify(folder)["round"] == number
        told = json.loads((folder / "trainchain/contributions.json").read_bytes())["contributions"]
        assert [(one["contribution"]["round"], one["contribution"]["shard"]) for one in told] == accepted
        text = (folder / "README.md").read_text()
        assert ("1 came one round late" in text) == (number == 2)

    client.close()
    assert "3 of 6; 1 came one round late and had half their weight" in text
    assert paid(job, 2, anna) == sum(own)
    lines = describe(job.view()).splitlines()
    assert [line.split()[1] for line in lines if line.endswith("TRAIN  late")] == [str(lease["shard"])]
    assert [line.split()[1] for line in lines if line.endswith("too late to be merged")] == [str(other["shard"])]


def test_spare_shards_are_lent_in_the_tail_one_for_each_that_is_out(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=2, shards=10, merge=PLAIN_MERGE.model_copy(update={"spares": 0.2}))
    assert job.shards(1) == ["open"] * 12
    slow = anna.must_lease(job)
    for _ in range(8):
        ben.work(job)
    other = town.person().must_lease(job)
    assert (slow["shard"], other["shard"]) == (0, 9)

    spare = ben.must_lease(job)
    second = ben.must_lease(job)
    assert (spare["shard"], second["shard"]) == (10, 11)
    assert ben.lease(job) is None
    ben.request("DELETE", f"/v1/leases/{second['lease']}").raise_for_status()
    ben.contribute(spare).raise_for_status()
    town.tick()
    assert job.round(1)["state"] == "open", "nine of ten"
    ben.work(job)
    town.tick()

    assert (job.round(1)["state"], job.row["round"]) == ("merged", 2)
    assert state_of(job, slow) == state_of(job, other) == "leased"
    anna.contribute(slow).raise_for_status()
    assert town.row(schema.contributions, lease=slow["lease"])["merged_in"] == 2
    assert town.row(schema.contributions, lease=spare["lease"])["merged_in"] == 1
    assert [line.split()[1] for line in describe(job.view()).splitlines() if line.endswith("  spare")] == ["10", "11"]
    assert [one["spare"] for one in job.view()["rounds_done"][0]["shards"]] == [False] * 10 + [True] * 2


def test_no_spare_is_lent_while_a_shard_of_the_round_is_open(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=1, shards=10, merge=SPARE)
    held = anna.must_lease(job)
    for _ in range(9):
        ben.work(job)
    anna.request("DELETE", f"/v1/leases/{held['lease']}").raise_for_status()

    assert ben.must_lease(job)["shard"] == held["shard"]
    assert anna.must_lease(job)["shard"] == 10


def test_a_spare_that_nobody_needs_is_given_up_with_its_round(town: Town, ben: Person) -> None:
    job = town.publish(rounds=1, shards=10, merge=SPARE)

    finish(job, ben)

    assert (job.state, job.shards(1)) == ("settled", ["accepted"] * 10 + ["abandoned"])
    assert town.chain.job(job.id).settled == round_price(job.recipe, 1) - shard_reward(job.recipe, 1, 10)


def test_a_round_whose_counts_leave_out_the_spares_is_no_job(town: Town) -> None:
    made = town.publish(shards=10, merge=SPARE, escrow=0).recipe.model_dump(mode="json")
    made["counts"] = [row[:10] for row in made["counts"]]

    answer = town.owner.post("/v1/jobs", {"recipe": made, "salt": "0x" + "7e" * 32})

    assert answer.json()["code"] == "job.invalid"


def test_who_is_three_times_as_fast_gets_three_times_as_many_and_nobody_waits(
    town: Town, anna: Person, ben: Person
) -> None:
    job = town.publish(rounds=4, shards=20, merge=SPARE, round_deadline=3600)
    seconds = {anna.address: 5.0, ben.address: 15.0}
    began, waited = town.clock(), 0.0
    due: list[tuple[float, str]] = []
    at_work: dict[str, tuple[Person, dict[str, Any]]] = {}

    def go_on(who: Person) -> None:
        lease = who.lease(job)
        if lease is not None:
            at_work[who.address] = (who, lease)
            heapq.heappush(due, (town.clock() + seconds[who.address], who.address))

    for who in (anna, ben):
        go_on(who)
    while due:
        at, address = heapq.heappop(due)
        waited += (at - town.clock()) * (2 - len(at_work))
        town.clock.forward(at - town.clock())
        who, lease = at_work.pop(address)
        who.contribute(lease).raise_for_status()
        town.tick()
        for person in (anna, ben):
            if person.address in at_work:
                beat(*at_work[person.address])
            elif job.state == "running":
                go_on(person)

    done = [row["worker"] for row in town.rows(schema.contributions, job=job.id)]
    assert 0.7 < done.count(anna.address) / len(done) < 0.8
    assert job.state == "settled"
    assert waited <= seconds[ben.address], "none but at the job's end"
    assert town.clock() - began <= 1.1 * 80 / (1 / 5 + 1 / 15)
    late = [row for row in town.rows(schema.contributions, job=job.id) if row["merged_in"] != row["round"]]
    assert len(late) <= 4, "no more than one a round"
    assert not [row for row in town.rows(schema.shards, job=job.id) if row["state"] == "leased"]
    assert not cashier.tick(town.hub)


def towards(number: int, noise: int) -> dict[str, np.ndarray]:
    """A delta in a round's common direction, and half as much of its own."""
    common, own = numbers(number, REACH / 3), numbers(1000 + noise, REACH / 6)
    return {name: tensor + own[name] for name, tensor in common.items()}


@pytest.mark.parametrize(
    ("kind", "weight", "why"), [("honest", 1.0, ""), ("odd", 0.0, "points away"), ("copy", 0.0, "a copy")]
)
def test_a_rule_judges_who_is_late_among_those_of_his_own_round(
    town: Town, anna: Person, ben: Person, kind: str, weight: float, why: str
) -> None:
    """The next round's go another way, and beside them anybody who is late would be the odd one."""
    merge = PLAIN_MERGE.model_copy(update={"rule": "gate"})
    job = town.publish(rounds=2, shards=5, quorum=0.8, round_deadline=60, merge=merge)
    lease = anna.must_lease(job)
    for noise in range(4):
        ben.contribute(ben.must_lease(job), towards(1, noise)).raise_for_status()
    pass_deadline(job, anna, lease)
    own = {
        "honest": towards(1, 9),
        "odd": {name: -tensor for name, tensor in towards(1, 9).items()},
        "copy": {name: tensor * np.float32(0.999) for name, tensor in towards(1, 2).items()},
    }[kind]
    anna.contribute(lease, own).raise_for_status()
    for noise in range(5):
        ben.contribute(ben.must_lease(job), towards(2, 20 + noise)).raise_for_status()
    town.tick()

    told = town.row(schema.contributions, lease=lease["lease"])
    assert (told["merged_in"], told["merge"]["weight"]) == (2, weight), told["merge"]
    assert told["merge"]["why"] in (why, "clipped")
    mine = [row["merge"]["weight"] for row in town.rows(schema.contributions, job=job.id) if row["round"] == 2]
    assert mine == [1.0] * 5
