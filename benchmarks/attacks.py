"""What attackers cost: a job of few short rounds, real updates, one attacker of four and two of eight, by every rule.

The honest workers train their shards with TrainChain's engine. Attackers know everything: the base, the start, and what
every honest worker hands in. Each delta, theirs too, is encoded, decoded and checked as the hub does it, so what they
send is cut to the reach that the hub lets pass, and the merge is the hub's. With their first moments they do what they
do with their deltas. Every attack has its own trajectory to the last round; a shard that starts from the same adapter
again is not trained again.

A cost is held-out loss above that of the same job in which only the honest ones took part and everything was taken as
it came. With --tune the job and the held-out rows are those that rules may be chosen on; without it they are others.

Prints one JSON document on stdout. Exits 0 whatever it finds, 1 where a job did not run to its end.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import report
from launch import begin, log
from numpy.typing import NDArray

from trainchain.core.adapter import A_SUFFIX, B_SUFFIX, Adapter, adapter_bytes, apply, delta, read_adapter
from trainchain.core.checks import LENGTH, reach, read_delta
from trainchain.core.digests import sha256
from trainchain.core.encodings import Decoded, decode, encode
from trainchain.core.errors import TrainChainError
from trainchain.core.merge.moments import Adam
from trainchain.core.merge.updates import Merged, Update, merge, modules_of, outer_step
from trainchain.core.segments import Moments, start_state, state_bytes

if TYPE_CHECKING:
    from trainchain.core.models import ResolvedRecipe

PACKAGES = ("trainchain", "torch", "transformers", "numpy")
DEFAULT = "gate"
RULES = (DEFAULT, "none", "clip", "multi-krum", "coordinate-median", "trimmed-mean")
CREWS = {"1 of 4": (4, 1), "2 of 8": (8, 2)}
LEASE = "0x" + "00" * 32
SPREAD = 1.5
"""ALIE's z."""


@dataclass(frozen=True)
class Plan:
    """What is run. `seed` is the job's, and of what attackers draw."""

    model: Path
    train: Path
    held_out: Path
    rules: tuple[str, ...]
    crews: tuple[str, ...]
    rounds: int = 6
    steps: int = 10
    batch: int = 2
    sequence_len: int = 256
    learning_rate: float = 5e-3
    first_row: int = 200
    rows: int = 200
    seed: int = 1
    threads: int = 1


class Round(NamedTuple):
    """One round's merge, and the digests of what the honest ones handed in."""

    merged: Merged
    honest: frozenset[str]


class Scene(NamedTuple):
    """What an attacker knows: where the round starts, what the honest ones hand in, the furthest that passes."""

    start: Adapter
    honest: Sequence[Adapter]
    furthest: float
    random: np.random.Generator


Attack = Callable[[Scene, int], Adapter]
"""(scene, which attacker) -> the delta that is handed in."""


def sign_flip(scene: Scene, at: int, *, by: float = 1.0) -> Adapter:
    """An honest update, backwards."""
    return {name: np.float32(-by) * tensor for name, tensor in scene.honest[at].items()}


def gaussian(scene: Scene, at: int) -> Adapter:
    """Noise, five times as large as an honest update."""
    return {
        name: scene.random.normal(0.0, 5 * float(tensor.std()) + 1e-12, tensor.shape).astype(np.float32)
        for name, tensor in scene.honest[at].items()
    }


def alie(scene: Scene, at: int) -> Adapter:
    """The mean of the honest updates, each number off by 1.5 of their standard deviations (A Little Is Enough, Baruch
    et al. 2019, arXiv 1902.06156). All attackers send the same."""
    found = {}
    for name in scene.start:
        each = np.stack([update[name] for update in scene.honest])
        found[name] = each.mean(axis=0) - np.float32(SPREAD) * each.std(axis=0)
    return found


def alie_apart(scene: Scene, at: int) -> Adapter:
    """`alie`, and to each attacker noise of his own, so that no two are copies."""
    found = alie(scene, at)
    noise = {name: scene.random.normal(size=tensor.shape) for name, tensor in found.items()}
    return {name: _plus(tensor, noise[name], 0.4 * _length(tensor)) for name, tensor in found.items()}


def free_rider(scene: Scene, at: int) -> Adapter:
    """Nothing."""
    return {name: np.zeros_like(tensor) for name, tensor in scene.start.items()}


def copied(scene: Scene, at: int) -> Adapter:
    """What another handed in."""
    return scene.honest[at]


def nearly_copied(scene: Scene, at: int) -> Adapter:
    """What another handed in, a twentieth of it noise."""
    return {
        name: _plus(tensor, scene.random.normal(size=tensor.shape), 0.05 * _length(tensor))
        for name, tensor in scene.honest[at].items()
    }


def rotated(scene: Scene, at: int) -> Adapter:
    """An honest product by other factors: A turned one way, B the other, as far as passes."""
    pairs = {}
    for module in modules_of(scene.start):
        rank = scene.start[module + A_SUFFIX].shape[0]
        skew = np.triu(scene.random.normal(size=(rank, rank)), 1)
        values, vectors = np.linalg.eigh(1j * (skew - skew.T))
        pairs[module] = values, vectors

    def turn(module: str, far: float) -> NDArray[np.float64]:
        values, vectors = pairs[module]
        turned: NDArray[np.float64] = ((vectors * np.exp(-1j * far * values)) @ vectors.conj().T).real
        return turned

    return _regauged(scene, at, turn)


def scaled(scene: Scene, at: int) -> Adapter:
    """An honest product by other factors: A larger, B smaller, as far as passes."""
    return _regauged(scene, at, lambda module, far: np.exp(far) * np.eye(scene.start[module + A_SUFFIX].shape[0]))


def colluding(scene: Scene, at: int) -> Adapter:
    """All attackers send the same honest update backwards: each other's nearest."""
    return sign_flip(scene, 0)


ATTACKS: dict[str, Attack] = {
    "sign flip": sign_flip,
    "sign flip x10": lambda scene, at: sign_flip(scene, at, by=10.0),
    "gaussian": gaussian,
    "ALIE": alie,
    "free rider": free_rider,
    "copy": copied,
    "near copy": nearly_copied,
    "gauge, rotated": rotated,
    "gauge, scaled": scaled,
}
TOGETHER: dict[str, Attack] = {"colluding copies": colluding, "ALIE, apart": alie_apart}
"""These take two."""
QUICK = ("sign flip", "ALIE")


def main() -> int:
    begin("attacks")
    plan, only = _arguments()
    figures: list[report.Figure] = []
    more: dict[str, Any] = {}
    code = 0
    with tempfile.TemporaryDirectory(prefix="trainchain-bench-", ignore_cleanup_errors=True) as temporary:
        try:
            study(Field(plan, Path(temporary)), only, figures, more)
        except (TrainChainError, OSError) as error:
            log.error("%s", error)
            figures.append(report.failure("a job", str(error)))
            code = 1
    settings = {key: value.name if isinstance(value, Path) else value for key, value in vars(plan).items()}
    report.write(report.document("attacks", PACKAGES, settings, figures, **more))
    return code


def _arguments() -> tuple[Plan, Sequence[str] | None]:
    parser = argparse.ArgumentParser(description="What attackers cost a job, by every robust rule.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the base model's folder")
    parser.add_argument("--train", type=Path, required=True, metavar="FILE", help="jsonl of training rows")
    parser.add_argument("--eval", type=Path, required=True, metavar="FILE", help="jsonl of held-out rows")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES, metavar="RULE", help="(all)")
    parser.add_argument("--crews", nargs="+", choices=CREWS, default=tuple(CREWS), metavar="CREW", help="(both)")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS | TOGETHER, metavar="ATTACK", help="(all)")
    parser.add_argument("--rounds", type=int, default=6, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="in a round (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="(%(default)s)")
    parser.add_argument("--tune", action="store_true", help="the seed and the held-out rows to choose rules on")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 4 steps, one crew, two rules, two attacks")
    given = parser.parse_args()
    files = (path.resolve() for path in (given.model, given.train, given.eval))
    plan = Plan(*files, tuple(given.rules), tuple(given.crews), given.rounds, given.steps)
    plan = replace(plan, learning_rate=given.learning_rate)
    if given.tune:
        plan = replace(plan, seed=0, first_row=0)
    if given.quick:
        plan = replace(plan, rules=(DEFAULT, "none"), crews=("1 of 4",), rounds=2, steps=4, first_row=10, rows=20)
    return plan, QUICK if given.quick else given.attacks


class Field:
    """One job, its engine, and what was trained of it."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        from trainchain.core.train.trainer import Engine

        self.plan = plan
        self.recipe, self.start, files = _job(plan, folder)
        self._engine = Engine(
            self.recipe, plan.model, files, threads=plan.threads, micro_tokens=plan.batch * plan.sequence_len
        )
        self._shapes = {name: tensor.shape for name, tensor in self.start.items()}
        self._trained: dict[tuple[str, int, int], Decoded] = {}
        self._losses: dict[str, float] = {}

    def loss(self, adapter: Adapter | None) -> float:
        key = sha256(adapter_bytes(adapter)) if adapter else ""
        if key not in self._losses:
            self._losses[key] = self._engine.evaluate(adapter)
        return self._losses[key]

    def play(self, rule: str, shards: Sequence[int], bad: int, attack: Attack | None) -> tuple[float, list[Round]]:
        """The held-out loss after the last round, and every round."""
        start, before, moments, rounds = self.start, None, None, []
        way, training = self.recipe.merge.model_copy(update={"rule": rule}), self.recipe.training
        for round_ in range(1, self.plan.rounds + 1):
            bound = reach(self.recipe, round_)
            honest = [self._train(start, moments, round_, shard) for shard in shards]
            random = np.random.default_rng([self.plan.seed, round_])
            scene = Scene(start, [each.delta for each in honest], bound, random)
            sent = [self._lie(attack, scene, honest, at) for at in range(bad)] if attack else []
            updates = [
                self._received(each, round_, shard)
                for shard, each in zip(itertools.count(), [*honest, *sent], strict=False)
            ]
            digests = frozenset(update.digest for update in updates[: len(honest)])
            steps = round_ * self.recipe.steps
            adam = Adam(training.adam_beta1, training.adam_beta2, steps, training.max_grad_norm)
            rounds.append(Round(merge(way, start, updates, before=before, adam=adam), digests))
            step = outer_step(way, start, rounds[-1].merged)
            moments = decode(step.data, way.encoding, self._shapes, moments=way.hands_on).moments
            start, before = step.adapter, start
        return self.loss(start), rounds

    def _lie(self, attack: Attack, scene: Scene, honest: Sequence[Decoded], at: int) -> Decoded:
        """What an attacker hands in, as far as it passes; of the second moment the median is taken anyhow."""
        bound, theirs = scene.furthest, [each.moments for each in honest if each.moments is not None]
        cut = {name: np.clip(tensor, -bound, bound) for name, tensor in attack(scene, at).items()}
        if not theirs:
            return Decoded(cut, None)
        m = dict(theirs[at].m)
        if attack not in (rotated, scaled):
            m = attack(scene._replace(honest=[dict(each.m) for each in theirs]), at)
        length = float(np.sqrt(sum(np.sum(np.square(tensor, dtype=np.float64)) for tensor in m.values())))
        by = np.float32(min(1.0, 0.95 * LENGTH * self.recipe.training.max_grad_norm / max(length, 1e-30)))
        return Decoded(cut, Moments({name: by * tensor for name, tensor in m.items()}, theirs[at].v))

    def _received(self, sent: Decoded, round_: int, shard: int) -> Update:
        """As the hub has it."""
        data = encode(sent.delta, self.recipe.merge.encoding, sent.moments)
        weight = self.recipe.counts[round_ - 1][shard].tokens
        return Update(sha256(data), weight, *read_delta(data, self.recipe, self._shapes, round_))

    def _train(self, start: Adapter, moments: Moments | None, round_: int, shard: int) -> Decoded:
        key = (sha256(state_bytes(start_state(start, moments))), round_, shard)
        if key not in self._trained:
            found = self._engine.train(start, round_, shard, LEASE, moments=moments)
            self._trained[key] = Decoded(found.delta, found.moments if self.recipe.merge.hands_on else None)
        return self._trained[key]


def study(field: Field, only: Sequence[str] | None, figures: list[report.Figure], more: dict[str, Any]) -> None:
    """Fill in the figures: the default rule's against its targets, all rules' in tables."""
    figures.append(report.Figure("held-out loss, base", round(field.loss(None), 5), "nats/token"))
    for crew in field.plan.crews:
        count, bad = CREWS[crew]
        attacks = ATTACKS | (TOGETHER if bad > 1 else {})
        attacks = {name: attack for name, attack in attacks.items() if only is None or name in only}
        everybody, _ = field.play("none", range(count), 0, None)
        ideal, _ = field.play("none", range(count - bad), 0, None)
        log.info("%s: all honest %.4f, the honest ones alone %.4f", crew, everybody, ideal)
        figures.append(report.Figure(f"{crew}: held-out loss, nobody attacks", round(everybody, 5), "nats/token"))
        figures.append(report.Figure(f"{crew}: held-out loss, the honest alone", round(ideal, 5), "nats/token"))
        table: dict[str, dict[str, float]] = {}
        for rule in field.plan.rules:
            found, rounds = field.play(rule, range(count), 0, None)
            cost, told = 100 * (found / everybody - 1), _told(rounds)
            log.info("%s, %s, nobody attacks: %+.3f %%; %s", crew, rule, cost, told)
            table[rule] = {"nobody": round(cost, 3)}
            if rule == DEFAULT:
                figures.append(report.at_most(f"{crew}: {rule}, nobody attacks", cost, "%", 0.2, digits=3, peer=told))
            for name, attack in attacks.items():
                found, rounds = field.play(rule, range(count - bad), bad, attack)
                cost, told = 100 * (found / ideal - 1), _told(rounds)
                log.info("%s, %s, %s: %+.3f %%; %s", crew, rule, name, cost, told)
                table[rule][name] = round(cost, 3)
                if rule == DEFAULT:
                    figures.append(report.at_most(f"{crew}: {rule}, {name}", cost, "%", 0.5, digits=3, peer=told))
        more[f"cost in % by rule, {crew}"] = table


def _told(rounds: Sequence[Round]) -> str:
    """How often each kind was left out, or had less than its weight."""
    said = []
    for kind in ("honest", "attackers'"):
        shares = [
            share
            for merged, honest in rounds
            for digest, share in merged.shares.items()
            if (digest in honest) == (kind == "honest")
        ]
        out, less = sum(share.weight == 0 for share in shares), sum(0 < share.weight < 1 for share in shares)
        said += [f"of {len(shares)} {kind} {out} left out, {less} halved"] if shares else []
    return "; ".join(said)


def _job(plan: Plan, folder: Path) -> tuple["ResolvedRecipe", Adapter, dict[str, Path]]:
    """Resolved as an owner's machine does it, with the slice of the held-out rows that is judged on."""
    from trainchain.cli.bring import Bringer
    from trainchain.cli.plan import resolve
    from trainchain.core.worker.cache import Cache

    with plan.held_out.open(encoding="utf-8") as lines:
        slice_ = itertools.islice(lines, plan.first_row, plan.first_row + plan.rows)
        (folder / "held-out.jsonl").write_text("".join(slice_), encoding="utf-8")
    recipe = {
        "name": "attacks",
        "base_model": str(plan.model),
        "datasets": [{"path": str(plan.train)}],
        "test_datasets": [{"path": str(folder / "held-out.jsonl"), "rows": plan.rows}],
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": "all-linear",
        "sequence_len": plan.sequence_len,
        "micro_batch_size": plan.batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": plan.learning_rate,
        "warmup_steps": 5,
        "seed": plan.seed,
        "rounds": plan.rounds,
        "shards": max(CREWS[crew][0] for crew in plan.crews),
        "steps": plan.steps,
        "pay": {"per_million_tokens": "0", "budget": "1"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    found = resolve(folder / "recipe.yaml", Bringer(lambda: Cache(folder / "cache"), note=lambda _: None))
    return found.resolved, read_adapter(found.initial), dict(found.files)


def _regauged(scene: Scene, at: int, turn: Callable[[str, float], NDArray[np.float64]]) -> Adapter:
    """The honest end in other factors, `turn` as far as every number still passes."""
    end = {name: tensor.astype(np.float64) for name, tensor in apply(scene.start, scene.honest[at]).items()}
    found: Adapter = {}
    for module in modules_of(scene.start):
        a, b = module + A_SUFFIX, module + B_SUFFIX
        least, most = 0.0, 4.0
        for _ in range(30):
            far = (least + most) / 2
            by = turn(module, far)
            made = {a: (by @ end[a]).astype(np.float32), b: (end[b] @ np.linalg.inv(by)).astype(np.float32)}
            moved = delta(made, {name: scene.start[name] for name in made})
            passes = all(float(np.abs(tensor).max()) <= scene.furthest for tensor in moved.values())
            least, most = (far, most) if passes else (least, far)
            if passes:
                found |= moved
        if a not in found:  # the honest update is at the bound itself
            found |= {name: scene.honest[at][name] for name in (a, b)}
    return found


def _length(tensor: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(tensor))


def _plus(tensor: NDArray[np.float32], noise: NDArray[np.float64], length: float) -> NDArray[np.float32]:
    """The tensor and noise of that length."""
    found: NDArray[np.float32] = (tensor + noise * (length / float(np.linalg.norm(noise)))).astype(np.float32)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
