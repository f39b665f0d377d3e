"""What a failure's code means for the worker: wait, try with less, begin anew, or leave the job alone."""

AWAY = frozenset({"hub.unreachable", "hub.failed", "chain.unreachable"})
TOO_LARGE = frozenset({"train.out_of_memory", "train.child_died"})
"""What a smaller micro-batch may help against: the memory of a GPU, or of the machine, whose system kills the child."""
UNABLE = frozenset(
    {
        "access.denied",
        "cache.full",
        "key.invalid",
        "model.unreadable",
        "seal.broken",
        "source.forbidden",
        "source.gated",
        "source.incomplete",
        "source.needs_extra",
        "source.not_found",
        "source.token",
        "source.unsafe",
        "source.unsupported",
        "train.unsupported",
    }
)
"""What will be no other the next time: such a job is left alone, so that others are trained meanwhile."""
MOST_SKIPPED = 64
SPOILED = frozenset({"train.diverged", "state.invalid"})
"""After these nothing is trained on from the states that lie there."""
DISHONEST = frozenset({"draw.invalid", "receipt.invalid", "voucher.invalid"})
"""The hub does not promise what it owes, or how it draws: nobody works on for it before a person has looked."""
