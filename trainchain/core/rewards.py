"""What work is worth, and when it is paid: pure integer functions of the recipe's pinned counts and of what was
accepted, so that anyone can recompute a settlement."""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import takewhile
from typing import Literal, NamedTuple

from trainchain.core.models import ResolvedRecipe

VESTING = 9
"""How many accepted shards of the same wallet in the same job a shard's pay waits for, unless the job ends before."""
FEES_VESTING = 20
"""How many later replays of the same auditor in the same job a replay's fee waits for."""
WAITS = {"shard": VESTING, "replay": FEES_VESTING}
NEVER = 2**63 - 1
LATEST = NEVER - 1
"""The number of a settlement that would know all that is known by now: what a voucher goes by."""

Key = tuple[str, int, int, str]
"""Kind, round, shard and worker: of one earning, in one job."""


class Earned(NamedTuple):
    """An accepted shard, or a replay of one: `place` is its place among its worker's of the kind in this job, from 1 on
    in the order of acceptance.

    The others are numbers of settlements, the first that may count with what they say: `counted` with the earning (for
    a shard its own round or, where it came late, the one that took it in), `resolved` with its standing (0: no audit
    was drawn; `NEVER`: no verdict yet), `forfeited` with its being forfeited.
    """

    round: int
    shard: int
    worker: str
    place: int
    amount: int
    counted: int
    kind: Literal["shard", "replay"] = "shard"
    resolved: int = 0
    forfeited: int = NEVER

    @property
    def key(self) -> Key:
        return self.kind, self.round, self.shard, self.worker


class Terms(NamedTuple):
    """What a settlement says of itself: its number (the last round it can count; after a job's end they go on
    counting), whether the job had ended, so that everything is vested, and by how much it could raise the total."""

    number: int
    ended: bool
    limit: int


def vested(rows: Iterable[Earned], terms: Terms) -> list[Earned]:
    """What has vested for a settlement, by round and shard.

    Of every worker what stands, in its order, up to the first that has no verdict yet, but for the last `VESTING`; all
    of it once the job has ended. What was left standing when something later was forfeited had vested before.
    """
    found: list[Earned] = []
    for queue in _queues(rows):
        before, ripe, _ = _parts(queue, terms.number)
        ripe = [row for row in ripe if _counts(row, terms)]
        found += [row for row in before if _counts(row, terms)]
        found += ripe if terms.ended else ripe[: -WAITS[queue[0].kind]]
    return sorted(found)


def forfeits(queue: Iterable[Earned]) -> list[Earned]:
    """What a verdict against anything in a worker's queue of one kind costs it: all that has not vested by now.

    That is everything from the first on that has no verdict yet, and the last `VESTING` before it; never what came
    before an earlier forfeit.
    """
    found: list[Earned] = []
    for rows in _queues(queue):
        _, ripe, rest = _parts(rows, LATEST)
        found += [*ripe[-WAITS[rows[0].kind] :], *rest]
    return found


def _queues(rows: Iterable[Earned]) -> list[list[Earned]]:
    """Every worker's earnings of each kind, in the order in which they were accepted."""
    queues: dict[tuple[str, str], list[Earned]] = {}
    for row in sorted(rows, key=lambda row: row.place):
        queues.setdefault((row.kind, row.worker), []).append(row)
    return list(queues.values())


def _parts(queue: list[Earned], number: int) -> tuple[list[Earned], list[Earned], list[Earned]]:
    """Of what stands in a queue by settlement `number`: what came before the last forfeit, what followed up to the
    first that has no verdict, and the rest."""
    lost = max((row.place for row in queue if row.forfeited <= number), default=0)
    standing = [row for row in queue if row.forfeited > number]
    after = [row for row in standing if row.place > lost]
    ripe = list(takewhile(lambda row: row.resolved <= number, after))
    return [row for row in standing if row.place < lost], ripe, after[len(ripe) :]


def _counts(row: Earned, terms: Terms) -> bool:
    return terms.ended or row.counted <= terms.number


def added(rows: Iterable[Earned], settled: Iterable[Key], terms: Terms) -> list[Earned]:
    """What the next settlement adds to what is `settled`: of the vested, the earliest first, all that its limit has
    room for. What is worth nothing needs no settlement."""
    before, left = set(settled), terms.limit
    found = []
    for row in vested(rows, terms):
        if row.key not in before and 0 < row.amount <= left:
            found.append(row)
            left -= row.amount
    return found


def at_risk(place: int, forfeited: int) -> int:
    """How many shards a verdict against the one at `place` would cost at least, itself included: from 1 to 10.
    `forfeited` is the last place that was forfeited before, 0 if none was."""
    return min(place - forfeited, VESTING + 1)


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
        settled += added(rows, {row.key for row in settled}, terms)
        found.append({worker: amount for worker, amount in totals(settled).items() if amount})
    return found


def shard_reward(recipe: ResolvedRecipe, round_: int, shard: int) -> int:
    """Token units for one accepted shard: its pinned tokens times the price, rounded down once."""
    tokens = recipe.counts[round_ - 1][shard].tokens
    return tokens * recipe.pay.per_million_tokens // 1_000_000


def replay_fee(recipe: ResolvedRecipe, round_: int, shard: int, segment: int) -> int:
    """Token units for replaying one segment: of the shard's pay the segment's part in its steps, rounded down once."""
    length = recipe.training.segment_steps
    steps = min(length, recipe.steps - segment * length)
    return shard_reward(recipe, round_, shard) * steps // recipe.steps


def audit_price(recipe: ResolvedRecipe, round_: int) -> int:
    """The most that a round's audits can cost."""
    spend = Fraction(str(recipe.check.spend)) if recipe.audited else Fraction(0)
    return int(spend * sum(_rewards(recipe, round_)))


def round_price(recipe: ResolvedRecipe, round_: int) -> int:
    """The most that one round can cost: all its shards, all its spare shards, and their audits."""
    return sum(_rewards(recipe, round_)) + audit_price(recipe, round_)


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
