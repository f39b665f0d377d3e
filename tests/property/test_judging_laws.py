"""Whatever the losses are, judging a round ends, with no worse an adapter than the whole, and more than half remain."""

from hypothesis import given, settings
from hypothesis import strategies as st

from trainchain.core.hub.judging import MOST_LEFT_OUT, Candidate, Found, Verdict, judge


def made(names: list[str], left_out: tuple[str, ...], unused: set[str]) -> Candidate:
    rest = [name for name in names if name not in left_out]
    shares = {name: {"weight": float(name not in unused), "scale": 1.0, "why": ""} for name in rest}
    adapter = "+".join(shares)
    return Candidate(left_out, adapter, f"step to {adapter}", {adapter: 1}, 0.0, 0.0, shares)


@settings(deadline=None, max_examples=200)
@given(count=st.integers(1, 9), data=st.data(), limit=st.none() | st.floats(0, 2))
def test_judging_ends_and_never_makes_it_worse(count: int, data: st.DataObject, limit: float | None) -> None:
    names = [chr(97 + at) for at in range(count)]
    unused = data.draw(st.sets(st.sampled_from(names), max_size=max(0, count - 1)))
    found: list[Found] = []
    measured_until = data.draw(st.integers(0, 60) | st.just(1000))
    for _ in range(2 + MOST_LEFT_OUT):
        waiting = any(one.loss is None for one in found) or limit is None
        verdict = judge(found, limit, waiting=waiting, patient=False)
        if verdict.chosen is not None:
            break
        assert verdict.wanted
        for left_out in verdict.wanted:
            loss = data.draw(st.floats(0, 3)) if len(found) < measured_until else None
            found.append(Found(made(names, left_out, unused), loss))
    chosen = verdict.chosen
    assert chosen is not None
    whole = found[0]
    left_out = chosen.candidate.left_out
    assert len(left_out) <= MOST_LEFT_OUT
    assert not left_out or 2 * (count - len(left_out)) > count
    assert not set(left_out) & unused
    if whole.loss is None or limit is None:
        assert (chosen, verdict.why) == (whole, "unjudged")
    else:
        assert chosen.loss is not None
        assert chosen.loss <= whole.loss
        assert (verdict.why == "held") == (chosen.loss <= limit)
        if whole.loss <= limit:
            assert chosen == whole


def test_while_somebody_may_still_measure_it_the_round_waits() -> None:
    whole = Found(made(["a", "b", "c"], (), set()), None)

    assert judge([whole], 1.0, waiting=True, patient=True) == Verdict()
    assert judge([whole], 1.0, waiting=True, patient=False) == Verdict(whole, why="unjudged")
