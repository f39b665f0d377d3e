"""The ways to be paid for work that was not done, or not as it was asked for: each makes a claim for one shard."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache

import numpy as np

from tests.attacks.crooked import Crooked, dropping, halved, poisoned, repeated, wrong_data
from tests.attacks.lab import OTHER_LEASE, Claim, Lab, between, rounded
from trainchain.core.segments import State, Tensors, state_root

Cheat = Callable[[Lab], Claim]


def honest(lab: Lab) -> Claim:
    return lab.claim(lab.honest(), ())


def everywhere(lab: Lab) -> Sequence[int]:
    return range(lab.count)


def last(share: float) -> Callable[[Lab], Sequence[int]]:
    """The last of the segments, so many that they are this share of the shard."""
    return lambda lab: range(lab.count - round(share * lab.count), lab.count)


def noise(size: float, where: Callable[[Lab], Sequence[int]] = everywhere) -> Cheat:
    """A free rider: nothing is trained; each state is the one before and noise, `size` of a segment's usual change."""

    def cheat(lab: Lab) -> Claim:
        random = np.random.default_rng(3)
        usual = _change(lab.honest()[0], lab.honest()[1])

        def forge(state: State, segment: int) -> State:
            def with_noise(tensors: Tensors, length: dict[str, float]) -> dict[str, np.ndarray]:
                found = {}
                for name, tensor in tensors.items():
                    drawn = random.standard_normal(tensor.shape)
                    found[name] = (tensor + size * length[name] * drawn / np.linalg.norm(drawn)).astype(np.float32)
                return found

            w, m = with_noise(state.w, usual), with_noise(state.m, {name: 0.01 * x for name, x in usual.items()})
            v = {name: np.square(x) for name, x in m.items()}
            return rounded(State(lab.bounds[segment + 1], w, m, v))

        return lab.claim(lab.chain(forge, where(lab)), where(lab))

    return cheat


def frozen(lab: Lab) -> Claim:
    """Nothing is trained and nothing moves."""
    return lab.claim(
        lab.chain(lambda state, at: replace(state, t=lab.bounds[at + 1]), everywhere(lab)), everywhere(lab)
    )


def lazy(share: float) -> Cheat:
    """The rest of the shard goes on in the direction of the last segment that was trained, in a straight line."""

    def cheat(lab: Lab) -> Claim:
        forged = last(share)(lab)
        states = lab.honest()[: forged[0] + 1]
        before, end = states[-2], states[-1]
        for at, segment in enumerate(forged, 1):
            states = [*states, between(before, end, 1 + at, lab.bounds[segment + 1])]
        states = [replace(state, m=end.m, v=end.v) if at > forged[0] else state for at, state in enumerate(states)]
        return lab.claim(states, forged)

    return cheat


def cheap_end(lab: Lab) -> Claim:
    """One segment is trained and stretched to a shard's length; the states are on the straight line to there."""
    first, second = lab.honest()[:2]
    further = [between(first, second, at, lab.bounds[at]) for at in range(2, lab.count + 1)]
    return lab.claim(
        [first, second, *(replace(state, m=second.m, v=second.v) for state in further)], range(1, lab.count)
    )


def straight_middle(lab: Lab) -> Claim:
    """The honest start and the honest end, and between them a straight line."""
    first, end = lab.honest()[0], lab.honest()[-1]
    middle = [between(first, end, at / lab.count, lab.bounds[at]) for at in range(1, lab.count)]
    return lab.claim([first, *middle, end], everywhere(lab))


def broken_middle(lab: Lab) -> Claim:
    """All states are honest but one in the middle, which is of another shard: no segment leads to it or from it."""
    states, at = list(lab.honest()), lab.count // 2
    states[at] = lab.honest(lab.shard + 1)[at]
    return lab.claim(states, (at - 1, at))


def stretched(lab: Lab) -> Claim:
    """Half the steps of each segment, and their change twice."""

    def forge(state: State, segment: int) -> State:
        steps, end = lab.steps(segment), lab.bounds[segment + 1]
        half = lab.engine.some_steps(state, lab.round, lab.shard, steps[: len(steps) // 2], end)
        return between(state, half, len(steps) / (len(steps) // 2), end)

    return lab.claim(lab.chain(forge, everywhere(lab)), everywhere(lab))


def skipped_step(lab: Lab) -> Claim:
    """One step of each segment is left out."""

    def forge(state: State, segment: int) -> State:
        steps = lab.steps(segment)[1:]
        return lab.engine.some_steps(state, lab.round, lab.shard, steps, lab.bounds[segment + 1])

    return lab.claim(lab.chain(forge, everywhere(lab)), everywhere(lab))


def reordered(lab: Lab) -> Claim:
    """A segment's steps, last first."""

    def forge(state: State, segment: int) -> State:
        steps, plan = lab.steps(segment), lambda plan: replace(plan, steps=_backwards(plan.steps, lab.steps(segment)))
        with lab.engine.bent(plan):
            return lab.engine.some_steps(state, lab.round, lab.shard, steps, lab.bounds[segment + 1])

    return lab.claim(lab.chain(forge, everywhere(lab)), everywhere(lab))


def within(way: Callable[[Crooked, Lab], AbstractContextManager[None]]) -> Cheat:
    """All of the shard, trained in another way."""

    def cheat(lab: Lab) -> Claim:
        def forge(state: State, segment: int) -> State:
            with way(lab.engine, lab):
                return lab.train(state, segment)

        return lab.claim(lab.chain(forge, everywhere(lab)), everywhere(lab))

    return cheat


def on_another_base(engine: Callable[[Lab], Crooked]) -> Cheat:
    """All of the shard, trained by another engine than the recipe's."""

    def cheat(lab: Lab) -> Claim:
        other = engine(lab)
        return lab.claim(lab.chain(lambda state, at: lab.train(state, at, other), everywhere(lab)), everywhere(lab))

    return cheat


def scaled(by: float) -> Cheat:
    """Each segment's honest change, so many times; -1 turns it round."""

    def cheat(lab: Lab) -> Claim:
        def forge(state: State, segment: int) -> State:
            end = lab.train(state, segment)
            w = {name: (state.w[name] + by * (end.w[name] - state.w[name])).astype(np.float32) for name in end.w}
            return replace(end, w=w)

        return lab.claim(lab.chain(forge, everywhere(lab)), everywhere(lab))

    return cheat


def turned_gradients(lab: Lab) -> Claim:
    """The loss is climbed: what each segment adds to parameters and first moment, the other way."""

    def forge(state: State, segment: int) -> State:
        end, kept = lab.train(state, segment), lab.recipe.training.adam_beta1 ** len(lab.steps(segment))
        w = {name: 2 * state.w[name] - end.w[name] for name in end.w}
        m = {name: np.float32(2 * kept) * state.m[name] - end.m[name] for name in end.m}
        return rounded(State(end.t, w, m, end.v))

    return lab.claim(lab.chain(forge, everywhere(lab)), everywhere(lab))


def copied(lab: Lab) -> Claim:
    """What another worker trained for another shard, under one's own lease."""
    return lab.claim(lab.honest(lab.shard + 1), everywhere(lab))


def last_round(lab: Lab) -> Claim:
    """What was trained for the round before, behind this round's start."""
    states = lab.honest(round=lab.round - 1, start=_stale(lab))
    return lab.claim([lab.begin(), *states[1:]], everywhere(lab))


def stale_start(lab: Lab) -> Claim:
    """Trained from the adapter of the round before, and said so."""
    return lab.claim(lab.honest(start=_stale(lab)), (0,))


def hidden_stale_start(lab: Lab) -> Claim:
    """Trained from the adapter of the round before, behind this round's start."""
    return lab.claim([lab.begin(), *lab.honest(start=_stale(lab))[1:]], (0,))


def fresh_adam(lab: Lab) -> Claim:
    """The optimizer is begun anew in the middle of the shard."""
    at = lab.count // 2

    def forge(state: State, segment: int) -> State:
        nothing = {name: np.zeros_like(tensor) for name, tensor in state.m.items()}
        return lab.train(replace(state, m=nothing, v=nothing), segment)

    return lab.claim(lab.chain(forge, (at,)), (at,))


def other_upload(lab: Lab) -> Claim:
    """The shard is trained, and something else is handed in to be merged."""
    random = np.random.default_rng(5)
    upload = {name: random.normal(0, 1e-3, tensor.shape).astype(np.float32) for name, tensor in lab.start.items()}
    return lab.claim(lab.honest(), everywhere(lab), upload=upload)


def out_of_reach(lab: Lab) -> Claim:
    """More than the round's steps can move anything."""
    upload = {name: np.full(tensor.shape, 10.0, np.float32) for name, tensor in lab.start.items()}
    return lab.claim(lab.honest(), everywhere(lab), upload=upload)


def short_tree(lab: Lab) -> Claim:
    """The root leaves out the last state."""
    claim = lab.claim(lab.honest(), everywhere(lab))
    return replace(claim, root=state_root(claim.leaves[:-1]), leaves=claim.leaves[:-1])


def other_lease(lab: Lab) -> Claim:
    """The tree that was committed for another lease."""
    return lab.claim(lab.honest(), everywhere(lab), lease=OTHER_LEASE)


def other_leaf(lab: Lab) -> Claim:
    """Where a leaf of a segment is to be opened, the one before it is."""
    claim = lab.claim(lab.honest(), everywhere(lab))
    return replace(claim, places={at: at - 1 for at in range(1, lab.count + 1)})


def _change(one: State, other: State) -> dict[str, float]:
    return {name: float(np.linalg.norm(other.w[name] - one.w[name])) for name in one.w}


def _backwards(steps: list[list[int]], which: range) -> list[list[int]]:
    found = list(steps)
    found[which[0] - 1 : which[-1]] = found[which[0] - 1 : which[-1]][::-1]
    return found


@cache
def _stale(lab: Lab) -> State:
    """Where the round before began, as far as it matters: somewhere else."""
    w = {name: np.float32(0.5) * tensor + np.float32(0.01) for name, tensor in lab.start.items()}
    return replace(lab.begin(), w=w)


def _other_rate(times: float) -> Cheat:
    return within(lambda engine, lab: engine.trained_as(learning_rate=times * lab.recipe.training.learning_rate))


FULL: dict[str, Cheat] = {
    "free rider, noise 0.01": noise(0.01),
    "free rider, noise 1": noise(1.0),
    "free rider, noise 3": noise(3.0),
    "frozen": frozen,
    "honest ends, straight middle": straight_middle,
    "half the steps, stretched": stretched,
    "a step of each segment skipped": skipped_step,
    "steps reordered": reordered,
    "wrong data": within(lambda engine, lab: engine.bent(wrong_data)),
    "repeated data": within(lambda engine, lab: engine.bent(repeated)),
    "other slice": within(lambda engine, lab: engine.elsewhere(lab.round, lab.shard + 1)),
    "half the batch": within(lambda engine, lab: engine.bent(dropping(1 / 2))),
    "an eighth of the batch dropped": within(lambda engine, lab: engine.bent(dropping(1 / 8))),
    "half the tokens": within(lambda engine, lab: engine.bent(halved)),
    "learning rate x1.5": _other_rate(1.5),
    "learning rate x0.5": _other_rate(0.5),
    "learning rate x0.9": _other_rate(0.9),
    "sign flip": scaled(-1.0),
    "sign flip, with its moment": turned_gradients,
    "scaled x1.1": scaled(1.1),
    "scaled x2": scaled(2.0),
    "scaled x10": scaled(10.0),
    "copy of another's work": copied,
    "last round's work, behind the right start": last_round,
    "labels poisoned, all": within(lambda engine, lab: engine.bent(poisoned(1))),
    "labels poisoned, an eighth": within(lambda engine, lab: engine.bent(poisoned(8))),
    "a layer skipped": within(lambda engine, lab: engine.without_layer(0)),
}
"""Every segment is forged."""

PARTIAL: dict[str, Cheat] = {
    "lazy, a quarter": lazy(0.25),
    "lazy, half": lazy(0.5),
    "lazy, three quarters": lazy(0.75),
    "straight line to a cheap end": cheap_end,
    "free rider for half": noise(1.0, last(0.5)),
    "trained from a stale start, behind the right one": hidden_stale_start,
    "one state of another chain": broken_middle,
    "fresh Adam in the middle": fresh_adam,
}
"""Some segments are forged, and the others do follow from one another."""

STRUCTURAL: dict[str, tuple[Cheat, str]] = {
    "stale start": (stale_start, "audit.wrong_start"),
    "honest training, other upload": (other_upload, "audit.wrong_delta"),
    "upload out of reach": (out_of_reach, "delta.out_of_reach"),
    "root over n - 1 leaves": (short_tree, "audit.silent"),
    "tree of another lease": (other_lease, "audit.silent"),
    "opening of another leaf": (other_leaf, "audit.silent"),
}
"""Whatever segment is drawn, hashes say so. Who cannot open a leaf has no answer."""
