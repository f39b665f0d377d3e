"""`train`, put together: resolve the recipe as its owner would, train one shard as a worker would."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainchain.cli.output import Output
from trainchain.cli.plan import bringer_of, resolve
from trainchain.core.errors import TrainChainError
from trainchain.core.settings import Settings


def train(
    recipe_path: Path,
    out: Output,
    *,
    settings: Settings,
    round_: int,
    shard: int,
    start: Path | None,
    output: Path | None,
    threads: int | None,
    processes: int,
    checkpointing: bool,
    micro_tokens: int | None,
) -> dict[str, Any]:
    """Train a shard into a folder; returns the document of `train --json`. The child ends with this process."""
    from trainchain.core.adapter import read_adapter
    from trainchain.core.recipe import load_recipe
    from trainchain.core.sharding import spare_shards
    from trainchain.core.worker import alone
    from trainchain.core.worker.child import Child, child_environment
    from trainchain.core.worker.files import JobFiles

    asked = load_recipe(recipe_path)
    shards = asked.shards + spare_shards(asked.merge.spares, asked.shards)
    for name, given, last in (("round", round_, asked.rounds), ("shard", shard, shards - 1)):
        if given > last:
            raise TrainChainError("usage.flag", f"There is no {name} {given}: the recipe's last is {last}.")
    if round_ > 1 and start is None:
        raise TrainChainError(
            "usage.flag",
            f"Round {round_} starts from the adapter that round {round_ - 1} was merged to.",
            hint=f"trainchain pull JOB --round {round_ - 1} -o DIR fetches it; then add --start DIR",
        )
    if start is not None and not start.is_dir():
        raise TrainChainError("usage.file", f"--start: {start} is not a folder.", hint="Name a PEFT adapter's folder.")
    tokens = settings.cache / "tokens"
    plan = resolve(recipe_path, bringer_of(settings, out), tokens=tokens, weights=True)
    out.note(plan.describe_work())
    folder = (output or Path(f"{asked.name}-round-{round_}-shard-{shard}")).absolute()
    initial = read_adapter(plan.initial)
    adapter = initial if start is None else alone.start_of(start, plan.resolved, plan.initial)
    needed = {dataset.file.sha256 for dataset in plan.resolved.datasets if dataset.file}
    data = {digest: path for digest, path in plan.files.items() if digest in needed}
    files = JobFiles(plan.resolved, folder / alone.RECIPE_FILE, plan.model_dir, data)
    count = threads or os.cpu_count() or 1
    command = [sys.executable, "-m", "trainchain.core.train", "--threads", str(count)]
    command += ["--processes", str(processes)] if processes > 1 else []
    child = Child(command, child_environment(count), folder / "trainer.log")
    options = {"cache": str(tokens), "checkpointing": checkpointing, "micro_tokens": micro_tokens}
    try:
        commitments = alone.train(child, files, adapter, round_, shard, folder, options, _Steps(out))
    finally:
        child.stop()
    first, last = commitments["losses"][:2]
    out.note(
        f"trained  {commitments['tokens']:,} tokens in {commitments['seconds']:.1f} s  loss {first:.4f} > {last:.4f}"
    )
    return {"folder": str(output or folder.name), **commitments}


class _Steps:
    """Says how it goes, at most once a second."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._said: tuple[float, int] | None = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        now, tokens = time.monotonic(), event["tokens"]
        speed = ""
        if self._said is not None:
            seconds = now - self._said[0]
            if seconds < 1.0 and event["step"] < event["steps"]:
                return
            speed = f"  {(tokens - self._said[1]) / max(seconds, 1e-6):,.0f} tokens/s"
        self._said = (now, tokens)
        self._out.note(f"step     {event['step']}/{event['steps']}  loss {event['loss']:.4f}{speed}")
