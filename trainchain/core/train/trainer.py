"""The resident engine: one job's base model, adapter and data, ready to train any shard of it.

With the same numeric class a shard's result is the same to the last bit.
"""

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trainchain.core.adapter import Adapter, delta
from trainchain.core.errors import TrainChainError
from trainchain.core.models import Counts, ResolvedRecipe
from trainchain.core.schedule import learning_rate
from trainchain.core.segments import leaf, start_leaf, state_root
from trainchain.core.train.adapted import AdaptedModel
from trainchain.core.train.data import (
    TokenizedData,
    check_counts,
    count_shard,
    data_order,
    load_documents,
    shard_batches,
)
from trainchain.core.train.device import memory_errors, numeric_class, set_modes
from trainchain.core.train.evaluate import count_held_out, mean_loss
from trainchain.core.train.model import load_tokenizer
from trainchain.core.train.packed import MicroBatch, loss_sum, micro_batch

OnStep = Callable[[int, int, int, float], None]
"""(step, steps, tokens so far, loss of this step)."""

REPORT_SECONDS = 0.25


@dataclass(frozen=True)
class ShardResult:
    """`leaves` are the states at the start and the end; `losses` are first, last and mean over the steps."""

    end: Adapter
    delta: Adapter
    leaves: list[bytes]
    state_root: str
    counts: Counts
    losses: tuple[float, float, float]
    seconds: float
    numeric_class: str


class Engine:
    """One job, loaded. One at a time in a process: it sets torch's global modes."""

    def __init__(
        self, recipe: ResolvedRecipe, model_dir: Path, data_paths: Mapping[str, Path], *, threads: int
    ) -> None:
        self.recipe = recipe
        self._data_paths = data_paths
        self._held_out: TokenizedData | None = None
        set_modes(threads, recipe.training.seed)
        self._tokenizer = load_tokenizer(model_dir)
        sources = [(self._path(dataset.file.sha256), dataset.format) for dataset in recipe.datasets]
        self.documents = load_documents(sources, self._tokenizer, recipe.training.sequence_len)
        self._order = data_order(recipe, self.documents)
        with memory_errors():
            self._adapted = AdaptedModel(recipe, model_dir)
            self._adapted.prove_packing(self.documents)
        self.numeric_class = numeric_class(self._adapted.device, recipe, threads)

    def train(self, start: Adapter, round: int, shard: int, lease: str, on_step: OnStep | None = None) -> ShardResult:
        """Train one shard from `start` under the 0x id `lease`; `on_step` comes at most four times a second.

        Raises TrainChainError: data.count_mismatch before any training, train.diverged, train.out_of_memory.
        """
        began = time.monotonic()
        steps = shard_batches(self.recipe, self._order, round, shard)
        counts = count_shard(self.documents, steps)
        check_counts(counts, self.recipe.counts[round - 1][shard], f"shard {shard} of round {round}")
        with memory_errors():
            self._adapted.load(start)
            optimizer = self._adapted.optimizer()
            losses = self._run(steps, round, optimizer, on_step)
            end = self._adapted.adapter()
            moments = self._adapted.moments(optimizer)
        if not np.isfinite(losses).all() or not all(np.isfinite(tensor).all() for tensor in end.values()):
            raise TrainChainError("train.diverged", f"Shard {shard} of round {round} has no finite loss.")
        lease_id = bytes.fromhex(lease.removeprefix("0x"))
        leaves = [start_leaf(lease_id, start), leaf(lease_id, 1, len(steps), end, *moments)]
        return ShardResult(
            end=end,
            delta=delta(end, start),
            leaves=leaves,
            state_root=state_root(leaves),
            counts=counts,
            losses=(float(losses[0]), float(losses[-1]), float(losses.mean())),
            seconds=time.monotonic() - began,
            numeric_class=self.numeric_class,
        )

    def evaluate(self, adapter: Adapter | None) -> float:
        """Mean held-out loss per supervised token; of the base alone where `adapter` is None."""
        documents, model, training = self.held_out(), self._adapted.model, self.recipe.training
        budget = training.micro_batch_size * training.sequence_len
        with memory_errors():
            if adapter is not None:
                self._adapted.load(adapter)
            with model.disable_adapter() if adapter is None else nullcontext():
                loss = mean_loss(model, documents, device=self._adapted.device, budget=budget)
        return loss

    def held_out(self) -> TokenizedData:
        """The held-out rows, read at first use: a worker that only trains never needs the file."""
        held_out = self.recipe.held_out
        if held_out is None:
            raise TrainChainError("data.empty", "The job has no held-out data to evaluate on.")
        if self._held_out is None:
            source = (self._path(held_out.dataset.file.sha256), held_out.dataset.format)
            length = self.recipe.training.sequence_len
            found = load_documents([source], self._tokenizer, length, limit=held_out.rows)
            counted = count_held_out(found)
            pinned = Counts(rows=counted.rows, tokens=held_out.tokens, supervised=held_out.supervised)
            check_counts(counted, pinned, "the held-out data")
            self._held_out = found
        return self._held_out

    def close(self) -> None:
        """Let go of the model's memory; the engine is of no use afterwards."""
        del self._adapted
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _path(self, digest: str) -> Path:
        if digest not in self._data_paths:
            raise TrainChainError("source.missing", f"The data file {digest} was not handed over.")
        return self._data_paths[digest]

    def _run(
        self, steps: list[list[list[int]]], round: int, optimizer: torch.optim.AdamW, on_step: OnStep | None
    ) -> NDArray[np.float64]:
        """All updates; the losses stay on the device and are read only to be shown and at the end."""
        batches = [self._micro_batches(step) for step in steps]
        losses: list[torch.Tensor] = []
        tokens, shown = 0, 0.0
        for number, step in enumerate(batches, 1):
            optimizer.param_groups[0]["lr"] = learning_rate(self.recipe, round, number)
            losses.append(self._step(step, optimizer))
            tokens += sum(sum(batch.lengths) for batch in step)
            now = time.monotonic()
            if on_step and (now - shown >= REPORT_SECONDS or number == len(batches)):
                loss, shown = float(losses[-1]), now
                if not np.isfinite(loss):
                    raise TrainChainError("train.diverged", f"The loss of step {number} is {loss}.")
                on_step(number, len(batches), tokens, loss)
        found: NDArray[np.float64] = torch.stack(losses).double().cpu().numpy()
        return found

    def _micro_batches(self, step: list[list[int]]) -> list[MicroBatch]:
        size = self.recipe.training.micro_batch_size
        groups = [step[at : at + size] for at in range(0, len(step), size)]
        rows = [[row for sequence in group for row in sequence] for group in groups]
        return [micro_batch(self.documents, group, self._adapted.device) for group in rows]

    def _step(self, step: list[MicroBatch], optimizer: torch.optim.AdamW) -> torch.Tensor:
        """One update. The loss is the mean over the whole step's targets, however the step is split."""
        targets = sum(len(batch.labels) for batch in step)
        total = torch.zeros((), device=self._adapted.device)
        for batch in step:
            loss = loss_sum(self._adapted.model, batch) / targets
            self._adapted.backward(loss)
            total += loss.detach()
        self._adapted.clip()
        optimizer.step()
        optimizer.zero_grad()
        return total
