"""A training child without torch: it speaks the real one's protocol, and fails where a test says so.

`python fixtures_child.py NOTES`: the folder NOTES takes every request (`requests.jsonl`) and holds what is to go wrong
(`plan.json`): a list, each item used once, of `op`, for `train` the `segment` to begin, and `code`, the error's code,
or `die`, or `hang`; or of `move`, how far a delta's elements go.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from trainchain.core.adapter import adapter_bytes, apply, read_adapter
from trainchain.core.encodings import encode
from trainchain.core.models import ResolvedRecipe

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
        return {"open": self.open, "train": self.train, "evaluate": self.evaluate}[request["op"]](request)

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
        segments = -(-steps // size)
        done = [json.loads(path.read_bytes()) for path in sorted(states.glob("state-*"))]
        resumed = len(done)
        for number in range(len(done) + 1, segments + 1):
            self.fail(self.planned(op="train", segment=number))
            done.append(self.micro_tokens)
            (states / f"state-{number:05}").write_text(json.dumps(self.micro_tokens), encoding="utf-8")
            say({"event": "step", "step": min(number * size, steps), "steps": steps, "tokens": number, "loss": 2.0})
        move = self.planned(op="delta")
        far = 1e-4 * (1 + 100 * request["round"] + request["shard"]) if move is None else float(move)
        delta = {name: np.full(tensor.shape, far, np.float32) for name, tensor in start.items()}
        out = Path(request["out"])
        (out / "delta.safetensors").write_bytes(encode(delta, self.recipe.merge.encoding))
        (out / "end.safetensors").write_bytes(adapter_bytes(apply(start, delta)))
        return {
            "event": "done",
            "delta": str(out / "delta.safetensors"),
            "end": str(out / "end.safetensors"),
            "state_root": "0x" + "5a" * 32,
            "leaves": ["0x" + "5b" * 32] * (segments + 1),
            "micro_tokens": done,
            "resumed": resumed,
            **COUNTS,
            "losses": [2.0, 1.0],
            "seconds": 0.5,
            "numeric_class": "fake",
        }

    def evaluate(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.recipe is not None
        self.fail(self.planned(op="evaluate"))
        loss = 1.5 if self.recipe.held_out else None
        samples = [f"{prompt}! " * 9000 for prompt in self.recipe.samples]
        return {"event": "done", "loss": loss, "tokens": 30, "samples": samples}


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
