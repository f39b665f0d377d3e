"""A training child without torch: it speaks the real one's protocol, and fails where a test says so.

`python fixtures_child.py NOTES`: the folder NOTES takes every request (`requests.jsonl`) and holds what is to go wrong
(`plan.json`): a list, each item used once, of `op`, for `train` the `segment` to begin, and `code`, the error's code,
or `die`, or `hang`; or of `move`, how far a delta's elements go; with `op` `move`, how far the end of a replay is
from the right one.

Its training is a walk: every number of a tensor goes as far in every segment as round and shard say. So its states are
real ones, and any segment can be replayed.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from trainchain.core.adapter import adapter_bytes, delta, read_adapter, tensor_specs
from trainchain.core.encodings import encode
from trainchain.core.models import ResolvedRecipe
from trainchain.core.segments import (
    NO_END,
    Moments,
    State,
    StateDigests,
    bf16,
    from_bf16,
    leaf,
    read_state,
    start_state,
    state_bytes,
    state_digests,
    state_root,
    steps_at,
)

COUNTS = {"rows": 9, "tokens": 1000, "supervised": 500}


class FakeChild:
    def __init__(self, notes: Path) -> None:
        self.plan = notes / "plan.json"
        self.requests = notes / "requests.jsonl"
        self.recipe: ResolvedRecipe | None = None
        self.micro_tokens = 0

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        seen = {**request, "pid": os.getpid(), "cuda": os.environ.get("CUDA_VISIBLE_DEVICES")}
        with self.requests.open("a", encoding="utf-8") as file:
            file.write(json.dumps(seen) + "\n")
        does = {"open": self.open, "train": self.train, "replay": self.replay, "evaluate": self.evaluate}
        return does[request["op"]](request)

    def planned(self, **where: Any) -> str | float | None:
        """What is to go wrong here, once."""
        plan = json.loads(self.plan.read_bytes()) if self.plan.exists() else []
        for at, item in enumerate(plan):
            if all(item.get(key) == value for key, value in where.items()):
                del plan[at]
                self.plan.write_text(json.dumps(plan), encoding="utf-8")
                found: str | float = item.get("code", item.get("move"))
                return found
        return None

    def fail(self, code: str | float | None) -> None:
        if code == "die":
            os._exit(9)
        if code == "hang":
            time.sleep(600)
        if code is not None:
            say({"event": "error", "code": code, "message": f"It is {code}.", "hint": ""})
            if code == "train.out_of_memory":
                os._exit(1)
            raise Refused

    def open(self, request: dict[str, Any]) -> dict[str, Any]:
        self.fail(self.planned(op="open"))
        self.recipe = ResolvedRecipe.model_validate_json(Path(request["recipe"]).read_bytes(), strict=True)
        assert all(Path(path).exists() for path in request["data"].values())
        training = self.recipe.training
        self.micro_tokens = request["micro_tokens"] or training.micro_batch_size * training.sequence_len
        return {"event": "ready", "numeric_class": "fake"}

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.recipe is not None
        states, start = Path(request["states"]), read_adapter(Path(request["start"]))
        steps, size = self.recipe.steps, self.recipe.training.segment_steps
        journal, begun = states / "segments.jsonl", start_state(start)
        if not journal.exists():
            journal.write_text('{"belongs": "here"}\n', encoding="utf-8")
        done = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()[1:]]
        resumed, state = len(done), begun
        if done:
            state = read_state(state_path(states, resumed).read_bytes(), done[-1]["t"], tensor_specs(start))
        for number in range(len(done) + 1, self.recipe.segments + 1):
            self.fail(self.planned(op="train", segment=number))
            state = self.walk(request, state, number - 1)
            state_path(states, number).write_bytes(state_bytes(state))
            digests = [digest.hex() for digest in state_digests(state)]
            done.append({"t": state.t, "digests": digests, "micro_tokens": self.micro_tokens, "losses": [2.0, 1.0]})
            with journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1]) + "\n")
            say({"event": "step", "step": min(number * size, steps), "steps": steps, "tokens": number, "loss": 2.0})
        move = self.planned(op="delta")
        change = delta(state.w, start)
        if move is not None:
            change = {name: np.full(tensor.shape, move, np.float32) for name, tensor in start.items()}
        ended = Moments(state.m, state.v) if self.recipe.merge.hands_on else None
        out = Path(request["out"])
        (out / "delta.safetensors").write_bytes(encode(change, self.recipe.merge.encoding, ended))
        (out / "end.safetensors").write_bytes(adapter_bytes(state.w))
        lease = bytes.fromhex(request["lease"][2:])
        ends = [StateDigests(*(bytes.fromhex(digest) for digest in line["digests"])) for line in done]
        leaves = [leaf(lease, 0, 0, state_digests(begun))]
        leaves += [leaf(lease, at + 1, line["t"], end) for at, (line, end) in enumerate(zip(done, ends, strict=True))]
        return {
            "event": "done",
            "delta": str(out / "delta.safetensors"),
            "end": str(out / "end.safetensors"),
            "state_root": state_root(leaves),
            "leaves": ["0x" + one.hex() for one in leaves],
            "micro_tokens": [line["micro_tokens"] for line in done],
            "resumed": resumed,
            **COUNTS,
            "losses": [2.0, 1.0],
            "seconds": 0.5,
            "numeric_class": "fake",
        }

    def replay(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.recipe is not None
        start, segment = read_adapter(Path(request["start"])), request["segment"]
        planned = self.planned(op="replay", round=request["round"])
        before, target = start_state(start), bytes.fromhex(request["target"][2:])
        if request["state"] is not None:
            t = steps_at(segment, self.recipe.steps, self.recipe.training.segment_steps)
            before = read_state(Path(request["state"]).read_bytes(), t, tensor_specs(start))
        how = {"micro_tokens": self.micro_tokens, "seconds": 0.5, "numeric_class": "fake"}
        how["start_leaf"] = "0x" + leaf(target, segment, before.t, state_digests(before)).hex()
        if planned == "train.diverged":
            return {"event": "done", "state": None, "end_leaf": NO_END, **how}
        self.fail(planned)
        end = self.walk(request, before, segment, float(self.planned(op="move") or 0.0))
        out = Path(request["out"]) / "state.safetensors"
        out.write_bytes(state_bytes(end))
        say({"event": "step", "step": end.t, "steps": self.recipe.steps, "tokens": 9, "loss": 2.0})
        return {
            "event": "done",
            "state": str(out),
            "end_leaf": "0x" + leaf(target, segment + 1, end.t, state_digests(end)).hex(),
            **how,
        }

    def walk(self, request: dict[str, Any], state: State, segment: int, off: float = 0.0) -> State:
        assert self.recipe is not None
        far = np.float32(1e-4 * (1 + 100 * request["round"] + request["shard"]) / self.recipe.segments + off)
        t = steps_at(segment + 1, self.recipe.steps, self.recipe.training.segment_steps)
        after = {name: tensor + far for name, tensor in state.w.items()}
        m, v = ({name: rounded(tensor + far**power) for name, tensor in part.items()} for power, part in
                ((1, state.m), (2, state.v)))  # fmt: skip
        return State(t, after, m, v)

    def evaluate(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.recipe is not None
        self.fail(self.planned(op="evaluate"))
        loss = 1.5 if self.recipe.held_out else None
        samples = [f"{prompt}! " * 9000 for prompt in self.recipe.samples]
        return {"event": "done", "loss": loss, "tokens": 30, "samples": samples}


def state_path(states: Path, number: int) -> Path:
    return states / f"state-{number:05}.safetensors"


def rounded(tensor: Any) -> Any:
    """As moments are kept."""
    return from_bf16(bf16(np.asarray(tensor, np.float32)))


class Refused(Exception):
    """An error was said instead of an answer."""


def say(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def main(notes: Path) -> None:
    child = FakeChild(notes)
    say({"event": "hello", "pid": os.getpid()})
    for line in sys.stdin:
        with contextlib.suppress(Refused):
            say(child.handle(json.loads(line)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
