"""What holds of a contribution that comes late, whatever it was trained from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures_merge import PLAIN_MERGE
from trainchain.core.adapter import A_SUFFIX, B_SUFFIX, Adapter
from trainchain.core.merge.lowrank import Matrix
from trainchain.core.merge.robust import Share
from trainchain.core.merge.updates import Update, merge

seeds = st.integers(0, 2**32 - 1)
OUT, IN, RANK = 20, 30, 4


def adapter(b: np.ndarray, a: np.ndarray) -> Adapter:
    return {"one" + B_SUFFIX: b.astype(np.float32), "one" + A_SUFFIX: a.astype(np.float32)}


def product(of: Adapter) -> Matrix:
    found: Matrix = of["one" + B_SUFFIX].astype(np.float64) @ of["one" + A_SUFFIX].astype(np.float64)
    return found


def change(start: Adapter, delta: Adapter) -> Matrix:
    return product({name: start[name] + delta[name] for name in start}) - product(start)


@pytest.mark.parametrize("rule", ["none", "clip", "gate", "multi-krum"])
@settings(deadline=None, max_examples=30)
@given(seed=seeds, by=st.floats(1.5, 100))
def test_what_was_nothing_where_it_was_judged_is_no_longer_here_than_others(rule: str, seed: int, by: float) -> None:
    """In the first round, whose B is zero, a change of A alone is none; in the next one it is."""
    random = np.random.default_rng(seed)
    start = adapter(random.normal(size=(OUT, RANK)), random.normal(size=(RANK, IN)))
    shared = random.normal(size=(OUT, RANK)), random.normal(size=(RANK, IN))
    own = [adapter(*(0.1 * part + 0.05 * random.normal(size=part.shape) for part in shared)) for _ in range(4)]
    late = adapter(np.zeros((OUT, RANK)), by * random.normal(size=(RANK, IN)))
    updates = [Update(str(at), 1.0, delta) for at, delta in enumerate(own)]

    found = merge(
        PLAIN_MERGE.model_copy(update={"rule": rule}), start, [*updates, Update("late", 0.5, late, share=Share())]
    )

    share = found.shares["late"]
    if rule == "none":
        assert share == Share()
    else:
        assert share.weight == 1.0
        assert share.why == "clipped"
        kept = [n for n in range(4) if found.shares[str(n)].weight > 0]
        usual = float(np.median([np.linalg.norm(change(start, own[n])) for n in kept]))
        assert share.scale * np.linalg.norm(change(start, late)) == pytest.approx(usual, rel=1e-4)
