"""The resident training child: `python -m trainchain.core.train --threads N`.

Reads one JSON request a line on stdin and writes one JSON event a line on stdout. It lives as long as its
stdin is open: when the parent goes, however it goes, the child goes too, even in the middle of a step.
"""

import argparse
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainchain.core.adapter import adapter_bytes, read_adapter
from trainchain.core.errors import TrainChainError
from trainchain.core.models import ResolvedRecipe, parse

if TYPE_CHECKING:
    from trainchain.core.train.trainer import Engine

Emit = Callable[[dict[str, Any]], None]
DELTA_FILE = "delta.safetensors"
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""The child fetches nothing, whatever the parent's environment says."""


class Child:
    """Answers requests one at a time; holds at most one job's engine."""

    def __init__(self, emit: Emit, threads: int) -> None:
        self._emit = emit
        self._threads = threads
        self._engine: Engine | None = None

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """The event that ends this request; steps are emitted on the way."""
        began = time.monotonic()
        operations = {"open": self._open, "train": self._train, "evaluate": self._evaluate}
        event = operations[request["op"]](request)
        return {"seconds": round(time.monotonic() - began, 3), **event}

    def _open(self, request: dict[str, Any]) -> dict[str, Any]:
        from trainchain.core.train.trainer import Engine

        recipe = parse(ResolvedRecipe, Path(request["recipe"]).read_bytes(), code="job.invalid", what="The recipe")
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        paths = {digest: Path(path) for digest, path in request["data"].items()}
        self._engine = Engine(recipe, Path(request["model_dir"]), paths, threads=self._threads)
        return {"event": "ready", "numeric_class": self._engine.numeric_class}

    def _train(self, request: dict[str, Any]) -> dict[str, Any]:
        def on_step(step: int, steps: int, tokens: int, loss: float) -> None:
            self._emit({"event": "step", "step": step, "steps": steps, "tokens": tokens, "loss": loss})

        engine, start = self._opened(), read_adapter(Path(request["start"]))
        result = engine.train(start, request["round"], request["shard"], request["lease"], on_step)
        path = Path(request["out"]) / DELTA_FILE
        _publish(path, adapter_bytes(result.delta))
        return {
            "event": "done",
            "delta": str(path),
            "state_root": result.state_root,
            **result.counts.model_dump(),
            "losses": list(result.losses[:2]),
            "seconds": round(result.seconds, 3),
            "numeric_class": result.numeric_class,
        }

    def _evaluate(self, request: dict[str, Any]) -> dict[str, Any]:
        engine = self._opened()
        path = request["adapter"]
        loss = engine.evaluate(None if path is None else read_adapter(Path(path)))
        return {"event": "done", "loss": loss, "tokens": sum(engine.held_out().supervised)}

    def _opened(self) -> "Engine":
        if self._engine is None:
            raise TrainChainError("job.not_ready", "No job is open.", hint='Send {"op": "open", ...} first.')
        return self._engine


def main() -> None:
    arguments = argparse.ArgumentParser(prog="trainchain.core.train")
    arguments.add_argument("--threads", type=int, default=1)
    threads = arguments.parse_args().threads
    os.environ |= QUIET
    emit = _protocol_writer()
    emit({"event": "hello", "pid": os.getpid()})
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    requests = _requests()
    import trainchain.core.train.trainer  # noqa: F401 (torch loads while the parent writes its first request)

    child = Child(emit, threads)
    for line in requests:
        try:
            emit(child.handle(json.loads(line)))
        except TrainChainError as error:
            emit({"event": "error", "code": error.code, "message": error.message, "hint": error.hint})
            if error.code == "train.out_of_memory":
                os._exit(1)
        except Exception as error:
            logging.exception("the request failed")
            message = f"{type(error).__name__}: {error}"[:500]
            emit({"event": "error", "code": "train.child_died", "message": message, "hint": ""})
            os._exit(1)


def _protocol_writer() -> Emit:
    """Writes events to the real stdout; everybody else's prints go to stderr from here on."""
    real = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)

    def emit(event: dict[str, Any]) -> None:
        real.write(json.dumps(event, allow_nan=False) + "\n")
        real.flush()

    return emit


def _requests() -> Iterator[str]:
    """The lines of stdin, read by a thread of its own that ends the process when stdin does."""
    lines: queue.Queue[str] = queue.Queue()

    def watch() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=watch, name="stdin", daemon=True).start()
    return iter(lines.get, None)


def _publish(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_bytes(data)
    partial.replace(path)


if __name__ == "__main__":
    main()
