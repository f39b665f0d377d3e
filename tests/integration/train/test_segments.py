"""The same class gives the same bytes: whole, interrupted, replayed, in other processes."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.integration.train.conftest import Job
from trainchain.core.errors import TrainChainError
from trainchain.core.segments import State, read_state, segment_ends, start_leaf, start_state, state_digests
from trainchain.core.train.trainer import Engine, ShardResult

LEASE = "0x" + "ab" * 32
MakeJob = Callable[..., Job]


class Stopped(BaseException):
    """The process is killed, as far as one process can play it."""


def stop_at(step: int) -> Callable[[int, int, int, float], None]:
    def on_step(number: int, steps: int, tokens: int, loss: float) -> None:
        if number == step:
            raise Stopped

    return on_step


def states_in(folder: Path, engine: Engine) -> list[State]:
    """The start, and every state that a shard left behind."""
    recipe = engine.recipe
    ends = segment_ends(recipe.steps, recipe.training.segment_steps)
    shapes = engine._adapted.shapes
    paths = [folder / f"state-{number:05}.safetensors" for number in range(1, len(ends) + 1)]
    return [read_state(path.read_bytes(), t, shapes) for path, t in zip(paths, ends, strict=True)]


def the_same(result: ShardResult, whole: ShardResult) -> bool:
    bits = all(result.delta[name].tobytes() == whole.delta[name].tobytes() for name in whole.delta)
    return bits and (result.leaves, result.state_root, result.losses) == (whole.leaves, whole.state_root, whole.losses)


@pytest.mark.parametrize("adapter_path", ["fused", "peft"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_shard_goes_on_from_its_last_segment(
    make_job: MakeJob, tmp_path: Path, precision: str, adapter_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainchain.core.train.trainer.REPORT_SECONDS", 0.0)
    job = make_job(steps=7, segment_steps=2, precision=precision, adapter_path=adapter_path)
    whole = job.engine().train(job.start, 2, 1, LEASE)

    with pytest.raises(Stopped):
        job.engine().train(job.start, 2, 1, LEASE, stop_at(6), states=tmp_path / "states")
    result = job.engine().train(job.start, 2, 1, LEASE, states=tmp_path / "states")

    assert (whole.resumed, result.resumed) == (0, 2)
    assert the_same(result, whole)
    again = job.engine().train(job.start, 2, 1, LEASE, states=tmp_path / "states")
    assert again.resumed == 4
    assert the_same(again, whole)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_segment_replays_to_the_same_state(make_job: MakeJob, tmp_path: Path, precision: str) -> None:
    job = make_job(steps=5, segment_steps=2, precision=precision)
    engine = job.engine()
    result = engine.train(job.start, 1, 1, LEASE, states=tmp_path)
    states = [start_state(job.start), *states_in(tmp_path, engine)]
    auditor = job.engine()
    auditor.train(job.start, 1, 0, LEASE)

    for number, (before, after) in enumerate(pairwise(states)):
        found = auditor.replay(before, 1, 1, number)
        assert state_digests(found) == state_digests(after) == result.segments[number].digests
        assert found.t == after.t

    other = auditor.replay(states[0], 1, 0, 0)
    assert state_digests(other) != result.segments[0].digests
    with pytest.raises(TrainChainError, match="does not start after step 2"):
        auditor.replay(states[1], 1, 1, 0)


def test_a_shard_that_goes_on_with_moments_is_one_longer_shard(make_job: MakeJob) -> None:
    long = make_job(rounds=1, shards=1, steps=8, segment_steps=2)
    short = make_job(rounds=2, shards=1, steps=4, segment_steps=2, merge={"moments": "merged"})
    whole, engine = long.engine().train(long.start, 1, 0, LEASE), short.engine()

    first = engine.train(short.start, 1, 0, LEASE)
    second = engine.train(dict(first.end), 2, 0, LEASE, moments=first.moments)

    assert all(second.end[name].tobytes() == whole.end[name].tobytes() for name in whole.end)
    assert [state_digests(State(8, second.end, *second.moments))] == [whole.segments[-1].digests]
    assert second.leaves[0] == start_leaf(bytes.fromhex(LEASE[2:]), first.end, first.moments)
    anew = engine.train(dict(first.end), 2, 0, LEASE)
    assert any(anew.end[name].tobytes() != whole.end[name].tobytes() for name in whole.end)


def test_handed_on_moments_replay_and_go_on_from_a_segment(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainchain.core.train.trainer.REPORT_SECONDS", 0.0)
    job = make_job(steps=4, segment_steps=2, merge={"moments": "merged"})
    engine = job.engine()
    first = engine.train(job.start, 1, 0, LEASE)
    start, moments = dict(first.end), first.moments
    whole = engine.train(start, 2, 0, LEASE, moments=moments, states=tmp_path / "whole")

    with pytest.raises(Stopped):
        job.engine().train(start, 2, 0, LEASE, stop_at(4), moments=moments, states=tmp_path / "torn")
    again = job.engine().train(start, 2, 0, LEASE, moments=moments, states=tmp_path / "torn")

    assert again.resumed == 1
    assert the_same(again, whole)
    states = [start_state(start, moments), *states_in(tmp_path / "whole", engine)]
    for number, (before, after) in enumerate(pairwise(states)):
        assert state_digests(engine.replay(before, 2, 0, number)) == state_digests(after)
    with pytest.raises(TrainChainError, match="another shard, or"):
        engine.train(start, 2, 0, LEASE, states=tmp_path / "whole")


def test_a_segment_ends_with_moments_that_bf16_can_hold(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(steps=4, segment_steps=2)
    engine = job.engine()
    result = engine.train(job.start, 1, 0, LEASE, states=tmp_path)

    last = states_in(tmp_path, engine)[-1]
    assert state_digests(last) == result.segments[-1].digests
    assert all(last.w[name].tobytes() == result.end[name].tobytes() for name in result.end)
    assert all(np.abs(last.v[name]).max() > 0 for name in last.v)


def torn_index(folder: Path) -> None:
    path = folder / "segments.jsonl"
    path.write_bytes(path.read_bytes()[:-9])


def torn_state(folder: Path) -> None:
    path = folder / "state-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def altered_state(folder: Path) -> None:
    path = folder / "state-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lost_state(folder: Path) -> None:
    (folder / "state-00001.safetensors").unlink()


def lost_index(folder: Path) -> None:
    (folder / "segments.jsonl").unlink()


@pytest.mark.parametrize(
    ("harm", "kept"), [(torn_index, 2), (torn_state, 2), (altered_state, 1), (lost_state, 0), (lost_index, 0)]
)
def test_what_is_torn_is_trained_again(
    make_job: MakeJob, tmp_path: Path, harm: Callable[[Path], None], kept: int
) -> None:
    job = make_job(steps=6, segment_steps=2)
    engine = job.engine()
    whole = engine.train(job.start, 1, 0, LEASE, states=tmp_path)
    harm(tmp_path)

    result = engine.train(job.start, 1, 0, LEASE, states=tmp_path)

    assert result.resumed == kept
    assert the_same(result, whole)
    assert engine.train(job.start, 1, 0, LEASE, states=tmp_path).resumed == 3


def test_states_of_another_shard_are_refused_and_left_alone(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(steps=2, segment_steps=1)
    engine = job.engine()
    engine.train(job.start, 1, 0, LEASE, states=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    with pytest.raises(TrainChainError, match="another shard") as caught:
        engine.train(job.start, 1, 1, LEASE, states=tmp_path)

    assert caught.value.code == "state.invalid"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_states_of_another_numeric_class_are_trained_again(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(steps=2, segment_steps=1)
    engine = job.engine()
    whole = engine.train(job.start, 1, 0, LEASE, states=tmp_path)
    lines = (tmp_path / "segments.jsonl").read_text().splitlines()
    head = json.loads(lines[0]) | {"numeric_class": "another"}
    (tmp_path / "segments.jsonl").write_text("\n".join([json.dumps(head), *lines[1:]]) + "\n")

    result = engine.train(job.start, 1, 0, LEASE, states=tmp_path)

    assert result.resumed == 0
    assert the_same(result, whole)


def test_a_smaller_split_goes_on_where_a_larger_one_stopped(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainchain.core.train.trainer.REPORT_SECONDS", 0.0)
    job = make_job(steps=6, segment_steps=2)
    whole = job.engine().train(job.start, 1, 0, LEASE)
    with pytest.raises(Stopped):
        job.engine().train(job.start, 1, 0, LEASE, stop_at(4), states=tmp_path)

    smaller = Engine(job.recipe, job.model, job.data, threads=1, micro_tokens=48)
    result = smaller.train(job.start, 1, 0, LEASE, states=tmp_path)

    assert [segment.micro_tokens for segment in result.segments] == [192, 48, 48]
    assert result.leaves[:2] == whole.leaves[:2]
    assert result.losses == pytest.approx(whole.losses, rel=1e-4)


def test_data_is_tokenised_once_and_mapped(make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()
    plain = job.engine().train(job.start, 1, 0, LEASE)
    first = Engine(job.recipe, job.model, job.data, threads=1, cache=tmp_path / "cache")
    loss = first.evaluate(None)

    def never(*_: object) -> None:
        raise AssertionError("the data was tokenised again")

    monkeypatch.setattr("trainchain.core.train.rows.encoder", never)
    second = Engine(job.recipe, job.model, job.data, threads=1, cache=tmp_path / "cache")

    assert second.train(job.start, 1, 0, LEASE).leaves == plain.leaves
    assert second.evaluate(None) == loss
    assert isinstance(second.documents.ids[0].base, np.memmap | np.ndarray)
    assert not second.documents.ids[0].flags.writeable


def test_the_next_shard_is_planned_while_this_one_trains(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(rounds=2, shards=2)
    engine = job.engine()
    planned: list[tuple[int, int]] = []
    plan = engine._plan
    monkeypatch.setattr(engine, "_plan", lambda *where: planned.append(where) or plan(*where))

    results = {where: engine.train(job.start, *where, LEASE) for where in [(1, 0), (1, 1), (2, 1), (2, 0)]}

    # (2, 1) was not the guess; (2, 0) was, and is still there when it comes
    assert planned == [(1, 0), (1, 1), (2, 0), (2, 1), (2, 1)]
    assert [result.leaves for where, result in results.items()] == [
        make_job(rounds=2, shards=2).engine().train(job.start, *where, LEASE).leaves for where in results
    ]
