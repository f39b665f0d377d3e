"""A shard as cheats and auditors see it: honest states, claims made of any states, and the real decision about them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from tests.attacks.crooked import Crooked, crooked
from trainchain.core.adapter import Adapter, delta
from trainchain.core.checks import reach, read_delta
from trainchain.core.encodings import encode
from trainchain.core.errors import TrainChainError
from trainchain.core.models import ResolvedRecipe
from trainchain.core.replays import Distances, distances
from trainchain.core.segments import (
    Moments,
    State,
    Tensors,
    bf16,
    from_bf16,
    leaf,
    proof,
    segment_ends,
    start_leaf,
    start_state,
    state_digests,
    state_root,
    verify,
)
from trainchain.core.tolerances import beyond, cold, tolerance
from trainchain.core.verdicts import Decision, Replayed, decide

LEASE, OTHER_LEASE = bytes.fromhex("ab" * 32), bytes.fromhex("cd" * 32)
Forge = Callable[[State, int], State]
"""(state that a segment starts in, its number) -> the state that is claimed to be its end."""


@dataclass(frozen=True)
class Claim:
    """What a worker hands in and holds ready: a state for every leaf, the root, the delta's bytes."""

    states: Sequence[State]
    delta: bytes
    root: str
    forged: frozenset[int]
    """The segments that did not come out of training; by the cheat's own word."""
    lease: bytes = LEASE
    places: dict[int, int] = field(default_factory=dict)
    """Which leaf is opened in another one's place."""
    leaves: Sequence[bytes] = ()


@dataclass(eq=False)
class Lab:
    """One shard of a job, with a cheat's engine; `moments` come with the start. What was replayed once is kept."""

    recipe: ResolvedRecipe
    model: Path
    data: dict[str, Path]
    start: Adapter
    moments: Moments | None = None
    round: int = 2
    shard: int = 0
    engine: Crooked = field(init=False)

    def __post_init__(self) -> None:
        self.engine = crooked(self.recipe, self.model, self.data)
        self._replayed: dict[tuple[int, bytes, int], State] = {}
        self._chains: dict[tuple[int, int, int], list[State]] = {}

    @property
    def bounds(self) -> list[int]:
        return [0, *segment_ends(self.recipe.steps, self.recipe.training.segment_steps)]

    @property
    def count(self) -> int:
        """Of segments."""
        return len(self.bounds) - 1

    def steps(self, segment: int) -> range:
        return range(self.bounds[segment] + 1, self.bounds[segment + 1] + 1)

    def begin(self) -> State:
        return start_state(self.start, self.moments)

    def train(self, state: State, segment: int, engine: Crooked | None = None) -> State:
        """A segment as the recipe says it, from any state."""
        return (engine or self.engine).replay(state, self.round, self.shard, segment)

    def honest(self, shard: int | None = None, round: int | None = None, start: State | None = None) -> list[State]:
        """All states of a shard, trained."""
        key = self.round if round is None else round, self.shard if shard is None else shard, id(start)
        if key not in self._chains:
            states = [start or self.begin()]
            for segment in range(self.count):
                states.append(self.engine.replay(states[-1], *key[:2], segment))
            self._chains[key] = states
        return self._chains[key]

    def chain(self, forge: Forge, forged: Sequence[int]) -> list[State]:
        """Segments one after the other, those `forged` in the cheat's way and the others trained."""
        states = [self.begin()]
        for segment in range(self.count):
            states.append(forge(states[-1], segment) if segment in forged else self.train(states[-1], segment))
        return states

    def claim(
        self, states: Sequence[State], forged: Sequence[int], *, upload: Adapter | None = None, lease: bytes = LEASE
    ) -> Claim:
        """Committed and encoded as an honest worker does it."""
        leaves = [leaf(lease, at, state.t, state_digests(state)) for at, state in enumerate(states)]
        data = self.encoded(states, upload)
        return Claim(states, data, state_root(leaves), frozenset(forged), LEASE, {}, leaves)

    def encoded(self, states: Sequence[State], upload: Adapter | None = None) -> bytes:
        """What is to be merged, and with it the moments where the recipe hands them on."""
        sent = delta(states[-1].w, dict(states[0].w)) if upload is None else upload
        moments = Moments(states[-1].m, states[-1].v) if self.recipe.merge.hands_on else None
        return encode(sent, self.recipe.merge.encoding, moments)

    def judge(self, claim: Claim, segment: int, engine: Crooked | None = None) -> str:
        """What becomes of the claim where this segment is drawn, and two auditors replay it: both in the worker's
        class, or with `engine`, an engine of another."""
        try:
            read_delta(claim.delta, self.recipe, {name: x.shape for name, x in self.start.items()}, self.round)
        except TrainChainError as error:
            return error.code
        for at in sorted({0, segment, segment + 1, self.count}):
            place = claim.places.get(at, at)
            path = proof(claim.leaves, place) if place < len(claim.leaves) else []
            opened = claim.states[min(place, len(claim.states) - 1)]
            if not verify(
                claim.root, leaf(LEASE, at, self.bounds[at], state_digests(opened)), at, self.count + 1, path
            ):
                return "audit.silent"
        if claim.leaves[0] != start_leaf(LEASE, self.start, self.moments):
            return "audit.wrong_start"
        if self.encoded(claim.states) != claim.delta:
            return "audit.wrong_delta"
        return self.decided(claim, segment, engine)

    def decided(self, claim: Claim, segment: int, engine: Crooked | None = None) -> str:
        replayed = self.replay(claim, segment, engine)
        end = leaf(LEASE, segment + 1, replayed.t, state_digests(replayed)).hex()
        equal = end == claim.leaves[segment + 1].hex()
        within = equal or not self.too_far(claim, segment, engine)
        two = [Replayed(auditor, "earned", end, equal, within) for auditor in ("one", "other")]
        for count in (1, 2):
            decision = decide(two[:count], lambda i, j: True)
            if decision != Decision.MORE:
                return {Decision.PASSED: "audit.passed", Decision.FAILED: "audit.differs"}[decision]
        raise AssertionError("two who got the same are enough")

    def replay(self, claim: Claim, segment: int, engine: Crooked | None = None) -> State:
        """An auditor's, from the start that was claimed; once for all auditors of a class, who get the same."""
        state = claim.states[segment]
        key = id(engine or self.engine), b"".join(state_digests(state)), segment
        if key not in self._replayed:
            self._replayed[key] = self.train(state, segment, engine)
        return self._replayed[key]

    def distances(self, claim: Claim, segment: int, engine: Crooked | None = None) -> Distances:
        training = self.recipe.training
        replayed = self.replay(claim, segment, engine)
        start, end = claim.states[segment], claim.states[segment + 1]
        return distances(start, end, replayed, beta1=training.adam_beta1, beta2=training.adam_beta2)

    def too_far(self, claim: Claim, segment: int, engine: Crooked | None = None) -> list[str]:
        """What of the distances is beyond the recipe's tolerance."""
        found = self.distances(claim, segment, engine)
        allowed = tolerance(self.recipe.training, cold=cold(start=claim.states[segment].t, fresh=self.moments is None))
        return beyond(found, allowed) + (["furthest"] if found.furthest > reach(self.recipe, self.round) else [])

    def verdicts(self, claim: Claim, engine: Crooked | None = None) -> list[str]:
        """By the segment that is drawn."""
        return [self.judge(claim, segment, engine) for segment in range(self.count)]


def between(one: State, other: State, share: float, t: int) -> State:
    """On the straight line between two states."""

    def mixed(these: Tensors, those: Tensors) -> Tensors:
        return {name: these[name] + np.float32(share) * (those[name] - these[name]) for name in these}

    v = {name: np.maximum(x, 0) for name, x in mixed(one.v, other.v).items()}
    return rounded(State(t, mixed(one.w, other.w), mixed(one.m, other.m), v))


def rounded(state: State) -> State:
    """With moments that bf16 can hold, as every state that is committed."""
    m, v = ({name: from_bf16(bf16(x)) for name, x in part.items()} for part in (state.m, state.v))
    return State(state.t, state.w, m, v)


def moved(states: Sequence[State]) -> list[float]:
    """By how much each segment changed the parameters, so that no cheat is one in name only."""
    return [
        float(np.sqrt(sum(float(np.square(end.w[name] - start.w[name]).sum()) for name in start.w)))
        for start, end in pairwise(states)
    ]
