"""The resident engine: one job's base model, adapter and data, ready to train any shard of it.

With the same numeric class a shard's result is the same to the last bit, whole, interrupted, or replayed.
"""

import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from trainchain.core.adapter import Adapter, delta
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.models import Counts, FileRef, ResolvedRecipe
from trainchain.core.schedule import learning_rate, steps_before
from trainchain.core.segments import (
    Moments,
    State,
    Tensors,
    leaf,
    segment_ends,
    start_state,
    state_bytes,
    state_root,
)
from trainchain.core.sharding import DataOrder
from trainchain.core.train.adapted import AdaptedModel
from trainchain.core.train.blocks import read_block, read_held_out
from trainchain.core.train.data import (
    Plan,
    Sources,
    TokenizedData,
    check_counts,
    data_order,
    load_documents,
    plan_shard,
    shard_batches,
    stand_in,
    vocabulary,
)
from trainchain.core.train.device import memory_errors, numeric_class, set_modes
from trainchain.core.train.evaluate import answers, count_held_out, mean_loss
from trainchain.core.train.journal import Journal, Segment
from trainchain.core.train.model import load_config, load_tokenizer
from trainchain.core.train.packed import MicroBatch, deal, micro_batch

OnStep = Callable[[int, int, int, float], None]
"""(step, steps, tokens so far, loss of this step)."""

REPORT_SECONDS = 0.25
LANE_TOKENS = 256
"""Fewer tokens at a time do not fill the matrix products of a CPU's core."""
AHEAD = 2
"""Steps whose micro-batches are laid out before they are needed."""


@dataclass(frozen=True)
class ShardResult:
    """`leaves` are of the start and every segment's end; `losses` are first, last and mean over the steps.

    `resumed` counts the segments that an earlier call had finished.
    """

    end: Tensors
    delta: Adapter
    moments: Moments
    leaves: list[bytes]
    state_root: str
    segments: list[Segment]
    resumed: int
    counts: Counts
    losses: tuple[float, float, float]
    seconds: float
    numeric_class: str


class Engine:
    """One job, loaded. One at a time in a process: it sets torch's global modes.

    `micro_tokens` is how many tokens go through the model at once, in all lanes together; by default
    micro_batch_size sequences. It changes memory and last bits, not the mathematics. `checkpointing` trades time
    for memory, exactly. With `volatile` no file of `model_dir` is needed or mapped once the engine is there.

    A sealed job is opened without data: a shard's rows come with its block, the held-out rows with theirs. Of these
    nothing is written to the disk, and of a block nothing is kept.
    """

    def __init__(
        self,
        recipe: ResolvedRecipe,
        model_dir: Path,
        data_paths: Mapping[str, Path],
        *,
        threads: int,
        cache: Path | None = None,
        checkpointing: bool = False,
        micro_tokens: int | None = None,
        volatile: bool = False,
    ) -> None:
        training = recipe.training
        self.recipe = recipe
        self.micro_tokens = micro_tokens or training.micro_batch_size * training.sequence_len
        self._data_paths = data_paths
        self._cache = cache
        self._held_out: TokenizedData | None = None
        lanes = self._lanes(threads)
        set_modes(max(1, threads // lanes), training.seed)
        self._tokenizer = load_tokenizer(model_dir, recipe.chat_template)
        self._vocab_size = vocabulary(load_config(model_dir))
        self._order: DataOrder | None = None
        if recipe.sealed is None:
            self.documents = self._load([(self._path(dataset.file), dataset.format) for dataset in recipe.datasets])
            self._order = data_order(recipe, self.documents)
        else:
            self.documents = stand_in(self._tokenizer, self._vocab_size)
        self._lengths = self.documents.lengths()
        self._plans: dict[tuple[int, int], Future[Plan]] = {}
        self._order_lock = threading.Lock()
        self._helpers = ThreadPoolExecutor(2, "data")
        with memory_errors():
            self._adapted = AdaptedModel(
                training, recipe.lora, model_dir, checkpointing=checkpointing, lanes=lanes, volatile=volatile
            )
            self._adapted.prove(self.documents)
        processes = self._adapted.processes[1]
        path = self._adapted.adapter_path
        self.numeric_class = numeric_class(self._adapted.device, training, threads, path, processes)

    def train(
        self,
        start: Adapter,
        round: int,
        shard: int,
        lease: str,
        on_step: OnStep | None = None,
        *,
        moments: Moments | None = None,
        states: Path | None = None,
        block: bytes | None = None,
    ) -> ShardResult:
        """Train one shard from `start` under the 0x id `lease`; `on_step` comes at most four times a second.

        `moments` are what AdamW goes on with; without them it begins anew. The state at every segment's end is kept
        in the folder `states`; what lies there of this very shard is not trained again. `block` is the plain text of
        a sealed job's shard. Raises TrainChainError: data.count_mismatch and data.format before any training,
        job.invalid for an adapter of another base, state.invalid, train.diverged, train.out_of_memory.
        """
        began = time.monotonic()
        plan = self._take(round, shard, block)
        check_counts(plan.counts, self.recipe.counts[round - 1][shard], f"shard {shard} of round {round}")
        first, before = start_state(start, moments), steps_before(self.recipe, round) if moments else 0
        belongs = self._belongs(first, round, shard)
        journal = Journal(states, belongs, self._adapted.shapes, keeps=self.leads)
        try:
            with memory_errors():
                self._adapted.restore(first, before, "The adapter")
                journal.begin(first)
                resumed = len(journal.segments)
                end = self._run(plan, round, shard, journal, before, on_step)
            begun, segments = journal.finish()
        finally:
            journal.close()
        lease_id = bytes.fromhex(lease.removeprefix("0x"))
        ends = [(0, begun), *((segment.t, segment.digests) for segment in segments)]
        leaves = [leaf(lease_id, index, t, digests) for index, (t, digests) in enumerate(ends)]
        losses = [loss for segment in segments for loss in segment.losses]
        return ShardResult(
            end=end.w,
            delta=delta(end.w, start),
            moments=Moments(end.m, end.v),
            leaves=leaves,
            state_root=state_root(leaves),
            segments=segments,
            resumed=resumed,
            counts=plan.counts,
            losses=(losses[0], losses[-1], float(np.mean(losses))),
            seconds=time.monotonic() - began,
            numeric_class=self.numeric_class,
        )

    def replay(
        self,
        state: State,
        round: int,
        shard: int,
        segment: int,
        on_step: OnStep | None = None,
        *,
        block: bytes | None = None,
    ) -> State:
        """Train one segment (from 0) of a shard again, from the state it started in; the state it ends in.

        Split as `micro_tokens` says: to be equal to the last bit it must be what the segment was split by.
        """
        bounds = [0, *segment_ends(self.recipe.steps, self.recipe.training.segment_steps)]
        if not 0 <= segment < len(bounds) - 1 or state.t != bounds[segment]:
            raise TrainChainError("state.invalid", f"Segment {segment} does not start after step {state.t}.")
        plan = self._take(round, shard, block)
        with memory_errors():
            self._adapted.restore(state, steps_before(self.recipe, round))
            steps = range(state.t + 1, bounds[segment + 1] + 1)
            self._segment(plan, round, shard, steps, on_step)
            return self._adapted.snapshot(bounds[segment + 1])

    def evaluate(self, adapter: Adapter | None, *, held_out: bytes | None = None) -> float:
        """Mean held-out loss per supervised token; of the base alone where `adapter` is None."""
        documents, model = self.held_out(held_out), self._adapted
        with memory_errors():
            model.begin(self._nothing() if adapter is None else adapter)
            return mean_loss(model.loss_sums, documents, device=model.device, budget=self.micro_tokens // model.lanes)

    def samples(self, adapter: Adapter | None) -> list[str]:
        """The adapted model's answers to the recipe's prompts."""
        recipe, model = self.recipe, self._adapted
        if not recipe.samples:
            return []
        with memory_errors(), model.autocast():
            model.begin(self._nothing() if adapter is None else adapter)
            return answers(
                model.base, self._tokenizer, recipe.samples, new_tokens=recipe.sample_tokens, device=model.device
            )

    def held_out(self, data: bytes | None = None) -> TokenizedData:
        """The held-out rows, read at first use: a worker that only trains never needs the file.

        `data` is the plain text of a sealed job's.
        """
        held_out = self.recipe.held_out
        if held_out is None:
            raise TrainChainError("data.empty", "The job has no held-out data to evaluate on.")
        if self._held_out is None:
            if self.recipe.sealed is None:
                found = self._load([(self._path(held_out.dataset.file), held_out.dataset.format)], held_out.rows)
            elif data is None:
                raise TrainChainError(
                    "source.missing", "The job is sealed, and its held-out rows were not handed over."
                )
            else:
                found = read_held_out(data, self.recipe, self._tokenizer, self._vocab_size)
            counted = count_held_out(found)
            pinned = Counts(rows=counted.rows, tokens=held_out.tokens, supervised=held_out.supervised)
            check_counts(counted, pinned, "the held-out data")
            self._held_out = found
        return self._held_out

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all that train a shard together."""
        return self._adapted.processes[0] == 0

    def close(self) -> None:
        """Let go of the model's memory; the engine is of no use afterwards."""
        self._helpers.shutdown(wait=True, cancel_futures=True)
        del self._adapted
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _path(self, file: FileRef | None) -> Path:
        if file is None or file.sha256 not in self._data_paths:
            raise TrainChainError("source.missing", f"The data file {file and file.sha256} was not handed over.")
        return self._data_paths[file.sha256]

    def _load(self, sources: Sources, limit: int | None = None) -> TokenizedData:
        length = self.recipe.training.sequence_len
        return load_documents(sources, self._tokenizer, length, limit, vocab_size=self._vocab_size, cache=self._cache)

    def _nothing(self) -> Adapter:
        """An adapter that adds nothing."""
        return {name: np.zeros(shape, np.float32) for name, shape in self._adapted.shapes.items()}

    def _belongs(self, start: State, round: int, shard: int) -> dict[str, object]:
        return {
            "spec_hash": self.recipe.spec_hash,
            "round": round,
            "shard": shard,
            "start": sha256(state_bytes(start)),
            "numeric_class": self.numeric_class,
        }

    def _take(self, round: int, shard: int, block: bytes | None) -> Plan:
        """The plan of a shard, of an open job most often made while the one before it trained."""
        if self.recipe.sealed is not None:
            if block is None:
                what = f"the block of shard {shard} of round {round} was not handed over"
                raise TrainChainError("source.missing", f"The job is sealed, and {what}.")
            return read_block(block, self.recipe, round, shard, self._tokenizer, self._vocab_size)
        ready = self._plans.pop((round, shard), None)
        return ready.result() if ready else self._plan(round, shard)

    def _prepare_next(self, round: int, shard: int) -> None:
        """Plan the job's next shard: if this worker gets another one, the epoch's order at least is there."""
        following = (round, shard + 1) if shard + 1 < self.recipe.shards else (round + 1, 0)
        if self._order is not None and following[0] <= self.recipe.rounds and following not in self._plans:
            self._plans.clear()
            self._plans[following] = self._helpers.submit(self._plan, *following)

    def _plan(self, round: int, shard: int) -> Plan:
        assert self._order is not None
        with self._order_lock:
            batches = shard_batches(self.recipe, self._order, round, shard)
        return plan_shard(self.documents, self._lengths, batches)

    def _run(
        self, plan: Plan, round: int, shard: int, journal: Journal, steps_before: int, on_step: OnStep | None
    ) -> State:
        """All segments that the journal has not; returns the state at the end."""
        bounds = [0, *segment_ends(self.recipe.steps, self.recipe.training.segment_steps)]
        if journal.last is not None:
            self._adapted.restore(journal.last, steps_before)
        for before, after in list(pairwise(bounds))[len(journal.segments) :]:
            losses = self._segment(plan, round, shard, range(before + 1, after + 1), on_step)
            journal.add(self._adapted.snapshot(after), self.micro_tokens, losses)
            self._prepare_next(round, shard)
        assert journal.last is not None
        return journal.last

    def _segment(self, plan: Plan, round: int, shard: int, steps: range, on_step: OnStep | None) -> list[float]:
        """Some steps of a shard; losses and norms stay on the device and are read only to be shown and at the end."""
        figures: list[torch.Tensor] = []
        tokens = sum(plan.lengths[row] for step in plan.steps[: steps[0] - 1] for row in step)
        shown = 0.0
        for number, batches in zip(steps, self._laid_out(plan, steps), strict=True):
            targets = sum(int(plan.documents.supervised[row]) for row in plan.steps[number - 1])
            rate = learning_rate(self.recipe, round, number)
            figures.append(torch.stack(self._adapted.step(batches, targets, rate)))
            tokens += sum(plan.lengths[row] for row in plan.steps[number - 1])
            now = time.monotonic()
            if on_step and (now - shown >= REPORT_SECONDS or number == self.recipe.steps):
                shown = now
                on_step(number, self.recipe.steps, tokens, float(figures[-1][0]))
        found = torch.stack(figures).double().cpu().numpy()
        self._check(found, round, shard, steps)
        return [float(loss) for loss in found[:, 0]]

    def _check(
        self, figures: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]", round: int, shard: int, steps: range
    ) -> None:
        """Raise train.diverged, naming the first step or the tensor that stopped being finite."""
        where = f"Shard {shard} of round {round} diverged"
        hint = "Nothing was handed in. The owner should lower the learning rate, or look at the data."
        for number, (loss, norm) in zip(steps, figures, strict=True):
            if not np.isfinite(loss):
                raise TrainChainError("train.diverged", f"{where}: the loss of step {number} is {loss}.", hint=hint)
            if not np.isfinite(norm):
                raise TrainChainError("train.diverged", f"{where}: the gradient of step {number} is {norm}.", hint=hint)
        for name, tensor in self._adapted.adapter().items():
            if not np.isfinite(tensor).all():
                raise TrainChainError(
                    "train.diverged", f"{where}: {name} is not finite after step {steps[-1]}.", hint=hint
                )

    def _laid_out(self, plan: Plan, steps: range) -> Iterator[list[list[MicroBatch]]]:
        """This process's micro-batches of each step, by lane, laid out while the steps before train."""
        waiting: deque[Future[list[list[MicroBatch]]]] = deque()
        following = iter(steps)
        for _ in steps:
            while len(waiting) <= AHEAD and (coming := next(following, None)) is not None:
                waiting.append(self._helpers.submit(self._micro_batches, plan, plan.steps[coming - 1]))
            yield waiting.popleft().result()

    def _micro_batches(self, plan: Plan, rows: Sequence[int]) -> list[list[MicroBatch]]:
        (index, count), lanes = self._adapted.processes, self._adapted.lanes
        hands = deal(plan.lengths, rows, self.micro_tokens // lanes, lanes * count)[index * lanes :][:lanes]
        device = self._adapted.device
        return [[micro_batch(plan.documents, group, device) for group in hand] for hand in hands]

    def _lanes(self, threads: int) -> int:
        """One for each thread of a CPU, as far as `micro_tokens` fills them; one for a GPU."""
        if torch.cuda.is_available() or torch.backends.mps.is_available():
            return 1
        return max(1, min(threads, self.micro_tokens // LANE_TOKENS))
