"""How many tokens go through the model at once, by what did not fit on this machine."""

from trainchain.core.messages import Lease
from trainchain.core.models import ResolvedRecipe


def usual_tokens(recipe: ResolvedRecipe) -> int:
    """How many tokens go through the model at once where nobody says otherwise."""
    return recipe.training.micro_batch_size * recipe.training.sequence_len


def at_most(recipe: ResolvedRecipe, tokens: int | None) -> int | None:
    """No more than a whole batch: what is beyond it splits nothing otherwise, whoever asks for it."""
    return None if tokens is None else min(tokens, recipe.training.batch_size * recipe.training.sequence_len)


class Splits:
    """`tokens` is what shards are trained with, the child's own choice by default; a replay's lease says its own.

    What did not fit is kept by what was asked: a lease that asks for nonsense teaches nothing about any other.
    """

    def __init__(self, tokens: int | None) -> None:
        self._tokens = tokens
        self._fitting: dict[tuple[str, bool, int | None], int] = {}

    def at_once(self, lease: Lease) -> int | None:
        """Of a replay as many as its worker's, where they fit."""
        return self._fitting.get(self._key(lease), self._asked(lease))

    def halve(self, lease: Lease, recipe: ResolvedRecipe) -> int:
        """What is tried next; 1, a row at a time, is the least."""
        half = max(1, (at_most(recipe, self.at_once(lease)) or usual_tokens(recipe)) // 2)
        self._fitting[self._key(lease)] = half
        return half

    def _asked(self, lease: Lease) -> int | None:
        return lease.micro_tokens if lease.kind == "replay" else self._tokens

    def _key(self, lease: Lease) -> tuple[str, bool, int | None]:
        return lease.job, lease.kind == "replay", self._asked(lease)
