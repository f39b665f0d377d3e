"""A job on the tiny model that is trained by numbers from nowhere, to its last adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.fixtures_hub import REACH, Job, Person, Town
from trainchain.cli import delivery
from trainchain.core.adapter import Adapter, adapter_bytes
from trainchain.core.client import HubClient
from trainchain.core.digests import sha256
from trainchain.core.models import Base, FileRef, Lora
from trainchain.core.sources.found import MODEL_FILES
from trainchain.core.train.model import find_targets, initial_adapter

TOKENS = torch.tensor([[5, 9, 42, 200, 7, 31]])


@dataclass
class Trained:
    """A job on the tiny model, trained by numbers from nowhere, and its last adapter."""

    job: Job
    client: HubClient
    adapter: Adapter

    def push(self, target: str | None = "hf://me/bot", **options: Any) -> tuple[dict[str, Any], list[str]]:
        said: list[str] = []
        return delivery.push(self.client, self.job.id, target, note=said.append, **options), said


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def refs_of(model: Path, source: str | None) -> list[FileRef]:
    return [
        FileRef(
            name=path.name,
            sha256=sha256(path.read_bytes()),
            size=path.stat().st_size,
            path=path.name if source else None,
        )
        for path in sorted(model.iterdir())
        if path.suffix in MODEL_FILES
    ]


def start(town: Town, tiny: Path, source: str | None, **options: Any) -> Job:
    """Publish a job on the tiny model, which lies at `source`, or with our hub."""
    targets = find_targets(tiny, "all-linear")
    initial = adapter_bytes(initial_adapter(targets, 2, 0))
    ref = FileRef(name="initial.safetensors", sha256=sha256(initial), size=len(initial))
    own = {path.name: path.read_bytes() for path in sorted(tiny.iterdir()) if path.suffix in MODEL_FILES}
    files = {**own, "train-0.jsonl": b'{"text": "a"}\n', "held-out.jsonl": b'{"text": "b"}\n', "initial": initial}
    return town.publish(
        files,
        name="support-bot",
        base_model=Base(source=source, license="mit" if source else None, files=refs_of(tiny, source)),
        lora=Lora(r=2, alpha=4, targets=sorted(targets), initial=ref),
        **options,
    )


def train(town: Town, job: Job, workers: list[Person], rounds: int) -> Adapter:
    """Let workers contribute to every shard of the rounds, and the hub measure and settle them."""
    evaluator = town.person(town.evaluator_keys)

    def measure() -> None:
        for lease in iter(evaluator.lease, None):
            report = {"loss": 3.0 - lease["round"], "samples": [""] * len(job.recipe.samples)}
            evaluator.post(f"/v1/leases/{lease['lease']}/evaluation", report).raise_for_status()

    measure()
    for number in range(1, rounds + 1):
        for shard in range(job.recipe.shards):
            worker = workers[shard % len(workers)]
            lease = worker.must_lease(job)
            begin = worker.fetch_adapter(lease["start"])
            random = np.random.default_rng(100 * number + shard)
            delta = {
                name: random.uniform(-REACH / 2, REACH / 2, tensor.shape).astype(np.float32)
                for name, tensor in begin.items()
            }
            worker.contribute(lease, delta).raise_for_status()
        town.tick()
        measure()
    town.tick()
    return job.owner.fetch_adapter(job.round(rounds)["adapter"])
