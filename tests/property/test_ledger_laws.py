"""The ledger adds up: whatever was paid, settled and vested, the parts of each shard make its amount."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trainchain.cli.ledger import PARTS, _but, _divide, _fees, sums
from trainchain.core.messages import Lost, Verdicts
from trainchain.core.rewards import VESTING

SHARED = {"job": "0x01", "name": "tiny", "hub": "http://127.0.0.1", "token": "0x02"}
amounts = st.lists(st.integers(0, 10**30), max_size=30)
marks = st.tuples(*[st.integers(0, 10**31)] * 3)


def shards(amounts: list[int]) -> list[dict[str, Any]]:
    return [
        {"round": 1, "shard": place, "place": place, "lease": "0x", "accepted": amount, "receipt": "", "at": 0.0}
        for place, amount in enumerate(amounts, 1)
    ]


@given(amounts=amounts, marks=marks)
def test_every_unit_is_in_one_place(amounts: list[int], marks: tuple[int, int, int]) -> None:
    rows = _divide(shards(amounts), dict(SHARED), marks, "not settled yet", "", Verdicts(forfeited=[]))

    paid, ready, vested = marks
    ready = max(paid, ready)
    vested = max(ready, vested)
    total = sum(amounts)
    assert sums(rows) == {
        "accepted": total,
        "forfeited": 0,
        "held": 0,
        "vesting": max(0, total - vested),
        "settling": min(total, vested) - min(total, ready),
        "claimable": min(total, ready) - min(total, paid),
        "claimed": min(total, paid),
    }
    for row in rows:
        parts = [getattr(row, part) for part in PARTS[1:]]
        assert min(parts) >= 0
        assert sum(parts) == row.accepted
        assert bool(row.reason) == (row.accepted > row.claimed)


@given(amounts=st.lists(st.integers(1, 10**30), min_size=1, max_size=30))
def test_who_waits_is_told_how_long(amounts: list[int]) -> None:
    vested = sum(amounts[: max(0, len(amounts) - VESTING)])

    rows = _divide(shards(amounts), dict(SHARED), (0, 0, vested), "not settled yet", "", Verdicts(forfeited=[]))

    waiting = [row for row in rows if row.vesting]
    assert len(waiting) == min(VESTING, len(amounts))
    last = [int(row.reason.split()[2]) for row in waiting]
    assert last == list(range(VESTING - len(waiting) + 1, VESTING + 1))


LOST = "0x" + "ab" * 32


@given(amounts=amounts, marks=marks, data=st.data())
def test_what_is_forfeited_or_held_is_in_one_place_too(
    amounts: list[int], marks: tuple[int, int, int], data: st.DataObject
) -> None:
    first = data.draw(st.integers(1, max(1, len(amounts))))
    last = data.draw(st.integers(first, first + 10))
    lost = Lost(first=first, last=last, lease=LOST, code="audit.differs", evidence=None)
    waits = data.draw(st.one_of(st.none(), st.integers(last + 1, last + 9)))
    verdicts = Verdicts(through=len(amounts), waits=waits, forfeited=[lost])

    rows = _divide(shards(amounts), dict(SHARED), marks, "not settled yet", "", verdicts)

    gone = sum(amounts[first - 1 : last])
    found = sums(rows)
    assert found["forfeited"] == gone
    assert sum(found.values()) == 2 * sum(amounts)
    assert not found["held" if waits is None else "vesting"]
    for row in rows:
        parts = [getattr(row, part) for part in PARTS[1:]]
        assert min(parts) >= 0
        assert sum(parts) == row.accepted
        assert (row.forfeited > 0) == (first <= row.place <= last and row.accepted > 0)
        assert not row.forfeited or "(audit.differs): trainchain jobs show 0x01 --evidence 0xabab" in row.reason


@given(amounts=amounts, fees=st.tuples(*[st.integers(0, 10**31)] * 3), cuts=marks, ripe=st.integers(0, 10**31))
def test_a_job_s_fees_are_a_line_of_their_own_and_nothing_counts_twice(
    amounts: list[int], fees: tuple[int, int, int], cuts: tuple[int, int, int], ripe: int
) -> None:
    """`ripe` of the shards' pay has vested with the fees, and no more than that was settled or paid."""
    vested_fees, waiting, lost = fees
    ripe = min(ripe, sum(amounts))
    vested = ripe + vested_fees
    paid, ready, _ = sorted(min(cut, vested) for cut in cuts)
    whole = paid, ready, vested
    told = {"replays": 3, "accepted": str(sum(fees)), "vested": str(vested_fees), "forfeited": str(lost), "last": 1.0}

    none = Verdicts(forfeited=[])
    rows = _divide(shards(amounts), dict(SHARED), _but(whole, vested_fees, vested), "not settled yet", "", none)
    (line,) = _fees(told, dict(SHARED), whole, "not settled yet", vested)

    parts = [getattr(line, part) for part in PARTS[1:]]
    assert min(parts) >= 0
    assert sum(parts) == line.accepted == sum(fees)
    assert (line.forfeited, line.vesting) == (lost, waiting)
    every = sums([*rows, line])
    assert every["claimed"] == paid
    assert every["claimed"] + every["claimable"] == ready
    assert every["claimed"] + every["claimable"] + every["settling"] == vested
