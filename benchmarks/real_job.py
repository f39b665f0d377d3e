"""A real job from end to end, beside a plain single-process LoRA on the same tokens.

TrainChain's side is `trainchain run` as a process: hub, chain, two workers, merge, settle, claim, pull. The
peer is transformers, PEFT and Accelerate, and no line of TrainChain's training: it only asks the data order
which rows come when, and starts from the job's own start adapter, so that the two differ in nothing but how
they train. Both results are measured by PEFT alone, on the folders as they lie on disk.

Prints one JSON document on stdout. Exits 0 whatever it finds, 1 where a side did not run to its end.
"""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import report

log = logging.getLogger("real_job")

WORKERS = 2
THREADS = 2
"""Of the peer; each worker takes its share of the machine's cores."""
SEQUENCE_LEN, MICRO_BATCH, ACCUMULATION = 256, 4, 2
BATCH = MICRO_BATCH * ACCUMULATION
R, ALPHA, TARGETS = 8, 16, ["q_proj", "k_proj", "v_proj", "o_proj"]
"""As in the model card of the shared base, whose curve is for these."""
LEARNING_RATE, WARMUP_STEPS, CLIP = 8e-3, 3, 1.0
"""Of the card's two rates, 4e-3 and 8e-3, the one that ends about 2 % lower on both sides."""
BETAS, EPSILON = (0.9, 0.999), 1e-8
IGNORED = -100
PACKAGES = ("trainchain", "torch", "transformers", "peft", "accelerate", "numpy")

Document = tuple[list[int], list[int]]
"""Token ids, and the labels: the ids where the assistant speaks, `IGNORED` elsewhere."""


class SideFailedError(Exception):
    """One side did not come to its end. `side` says which."""

    def __init__(self, side: str, message: str) -> None:
        super().__init__(message)
        self.side = side


@dataclass(frozen=True)
class Plan:
    """What is run: the files, the size, and how long each side may take."""

    model: Path
    train: Path
    held_out: Path
    seed: int
    learning_rate: float
    sequential: bool
    rounds: int = 10
    shards: int = 4
    steps: int = 20
    held_out_rows: int = 200
    limit_seconds: float = 2400.0

    def recipe(self) -> dict[str, Any]:
        return {
            "name": "real-job",
            "base_model": str(self.model),
            "datasets": [{"path": str(self.train), "type": "chat_template"}],
            "test_datasets": [{"path": str(self.held_out), "type": "chat_template", "rows": self.held_out_rows}],
            "lora_r": R,
            "lora_alpha": ALPHA,
            "lora_target_modules": TARGETS,
            "sequence_len": SEQUENCE_LEN,
            "micro_batch_size": MICRO_BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "learning_rate": self.learning_rate,
            "shard_warmup_steps": WARMUP_STEPS,
            "max_grad_norm": CLIP,
            "adam_beta1": BETAS[0],
            "adam_beta2": BETAS[1],
            "adam_epsilon": EPSILON,
            "bf16": False,
            "seed": self.seed,
            "rounds": self.rounds,
            "shards": self.shards,
            "steps": self.steps,
            "round_deadline": "20m",
            "pay": {"per_million_tokens": "2.50", "budget": "10"},
        }

    def settings(self) -> dict[str, Any]:
        from trainchain.core.digests import sha256_file

        recipe = self.recipe()
        files = {"base_model": self.model / "model.safetensors", "train": self.train, "held_out": self.held_out}
        return {
            "recipe": {key: recipe[key] for key in recipe if key not in ("base_model", "datasets", "test_datasets")},
            "base_model": self.model.name,
            "train": f"{self.train.parent.name}/{self.train.name}",
            "held_out": f"{self.held_out.parent.name}/{self.held_out.name}, first {self.held_out_rows} rows, "
            f"each alone, cut at {SEQUENCE_LEN}",
            "sha256": {name: sha256_file(path) for name, path in files.items() if path.is_file()},
            "workers": WORKERS,
            "peer": {
                "what": "one process: transformers + PEFT + Accelerate, AdamW that keeps its moments, "
                "the same start adapter, rate after warm-up, clip and tokens; packed rows by position_ids, sdpa",
                "steps": self.peer_steps,
                "sequences_per_step": BATCH if self.sequential else BATCH * self.shards,
                "threads": THREADS,
            },
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        }

    @property
    def peer_steps(self) -> int:
        return self.rounds * self.steps * (self.shards if self.sequential else 1)


@dataclass(frozen=True)
class PeerResult:
    """`tokens` went through the model in `seconds`; `wall` counts imports, tokenizing and loading too."""

    folder: Path
    tokens: int
    seconds: float
    wall: float


@dataclass(frozen=True)
class Losses:
    """Mean negative log-likelihood per assistant token, all measured the same way."""

    before: float
    job: float
    peer: float


def main() -> int:
    plan = _arguments()
    os.environ |= {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run under way ends with us
    load = report.machine()["load_average"]
    figures: list[report.Figure] = []
    more: dict[str, Any] = {"load_average_before": load}
    code = 0
    with tempfile.TemporaryDirectory(prefix="trainchain-bench-", ignore_cleanup_errors=True) as folder:
        try:
            found = run_job(plan, Path(folder))
            more["rounds"] = found["rounds"]
            figures += compare(plan, found, Path(folder))
        except SideFailedError as error:
            log.error("%s: %s", error.side, error)
            figures.append(report.failure(error.side, str(error)))
            code = 1
    report.write(report.document("real_job", PACKAGES, plan.settings(), figures, **more))
    return code


def _arguments() -> Plan:
    parser = argparse.ArgumentParser(description="A real job beside a plain single-process LoRA on the same tokens.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the base model's folder")
    parser.add_argument("--train", type=Path, required=True, metavar="FILE", help="jsonl of chat messages")
    parser.add_argument("--eval", type=Path, required=True, metavar="FILE", help="jsonl of chat messages")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 4 shards of 5 steps, 40 held-out rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="of both sides (%(default)s)")
    parser.add_argument(
        "--sequential", action="store_true", help="the peer takes a step for every step of every shard, at one batch"
    )
    given = parser.parse_args()
    model, train, held_out = (path.resolve() for path in (given.model, given.train, given.eval))
    plan = Plan(model, train, held_out, given.seed, given.learning_rate, given.sequential)
    return replace(plan, rounds=2, steps=5, held_out_rows=40, limit_seconds=240.0) if given.quick else plan


def run_job(plan: Plan, folder: Path) -> dict[str, Any]:
    """The document of `trainchain run`; the pulled adapter lies in `folder/adapter`."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(plan.recipe(), indent=1), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "trainchain", "run", str(recipe), "--workers", str(WORKERS)]
    command += ["--keep", str(folder / "state"), "--output", str(folder / "adapter"), "--json"]
    log.info("trainchain run: %d rounds x %d shards x %d steps", plan.rounds, plan.shards, plan.steps)
    try:
        ended = subprocess.run(
            command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=plan.limit_seconds, encoding="utf-8"
        )
    except subprocess.TimeoutExpired:
        raise SideFailedError("trainchain run", f"It did not end within {plan.limit_seconds:.0f} s.") from None
    try:
        found: dict[str, Any] = json.loads(ended.stdout)
    except ValueError:
        raise SideFailedError("trainchain run", f"It ended with {ended.returncode} and no document.") from None
    if not found["ok"]:
        raise SideFailedError("trainchain run", f"{found['error']['code']}: {found['error']['message']}")
    return found


def compare(plan: Plan, found: dict[str, Any], folder: Path) -> list[report.Figure]:
    """Train the peer, measure both, and say all figures."""
    began = time.monotonic()
    import torch

    torch.set_num_threads(THREADS)
    peer = train_peer(plan, folder / "peer", began)
    held_out = tokenize(plan.model, plan.held_out, plan.held_out_rows)
    log.info("measuring %d held-out rows, three times", len(held_out))
    losses = Losses(
        before=measure(plan.model, held_out, None),
        job=measure(plan.model, held_out, folder / "adapter"),
        peer=measure(plan.model, held_out, peer.folder),
    )
    return [
        *loss_figures(losses, found),
        *time_figures(found, peer),
        *byte_figures(found),
        money_figure(plan, found),
    ]


def tokenize(model: Path, path: Path, limit: int | None = None) -> list[Document]:
    """The chat rows of a file as documents, cut; those on which nothing is supervised are left out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, model_max_length=sys.maxsize)
    documents: list[Document] = []
    with path.open(encoding="utf-8") as lines:
        for line in islice((line for line in lines if line.strip()), limit):
            made = tokenizer.apply_chat_template(
                json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
            )
            ids = list(made["input_ids"])[:SEQUENCE_LEN]
            marks = list(made["assistant_masks"])[:SEQUENCE_LEN]
            labels = [token if mark else IGNORED for token, mark in zip(ids, marks, strict=True)]
            labels[0] = IGNORED  # nothing of its own document predicts it
            if any(label != IGNORED for label in labels):
                documents.append((ids, labels))
    return documents


def peer_batches(plan: Plan, documents: Sequence[Document]) -> Iterator[list[list[int]]]:
    """Per step of the peer, its packed sequences: what the shards of a round train on side by side, at once."""
    from trainchain.core.sharding import DataOrder

    order = DataOrder([len(ids) for ids, _ in documents], sequence_len=SEQUENCE_LEN, seed=plan.seed)
    size = {"shards": plan.shards, "steps": plan.steps, "batch_size": BATCH}
    for round_ in range(1, plan.rounds + 1):
        shards = [order.shard(round_, shard, **size) for shard in range(plan.shards)]
        for side_by_side in zip(*shards, strict=True):
            if plan.sequential:
                yield from side_by_side
            else:
                yield [sequence for batch in side_by_side for sequence in batch]


def train_peer(plan: Plan, folder: Path, began: float) -> PeerResult:
    """Plain LoRA: AdamW at a constant rate after warm-up, the loss averaged over all targets of a step."""
    import torch
    from accelerate import Accelerator

    documents = tokenize(plan.model, plan.train)
    accelerator = Accelerator(mixed_precision="no")
    model = _with_lora(plan)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    log.info("the peer: %d steps", plan.peer_steps)
    tokens, first = 0, time.monotonic()
    for number, sequences in enumerate(peer_batches(plan, documents), 1):
        if time.monotonic() - first > plan.limit_seconds:
            raise SideFailedError("peer", f"Its step {number} was not reached in {plan.limit_seconds:.0f} s.")
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * min(1.0, number / WARMUP_STEPS)
        loss = _backward(accelerator, model, documents, sequences)
        accelerator.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(len(documents[row][0]) for sequence in sequences for row in sequence)
        if number % 10 == 0:
            log.info("the peer: step %d, loss %.4f, %.0f s", number, loss, time.monotonic() - first)
    seconds = time.monotonic() - first
    accelerator.unwrap_model(model).save_pretrained(folder)
    return PeerResult(folder, tokens, seconds, time.monotonic() - began)


def _with_lora(plan: Plan) -> Any:
    """The base with PEFT's LoRA on it, set to the job's own start (PEFT's distribution, the recipe's seed)."""
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    from trainchain.core.train.model import find_targets, initial_adapter

    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(_base(plan.model), config)
    start = initial_adapter(find_targets(plan.model, TARGETS), R, plan.seed)
    loaded = set_peft_model_state_dict(model, {name: torch.from_numpy(tensor) for name, tensor in start.items()})
    if loaded.unexpected_keys or any("lora_" in key for key in loaded.missing_keys):
        raise SideFailedError("peer", "The start adapter does not fit PEFT's model.")
    return model


def _backward(accelerator: Any, model: Any, documents: Sequence[Document], sequences: Sequence[list[int]]) -> float:
    """The gradient of one step, micro-batch by micro-batch; returns the step's mean loss."""
    targets = sum(label != IGNORED for sequence in sequences for row in sequence for label in documents[row][1])
    total = 0.0
    for at in range(0, len(sequences), MICRO_BATCH):
        batch = {
            name: tensor.to(accelerator.device)
            for name, tensor in packed(documents, sequences[at : at + MICRO_BATCH]).items()
        }
        loss = model(**batch, use_cache=False, num_items_in_batch=targets).loss
        accelerator.backward(loss)
        total += float(loss.detach())
    return total


def packed(documents: Sequence[Document], sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Rows of several documents; transformers keeps them apart where position_ids begin anew, as padding does."""
    import torch

    shape = (len(sequences), SEQUENCE_LEN)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    positions = torch.zeros(shape, dtype=torch.long)
    for place, sequence in enumerate(sequences):
        start = 0
        for row in sequence:
            end = start + len(documents[row][0])
            ids[place, start:end] = torch.tensor(documents[row][0])
            labels[place, start:end] = torch.tensor(documents[row][1])
            positions[place, start:end] = torch.arange(end - start)
            start = end
        positions[place, start:] = torch.arange(SEQUENCE_LEN - start)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def measure(model_dir: Path, documents: Sequence[Document], adapter: Path | None) -> float:
    """Mean negative log-likelihood per assistant token, each row by itself, by PEFT alone."""
    import torch
    from peft import PeftModel

    base = _base(model_dir)
    model = (PeftModel.from_pretrained(base, adapter) if adapter else base).eval()
    total, targets = 0.0, 0
    with torch.no_grad():
        for ids, labels in documents:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
            following = torch.tensor(labels[1:])
            total += float(torch.nn.functional.cross_entropy(logits, following, reduction="sum"))
            targets += int((following != IGNORED).sum())
    return total / targets


def _base(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def loss_figures(losses: Losses, found: dict[str, Any]) -> list[report.Figure]:
    gap = 100 * (losses.job - losses.peer) / losses.peer
    pairs = ((found["loss_before"], losses.before), (found["loss_after"], losses.job))
    off = max(float("inf") if told is None else abs(told - seen) for told, seen in pairs)
    told = (
        report.at_most("reported loss against measured", off, "nats/token", 1e-3, digits=7)
        if off < float("inf")
        else report.failure("reported loss", "The run's document has no held-out loss.")
    )
    return [
        report.Figure("held-out loss before", round(losses.before, 5), "nats/token"),
        report.Figure("held-out loss after, trainchain", round(losses.job, 5), "nats/token"),
        report.Figure("held-out loss after, single machine", round(losses.peer, 5), "nats/token"),
        report.at_most("loss gap to the single machine", gap, "%", 1.0, digits=3, peer="factor mean +1.7 to +4"),
        told,
    ]


def time_figures(found: dict[str, Any], peer: PeerResult) -> list[report.Figure]:
    """`seconds.training` of the run is what the workers' children trained, divided by the workers."""
    seconds, tokens = found["seconds"], found["tokens"]
    idle = seconds["total"] - seconds["training"]
    speed = tokens / (seconds["training"] * WORKERS)
    return [
        report.Figure("wall time, whole run", round(seconds["total"], 1), "s", peer=round(peer.wall, 1)),
        report.Figure("wall time, single machine", round(peer.wall, 1), "s"),
        report.Figure("not spent training", round(idle, 1), "s"),
        report.Figure("not spent training, share of the run", round(100 * idle / seconds["total"], 2), "%"),
        report.Figure("on chain", round(seconds["chain"], 2), "s"),
        report.Figure("merging", round(seconds["merging"], 2), "s"),
        report.Figure("merging, per round", round(seconds["merging"] / len(found["rounds"]), 3), "s"),
        report.must(
            "tokens trained", tokens, "tokens", "the same on both sides", tokens == peer.tokens, peer=peer.tokens
        ),
        report.Figure(
            "speed of a worker while it trains", round(speed, 1), "tokens/s", peer=round(peer.tokens / peer.seconds, 1)
        ),
        report.Figure("speed of the whole run", round(tokens / seconds["total"], 1), "tokens/s"),
    ]


def byte_figures(found: dict[str, Any]) -> list[report.Figure]:
    """Bodies of all requests and answers of the workers, heartbeats and leases among them; what audits want of them
    apart."""
    sent, encoded = found["bytes"], found["bytes"]["adapter"]
    accepted = sum(row["accepted"] for row in found["rounds"])
    fetchers = sum(worker["accepted"] > 0 for worker in found["workers"])
    up = (sent["up"] - sent["audits"]) / accepted
    down = (sent["down"] - fetchers * (sent["base_and_data"] - encoded)) / accepted
    return [
        report.Figure("contributions accepted", accepted, "shards"),
        report.Figure("encoded adapter", encoded, "bytes"),
        report.Figure("bytes up, per contribution", round(up), "bytes"),
        report.Figure("bytes up for audits, per contribution", round(sent["audits"] / accepted), "bytes"),
        report.Figure("bytes down, per contribution, without base and data", round(down), "bytes"),
        report.at_most("bytes up against the encoded adapter", up / encoded, "x", 1.05, peer="Flower 1.67"),
    ]


def money_figure(plan: Plan, found: dict[str, Any]) -> report.Figure:
    """Every unit of the budget is claimed, claimable or refundable, and what workers and auditors earned is what was
    claimed."""
    from trainchain.core import money

    escrow = {name: int(units) for name, units in found["escrow"].items()}
    total = escrow["claimed"] + escrow["claimable"] + escrow["refundable"]
    budget = money.parse(plan.recipe()["pay"]["budget"])
    claims = sum(int(worker["claimed"]) for worker in found["workers"])
    claims += sum(int(auditor["fees"]) for auditor in found["auditors"])
    holds = total == escrow["funded"] == budget and claims == escrow["claimed"]
    names = ("claimed", "claimable", "refundable")
    parts = " + ".join(f"{money.show(escrow[name])} {name}" for name in names)
    return report.must("the escrow's sum", parts, "TRAIN", f"== {money.show(budget)}", holds)


if __name__ == "__main__":
    raise SystemExit(main())
