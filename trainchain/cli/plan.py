"""Resolving a recipe on the owner's machine: everything pinned, and what the owner should know before paying."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trainchain.cli.bring import Bringer, Data
from trainchain.core import money
from trainchain.core.errors import TrainChainError

if TYPE_CHECKING:
    from trainchain.cli.output import Output
    from trainchain.core.models import Base, DataFormat, ResolvedRecipe, Training
    from trainchain.core.recipe import Recipe
    from trainchain.core.settings import Settings
    from trainchain.core.train.resolve import Inspection
    from trainchain.core.worker.cache import Cache


@dataclass(frozen=True)
class Plan:
    """A resolved recipe, where its bytes lie on this machine, and what the owner should know before paying."""

    resolved: ResolvedRecipe
    """As it is published, or, until it is sealed, as it would be openly."""
    keys: Literal["owner", "hub"] | None
    """Who is to keep the keys of the job, which is then sealed before it is published; None for an open job."""
    model_dir: Path
    """Where the weights are on a model hub, they may be missing here; see `Bringer.model`."""
    files: dict[str, Path]
    """By digest, the base's and the data's files on this machine."""
    initial: bytes
    truncated: int
    skipped: int
    truncated_at: list[str]
    """The first of these rows, by file and line."""
    skipped_at: list[str]
    open_hash: str
    """The recipe's spec hash as it would be openly: what an interrupted sealing is found again by."""
    tokens: Path | None
    """Where the tokenised data lies, if it is kept."""
    bringer: Bringer
    """Kept, since the folder of a distant model goes with it."""
    identities: dict[str, str] = field(default_factory=dict, repr=False)
    """The keys of what was sealed, by the digest of the ciphertext."""

    @property
    def price(self) -> int:
        from trainchain.core.rewards import job_price

        return job_price(self.resolved)

    @property
    def audits(self) -> int:
        """What of the price is for audits."""
        from trainchain.core.rewards import audit_price

        return sum(audit_price(self.resolved, number) for number in range(1, self.resolved.rounds + 1))

    def describe(self) -> str:
        """All that an owner should know before paying."""
        recipe = self.resolved
        size = sum(ref.size for ref in recipe.files())
        kept = {"owner": "a hub of yours", "hub": "the hub"}
        return (
            f"{self.describe_work()}\n"
            + (
                f"private  {_admitted(recipe)}; rows go out sealed, keys are kept by {kept[self.keys]}\n"
                if self.keys
                else ""
            )
            + f"files    {len(recipe.files())} files, {size / 1e6:.1f} MB, each named by its sha256\n"
            f"price    at most {money.show(self.price)} of a budget of {money.show(recipe.pay.budget)} TRAIN"
            + (f", of which audits at most {money.show(self.audits)}" if self.audits else "")
            + "; what is not earned comes back"
        )

    def describe_work(self) -> str:
        """What is trained, and what of the data is not."""
        recipe = self.resolved
        tokens = sum(counts.tokens for row in recipe.counts for counts in row[: recipe.shards])
        spare = f", and up to {recipe.spares} spare a round" if recipe.spares else ""
        lines = [
            f"recipe   {recipe.name}: {recipe.rounds} rounds x {recipe.shards} shards x {recipe.steps} steps "
            f"= {tokens:,} tokens{spare}"
        ]
        for count, where, what in (
            (self.truncated, self.truncated_at, f"are cut at {recipe.training.sequence_len} tokens"),
            (self.skipped, self.skipped_at, "hold nothing to train on and are left out"),
        ):
            if count:
                lines.append(f"rows     {count:,} {what}: {', '.join(where)}{', ..' if count > len(where) else ''}")
        return "\n".join(lines)


def resolve(path: Path, bringer: Bringer, *, tokens: Path | None = None, weights: bool = False) -> Plan:
    """Pin everything of a recipe, on this machine. Raises its one clear error for whatever is wrong with it.

    `tokens` keeps the tokenised data for a training child of this machine; without it that of a private job is kept
    until it is sealed. With `weights` a base on a model hub is brought here whole, else only what resolving needs.
    """
    from trainchain.core.digests import sha256
    from trainchain.core.models import Access, Check, DataSet, FileRef, HeldOut, Lora, Merge, Pay, ResolvedRecipe
    from trainchain.core.recipe import load_recipe
    from trainchain.core.sharding import spare_shards

    recipe = load_recipe(path)
    target, template = _target(recipe.hub_model_id), template_of(recipe)
    hush()
    if tokens is None and recipe.access.holder is not None:
        tokens = bringer.folder(Path(tempfile.gettempdir()))
    model_dir, base = bringer.model(recipe.base_model, weights=weights)
    brought: list[tuple[Data, DataFormat | None]] = []
    for index, entry in enumerate(recipe.datasets):
        rows = bringer.data(entry.path, f"train-{index}", entry.split, usual=("train",))
        brought += [(file, entry.type) for file in rows]
    tested = _held_out(recipe, bringer)

    from trainchain.core.train.resolve import inspect

    with _said_of(base, model_dir):
        found = inspect(
            model_dir,
            [(file.path, form) for file, form in brought],
            (tested.path, recipe.test_datasets[0].type) if tested else None,
            held_out_rows=recipe.test_datasets[0].rows if tested else 0,
            sequence_len=recipe.sequence_len,
            batch_size=recipe.micro_batch_size * recipe.gradient_accumulation_steps,
            seed=recipe.seed,
            rounds=recipe.rounds,
            shards=recipe.shards,
            steps=recipe.steps,
            spares=spare_shards(recipe.merge.spares, recipe.shards),
            targets=recipe.lora_target_modules,
            r=recipe.lora_r,
            attention=recipe.attention,
            chat_template=template,
            cache=tokens,
        )
    datasets = [
        DataSet(source=file.source, file=file.ref, format=facts.format, rows=facts.rows)
        for (file, _), facts in zip(brought, found.datasets, strict=True)
    ]
    held_out = None
    if found.held_out is not None and tested is not None:
        facts = found.held_out
        dataset = DataSet(source=tested.source, file=tested.ref, format=facts.file.format, rows=facts.file.rows)
        held_out = HeldOut(
            dataset=dataset, rows=facts.rows, tokens=facts.counts.tokens, supervised=facts.counts.supervised
        )
    initial = FileRef(name="initial.safetensors", sha256=sha256(found.initial), size=len(found.initial))
    segment_steps = recipe.segment_steps or -(-recipe.steps // 8)
    resolved = ResolvedRecipe(
        trainchain=1,
        name=recipe.name,
        base_model=base,
        datasets=datasets,
        held_out=held_out,
        access=Access(workers=recipe.access.workers, keys=None),
        sealed=None,
        chat_template=template,
        hub_model_id=target,
        lora=Lora(r=recipe.lora_r, alpha=recipe.lora_alpha, targets=sorted(found.targets), initial=initial),
        training=_training(recipe, found, segment_steps),
        rounds=recipe.rounds,
        shards=recipe.shards,
        steps=recipe.steps,
        round_deadline=recipe.round_deadline,
        quorum=recipe.quorum,
        merge=Merge(**recipe.merge.model_dump()),
        check=Check(**recipe.check.model_dump() | {"spend": recipe.check.share(-(-recipe.steps // segment_steps))}),
        pay=Pay(**recipe.pay.model_dump()),
        samples=recipe.samples,
        sample_tokens=recipe.sample_tokens,
        counts=found.counts,
    )
    every = [file for file, _ in brought] + [file for file in [tested] if file]
    files = {file.ref.sha256: file.path for file in every}
    files |= {ref.sha256: model_dir / ref.name for ref in base.files}
    plan = Plan(
        resolved=resolved,
        keys=recipe.access.holder,
        model_dir=model_dir,
        files=files,
        initial=found.initial,
        truncated=found.truncated,
        skipped=found.skipped,
        truncated_at=found.truncated_at,
        skipped_at=found.skipped_at,
        open_hash=resolved.spec_hash,
        tokens=tokens,
        bringer=bringer,
    )
    if plan.price > resolved.pay.budget:
        raise TrainChainError(
            "money.budget_too_small",
            f"The work costs up to {money.show(plan.price)} TRAIN"
            + (f" ({money.show(plan.audits)} of it for audits)" if plan.audits else "")
            + f", and `pay.budget` is {money.show(resolved.pay.budget)}.",
            hint=f'Set `budget: "{money.show(plan.price)}"` or more, lower the price, or train less.',
        )
    return plan


def bringer_of(settings: Settings, out: Output) -> Bringer:
    """What brings sources into this home's cache."""

    def cache() -> Cache:
        from trainchain.core.worker.cache import Cache

        return Cache(settings.cache, cap=settings.cache_cap)

    return Bringer(cache, out.note)


@contextlib.contextmanager
def _said_of(base: Base, model_dir: Path) -> Iterator[None]:
    """What is wrong with a model from elsewhere is said of its address, not of the folder that it lies in here."""
    try:
        yield
    except TrainChainError as error:
        if base.source is None:
            raise
        message = error.message.replace(f"The model folder {model_dir}", base.source).replace(
            str(model_dir), base.source
        )
        raise TrainChainError(error.code, message, hint=error.hint, **error.facts) from None


def _admitted(recipe: ResolvedRecipe) -> str:
    workers = recipe.access.workers
    who = {"owner": "your own wallet may train it", "anyone": "anyone may train it"}
    return who[workers] if isinstance(workers, str) else f"{len(workers)} wallets may train it"


def _held_out(recipe: Recipe, bringer: Bringer) -> Data | None:
    for entry in recipe.test_datasets:
        files = bringer.data(entry.path, "held-out", entry.split, usual=("test", "validation"))
        if len(files) > 1:
            raise TrainChainError(
                "recipe.invalid",
                f"`test_datasets`: {entry.path} has {len(files)} files; the held-out data is one.",
                hint=f"Name one: {_address_of(files[0])}",
            )
        return files[0]
    return None


def _address_of(file: Data) -> str:
    """One file of a pinned source, as a recipe names it."""
    source = str(file.source)
    into = "" if source.startswith("hf:") or "/paths/" in source else "/paths"
    return f"{source}{into}/{file.ref.path}"


def template_of(recipe: Recipe) -> str | None:
    """The chat template that the recipe brings. Raises `source.missing`, `recipe.invalid`."""
    from trainchain.core.models import MAX_TEMPLATE

    if recipe.chat_template is None:
        return None
    path = Path(recipe.chat_template)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TrainChainError(
            "source.missing", f"`chat_template`: {path} cannot be read: {error.strerror}.", hint="Check the path."
        ) from None
    except UnicodeDecodeError:
        text = ""
    if not 0 < len(text) <= MAX_TEMPLATE:
        raise TrainChainError(
            "recipe.invalid", f"`chat_template`: {path} is not a text of up to {MAX_TEMPLATE:,} characters."
        )
    return text


def _target(text: str | None) -> str | None:
    """Where the adapter is to be pushed, as it is kept; told to be wrong now, not after the training."""
    if text is None:
        return None
    from trainchain.core.sources.address import HubAddress, parse

    target = parse(text, "target")
    return target.text if isinstance(target, HubAddress) else text


def hush() -> None:
    """The libraries' bars and warnings are no answer to what the owner asked."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)


def _training(recipe: Recipe, found: Inspection, segment_steps: int) -> Training:
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
        segment_steps=segment_steps,
        seed=recipe.seed,
    )
