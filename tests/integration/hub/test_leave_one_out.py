"""A round whose held-out loss fails is taken apart: a real hub, and an evaluator that measures what it says it does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures_hub import INITIAL, REACH, Job, Person, Town, numbers
from tests.fixtures_merge import PLAIN_MERGE
from trainchain.cli.jobs import describe
from trainchain.core.adapter import Adapter, adapter_bytes, read_adapter
from trainchain.core.digests import sha256
from trainchain.core.hub import judging, leases, rounds, schema
from trainchain.core.merge.updates import Update, factors_of, merge, modules_of, outer_step
from trainchain.core.rewards import round_price

JUDGED = PLAIN_MERGE.model_copy(update={"leave_one_out": 0.05})
BAD = {name: np.full_like(tensor, REACH * 0.9) for name, tensor in numbers(0).items() if "lora_B" in name}
Measure = Callable[[Adapter], float]


def a_judged_job(town: Town, **options: Any) -> Job:
    return town.publish(**{"rounds": 1, "shards": 5, "held_out": True, "merge": JUDGED, **options})


def bad(seed: int) -> Adapter:
    """A delta that raises the loss, and is not the same bytes as any other."""
    return {**numbers(seed, REACH / 1000), **{name: tensor + seed * 1e-5 for name, tensor in BAD.items()}}


def distance(adapter: Adapter) -> float:
    """A loss of 1 for the base, and more the further B x A is from nothing."""
    parts = (factors_of(adapter, module) for module in modules_of(adapter))
    return 1.0 + float(np.sqrt(sum(np.sum((part.b @ part.a) ** 2) for part in parts)))


def train(job: Job, who: Person, *spoiled: int) -> None:
    """All shards of a round, some of them badly."""
    for shard in range(job.recipe.shards):
        lease = who.must_lease(job)
        delta = bad(shard) if lease["shard"] in spoiled else numbers(shard, REACH / 1000)
        who.contribute(lease, delta).raise_for_status()


def measure(job: Job, by: Measure = distance, *, most: int = 1000) -> int:
    """Let the hub's evaluator do what is asked of it; returns how many adapters it measured of this job."""
    town, done = job.town, 0
    evaluator = town.person(town.evaluator_keys)
    while done < most and (lease := evaluator.lease()) is not None:
        assert lease["kind"] == "evaluate"
        loss = by(evaluator.fetch_adapter(lease["start"])) if lease["job"] == job.id else 1.0
        evaluator.post(f"/v1/leases/{lease['lease']}/evaluation", {"loss": loss}).raise_for_status()
        done += lease["job"] == job.id
        town.tick()
    return done


def without(job: Job, *left_out: int) -> str:
    """The digest of what the first round is merged to without some shards, as anybody computes it."""
    rows = job.town.rows(schema.contributions, job=job.id)
    updates = [
        Update(row["delta"], job.recipe.counts[0][row["shard"]].tokens, job.owner.fetch_adapter(row["delta"]))
        for row in rows
        if row["shard"] not in left_out
    ]
    way, start = job.recipe.merge, read_adapter(INITIAL)
    return sha256(adapter_bytes(outer_step(way, start, merge(way, start, updates)).adapter))


def judged(job: Job) -> dict[str, Any]:
    """What the event of the merge says."""
    events = job.town.ask(f"/v1/jobs/{job.id}/events")["events"]
    return next(event for event in events if event["event"] == "merging->merged")


@pytest.fixture(autouse=True)
def nothing_else_to_measure(town: Town) -> None:
    evaluator = town.person(town.evaluator_keys)
    while (lease := evaluator.lease()) is not None:
        evaluator.post(f"/v1/leases/{lease['lease']}/evaluation", {"loss": 1.0}).raise_for_status()
        town.tick()


def test_a_round_that_holds_is_merged_as_it_is_and_measured_once(town: Town, anna: Person) -> None:
    job = a_judged_job(town, rounds=2)
    train(job, anna)
    town.tick()
    assert (job.round(1)["state"], job.round(1)["adapter"]) == ("merging", None), "it waits for its loss"
    assert job.view()["evaluations"] == [{"round": 0, "state": "open", "loss": None, "samples": None}]

    assert measure(job) == 2, "the base, and the merge"

    assert (job.round(1)["state"], job.row["round"]) == ("merged", 2)
    assert job.round(1)["adapter"] == without(job)
    view = job.view()
    assert [row["round"] for row in view["evaluations"]] == [0, 1]
    assert view["rounds_done"][0]["loss"] == view["rounds_done"][0]["judged"][0]["loss"] > 1.0
    assert (judged(job)["judged"], judged(job)["left_out"]) == ("held", [])


def test_a_round_that_fails_is_merged_without_the_culprit_who_is_paid_all_the_same(town: Town, anna: Person) -> None:
    job = a_judged_job(town)
    train(job, anna, 3)
    town.tick()

    assert measure(job) == 1 + 1 + 5

    assert job.round(1)["adapter"] == without(job, 3) != without(job)
    (told,) = job.view()["rounds_done"]
    assert [shard["merge"]["weight"] for shard in told["shards"]] == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert told["shards"][3]["merge"]["why"] == "leave-one-out"
    assert told["loss"] == min(one["loss"] for one in told["judged"]) < 1.05 < told["judged"][0]["loss"]
    assert told["judged"][0]["left_out"] == []
    assert sorted(one["left_out"] for one in told["judged"][1:]) == [[[1, shard]] for shard in range(5)]
    assert judged(job)["judged"] == "held"
    assert judged(job)["left_out"] == [told["shards"][3]["delta"]]
    assert job.state == "settled"
    assert town.chain.job(job.id).settled == round_price(job.recipe, 1)
    assert [line.split()[1] for line in describe(job.view()).splitlines() if line.endswith("  left out")] == ["3"]
    assert town.http.get(f"{town.url}/v1/objects/{told['adapter']}").status_code == 200
    tried = [row["merge"] for row in town.rows(schema.evaluations, job=job.id) if row["merge"]]
    kept = {digest for one in tried for digest in one["sizes"]} - {told["adapter"], told["outer_step"]}
    assert len(kept) == 2 * (len(tried) - 1)
    assert town.http.get(f"{town.url}/v1/objects/{told['outer_step']}").status_code == 200
    named = {row["digest"] for row in town.rows(schema.objects, job=job.id)}
    assert not kept & named, "what was only tried is kept by nobody"
    assert town.hub.objects.size(sorted(kept)[0]) is None


def test_two_culprits_are_found_one_after_the_other(town: Town, anna: Person) -> None:
    job = a_judged_job(town, shards=7)
    train(job, anna, 1, 4)
    town.tick()

    assert measure(job) == 1 + 1 + 7 + 6

    assert job.round(1)["adapter"] == without(job, 1, 4)
    assert (judged(job)["judged"], len(judged(job)["left_out"])) == ("held", 2)


def test_where_leaving_one_out_makes_it_no_better_all_stay(town: Town, anna: Person) -> None:
    job = a_judged_job(town)
    train(job, anna)
    town.tick()

    assert measure(job, lambda adapter: 1.0 if distance(adapter) == 1.0 else 2.0) == 1 + 1 + 5

    assert job.round(1)["adapter"] == without(job)
    assert (judged(job)["judged"], judged(job)["left_out"]) == ("failed", [])


def test_of_two_none_is_left_out(town: Town, anna: Person) -> None:
    job = a_judged_job(town, shards=2)
    train(job, anna, 0)
    town.tick()

    assert measure(job) == 2

    assert job.round(1)["adapter"] == without(job)
    assert judged(job)["judged"] == "failed"


def test_a_round_that_nobody_measures_goes_on_unjudged(town: Town, anna: Person) -> None:
    job = a_judged_job(town)
    train(job, anna, 3)
    town.tick()
    town.clock.forward(judging.PATIENCE)
    town.tick()
    assert job.round(1)["state"] == "merging"

    town.clock.forward(1)
    town.tick()

    assert (job.state, job.round(1)["adapter"]) == ("settled", without(job))
    assert (judged(job)["judged"], judged(job)["loss"]) == ("unjudged", None)
    assert measure(job) == 2, "it is measured as any other, to be told"
    assert job.view()["rounds_done"][0]["loss"] > 1.05


def test_an_evaluator_that_dies_half_way_leaves_the_best_that_it_measured(town: Town, anna: Person) -> None:
    job = a_judged_job(town)
    train(job, anna, 3)
    town.tick()
    wanted: dict[str, int] = {}
    measure(job, most=2)
    for row in town.rows(schema.evaluations, job=job.id, round=1):
        for digest in row["merge"]["left_out"]:
            wanted[digest] = row["candidate"]
    culprit = next(row["delta"] for row in town.rows(schema.contributions, job=job.id) if row["shard"] == 3)
    measure(job, most=wanted[culprit])
    left = [row["state"] for row in town.rows(schema.evaluations, job=job.id)].count("open")
    assert left == 5 - wanted[culprit]

    evaluator = town.person(town.evaluator_keys)
    lease = evaluator.lease() if left else None
    town.clock.forward(judging.PATIENCE + 1)
    town.tick()
    if lease is not None:
        report = evaluator.post(f"/v1/leases/{lease['lease']}/evaluation", {"loss": 0.5})
        assert report.status_code == 200, "too late, and no harm done"

    assert (job.state, job.round(1)["adapter"]) == ("settled", without(job, 3))
    assert evaluator.lease() is None, "nothing that was only tried is asked for any more"


def test_a_hub_that_is_killed_anywhere_comes_to_the_same(tmp_path: Path) -> None:
    town = Town(tmp_path)
    try:
        anna = town.person()
        job = a_judged_job(town, shards=3)
        train(job, anna, 1)
        steps = 0
        while job.round(1)["state"] != "merged":
            town.stop()
            town.start()
            leases.extend_all(town.hub)
            if not rounds.tick(town.hub):
                assert measure_one(job)
            steps += 1
            assert steps < 40

        assert job.round(1)["adapter"] == without(job, 1)
        town.tick()
        assert job.state == "settled"
        assert len(town.rows(schema.evaluations, job=job.id)) == 1 + 1 + 3
    finally:
        town.close()


def measure_one(job: Job) -> bool:
    evaluator = job.town.person(job.town.evaluator_keys)
    lease = evaluator.must_lease()
    loss = distance(evaluator.fetch_adapter(lease["start"]))
    return evaluator.post(f"/v1/leases/{lease['lease']}/evaluation", {"loss": loss}).is_success


def test_of_many_the_oddest_are_tried(town: Town) -> None:
    start = read_adapter(INITIAL)
    common = numbers(1, REACH / 4)
    updates = [
        Update(f"{number:064x}", 1.0 + number, {name: tensor + numbers(number + 9, REACH / 50)[name] for name, tensor in
               common.items()})
        for number in range(20)
    ]  # fmt: skip
    odd = {7, 13}
    updates = [
        one._replace(delta={name: -tensor for name, tensor in one.delta.items()}) if at in odd else one
        for at, one in enumerate(updates)
    ]

    tried = judging.oddest(start, updates, [("other", one.digest) for one in updates])

    assert len(tried) == judging.MOST_TRIED
    assert {tried[0][1], tried[1][1]} == {f"{number:064x}" for number in odd}


def test_a_job_without_held_out_data_cannot_be_judged(town: Town) -> None:
    made = town.publish(merge=PLAIN_MERGE, escrow=0).recipe.model_dump(mode="json")
    made["merge"]["leave_one_out"] = 0.1

    answer = town.owner.post("/v1/jobs", {"recipe": made, "salt": "0x" + "7c" * 32})

    assert (answer.status_code, answer.json()["code"]) == (422, "job.invalid")
