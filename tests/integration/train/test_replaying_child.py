"""Another process replays any segment of a shard, and comes to the very leaf that its worker committed to."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.train.conftest import Job
from tests.integration.train.test_child import LEASE, child, train
from trainchain.core.adapter import read_adapter, tensor_specs
from trainchain.core.segments import NO_END, State, read_state, state_bytes, state_digests, state_size

MakeJob = Callable[..., Job]


def interrupted(job: Job, folder: Path, request: dict[str, Any], *, kill_at: int) -> dict[str, Any]:
    """What a shard comes to whose first process is killed after so many steps."""
    with child(stderr=subprocess.DEVNULL) as it:
        it.event()
        it.open(job, folder)
        it.send(**request)
        while not list((folder / "states").glob(f"state-{kill_at:05}.safetensors")):
            assert it.event()["event"] == "step"
        it.process.kill()
        it.process.wait(timeout=10)
        for pipe in (it.process.stdin, it.process.stdout):
            assert pipe
            pipe.close()
    with child(stderr=subprocess.DEVNULL) as it:
        it.event()
        it.open(job, folder)
        done = it.ask(**request)
    assert (done["event"], done["resumed"] >= kill_at) == ("done", True)
    return done


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
@pytest.mark.parametrize("moments", [pytest.param("fresh", marks=pytest.mark.long), "merged"])
def test_every_segment_of_a_resumed_shard_replays_to_its_leaf_in_another_process(
    make_job: MakeJob, tmp_path: Path, moments: str
) -> None:
    job = make_job(steps=240, rounds=2, shards=1, segment_steps=100, merge={"moments": moments})
    first = tmp_path / "first"
    first.mkdir()
    with child(stderr=subprocess.DEVNULL) as it:
        it.event()
        it.open(job, first)
        before = it.ask(**train(first))
    folder = tmp_path / "second"
    folder.mkdir()
    start = {"start": before["end"], "outer_step": before["delta"], "round": 2, "shard": 0}
    request = train(folder, **start, states=str(folder / "states"))
    done = interrupted(job, folder, request, kill_at=1)
    shapes = tensor_specs(job.start)

    with child(stderr=subprocess.DEVNULL) as it:
        it.event()
        it.open(job, folder)
        for segment in range(3):
            state = folder / "states" / f"state-{segment:05}.safetensors" if segment else None
            out = tmp_path / f"replay-{segment}"
            replay = {"op": "replay", "segment": segment, "state": state and str(state), "target": LEASE}
            found = it.ask(**{**start, **replay, "out": str(out)})
            assert found["event"] == "done", found
            assert found["end_leaf"] == done["leaves"][segment + 1]
            assert (found["numeric_class"], found["micro_tokens"]) == (done["numeric_class"], done["micro_tokens"][0])
            data = Path(found["state"]).read_bytes()
            assert data == (folder / "states" / f"state-{segment + 1:05}.safetensors").read_bytes()
            assert len(data) == state_size(shapes)

        wrong = it.ask(**{**start, "op": "replay", "segment": 9, "state": None, "target": LEASE, "out": str(tmp_path)})
        junk = tmp_path / "junk.safetensors"
        junk.write_bytes(b"junk")
        torn = it.ask(
            **{**start, "op": "replay", "segment": 1, "state": str(junk), "target": LEASE, "out": str(tmp_path)}
        )
    assert (wrong["event"], wrong["code"]) == ("error", "state.invalid")
    assert (torn["event"], torn["code"]) == ("error", "state.invalid")


def test_a_state_reads_back_as_its_size_says(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(steps=2)
    with child(stderr=subprocess.DEVNULL) as it:
        it.event()
        it.open(job, tmp_path)
        done = it.ask(**train(tmp_path, states=str(tmp_path / "states")))

    lines = (tmp_path / "states" / "segments.jsonl").read_text(encoding="utf-8").splitlines()
    shapes = tensor_specs(read_adapter(job.initial))
    data = (tmp_path / "states" / "state-00001.safetensors").read_bytes()
    state = read_state(data, 2, shapes)
    assert (done["event"], state_bytes(state) == data, len(data)) == ("done", True, state_size(shapes))
    assert json.loads(lines[1])["digests"] == [digest.hex() for digest in state_digests(state)]


def test_a_claimed_start_that_nobody_can_train_from_has_no_end(make_job: MakeJob, tmp_path: Path) -> None:
    """With a second moment below zero: the hub takes it for a state, and every replay from it diverges."""
    job = make_job(steps=4, segment_steps=2)
    w = read_adapter(job.initial)
    less = {name: -np.ones_like(tensor) for name, tensor in w.items()}
    start, poisoned = tmp_path / "start.safetensors", tmp_path / "poisoned.safetensors"
    start.write_bytes(job.initial)
    poisoned.write_bytes(state_bytes(State(2, w, less, less)))
    with child(stderr=subprocess.DEVNULL) as it:
        it.event()
        it.open(job, tmp_path)
        shard = {"start": str(start), "outer_step": None, "round": 1, "shard": 0, "target": LEASE}
        found = it.ask(op="replay", **shard, segment=1, state=str(poisoned), out=str(tmp_path / "out"))

    assert found["event"] == "done", found
    assert (found["end_leaf"], found["state"]) == (NO_END, None)
    assert found["numeric_class"]
    assert not (tmp_path / "out").exists()
