"""What work is worth: pure integer functions of the resolved recipe's pinned counts."""

from trainchain.core.models import ResolvedRecipe


def shard_reward(recipe: ResolvedRecipe, round_: int, shard: int) -> int:
    """Token units for one accepted shard: its pinned tokens times the price, rounded down once."""
    tokens = recipe.counts[round_ - 1][shard].tokens
    return tokens * recipe.pay.per_million_tokens // 1_000_000


def round_price(recipe: ResolvedRecipe, round_: int) -> int:
    """The most that one round can cost."""
    return sum(shard_reward(recipe, round_, shard) for shard in range(recipe.shards))


def job_price(recipe: ResolvedRecipe) -> int:
    """The most that the whole job can cost."""
    return sum(round_price(recipe, round_) for round_ in range(1, recipe.rounds + 1))


def round_cap(recipe: ResolvedRecipe) -> int:
    """The most one settlement may add for each round it covers: the dearest round's price."""
    return max(round_price(recipe, round_) for round_ in range(1, recipe.rounds + 1))
