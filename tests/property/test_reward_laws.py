"""Laws of vesting: what settlements add up to, whatever the order, the limits and the rounds."""

from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from trainchain.core.recount import Leaves, OnChain, leaves, roots
from trainchain.core.rewards import (
    FEES_VESTING,
    LATEST,
    NEVER,
    VESTING,
    WAITS,
    Earned,
    Terms,
    added,
    at_risk,
    forfeits,
    recount,
    totals,
    vested,
)

WORKERS = ["0x" + letter * 40 for letter in "aBc"]
JOB = "0x" + "7f" * 32
WITHOUT = 2**128 - 1


@st.composite
def jobs(draw: st.DrawFn) -> list[Earned]:
    """A job's accepted shards in the order of acceptance: late ones count with the round after their own."""
    shards = draw(st.integers(1, 12))
    rows: list[Earned] = []
    places = dict.fromkeys(WORKERS, 0)
    late: list[Earned] = []
    for number in range(1, draw(st.integers(1, 6)) + 1):
        here = []
        for shard in range(shards):
            worker = draw(st.sampled_from(WORKERS))
            here.append(Earned(number, shard, worker, 0, draw(st.integers(0, 30)), number))
        slow = [row._replace(counted=number + 1) for row in here if draw(st.booleans()) and row.shard % 3 == 0]
        taken = [row for row in here if row._replace(counted=number + 1) not in slow]
        for row in [*late, *taken]:
            places[row.worker] += 1
            rows.append(row._replace(place=places[row.worker]))
        late = slow
    for row in late:  # of the last round: no merge takes it in, and it counts with its own
        places[row.worker] += 1
        rows.append(row._replace(place=places[row.worker], counted=row.round))
    return rows


def last(rows: list[Earned]) -> int:
    return max((row.counted for row in rows), default=1)


@st.composite
def settled(draw: st.DrawFn) -> tuple[list[Earned], list[Terms]]:
    """A job and its settlements: some rounds', with limits, and then as many of its end as were made."""
    rows = draw(jobs())
    limits = st.one_of(st.just(WITHOUT), st.integers(1, 200))
    numbers = sorted(draw(st.sets(st.integers(1, last(rows)))))
    terms = [Terms(number, False, draw(limits)) for number in numbers]
    first = last(rows) + 1
    terms += [Terms(first + more, True, draw(limits)) for more in range(draw(st.integers(0, 4)))]
    return rows, terms


def least(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(amount <= other.get(worker, 0) for worker, amount in one.items())


@given(settled())
def test_no_leaf_falls_and_nobody_is_owed_more_than_it_earned(given_: tuple[list[Earned], list[Terms]]) -> None:
    rows, terms = given_
    found = recount(rows, terms)

    assert len(found) == len(terms)
    assert all(least(before, after) for before, after in pairwise(found))
    assert all(least(one, totals(rows)) for one in found)
    assert all(amount > 0 for one in found for amount in one.values())


@given(settled())
def test_no_settlement_raises_the_total_beyond_its_limit(given_: tuple[list[Earned], list[Terms]]) -> None:
    rows, terms = given_
    sums = [0, *(sum(one.values()) for one in recount(rows, terms))]

    raised = [after - before for before, after in pairwise(sums)]
    assert all(0 <= more <= one.limit for more, one in zip(raised, terms, strict=True))


@given(settled())
def test_a_recount_is_what_a_hub_adds_step_by_step(given_: tuple[list[Earned], list[Terms]]) -> None:
    rows, terms = given_
    paid: list[Earned] = []
    stepwise = []
    for one in terms:
        paid += added(rows, {row.key for row in paid}, one)
        stepwise.append({worker: amount for worker, amount in totals(paid).items() if amount})

    assert recount(rows, terms) == stepwise
    assert len(paid) == len({row.key for row in paid})


@given(settled(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_says_nothing(given_: tuple[list[Earned], list[Terms]], random: object) -> None:
    rows, terms = given_
    mixed = list(rows)
    random.shuffle(mixed)  # type: ignore[attr-defined]

    assert recount(mixed, terms) == recount(rows, terms)


@given(settled(), st.data())
def test_what_is_accepted_later_changes_no_settlement_of_before(
    given_: tuple[list[Earned], list[Terms]], data: st.DataObject
) -> None:
    rows, terms = given_
    going = [one for one in terms if not one.ended]
    known = data.draw(st.integers(0, len(going)))
    through = going[known - 1].number if known else 0
    early = [row for row in rows if row.counted <= through]

    assert recount(early, going[:known]) == recount(rows, going[:known])


@given(jobs(), st.integers(1, 60))
def test_at_the_end_everything_is_paid_in_as_many_steps_as_the_limit_needs(rows: list[Earned], limit: int) -> None:
    most = max((row.amount for row in rows), default=0)
    limit = max(limit, most, 1)
    steps = sum(row.amount for row in rows) // max(1, limit - most + 1) + 1
    ends = [Terms(last(rows) + number, True, limit) for number in range(steps)]

    assert recount(rows, ends)[-1] == {worker: amount for worker, amount in totals(rows).items() if amount}


def test_one_that_goes_beyond_the_limit_keeps_no_other_from_being_settled() -> None:
    """What its worker's voucher was paid is reserved twice: there can be too little left for it, and enough for all."""
    rows = [Earned(1, shard, WORKERS[shard], 1, amount, 1) for shard, amount in enumerate((7, 0, 5))]

    assert added(rows, [], Terms(1, True, 6)) == [rows[2]]
    assert added(rows, [], Terms(1, True, 0)) == []


@given(jobs(), st.integers(0, 8))
def test_while_a_job_goes_on_the_last_places_of_every_worker_wait(rows: list[Earned], number: int) -> None:
    ripe = vested(rows, Terms(number, False, 0))
    counted = [row for row in rows if row.counted <= number]

    for worker in WORKERS:
        mine = sorted(row.place for row in counted if row.worker == worker)
        assert sorted(row.place for row in ripe if row.worker == worker) == mine[:-VESTING]
    assert set(ripe) <= set(counted)


@given(jobs())
def test_a_voucher_never_promises_less_than_a_settlement_owes(rows: list[Earned]) -> None:
    """It is signed at acceptance, when the place nine before vests; a settlement waits for the merge."""
    for number in range(1, last(rows) + 1):
        owed = totals(vested(rows, Terms(number, False, 0)))
        for worker, amount in owed.items():
            newest = max(row.place for row in rows if row.worker == worker)
            promised = sum(row.amount for row in rows if row.worker == worker and row.place <= newest - VESTING)
            assert amount <= promised


@given(settled(), st.sampled_from(WORKERS))
def test_one_worker_s_pay_hangs_on_no_other_s_where_nothing_is_limited(
    given_: tuple[list[Earned], list[Terms]], worker: str
) -> None:
    rows, terms = given_
    free = [one._replace(limit=WITHOUT) for one in terms]
    alone = [row for row in rows if row.worker == worker]

    assert [one.get(worker, 0) for one in recount(rows, free)] == [one.get(worker, 0) for one in recount(alone, free)]


def posted(rows: list[Earned], terms: list[Terms]) -> dict[int, Leaves | None]:
    """The leaves files of an honest hub; a settlement that would owe nobody anything is not made."""
    files = {}
    for one, amounts in zip(terms, recount(rows, terms), strict=True):
        if amounts:
            files[one.number] = Leaves(JOB, one, f"root {one.number}", sum(amounts.values()), amounts)
    return dict(files)


@given(settled())
def test_an_honest_hub_is_never_accused(given_: tuple[list[Earned], list[Terms]]) -> None:
    rows, terms = given_
    files = posted(rows, terms)
    chain = [OnChain(number, file.root, file.total) for number, file in files.items() if file]

    assert leaves(JOB, rows, files) == []
    assert roots(chain, files, cap=max((one.limit for one in terms), default=0)) == []
    for number in files:
        assert leaves(JOB, rows, {**files, number: None}) == []


@given(settled(), st.data())
def test_any_one_amount_that_is_changed_is_found_and_named(
    given_: tuple[list[Earned], list[Terms]], data: st.DataObject
) -> None:
    rows, terms = given_
    files = posted(rows, terms)
    if not files:
        return
    number = data.draw(st.sampled_from(sorted(files)))
    file = files[number]
    assert file is not None
    account = data.draw(st.sampled_from([*sorted(file.amounts), "0x" + "d" * 40]))
    amounts = {**file.amounts, account: data.draw(st.integers(0, 10**6))}
    if amounts[account] == file.amounts.get(account, 0):
        return
    doctored = file._replace(amounts={who: amount for who, amount in amounts.items() if amount})

    (finding,) = leaves(JOB, rows, {**files, number: doctored})

    assert f"Settlement {number} " in finding.says
    assert account in finding.says


@given(settled(), st.data(), st.integers(1, 10**30))
def test_any_total_that_is_not_the_leaves_is_found(
    given_: tuple[list[Earned], list[Terms]], data: st.DataObject, more: int
) -> None:
    rows, terms = given_
    files = posted(rows, terms)
    if not files:
        return
    chain = [OnChain(number, file.root, file.total) for number, file in files.items() if file]
    place = data.draw(st.integers(0, len(chain) - 1))
    inflated = [*chain[:place], chain[place]._replace(total=chain[place].total + more), *chain[place + 1 :]]

    found = roots(inflated, files)

    assert any(f"Settlement {chain[place].number} has the total" in finding.says for finding in found)


@dataclass
class Books:
    """What an honest hub does with the earnings of a job on which audits are drawn: each step is one transaction, and
    what a verdict changes is stamped with the first settlement that may know of it."""

    rows: list[Earned] = field(default_factory=list)
    settlements: list[Terms] = field(default_factory=list)
    paid: list[Earned] = field(default_factory=list)
    stepwise: list[dict[str, int]] = field(default_factory=list)
    round: int = 1
    pending: set[tuple[str, int]] = field(default_factory=set)
    promised: dict[str, int] = field(default_factory=dict)

    @property
    def following(self) -> int:
        return self.settlements[-1].number + 1 if self.settlements else 1

    def queue(self, worker: str, kind: str = "shard") -> list[Earned]:
        return [row for row in self.rows if (row.worker, row.kind) == (worker, kind)]

    def accept(self, worker: str, amount: int, *, drawn: bool) -> None:
        place = len(self.queue(worker)) + 1
        resolved = NEVER if drawn else 0
        self.rows.append(Earned(self.round, len(self.rows), worker, place, amount, self.round, "shard", resolved))
        if drawn:
            self.pending.add((worker, place))

    def replay(self, auditor: str, fee: int) -> None:
        place = len(self.queue(auditor, "replay")) + 1
        self.rows.append(Earned(1, len(self.rows), auditor, place, fee, self.following, "replay"))

    def change(self, which: list[Earned], **fields: int) -> None:
        keys = {row.key for row in which}
        self.rows = [row._replace(**fields) if row.key in keys else row for row in self.rows]

    def resolve(self, worker: str, place: int) -> None:
        self.pending.discard((worker, place))
        self.change([row for row in self.queue(worker) if row.place == place], resolved=self.following)

    def reject(self, worker: str) -> list[Earned]:
        lost = forfeits(self.queue(worker))
        self.change(lost, forfeited=self.following)
        self.pending -= {(worker, row.place) for row in lost}
        return lost

    def contradict(self, auditor: str) -> list[Earned]:
        lost = forfeits(self.queue(auditor, "replay"))
        self.change(lost, forfeited=self.following)
        return lost

    def settle(self, limit: int, *, ended: bool = False) -> None:
        number = max(self.following, self.round + ended)
        terms = Terms(number, ended, limit)
        if not ended:
            self.round = number + 1
        self.settlements.append(terms)
        self.paid += added(self.rows, {row.key for row in self.paid}, terms)
        self.stepwise.append({worker: amount for worker, amount in totals(self.paid).items() if amount})

    def vouch(self) -> dict[str, int]:
        return totals(vested(self.rows, Terms(LATEST, False, 0)))


@st.composite
def played(draw: st.DrawFn) -> Books:
    """A job's course, checked at every step: shards, draws, verdicts for and against, replays, settlements."""
    books = Books()
    for _ in range(draw(st.integers(0, 90))):
        step = draw(
            st.sampled_from(["accept"] * 6 + ["replay"] * 3 + ["pass"] * 2 + ["reject", "contradict", "settle"])
        )
        worker = draw(st.sampled_from(WORKERS[:2]))
        before = {row.key: row for row in vested(books.rows, Terms(LATEST, False, 0))}
        if step == "accept":
            books.accept(worker, draw(st.integers(0, 30)), drawn=draw(st.sampled_from([False, False, True])))
        elif step == "replay":
            books.replay(worker, draw(st.integers(0, 9)))
        elif step == "pass" and books.pending:
            books.resolve(*draw(st.sampled_from(sorted(books.pending))))
        elif step == "reject" and (mine := sorted(place for who, place in books.pending if who == worker)):
            place = draw(st.sampled_from(mine))
            earlier = max((row.place for row in books.queue(worker) if row.forfeited != NEVER), default=0)
            waiting = [row for row in books.queue(worker) if row.forfeited == NEVER and row.key not in before]
            lost = books.reject(worker)
            assert lost == waiting, "all that has not vested, and nothing else"
            assert place in [row.place for row in lost]
            assert len(lost) >= at_risk(place, earlier)
        elif step == "contradict" and books.queue(worker, "replay"):
            waiting = [row for row in books.queue(worker, "replay") if row.forfeited == NEVER and row.key not in before]
            assert books.contradict(worker) == waiting
            assert len(waiting) <= FEES_VESTING
        elif step == "settle":
            books.settle(draw(st.one_of(st.just(WITHOUT), st.integers(1, 200))))
        after = {row.key for row in vested(books.rows, Terms(LATEST, False, 0))}
        assert before.keys() <= after, "what has vested stays so"
        assert all(amount >= books.promised.get(who, 0) for who, amount in books.vouch().items())
        assert books.promised.keys() <= books.vouch().keys()
        assert {row.key for row in books.paid} <= after, "a settlement pays what a voucher promises"
        books.promised = books.vouch()
    return books


@given(played())
def test_a_recount_sees_every_settlement_as_it_was_though_verdicts_came_in_between(books: Books) -> None:
    assert recount(books.rows, books.settlements) == books.stepwise


@given(played())
def test_nothing_at_or_behind_a_pending_audit_vests_before_the_end(books: Books) -> None:
    ripe = {(row.worker, row.place) for row in vested(books.rows, Terms(LATEST, False, 0)) if row.kind == "shard"}

    for worker, place in books.pending:
        assert not [other for who, other in ripe if who == worker and other >= place]


@given(played())
def test_at_the_end_all_that_stands_is_paid_and_nothing_that_is_forfeited(books: Books) -> None:
    for who, place in sorted(books.pending):
        books.resolve(who, place)
    books.settle(WITHOUT, ended=True)

    stands = [row for row in books.rows if row.forfeited == NEVER]
    assert recount(books.rows, books.settlements)[-1] == {who: x for who, x in totals(stands).items() if x}
    assert recount(books.rows, books.settlements) == books.stepwise


@given(played())
def test_forfeits_of_one_verdict_are_places_in_a_row_up_to_the_last(books: Books) -> None:
    for worker in WORKERS[:2]:
        for kind in WAITS:
            queue = books.queue(worker, kind)
            places = [row.place for row in forfeits(queue)]
            assert places == list(range(len(queue) - len(places) + 1, len(queue) + 1))


def test_a_fee_waits_for_twenty_later_replays() -> None:
    fees = [Earned(1, shard, WORKERS[0], shard + 1, 5, 1, "replay") for shard in range(FEES_VESTING + 2)]

    assert vested(fees, Terms(1, False, 0)) == fees[:2]
    assert forfeits(fees) == fees[2:]
    assert vested(fees, Terms(1, True, 0)) == fees


def test_shards_at_risk_are_counted_from_the_last_forfeit() -> None:
    assert [at_risk(place, 0) for place in (1, 2, 9, 10, 11, 500)] == [1, 2, 9, 10, 10, 10]
    assert [at_risk(place, 14) for place in (15, 16, 24, 40)] == [1, 2, 10, 10]
