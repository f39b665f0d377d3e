"""While audits are pending and after forfeits a paybook asks an honest hub for no more than it owes, and takes no less
from a crooked one than what it can know of."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.test_paybook_laws import JOB, answer, paybook, promised, voucher
from trainchain.core.errors import TrainChainError
from trainchain.core.rewards import LATEST, NEVER, VESTING, Earned, Terms, forfeits, totals, vested
from trainchain.core.worker.paybook import REFUSED, Paybook

WORKER = "0x" + "a" * 40
DRAWN = {"segment": 1, "at_risk": 1, "wants": [1], "answer_by": 9.0}


class Hub:
    """An honest one, with one worker in one job."""

    def __init__(self) -> None:
        self.rows: list[Earned] = []
        self.lost: list[dict[str, Any]] = []
        self.ended = False

    def accept(self, amount: int, *, drawn: bool) -> dict[str, Any]:
        place = len(self.rows) + 1
        self.rows.append(Earned(1, place, WORKER, place, amount, 1, "shard", NEVER if drawn else 0))
        return answer(place, amount, self.vested(), draw=DRAWN if drawn else None)

    def vested(self) -> int:
        return totals(vested(self.rows, Terms(LATEST, self.ended, 0))).get(WORKER, 0)

    def pending(self) -> list[int]:
        return [row.place for row in self.rows if row.resolved == NEVER and row.forfeited == NEVER]

    def resolve(self, place: int) -> None:
        self.rows[place - 1] = self.rows[place - 1]._replace(resolved=1)

    def reject(self, place: int) -> None:
        gone = forfeits(self.rows)
        lease = "0x" + place.to_bytes(32, "big").hex()
        for row in gone:
            self.rows[row.place - 1] = row._replace(forfeited=1)
        where = {"first": gone[0].place, "last": gone[-1].place}
        self.lost.append({**where, "lease": lease, "code": "audit.differs", "evidence": None})

    def told(self) -> dict[str, Any]:
        first = min(self.pending(), default=None)
        newest = voucher(self.vested()) if self.vested() else None
        about = {"through": len(self.rows), "waits": first, "forfeited": list(self.lost)}
        return {"voucher": newest, "ended": self.ended, **about}


@st.composite
def courses(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Steps: what happens, an amount or a choice, and at which of two machines."""
    what = st.sampled_from(["accept"] * 6 + ["drawn", "drawn", "pass", "pass", "reject", "ask"])
    return draw(st.lists(st.tuples(what, st.integers(0, 10**6), st.integers(0, 1)), max_size=60))


@settings(max_examples=80, deadline=None)
@given(courses())
def test_an_honest_hub_is_never_accused_by_any_machine_of_a_wallet(course: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        hub, books = Hub(), [paybook(one), paybook(other)]
        for what, number, at in course:
            book, pending = books[at], hub.pending()
            if what in ("accept", "drawn"):
                floor = book.vested(JOB)
                got = hub.accept(number + 1, drawn=what == "drawn")
                book.keep(promised(got["place"], number + 1), got, floor)
            elif what == "pass" and pending:
                hub.resolve(pending[number % len(pending)])
            elif what == "reject" and pending:
                hub.reject(pending[number % len(pending)])
            elif what == "ask":
                book.keep_answer(JOB, hub.told(), book.receipts(JOB))
            assert all(one_.vested(JOB) <= hub.vested() for one_ in books)
        for place in hub.pending():
            hub.resolve(place)
        hub.ended = True
        for book in books:
            book.keep_answer(JOB, hub.told(), book.receipts(JOB))
            assert book.vested(JOB) == hub.vested()


@settings(max_examples=60, deadline=None)
@given(courses(), st.integers(1, 10**6))
def test_with_the_verdicts_known_one_machine_misses_nothing_that_has_vested(
    course: list[tuple[str, int, int]], short: int
) -> None:
    with tempfile.TemporaryDirectory() as home:
        hub, book = Hub(), paybook(home)
        for what, number, _ in course:
            pending = hub.pending()
            if what in ("accept", "drawn"):
                got = hub.accept(number + 1, drawn=what == "drawn")
                book.keep(promised(got["place"], number + 1), got, 0)
            elif what == "pass" and pending:
                hub.resolve(pending[0])
            elif what == "reject" and pending:
                hub.reject(pending[-1])
        told, due = hub.told(), hub.vested()
        if due > short:
            with pytest.raises(TrainChainError, match="have vested"):
                book.keep_answer(JOB, {**told, "voucher": voucher(due - short)}, book.receipts(JOB))
        book.keep_answer(JOB, told, book.receipts(JOB))
        assert book.vested(JOB) == due


def worked(home: str, *, drawn: int | None = None) -> tuple[Hub, Paybook]:
    hub, book = Hub(), paybook(home)
    for place in range(1, VESTING + 4):
        got = hub.accept(10, drawn=place == drawn)
        book.keep(promised(place, 10), got, 0)
    return hub, book


FALSE: dict[str, tuple[int | None, dict[str, Any], str]] = {
    "a rejection of what was not drawn": (None, {"first": 4, "last": 12, "place": 12}, "no audit was drawn"),
    "a rejection of another": (12, {"first": 4, "last": 11, "place": 12}, "no audit was drawn"),
    "a forfeit of what had vested": (12, {"first": 1, "last": 12, "place": 12}, "which had vested"),
}


@pytest.mark.parametrize("name", sorted(FALSE))
def test_a_hub_that_takes_what_no_verdict_can_is_found_out(name: str, tmp_path: Path) -> None:
    drawn, lost, says = FALSE[name]
    hub, book = worked(str(tmp_path), drawn=drawn)
    lease = "0x" + lost["place"].to_bytes(32, "big").hex()
    lost = {"first": lost["first"], "last": lost["last"], "lease": lease, "code": "audit.differs", "evidence": None}

    with pytest.raises(TrainChainError, match=says) as caught:
        book.keep_answer(JOB, {**hub.told(), "waits": None, "forfeited": [lost]}, book.receipts(JOB))

    assert (caught.value.code, caught.value.exit_code) == ("voucher.invalid", 4)
    assert (tmp_path / "verdicts" / REFUSED / f"{JOB}.json").exists()
    assert book.verdicts(JOB).forfeited == []


def test_a_hub_that_forgets_places_or_its_own_verdicts_is_found_out(tmp_path: Path) -> None:
    hub, book = worked(str(tmp_path), drawn=12)
    with pytest.raises(TrainChainError, match="is about 3 places; 12 were accepted"):
        book.keep_answer(JOB, {**hub.told(), "through": 3}, book.receipts(JOB))
    hub.reject(12)
    book.keep_answer(JOB, hub.told(), book.receipts(JOB))
    with pytest.raises(TrainChainError, match="takes back"):
        book.keep_answer(JOB, {**hub.told(), "forfeited": []}, book.receipts(JOB))
