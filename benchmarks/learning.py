"""What is learned: TrainChain's engine on a single machine against a tuned TRL run of the same tokens.

Both sides take the same rows in the same order from the same start adapter, with AdamW, warm-up and a cosine of
their own; each tries the same grid of learning rates on the first seed and keeps its best, judged on rows that
the result is not. Held-out losses are measured by PEFT alone, alike for both. With --state, a run that was
stopped goes on where it was.

Prints one JSON document on stdout. Exits 0 whatever it finds, 1 where a side did not run to its end.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import report
from jobs import Job, Size, longest, real_tokens
from launch import OWN_PROCESS, SideFailedError, absent_peer, begin, log
from runs import Runs

from trainchain.core.errors import TrainChainError

PACKAGES = ("trainchain", "torch", "transformers", "peft", "accelerate", "trl", "datasets", "numpy")
GRID = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
OURS, TRL = "trainchain", "TRL"


@dataclass(frozen=True)
class Plan:
    """What is run. `rounds` of more than one make the engine begin each with new AdamW moments."""

    model: Path
    train: Path
    held_out: Path
    grid: tuple[float, ...]
    seeds: int
    steps: int
    rounds: int
    threads: int
    side_by_side: int
    batch: int = 8
    sequence_len: int = 512
    warmup_steps: int = 5
    held_out_rows: int = 200
    limit_seconds: float = 3600.0

    @property
    def total_steps(self) -> int:
        return self.rounds * self.steps

    def settings(self) -> dict[str, Any]:
        names = {key: str(value.name) for key, value in asdict(self).items() if isinstance(value, Path)}
        return {
            **asdict(self),
            **names,
            "schedule": "cosine to zero after linear warm-up over the whole run, each side by its own code: that of "
            "transformers begins with a rate of zero, ours with the first part of the warm-up",
            "both": "AdamW (0.9, 0.999), no decay, clip 1.0, r 8, alpha 16, every linear layer but the head, fp32; "
            "same rows, same order, same start adapter; TRL on rows packed alike, without checkpointing",
            "tuning": f"the grid on seed 0, judged on held-out rows {self.held_out_rows} to "
            f"{2 * self.held_out_rows - 1}; the result is on rows 0 to {self.held_out_rows - 1}",
            "environment of every side": OWN_PROCESS,
        }


class Run(NamedTuple):
    side: str
    seed: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.side}-{self.seed}-{self.rate:g}"


def main() -> int:
    begin("learning")
    plan, state = _arguments()
    reason = absent_peer()
    sides = [OURS] if reason else [OURS, TRL]
    load = report.machine()["load_average"]
    figures = [report.must("TRL", reason, "", "it is measured", False)] if reason else []
    more: dict[str, Any] = {"load_average_before": load}
    code = 0
    with tempfile.TemporaryDirectory(prefix="trainchain-bench-", ignore_cleanup_errors=True) as temporary:
        try:
            figures += study(Learned(plan, state or Path(temporary) / "state"), sides, more)
        except (SideFailedError, TrainChainError) as error:
            log.error("%s", error)
            figures.append(report.failure("a run", str(error)))
            code = 1
    report.write(report.document("learning", PACKAGES, plan.settings(), figures, **more))
    return code


def _arguments() -> tuple[Plan, Path | None]:
    parser = argparse.ArgumentParser(description="What is learned by TrainChain and by a tuned TRL on the same tokens.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the base model's folder")
    parser.add_argument("--train", type=Path, required=True, metavar="FILE", help="jsonl of training rows")
    parser.add_argument("--eval", type=Path, required=True, metavar="FILE", help="jsonl of held-out rows")
    parser.add_argument(
        "--quick", action="store_true", help="6 steps of 2 sequences, 2 rates, 2 seeds, 20 held-out rows"
    )
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument(
        "--grid", type=float, nargs="+", default=GRID, metavar="RATE", help="learning rates (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=100, help="in a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (%(default)s)")
    parser.add_argument("--side-by-side", type=int, default=2, metavar="N", help="runs at once (%(default)s)")
    parser.add_argument("--state", type=Path, metavar="DIR", help="keep finished runs here, and go on from them")
    given = parser.parse_args()
    model, train, held_out = (path.resolve() for path in (given.model, given.train, given.eval))
    sizes = (given.seeds, given.steps, given.rounds, given.threads, given.side_by_side)
    plan = Plan(model, train, held_out, tuple(given.grid), *sizes)
    plan = replace(plan, sequence_len=longest(model, plan.sequence_len))
    if given.quick:
        plan = replace(plan, batch=2, warmup_steps=1, held_out_rows=20, limit_seconds=120.0)
        plan = replace(plan, grid=plan.grid[1:3], seeds=2, steps=6, rounds=1)
    return plan, given.state.resolve() if given.state else None


class Learned(Runs):
    """One job a seed, trained by either side."""

    def __init__(self, plan: Plan, state: Path) -> None:
        self.plan = plan
        super().__init__(
            state,
            asdict(plan),
            side_by_side=plan.side_by_side,
            threads=plan.threads,
            limit_seconds=plan.limit_seconds,
        )
        for name, first in (("tuning", plan.held_out_rows), ("result", 0)):
            part = (plan.held_out, first, plan.held_out_rows)
            self.held_out(name, plan.model, part, length=plan.sequence_len)

    def job(self, seed: int) -> Job:
        plan = self.plan
        training = {
            "micro_batch_size": 2 if plan.batch % 2 == 0 else 1,
            "lr_scheduler": "cosine",
            "warmup_steps": plan.warmup_steps,
            "shard_warmup_steps": 0,
            "max_grad_norm": 1.0,
            "weight_decay": 0.0,
            "precision": "fp32",
            "seed": seed,
        }
        size = Size(plan.steps, plan.batch, plan.sequence_len, rounds=plan.rounds)
        return self.prepared(f"seed-{seed}", plan.model, plan.train, size, training)

    def train(self, wanted: Sequence[Run]) -> None:
        self.train_all({run.name: self._spec(run) for run in wanted})

    def _spec(self, run: Run) -> dict[str, Any]:
        common = {"job": str(self.job(run.seed).folder), "warm": 1, "steps": self.plan.total_steps}
        if run.side == OURS:
            return common | {"side": "ours", "training": {"learning_rate": run.rate}}
        schedule = {"schedule": "cosine", "warmup_steps": self.plan.warmup_steps, "learning_rate": run.rate}
        return common | schedule | {"side": "trl", "layout": "packed", "micro": 1, "stock": False, "seed": run.seed}

    def score(self, rows: str, wanted: Sequence[Run]) -> dict[str, float]:
        """Held-out losses of trained adapters by their runs' names, and that of the base alone."""
        job = self.job(0)
        adapters = {run.name: self.result(run.name)["adapter"] for run in wanted}
        return self.score_all(rows, job, {"base": str(job.start)} | adapters)


def study(runs: Learned, sides: Sequence[str], more: dict[str, Any]) -> list[report.Figure]:
    """Tune on seed 0, train the other seeds at each side's best rate, and compare."""
    plan = runs.plan
    grid = [Run(side, 0, rate) for side in reversed(sides) for rate in plan.grid]  # the slower side first
    runs.train(grid)
    losses = runs.score("tuning", grid)
    tuned = {side: {run.rate: losses[run.name] for run in grid if run.side == side} for side in sides}
    best = {side: min(found, key=found.__getitem__) for side, found in tuned.items()}
    more["tuning"] = {side: {f"{rate:g}": round(loss, 5) for rate, loss in tuned[side].items()} for side in sides}
    final = [Run(side, seed, best[side]) for side in reversed(sides) for seed in range(plan.seeds)]
    runs.train(final)
    losses = runs.score("result", final)
    by_side = {side: [losses[run.name] for run in final if run.side == side] for side in sides}
    trained = runs.job(0).steps()[: plan.total_steps]
    more["tokens_per_second"] = {
        side: [round(runs.result(run.name)["tokens_per_second"], 1) for run in final if run.side == side]
        for side in sides
    }
    figures = [
        report.Figure("tokens trained, seed 0", sum(real_tokens(step) for step in trained), "tokens"),
        report.Figure("held-out loss before", round(losses["base"], 5), "nats/token"),
    ]
    for side in sides:
        edge = ", the edge of the grid" if best[side] in (min(plan.grid), max(plan.grid)) else ""
        figures.append(report.Figure(f"best learning rate, {side}", best[side], "", peer=f"of {plan.grid}{edge}"))
        figures += [
            report.Figure(f"held-out loss, {side}, seed {seed}", round(loss, 5), "nats/token")
            for seed, loss in enumerate(by_side[side])
        ]
        figures.append(report.Figure(f"held-out loss, {side}, mean", round(mean(by_side[side]), 5), "nats/token"))
    return figures + (gap_figures(by_side[OURS], by_side[TRL]) if TRL in sides else [])


def gap_figures(ours: Sequence[float], theirs: Sequence[float]) -> list[report.Figure]:
    """Pairs of the same seed: same rows, same start."""
    gaps = [100 * (mine - other) / other for mine, other in zip(ours, theirs, strict=True)]
    figures = [report.at_most("loss gap to tuned TRL, mean over seeds", mean(gaps), "%", 0.0, digits=3)]
    if len(gaps) > 1:
        figures.append(report.Figure("loss gap to tuned TRL, standard deviation", round(stdev(gaps), 3), "%"))
    return figures


if __name__ == "__main__":
    raise SystemExit(main())
