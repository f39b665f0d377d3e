"""The ledger adds up: whatever was paid, settled and vested, the parts of each shard make its amount."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trainchain.cli.ledger import PARTS, _divide, sums
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
    rows = _divide(shards(amounts), dict(SHARED), marks, "not settled yet", "")

    paid, ready, vested = marks
    ready = max(paid, ready)
    vested = max(ready, vested)
    total = sum(amounts)
    assert sums(rows) == {
        "accepted": total,
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

    rows = _divide(shards(amounts), dict(SHARED), (0, 0, vested), "not settled yet", "")

    waiting = [row for row in rows if row.vesting]
    assert len(waiting) == min(VESTING, len(amounts))
    last = [int(row.reason.split()[2]) for row in waiting]
    assert last == list(range(VESTING - len(waiting) + 1, VESTING + 1))
