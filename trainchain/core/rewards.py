"""What work is worth, and when it is paid: pure integer functions of the recipe's pinned counts and of what was
accepted, so that anyone can recompute a settlement."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from trainchain.core.models import ResolvedRecipe

VESTING = 9
"""How many accepted shards of the same wallet in the same job a shard's pay waits for, unless the job ends before."""


class Earned(NamedTuple):
    """An accepted shard: `place` is its place among its worker's in this job, from 1 on in the order of acceptance;
    `counted` the round whose settlement it belongs to: its own or, where it came late, the one that took it in."""

    round: int
    shard: int
    worker: str
    place: int
    amount: int
    counted: int


class Terms(NamedTuple):
    """What a settlement says of itself: its number (the last round it can count; after a job's end they go on
    counting), whether the job had ended, so that everything is vested, and by how much it could raise the total."""

    number: int
    ended: bool
    limit: int


def vested(rows: Iterable[Earned], terms: Terms) -> list[Earned]:
    """What has vested for a settlement, by round and shard: all but the last `VESTING` places of every worker among
    what counts by then, and all that was accepted once the job has ended."""
    if terms.ended:
        return sorted(rows)
    counted = sorted((row for row in rows if row.counted <= terms.number), key=lambda row: -row.place)
    held: dict[str, int] = {}
    found = []
    for row in counted:
        held[row.worker] = held.get(row.worker, 0) + 1
        if held[row.worker] > VESTING:
            found.append(row)
    return sorted(found)


def added(rows: Iterable[Earned], settled: Iterable[tuple[int, int]], terms: Terms) -> list[Earned]:
    """What the next settlement adds to what is `settled` (rounds and shards): of the vested, the earliest first, all
    that its limit has room for. What is worth nothing needs no settlement."""
    before, left = set(settled), terms.limit
    found = []
    for row in vested(rows, terms):
        if (row.round, row.shard) not in before and 0 < row.amount <= left:
            found.append(row)
            left -= row.amount
    return found


def totals(rows: Iterable[Earned]) -> dict[str, int]:
    """Token units by worker."""
    owed: dict[str, int] = {}
    for row in rows:
        owed[row.worker] = owed.get(row.worker, 0) + row.amount
    return owed


def recount(rows: Sequence[Earned], settlements: Iterable[Terms]) -> list[dict[str, int]]:
    """What each of a job's settlements, in their order, owes every worker in all; without those it owes nothing."""
    settled: list[Earned] = []
    found = []
    for terms in settlements:
        settled += added(rows, {(row.round, row.shard) for row in settled}, terms)
        found.append({worker: amount for worker, amount in totals(settled).items() if amount})
    return found


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
