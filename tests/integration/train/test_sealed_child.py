"""A worker's child on a sealed job: what it is given to read is nowhere in clear, and gone with its use."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures_model import make_tokenizer, resolve_recipe, write_jsonl
from tests.fixtures_sealed import SealedJob, seal_job
from tests.integration.train.conftest import Job
from tests.integration.train.test_child import ENVIRONMENT, LEASE, Child, child
from trainchain.core import seal
from trainchain.core.digests import sha256_file
from trainchain.core.errors import TrainChainError
from trainchain.core.train import __main__ as entry
from trainchain.core.train.model import load_model
from trainchain.core.train.packed import ATTENTION
from trainchain.core.train.trainer import Engine, ShardResult

MARKER = "Zanzibar Marmalade"
ROWS = [{"prompt": f"Order {at}?", "completion": f"{MARKER}, {at} jars{', please' * (at % 4)}."} for at in range(20)]


@dataclass(frozen=True)
class Worker:
    """A worker's whole disk: ciphertexts, work folders, logs, and where the child may put temporary files."""

    home: Path
    job: Job
    private: SealedJob

    @property
    def volatile(self) -> Path:
        return self.home / "volatile"

    @property
    def log(self) -> Path:
        return self.home / "trainer.log"

    @contextmanager
    def child(self) -> Iterator[Child]:
        self.home.joinpath("tmp").mkdir(exist_ok=True)
        places = {name: str(self.home / "tmp") for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME")}
        with self.log.open("ab") as log, child(stderr=log, env={**ENVIRONMENT, **places}) as it:
            yield it

    def opening(self, **options: Any) -> dict[str, Any]:
        recipe = self.home / "recipe.json"
        recipe.write_bytes(self.private.recipe.canonical())
        (self.home / "start.safetensors").write_bytes(self.job.initial)
        self.volatile.mkdir(mode=0o700)
        return {
            "op": "open",
            "recipe": str(recipe),
            "data": {},
            "cache": str(self.home / "tokens"),
            "unseal": self.private.unseal(self.volatile),
            **options,
        }

    def training(self, round: int, shard: int, **options: Any) -> dict[str, Any]:
        return {
            "op": "train",
            "start": str(self.home / "start.safetensors"),
            "round": round,
            "shard": shard,
            "lease": LEASE,
            "out": str(self.home / "out"),
            "states": str(self.home / f"states-{round}-{shard}"),
            "block": self.private.block(round, shard),
            **options,
        }

    def shows(self) -> list[str]:
        """What of the rows, the keys or the base stands in clear in any file of the worker."""
        ids = np.asarray(make_tokenizer()(MARKER).input_ids)
        secrets = {
            "the rows": MARKER.encode(),
            "their tokens": ids.astype(np.int32).tobytes(),
            "their tokens, wide": ids.astype(np.int64).tobytes(),
            "the base": b"model.embed_tokens.weight",
            "its configuration": b"LlamaForCausalLM",
            "a key": b"AGE-SECRET-KEY",
        }
        files = [path.read_bytes() for path in self.home.rglob("*") if path.is_file()]
        return [name for name, secret in secrets.items() if any(secret in data for data in files)]


@pytest.fixture
def worker(tiny: Path, tmp_path: Path) -> Worker:
    home, owner = tmp_path / "worker", tmp_path / "owner"
    home.mkdir()
    owner.mkdir()
    data, test = write_jsonl(owner / "rows.jsonl", ROWS), write_jsonl(owner / "test.jsonl", ROWS[3:9])
    recipe, initial = resolve_recipe(tiny, data, test, steps=8)
    job = Job(recipe, tiny, {sha256_file(path): path for path in (data, test)}, initial)
    return Worker(home, job, seal_job(recipe, tiny, job.data, home / "sealed"))


def mapped(it: Child, folder: Path) -> list[str]:
    """What the child still holds of a folder that is gone."""
    process = Path("/proc") / str(it.process.pid)
    if not process.exists():
        return []
    held = [line for line in (process / "maps").read_text().splitlines() if str(folder) in line]
    return held + [str(at) for fd in (process / "fd").iterdir() if str(folder) in str(at := fd.readlink())]


def same(done: dict[str, Any], wanted: ShardResult) -> bool:
    return bool(
        done["event"] == "done"
        and (done["state_root"], done["losses"]) == (wanted.state_root, list(wanted.losses[:2]))
        and done["leaves"] == ["0x" + leaf.hex() for leaf in wanted.leaves]
    )


def test_a_sealed_job_is_trained_and_judged_and_nothing_of_it_is_left_in_clear(worker: Worker) -> None:
    engine = worker.job.engine()
    wanted = engine.train(worker.job.start, 1, 1, LEASE)
    sealed = worker.private.recipe.sealed
    assert sealed is not None

    with worker.child() as it:
        it.event()
        ready = it.ask(**worker.opening())
        assert (ready["event"], ready["numeric_class"]) == ("ready", engine.numeric_class)
        assert not worker.volatile.exists()
        assert mapped(it, worker.volatile) == []
        it.send(**worker.training(1, 1))
        assert it.event()["event"] == "step"
        assert worker.shows() == []
        it.process.kill()
        it.process.wait()
        assert worker.shows() == []
    with worker.child() as it:
        it.event()
        it.ask(**worker.opening())
        assert same(it.ask(**worker.training(1, 1)), wanted)
        judged = it.ask(op="evaluate", adapter=None, block=worker.private.request(sealed.held_out))
        again = it.ask(op="evaluate", adapter=str(worker.home / "out" / "end.safetensors"))
        assert worker.shows() == []

    assert (worker.home / "out" / "delta.safetensors").exists()
    assert judged["loss"] == engine.evaluate(None)
    assert again["loss"] == engine.evaluate(wanted.end) < judged["loss"]
    assert not (worker.home / "tokens").exists()
    assert worker.shows() == []


def test_a_block_that_is_not_the_shard_s_is_refused_and_the_child_goes_on(worker: Worker) -> None:
    private = worker.private
    own, other = private.block(1, 0), private.block(2, 1)
    harmed = bytearray(Path(own["path"]).read_bytes())
    harmed[-20] ^= 1
    (private.folder / "harmed").write_bytes(harmed)
    (private.folder / "short").write_bytes(harmed[:-30])

    with worker.child() as it:
        it.event()
        it.ask(**worker.opening())
        found = [
            it.ask(**worker.training(1, 0, **given))["code"]
            for given in (
                {"block": other},
                {"block": {**own, "identity": other["identity"]}},
                {"block": {**own, "identity": "AGE-SECRET-KEY-1NOT"}},
                {"block": {**own, "path": str(private.folder / "harmed")}},
                {"block": {**own, "path": str(private.folder / "short")}},
                {"block": {**own, "path": str(private.folder / "gone")}},
                {"block": None},
            )
        ]
        done = it.ask(**worker.training(1, 0))

    assert found == ["data.format", "seal.broken", "key.invalid", *["seal.broken"] * 3, "source.missing"]
    assert same(done, worker.job.engine().train(worker.job.start, 1, 0, LEASE))
    assert worker.shows() == []


def without(name: str) -> Callable[[Worker, dict[str, Any]], None]:
    def harm(worker: Worker, request: dict[str, Any]) -> None:
        request["unseal"]["files"] = [file for file in request["unseal"]["files"] if file["name"] != name]

    return harm


FAILURES: list[tuple[Callable[[Worker, dict[str, Any]], None], str]] = [
    (lambda worker, request: Path(request["recipe"]).write_text("{}"), "job.invalid"),
    (lambda worker, request: request["unseal"]["files"][-1].update(identity=seal.new_identity()), "seal.broken"),
    (lambda worker, request: request["unseal"]["files"][0].update(path=str(worker.log)), "seal.broken"),
    (without("config.json"), "model.unreadable"),
    (without("model.safetensors"), "model.unreadable"),
]


def test_a_sealed_base_is_gone_after_a_failed_open_too(worker: Worker) -> None:
    found = []
    with worker.child() as it:
        it.event()
        for harm, _ in FAILURES:
            request = worker.opening()
            harm(worker, request)
            found.append(it.ask(**request)["code"])
            assert not worker.volatile.exists()
            assert worker.shows() == []
        assert it.ask(**worker.opening())["event"] == "ready"
        assert it.ask(**worker.training(1, 0))["event"] == "done"

    assert found == [code for _, code in FAILURES]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes in folders")
def test_a_sealed_base_is_gone_when_the_parent_dies_while_it_is_opened(worker: Worker) -> None:
    request = worker.opening()
    last = Path(request["unseal"]["files"][-1]["path"])
    last.unlink()
    os.mkfifo(last)  # nobody ever writes to it
    with worker.child() as it:
        it.event()
        assert it.process.stdin is not None
        it.process.stdin.write(json.dumps(request) + "\n")
        it.process.stdin.flush()
        wanted = {entry["name"] for entry in request["unseal"]["files"][:-1]}
        until = time.monotonic() + 60
        while {path.name for path in worker.volatile.rglob("*")} < wanted:
            assert time.monotonic() < until, "the base was never opened"
        assert worker.shows() != []

        it.process.stdin.close()
        it.process.wait(60)

    assert worker.shows() == []
    assert not worker.volatile.exists()


def test_a_request_that_breaks_the_child_shows_nothing_of_what_was_sealed(worker: Worker) -> None:
    with worker.child() as it:
        it.event()
        it.ask(**worker.opening())
        event = it.ask(**worker.training(1, 0, op=MARKER))

    assert (event["code"], event["message"]) == ("train.child_died", "KeyError")
    assert "the request failed with KeyError" in worker.log.read_text()
    assert worker.shows() == []


def test_a_file_s_name_leads_nowhere_else(worker: Worker) -> None:
    request = worker.opening()
    request["unseal"]["files"][0]["name"] = "../../outside"
    with entry._model_folder(request) as folder:
        assert (folder / "outside").is_file()
        assert folder.stat().st_mode & 0o077 == 0 or sys.platform == "win32"
    assert not worker.volatile.exists()
    assert not list(worker.home.rglob("outside"))


def test_a_full_disk_is_said_and_nothing_is_left(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, identity: str, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(seal, "unseal_into", full)
    with pytest.raises(TrainChainError, match="has no room for the job's private base model") as caught:
        entry._model_folder(worker.opening()).__enter__()
    assert caught.value.code == "disk.full"
    assert not worker.volatile.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sets the limits of another process")
def test_a_disk_that_fills_while_a_shard_is_trained_is_said(worker: Worker) -> None:
    import resource

    with worker.child() as it:
        it.event()
        it.ask(**worker.opening())
        resource.prlimit(it.process.pid, resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        event = it.ask(**worker.training(1, 0))
        resource.prlimit(it.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        again = it.ask(**worker.training(1, 0))

    assert (event["code"], again["event"]) == ("disk.full", "done")
    assert worker.shows() == []


@pytest.fixture
def fleet(worker: Worker) -> Iterator[Callable[[], Child]]:
    """Children of two processes each; they end with their stdin."""
    started: list[subprocess.Popen[str]] = []

    def start() -> Child:
        command = [sys.executable, "-m", "trainchain.core.train", "--threads", "1", "--processes", "2"]
        with worker.log.open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=ENVIRONMENT
            )
        started.append(process)
        return Child(process)

    yield start
    for process in started:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)
        assert process.stdout is not None
        process.stdout.close()


def test_processes_that_train_together_each_open_it(worker: Worker, fleet: Callable[[], Child]) -> None:
    roots = []
    for opening, block in (
        (worker.opening(), worker.private.block(1, 0)),
        (
            {
                "op": "open",
                "recipe": str(worker.home / "open.json"),
                "model_dir": str(worker.job.model),
                "data": {digest: str(path) for digest, path in worker.job.data.items()},
            },
            None,
        ),
    ):
        (worker.home / "open.json").write_bytes(worker.job.recipe.canonical())
        it = fleet()
        it.event()
        ready = it.ask(**opening)
        assert ready["event"] == "ready", ready
        assert ready["numeric_class"].endswith("/processes2")
        done = it.ask(**worker.training(1, 0, block=block, states=None))
        assert done["event"] == "done", done
        roots.append(done["state_root"])
        assert not worker.volatile.exists()

    assert roots[0] == roots[1]
    assert worker.shows() == []


def test_a_base_that_left_its_files_is_the_same_to_the_bit(tiny: Path, worker: Worker) -> None:
    import torch

    from trainchain.core.train.model import leave_files

    model, other = (load_model(tiny, dtype=torch.float32, attention=ATTENTION["sdpa"]) for _ in range(2))
    leave_files(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
        assert mine.data_ptr() % 64 == theirs.data_ptr() % 64
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()

    job = worker.job
    engines = [Engine(job.recipe, tiny, job.data, threads=1, volatile=volatile) for volatile in (True, False)]
    assert len({json.dumps(engine.train(job.start, 1, 0, LEASE).state_root) for engine in engines}) == 1
