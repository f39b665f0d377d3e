"""Who may replay, in which order and for how much; and that nothing waits for an auditor for ever."""

import hashlib
import hmac
from itertools import chain

import httpx
import pytest

from tests.fixtures_checking import CHECKED, LONG, OWN, Work, Yard, moved
from tests.fixtures_hub import Job, Person, Town
from trainchain.core.draws import MANY
from trainchain.core.hub import schema
from trainchain.core.hub.auditors import STEP
from trainchain.core.hub.service import LEASE_SECONDS
from trainchain.core.rewards import replay_fee
from trainchain.core.segments import state_bytes


@pytest.fixture
def yard(town: Town) -> Yard:
    return Yard(town)


@pytest.fixture(scope="module")
def known(town: Town) -> tuple[Yard, Job, list[Person]]:
    """A job in which three wallets may audit; all that is drawn of theirs is decided."""
    yard = Yard(town)
    job = town.publish(rounds=1, shards=200, check=CHECKED, **LONG)
    return yard, job, [yard.veteran(job) for _ in range(3)]


def code(answer: httpx.Response) -> str:
    assert answer.status_code >= 400, answer.text
    return str(answer.json()["code"])


def line(yard: Yard, job: Job, work: Work, paid: list[Person]) -> list[list[str]]:
    """In which order auditors are asked, owner and operator together, computed anew from the secret."""
    secret = bytes.fromhex(job.round(work.lease["round"])["secret"][2:])

    def prf(word: bytes, wallet: str = "") -> bytes:
        return hmac.new(secret, word + bytes.fromhex(work.id[2:]) + bytes.fromhex(wallet[2:]), hashlib.sha256).digest()

    first = sorted((who.address for who in paid), key=lambda wallet: prf(b"auditor", wallet))
    alone, both = [[wallet] for wallet in first], [job.owner.address, yard.operator.address]
    trusted = int.from_bytes(prf(b"trusted")[:8], "big") / 2**64 < max(0.5, 1 - len(paid) / MANY)
    return [both, *alone] if trusted else [alone[0], both, *alone[1:]]


def answered(yard: Yard, who: Person, job: Job, **options: object) -> Work:
    work = yard.work(who, job, drawn=True, **options)  # type: ignore[arg-type]
    yard.answer(work)
    return work


def test_the_line_opens_with_time(known: tuple[Yard, Job, list[Person]]) -> None:
    """1 at once, 2 after 20 s, 4 after 40 s."""
    yard, job, veterans = known
    everybody = {who.address: who for who in [*veterans, job.owner, yard.operator]}
    for waited, asked in ((0, 1), (1, 2), (2, 4)):
        work = answered(yard, yard.town.person(), job)
        order = line(yard, job, work, veterans)
        yard.town.clock.forward(waited * STEP)
        for wallet in chain.from_iterable(order[asked:]):
            assert yard.take(everybody[wallet], job) is None, (waited, wallet)
        who = everybody[order[asked - 1][-1]]
        offer = yard.take(who, job)
        assert offer is not None, (waited, asked)
        assert offer["target"] == work.id
        yard.send(who, offer, yard.replayed(who, job, offer))


def test_a_numeric_class_gives_nobody_a_turn(yard: Yard, town: Town) -> None:
    """It is what a machine says of itself: a cheat and its friend would have one of their own."""
    job = town.publish(rounds=1, shards=80, check=CHECKED, **LONG)
    friend, other = yard.veteran(job, shards=18), yard.veteran(job)
    yard.work(friend, job, drawn=False, numericClass="ours alone")
    for _ in range(8):
        work = answered(yard, town.person(), job, numericClass="ours alone")
        order = line(yard, job, work, [friend, other])
        if friend.address not in order[0]:
            assert yard.take(friend, job) is None
        everybody = {who.address: who for who in (friend, other, job.owner)}
        yard.audit(everybody[order[0][0]], job)
        assert yard.verdict(work)[0] == "passed"


def test_ten_vested_shards_are_needed(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=60, check=CHECKED, **LONG)
    almost = yard.veteran(job, shards=18)
    work = answered(yard, anna, job)
    town.clock.forward(10 * STEP)

    assert yard.take(almost, job) is None
    pending = yard.work(almost, job, drawn=True)
    assert yard.take(almost, job) is None, "nineteen are accepted, and the last waits for its verdict"
    yard.answer(pending)
    yard.audit(job.owner, job)
    yard.audit(job.owner, job)
    assert {yard.verdict(one) for one in (work, pending)} == {("passed", "audit.passed")}
    answered(yard, town.person(), job)
    town.clock.forward(10 * STEP)
    assert yard.take(almost, job) is not None


def test_a_name_in_a_worthless_other_job_helps_nobody(yard: Yard, town: Town) -> None:
    """Neither does it lower the draw, nor may it audit."""
    worthless = town.publish(rounds=1, shards=40, check=CHECKED, per_million=0, **LONG)
    known = yard.veteran(worthless, shards=30)
    job = town.publish(rounds=1, shards=20, check=CHECKED, **LONG)
    answered(yard, town.person(), job)
    town.clock.forward(10 * STEP)

    assert yard.take(known, job) is None
    first = yard.work(known, job)
    assert first.draw is not None
    assert first.draw["at_risk"] == 1


def test_fifty_fresh_wallets_are_drawn_fifty_times(yard: Yard, town: Town) -> None:
    job = town.publish(rounds=1, shards=50, check=CHECKED, **LONG)

    works = [yard.work(town.person(), job) for _ in range(50)]
    assert [work.draw and work.draw["at_risk"] for work in works] == [1] * 50


def test_who_has_nothing_accepted_holds_one_shard(yard: Yard, town: Town, anna: Person) -> None:
    job, other = (town.publish(rounds=1, shards=4, check=CHECKED, **LONG) for _ in range(2))
    free = town.publish(rounds=1, shards=4)
    first = anna.must_lease(job)

    assert anna.lease(job) is None
    assert anna.lease(other) is not None
    assert [anna.lease(free) is not None for _ in range(2)] == [True, True], (
        "where nothing is audited it bounds nothing"
    )
    yard.work(anna, job, lease=first)
    assert [anna.lease(job) is not None for _ in range(2)] == [True, True]


def test_nobody_audits_their_own_work_nor_what_the_recipe_leaves_to_others(yard: Yard, town: Town) -> None:
    job = town.publish(rounds=1, shards=60, check=OWN, **LONG)
    veteran = yard.veteran(job)
    work = yard.work(job.owner, job, drawn=True)
    yard.answer(work)
    town.clock.forward(10 * STEP)

    assert yard.take(veteran, job) is None
    assert yard.take(job.owner, job) is None
    offer = yard.audit(yard.operator, job)
    assert offer["target"] == work.id


def test_an_auditor_holds_one_replay_and_an_audit_has_one_at_a_time(known: tuple[Yard, Job, list[Person]]) -> None:
    yard, job, _ = known
    works = [answered(yard, yard.town.person(), job) for _ in range(2)]
    town = yard.town
    town.clock.forward(10 * STEP)
    first = yard.take(job.owner, job)
    assert first is not None
    assert yard.take(job.owner, job) is None
    second = yard.take(yard.operator, job)
    assert second is not None
    assert {first["target"], second["target"]} == {work.id for work in works}
    for who, offer in ((job.owner, first), (yard.operator, second)):
        yard.send(who, offer, yard.replayed(who, job, offer))


def test_a_dead_auditor_costs_its_turn_and_no_more(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=60, check=CHECKED, **LONG)
    first, second = yard.veteran(job), yard.veteran(job)
    work = answered(yard, anna, job)
    town.clock.forward(10 * STEP)
    offer = yard.must_take(first, job)
    end = yard.replayed(first, job, offer)
    town.clock.forward(LEASE_SECONDS + 1)
    town.tick()
    row = town.row(schema.replays, lease=offer["lease"])
    assert (row["done"], row["fee"]) == (None, 0)
    assert yard.take(first, job) is None, "it has had its turn"
    again = yard.audit(second, job)

    assert again["target"] == work.id
    assert yard.verdict(work) == ("passed", "audit.passed")
    late = first.post(f"/v1/leases/{offer['lease']}/replay", yard.signed(first, offer, end))
    assert code(late) == "audit.too_late"


def test_the_owner_s_auditor_may_begin_anew(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=2, check=OWN, **LONG)
    work = answered(yard, anna, job)
    offer = yard.must_take(job.owner, job)
    job.owner.request("DELETE", f"/v1/leases/{offer['lease']}").raise_for_status()
    again = yard.must_take(job.owner, job)
    town.clock.forward(LEASE_SECONDS + 1)
    town.tick()

    yard.audit(job.owner, job)
    assert yard.verdict(work) == ("passed", "audit.passed")
    assert again["lease"] != offer["lease"]
    assert len(town.rows(schema.replays, job=job.id)) == 1


def test_a_late_replay_is_taken_while_nobody_else_is_at_it(known: tuple[Yard, Job, list[Person]]) -> None:
    yard, job, _ = known
    town = yard.town
    work = answered(yard, town.person(), job)
    town.clock.forward(10 * STEP)
    offer = yard.must_take(yard.operator, job)
    end = yard.replayed(yard.operator, job, offer)
    town.clock.forward(LEASE_SECONDS + 1)
    town.tick()
    other = yard.must_take(job.owner, job)
    late = yard.operator.post(f"/v1/leases/{offer['lease']}/replay", yard.signed(yard.operator, offer, end))
    assert code(late) == "lease.lost"
    town.clock.forward(LEASE_SECONDS + 1)
    town.tick()

    assert yard.send(yard.operator, offer, end)["done"]
    assert yard.verdict(work) == ("passed", "audit.passed")
    assert code(job.owner.post(f"/v1/leases/{other['lease']}/beat", {})) == "audit.too_late"


def test_a_replay_is_held_for_its_share_of_the_time_at_most(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=2, check=OWN, **LONG)
    answered(yard, anna, job)
    offer = yard.must_take(job.owner, job)
    held = 0.0
    while (beat := job.owner.post(f"/v1/leases/{offer['lease']}/beat", {})).status_code == 200:
        town.clock.forward(LEASE_SECONDS / 2)
        held += LEASE_SECONDS / 2
        assert held <= job.recipe.check.timeout
    assert code(beat) == "lease.lost"
    assert held <= job.recipe.check.timeout / 3 + LEASE_SECONDS


REFUSED = {
    "jobId": "0x" + "11" * 32,
    "lease": "0x" + "22" * 32,
    "target": "0x" + "33" * 32,
    "segment": 77,
    "auditor": "0x" + "44" * 20,
    "startLeaf": "0x" + "55" * 32,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_replay_of_something_else_is_refused(yard: Yard, town: Town, anna: Person, name: str) -> None:
    job = town.publish(rounds=1, shards=2, check=OWN, **LONG)
    answered(yard, anna, job, segment=1)
    offer = yard.must_take(job.owner, job)
    end = yard.replayed(job.owner, job, offer)
    path, before = f"/v1/leases/{offer['lease']}/replay", town.rows(schema.replays, job=job.id)

    assert code(job.owner.post(path, yard.signed(job.owner, offer, end, **{name: REFUSED[name]}))) == "replay.invalid"
    forged = yard.signed(anna, offer, end, auditor=job.owner.address)
    assert code(job.owner.post(path, forged)) == "replay.invalid"
    assert code(anna.post(path, forged)) == "lease.not_yours"
    assert town.rows(schema.replays, job=job.id) == before


def test_the_first_signed_end_counts_and_its_state_must_be_it(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=2, check=OWN, **LONG)
    work = answered(yard, anna, job, segment=1)
    offer = yard.must_take(job.owner, job)
    end = yard.replayed(job.owner, job, offer)
    path, other = f"/v1/leases/{offer['lease']}", moved(end, 0.005)

    assert code(job.owner.put(f"{path}/states/2", state_bytes(other))) == "audit.none", "nothing is signed yet"
    assert job.owner.post(f"{path}/replay", yard.signed(job.owner, offer, other)).json() == {
        "done": False,
        "wants_state": True,
    }
    assert code(job.owner.post(f"{path}/replay", yard.signed(job.owner, offer, end))) == "replay.invalid"
    assert code(job.owner.put(f"{path}/states/2", state_bytes(end))) == "replay.invalid"
    assert code(job.owner.put(f"{path}/states/1", state_bytes(other))) == "audit.none"
    assert yard.verdict(work) == ("answered", None)
    yard.send(job.owner, offer, other)
    assert yard.row(work)["wants"] == [2]


def test_replays_are_paid_whatever_they_find_and_only_as_far_as_the_money_goes(yard: Yard, town: Town) -> None:
    job = town.publish(rounds=1, shards=60, check=CHECKED.model_copy(update={"spend": 0.03}), **LONG)
    veteran = yard.veteran(job)
    fees, refused = [], 0
    for _ in range(12):
        work = answered(yard, town.person(), job)
        town.clock.forward(10 * STEP)
        offer = yard.take(veteran, job)
        if offer is None:
            refused += 1
            assert yard.audit(job.owner, job)["target"] == work.id, "the owner's replays it for nothing"
            continue
        row = town.row(schema.replays, lease=offer["lease"])
        assert row["fee"] == replay_fee(job.recipe, offer["round"], offer["shard"], offer["segment"]) > 0
        fees.append(row["fee"])
        yard.send(veteran, offer, yard.replayed(veteran, job, offer))
        while yard.verdict(work)[0] == "answered":  # it was given a ringer in its place
            yard.audit(job.owner, job)
    every = [row["fee"] for row in town.rows(schema.replays, job=job.id)]
    price = sum(int(row["reward"]) for row in town.ask(f"/v1/jobs/{job.id}/contributions")["contributions"])

    assert fees
    assert refused
    assert sum(every) <= price
    assert 0 in every


@pytest.mark.parametrize("honest", [True, False])
def test_a_ringer_tells_who_replays(yard: Yard, town: Town, honest: bool) -> None:
    """Its answer is known; nothing else is decided by it."""
    job = town.publish(rounds=1, shards=60, check=CHECKED, **LONG)
    veteran = yard.veteran(job)
    for _ in range(3):
        yard.passed(town.person(), job)
    work = answered(yard, town.person(), job)
    town.clock.forward(10 * STEP)
    yard.ringers(True)
    offer = yard.must_take(veteran, job)
    yard.ringers(False)
    row = town.row(schema.replays, lease=offer["lease"])
    assert row["ringer"]
    assert offer["target"] != work.id
    told = [r for a in town.ask(f"/v1/jobs/{job.id}/audits")["audits"] for r in a["replays"]]
    assert row["lease"] not in [replay["lease"] for replay in told]

    assert len(told) >= 4
    end = yard.replayed(veteran, job, offer)
    assert yard.send(veteran, offer, end if honest else moved(end, 0.005))["done"]
    done = town.row(schema.replays, lease=offer["lease"])
    assert (done["place"], done["forfeited"]) == (1, None if honest else 1)
    assert yard.verdict(work) == ("answered", None)
    assert (yard.take(veteran, job) is not None) == honest
