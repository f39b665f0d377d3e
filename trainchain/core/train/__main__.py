"""The resident training child: `python -m trainchain.core.train --threads N [--processes N]`.

Reads one JSON request a line on stdin and writes one JSON event a line on stdout. It lives as long as its
stdin is open: when the parent goes, however it goes, the child goes too, even in the middle of a step.

With several processes the first starts the others, hands every request on to them, and speaks for all.

What of a sealed job comes with its key is opened in memory, and of no such request is anything shown but codes.
"""

import argparse
import errno
import json
import logging
import math
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainchain.core.adapter import Adapter, adapter_bytes, read_adapter, tensor_specs
from trainchain.core.encodings import decode, encode
from trainchain.core.errors import TrainChainError
from trainchain.core.models import ResolvedRecipe, parse
from trainchain.core.segments import (
    NO_END,
    Moments,
    leaf,
    read_state,
    start_state,
    state_bytes,
    state_digests,
    steps_at,
)

if TYPE_CHECKING:
    from trainchain.core.train.trainer import Engine

Emit = Callable[[dict[str, Any]], None]
_CLEAR: set[Path] = set()
"""Folders of this process that hold a base in clear; they go with it."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The system's words for a disk, a quota or a file that can take no more."""
DELTA_FILE = "delta.safetensors"
END_FILE = "end.safetensors"
STATE_FILE = "state.safetensors"
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
        operations = {"open": self._open, "train": self._train, "replay": self._replay, "evaluate": self._evaluate}
        event = operations[request["op"]](request)
        return {"seconds": round(time.monotonic() - began, 3), **event}

    def _open(self, request: dict[str, Any]) -> dict[str, Any]:
        from trainchain.core.train.trainer import Engine

        with _model_folder(request) as model_dir:
            recipe = parse(ResolvedRecipe, Path(request["recipe"]).read_bytes(), code="job.invalid", what="The recipe")
            if self._engine is not None:
                self._engine.close()
                self._engine = None
            paths = {digest: Path(path) for digest, path in request["data"].items()}
            cache = request.get("cache")
            self._engine = Engine(
                recipe,
                model_dir,
                paths,
                threads=self._threads,
                cache=None if cache is None else Path(cache),
                checkpointing=bool(request.get("checkpointing")),
                micro_tokens=request.get("micro_tokens"),
                volatile=bool(request.get("unseal")),
            )
        return {"event": "ready", "numeric_class": self._engine.numeric_class}

    def _train(self, request: dict[str, Any]) -> dict[str, Any]:
        engine, start = self._opened(), read_adapter(Path(request["start"]))
        way, states = engine.recipe.merge, request.get("states")
        result = engine.train(
            start,
            request["round"],
            request["shard"],
            request["lease"],
            self._on_step,
            moments=_handed_on(request, engine.recipe, start),
            states=None if states is None else Path(states),
            block=_unsealed(request),
        )
        out = Path(request["out"])
        if engine.leads:
            ended = result.moments if way.hands_on else None
            _publish(out / DELTA_FILE, encode(result.delta, way.encoding, ended))
            _publish(out / END_FILE, adapter_bytes(result.end))
        return {
            "event": "done",
            "delta": str(out / DELTA_FILE),
            "end": str(out / END_FILE),
            "state_root": result.state_root,
            "leaves": ["0x" + leaf.hex() for leaf in result.leaves],
            "micro_tokens": [segment.micro_tokens for segment in result.segments],
            "resumed": result.resumed,
            **result.counts.model_dump(),
            "losses": list(result.losses[:2]),
            "seconds": round(result.seconds, 3),
            "numeric_class": result.numeric_class,
        }

    def _replay(self, request: dict[str, Any]) -> dict[str, Any]:
        """Train one segment again; `target` is the lease it was trained under, whose tree its end is a leaf of.

        That it diverges is a result like any other, and not a failure: the start that was claimed has no end.
        """
        engine, start, segment = self._opened(), read_adapter(Path(request["start"])), int(request["segment"])
        recipe, path = engine.recipe, request["state"]
        ends = [steps_at(at, recipe.steps, recipe.training.segment_steps) for at in (segment, segment + 1)]
        if path is None:
            before = start_state(start, _handed_on(request, recipe, start))
        else:
            before = read_state(Path(path).read_bytes(), ends[0], tensor_specs(start))
        block = _unsealed(request)
        target = bytes.fromhex(request["target"].removeprefix("0x"))
        how = {
            "start_leaf": "0x" + leaf(target, segment, before.t, state_digests(before)).hex(),
            "micro_tokens": engine.micro_tokens,
            "numeric_class": engine.numeric_class,
        }
        try:
            end = engine.replay(before, request["round"], request["shard"], segment, self._on_step, block=block)
        except TrainChainError as error:
            if error.code != "train.diverged":
                raise
            return {"event": "done", "state": None, "end_leaf": NO_END, **how}
        state = Path(request["out"]) / STATE_FILE
        if engine.leads:
            _publish(state, state_bytes(end))
        return {
            "event": "done",
            "state": str(state),
            "end_leaf": "0x" + leaf(target, segment + 1, end.t, state_digests(end)).hex(),
            **how,
        }

    def _on_step(self, step: int, steps: int, tokens: int, loss: float) -> None:
        if math.isfinite(loss):  # else JSON cannot say it, and the segment's end says that it diverged
            self._emit({"event": "step", "step": step, "steps": steps, "tokens": tokens, "loss": loss})

    def _evaluate(self, request: dict[str, Any]) -> dict[str, Any]:
        engine, path = self._opened(), request["adapter"]
        adapter = None if path is None else read_adapter(Path(path))
        judged = engine.recipe.held_out is not None
        return {
            "event": "done",
            "loss": engine.evaluate(adapter, held_out=_unsealed(request)) if judged else None,
            "tokens": int(sum(engine.held_out().supervised)) if judged else 0,
            "samples": engine.samples(adapter),
        }

    def _opened(self) -> "Engine":
        if self._engine is None:
            raise TrainChainError("job.not_ready", "No job is open.", hint='Send {"op": "open", ...} first.')
        return self._engine


def _handed_on(request: Mapping[str, Any], recipe: ResolvedRecipe, start: Adapter) -> Moments | None:
    """What AdamW goes on with, out of the outer step that led to `start`."""
    way, step = recipe.merge, request.get("outer_step")
    if not way.hands_on or step is None:
        return None
    return decode(Path(step).read_bytes(), way.encoding, tensor_specs(start), moments=True).moments


@contextmanager
def _model_folder(request: Mapping[str, Any]) -> Iterator[Path]:
    """Where the base model is; a sealed one is there only within, in a folder of this process alone."""
    unseal = request.get("unseal")
    if not unseal:
        yield Path(request["model_dir"])
        return
    from trainchain.core import seal

    parent = Path(unseal["folder"])
    folder = parent / f"base-{os.environ.get('RANK', '0')}"
    _CLEAR.add(folder)
    try:
        folder.mkdir(mode=0o700, parents=True)
        for file in unseal["files"]:
            seal.unseal_into(Path(file["path"]), file["identity"], folder / Path(file["name"]).name)
        yield folder
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise TrainChainError(
            "disk.full", f"{parent} has no room for the job's private base model.", hint="Free memory or disk space."
        ) from None
    finally:
        _remove(folder)
        _CLEAR.discard(folder)


def _remove(folder: Path) -> None:
    """Remove a base in clear, and the folder around it once that is empty; moved first, so that no more comes in."""
    gone = folder.with_name(f"{folder.name}.gone")
    with suppress(OSError):
        folder.rename(gone)
    for path in (gone, folder):
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # the other processes' folders are there still
        folder.parent.rmdir()


def _unsealed(request: Mapping[str, Any]) -> bytes | None:
    """What comes sealed with a request, in memory."""
    block = request.get("block")
    if block is None:
        return None
    from trainchain.core import seal

    return seal.unseal(Path(block["path"]), block["identity"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="trainchain.core.train")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="train each shard in so many processes together")
    arguments = parser.parse_args()
    os.environ |= QUIET
    rank = int(os.environ.get("RANK", "0"))
    others = _start_others(arguments.processes, arguments.threads) if arguments.processes > 1 and rank == 0 else []
    emit = _protocol_writer() if rank == 0 else _say_nothing
    emit({"event": "hello", "pid": os.getpid()})
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    requests = _requests()
    import trainchain.core.train.trainer  # noqa: F401 (torch loads while the parent writes its first request)

    child = Child(emit, arguments.threads)
    for line in requests:
        for other in others:
            assert other.stdin is not None
            other.stdin.write(line)
            other.stdin.flush()
        request: dict[str, Any] = {}
        try:
            request = json.loads(line)
            emit(child.handle(request))
        except TrainChainError as error:
            emit({"event": "error", "code": error.code, "message": error.message, "hint": error.hint})
            if error.code == "train.out_of_memory" or arguments.processes > 1:
                os._exit(1)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL and arguments.processes == 1:
                what = f"The worker's disk has no room: {os.strerror(error.errno)}."
                emit({"event": "error", "code": "disk.full", "message": what, "hint": "Free space in its home."})
                continue
            message = type(error).__name__
            if "block" in request or "unseal" in request:  # the library's words may be a row's
                where = "".join(traceback.format_tb(error.__traceback__))
                logging.error("the request failed with %s\n%s", message, where)
            else:
                logging.exception("the request failed")
                message = f"{message}: {error}"[:500]
            emit({"event": "error", "code": "train.child_died", "message": message, "hint": ""})
            os._exit(1)


def _start_others(processes: int, threads: int) -> "list[subprocess.Popen[str]]":
    """The processes that train along with this one, and this one's own place among them (torchrun's variables)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    command = [sys.executable, "-m", "trainchain.core.train", "--threads", str(threads)]
    command += ["--processes", str(processes)]

    def place(rank: int) -> dict[str, str]:
        return {**together, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}

    os.environ |= place(0)
    return [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **place(rank)},
            text=True,
            encoding="utf-8",
        )
        for rank in range(1, processes)
    ]


def _say_nothing(event: dict[str, Any]) -> None:
    """One process speaks for all."""


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
        for folder in list(_CLEAR):
            _remove(folder)
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
