"""What replays say together: nobody alone rejects anything, and nobody who lies outvotes two who do not."""

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from trainchain.core.verdicts import MOST_REPLAYS, Decision, Replayed, Role, contradicted, decide

AUDITORS = ["anna", "ben", "carl", "dora"]
CLAIM = "claimed"


DECIDING: tuple[Role, ...] = ("earned", "operator", "owner")


@st.composite
def replays(
    draw: st.DrawFn, least: int = 1, most: int = MOST_REPLAYS, roles: Sequence[Role] = DECIDING
) -> list[Replayed]:
    """Of auditors as the hub asks them: each once, or, where the hub is careless, more often."""
    found = []
    for _ in range(draw(st.integers(least, most))):
        equal = draw(st.booleans())
        found.append(
            Replayed(
                auditor=draw(st.sampled_from(AUDITORS)),
                role=draw(st.sampled_from(roles)),
                end=CLAIM if equal else draw(st.sampled_from(["x", "y"])),
                equal=equal,
                within=draw(st.sampled_from([None, True, False])) if equal else draw(st.booleans()),
            )
        )
    return found


liking = st.sampled_from([True, False])


def alike_of(verdict: bool) -> Callable[[int, int], bool]:
    return lambda one, other: verdict


def honest(who: str, *, claim_holds: bool) -> Replayed:
    """One that trained the segment: on an honest claim it is equal, on a forged one it gets what all honest get."""
    end = CLAIM if claim_holds else "true"
    return Replayed(who, "earned", end, claim_holds, None if claim_holds else False)


def says_yes(who: str) -> Replayed:
    return Replayed(who, "earned", CLAIM, True, None)


def says_no(who: str, end: str = "lie", role: Role = "earned") -> Replayed:
    return Replayed(who, role, end, False, False)


def confirms(who: str, end: str) -> Replayed:
    return Replayed(who, "confirms", end, end == CLAIM, None if end == CLAIM else False)


@given(replays(most=1), liking)
def test_no_single_replay_rejects(one: list[Replayed], alike: bool) -> None:
    assert decide(one, alike_of(alike)) != Decision.FAILED
    assert contradicted(one, decide(one, alike_of(alike))) == []


people = st.tuples(st.sampled_from(AUDITORS), st.sampled_from(get_args(Role)))


@given(people, people, st.booleans())
def test_a_rejection_takes_two_people_who_may_and_who_agree(
    one: tuple[str, Role], other: tuple[str, Role], alike: bool
) -> None:
    """Two who have earned it, or the operator and anybody else."""
    against = [Replayed(who, role, who, False, False) for who, role in (one, other)]
    roles = sorted([one[1], other[1]])
    may = roles == ["earned", "earned"] or roles.count("operator") == 1

    assert (decide(against, alike_of(alike)) == Decision.FAILED) == (one[0] != other[0] and may and alike)


@given(st.lists(st.sampled_from(DECIDING), max_size=3))
def test_who_got_what_the_operator_got_is_not_outvoted(friends: list[Role]) -> None:
    found = [says_no("anna", "true", "operator"), *(says_yes(f"{at}") for at in range(len(friends)))]
    assert decide(found, alike_of(False)) in (Decision.MORE, Decision.UNDECIDED)

    found.append(confirms("ben", "true"))
    assert decide(found, alike_of(False)) == Decision.FAILED


@given(replays(), st.sampled_from(AUDITORS), liking)
def test_one_wallet_rejects_nothing_however_often(found: list[Replayed], who: str, alike: bool) -> None:
    assert decide([replay._replace(auditor=who) for replay in found], alike_of(alike)) != Decision.FAILED


@given(replays(), liking)
def test_an_owner_rejects_nothing_alone(found: list[Replayed], alike: bool) -> None:
    assert decide([replay._replace(role="owner") for replay in found], alike_of(alike)) != Decision.FAILED


@given(replays())
def test_what_does_not_agree_with_each_other_rejects_nothing(found: list[Replayed]) -> None:
    ends = [replay._replace(end=replay.end if replay.equal else f"{at}") for at, replay in enumerate(found)]

    assert decide(ends, alike_of(False)) != Decision.FAILED


@given(st.sampled_from(DECIDING))
def test_an_equal_replay_alone_passes(role: Role) -> None:
    one = Replayed("anna", role, CLAIM, True, None)

    assert decide([one], alike_of(False)) == Decision.PASSED


@given(replays(), liking)
def test_a_decision_comes_with_the_last_replay_at_the_latest(found: list[Replayed], alike: bool) -> None:
    everybody = [*found, *(confirms(who, who) for who in ("x", "y", "z"))]
    decision = decide(found, alike_of(alike))

    assert decision != Decision.MORE or len(found) < MOST_REPLAYS or not all(replay.equal for replay in found)
    assert decide(everybody, alike_of(alike)) != Decision.MORE or len(found) < MOST_REPLAYS
    assert decision != Decision.UNDECIDED or len(found) >= MOST_REPLAYS


@given(replays(most=6, roles=("confirms",)), liking)
def test_those_who_only_confirm_decide_nothing(found: list[Replayed], alike: bool) -> None:
    assert decide(found, alike_of(alike)) == Decision.MORE


@given(replays(most=2), replays(most=3, roles=("confirms",)))
def test_those_who_only_confirm_pass_nothing(found: list[Replayed], more: list[Replayed]) -> None:
    if decide([*found, *more], alike_of(False)) == Decision.PASSED:
        assert decide(found, alike_of(False)) == Decision.PASSED


@given(st.sampled_from(["earned", "owner"]), st.booleans())
def test_nobody_but_the_operator_can_be_confirmed(role: Role, alike: bool) -> None:
    both = [says_no("anna", "lie", role), confirms("ben", "lie")]

    assert decide(both, alike_of(alike)) == Decision.MORE
    assert decide([*both, confirms("carl", "lie")], alike_of(alike)) == Decision.MORE
    assert decide([says_no("anna", "lie", "operator"), both[1]], alike_of(alike)) == Decision.FAILED


@given(st.lists(st.sampled_from("uvwxyz"), max_size=MOST_REPLAYS, unique=True))
def test_a_cheat_s_own_wallets_cannot_shout_down_what_one_worker_confirms(friends: list[str]) -> None:
    found = [says_no("anna", "true", "operator"), *(confirms(name, CLAIM) for name in friends)]
    assert decide(found, alike_of(False)) == Decision.MORE

    found.append(confirms("ben", "true"))
    assert decide(found, alike_of(False)) == Decision.FAILED
    assert contradicted(found, Decision.FAILED) == list(range(1, 1 + len(friends)))


@given(replays(), liking)
def test_the_order_of_the_replays_decides_nothing(found: list[Replayed], alike: bool) -> None:
    every = {decide(list(order), alike_of(alike)) for order in permutations(found)}

    assert len(every) == 1


@given(replays(), liking)
def test_only_who_speaks_against_the_verdict_is_proven_wrong(found: list[Replayed], alike: bool) -> None:
    decision = decide(found, alike_of(alike))
    wrong = contradicted(found, decision)

    assert not wrong or decision in (Decision.PASSED, Decision.FAILED)
    assert len(wrong) < len(found) or not found
    assert 2 * len(wrong) < len(found) or not wrong
    for at in wrong:
        assert found[at].equal == (decision == Decision.FAILED) or not found[at].equal


def test_a_friend_who_says_yes_does_not_outvote_two() -> None:
    one, other = (honest(who, claim_holds=False) for who in ("ben", "carl"))
    for order in permutations([says_yes("anna"), one, other]):
        decision = decide(order, alike_of(False))
        assert decision == Decision.FAILED
        assert [order[at].auditor for at in contradicted(order, decision)] == ["anna"]


def test_a_liar_who_says_no_is_outvoted_by_two() -> None:
    one, other = (honest(who, claim_holds=True) for who in ("ben", "carl"))
    for order in permutations([says_no("anna"), one, other]):
        decision = decide(order, alike_of(False))
        assert decision == Decision.PASSED
        assert [order[at].auditor for at in contradicted(order, decision)] == ["anna"]
    assert decide([says_no("anna"), one], alike_of(False)) == Decision.MORE


@given(st.sampled_from(["lie", "true"]))
def test_an_owner_who_lies_needs_a_stranger_to_lie_with(end: str) -> None:
    lies = [says_no("owner", end, "owner"), says_no("other", end, "owner")]

    assert decide(lies, alike_of(True)) == Decision.MORE
    assert decide([*lies, honest("ben", claim_holds=True)], alike_of(True)) != Decision.FAILED


@given(st.integers(1, 3))
def test_who_gets_other_bits_within_the_tolerance_speaks_for_the_work(count: int) -> None:
    """Also where all of them get the same: nobody is rejected for a bit."""
    found = [Replayed(who, "earned", "true", False, True) for who in AUDITORS[:count]]

    assert decide(found, alike_of(True)) == Decision.PASSED
