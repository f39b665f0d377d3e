"""What work is worth: pure integer functions of the resolved recipe's pinned counts."""

import math

from trainchain.core.models import ResolvedRecipe


def shard_reward(recipe: ResolvedRecipe, round_: int, shard: int) -> int:
    """Token units for one accepted shard: its pinned tokens times the price, rounded down once."""
    tokens = recipe.counts[round_ - 1][shard].tokens
    return tokens * recipe.pay.per_million_tokens // 1_000_000


def round_price(recipe: ResolvedRecipe, round_: int) -> int:
    """The most that one round can cost: all its shards, and all its spare shards."""
    return sum(_rewards(recipe, round_))


def job_price(recipe: ResolvedRecipe) -> int:
    """The most that the whole job can cost."""
    return sum(round_price(recipe, round_) for round_ in range(1, recipe.rounds + 1))


def late_price(recipe: ResolvedRecipe, round_: int) -> int:
    """The most that can come in after the round has closed: it closes with a quorum, and that may be the cheapest."""
    late = recipe.all_shards - math.ceil(recipe.quorum * recipe.shards)
    return sum(sorted(_rewards(recipe, round_), reverse=True)[:late])


def round_cap(recipe: ResolvedRecipe) -> int:
    """The most one settlement may add: the dearest round with what came late of the one before, which an earlier
    settlement may have covered without it."""
    late = [0, *(late_price(recipe, round_) for round_ in range(1, recipe.rounds))]
    return max(round_price(recipe, round_) + late[round_ - 1] for round_ in range(1, recipe.rounds + 1))


def _rewards(recipe: ResolvedRecipe, round_: int) -> list[int]:
    return [shard_reward(recipe, round_, shard) for shard in range(recipe.all_shards)]
