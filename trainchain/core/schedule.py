"""The learning rate as a pure function of recipe, round and step. Standard library only."""

import math

from trainchain.core.models import ResolvedRecipe


def learning_rate(recipe: ResolvedRecipe, round: int, step: int) -> float:
    """The rate of a shard's `step` (from 1) in `round` (from 1).

    Shards of a round run side by side, so the job's clock is rounds x steps: warm-up over its first
    `warmup_steps`, then constant, or a half cosine down to zero after the last (SGDR, arXiv 1608.03983). New
    AdamW moments warm up besides, over the first `shard_warmup_steps` of a shard that begins with them.
    """
    training = recipe.training
    now, last = (round - 1) * recipe.steps + step, recipe.rounds * recipe.steps
    rate = training.learning_rate * _ramp(now, training.warmup_steps)
    if not steps_before(recipe, round):
        rate *= _ramp(step, training.shard_warmup_steps)
    if training.lr_scheduler == "cosine" and now > training.warmup_steps:
        done = (now - training.warmup_steps - 1) / max(last - training.warmup_steps, 1)
        rate *= 0.5 * (1.0 + math.cos(math.pi * done))
    return rate


def steps_before(recipe: ResolvedRecipe, round: int) -> int:
    """How many steps the moments that a shard of `round` starts with have seen: 0 where they are new."""
    return (round - 1) * recipe.steps if recipe.merge.hands_on else 0


def _ramp(step: int, steps: int) -> float:
    return min(1.0, step / max(steps, 1))
