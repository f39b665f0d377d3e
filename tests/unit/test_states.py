"""Every state and every move: what the table allows, and nothing else."""

from enum import StrEnum
from itertools import product

import pytest

from trainchain.core.states import MOVES, Audit, Evaluation, Job, Lease, Round, Shard, check_move

KINDS = (Job, Round, Shard, Lease, Evaluation, Audit)
EVERY = [state for kind in KINDS for state in kind]
OVER = (Audit.PASSED, Audit.FAILED, Audit.UNAUDITED, Audit.VOID)
ENDS = (Job.CLOSED, Round.MERGED, Shard.ACCEPTED, Shard.ABANDONED, Lease.DONE, Evaluation.DONE, *OVER)
STARTS = (
    Job.UNFUNDED,
    Round.OPEN,
    Shard.OPEN,
    Lease.HELD,
    Evaluation.OPEN,
    Audit.DRAWN,
)  # not a set: equal words would fall together


def allowed(before: StrEnum, after: StrEnum) -> bool:
    return any(
        before is one and any(after is other for other in others)
        for moves in MOVES.values()
        for one, others in moves.items()
    )


@pytest.mark.parametrize(("before", "after"), product(EVERY, EVERY))
def test_a_move_is_in_the_table_or_an_error(before: StrEnum, after: StrEnum) -> None:
    if type(before) is type(after) and after in MOVES[type(before)][before]:
        check_move(before, after)
    else:
        with pytest.raises(ValueError, match="cannot move"):
            check_move(before, after)
    assert (type(before) is type(after) and after in MOVES[type(before)][before]) == allowed(before, after)


def test_equal_words_of_two_kinds_are_never_mixed() -> None:
    assert Shard.OPEN == Round.OPEN == Job.OPEN == Evaluation.OPEN

    for kind, other in product(KINDS, KINDS):
        if kind is not other:
            for before, after in product(kind, other):
                with pytest.raises(ValueError, match="cannot move"):
                    check_move(before, after)


def test_the_table_knows_every_state_of_every_kind_by_its_own_kind() -> None:
    assert set(MOVES) == set(KINDS)
    for kind, moves in MOVES.items():
        assert set(moves) == set(kind)
        for before, afters in moves.items():
            assert type(before) is kind
            assert all(type(after) is kind for after in afters)
            assert before not in afters


@pytest.mark.parametrize("kind", KINDS)
def test_every_state_is_reached_and_every_end_is_an_end(kind: type[StrEnum]) -> None:
    moves = MOVES[kind]
    reached = {state for state in kind if any(state is start for start in STARTS)}
    assert len(reached) == 1
    while fresh := {after for before in reached for after in moves[before]} - reached:
        reached |= fresh

    assert reached == set(kind)
    assert {state for state in kind if not moves[state]} == {end for end in ENDS if type(end) is kind}
