"""A training child that cheats, behind the honest one's protocol: `python -m tests.attacks.cheating_child HOW ...`."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainchain.core.adapter import read_adapter, tensor_specs
from trainchain.core.encodings import decode, encode
from trainchain.core.segments import State, leaf, read_state, state_bytes, state_digests
from trainchain.core.train import __main__ as honest
from trainchain.core.train.trainer import Engine


def free_rider() -> None:
    """Each segment is a little noise, and trained by nobody."""

    def noise(self: Any, plan: Any, round: int, shard: int, steps: range, on_step: Any) -> list[float]:
        adapted = self._adapted
        slot = adapted._optimizer.state[adapted._weights]
        for tensor in (adapted._weights.data, slot["exp_avg"]):
            tensor.add_(torch.randn_like(tensor), alpha=1e-4)
        slot["exp_avg_sq"].add_(1e-8)
        return [1.0 for _ in steps]

    Engine._segment = noise  # type: ignore[method-assign]


def lazy() -> None:
    """The second half of a shard goes on as the last segment before it went."""
    train = Engine._segment

    def half(self: Any, plan: Any, round: int, shard: int, steps: range, on_step: Any) -> list[float]:
        weights = self._adapted._weights.data
        if 2 * steps[0] > self.recipe.steps:
            weights.add_(self.went)
            return [1.0 for _ in steps]
        before = weights.clone()
        losses = train(self, plan, round, shard, steps, on_step)
        self.went = weights - before
        return losses

    Engine._segment = half  # type: ignore[method-assign]


def upload() -> None:
    """The shard is trained, and its delta handed in backwards."""
    train = honest.Child._train

    def turned(self: Any, request: dict[str, Any]) -> dict[str, Any]:
        result, way = train(self, request), self._opened().recipe.merge
        path, shapes = Path(result["delta"]), tensor_specs(read_adapter(Path(request["start"])))
        sent = decode(path.read_bytes(), way.encoding, shapes, moments=way.hands_on)
        back = {name: -tensor for name, tensor in sent.delta.items()}
        path.write_bytes(encode(back, way.encoding, sent.moments))
        return result

    honest.Child._train = turned  # type: ignore[method-assign]


def liar() -> None:
    """Whatever is replayed, something else is said to have come of it."""
    replay = honest.Child._replay

    def lie(self: Any, request: dict[str, Any]) -> dict[str, Any]:
        result, segment = replay(self, request), int(request["segment"])
        path, shapes = Path(result["state"]), tensor_specs(read_adapter(Path(request["start"])))
        training = self._opened().recipe.training
        t = min((segment + 1) * training.segment_steps, self._opened().recipe.steps)
        found = read_state(path.read_bytes(), t, shapes)
        moved = State(t, {name: np.float32(1.5) * x for name, x in found.w.items()}, found.m, found.v)
        path.write_bytes(state_bytes(moved))
        target = bytes.fromhex(request["target"].removeprefix("0x"))
        return {**result, "end_leaf": "0x" + leaf(target, segment + 1, t, state_digests(moved)).hex()}

    honest.Child._replay = lie  # type: ignore[method-assign]


HOW = {"free-rider": free_rider, "lazy": lazy, "upload": upload, "liar": liar}

if __name__ == "__main__":
    HOW[sys.argv.pop(1)]()
    honest.main()
