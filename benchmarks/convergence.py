"""As good as one machine? Four workers' merged rounds against one machine that trains on the same tokens.

`one machine` takes, in each of its steps, as many tokens as the four workers take in one of theirs; `factor mean` is
FedAvg on LoRA: the means of A and of B, new AdamW moments in every round, nothing encoded; `ours` is the recipe's
default: product-mean, gate, int4, merged moments. Each side's learning rate is tuned on the first seed, on rows that
the result is not. Contributions go through the hub's own code: encoded, checked, merged, stepped. Held-out losses are
measured by PEFT alone. With --state, a run that was stopped goes on where it was.

Prints one JSON document on stdout. Exits 0 whatever it finds, 1 where a side did not run to its end.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import report
from jobs import Job, Size, longest
from launch import OWN_PROCESS, SideFailedError, begin, log
from runs import Runs

from trainchain.core.errors import TrainChainError

PACKAGES = ("trainchain", "torch", "transformers", "peft", "accelerate", "numpy")
DOMAINS = ("Hotels", "Homes", "Buses", "Restaurants")
ONE, FACTOR, OURS = "one machine", "factor mean", "ours"
OURS_WAY: dict[str, Any] = {"method": "product-mean", "rule": "gate", "encoding": "int4", "moments": "merged"}
WAYS: dict[str, dict[str, Any] | None] = {
    ONE: None,
    FACTOR: {"method": "factor-mean", "rule": "none", "encoding": "fp32", "moments": "fresh"},
    OURS: OURS_WAY,
    "ours, fresh moments": OURS_WAY | {"moments": "fresh"},
    "ours, clip": OURS_WAY | {"rule": "clip"},
    "ours, int8": OURS_WAY | {"encoding": "int8"},
    "ours, factor-mean": OURS_WAY | {"method": "factor-mean"},
    "ours, outer momentum 0.3": OURS_WAY | {"outer_momentum": 0.3},
    "ours, outer learning rate 0.7": OURS_WAY | {"outer_learning_rate": 0.7},
    "ours, outer learning rate 1.3": OURS_WAY | {"outer_learning_rate": 1.3},
}
TUNED_LIKE = {side: OURS if side.startswith("ours") else side for side in WAYS}
"""Whose learning rate each takes."""


@dataclass(frozen=True)
class Plan:
    model: Path
    train: Path
    held_out: Path
    domains: tuple[Path, Path] | None
    """Training and held-out rows that name their `services`."""
    grid: tuple[float, ...]
    seeds: int
    workers: int = 4
    steps: int = 200
    """Of each worker, in all rounds together."""
    per_round: tuple[int, ...] = (10, 20, 40)
    batch: int = 2
    sequence_len: int = 256
    warmup_steps: int = 5
    held_out_rows: int = 150
    domain_rows: int = 15
    dies: float = 0.25
    threads: int = 1
    side_by_side: int = 2
    limit_seconds: float = 3600.0

    def settings(self) -> dict[str, Any]:
        names = {key: str(value.name) for key, value in asdict(self).items() if isinstance(value, Path)}
        return {
            **asdict(self),
            **names,
            "domains": self.domains and [path.parent.name + "/" + path.name for path in self.domains],
            "ways": WAYS,
            "every side": "AdamW (0.9, 0.999), no decay, clip 1.0, r 8, alpha 16, every linear layer but the head, "
            "fp32; constant rate after the job's warm-up; new moments warm up over as many steps again",
            "tuning": f"the grid on seed 0, {self.per_round[0]} steps a round, judged on held-out rows from "
            f"{self.held_out_rows} on; the result is on the {self.held_out_rows} before",
            "environment of every side": OWN_PROCESS,
        }


@dataclass(frozen=True)
class Run:
    """One job from beginning to end."""

    side: str
    seed: int
    rate: float
    per_round: int
    domains: bool = False
    dies: float = 0.0
    late: float = 0.0

    @property
    def name(self) -> str:
        words = [self.side, str(self.seed), f"{self.rate:g}", str(self.per_round)]
        words += ["domains"] if self.domains else []
        words += [f"{what}-{share:g}" for what, share in (("dies", self.dies), ("late", self.late)) if share]
        return "-".join(words).replace(",", "").replace(" ", "_")


def main() -> int:
    begin("convergence")
    plan, state = _arguments()
    more: dict[str, Any] = {"load_average_before": report.machine()["load_average"]}
    figures: list[report.Figure] = []
    code = 0
    with tempfile.TemporaryDirectory(prefix="trainchain-bench-", ignore_cleanup_errors=True) as temporary:
        try:
            study(Trained(plan, state or Path(temporary) / "state"), figures, more)
        except (SideFailedError, TrainChainError) as error:
            log.error("%s", error)
            figures.append(report.failure("a run", str(error)))
            code = 1
    report.write(report.document("convergence", PACKAGES, plan.settings(), figures, **more))
    return code


def _arguments() -> tuple[Plan, Path | None]:
    parser = argparse.ArgumentParser(
        description="Merged rounds of four workers against one machine, on the same tokens."
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the base model's folder")
    parser.add_argument("--train", type=Path, required=True, metavar="FILE", help="jsonl of training rows")
    parser.add_argument("--eval", type=Path, required=True, metavar="FILE", help="jsonl of held-out rows")
    parser.add_argument(
        "--domains",
        type=Path,
        nargs=2,
        metavar="FILE",
        help="training and held-out rows with `services`: one domain a worker; left out where not given",
    )
    parser.add_argument("--quick", action="store_true", help="40 steps, 2 rates, 1 seed")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of a worker, in all rounds (%(default)s)")
    parser.add_argument("--grid", type=float, nargs="+", default=(3e-3, 4e-3, 6e-3, 8e-3), metavar="RATE")
    parser.add_argument("--side-by-side", type=int, default=2, metavar="N", help="runs at once (%(default)s)")
    parser.add_argument("--state", type=Path, metavar="DIR", help="keep finished runs here, and go on from them")
    given = parser.parse_args()
    model, train, held_out = (path.resolve() for path in (given.model, given.train, given.eval))
    domains = (given.domains[0].resolve(), given.domains[1].resolve()) if given.domains else None
    plan = Plan(
        model,
        train,
        held_out,
        domains,
        tuple(given.grid),
        given.seeds,
        steps=given.steps,
        side_by_side=given.side_by_side,
    )
    plan = replace(plan, sequence_len=longest(model, plan.sequence_len))
    if given.quick:
        plan = replace(plan, grid=plan.grid[1:3], seeds=1, steps=40, per_round=(10, 20), held_out_rows=40)
    return plan, given.state.resolve() if given.state else None


class Trained(Runs):
    """Jobs of many rounds."""

    def __init__(self, plan: Plan, state: Path) -> None:
        self.plan = plan
        super().__init__(
            state,
            asdict(replace(plan, seeds=0, side_by_side=0)),
            side_by_side=plan.side_by_side,
            threads=plan.threads,
            limit_seconds=plan.limit_seconds,
        )
        if plan.domains:
            self._split(*plan.domains)
        for name, at in (("result", 0), ("tuning", 1)):
            part = (plan.held_out, at * plan.held_out_rows, plan.held_out_rows)
            self.held_out(name, plan.model, part, length=plan.sequence_len)
            if plan.domains:
                each, files = plan.domain_rows, [state / f"{domain}-test.jsonl" for domain in DOMAINS]
                parts = [(file, at * each, each) for file in files]
                self.held_out(f"domains-{name}", plan.model, *parts, length=plan.sequence_len)

    def _split(self, train: Path, held_out: Path) -> None:
        """A file of each domain's own rows, and one of all of them."""
        for source, name in ((train, "train"), (held_out, "test")):
            kept: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
            for line in source.read_text(encoding="utf-8").splitlines():
                families = {service.partition("_")[0] for service in json.loads(line)["services"]}
                if len(families) == 1 and (domain := families.pop()) in kept:
                    kept[domain].append(line)
            fewest = min(len(lines) for lines in kept.values())
            for domain, lines in kept.items():
                text = "\n".join(lines[:fewest]) + "\n"
                (self.state / f"{domain}-{name}.jsonl").write_text(text, encoding="utf-8")
            mixed = "".join("\n".join(lines[:fewest]) + "\n" for lines in kept.values())
            (self.state / f"all-{name}.jsonl").write_text(mixed, encoding="utf-8")

    def jobs(self, run: Run) -> list[Job]:
        """One for all workers, whose shards they share, or for one machine; or one for each worker's domain."""
        plan, alone = self.plan, run.side == ONE
        size = Size(run.per_round, plan.batch, plan.sequence_len, rounds=plan.steps // run.per_round)
        if alone:  # where contributions die it takes fewer tokens, too
            size = replace(size, batch=round(plan.batch * plan.workers * (1 - run.dies)))
        elif not run.domains:
            size = replace(size, shards=plan.workers)
        data = [plan.train]
        if run.domains:
            data = [self.state / f"{name}-train.jsonl" for name in (["all"] if alone else DOMAINS)]
        return [self._job(run.seed, size, path) for path in data]

    def _job(self, seed: int, size: Size, data: Path) -> Job:
        training = {
            "micro_batch_size": size.batch,
            "lr_scheduler": "constant",
            "warmup_steps": self.plan.warmup_steps,
            "shard_warmup_steps": self.plan.warmup_steps,
            "max_grad_norm": 1.0,
            "weight_decay": 0.0,
            "precision": "fp32",
            "seed": seed,
        }
        name = f"job-{data.stem}-{seed}-{size.steps}-{size.batch}-{size.shards}"
        return self.prepared(name, self.plan.model, data, size, training)

    def train(self, wanted: Sequence[Run]) -> None:
        self.train_all({run.name: self._spec(run) for run in wanted})

    def _spec(self, run: Run) -> dict[str, Any]:
        return {
            "side": "rounds",
            "jobs": [str(job.folder) for job in self.jobs(run)],
            "training": {"learning_rate": run.rate},
            "merge": WAYS[run.side],
            "seed": run.seed,
            "dies": run.dies,
            "late": run.late,
        }

    def score(self, rows: str, wanted: Sequence[Run]) -> dict[Run, float]:
        """Held-out losses of trained adapters."""
        adapters = {run.name: self.result(run.name)["adapter"] for run in wanted}
        losses = self.score_all(rows, self.jobs(wanted[0])[0], adapters)
        return {run: float(losses[run.name]) for run in wanted}


def study(runs: Trained, figures: list[report.Figure], more: dict[str, Any]) -> None:
    """Tune, train, compare; figures are added as they are found, so that a stopped study tells those it has."""
    plan, first = runs.plan, runs.plan.per_round[0]
    rates = _tuned(runs, more, domains=False)

    def run(side: str, seed: int = 0, per_round: int = first, **changes: Any) -> Run:
        return Run(side, seed, rates[TUNED_LIKE[side]], per_round, **changes)

    main_ = [run(side, seed) for seed in range(plan.seeds) for side in (ONE, FACTOR, OURS)]
    churn = [run(side, seed, dies=plan.dies) for seed in range(plan.seeds) for side in (ONE, FACTOR, OURS)]
    late = [run(OURS, late=plan.dies)]
    longer = [run(side, per_round=steps) for steps in plan.per_round[1:] for side in (FACTOR, OURS)]
    others = [run(side) for side in WAYS if side not in (ONE, FACTOR, OURS)] if plan.seeds > 1 else []
    wanted = [*main_, *churn, *late, *longer, *others]
    runs.train(wanted)
    losses = runs.score("result", wanted)
    tokens = {runs.result(each.name)["tokens"] for each in main_ if not each.seed}
    figures.append(
        report.must("tokens trained, seed 0", max(tokens), "tokens", "every side the same", len(tokens) == 1)
    )
    for side in (ONE, FACTOR, OURS):
        each = [losses[run(side, seed)] for seed in range(plan.seeds)]
        figures += [
            report.Figure(f"held-out loss, {side}, seed {at}", round(x, 4), "nats/token") for at, x in enumerate(each)
        ]

    def gap(one: Run, other: Run) -> float:
        return 100 * (losses[one] - losses[other]) / losses[other]

    seeds = range(plan.seeds)
    theirs = mean(gap(run(FACTOR, seed), run(ONE, seed)) for seed in seeds)
    mine = mean(gap(run(OURS, seed), run(ONE, seed)) for seed in seeds)
    figures.append(report.Figure("loss above one machine, factor mean", round(theirs, 2), "%"))
    figures.append(report.at_most("loss above one machine, ours", mine, "%", 1.0, digits=2, peer=round(theirs, 2)))
    for side in (ONE, FACTOR, OURS):
        cost = mean(gap(run(side, seed, dies=plan.dies), run(side, seed)) for seed in seeds)
        name = f"loss added where {plan.dies:.0%} of contributions die, {side}"
        figures.append(report.at_most(name, cost, "%", 1.0, digits=2) if side == OURS else _plain(name, cost))
    gone = mean(gap(run(OURS, seed, dies=plan.dies), run(ONE, seed, dies=plan.dies)) for seed in seeds)
    figures.append(_plain("loss above one machine that takes as few tokens, ours where they die", gone))
    figures.append(report.at_most("of that, what churn adds beside fewer tokens", gone - mine, "%", 1.0, digits=2))
    figures.append(_plain(f"loss added where {plan.dies:.0%} come a round late, ours", gap(late[0], run(OURS))))
    for each in longer:
        name = f"loss above one machine, {each.side}, {each.per_round} steps a round, seed 0"
        figures.append(_plain(name, gap(each, run(ONE))))
    figures += [_plain(f"loss against ours: {each.side}, seed 0", gap(each, run(OURS))) for each in others]
    figures += _bytes(runs, [run(OURS), *(each for each in longer if each.side == OURS)])
    if plan.domains:
        _domains(runs, figures, _tuned(runs, more, domains=True) if plan.seeds > 1 else rates)


def _domains(runs: Trained, figures: list[report.Figure], rates: Mapping[str, float]) -> None:
    """One domain a worker, held-out rows of all."""
    first = runs.plan.per_round[0]
    ours = (OURS, "ours, clip", "ours, factor-mean")
    wanted = [Run(side, 0, rates[TUNED_LIKE[side]], first, domains=True) for side in (ONE, FACTOR, *ours)]
    runs.train(wanted)
    losses = runs.score("domains-result", wanted)
    one = wanted[0]
    for each in wanted:
        figures.append(
            report.Figure(f"held-out loss, a domain a worker, {each.side}", round(losses[each], 4), "nats/token")
        )
        if each is not one:
            name = f"loss above one machine, a domain a worker, {each.side}"
            figures.append(_plain(name, 100 * (losses[each] - losses[one]) / losses[one]))


def _tuned(runs: Trained, more: dict[str, Any], *, domains: bool) -> dict[str, float]:
    """Each side's best rate on the first seed."""
    plan, sides = runs.plan, (ONE, FACTOR, OURS)
    grid = [Run(side, 0, rate, plan.per_round[0], domains=domains) for side in sides for rate in plan.grid]
    runs.train(grid)
    losses = runs.score("domains-tuning" if domains else "tuning", grid)
    of_side = {side: {run.rate: losses[run] for run in grid if run.side == side} for side in sides}
    more["tuning, domains" if domains else "tuning"] = {
        side: {f"{rate:g}": round(loss, 4) for rate, loss in found.items()} for side, found in of_side.items()
    }
    return {side: min(found, key=found.__getitem__) for side, found in of_side.items()}


def _bytes(runs: Trained, wanted: Sequence[Run]) -> list[report.Figure]:
    """Against sending every step's gradient in bf16, at each length of a round."""
    figures = []
    for run in wanted:
        found = runs.result(run.name)
        times = 2 * found["numbers"] * run.per_round / found["bytes_up"]
        name = f"bytes up, bf16 sync of every step as a multiple of ours, {run.per_round} steps a round"
        figures.append(
            report.must(name, round(times, 1), "x", ">= 100 at 40 steps", times >= 100 or run.per_round < 40)
        )
    figures.append(report.Figure("bytes down, a round, as a share of the fp32 adapter",
                                 round(100 * found["bytes_down"] / (4 * found["numbers"]), 1), "%"))  # fmt: skip
    return figures


def _plain(name: str, value: float) -> report.Figure:
    return report.Figure(name, round(value, 2), "%")


if __name__ == "__main__":
    raise SystemExit(main())
