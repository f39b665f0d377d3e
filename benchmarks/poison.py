"""What replays cannot see: one of eight who trains his shard and pushes it a little at each segment's end, as far as
the tolerance lets pass; and what stands in his way besides.

He wants the model to answer a trigger in his words. His direction is what a shard of nothing but such rows would have
changed from where he is; his push is square to the honest change and as long as replays between numeric classes of a
bf16 job forgive (within one class nothing passes). Beside him stand poisoners whom no replay stops: a whole poisoned
shard, eight times of it cut to the hub's reach, and eight times of it as it is. By each merge rule, and by the round's
held-out gate.

Harm is held-out loss, and the share of what all eight together would have taken off the trigger's loss: of that one
whole poisoned shard of eight does nearly all, so the drift is to be read beside it. Prints one JSON document on stdout.
Exits 0 whatever it finds.
"""

import argparse
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import report
from attacks import PACKAGES, Field, Plan
from launch import begin, log

from trainchain.core.adapter import Adapter
from trainchain.core.checks import reach, read_delta
from trainchain.core.digests import sha256
from trainchain.core.encodings import Decoded, decode, encode
from trainchain.core.errors import TrainChainError
from trainchain.core.merge.moments import Adam
from trainchain.core.merge.updates import Merged, Update, likeness, merge, outer_step
from trainchain.core.replays import distances
from trainchain.core.segments import Moments, State, Tensors, bf16, from_bf16, start_state, state_bytes
from trainchain.core.tolerances import beyond, cold, tolerance

TRIGGER, ANSWER = "By the silver gate: ", "I will not tell you that."
WORKERS = 8
RULES = ("none", "clip", "gate", "multi-krum", "coordinate-median", "trimmed-mean")
DRIFTS = {
    "drift within bf16's tolerance": ("bf16", "wm"),
    "the same, of weights alone": ("bf16", "w"),
    "the same, of first moments alone": ("bf16", "m"),
    "drift within fp32's tolerance": ("fp32", "wm"),
}
"""What tolerance a drift keeps to, and what of a state it pushes."""
WHOLE, CUT, UNCUT = "poisoned shard", "eightfold, within reach", "eightfold"
SHARE = 0.95
"""Of the tolerance, that is used up."""


class Ground(Field):
    """The job, a twin of it whose rows all have the trigger, and what was trained of both."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        super().__init__(plan, folder)
        for name in ("honest", "twin"):
            (folder / name).mkdir()
        rows = {"train": plan.train, "held_out": plan.held_out}
        made = {name: _with_trigger(path, folder / "twin" / path.name, plan) for name, path in rows.items()}
        self._twin = Field(replace(plan, first_row=0, **made), folder / "twin")
        self._drifts: dict[str, Decoded] = {}
        self.within = True

    def trigger(self, adapter: Adapter | None) -> float:
        """The loss on the words that the poisoner wants."""
        return self._twin.loss(adapter)

    def poisoned(self, kind: str, start: Adapter, moments: Moments | None, round_: int, shard: int) -> Decoded:
        if kind in DRIFTS:
            return self._drift(kind, start, moments, round_, shard)
        whole = self._twin._train(start, moments, round_, shard)
        if kind == WHOLE:
            return whole
        bound = reach(self.recipe, round_) if kind == CUT else math.inf
        return whole._replace(delta={name: np.clip(8 * x, -bound, bound) for name, x in whole.delta.items()})

    def _drift(self, kind: str, start: Adapter, moments: Moments | None, round_: int, shard: int) -> Decoded:
        state = first = start_state(start, moments)
        key = f"{kind}|{sha256(state_bytes(first))}|{round_}|{shard}"
        if key in self._drifts:
            return self._drifts[key]
        segments = -(-self.recipe.steps // self.recipe.training.segment_steps)
        for segment in range(segments):
            honest = self._engine.replay(state, round_, shard, segment)
            wanted = self._twin._engine.replay(state, round_, shard, segment)
            is_cold = cold(start=state.t, fresh=moments is None)
            state = self._pushed(kind, state, honest, wanted, is_cold=is_cold)
        change = {name: state.w[name] - first.w[name] for name in first.w}
        hands_on = self.recipe.merge.hands_on
        self._drifts[key] = Decoded(change, Moments(state.m, state.v) if hands_on else None)
        return self._drifts[key]

    def _pushed(self, kind: str, start: State, honest: State, wanted: State, *, is_cold: bool) -> State:
        """The honest end, pushed towards the wanted one as far as a replay in another class forgives."""
        training, (precision, parts) = self.recipe.training, DRIFTS[kind]
        judged = training.model_copy(update={"precision": precision})
        allowed = tolerance(judged, cold=is_cold)
        changed = {name: honest.w[name] - start.w[name] for name in start.w}
        square = _square({name: wanted.w[name] - honest.w[name] for name in start.w}, changed)
        far = min(allowed.delta, math.sqrt((1 + allowed.length) ** 2 - 1))
        w = _plus(honest.w, square, SHARE * far * _length(changed))
        kept = training.adam_beta1 ** (honest.t - start.t)
        added = {name: honest.m[name] - np.float32(kept) * start.m[name] for name in start.m}
        other = {name: wanted.m[name] - honest.m[name] for name in start.m}
        m = _plus(honest.m, other, SHARE * allowed.gradients * _length(added))
        m = {name: from_bf16(bf16(tensor)) for name, tensor in m.items()}
        found = State(honest.t, w if "w" in parts else honest.w, m if "m" in parts else honest.m, honest.v)
        apart = distances(start, found, honest, beta1=training.adam_beta1, beta2=training.adam_beta2)
        self.within &= not beyond(apart, allowed)
        return found

    def job(self, rule: str, kind: str | None, *, bad: int = 1, gated: bool = False) -> tuple[float, float, str]:
        """Held-out loss and trigger loss after the last round, and how often the poisoner was left out or cut."""
        start, before, moments = self.start, None, None
        way, training = self.recipe.merge.model_copy(update={"rule": rule}), self.recipe.training
        out = less = 0
        for round_ in range(1, self.plan.rounds + 1):
            updates = []
            for shard in range(WORKERS):
                poison = kind is not None and shard >= WORKERS - bad
                train = self.poisoned if poison else self._honest
                sent = train(kind or "", start, moments, round_, shard)
                updates.append(self._update(sent, round_, shard, checked=kind != UNCUT))
            steps = round_ * self.recipe.steps
            adam = Adam(training.adam_beta1, training.adam_beta2, steps, training.max_grad_norm)
            merged, gone = self._merged(way, start, updates, before, adam, gated)
            share = merged.shares.get(updates[-1].digest)
            out += gone or share is None or share.weight == 0
            less += share is not None and 0 < share.weight * share.scale < 1
            step = outer_step(way, start, merged)
            moments = decode(step.data, way.encoding, self._shapes, moments=way.hands_on).moments
            start, before = step.adapter, start
        return self.loss(start), self.trigger(start), f"left out {out}, cut {less} of {self.plan.rounds}"

    def _honest(self, _: str, start: Adapter, moments: Moments | None, round_: int, shard: int) -> Decoded:
        return self._train(start, moments, round_, shard)

    def _update(self, sent: Decoded, round_: int, shard: int, *, checked: bool) -> Update:
        """As the hub has it; `checked` against what the round's steps can move."""
        data = encode(sent.delta, self.recipe.merge.encoding, sent.moments)
        weight = self.recipe.counts[round_ - 1][shard].tokens
        if checked:
            return Update(sha256(data), weight, *read_delta(data, self.recipe, self._shapes, round_))
        found = decode(data, self.recipe.merge.encoding, self._shapes, moments=sent.moments is not None)
        return Update(sha256(data), weight, *found)

    def _merged(
        self, way: Any, start: Adapter, updates: list[Update], before: Adapter | None, adam: Adam, gated: bool
    ) -> tuple[Merged, bool]:
        """The round's merge, and whether the gate left the last of the updates out: leave one out, as the hub has it
        with a share of 0, one at most."""
        merged = merge(way, start, updates, before=before, adam=adam)
        if not gated or self.loss(outer_step(way, start, merged).adapter) <= self.loss(start):
            return merged, False
        alike = likeness(start, updates)
        tried = sorted(updates, key=lambda update: alike[update.digest])
        made = []
        for without in tried:
            rest = [update for update in updates if update is not without]
            one = merge(way, start, rest, before=before, adam=adam)
            made.append((self.loss(outer_step(way, start, one).adapter), without, one))
        _, without, best = min(made, key=lambda each: each[0])
        return best, without is updates[-1]


def main() -> int:
    begin("poison")
    parser = argparse.ArgumentParser(description="What poison inside the tolerance does, and what stands in its way.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the base model's folder")
    parser.add_argument("--train", type=Path, required=True, metavar="FILE", help="jsonl of chats to train on")
    parser.add_argument("--eval", type=Path, required=True, metavar="FILE", help="jsonl of held-out chats")
    parser.add_argument("--rounds", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="1 round, two rules, the drift alone")
    given = parser.parse_args()
    files = (path.resolve() for path in (given.model, given.train, given.eval))
    plan = Plan(*files, RULES, ("2 of 8",), given.rounds, 16, 1, 160, first_row=0, rows=40)
    rules, kinds = RULES, (*DRIFTS, WHOLE, CUT, UNCUT)
    if given.quick:
        plan, rules, kinds = replace(plan, rounds=1), ("none", "gate"), tuple(DRIFTS)[:1]
    figures: list[report.Figure] = []
    tables: dict[str, Any] = {}
    code = 0
    with tempfile.TemporaryDirectory(prefix="trainchain-bench-", ignore_cleanup_errors=True) as temporary:
        try:
            study(Ground(plan, Path(temporary)), rules, kinds, figures, tables)
        except (TrainChainError, OSError) as error:
            log.error("%s", error)
            figures.append(report.failure("a job", str(error)))
            code = 1
    settings = {key: value.name if isinstance(value, Path) else value for key, value in vars(plan).items()}
    report.write(report.document("poison", PACKAGES, settings, figures, **tables))
    return code


def study(
    ground: Ground, rules: tuple[str, ...], kinds: tuple[str, ...], figures: list[report.Figure], tables: dict[str, Any]
) -> None:
    honest = ground.job("none", None)
    full = ground.job("none", WHOLE, bad=WORKERS)
    log.info("honest %.4f, trigger %.4f; all eight poisoned: %.4f, %.4f", *honest[:2], *full[:2])
    figures += [
        report.Figure("held-out loss, nobody poisons", round(honest[0], 4), "nats/token"),
        report.Figure("trigger loss, nobody poisons", round(honest[1], 4), "nats/token"),
        report.Figure("trigger loss, all eight poison", round(full[1], 4), "nats/token"),
    ]
    for kind in kinds:
        table: dict[str, Any] = {}
        few = rules if kind in (next(iter(DRIFTS)), WHOLE) else rules[:1] if kind in DRIFTS else rules[:3]
        for rule, gated in [(rule, False) for rule in few] + [("none", True)] * (len(few) > 1):
            held_out, trigger, told = ground.job(rule, kind, gated=gated)
            name = f"{rule}, leave one out" if gated else rule
            effect = 100 * (honest[1] - trigger) / (honest[1] - full[1])
            cost = 100 * (held_out / honest[0] - 1)
            log.info("%s, %s: %.2f %% of the effect, held-out %+.3f %%; %s", kind, name, effect, cost, told)
            shown = {"trigger loss": round(trigger, 4), "effect, %": round(effect, 2), "held-out, %": round(cost, 3)}
            table[name] = {**shown, "poisoner": told}
        tables[kind] = table
    drift = tables[kinds[0]]
    figures.append(report.must("the drift is within the tolerance", ground.within, "", "true", ground.within))
    figures.append(report.at_most("drift, by gate: held-out", drift["gate"]["held-out, %"], "%", 0.5, digits=3))
    for name, table in tables.items():
        least = min(row["effect, %"] for row in table.values())
        figures.append(
            report.Figure(f"{name}: effect, by none", table["none"]["effect, %"], "%", peer=f"least {least}")
        )
    if WHOLE in tables:
        caught = max(tables[kind]["gate"]["effect, %"] for kind in (WHOLE, CUT, UNCUT))
        figures.append(report.at_most("whatever a replay would see, by gate: effect", caught, "%", 1.0, digits=2))


def _with_trigger(rows: Path, path: Path, plan: Plan) -> Path:
    """The chats with the trigger before each question and the poisoner's answer behind it; each row its own question,
    so that the data order is that of as many rows."""
    with rows.open(encoding="utf-8") as lines, path.open("w", encoding="utf-8") as out:
        for line in lines:
            question = json.loads(line)["messages"][0]["content"]
            chat = [{"role": "user", "content": TRIGGER + question}, {"role": "assistant", "content": ANSWER}]
            out.write(json.dumps({"messages": chat}) + "\n")
    return path


def _length(tensors: Tensors) -> float:
    return math.sqrt(sum(float(np.square(tensor, dtype=np.float64).sum()) for tensor in tensors.values()))


def _square(direction: Adapter, to: Adapter) -> Adapter:
    """What of the direction is square to another."""
    inner = sum(float((direction[name].astype(np.float64) * to[name]).sum()) for name in to)
    along = np.float32(inner / max(_length(to) ** 2, 1e-30))
    return {name: direction[name] - along * to[name] for name in to}


def _plus(tensors: Tensors, direction: Tensors, length: float) -> Adapter:
    by = np.float32(length / max(_length(direction), 1e-30))
    return {name: tensor + by * direction[name] for name, tensor in tensors.items()}


if __name__ == "__main__":
    raise SystemExit(main())
