"""The owner's journey behind submit, jobs, pull and run: resolve, publish, fund, fetch."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainchain.cli import wiring
from trainchain.cli.output import Output
from trainchain.core import money
from trainchain.core.errors import TrainChainError

if TYPE_CHECKING:
    from trainchain.chain.escrow import ChainClient
    from trainchain.chain.wallet import Wallet
    from trainchain.core.client import HubClient
    from trainchain.core.models import FileRef, ResolvedRecipe, Training
    from trainchain.core.recipe import Recipe
    from trainchain.core.settings import Settings
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
    from trainchain.core.models import DataSet, FileRef, HeldOut, Lora, Merge, Pay, ResolvedRecipe
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
        DataSet(file=name(source, f"train-{index}.jsonl"), format=facts.format, rows=facts.rows)
        for index, ((source, _), facts) in enumerate(zip(sources, found.datasets, strict=True))
    ]
    held_out = None
    if found.held_out is not None:
        facts = found.held_out
        dataset = DataSet(file=name(tests[0][0], "held-out.jsonl"), format=facts.file.format, rows=facts.file.rows)
        held_out = HeldOut(
            dataset=dataset, rows=facts.rows, tokens=facts.counts.tokens, supervised=facts.counts.supervised
        )
    initial = FileRef(name="initial.safetensors", sha256=sha256(found.initial), size=len(found.initial))
    resolved = ResolvedRecipe(
        trainchain=1,
        name=recipe.name,
        base_model=base,
        datasets=datasets,
        held_out=held_out,
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


def publish(plan: Plan, settings: Settings, out: Output, confirm: Callable[[int], None]) -> dict[str, Any]:
    """Publish and fund a plan. Interrupted anywhere, the same call goes on where it stopped: nothing is paid twice."""
    from trainchain.core.settings import write_private

    client, wallet = wiring.signed_client(settings, out)
    chain = wiring.chain_of(client)
    recipe = plan.resolved
    confirm(recipe.pay.budget)

    intent_path = settings.home / "submissions" / f"{recipe.spec_hash}-{chain.escrow[2:10].lower()}.json"
    salt = _salt(intent_path)
    write_private(intent_path, json.dumps({"salt": salt}).encode())
    answer = client.post("/v1/jobs", {"recipe": recipe.model_dump(mode="json"), "salt": salt})
    job_id = str(answer["job"])
    _upload(client, plan, job_id, answer["missing"], settings, out)
    tx = _fund(client, chain, wallet, plan, job_id, salt, out)
    state = client.post(f"/v1/jobs/{job_id}/fund", signed=False)["state"]
    write_private(settings.home / "last_job", job_id.encode())
    intent_path.unlink()
    return {
        "job": job_id,
        "name": recipe.name,
        "state": state,
        "spec_hash": recipe.spec_hash,
        "budget": str(recipe.pay.budget),
        "price": str(plan.price),
        "tokens": sum(counts.tokens for row in recipe.counts for counts in row),
        "escrow": chain.escrow,
        "tx": tx,
        "hub": settings.hub,
    }


def _salt(intent_path: Path) -> str:
    """The salt of an interrupted submit of this very recipe, else a fresh one."""
    try:
        return str(json.loads(intent_path.read_bytes())["salt"])
    except (OSError, ValueError, KeyError):
        return "0x" + secrets.token_hex(32)


def _upload(client: HubClient, plan: Plan, job_id: str, missing: list[str], settings: Settings, out: Output) -> None:
    from trainchain.core.settings import private_folder

    initial = private_folder(settings.home / "submissions") / f"{plan.resolved.lora.initial.sha256}.safetensors"
    initial.write_bytes(plan.initial)
    files = {**plan.files, plan.resolved.lora.initial.sha256: initial}
    refs = {ref.sha256: ref for ref in plan.resolved.files()}
    try:
        if missing:
            size = sum(refs[digest].size for digest in missing)
            out.note(f"upload   {len(missing)} files, {size / 1e6:.1f} MB")
        for digest in missing:
            client.upload(f"/v1/jobs/{job_id}/objects/{digest}", files[digest])
    finally:
        initial.unlink()


def _fund(
    client: HubClient, chain: ChainClient, wallet: Wallet, plan: Plan, job_id: str, salt: str, out: Output
) -> str | None:
    """Create and fund the job in escrow unless it stands there already; returns the transaction."""
    from trainchain.chain.records import JobParams
    from trainchain.core.rewards import round_cap

    earlier = wiring.escrow_job(chain, job_id)
    if earlier is not None and earlier.funded > 0:
        return None
    told, pay = client.info()["chain"], plan.resolved.pay
    if told["embedded"] and (
        chain.token_balance(told["token"], wallet.address) < pay.budget or chain.gas_balance(wallet.address) == 0
    ):
        client.post("/v1/faucet", {"tokens": True})
        out.note("faucet   the hub's own chain gave this wallet tokens to try TrainChain with")
    created = chain.create_job(
        wallet,
        JobParams(
            token=told["token"],
            hub=told["hub"],
            deadline=int(time.time()) + pay.deadline,
            grace=pay.grace,
            activation_delay=pay.activation_delay,
            round_cap=round_cap(plan.resolved),
            spec_hash="0x" + plan.resolved.spec_hash,
            salt=salt,
        ),
        pay.budget,
    )
    out.note(f"escrow   {money.show(pay.budget)} TRAIN  tx {wiring.short(created.tx)}")
    return str(created.tx)


def fetch(client: HubClient, job_id: str, target: Path | None, *, round_: int | None = None) -> dict[str, Any]:
    """Write the merged adapter of a round (default: the last merged one) as a standard PEFT folder."""
    from trainchain.core.adapter import read_adapter, write_peft_folder
    from trainchain.core.models import ResolvedRecipe, parse

    view = client.get(f"/v1/jobs/{job_id}")
    merged = [row for row in view["rounds_done"] if row["adapter"] and round_ in (None, row["round"])]
    if not merged:
        what = "no round is merged yet" if round_ is None else f"round {round_} is not merged"
        raise TrainChainError(
            "job.not_ready", f"Job {job_id[:12]} has no adapter to pull: {what}.", hint=f"trainchain jobs show {job_id}"
        )
    last = merged[-1]
    recipe = parse(ResolvedRecipe, client.object(view["spec_hash"]), code="job.invalid", what=f"The recipe of {job_id}")
    target = target or Path(f"{recipe.name}-lora")
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not (target / "trainchain.json").exists():
        raise TrainChainError("usage.flag", f"{target} exists and is not empty.", hint="Name another folder with -o.")
    adapter = read_adapter(client.object(last["adapter"], cap=1 << 34))
    write_peft_folder(target, adapter, recipe, recipe.name)
    facts = {
        "job": job_id,
        "name": recipe.name,
        "spec_hash": recipe.spec_hash,
        "round": last["round"],
        "adapter": last["adapter"],
        "loss": last["loss"],
        "samples": [
            {"prompt": prompt, "answer": answer}
            for prompt, answer in zip(recipe.samples, last["samples"] or [], strict=False)
        ],
        "base_model": [ref.model_dump() for ref in recipe.base_model],
    }
    (target / "trainchain.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8", newline="\n")
    return {"folder": str(target), **facts}
