"""Resolving a recipe on the owner's machine: everything pinned, and what the owner should know before paying."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainchain.core import money
from trainchain.core.errors import TrainChainError

if TYPE_CHECKING:
    from trainchain.core.models import FileRef, ResolvedRecipe, Training
    from trainchain.core.recipe import Recipe
    from trainchain.core.train.resolve import Inspection

MODEL_FILES = (".safetensors", ".json", ".model", ".txt", ".jinja")


@dataclass(frozen=True)
class Plan:
    """A resolved recipe, where its bytes lie on this machine, and what the owner should know before paying."""

    resolved: ResolvedRecipe
    model_dir: Path
    files: dict[str, Path]
    initial: bytes
    truncated: int
    skipped: int
    truncated_at: list[str]
    """The first of these rows, by file and line."""
    skipped_at: list[str]

    @property
    def price(self) -> int:
        from trainchain.core.rewards import job_price

        return job_price(self.resolved)

    def describe(self) -> str:
        """All that an owner should know before paying."""
        recipe = self.resolved
        size = sum(ref.size for ref in recipe.files())
        return (
            f"{self.describe_work()}\n"
            f"files    {len(recipe.files())} files, {size / 1e6:.1f} MB, each named by its sha256\n"
            f"price    at most {money.show(self.price)} of a budget of {money.show(recipe.pay.budget)} TRAIN; "
            "what is not earned comes back"
        )

    def describe_work(self) -> str:
        """What is trained, and what of the data is not."""
        recipe = self.resolved
        tokens = sum(counts.tokens for row in recipe.counts for counts in row)
        lines = [
            f"recipe   {recipe.name}: {recipe.rounds} rounds x {recipe.shards} shards x {recipe.steps} steps "
            f"= {tokens:,} tokens"
        ]
        for count, where, what in (
            (self.truncated, self.truncated_at, f"are cut at {recipe.training.sequence_len} tokens"),
            (self.skipped, self.skipped_at, "hold nothing to train on and are left out"),
        ):
            if count:
                lines.append(f"rows     {count:,} {what}: {', '.join(where)}{', ..' if count > len(where) else ''}")
        return "\n".join(lines)


def resolve(path: Path, cache: Path | None = None) -> Plan:
    """Pin everything of a recipe, on this machine. Raises its one clear error for whatever is wrong with it.

    `cache` keeps the tokenised data for a training child of this machine.
    """
    from trainchain.core.digests import sha256
    from trainchain.core.models import Access, Base, DataSet, FileRef, HeldOut, Lora, Merge, Pay, ResolvedRecipe
    from trainchain.core.recipe import load_recipe

    recipe = load_recipe(path)
    model_dir = _folder(recipe.base_model)
    sources = [(_file(entry.path, "datasets"), entry.type) for entry in recipe.datasets]
    tests = [(_file(entry.path, "test_datasets"), entry.type) for entry in recipe.test_datasets]

    _hush()
    from trainchain.core.train.resolve import inspect

    found = inspect(
        model_dir,
        sources,
        tests[0] if tests else None,
        held_out_rows=recipe.test_datasets[0].rows if tests else 0,
        sequence_len=recipe.sequence_len,
        batch_size=recipe.micro_batch_size * recipe.gradient_accumulation_steps,
        seed=recipe.seed,
        rounds=recipe.rounds,
        shards=recipe.shards,
        steps=recipe.steps,
        targets=recipe.lora_target_modules,
        r=recipe.lora_r,
        attention=recipe.attention,
        cache=cache,
    )
    files: dict[str, Path] = {}

    def name(source: Path, label: str | None = None) -> FileRef:
        from trainchain.core.digests import sha256_file

        ref = FileRef(name=label or source.name, sha256=sha256_file(source), size=source.stat().st_size)
        files[ref.sha256] = source
        return ref

    base = [name(file) for file in sorted(model_dir.iterdir()) if _is_model_file(file)]
    datasets = [
        DataSet(source=None, file=name(source, f"train-{index}.jsonl"), format=facts.format, rows=facts.rows)
        for index, ((source, _), facts) in enumerate(zip(sources, found.datasets, strict=True))
    ]
    held_out = None
    if found.held_out is not None:
        facts = found.held_out
        dataset = DataSet(
            source=None, file=name(tests[0][0], "held-out.jsonl"), format=facts.file.format, rows=facts.file.rows
        )
        held_out = HeldOut(
            dataset=dataset, rows=facts.rows, tokens=facts.counts.tokens, supervised=facts.counts.supervised
        )
    initial = FileRef(name="initial.safetensors", sha256=sha256(found.initial), size=len(found.initial))
    resolved = ResolvedRecipe(
        trainchain=1,
        name=recipe.name,
        base_model=Base(source=None, license=None, files=base),
        datasets=datasets,
        held_out=held_out,
        access=Access(workers=recipe.access.workers, keys=recipe.access.holder),
        sealed=None,
        hub_model_id=recipe.hub_model_id,
        lora=Lora(r=recipe.lora_r, alpha=recipe.lora_alpha, targets=sorted(found.targets), initial=initial),
        training=_training(recipe, found),
        rounds=recipe.rounds,
        shards=recipe.shards,
        steps=recipe.steps,
        round_deadline=recipe.round_deadline,
        quorum=recipe.quorum,
        merge=Merge(method=recipe.merge.method, encoding=recipe.merge.encoding),
        pay=Pay(**recipe.pay.model_dump()),
        samples=recipe.samples,
        sample_tokens=recipe.sample_tokens,
        counts=found.counts,
    )
    plan = Plan(
        resolved, model_dir, files, found.initial, found.truncated, found.skipped, found.truncated_at, found.skipped_at
    )
    if plan.price > resolved.pay.budget:
        raise TrainChainError(
            "money.budget_too_small",
            f"The work costs up to {money.show(plan.price)} TRAIN, and `pay.budget` is "
            f"{money.show(resolved.pay.budget)}.",
            hint=f'Set `budget: "{money.show(plan.price)}"` or more, lower the price, or train less.',
        )
    return plan


def _hush() -> None:
    """The libraries' bars and warnings are no answer to what the owner asked."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _training(recipe: Recipe, found: Inspection) -> Training:
    from trainchain.core.models import Training

    chosen = found.dtype if recipe.bf16 == "auto" else ("bf16" if recipe.bf16 else "fp32")
    return Training(
        sequence_len=recipe.sequence_len,
        batch_size=recipe.micro_batch_size * recipe.gradient_accumulation_steps,
        micro_batch_size=recipe.micro_batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler=recipe.lr_scheduler,
        warmup_steps=recipe.warmup_steps,
        shard_warmup_steps=recipe.shard_warmup_steps,
        max_grad_norm=recipe.max_grad_norm,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        adam_epsilon=recipe.adam_epsilon,
        precision="fp16" if recipe.fp16 else chosen,
        quantization="nf4" if recipe.adapter == "qlora" else "none",
        attention=found.attention,
        adapter_path=recipe.adapter_path,
        segment_steps=recipe.segment_steps or -(-recipe.steps // 8),
        seed=recipe.seed,
    )


def _folder(text: str) -> Path:
    path = _local(text, "base_model")
    if not path.is_dir():
        raise TrainChainError("source.missing", f"`base_model`: {path} is not a folder.", hint="Check the path.")
    return path


def _file(text: str, key: str) -> Path:
    path = _local(text, key)
    if not path.is_file():
        raise TrainChainError("source.missing", f"`{key}`: there is no file {path}.", hint="Check the path.")
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        raise TrainChainError(
            "source.unsupported", f"`{key}`: {path.name} is not a .jsonl file.", hint="Convert it to JSON Lines."
        )
    return path


def _local(text: str, key: str) -> Path:
    if "://" in text or text.startswith("azureml:"):
        raise TrainChainError(
            "source.unsupported",
            f"`{key}`: this version reads folders and files, not {text}.",
            hint="Download it first, and write its path.",
        )
    return Path(text)


def _is_model_file(file: Path) -> bool:
    """What a base is made of: weights, configuration, tokenizer. Never code, never pickles."""
    return file.is_file() and file.suffix in MODEL_FILES and not file.name.startswith(".")
