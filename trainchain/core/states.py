"""Every state and every legal move of jobs, rounds, shards, leases and audits. Standard library only."""

from enum import StrEnum


class Job(StrEnum):
    UNFUNDED = "unfunded"
    """Published; the escrow does not cover the next round, so none opens."""
    OPEN = "open"
    """Funded; its first round is about to open."""
    RUNNING = "running"
    FINISHED = "finished"
    """All rounds merged; the last settlement is under way."""
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    SETTLED = "settled"
    """What is owed stands on chain."""
    CLOSED = "closed"


ENDED = frozenset({Job.FINISHED, Job.CANCELLED, Job.EXPIRED, Job.SETTLED, Job.CLOSED})
"""No shard is lent any more, and only what is held may still come."""
TESTED = frozenset({Job.SETTLED, Job.CLOSED})
"""No auditor is put to the test any more."""


class Round(StrEnum):
    OPEN = "open"
    MERGING = "merging"
    MERGED = "merged"


class Shard(StrEnum):
    OPEN = "open"
    LEASED = "leased"
    CONTRIBUTED = "contributed"
    """A signed contribution passed the cheap checks; its verdict is due."""
    ACCEPTED = "accepted"
    ABANDONED = "abandoned"
    """Nothing is accepted for it any more: nobody had it when its round closed, or the next round has closed too."""


UNDONE = frozenset({Shard.OPEN, Shard.LEASED})
"""A contribution may still be accepted for it."""


class Lease(StrEnum):
    HELD = "held"
    DONE = "done"
    EXPIRED = "expired"


class Evaluation(StrEnum):
    OPEN = "open"
    LEASED = "leased"
    DONE = "done"


class Audit(StrEnum):
    DRAWN = "drawn"
    """The worker owes states and openings; where it has answered, the end of a segment that a replay differs from."""
    ANSWERED = "answered"
    """Replays are wanted."""
    PASSED = "passed"
    FAILED = "failed"
    UNAUDITED = "unaudited"
    """Nobody could say: the work is accepted and paid."""
    VOID = "void"
    """What it was about is forfeited already."""


PENDING = frozenset({Audit.DRAWN, Audit.ANSWERED})
"""No verdict yet: nothing of its worker's vests from there on."""


MOVES: dict[type[StrEnum], dict[StrEnum, frozenset[StrEnum]]] = {
    Job: {
        Job.UNFUNDED: frozenset({Job.OPEN, Job.RUNNING, Job.CANCELLED, Job.EXPIRED}),
        Job.OPEN: frozenset({Job.RUNNING, Job.UNFUNDED, Job.CANCELLED, Job.EXPIRED}),
        Job.RUNNING: frozenset({Job.FINISHED, Job.UNFUNDED, Job.CANCELLED, Job.EXPIRED}),
        Job.FINISHED: frozenset({Job.SETTLED}),
        Job.CANCELLED: frozenset({Job.SETTLED}),
        Job.EXPIRED: frozenset({Job.SETTLED}),
        Job.SETTLED: frozenset({Job.CLOSED}),
        Job.CLOSED: frozenset(),
    },
    Round: {
        Round.OPEN: frozenset({Round.MERGING}),
        Round.MERGING: frozenset({Round.MERGED}),
        Round.MERGED: frozenset(),
    },
    Shard: {
        Shard.OPEN: frozenset({Shard.LEASED, Shard.CONTRIBUTED, Shard.ABANDONED}),
        Shard.LEASED: frozenset({Shard.OPEN, Shard.CONTRIBUTED, Shard.ABANDONED}),
        Shard.CONTRIBUTED: frozenset({Shard.ACCEPTED}),
        Shard.ACCEPTED: frozenset(),
        Shard.ABANDONED: frozenset(),
    },
    Lease: {
        Lease.HELD: frozenset({Lease.DONE, Lease.EXPIRED}),
        Lease.EXPIRED: frozenset({Lease.DONE}),
        Lease.DONE: frozenset(),
    },
    Evaluation: {
        Evaluation.OPEN: frozenset({Evaluation.LEASED}),
        Evaluation.LEASED: frozenset({Evaluation.OPEN, Evaluation.DONE}),
        Evaluation.DONE: frozenset(),
    },
    Audit: {
        Audit.DRAWN: frozenset({Audit.ANSWERED, Audit.PASSED, Audit.FAILED, Audit.UNAUDITED, Audit.VOID}),
        Audit.ANSWERED: frozenset({Audit.DRAWN, Audit.PASSED, Audit.FAILED, Audit.UNAUDITED, Audit.VOID}),
        **{over: frozenset() for over in (Audit.PASSED, Audit.FAILED, Audit.UNAUDITED, Audit.VOID)},
    },
}
"""By kind first: equal words of two kinds are equal strings, so one flat table would mix them up."""


def check_move(before: StrEnum, after: StrEnum) -> None:
    """Raise ValueError (a bug, not an expected failure) unless `before` may become `after`."""
    if type(before) is not type(after) or after not in MOVES[type(before)][before]:
        raise ValueError(f"{type(before).__name__} cannot move from {before} to {after}")
