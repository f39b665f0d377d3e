"""What follows from the replays of an audit. Pure: a hub decides with it, and anyone can decide again.

One replay is never a rejection. What differs from the claim goes to another, independent auditor; two that agree with
each other and not with the claim reject it; where nothing is certain the work stands.

Who got what the operator got cannot be outvoted: that takes the same training, and to agree with the claim takes none.
A worker who has not earned to audit can confirm the operator, and no more. An owner, who gains by a rejection, needs
the operator beside it: anybody else may be a wallet of its own.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import combinations
from typing import Literal, NamedTuple

MOST_REPLAYS = 3
"""Of those who decide; and as many of those who confirm."""


Role = Literal["earned", "operator", "owner", "confirms"]
"""Why an auditor is one: ten vested shards in the job; being the hub's operator; being the owner, who gains by a
rejection; or none of these."""


class Replayed(NamedTuple):
    """One auditor's replay beside the claim."""

    auditor: str
    role: Role
    end: str
    """What was got, as a leaf of the claimed tree."""
    equal: bool
    within: bool | None
    """Of the recipe's tolerance; None where it was not compared, which equal ends need not be."""


class Decision(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    MORE = "more"
    """Another replay is wanted."""
    UNDECIDED = "undecided"
    """And nobody else will know better."""


def decide(replays: Sequence[Replayed], alike: Callable[[int, int], bool]) -> Decision:
    """What the replays say together. `alike(i, j)` is whether the ends that i and j got are within the tolerance of
    each other, of those that are not equal."""
    votes = [replay.equal or bool(replay.within) for replay in replays]
    against = [at for at, vote in enumerate(votes) if not vote]
    deciding = [at for at, replay in enumerate(replays) if replay.role != "confirms"]
    speaking = [at for at in deciding if votes[at]]
    doubted = any(replays[at].role == "operator" for at in against)
    if speaking and not against:
        return Decision.PASSED
    if len(speaking) > len(against) and len(speaking) > 1 and not doubted:
        return Decision.PASSED
    if any(
        _rejects(replays, pair, alike) and (_has(replays, pair, "operator") or len(against) > len(speaking))
        for pair in combinations(against, 2)
    ):
        return Decision.FAILED
    open_ = len(deciding) < MOST_REPLAYS or (doubted and len(replays) - len(deciding) < MOST_REPLAYS)
    return Decision.MORE if open_ else Decision.UNDECIDED


def contradicted(replays: Sequence[Replayed], decision: Decision) -> list[int]:
    """The replays that a verdict proves wrong: with it their auditors lose the fees that have not vested."""
    if decision not in (Decision.PASSED, Decision.FAILED):
        return []
    right = decision == Decision.PASSED
    return [at for at, replay in enumerate(replays) if (replay.equal or bool(replay.within)) is not right]


def _rejects(replays: Sequence[Replayed], pair: tuple[int, int], alike: Callable[[int, int], bool]) -> bool:
    """Two replays reject what both differ from if they agree and are of two people who may: two who have earned it, or
    the operator and anybody."""
    one, other = replays[pair[0]], replays[pair[1]]
    if one.auditor == other.auditor or one.role == other.role == "operator":
        return False
    if not _has(replays, pair, "operator") and not one.role == other.role == "earned":
        return False
    return one.end == other.end or alike(*pair)


def _has(replays: Sequence[Replayed], pair: tuple[int, int], role: Role) -> bool:
    return any(replays[at].role == role for at in pair)
