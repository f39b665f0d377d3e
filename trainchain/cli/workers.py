"""The worker processes of `run`, and what they report."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

from trainchain.cli import parent
from trainchain.cli.progress import Progress
from trainchain.core.errors import TrainChainError
from trainchain.core.settings import write_private
from trainchain.core.worker.devices import one_device

SAME_FAILURES = 6
"""So many failures in a row, all with one code and with nothing accepted between, and the run ends with that code."""
Document = dict[str, Any]


def drain(process: subprocess.Popen[str]) -> None:
    """Read on, so that a full pipe never stops a child."""

    def read() -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for _ in process.stdout:
                pass

    threading.Thread(target=read, daemon=True).start()


class Fleet:
    """The worker processes of a run, and what they report."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        state: Path,
        hub_url: str,
        workers: int,
        progress: Progress,
        environment: dict[str, str],
        wallet: Path | None,
    ) -> None:
        """`wallet` is the one that all workers use; each makes its own where there is none to use."""
        threads = max(1, (os.cpu_count() or 1) // workers)
        self.homes = [state / f"worker-{number}" for number in range(1, workers + 1)]
        self.traffic: dict[str, tuple[int, int, int]] = {}
        """Bytes up and down by worker, until its last accepted shard, and of those up what audits wanted."""
        self._progress = progress
        self._failures: list[TrainChainError] = []
        self._unable: set[str] = set()
        self._lock = threading.Lock()
        self._processes = []
        for number, home in enumerate(self.homes):
            arguments = ["serve-gpu", "--hub", hub_url, "--home", str(home), "--threads", str(threads)]
            arguments += one_device(number)
            if wallet is not None:
                write_private(home / "wallet.json", wallet.read_bytes())
            process = parent.start(
                [*arguments, "--json", "--until-stdin-closes"], home.with_suffix(".log"), environment
            )
            stack.callback(parent.stop, process)
            self._processes.append(process)
            threading.Thread(target=self._read, args=(process, home.name), daemon=True).start()

    def _read(self, process: subprocess.Popen[str], name: str) -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in process.stdout:
                event = json.loads(line)
                with self._lock:
                    self._note(name, event)
                self._progress.worker(name, event)

    def _note(self, name: str, event: Document) -> None:
        if event.get("event") == "accepted":
            self.traffic[name] = (int(event["bytes_up"]), int(event["bytes_down"]), int(event["bytes_audits"]))
            self._failures.clear()
        elif event.get("event") == "failed":
            if self._failures and self._failures[-1].code != event["code"]:
                self._failures.clear()
            self._failures.append(TrainChainError(event["code"], event["message"], hint=event.get("hint", "")))
            if event["unable"]:
                self._unable.add(name)

    def check(self) -> None:
        """Raise what keeps every worker from working, rather than wait for ever."""
        with self._lock:
            if len(self._failures) >= SAME_FAILURES or len(self._unable) == len(self.homes):
                raise self._failures[-1]
        if all(process.poll() is not None for process in self._processes):
            raise TrainChainError(
                "train.child_died", "Every worker has ended.", hint=f"Read {self.homes[0].with_suffix('.log')}."
            )

    def stop(self) -> None:
        for process in self._processes:
            parent.stop(process)
