"""Who would get round the draw, the auditors or the vesting, over the very functions that decide."""

import hashlib
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainchain.core.draws import AT_RISK, draw, probability, secret_hash
from trainchain.core.rewards import NEVER, VESTING, Earned, Terms, at_risk, forfeits, vested
from trainchain.core.verdicts import MOST_REPLAYS, Decision, Replayed, contradicted, decide

SEGMENTS = 8
EVER = Terms(NEVER - 1, True, 10**9)
TRUTH, CLAIM, LIE = "truth", "claim", "lie"


def shards(count: int, *, waiting: int = 0) -> list[Earned]:
    """A wallet's queue whose last `waiting` shards have no verdict yet."""
    return [
        Earned(place, 0, "w", place, 1, place, resolved=NEVER if place > count - waiting else 0)
        for place in range(1, count + 1)
    ]


def replayed(end: str, auditor: str, *, owner: bool = False) -> Replayed:
    return Replayed(auditor, "owner" if owner else "earned", end, end == CLAIM, end == CLAIM)


def agree(replays: list[Replayed]) -> Decision:
    return decide(replays, lambda i, j: replays[i].end == replays[j].end)


def after(*ends: str, owner: int | None = None) -> Decision:
    """The verdict on replays that come in one after the other, each by another auditor."""
    replays: list[Replayed] = []
    for at, end in enumerate(ends):
        replays.append(replayed(end, str(at), owner=at == owner))
        if (found := agree(replays)) != Decision.MORE:
            return found
    return Decision.MORE


@settings(deadline=None)
@given(st.integers(1, 10), st.integers(1, SEGMENTS), st.sampled_from([Fraction(3, 10), Fraction(7, 10), Fraction(1)]))
def test_forging_never_pays_whatever_is_at_risk(risk: int, forged: int, cost: Fraction) -> None:
    """What is saved, against what a verdict costs as often as it falls: by half of the pay at least, but on a wallet's
    first shards, where every one is audited."""
    share = Fraction(forged, SEGMENTS)
    gain = share * cost - share * probability(risk) * risk

    assert gain <= 0
    assert gain < 0 or (risk == 1 and cost == 1)
    assert probability(risk) * risk >= min(AT_RISK, risk)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 60))
def test_a_verdict_costs_no_less_than_the_draw_went_by(count: int, waiting: int) -> None:
    """However many verdicts are still out: who hands in faster than auditors replay has more to lose, never less."""
    queue = shards(count, waiting=min(waiting, count - 1))
    queue[-1] = queue[-1]._replace(resolved=NEVER)

    lost = forfeits(queue)

    assert len(lost) >= at_risk(count, 0)
    assert queue[-1] in lost


@pytest.mark.parametrize("place", range(1, 25))
def test_the_end_of_a_job_frees_nothing_that_waits_for_a_verdict(place: int) -> None:
    """Everything vests then; so what is drawn in the last shards has its verdict before, and costs as much as ever."""
    queue = shards(place, waiting=1)
    gone = {row.place for row in forfeits(queue)}
    ended = [row._replace(forfeited=1) if row.place in gone else row for row in queue]

    assert len(gone) == min(place, VESTING + 1)
    assert {row.place for row in vested(ended, EVER)} == set(range(1, place - VESTING))
    assert queue[-1] not in vested(queue, Terms(99, True, 10**9)), "paid before its verdict"


def test_who_is_caught_begins_again_as_a_stranger() -> None:
    assert [probability(at_risk(place, 12)) for place in (13, 14)] == [1, Fraction(3, 4)]
    assert [at_risk(place, 0) for place in (1, 10, 11, 500)] == [1, 10, 10, 10]


def test_fifty_fresh_wallets_are_all_looked_at() -> None:
    """One shard each: not one of them goes undrawn, whatever the lots say, and there is nothing to learn from it."""
    chance = random.Random(0)
    drawn = [
        draw(
            chance.randbytes(32), chance.randbytes(32), chance.randbytes(32), at_risk=1, steps=SEGMENTS, segment_steps=1
        )
        for _ in range(50)
    ]

    assert None not in drawn
    assert set(drawn) <= set(range(SEGMENTS))


def test_a_name_from_a_worthless_job_is_worth_nothing_here() -> None:
    """What is at risk is counted in the job: a wallet with a thousand shards elsewhere begins at its first."""
    elsewhere = shards(1000)

    assert len(vested(elsewhere, Terms(2000, False, 10**9))) == 1000 - VESTING
    assert probability(at_risk(1, 0)) == 1


def test_a_draw_cannot_be_ground_for() -> None:
    """Another root is another draw, but the first one counts, and without the secret all roots are alike: of a thousand
    that a cheat may make up, as many would be drawn as of any thousand."""
    secret, lease = hashlib.sha256(b"secret").digest(), bytes(32)
    roots = [hashlib.sha256(bytes([at % 256, at // 256])).digest() for at in range(1000)]
    drawn = sum(draw(secret, lease, root, at_risk=10, steps=SEGMENTS, segment_steps=1) is not None for root in roots)

    assert 110 < drawn < 190
    assert secret.hex() not in secret_hash(secret)


def test_who_answers_only_the_draws_it_likes_is_as_badly_off() -> None:
    """Silence is a rejection like any other, so there is nothing to choose: the same is lost."""
    queue = shards(14, waiting=1)

    assert [row.place for row in forfeits(queue)] == list(range(5, 15))


@pytest.mark.parametrize("liar", range(3))
def test_one_auditor_who_says_no_rejects_nobody(liar: int) -> None:
    """Of honest work: whoever lies alone is out-voted as soon as two others replay, and loses its fees."""
    said = [replayed(LIE if at == liar else CLAIM, str(at)) for at in range(MOST_REPLAYS)]
    shown = next(said[:count] for count in range(1, 4) if agree(said[:count]) != Decision.MORE)

    assert agree(shown) == Decision.PASSED
    assert contradicted(shown, Decision.PASSED) == [at for at, each in enumerate(shown) if each.end == LIE]


def test_an_owner_s_auditor_that_refuses_honest_work_cannot_alone() -> None:
    """Not with one wallet, not with two of the owner's; and where nobody else replays the work stands."""
    both = [replayed(LIE, "owner", owner=True), replayed(LIE, "owner's other", owner=True)]

    assert agree(both[:1]) == Decision.MORE
    assert agree(both) == Decision.MORE
    assert agree([*both, replayed(CLAIM, "worker")]) in (Decision.UNDECIDED, Decision.PASSED)
    assert len(both) < MOST_REPLAYS


def test_liars_who_do_not_agree_reject_nobody() -> None:
    assert after("one lie", "another lie", "a third") == Decision.UNDECIDED
    assert after("one lie", "another lie", CLAIM) == Decision.UNDECIDED


def test_two_liars_who_agree_do_reject_and_that_is_known() -> None:
    """Two auditors of ten vested shards each, drawn for the same audit: a limit that is told, with what it costs, in
    docs/figures/cheating.json. What they signed stands in the evidence, where anybody can replay it."""
    assert after(LIE, LIE) == Decision.FAILED
    assert after(CLAIM, LIE) == Decision.PASSED, "who was drawn first was honest"


def test_one_yes_is_enough_and_that_is_known() -> None:
    """A friend among the auditors, drawn first, passes forged work; drawn later it does not."""
    assert after(CLAIM) == Decision.PASSED
    assert after(TRUTH, CLAIM, TRUTH) == Decision.FAILED
    assert after(TRUTH, TRUTH) == Decision.FAILED
    friend = [replayed(TRUTH, "a"), replayed(CLAIM, "friend"), replayed(TRUTH, "b")]
    assert contradicted(friend, Decision.FAILED) == [1], "and loses the fees that have not vested"


def test_one_auditor_does_not_count_twice() -> None:
    twice = [replayed(TRUTH, "a"), replayed(TRUTH, "a")]

    assert agree(twice) == Decision.MORE
