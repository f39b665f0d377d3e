"""Training speed: TRL's SFTTrainer, a plain Accelerate + PEFT loop and TrainChain's engine on the same tokens.

Each side runs in a fresh process; the sides take turns within a round, and every ratio is taken within its
round, because what else a machine does changes from minute to minute. TRL's micro-batches and layouts are
first tried shortly; the fastest few and TRL's default then run in every round.

Prints one JSON document on stdout. Exits 0 whatever it finds, 1 where a side did not run to its end.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import report
from jobs import SHAPES, Job, Size, flops_per_token, longest, make_shape, prepare, real_tokens
from launch import OWN_PROCESS, SideFailedError, absent_peer, begin, log, run_side

from trainchain.core.errors import TrainChainError

PACKAGES = ("trainchain", "torch", "transformers", "peft", "accelerate", "trl", "datasets", "numpy")
LEARNING_RATE = 1e-3
KEPT = 2
"""TRL settings that run in every round, besides its default."""
OURS = {"trainchain, fused path": "fused", "trainchain, peft path": "peft"}
TARGETS = {("tiny", "fused"): 2.0, ("tiny", "peft"): 1.4, ("135m", "fused"): 1.25, ("1b", "fused"): 1.3}
TARGETS |= {("8b", "fused"): 1.15}
SHARE_TARGETS = {("8b", "fused"): 50.0}
"""Percent of the matrix product's peak."""
OVERHEAD_LIMIT = 0.1
OVERHEAD_STEPS = {"to the first step": 20, "no step": 1}
LOSS_LIMIT = 1.0
"""Percent of a shard that may go into anything but its steps."""


@dataclass(frozen=True)
class Variant:
    """`same_rows`: each of its steps trains on exactly the rows of everybody's."""

    name: str
    spec: dict[str, Any]
    same_rows: bool = True
    trl: bool = False


@dataclass(frozen=True)
class Plan:
    """What is run. A step trains on `batch` packed sequences."""

    model: Path
    data: Path
    shape: str
    threads: int
    micro: int
    attention: str
    quick: bool
    cuda: bool
    sequence_len: int
    rounds: int = 3
    batch: int = 8
    warm: int = 2
    measured: int = 8
    product: int = 2048
    limit_seconds: float = 600.0

    @property
    def steps(self) -> int:
        return self.warm + self.measured

    @property
    def training(self) -> dict[str, Any]:
        return {
            "micro_batch_size": self.micro,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "shard_warmup_steps": 0,
            "max_grad_norm": 1.0,
            "weight_decay": 0.0,
            "precision": "bf16" if self.cuda else "fp32",
            "attention": self.attention,
            "segment_steps": 5,
            "seed": 0,
        }

    def settings(self) -> dict[str, Any]:
        return {
            "shape": self.shape if self.shape in SHAPES else self.model.name,
            "vocabulary": "the shape's own (SHAPES in benchmarks/jobs.py), random weights, the tokenizer of --model"
            if self.shape in SHAPES
            else "the model's",
            "data": f"{self.data.parent.name}/{self.data.name}",
            "sequences_per_step": self.batch,
            "sequence_len": self.sequence_len,
            "steps": {"warm_up": self.warm, "measured": self.measured},
            "rounds": self.rounds,
            "threads": self.threads,
            "device": "cuda" if self.cuda else "cpu",
            "environment of every side": OWN_PROCESS,
            "training": self.training,
            "trl": "rows come packed, tokenized and labelled, with dataset preparation off; optimizer as its default, "
            "fused AdamW. Best of: checkpointing and logging off; its `packed` layout is its bfd packing's collator; "
            "`padded`, `flat` and `grouped` take single documents, as many a step as there are on average. "
            "`wrapped` packing is left out: it lets documents see each other. The default's own precision, bf16 "
            "autocast, is left out on a CPU",
            "targets": "judged on a quiet machine; a --quick run has none",
        }


def main() -> int:
    begin("train")
    plan, only_overhead = _arguments()
    load = report.machine()["load_average"]
    figures: list[report.Figure] = []
    more: dict[str, Any] = {"load_average_before": load}
    with tempfile.TemporaryDirectory(prefix="trainchain-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if plan.shape in SHAPES:
            log.info("making a random %s", plan.shape)
            plan = replace(plan, model=make_shape(plan.shape, plan.model, folder / "base", bf16=plan.cuda))
        try:
            if not only_overhead:
                figures += compare(plan, folder, more)
            figures += overhead(plan, folder)
        except TrainChainError as error:
            log.error("%s: %s", error.code, error.message)
            figures.append(report.failure("the job", f"{error.code}: {error.message}"))
    report.write(report.document("train", PACKAGES, plan.settings(), figures, **more))
    return int(any(figure.name.startswith("error") for figure in figures))


def _arguments() -> tuple[Plan, bool]:
    parser = argparse.ArgumentParser(description="Training speed: TRL, a plain loop and TrainChain on the same tokens.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the base model's folder")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="jsonl of training rows")
    parser.add_argument("--quick", action="store_true", help="one round of few small steps, few TRL settings")
    parser.add_argument(
        "--shape",
        choices=["tiny", *SHAPES],
        default="tiny",
        help="tiny: the model as it is; else random weights of that shape with the model's tokenizer",
    )
    parser.add_argument("--overhead", action="store_true", help="measure only what a shard costs beside its steps")
    parser.add_argument("--threads", type=int, default=2, help="of every side (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--micro", type=int, default=4, help="sequences TrainChain takes at once (%(default)s)")
    parser.add_argument("--attention", choices=("sdpa", "varlen"), default="sdpa", help="of TrainChain (%(default)s)")
    given = parser.parse_args()
    import torch

    cuda, model = torch.cuda.is_available(), given.model.resolve()
    length = 1024 if given.shape in ("1b", "8b") else 512
    length = length if given.shape in SHAPES else longest(model, length)
    options = (given.threads, given.micro, given.attention, given.quick, cuda, length, given.rounds)
    plan = Plan(model, given.data.resolve(), given.shape, *options)
    if given.shape == "135m":
        plan = replace(plan, batch=2, micro=min(plan.micro, 2), warm=1, measured=3)
    if cuda:
        plan = replace(plan, product=8192)
    if given.quick:
        plan = replace(plan, rounds=1, batch=2, warm=1, measured=2, product=min(plan.product, 512), limit_seconds=120.0)
    return plan, given.overhead


def trl_settings(plan: Plan, documents: float) -> list[Variant]:
    """Its default, and what it offers for each size of micro-batch; `documents` of a step on average."""
    names = {"packed": "packed rows", "flat": "documents, flattened", "padded": "documents, padded"}
    names["grouped"] = "documents, padded, grouped by length"
    layouts = {"packed": (1, 2, 4, 8), "flat": (2, 4, 8), "padded": (1, 2, 4, 8), "grouped": (4, 8)}
    if plan.quick:
        layouts = {"packed": (1,), "padded": (1,)}
    common = {"side": "trl", "schedule": "constant", "warmup_steps": 0, "learning_rate": LEARNING_RATE}
    stock = common | {"layout": "padded", "micro": min(8, max(1, int(documents))), "stock": True}
    # PyTorch's own default spins, which on a quiet machine is the faster way for threads that share each product.
    waits = {False: "", True: ", spinning"} if plan.threads > 1 and not plan.cuda else {False: ""}
    return [Variant("TRL default", stock | {"spins": plan.threads > 1}, same_rows=False, trl=True)] + [
        Variant(
            f"TRL {names[layout]}, micro {micro}{wait}",
            common | {"layout": layout, "micro": micro, "stock": False, "spins": spins},
            same_rows=layout == "packed",
            trl=True,
        )
        for spins, wait in waits.items()
        for layout, sizes in layouts.items()
        for micro in sizes
        if micro <= (plan.batch if layout == "packed" else documents)
    ]


def fastest(settings: Sequence[Variant], tried: Mapping[str, float]) -> list[Variant]:
    """The first few of those tried, and the first of those on everybody's rows."""
    ordered = sorted((one for one in settings if one.name in tried), key=lambda one: -tried[one.name])
    same_rows = next((one for one in ordered if one.same_rows), None)
    kept = ordered[:KEPT]
    return kept if same_rows is None or same_rows in kept else [*kept, same_rows]


def others(plan: Plan) -> list[Variant]:
    spins = plan.threads > 1 and not plan.cuda
    loops = [
        Variant(
            f"plain loop, micro {micro}" + (", spinning" if spins else ""),
            {"side": "plain", "micro": micro, "learning_rate": LEARNING_RATE, "spins": spins},
        )
        for micro in (1, 2)
    ]
    return loops + [
        Variant(name, {"side": "ours", "training": {"adapter_path": path}, "path": path}) for name, path in OURS.items()
    ]


def compare(plan: Plan, folder: Path, more: dict[str, Any]) -> list[report.Figure]:
    """All rounds, and what they say; the measurements themselves go into `more`."""
    job = prepare(folder / "job", plan.model, plan.data, Size(plan.steps, plan.batch, plan.sequence_len), plan.training)
    steps = job.steps()[: plan.steps]
    cost = flops_per_token(plan.model, steps)
    more["arithmetic"] = cost
    more["tokens_per_step"] = [real_tokens(step) for step in steps]
    run = Runs(plan, job, folder)
    variants = others(plan)
    reason = absent_peer()
    if reason is None:
        documents = sum(len(sequence) for step in steps for sequence in step) / len(steps)
        default, *settings = trl_settings(plan, documents)
        more["trl_tried"] = run.try_out(settings)
        variants = [default, *fastest(settings, more["trl_tried"]), *variants]
    rounds = [run.round(variants, number) for number in range(plan.rounds)]
    more["rounds"] = rounds
    figures = [report.must("TRL", reason, "", "it is measured", False)] if reason else []
    figures += ratio_figures(plan, variants, rounds)
    figures += speed_figures(plan, variants, rounds, cost["flops_per_token"])
    figures += run.losses(variants)
    return figures + [report.failure(name, message) for name, message in run.failed.items()]


class Runs:
    """Starts the sides of one job and remembers who failed, and where the adapters lie."""

    def __init__(self, plan: Plan, job: Job, folder: Path) -> None:
        self._plan, self._job, self._folder = plan, job, folder
        self._adapters: dict[str, str] = {}
        self._started = 0
        self.failed: dict[str, str] = {}

    def side(self, name: str, spec: dict[str, Any]) -> dict[str, Any] | None:
        self._started += 1
        common = {"job": str(self._job.folder), "threads": self._plan.threads}
        try:
            return run_side(common | spec, self._folder, f"side-{self._started}", self._plan.limit_seconds)
        except SideFailedError as error:
            log.error("%s: %s", name, error)
            self.failed[name] = str(error)
            return None

    def try_out(self, settings: Sequence[Variant]) -> dict[str, float]:
        """Tokens a second of each setting in one short run."""
        measured = 1 if self._plan.shape in SHAPES or self._plan.quick else 2
        found: dict[str, float] = {}
        for one in settings:
            result = self.side(one.name, one.spec | {"warm": 1, "steps": 1 + measured})
            if result:
                found[one.name] = round(result["tokens_per_second"], 1)
                log.info("tried %s: %.0f tokens/s", one.name, found[one.name])
        return found

    def round(self, variants: Sequence[Variant], number: int) -> dict[str, Any]:
        """Every variant once, beginning with another one each round; the product's peak before, between, after."""
        turn = number * 2 % len(variants)
        order = [*variants[turn:], *variants[:turn]]
        peaks = [self._peak()]
        results: dict[str, dict[str, Any]] = {}
        for place, one in enumerate(order, 1):
            result = self.side(one.name, one.spec | {"warm": self._plan.warm, "steps": self._plan.steps})
            if result:
                self._adapters[one.name] = result.pop("adapter")
                results[one.name] = result | {"tokens_per_second": round(result["tokens_per_second"], 1)}
                log.info("round %d, %s: %.0f tokens/s", number + 1, one.name, result["tokens_per_second"])
            if place in (len(order) // 2, len(order)):
                peaks.append(self._peak())
        return {"product_gflops": [round(peak / 1e9, 1) for peak in peaks], "sides": results}

    def losses(self, variants: Sequence[Variant]) -> list[report.Figure]:
        """Where every variant's training ended, measured alike on a step's rows that none has trained on."""
        start = {"before": str(self._job.start)}
        found = self.side("scoring", {"side": "score", "adapters": start | self._adapters})
        if found is None:
            return []
        losses = found["losses"]
        alike = [losses[one.name] for one in variants if one.same_rows and one.name in losses]
        figures = [report.Figure(f"loss, {name}", round(loss, 5), "nats/token") for name, loss in losses.items()]
        if alike:
            apart = (max(alike) - min(alike)) / min(alike)
            limit = 1e-2 if self._plan.cuda else 1e-4
            figures.append(report.at_most("loss, apart where the rows of a step are the same", apart, "x", limit))
        return figures

    def _peak(self) -> float:
        found = self.side("matrix product", {"side": "gemm", "size": self._plan.product})
        return float(found["flops_per_second"]) if found else 0.0


def speed(round_: dict[str, Any], name: str, unit: str = "second") -> float:
    return float(round_["sides"].get(name, {}).get(f"tokens_per_{unit}", 0.0))


def ratio(round_: dict[str, Any], name: str, group: Sequence[str], unit: str = "second") -> tuple[float, str] | None:
    """One side against the fastest of a group, which is named; None where either is missing."""
    theirs, best = max(((speed(round_, other, unit), other) for other in group), default=(0.0, ""))
    mine = speed(round_, name, unit)
    return (mine / theirs, best) if mine and theirs else None


def ratio_figures(plan: Plan, variants: Sequence[Variant], rounds: Sequence[dict[str, Any]]) -> list[report.Figure]:
    """Ours against the best of TRL, and of the plain loop, within each round."""
    figures: list[report.Figure] = []
    peers = {"TRL's best": [one.name for one in variants if one.trl]}
    peers["TRL's best on packed rows"] = [one.name for one in variants if one.trl and one.same_rows]
    peers["the plain loop's best"] = [one.name for one in variants if one.spec["side"] == "plain"]
    for name, path in OURS.items():
        for peer, group in peers.items():
            found = [each for one in rounds if (each := ratio(one, name, group))]
            if not found:
                continue
            ratios = [value for value, _ in found]
            figure = f"{name}, against {peer}"
            bests = ", ".join(dict.fromkeys(best for _, best in found))
            target = TARGETS.get((plan.shape, path)) if peer == "TRL's best" and not plan.quick else None
            value = median(ratios)
            if target is None:
                figures.append(report.Figure(figure, round(value, 3), "x", peer=bests))
            else:
                figures.append(report.must(figure, round(value, 3), "x", f">= {target}", value >= target, peer=bests))
            figures.append(report.Figure(f"{figure}, by round", " ".join(f"{one:.3f}" for one in ratios), "x"))
            work = [each[0] for one in rounds if (each := ratio(one, name, group, "processor_second"))]
            if work and not plan.cuda:
                figures.append(report.Figure(f"{figure}, in processor time", round(median(work), 3), "x"))
    return figures


def speed_figures(
    plan: Plan, variants: Sequence[Variant], rounds: Sequence[dict[str, Any]], flops: float
) -> list[report.Figure]:
    """Medians over the rounds; the share of the peak is of that round's fastest product."""
    figures: list[report.Figure] = []
    peaks = [max(one["product_gflops"]) for one in rounds]
    figures.append(report.Figure("matrix product, fastest of each round", round(median(peaks), 1), "GFLOP/s"))
    for one in variants:
        seen = [
            (speed(each, one.name), peak) for each, peak in zip(rounds, peaks, strict=True) if speed(each, one.name)
        ]
        if seen:
            figures.append(report.Figure(one.name, round(median(rate for rate, _ in seen), 1), "tokens/s"))
            share = median(100 * rate * flops / (1e9 * peak) if peak else 0.0 for rate, peak in seen)
            figure, limit = f"{one.name}, share of the peak", SHARE_TARGETS.get((plan.shape, one.spec.get("path", "")))
            if limit is None or plan.quick:
                figures.append(report.Figure(figure, round(share, 2), "%"))
            else:
                figures.append(report.must(figure, round(share, 2), "%", f">= {limit:g}", share >= limit))
            begun = median(
                each["sides"][one.name]["seconds_to_first_step_done"] for each in rounds if speed(each, one.name)
            )
            figures.append(report.Figure(f"{one.name}, start-up to the first step done", round(begun, 2), "s"))
    return figures


def overhead(plan: Plan, folder: Path) -> list[report.Figure]:
    """What a shard costs a resident engine beside its steps; the fastest path there is."""
    figures: list[report.Figure] = []
    for what, steps in OVERHEAD_STEPS.items():
        steps = min(steps, 2) if plan.quick else steps
        size = Size(steps, plan.batch, plan.sequence_len, shards=4 if steps > 1 else 8)
        job = prepare(folder / f"overhead-{steps}", plan.model, plan.data, size, plan.training)
        spec = {"side": "overhead", "job": str(job.folder), "threads": plan.threads, "training": {}}
        try:
            found = run_side(spec, folder, f"overhead-{steps}", plan.limit_seconds)
        except SideFailedError as error:
            log.error("overhead: %s", error)
            figures.append(report.failure("overhead", str(error)))
            continue
        first, outside = (median(found[key]) for key in ("seconds_to_first_step", "seconds_outside_steps"))
        if what == "no step":
            name = f"whole overhead of a resident shard of {steps} step"
            figures.append(report.at_most(name, outside, "s", OVERHEAD_LIMIT))
        else:
            name = f"resident shard of {steps} steps, to its first step beginning"
            figures.append(report.at_most(name, first, "s", OVERHEAD_LIMIT))
            share = median(found["share_outside"])
            name = f"resident shard of {steps} steps, all but its steps, states hashed and written"
            figures.append(report.at_most(name, share, "%", LOSS_LIMIT))
    return figures


if __name__ == "__main__":
    raise SystemExit(main())
