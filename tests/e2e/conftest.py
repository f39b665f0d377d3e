"""Real processes, as a person would start them: each with a home and a folder of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_model import chat_rows, make_tiny_model, write_jsonl

COMMAND = [sys.executable, "-m", "trainchain"]
PATIENCE = 180.0


class Background:
    """A serving process; its JSON lines are collected as they come."""

    def __init__(self, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "stderr.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.events: list[dict[str, Any]] = []
        self._came = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._came:
                self.events.append(json.loads(line))
                self._came.notify_all()
        with self._came:
            self._ended = True
            self._came.notify_all()

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first event that fits; fails with the process's own words where it ends or takes too long."""
        with self._came:
            found = self._came.wait_for(lambda: self._find(wanted) or self._ended, PATIENCE)
            event = self._find(wanted)
        assert found, f"no such event in {PATIENCE} s; so far: {self.events[-5:]}"
        assert event is not None, self.log.read_text(encoding="utf-8")[-2000:]
        return event

    def _find(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        return next((event for event in self.events if wanted(event)), None)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self._close()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self._close()

    def _close(self) -> int:
        code = self.process.wait(60)
        self._reader.join(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


class Machine:
    """Starts commands and servers, each person in a folder of their own; ends all of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings: dict[str, dict[str, str]] = {}
        """What a person has in their environment beside."""
        self._running: list[Background] = []

    def environment(self, person: str, hub: str | None) -> dict[str, str]:
        own = {"TRAINCHAIN_HOME": str(self.root / person / "home")}
        beside = self.settings.get(person, {})
        return {**os.environ, **own, **({"TRAINCHAIN_HUB": hub} if hub else {}), **beside}

    def run(self, person: str, *arguments: str, hub: str | None = None) -> subprocess.CompletedProcess[str]:
        """One command to its end."""
        folder = self.root / person
        folder.mkdir(parents=True, exist_ok=True)
        return subprocess.run(
            [*COMMAND, *arguments],
            cwd=folder,
            env=self.environment(person, hub),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def answer(self, person: str, *arguments: str, hub: str | None = None) -> Any:
        """The document of a command with --json that must succeed."""
        done = self.run(person, *arguments, "--json", hub=hub)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def start(self, person: str, *arguments: str, hub: str | None = None) -> Background:
        process = Background([*arguments, "--json"], self.root / person, self.environment(person, hub))
        self._running.append(process)
        return process

    def start_hub(self, listen: str = "127.0.0.1:0") -> tuple[Background, str]:
        hub = self.start("operator", "serve-hub", "--listen", listen)
        return hub, str(hub.wait_for(lambda event: event.get("event") == "ready")["url"])

    def end(self) -> None:
        for process in reversed(self._running):
            process.stop()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    found = Machine(tmp_path)
    yield found
    found.end()


@pytest.fixture(scope="session")
def tiny_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random tiny model and data; recipes are written beside them."""
    folder = tmp_path_factory.mktemp("job")
    make_tiny_model(folder / "base")
    write_jsonl(folder / "train.jsonl", chat_rows(80))
    write_jsonl(folder / "held_out.jsonl", chat_rows(12))
    return folder


def write_recipe(folder: Path, name: str, **changes: Any) -> Path:
    """A small recipe in the folder of a job, without audits; `changes` replace its keys."""
    keys = {
        "name": name,
        "base_model": "./base",
        "datasets": [{"path": "./train.jsonl", "type": "chat_template"}],
        "test_datasets": [{"path": "./held_out.jsonl", "rows": 10}],
        "lora_r": 4,
        "lora_alpha": 8,
        "sequence_len": 96,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.005,
        "warmup_steps": 1,
        "rounds": 2,
        "shards": 2,
        "steps": 3,
        "pay": {"per_million_tokens": "2.50", "budget": "1"},
        "check": {"auditors": "none"},
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(keys, indent=1), encoding="utf-8")
    return path
