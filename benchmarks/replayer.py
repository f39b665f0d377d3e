"""Replays segments in a process of its own: `python replayer.py SPEC.json` writes the spec's `result` file.

Its environment is the machine that it plays: `replays.py` says which instructions the libraries may use, and how many
threads there are. Here too is what a cheat does in place of a segment.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from trainchain.core.models import ResolvedRecipe
from trainchain.core.segments import State, read_state, segment_ends, state_bytes
from trainchain.core.train.data import Plan
from trainchain.core.train.trainer import Engine


@dataclasses.dataclass(frozen=True)
class Segment:
    """A segment of a shard, and the file of the state that it starts from."""

    name: str
    start: str
    t: int
    round: int
    shard: int
    number: int


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = []
    for job in spec["jobs"]:
        recipe = ResolvedRecipe.model_validate_json(Path(job["recipe"]).read_bytes())
        files = {digest: Path(path) for digest, path in spec["data"].items()}
        options = {"micro_tokens": job.get("micro_tokens"), "checkpointing": job.get("checkpointing", False)}
        engine = Engine(recipe, Path(spec["model"]), files, threads=spec["threads"], **options)
        seconds = []
        folder = Path(spec["folder"]) / job["variant"] / job["scene"]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for each in job["segments"]:
                segment = Segment(**each)
                began = time.perf_counter()
                end = engine.replay(load(engine, segment), segment.round, segment.shard, segment.number)
                seconds.append(time.perf_counter() - began)
                (folder / f"{segment.name}.safetensors").write_bytes(state_bytes(end))
            found.append(
                {"variant": job["variant"], "scene": job["scene"], "class": engine.numeric_class, "absent": ""}
            )
        except RuntimeError as error:
            found.append({"variant": job["variant"], "scene": job["scene"], "class": "", "absent": str(error)[:200]})
        found[-1]["seconds"] = sum(seconds)
        engine.close()
    Path(spec["result"]).write_text(json.dumps(found), encoding="utf-8")


def load(engine: Engine, segment: Segment) -> State:
    return read_state(Path(segment.start).read_bytes(), segment.t, engine._adapted.shapes)


def span(engine: Engine, segment: Segment) -> range:
    """The steps of a segment, from 1."""
    bounds = [0, *segment_ends(engine.recipe.steps, engine.recipe.training.segment_steps)]
    return range(bounds[segment.number] + 1, bounds[segment.number + 1] + 1)


# What follows is done in place of a segment: each returns the state that is claimed for its end.

Cheat = Callable[[Engine, Segment], State]


def planned(change: Callable[[Plan, range], Plan]) -> Cheat:
    """Training on other rows than the shard's."""

    def cheat(engine: Engine, segment: Segment) -> State:
        plan = engine._take(segment.round, segment.shard, None)
        return trained(engine, segment, change(plan, span(engine, segment)), span(engine, segment))

    return cheat


def trained(engine: Engine, segment: Segment, plan: Plan, steps: range) -> State:
    """The state after `steps` of a plan, said to be after the segment's."""
    engine._adapted.restore(load(engine, segment), before(engine, segment))
    engine._segment(plan, segment.round, segment.shard, steps, None)
    return engine._adapted.snapshot(span(engine, segment)[-1])


def before(engine: Engine, segment: Segment) -> int:
    from trainchain.core.schedule import steps_before

    return steps_before(engine.recipe, segment.round)


def fewer_rows(share: float) -> Cheat:
    """So much of each batch."""
    return planned(lambda plan, _: replaced(plan, [rows[: max(1, round(share * len(rows)))] for rows in plan.steps]))


def one_row_less(plan: Plan, steps: range) -> Plan:
    """One row of the whole segment is left out."""
    return replaced(plan, [rows[1:] if at == steps[0] else rows for at, rows in enumerate(plan.steps)])


def other_rows(plan: Plan, steps: range) -> Plan:
    """Rows of the same data, but not of this shard."""
    count = len(plan.lengths)
    return replaced(plan, [[(row + count // 2) % count for row in rows] for rows in plan.steps])


def replaced(plan: Plan, steps: Sequence[Sequence[int]]) -> Plan:
    return dataclasses.replace(plan, steps=[list(rows) for rows in steps])


def one_step_skipped(engine: Engine, segment: Segment) -> State:
    plan = engine._take(segment.round, segment.shard, None)
    return trained(engine, segment, plan, span(engine, segment)[:-1])


def poisoned(every: int) -> Cheat:
    """Of the tokens in the segment that the model is to say, each `every`-th is another one."""

    def change(plan: Plan, steps: range) -> Plan:
        data = plan.documents
        ids, masks, bounds = data.arrays["ids"].copy(), data.arrays["masks"], data.arrays["offsets"]
        rows = [row for step in steps for row in plan.steps[step - 1]]
        taught = np.concatenate([bounds[row] + np.flatnonzero(masks[bounds[row] : bounds[row + 1]]) for row in rows])
        places = taught[::every]
        ids[places] = (ids[places] + 7) % 250 + 5
        return dataclasses.replace(plan, documents=dataclasses.replace(data, arrays={**data.arrays, "ids": ids}))

    return planned(change)


def scaled(by: float) -> Cheat:
    """An honest segment, its change made longer; sign flip where `by` is negative."""

    def cheat(engine: Engine, segment: Segment) -> State:
        start = load(engine, segment)
        end = engine.replay(start, segment.round, segment.shard, segment.number)
        w = {name: start.w[name] + np.float32(by) * (end.w[name] - start.w[name]) for name in end.w}
        return State(end.t, w, end.m, end.v)

    return cheat


def noise(engine: Engine, segment: Segment) -> State:
    """Nothing is trained; the adapter is shaken, and the moments stay."""
    start, random = load(engine, segment), np.random.default_rng(segment.number)
    rate = engine.recipe.training.learning_rate
    w = {name: (x + rate * random.normal(size=x.shape)).astype(np.float32) for name, x in start.w.items()}
    return State(span(engine, segment)[-1], w, start.m, start.v)


def coarse_base(bits: int) -> Cheat:
    """The base's matrices in so many bits, in groups of 64 numbers."""

    def cheat(engine: Engine, segment: Segment) -> State:
        import torch

        kept = {}
        with torch.no_grad():
            for name, weight in engine._adapted.base.named_parameters():
                if not weight.requires_grad and weight.dim() == 2 and weight.numel() % 64 == 0 and "embed" not in name:
                    kept[name] = weight.clone()
                    groups = weight.reshape(-1, 64)
                    scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
                    weight.copy_(((groups / scale).round() * scale).reshape(weight.shape))
            end = engine.replay(load(engine, segment), segment.round, segment.shard, segment.number)
            for name, weight in engine._adapted.base.named_parameters():
                if name in kept:
                    weight.copy_(kept[name])
        return end

    return cheat


CHEATS: dict[str, Cheat] = {
    "noise in place of training": noise,
    "other rows": planned(other_rows),
    "half of each batch": fewer_rows(0.5),
    "one step of the segment skipped": one_step_skipped,
    "one row of the segment left out": planned(one_row_less),
    "all labels poisoned": poisoned(1),
    "one label in 8 poisoned": poisoned(8),
    "one label in 100 poisoned": poisoned(100),
    "change turned round": scaled(-1.0),
    "change 1.1 times as long": scaled(1.1),
    "base in 8 bits": coarse_base(8),
    "base in 4 bits": coarse_base(4),
}


if __name__ == "__main__":
    main()
