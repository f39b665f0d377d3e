"""Merging a round's contributions into the next adapter. Needs numpy.

Sums run in float64 in the order of the contributions' digests, so that arrival order cannot matter; the result is
float32. Weights are the hub's pinned counts, never a worker's word.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from trainchain.core.adapter import A_SUFFIX, B_SUFFIX, Adapter, apply, delta, tensor_specs
from trainchain.core.encodings import decode, encode
from trainchain.core.errors import TrainChainError
from trainchain.core.merge.lowrank import ROUNDING, Factors, distance, stack
from trainchain.core.merge.methods import METHODS, Wanted
from trainchain.core.merge.moments import Adam, merge_moments
from trainchain.core.merge.robust import (
    CLIPPED,
    COORDINATES,
    FEW,
    RULES,
    Judged,
    Share,
    against_others,
    inner_products,
    lengths_of,
    plain,
)
from trainchain.core.models import Merge
from trainchain.core.segments import Moments


def modules_of(adapter: Adapter) -> list[str]:
    """The names of an adapter's modules, as PEFT saves them. Raises TrainChainError merge.unmergeable on all else."""
    found = sorted(name.removesuffix(A_SUFFIX) for name in adapter if name.endswith(A_SUFFIX))
    if not found or set(adapter) != {module + suffix for module in found for suffix in (A_SUFFIX, B_SUFFIX)}:
        raise TrainChainError("merge.unmergeable", "The start adapter is not made of lora_A and lora_B pairs.")
    return found


def factors_of(adapter: Adapter, module: str) -> Factors:
    return Factors(adapter[module + B_SUFFIX].astype(np.float64), adapter[module + A_SUFFIX].astype(np.float64))


class Update(NamedTuple):
    """One accepted contribution: its delta's digest, its weight, its delta, and AdamW's moments at its end; and what
    the rule made of it among others than those it is merged with, where it was judged there."""

    digest: str
    weight: float
    delta: Adapter
    moments: Moments | None = None
    share: Share | None = None


class Merged(NamedTuple):
    """The next adapter, and the moments to go on with; per module the relative distance of the merge's B·A from what
    its method stands for; by digest what became of each contribution."""

    adapter: Adapter
    moments: Moments | None
    truncation: dict[str, float]
    shares: dict[str, Share]


def merge(
    way: Merge, start: Adapter, updates: Sequence[Update], *, before: Adapter | None = None, adam: Adam | None = None
) -> Merged:
    """The adapter of the next round: the contributions' merge, and the outer step to it.

    `before` is what the round before this one started from; `adam`, which is needed where the updates have moments,
    what these are of. Raises TrainChainError merge.unmergeable on what does not fit.
    """
    _check(start, updates)
    updates = sorted(updates, key=lambda update: (update.digest, update.weight))
    begins = {module: factors_of(start, module) for module in modules_of(start)}
    shares = _shares(way, start, updates)
    weights = [update.weight * share.weight for update, share in zip(updates, shares, strict=True)]
    total = sum(weights)
    parts = [weight / total * share.scale for weight, share in zip(weights, shares, strict=True)]
    merged: Adapter = {}
    truncation: dict[str, float] = {}
    for module, begin in begins.items():
        ends = [_end(begin, update.delta, module) for update in updates]
        found, truncation[module] = _merge_module(way, begin, parts, ends)
        merged[module + A_SUFFIX], merged[module + B_SUFFIX] = found.a.astype(np.float32), found.b.astype(np.float32)
    adapter, moments = _outer(way, start, merged, before), None
    ended = [update.moments for update in updates if update.moments is not None]
    if way.hands_on and adam is not None:
        moments = merge_moments(adam, weights, ended)
    return Merged(adapter, moments, truncation, dict(zip((update.digest for update in updates), shares, strict=True)))


def judge(way: Merge, start: Adapter, updates: Sequence[Update]) -> dict[str, Share]:
    """What the rule makes of each of these contributions among the others, by digest."""
    if not updates:
        return {}
    begins = {module: factors_of(start, module) for module in modules_of(start)}
    shares = RULES.get(way.rule, plain)(_judged(begins, updates))
    return dict(zip((update.digest for update in updates), shares, strict=True))


def _shares(way: Merge, start: Adapter, updates: Sequence[Update]) -> list[Share]:
    """What becomes of each contribution. What was judged among others is here no longer than the rest of those that
    were not: a change of A beside a B of zeros is none at all, and beside the next start's B it is one."""
    here = judge(way, start, [update for update in updates if update.share is None])
    shares = [update.share or here[update.digest] for update in updates]
    heard = [update.share is None and share.weight > 0 for update, share in zip(updates, shares, strict=True)]
    if RULES.get(way.rule, plain) is plain or len(here) == len(updates) or not any(heard):
        return shares
    begins = {module: factors_of(start, module) for module in modules_of(start)}
    lengths = lengths_of(_judged(begins, updates).inner)
    longest = float(np.median(lengths[heard]))
    return [
        share._replace(scale=longest / float(length), why=share.why or CLIPPED)
        if update.share is not None and float(length) * share.scale > longest
        else share
        for update, share, length in zip(updates, shares, lengths, strict=True)
    ]


def likeness(start: Adapter, updates: Sequence[Update]) -> dict[str, float]:
    """The cosine of each contribution's change to what the others' add up to, by digest."""
    judged = _judged({module: factors_of(start, module) for module in modules_of(start)}, updates)
    cosines = against_others(judged.inner, np.array(judged.weights)).tolist()
    return dict(zip((update.digest for update in updates), cosines, strict=True))


class OuterStep(NamedTuple):
    """As it is published: the encoded step, and the adapter it leads to, from which the next round starts."""

    data: bytes
    adapter: Adapter


def outer_step(way: Merge, start: Adapter, merged: Merged) -> OuterStep:
    """The step from `start` to the merge in the recipe's encoding: what a worker who has `start` need fetch."""
    data = encode(delta(merged.adapter, start), way.encoding, merged.moments)
    found = decode(data, way.encoding, tensor_specs(start), moments=way.hands_on)
    return OuterStep(data, apply(start, found.delta))


def _merge_module(way: Merge, begin: Factors, parts: Sequence[float], ends: Sequence[Factors]) -> tuple[Factors, float]:
    if way.rule in COORDINATES:
        wanted = Wanted(begin.rank, like=begin)
        found = COORDINATES[way.rule](ends, wanted)
        return found, distance(found, stack(parts, ends))
    heard = [end for part, end in zip(parts, ends, strict=True) if part > 0]
    wanted = Wanted(begin.rank, like=_middle(heard if len(heard) >= FEW else [*heard, begin]))
    left = 1.0 - math.fsum(parts)
    if left > ROUNDING:  # an update that is clipped to a share of itself leaves the rest of its weight to the start
        parts, ends = [*parts, left], [*ends, begin]
    return METHODS[way.method](parts, ends, wanted)


def _middle(ends: Sequence[Factors]) -> Factors:
    """Number by number the median: where training went. One who came by other factors pulls it nowhere; of one or two
    none does, as the start is heard beside them."""
    return Factors(np.median([end.b for end in ends], axis=0), np.median([end.a for end in ends], axis=0))


def _judged(begins: Mapping[str, Factors], updates: Sequence[Update]) -> Judged:
    inner = np.zeros((len(updates), len(updates)))
    for module, begin in begins.items():
        inner += inner_products(begin, [_end(begin, update.delta, module) for update in updates])
    return Judged([update.weight for update in updates], inner)


def _end(begin: Factors, delta: Adapter, module: str) -> Factors:
    return Factors(begin.b + delta[module + B_SUFFIX], begin.a + delta[module + A_SUFFIX])


def _outer(way: Merge, start: Adapter, merged: Adapter, before: Adapter | None) -> Adapter:
    """From `start` the outer learning rate times the merge's own step, and on in the last round's direction.

    Polyak's heavy ball (1964), which for a constant rate is SGD with momentum, as DiLoCo's outer optimizer
    (arXiv 2311.08105) but without its look-ahead: all it needs are adapters that are published anyhow.
    """
    if way.outer_learning_rate == 1.0 and not way.outer_momentum:
        return dict(sorted(merged.items()))
    found: Adapter = {}
    for name in sorted(start):
        begin = start[name].astype(np.float64)
        next_ = begin + way.outer_learning_rate * (merged[name] - begin)
        if before is not None:
            next_ += way.outer_momentum * (begin - before[name])
        found[name] = next_.astype(np.float32)
    return found


def _check(start: Adapter, updates: Sequence[Update]) -> None:
    if not updates or any(update.weight <= 0 for update in updates):
        raise TrainChainError("merge.unmergeable", "There is nothing to merge: every update needs a weight above zero.")
    for update in updates:
        if set(update.delta) != set(start):
            raise TrainChainError(
                "merge.unmergeable", f"Update {update.digest} has other tensors than the start adapter."
            )
        for name, tensor in update.delta.items():
            if tensor.shape != start[name].shape or not np.isfinite(tensor).all():
                raise TrainChainError(
                    "merge.unmergeable", f"Update {update.digest}: {name} has another shape or is not finite."
                )
