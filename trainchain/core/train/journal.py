"""What a shard leaves behind while it trains: the state at every segment's end, hashed and written off its thread."""

import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from trainchain.core.errors import TrainChainError
from trainchain.core.segments import State, StateDigests, read_state, state_bytes, state_digests
from trainchain.core.settings import sync_folder

INDEX = "segments.jsonl"
"""The file that tells of a folder's states; a worker who answers a draw reads it, too (core/worker/answers.py)."""
PENDING = 2
"""States that may wait to be written; a slow disk then holds up training instead of filling the memory."""


class Segment(NamedTuple):
    """One finished segment: where it ended, its state's digests, how it was split, each step's loss."""

    t: int
    digests: StateDigests
    micro_tokens: int
    losses: list[float]


class Journal:
    """One shard's segments, in a folder where there is one.

    `belongs` says whose states these are. States of the same lie there already after a restart; those of another
    shard are an error. A torn tail is passed over, and so is all that was computed in another numeric class.
    Of several processes one `keeps` the states, and the others read how far it had come.
    """

    def __init__(
        self, folder: Path | None, belongs: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, keeps: bool
    ) -> None:
        self._folder = folder if keeps else None
        self._belongs = dict(belongs)
        self._shapes = shapes
        self.segments: list[Segment] = []
        self.last: State | None = None
        self._thread = ThreadPoolExecutor(1, "journal")
        self._start: Future[StateDigests] | None = None
        self._pending: deque[Future[Segment]] = deque()
        if folder is not None:
            self._read(folder)

    def begin(self, start: State) -> None:
        """Hash the state before the first step."""
        self._start = self._thread.submit(lambda: state_digests(start))

    def add(self, state: State, micro_tokens: int, losses: Sequence[float]) -> None:
        """Take a finished segment; returns before it is hashed and written."""
        while len(self._pending) >= PENDING:
            self.segments.append(self._pending.popleft().result())
        number = len(self.segments) + len(self._pending) + 1
        self.last = state
        self._pending.append(self._thread.submit(self._keep, number, state, micro_tokens, list(losses)))

    def finish(self) -> tuple[StateDigests, list[Segment]]:
        """Wait for what is pending; the digests of the start and all segments."""
        assert self._start is not None
        while self._pending:
            self.segments.append(self._pending.popleft().result())
        return self._start.result(), self.segments

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _keep(self, number: int, state: State, micro_tokens: int, losses: list[float]) -> Segment:
        segment = Segment(state.t, state_digests(state), micro_tokens, losses)
        if self._folder is not None:
            _publish(_path(self._folder, number), state_bytes(state))
            digests = [digest.hex() for digest in segment.digests]
            self._append({"t": state.t, "digests": digests, "micro_tokens": micro_tokens, "losses": losses})
        return segment

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._folder is not None
        with (self._folder / INDEX).open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, folder: Path) -> None:
        """Take over the good beginning of what lies there, and forget the rest."""
        lines = _lines(folder / INDEX)
        if lines and lines[0] | {"numeric_class": ""} != self._belongs | {"numeric_class": ""}:
            raise TrainChainError(
                "state.invalid",
                f"{folder} holds the states of another shard, or of another way to train it.",
                hint="Name another folder, or remove that one.",
            )
        lines = lines if lines and lines[0] == self._belongs else []
        for number, line in enumerate(lines[1:], 1):
            try:
                digests = StateDigests(*(bytes.fromhex(digest) for digest in line["digests"]))
                state = read_state(_path(folder, number).read_bytes(), int(line["t"]), self._shapes)
                segment = Segment(state.t, digests, int(line["micro_tokens"]), [float(x) for x in line["losses"]])
            except (OSError, KeyError, TypeError, ValueError, TrainChainError):
                break
            if state_digests(state) != digests:
                break
            self.segments.append(segment)
            self.last = state
        kept = [self._belongs, *lines[1 : len(self.segments) + 1]]
        if self._folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in kept)
        _publish(folder / INDEX, text.encode())


def _path(folder: Path, number: int) -> Path:
    return folder / f"state-{number:05}.safetensors"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of the index, up to the first that is torn."""
    found: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return found
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not isinstance(value, dict):
            break
        found.append(value)
    return found


def _publish(path: Path, data: bytes) -> None:
    """Whole or not at all, on disk before this returns."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)
