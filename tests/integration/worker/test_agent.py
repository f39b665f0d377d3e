"""A worker and its child: what is handed in, what is given back, and what a shard goes on from."""

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from tests.fixtures_hub import STEPS, Job, Town
from tests.integration.worker.conftest import Bench
from trainchain.core.hub import schema
from trainchain.core.hub.service import LEASE_SECONDS
from trainchain.core.models import MAX_ANSWER
from trainchain.core.worker.cache import Cache
from trainchain.core.worker.fleet import Quota, Stopped
from trainchain.core.worker.volatile import Volatile

USUAL = 2 * 64
"""micro_batch_size x sequence_len of the job."""


def contribution(town: Town, job: Job) -> dict[str, Any]:
    found: dict[str, Any] = town.row(schema.contributions, job=job.id)
    return found


def uploaded(town: Town, lease: str) -> list[Any]:
    return town.rows(schema.objects, lease=lease)


def test_a_shard_is_trained_signed_and_paid(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=1, shards=1)

    bench.work(job.id, checkpointing=True)

    (opened,), (trained,) = bench.asked("open"), bench.asked("train")
    assert (opened["checkpointing"], opened["micro_tokens"]) == (True, None)
    assert Path(opened["cache"]) == bench.home / "cache" / "tokens"
    assert Path(trained["states"]).is_relative_to(bench.home / "work" / "device")
    kept = contribution(town, job)
    assert kept["signed"]["micro_tokens"] == [USUAL] * STEPS
    assert (kept["worker"], kept["lease"]) == (bench.person.address, trained["lease"])
    assert (bench.told("accepted")[0]["resumed"], bench.left()) == (0, set())
    assert (bench.home / "receipts" / job.id / f"{kept['lease']}.json").exists()


def test_the_worker_s_own_micro_batch_reaches_the_child(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=1, shards=1)

    bench.work(job.id, micro_tokens=48)

    assert contribution(town, job)["signed"]["micro_tokens"] == [48] * STEPS
    assert [request["micro_tokens"] for request in bench.asked("open")] == [48]


@pytest.mark.parametrize("code", ["train.out_of_memory", "die"])
def test_a_shard_that_does_not_fit_goes_on_under_its_lease_with_half(town: Town, bench: Bench, code: str) -> None:
    job = town.publish(rounds=1, shards=2)
    bench.plan({"op": "train", "segment": 3, "code": code})

    bench.work(job.id, shards=2)

    first, again, other = bench.asked("train")
    assert first == {**again, "pid": first["pid"]}
    assert first["pid"] != again["pid"] == other["pid"]
    assert [request["micro_tokens"] for request in bench.asked("open")] == [None, USUAL // 2]
    rows = {row["shard"]: row["signed"] for row in town.rows(schema.contributions, job=job.id)}
    assert rows[first["shard"]]["micro_tokens"] == [USUAL, USUAL, USUAL // 2, USUAL // 2]
    assert rows[other["shard"]]["micro_tokens"] == [USUAL // 2] * STEPS, "what did not fit is not tried again"
    assert [event["resumed"] for event in bench.told("accepted")] == [2, 0]
    assert [event["micro_tokens"] for event in bench.told("smaller")] == [USUAL // 2]
    assert (bench.told("failed"), bench.told("given_back")) == ([], [])


def test_a_second_failure_gives_the_lease_back_and_uploads_nothing(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=1, shards=1)
    fails = {"op": "train", "code": "train.out_of_memory"}
    bench.plan({**fails, "segment": 2}, {**fails, "segment": 3})

    bench.work(job.id)

    first, again, fresh = bench.asked("train")
    assert first["lease"] == again["lease"] != fresh["lease"]
    assert first["states"] == fresh["states"], "the next lease of the shard goes on where this one ended"
    assert [event["code"] for event in bench.told("failed")] == ["train.out_of_memory"]
    assert [event["lease"] for event in bench.told("given_back")] == [first["lease"]]
    assert town.row(schema.leases, id=first["lease"])["state"] == "expired"
    assert uploaded(town, first["lease"]) == []
    assert contribution(town, job)["signed"]["micro_tokens"] == [USUAL, USUAL // 2, USUAL // 4, USUAL // 4]


@pytest.mark.parametrize(
    ("item", "code"),
    [
        ({"op": "train", "segment": 2, "code": "train.diverged"}, "train.diverged"),
        ({"op": "train", "segment": 1, "code": "data.count_mismatch"}, "data.count_mismatch"),
        ({"op": "train", "segment": 1, "code": "state.invalid"}, "state.invalid"),
        ({"op": "open", "code": "data.format"}, "data.format"),
        ({"op": "open", "code": "train.out_of_memory"}, "train.out_of_memory"),
        ({"op": "open", "code": "die"}, "train.child_died"),
        ({"op": "train", "segment": 1, "code": "no.such_code"}, "train.child_died"),
    ],
    ids=str,
)
def test_what_the_child_refuses_is_told_and_given_back(
    town: Town, bench: Bench, item: dict[str, Any], code: str
) -> None:
    job = town.publish(rounds=1, shards=1)
    bench.plan(item, item) if code == "train.child_died" and item["op"] == "train" else bench.plan(item)

    bench.work(job.id)

    (failed,), (back,) = bench.told("failed"), bench.told("given_back")
    assert (failed["code"], failed["lease"]) == (code, back["lease"])
    assert town.row(schema.leases, id=back["lease"])["state"] == "expired"
    assert uploaded(town, back["lease"]) == []
    assert len([row for row in bench.asked("train") if row["lease"] == back["lease"]]) <= 1 + (code[-4:] == "died")
    assert [row["worker"] for row in town.rows(schema.contributions, job=job.id)] == [bench.person.address]


@pytest.mark.parametrize("code", ["model.unreadable", "source.gated", "cache.full", "key.invalid", "seal.broken"])
def test_a_job_that_the_machine_cannot_do_is_left_alone_and_another_is_done(
    town: Town, bench: Bench, code: str
) -> None:
    jobs = {town.publish(rounds=1, shards=1).id for _ in range(2)}
    bench.plan({"op": "open", "code": code})

    bench.worker().run(Quota(1))

    (failed,) = bench.told("failed")
    assert (failed["code"], failed["unable"]) == (code, True)
    assert {one["job"] for one in bench.told("accepted")} == jobs - {failed["job"]}
    assert town.rows(schema.contributions, job=failed["job"]) == []
    bench.work(failed["job"])  # started again, it tries again
    assert {one["job"] for one in bench.told("accepted")} == jobs


def test_nothing_is_trained_on_from_states_that_diverged(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=1, shards=1)
    bench.plan({"op": "train", "segment": 4, "code": "train.diverged"})

    bench.work(job.id)

    assert bench.told("accepted")[0]["resumed"] == 0


def test_what_the_hub_refused_is_trained_anew(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=1, shards=1)
    bench.plan({"op": "delta", "move": 9.0})

    bench.work(job.id)

    assert [event["code"] for event in bench.told("failed")] == ["delta.out_of_reach"]
    assert bench.told("accepted")[0]["resumed"] == 0


def test_a_worker_that_is_stopped_and_started_goes_on_from_the_last_segment(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=1, shards=1)
    bench.plan({"op": "train", "segment": 4, "code": "hang"})
    worker = bench.worker(job=job.id, on_event=lambda e: worker.stop() if e.get("step") == 3 else None, sleep=None)

    with pytest.raises(Stopped):
        worker.run(Quota(None))
    between = bench.left()
    bench.plan()  # the first child may have been ended before it came to what was planned
    bench.work(job.id)

    assert town.row(schema.leases, id=bench.asked("train")[0]["lease"])["state"] == "expired"
    assert len([name for name in between if "/states/state-" in name]) == 3
    assert [event["resumed"] for event in bench.told("accepted")] == [3]
    assert bench.left() == set()


def test_what_is_over_is_cleared_away(town: Town, bench: Bench) -> None:
    over, running = town.publish(rounds=1, shards=1), town.publish(rounds=2, shards=2)
    for job in (over, running, running):
        town.person().work(job)
        town.tick()
    work = bench.home / "work" / "device"
    theirs = work / "0x1234567890abcdef" / "1-0-abc" / "states"
    gone = [work / over.id[:18] / "1-0-abc", work / running.id[:18] / "1-0-abc"]
    kept = work / running.id[:18] / "2-0-abc"
    for folder in (theirs, *gone, kept):
        folder.mkdir(parents=True)
        (folder / "state-00001").write_text("1", encoding="utf-8")

    bench.work(running.id, shards=0)

    assert bench.left() == {
        f"device/{kept.relative_to(work).as_posix()}/state-00001",
        "device/0x1234567890abcdef/1-0-abc/states/state-00001",
    }


def test_a_shard_that_others_finished_is_left(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=1, shards=1)

    other = town.person()

    def finish_elsewhere(event: dict[str, Any]) -> None:
        if event.get("step") == 2:
            town.clock.forward(LEASE_SECONDS + 1)
            other.work(job)
        if event["event"] == "failed":
            worker.stop()

    worker = bench.worker(job=job.id, on_event=finish_elsewhere)

    with pytest.raises(Stopped):
        worker.run(Quota(1))

    assert [event["code"] for event in bench.told("failed")] == ["shard.already_accepted"]
    assert (bench.told("given_back"), bench.left()) == ([], set())


@pytest.mark.parametrize(("held_out", "loss"), [(True, 1.5), (False, None)])
def test_adapters_are_measured_and_asked(town: Town, evaluator: Bench, held_out: bool, loss: float | None) -> None:
    job = town.publish(rounds=1, shards=1, held_out=held_out, samples=["Who?", "Where?"])

    evaluator.worker().run(Quota(1))

    (found,) = job.view()["evaluations"]
    answers = [f"{prompt}! " * 9000 for prompt in ("Who?", "Where?")]
    assert (found["loss"], found["samples"]) == (loss, [text[:MAX_ANSWER] for text in answers])
    assert evaluator.told("evaluated")[0]["loss"] == loss


def test_an_evaluation_that_does_not_fit_is_tried_with_less(town: Town, evaluator: Bench) -> None:
    town.publish(rounds=1, shards=1, held_out=True)
    evaluator.plan({"op": "evaluate", "code": "train.out_of_memory"})

    evaluator.worker().run(Quota(1))

    assert [request["micro_tokens"] for request in evaluator.asked("open")] == [None, USUAL // 2]
    assert (len(evaluator.told("evaluated")), evaluator.told("failed")) == (1, [])


def test_events_are_json(bench: Bench, town: Town) -> None:
    job = town.publish(rounds=1, shards=1)

    bench.work(job.id)

    brought = ("fetching", "fetched")
    told = [event["event"] for event in bench.events if event["event"] not in brought]
    assert told == ["leased", *["step"] * STEPS, "accepted"]
    assert [event["event"] for event in bench.events].count("fetched") == 4, "recipe, base, data, start"
    json.dumps(bench.events)


def test_files_are_hashed_when_a_job_opens_and_not_for_every_lease(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=1, shards=3)
    base = job.recipe.base_model.files[0].sha256
    path = bench.home / "cache" / "objects" / base[:2] / base[2:]

    def spoil(event: dict[str, Any]) -> None:
        if event["event"] == "accepted":
            path.write_bytes(b"x")

    bench.work(job.id, shards=2, on_event=spoil)
    assert (len(bench.asked("open")), bench.told("damaged")) == (1, [])

    bench.work(job.id)
    assert bench.told("damaged")[0]["digest"] == base
    assert len(bench.told("accepted")) == 3


def test_a_cancelled_private_job_is_not_taken_from_under_another_worker_of_the_home(town: Town, bench: Bench) -> None:
    job = town.publish_sealed(rounds=1, shards=1)
    idle = Cache(bench.home / "cache")
    told: list[bool] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "fetching" and not told:
            job.owner.post(f"/v1/jobs/{job.id}/cancel").raise_for_status()
            told.append(idle.forget(job.id))

    bench.work(job.id, cache=Cache(bench.home / "cache", on_event=on_event))

    assert (told, len(bench.told("accepted"))) == ([False], 1)
    assert idle.private_jobs() == []


def test_a_private_job_that_is_over_goes_though_there_is_always_work(tmp_path: Path) -> None:
    with contextlib.closing(Town(tmp_path / "town")) as town, contextlib.closing(Bench(town, tmp_path)) as bench:
        private = town.publish_sealed(rounds=1, shards=2)
        here: list[list[str]] = []
        cache = Cache(bench.home / "cache")

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] == "accepted":
                here.append(cache.private_jobs())
                if event["job"] == private.id:
                    private.owner.post(f"/v1/jobs/{private.id}/cancel").raise_for_status()
                    town.publish(rounds=1, shards=2)

        bench.worker(on_event=on_event, cache=cache).run(Quota(3))

        assert here == [[private.id], [private.id], []]


def test_nothing_of_a_shard_in_work_outlives_a_private_job(tmp_path: Path) -> None:
    """Its states follow from the data."""
    with contextlib.closing(Town(tmp_path / "town")) as town, contextlib.closing(Bench(town, tmp_path)) as bench:
        private = town.publish_sealed(rounds=1, shards=1)
        bench.plan(*({"op": "train", "segment": at, "code": "die"} for at in (2, 3)))
        here: list[set[str]] = []

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] == "given_back":
                here.append(bench.left())
                private.owner.post(f"/v1/jobs/{private.id}/cancel").raise_for_status()
                town.publish(rounds=1, shards=1)

        bench.worker(on_event=on_event).run(Quota(1))

        assert [len([name for name in found if "/state-" in name]) for found in here] == [2]
        assert bench.left() == set()
        assert len(bench.told("forgotten")) == 1


def test_a_job_whose_keys_the_hub_lost_leaves_no_folder_for_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr("trainchain.core.worker.agent.Volatile", partial(Volatile, memory=memory))
    with contextlib.closing(Town(tmp_path / "town")) as town, contextlib.closing(Bench(town, tmp_path)) as bench:
        private = town.publish_sealed(rounds=1, shards=1)
        town.clock.forward(1)  # the first in the queue
        fine = town.publish(rounds=1, shards=1)
        with town.hub.store.write() as db:
            db.execute(delete(schema.keys).where(schema.keys.c.job == private.id))

        bench.worker().run(Quota(1))

        assert [(event["code"], event["unable"]) for event in bench.told("failed")] == [("key.invalid", True)]
        assert [event["job"] for event in bench.told("accepted")] == [fine.id]
        assert list(memory.iterdir()) == []
