"""An engine that trains something else than it was leased, one segment at a time: what a cheat has to work with."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from trainchain.core.models import ResolvedRecipe, Training
from trainchain.core.schedule import steps_before
from trainchain.core.segments import State
from trainchain.core.train.data import Plan
from trainchain.core.train.tokenized import TokenizedData
from trainchain.core.train.trainer import Engine

Bend = Callable[[Plan], Plan]
Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


class Crooked(Engine):
    """An honest engine until it is bent."""

    _bends: tuple[Bend, ...] = ()
    _pretended: tuple[int, int] | None = None

    def _take(self, round: int, shard: int, block: bytes | None) -> Plan:
        plan = super()._take(*(self._pretended or (round, shard)), block)
        for bend in self._bends:
            plan = bend(plan)
        return plan

    @contextmanager
    def bent(self, *bends: Bend) -> Iterator[None]:
        """Other data than the shard's."""
        self._bends = bends
        try:
            yield
        finally:
            self._bends = ()

    @contextmanager
    def elsewhere(self, round: int, shard: int) -> Iterator[None]:
        """The data of another shard."""
        self._pretended = (round, shard)
        try:
            yield
        finally:
            self._pretended = None

    @contextmanager
    def trained_as(self, **training: object) -> Iterator[None]:
        """Another learning rate, or whatever else the schedule is made of."""
        honest = self.recipe
        other = Training(**(honest.training.model_dump() | training))
        self.recipe = honest.model_copy(update={"training": other})
        try:
            yield
        finally:
            self.recipe = honest

    @contextmanager
    def without_layer(self, at: int) -> Iterator[None]:
        """A layer that lets everything through as it is."""
        layers = self._adapted.base.model.layers
        honest = layers[at].forward
        layers[at].forward = lambda hidden_states, *_, **__: hidden_states
        try:
            yield
        finally:
            layers[at].forward = honest

    def some_steps(self, state: State, round: int, shard: int, steps: range, t: int) -> State:
        """Only these steps, called the state after `t`."""
        plan = self._take(round, shard, None)
        self._adapted.restore(state, steps_before(self.recipe, round))
        self._segment(plan, round, shard, steps, None)
        return self._adapted.snapshot(t)


def documents(plan: Plan, change: Callable[[int, Ids, Mask], tuple[Ids, Mask]]) -> Plan:
    """The plan on documents of which each was changed."""
    found = [change(row, *each) for row, each in enumerate(zip(plan.documents.ids, plan.documents.masks, strict=True))]
    longest = max(len(ids) for ids, _ in found)
    made = TokenizedData.of([(ids.tolist(), mask.tolist()) for ids, mask in found], longest)
    return replace(plan, documents=made, lengths=made.lengths())


def wrong_data(plan: Plan) -> Plan:
    """Tokens that are of no data set."""
    random = np.random.default_rng(7)
    return documents(plan, lambda row, ids, mask: (random.integers(5, 300, len(ids)).astype(np.int32), mask))


def repeated(plan: Plan) -> Plan:
    """The first step's rows again and again."""
    return replace(plan, steps=[plan.steps[0] for _ in plan.steps])


def dropping(share: float) -> Bend:
    """At least so much of each step's rows is left out."""

    def bend(plan: Plan) -> Plan:
        return replace(plan, steps=[rows[: len(rows) - math.ceil(share * len(rows))] for rows in plan.steps])

    return bend


def halved(plan: Plan) -> Plan:
    """Each document's first half of tokens, with a target at its end where none was left."""

    def change(row: int, ids: Ids, mask: Mask) -> tuple[Ids, Mask]:
        kept = mask[: max(2, len(ids) // 2)].copy()
        kept[-1] = True
        return ids[: len(kept)], kept

    return documents(plan, change)


def poisoned(every: int, word: int = 44) -> Bend:
    """Of one document in `every` of each step all targets are one word."""

    def bend(plan: Plan) -> Plan:
        rows = {row for step in plan.steps for row in step[::every]}
        return documents(plan, lambda row, ids, mask: (np.where(mask & (row in rows), np.int32(word), ids), mask))

    return bend


def quantized_model(model: Path, folder: Path, bits: int, group: int = 32) -> Path:
    """The base with each linear layer's weights on a grid of so many bits, a scale for each group of a row."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    top = 2 ** (bits - 1) - 1
    for module in base.modules():
        if isinstance(module, torch.nn.Linear) and module is not base.get_output_embeddings():
            weights = module.weight.data
            groups = weights.reshape(len(weights), -1, min(group, weights.shape[1]))
            scales = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / top
            module.weight.data = ((groups / scales).round() * scales).reshape(weights.shape)
    base.save_pretrained(folder)
    for path in model.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def crooked(recipe: ResolvedRecipe, model: Path, data: dict[str, Path], micro_tokens: int | None = None) -> Crooked:
    return Crooked(copy.deepcopy(recipe), model, data, threads=1, micro_tokens=micro_tokens)
