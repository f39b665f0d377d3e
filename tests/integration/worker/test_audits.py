"""Draws that fall on a worker's shards are answered from its disk, come what may; and replays of others' are done."""

import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_hub import STEPS, Job, Town
from tests.integration.worker.conftest import Bench
from trainchain.cli.audits import describe
from trainchain.core.client import HubClient
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import audits, schema
from trainchain.core.models import Check
from trainchain.core.segments import NO_END
from trainchain.core.worker.answers import DRAW
from trainchain.core.worker.fleet import Quota

OWNER = Check(auditors="owner", answer=3600, timeout=1800, before_merge=0, spend=0.1)


class Interrupted(BaseException):
    """The worker's process is killed here."""


def publish(town: Town, **options: Any) -> Job:
    return town.publish(**{"rounds": 1, "shards": 1, "check": OWNER, **options})


def kept(bench: Bench) -> list[Path]:
    return sorted((bench.home / "work").glob(f"*/*/*/{DRAW}"))


def audit(town: Town, job: Job) -> dict[str, Any]:
    """Of a job with one shard."""
    return town.row(schema.audits, job=job.id)


def hand_in(bench: Bench, job: Job, **options: Any) -> None:
    """One shard, and no waiting for its verdict."""

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "auditing":
            raise Interrupted

    with pytest.raises(Interrupted):
        bench.work(job.id, on_event=on_event, **options)


def replays(evaluator: Bench, job: Job) -> list[dict[str, Any]]:
    """The operator's own worker replays what waits for it, or the owner's does."""
    evaluator.town.clock.forward(20)  # whoever is second in the line is asked by now
    evaluator.worker(job=job.id, audits_only=True).run(Quota(1))
    return evaluator.told("replayed")


def test_a_draw_is_answered_kept_and_told_when_its_verdict_comes(town: Town, bench: Bench, evaluator: Bench) -> None:
    job = publish(town)

    hand_in(bench, job)

    drawn = audit(town, job)
    segment = drawn["segment"]
    assert (drawn["state"], drawn["wants"], drawn["at_risk"]) == ("answered", [], 1)
    (told,), (answered,) = bench.told("drawn"), bench.told("answered")
    assert (told["segment"], answered["states"]) == (segment, sorted({segment, STEPS} - {0}))
    (note,) = kept(bench)
    assert note.stat().st_mode & 0o777 == 0o600
    names = {path.name for path in (note.parent / "states").glob("state-*")}
    assert names == {f"state-{index:05}.safetensors" for index in {segment, segment + 1, STEPS} - {0}}
    assert not (note.parent / "out").exists()
    receipt = json.loads(Path(bench.told("accepted")[0]["receipt"]).read_bytes())
    assert receipt["draw"]["segment"] == segment
    round_ = job.round(1)
    assert (receipt["secret_hash"], receipt["secret_signature"]) == (
        round_["secret_hash"],
        round_["secret_signature"],
    )

    (replayed,) = replays(evaluator, job)
    assert (replayed["segment"], replayed["target"]) == (segment, drawn["lease"])
    assert town.rows(schema.replays, job=job.id)[0]["done"] is not None
    bench.worker(job=job.id).run(Quota(0))

    (verdict,) = bench.told("audited")
    assert (verdict["state"], verdict["code"], verdict["forfeited"]) == ("passed", "audit.passed", "0")
    assert verdict["hint"] == f"trainchain jobs show {job.id[:12]} --evidence {drawn['lease']}"
    assert kept(bench) == []
    assert bench.left() - {".answers"} == set()


def test_the_worker_lingers_until_the_verdict_and_says_so_once(town: Town, bench: Bench, evaluator: Bench) -> None:
    job, waited = publish(town), []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            replays(evaluator, job)

    bench.work(job.id, sleep=sleep)

    assert waited == [2.0, 4.0, 8.0]
    (told,) = bench.told("auditing")
    assert [(one["round"], one["shard"]) for one in told["shards"]] == [(1, 0)]
    assert [event["state"] for event in bench.told("audited")] == ["passed"]


@pytest.mark.parametrize("at", ["handing", "answering"])
def test_a_worker_killed_before_it_answered_answers_when_it_is_back(
    town: Town, bench: Bench, evaluator: Bench, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between contribution and answer: before it heard of the draw, and before it could open anything."""
    job = publish(town)
    if at == "answering":
        with pytest.raises(Interrupted):
            bench.work(job.id, on_event=stop_at("drawn"))
    else:
        client = bench.person.client()
        original = type(client).post

        def lost(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
            found = original(self, path, *arguments, **options)
            if path.endswith("/contribution"):
                raise Interrupted
            return found

        with monkeypatch.context() as patched:
            patched.setattr(type(client), "post", lost)
            with pytest.raises(Interrupted):
                bench.work(job.id)
        assert bench.told("drawn") == []
    assert audit(town, job)["state"] == "drawn"

    with pytest.raises(Interrupted):
        bench.worker(job=job.id, on_event=stop_at("auditing")).run(Quota(0))

    assert audit(town, job)["state"] == "answered"
    assert len(bench.asked("train")) == 1, "nothing was trained again"
    replays(evaluator, job)
    bench.worker(job=job.id).run(Quota(0))
    assert [event["state"] for event in bench.told("audited")] == ["passed"]
    assert kept(bench) == []


def stop_at(event: str) -> Callable[[dict[str, Any]], None]:
    def on_event(told: dict[str, Any]) -> None:
        if told["event"] == event:
            raise Interrupted

    return on_event


def test_what_a_replay_differs_from_is_sent_too_and_what_it_cost_is_told(
    town: Town, bench: Bench, evaluator: Bench, owner: Bench
) -> None:
    job = publish(town, owner=owner.person)
    hand_in(bench, job)
    for auditor in (evaluator, owner):
        auditor.plan({"op": "move", "move": 0.05})

    replays(evaluator, job)
    drawn = audit(town, job)
    end = drawn["segment"] + 1
    assert (drawn["state"], drawn["wants"]) == (("answered", []) if end == STEPS else ("drawn", [end]))
    with pytest.raises(Interrupted):
        bench.worker(job=job.id, on_event=stop_at("auditing")).run(Quota(0))
    assert audit(town, job)["state"] == "answered"
    replays(owner, job)
    town.tick()
    bench.worker(job=job.id).run(Quota(0))

    (verdict,) = bench.told("audited")
    assert (verdict["state"], verdict["code"]) == ("failed", "audit.differs")
    assert int(verdict["forfeited"]) == int(bench.told("accepted")[0]["amount"])
    assert kept(bench) == []


def test_no_round_that_is_over_takes_what_a_verdict_is_due_on(
    town: Town, bench: Bench, evaluator: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainchain.core.draws.LEAST", Fraction(1))  # the second shard is drawn, too
    job = publish(town, rounds=2)
    hand_in(bench, job)
    town.tick()
    assert int(job.view()["round"]) == 2

    with pytest.raises(Interrupted):
        bench.worker(job=job.id, on_event=stop_at("auditing")).run(Quota(0))
    hand_in(bench, job)

    assert len(kept(bench)) == 2
    for _ in range(2):
        replays(evaluator, job)
    bench.worker(job=job.id).run(Quota(0))
    assert ([event["state"] for event in bench.told("audited")], kept(bench)) == (["passed"] * 2, [])


def test_silence_is_told_with_what_it_cost(town: Town, bench: Bench) -> None:
    job = publish(town)
    with pytest.raises(Interrupted):
        bench.work(job.id, on_event=stop_at("drawn"))
    with town.hub.store.write() as db:
        db.execute(schema.audits.update().where(schema.audits.c.job == job.id).values(answer_by=town.clock() - 1))
    assert audits.tick(town.hub)

    bench.worker(job=job.id).run(Quota(0))

    (verdict,) = bench.told("audited")
    assert (verdict["state"], verdict["code"]) == ("failed", "audit.silent")
    assert int(verdict["forfeited"]) > 0
    assert kept(bench) == []


def test_without_its_evidence_a_rejection_does_not_say_that_nothing_was_lost(town: Town, bench: Bench) -> None:
    job = publish(town)
    with pytest.raises(Interrupted):
        bench.work(job.id, on_event=stop_at("drawn"))
    with town.hub.store.write() as db:
        db.execute(schema.audits.update().where(schema.audits.c.job == job.id).values(answer_by=town.clock() - 1))
    assert audits.tick(town.hub)
    with town.hub.store.write() as db:
        db.execute(schema.audits.update().where(schema.audits.c.job == job.id).values(evidence=None))

    bench.worker(job=job.id).run(Quota(0))

    (verdict,) = bench.told("audited")
    assert verdict["forfeited"] is None
    assert "What had not vested in this job is forfeited." in describe(verdict)


def test_a_note_that_cannot_be_read_is_named_once(town: Town, bench: Bench) -> None:
    job = publish(town)
    with pytest.raises(Interrupted):
        bench.work(job.id, on_event=stop_at("drawn"))
    (note,) = kept(bench)
    note.write_bytes(b"{")

    bench.worker(job=job.id).run(Quota(0))

    (failed,) = bench.told("failed")
    assert failed["code"] == "state.invalid"
    assert str(note.parent) in failed["message"]
    assert note.exists(), "somebody may still mend it"


def test_a_draw_is_not_forgotten_by_a_device_that_looked_before_another_heard_of_it(
    town: Town, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw what is handed in now, asked the hub too early, and looks at the place when the other has its answer."""
    job = publish(town)
    with pytest.raises(Interrupted):
        bench.work(job.id, on_event=stop_at("drawn"))
    (path,) = kept(bench)
    heard = path.read_bytes()
    path.write_bytes(json.dumps({**json.loads(heard), "answer": None}).encode())
    other, real = bench.worker(job=job.id), HubClient.get

    def early(client: HubClient, address: str, **options: Any) -> Any:
        if address != "/v1/audits":
            return real(client, address, **options)
        path.write_bytes(heard)
        return {"audits": []}

    monkeypatch.setattr(HubClient, "get", early)
    other._answers.look_after()
    assert kept(bench) == [path]

    monkeypatch.undo()
    bench.worker(job=job.id)._answers.look_after()
    assert audit(town, job)["state"] == "answered"


def test_lost_states_are_told_and_the_worker_goes_on(town: Town, bench: Bench) -> None:
    job = publish(town)
    with pytest.raises(Interrupted):
        bench.work(job.id, on_event=stop_at("drawn"))
    for path in (bench.home / "work").rglob("state-*"):
        path.unlink()

    with pytest.raises(Interrupted):
        bench.worker(job=job.id, on_event=stop_at("auditing")).run(Quota(0))

    (failed,) = bench.told("failed")
    assert failed["code"] == "state.invalid"
    assert len(kept(bench)) == 1, "it is kept until the hub says what it comes to"


@pytest.mark.parametrize(("code", "tries"), [("hub.not_a_hub", 4), ("object.unexpected", 4), ("audit.none", 1)])
def test_an_answer_that_is_refused_is_tried_again_until_it_is_taken_unless_that_cannot_be(
    town: Town, bench: Bench, monkeypatch: pytest.MonkeyPatch, code: str, tries: int
) -> None:
    """Each time after twice the wait; a hub that is short of room for a moment costs nobody ten shards."""
    job, now, at = publish(town), [0.0], []
    with pytest.raises(Interrupted):
        bench.work(job.id, on_event=stop_at("drawn"))
    worker = bench.worker(job=job.id)
    answers = worker._answers
    answers._now = lambda: now[0]
    post = type(answers._client).post

    def refuse(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        if path.endswith("/answer"):
            at.append(now[0])
            if len(at) < 4:
                raise TrainChainError(code, "It is refused.")
        return post(self, path, *arguments, **options)

    monkeypatch.setattr(type(answers._client), "post", refuse)
    for second in range(100):
        now[0] = float(second)
        assert answers.look_after()

    assert at == [0.0, 2.0, 6.0, 14.0][:tries]
    assert audit(town, job)["state"] == ("answered" if tries == 4 else "drawn")
    assert len(bench.told("failed")) == min(tries, 3)


@pytest.mark.parametrize("gone", ["secret_hash", "secret_signature"])
def test_no_shard_is_trained_whose_draw_the_hub_has_not_committed_to(town: Town, bench: Bench, gone: str) -> None:
    job = publish(town)
    with town.hub.store.write() as db:
        table = schema.rounds
        other = job.round(1)[gone]
        changed = other[:-4] + ("00" if other[-4:-2] != "00" else "11") + other[-2:]
        db.execute(table.update().where(table.c.job == job.id).values(**{gone: changed}))

    with pytest.raises(TrainChainError) as refused:
        bench.work(job.id)

    assert refused.value.code == "draw.invalid"
    assert bench.asked("train") == []


def test_a_replay_that_has_to_be_split_otherwise_says_so(town: Town, bench: Bench, evaluator: Bench) -> None:
    job = publish(town)
    hand_in(bench, job)
    evaluator.plan({"op": "replay", "round": 1, "code": "train.out_of_memory"})

    replays(evaluator, job)

    signed = town.rows(schema.replays, job=job.id)[0]["signed"]["replay"]
    assert signed["numericClass"] == "fake/split64"
    assert [request["micro_tokens"] for request in evaluator.asked("open")] == [128, 64]


def test_an_auditor_splits_as_the_worker_did(town: Town, bench: Bench, evaluator: Bench) -> None:
    job = publish(town)
    hand_in(bench, job, micro_tokens=48)

    replays(evaluator, job)

    assert [request["micro_tokens"] for request in evaluator.asked("open")] == [48]
    assert town.rows(schema.replays, job=job.id)[0]["signed"]["replay"]["numericClass"] == "fake"


def test_a_split_that_nobody_could_use_is_halved_within_one_lease_and_teaches_nothing_else(
    town: Town, bench: Bench, evaluator: Bench
) -> None:
    """The shard's worker says what its segments were split by, and may say 2^53 - 1."""
    job = publish(town)
    hand_in(bench, job, micro_tokens=48)
    with town.hub.store.write() as db:
        table = schema.contributions
        signed = town.row(table, job=job.id)["signed"] | {"micro_tokens": [2**53 - 1] * STEPS}
        db.execute(table.update().where(table.c.job == job.id).values(signed=signed))
    evaluator.plan(*[{"op": "replay", "round": 1, "code": "train.out_of_memory"}] * 3)

    (replayed,) = replays(evaluator, job)

    assert (evaluator.told("failed"), replayed["shard"]) == ([], 0)
    training = job.recipe.training
    whole = training.batch_size * training.sequence_len
    assert [request["micro_tokens"] for request in evaluator.asked("open")] == [whole >> at for at in range(4)]


def test_an_auditor_that_fails_gives_its_lease_back(town: Town, bench: Bench, evaluator: Bench) -> None:
    job = publish(town)
    hand_in(bench, job)
    evaluator.plan({"op": "replay", "round": 1, "code": "data.format"})

    replays(evaluator, job)

    assert [event["code"] for event in evaluator.told("failed")] == ["data.format"]
    assert len(evaluator.told("given_back")) == 1
    assert audit(town, job)["state"] == "passed", "and took it again"
    assert not list((evaluator.home / "work").rglob("*.safetensors"))


def test_a_start_that_nobody_can_train_from_is_told_by_an_end_that_is_none(
    town: Town, bench: Bench, evaluator: Bench
) -> None:
    """An auditor that gave its lease back would leave the audit to the next one, and that one too, until it is over."""
    job = publish(town)
    hand_in(bench, job)
    evaluator.plan({"op": "replay", "round": 1, "code": "train.diverged"})

    (replayed,) = replays(evaluator, job)

    assert (evaluator.told("failed"), evaluator.told("given_back"), replayed["round"]) == ([], [], 1)
    (row,) = town.rows(schema.replays, job=job.id)
    assert row["signed"]["replay"]["endLeaf"] == NO_END
    assert not list((evaluator.home / "work").rglob("*.safetensors"))


def test_an_auditor_only_trains_nothing(town: Town, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job, waited = publish(town), []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "waiting":
            waited.append(event["reason"])
            raise Interrupted

    monkeypatch.setattr("trainchain.core.worker.agent.POLL_SECONDS", 0.0)
    with pytest.raises(Interrupted):
        bench.worker(job=job.id, audits_only=True, on_event=on_event).run(Quota(1))

    assert (waited, bench.told("leased"), job.shards(1)) == (["no replay is wanted"], [], ["open"])


@pytest.fixture
def owner(town: Town, tmp_path: Path) -> Iterator[Bench]:
    """The worker of somebody who owns a job."""
    made = Bench(town, tmp_path / "owner")
    town.give(made.person.address, 10**6 * 10**18)
    yield made
    made.close()
