"""The resident training process of one device: asked in JSON lines, answering in JSON lines.

It holds the GPU, so that a crash of the driver or a lack of memory takes the child and never the agent.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainchain.core.errors import CODES, TrainChainError

FINAL = frozenset({"ready", "done", "error"})


def child_environment(threads: int) -> dict[str, str]:
    """Quiet waiting threads (several-fold on a busy desktop), no network, deterministic kernels."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONUNBUFFERED": "1",
    }


class Child:
    """One child; started at the first request, and again after it died. Its talk goes to `log`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ask(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Send one request; yields its events, the last of them final.

        Raises the child's own error by its code, or `train.child_died` where it ended without an answer.
        """
        process = self._process if self.alive and self._process else self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except OSError:
            raise self._died() from None
        for line in process.stdout:
            event = json.loads(line)
            if event.get("event") == "hello":
                continue
            if event.get("event") == "error":
                code = event.get("code", "")
                known = code if code in CODES else "train.child_died"
                raise TrainChainError(known, str(event.get("message", "")), hint=str(event.get("hint", "")))
            yield event
            if event.get("event") in FINAL:
                return
        raise self._died()

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and return its final event."""
        last: dict[str, Any] = {}
        for event in self.ask(request):
            last = event
        return last

    def stop(self) -> None:
        """End the child at once; closing its input would end it too, a little later."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def close(self) -> None:
        """End the child from another thread than the one that asks it; it is not started again."""
        self._closed = True
        if self._process is not None:
            self._process.kill()

    def _start(self) -> subprocess.Popen[str]:
        self.stop()
        if self._closed:
            raise self._died()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                text=True,
                encoding="utf-8",
            )
        return self._process

    def _died(self) -> TrainChainError:
        code = self._process.wait() if self._process else None
        return TrainChainError(
            "train.child_died",
            f"The training process ended with {code} and no result.",
            hint=f"Its last words are in {self._log}.",
        )
