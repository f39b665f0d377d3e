import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.train.conftest import Job
from trainchain.core.adapter import read_adapter

MakeJob = Callable[..., Job]
LEASE = "0x" + "cd" * 32
COMMAND = [sys.executable, "-m", "trainchain.core.train", "--threads", "1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


class Child:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def send(self, **request: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def event(self) -> dict[str, Any]:
        assert self.process.stdout
        event: dict[str, Any] = json.loads(self.process.stdout.readline())
        return event

    def ask(self, **request: Any) -> dict[str, Any]:
        """The event that ends the request, after the steps."""
        self.send(**request)
        while (event := self.event())["event"] == "step":
            assert event["step"] <= event["steps"]
        return event

    def open(self, job: Job, folder: Path) -> dict[str, Any]:
        recipe = folder / "recipe.json"
        recipe.write_bytes(job.recipe.canonical())
        data = {digest: str(path) for digest, path in job.data.items()}
        (folder / "start.safetensors").write_bytes(job.initial)
        return self.ask(op="open", recipe=str(recipe), model_dir=str(job.model), data=data)


@contextmanager
def child(**options: Any) -> Iterator[Child]:
    options = {"env": ENVIRONMENT, **options}
    process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
    try:
        with process:
            yield Child(process)
            assert process.stdin
            process.stdin.close()
            process.wait(timeout=10)
    finally:
        process.kill()


def train(out: Path, **options: Any) -> dict[str, Any]:
    start = str(out / "start.safetensors")
    return {"op": "train", "start": start, "round": 1, "shard": 0, "lease": LEASE, "out": str(out), **options}


def test_two_children_train_the_same_bits(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job()
    deltas, roots = [], []
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        with child(stderr=subprocess.PIPE) as it:
            assert it.event() == {"event": "hello", "pid": it.process.pid}
            ready = it.open(job, folder)
            assert ready["event"] == "ready"
            done = it.ask(**train(folder / "."))
            assert done["event"] == "done"
            assert done["numeric_class"] == ready["numeric_class"]
            assert {key: done[key] for key in ("rows", "tokens", "supervised")} == job.recipe.counts[0][0].model_dump()
            base = it.ask(op="evaluate", adapter=None)
            held_out = job.recipe.held_out
            assert held_out
            assert (base["event"], base["tokens"]) == ("done", held_out.supervised)
            deltas.append(Path(done["delta"]).read_bytes())
            roots.append(done["state_root"])

    assert deltas[0] == deltas[1]
    assert roots[0] == roots[1]
    assert set(read_adapter(deltas[0])) == set(job.start)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_failure_is_an_event_and_the_child_goes_on(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job()
    with child(stderr=subprocess.DEVNULL) as it:
        it.event()
        early = it.ask(**train(tmp_path))
        gone = it.ask(op="open", recipe=str(job.data[next(iter(job.data))]), model_dir="x", data={})
        assert it.open(job, tmp_path)["event"] == "ready"
        (tmp_path / "bad.safetensors").write_bytes(b"junk")
        junk = it.ask(**train(tmp_path, start=str(tmp_path / "bad.safetensors")))
        done = it.ask(**train(tmp_path))

    assert (early["event"], early["code"]) == ("error", "job.not_ready")
    assert (gone["event"], gone["code"]) == ("error", "job.invalid")
    assert (junk["event"], junk["code"]) == ("error", "delta.not_safetensors")
    assert done["event"] == "done"


def test_a_request_that_breaks_the_child_is_said_and_ends_it() -> None:
    with child(stderr=subprocess.DEVNULL) as it:
        it.event()
        event = it.ask(op="dance")
        assert (event["event"], event["code"]) == ("error", "train.child_died")
        assert it.process.wait(timeout=5) == 1


def test_the_child_ends_with_its_stdin_even_while_training(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(steps=5000, rounds=1, shards=1)
    with child(stderr=subprocess.DEVNULL) as it:
        it.event()
        it.open(job, tmp_path)
        it.send(**train(tmp_path))
        assert it.event()["event"] == "step"

        assert it.process.stdin
        it.process.stdin.close()
        began = time.monotonic()
        it.process.wait(timeout=10)

        assert time.monotonic() - began < 2
    assert not (tmp_path / "delta.safetensors").exists()


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
def test_a_killed_parent_leaves_no_orphan() -> None:
    script = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen({COMMAND!r}, stdin=subprocess.PIPE, stdout=sys.stdout)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    with parent:
        assert parent.stdout
        assert json.loads(parent.stdout.readline())["event"] == "hello"
        parent.send_signal(signal.SIGKILL)

        # the pipe ends when nobody holds it any more: the child does as long as it lives
        assert parent.communicate(timeout=10)[0] == ""
