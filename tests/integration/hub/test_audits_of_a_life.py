"""Audits through a job's life: merges, private jobs, ends, and a hub that dies in between."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.fixtures_checking import CHECKED, ENDS, LONG, OWN, Yard, cheat_at, moved, nudged
from tests.fixtures_hub import LEARNING_RATE, Job, Person, Town
from tests.fixtures_merge import PLAIN_MERGE
from trainchain.core.adapter import read_adapter
from trainchain.core.digests import sha256
from trainchain.core.draws import secret_hash
from trainchain.core.hub import audits, schema
from trainchain.core.merge.updates import factors_of, modules_of
from trainchain.core.segments import State, state_bytes


@pytest.fixture
def yard(town: Town) -> Yard:
    return Yard(town)


def code(answer: httpx.Response) -> str:
    assert answer.status_code >= 400, answer.text
    return str(answer.json()["code"])


@pytest.mark.parametrize("at", ["drawn", "answered", "at it", "signed", "asked again"])
def test_a_hub_that_dies_in_between_goes_on(tmp_path: Path, at: str) -> None:
    town = Town(tmp_path)
    yard = Yard(town)
    try:
        anna, operator = town.person(), yard.operator
        job = town.publish(rounds=1, shards=4, check=CHECKED, **LONG)

        def restart(here: str) -> None:
            if here == at:
                town.stop()
                town.start()
                yard.ringers(False)
                for who in (anna, operator, job.owner):
                    who._session = ("", 0.0)
                audits.extend_all(town.hub)
                town.tick()

        work = yard.work(anna, job, segment=1, cheat=cheat_at(2))
        restart("drawn")
        assert code(anna.contribute(work.lease, work.data, stateRoot=work.root)) == "contribution.repeat"
        yard.answer(work)
        restart("answered")
        offer = yard.must_take(operator, job)
        restart("at it")
        end = yard.replayed(operator, job, offer)
        path = f"/v1/leases/{offer['lease']}/replay"
        assert operator.post(path, yard.signed(operator, offer, end)).json() == {"done": False, "wants_state": True}
        restart("signed")
        assert yard.send(operator, offer, end)["done"]
        assert yard.row(work)["wants"] == [2]
        restart("asked again")
        yard.answer(work)
        yard.audit(job.owner, job)
        assert yard.verdict(work) == ("failed", "audit.differs")
        (row,) = town.rows(schema.audits, job=job.id)
        assert row["evidence"] is not None
        assert len(town.rows(schema.replays, job=job.id)) == 2
    finally:
        town.close()


def test_after_the_hub_was_away_a_draw_may_still_be_answered(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=4, check=CHECKED, **LONG)
    first = yard.work(anna, job, drawn=True)
    second = yard.passed(town.person(), job)
    waits = yard.work(town.person(), job, drawn=True)
    yard.answer(waits)
    town.clock.forward(10 * job.recipe.check.answer)
    audits.extend_all(town.hub)
    town.tick()

    assert yard.verdict(second)[0] == "passed"
    assert yard.verdict(waits)[0] == "answered"
    yard.answer(first)
    yard.audit(job.owner, job)
    yard.audit(job.owner, job)
    assert {yard.verdict(first), yard.verdict(waits)} == {("passed", "audit.passed")}


def test_rounds_wait_for_no_audit(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=2, shards=1, check=CHECKED)
    work = yard.work(anna, job, drawn=True)

    assert yard.verdict(work)[0] == "drawn"
    assert job.view()["round"] == 2


def test_a_round_waits_before_its_merge_as_long_as_its_recipe_says(yard: Yard, town: Town) -> None:
    check = CHECKED.model_copy(update={"before_merge": 100})
    for verdict in (False, True):
        job = town.publish(rounds=2, shards=1, check=check)
        work = yard.work(town.person(), job, drawn=True)
        assert [row["state"] for row in town.rows(schema.rounds, job=job.id)] == ["merging"]
        if verdict:
            yard.answer(work)
            yard.audit(job.owner, job)
        else:
            town.clock.forward(99)
            town.tick()
            assert job.round(1)["state"] == "merging"
            town.clock.forward(1)
            town.tick()
        assert job.view()["round"] == 2


@pytest.mark.parametrize("moments", ["fresh", "merged"])
def test_what_is_rejected_before_the_merge_is_not_in_it(yard: Yard, town: Town, moments: str) -> None:
    way = PLAIN_MERGE.model_copy(update={"moments": moments})
    job = town.publish(rounds=3, shards=2, check=CHECKED, merge=way)
    forger, honest = town.person(), town.person()
    bad = yard.work(forger, job, segment=1, cheat=cheat_at(0))
    for index in yard.row(bad)["wants"]:
        yard.put(bad, index)
    yard.post(bad).raise_for_status()
    good = yard.work(honest, job, drawn=True)

    assert job.round(1)["state"] == "merged"
    merged = read_adapter(town.hub.objects.get(job.round(1)["adapter"]))
    for module in modules_of(merged):
        product, alone = (factors_of(dict(one), module) for one in (merged, good.states[-1].w))
        assert abs(product.b @ product.a - alone.b @ alone.a).max() < 1e-6
    assert yard.given(bad)["merge"] == {"weight": 0.0, "scale": 1.0, "why": "rejected"}
    assert yard.given(good)["merge"]["weight"] == 1.0
    assert (yard.given(bad)["forfeited"], yard.given(good)["forfeited"]) == (1, None)


@pytest.mark.parametrize("moments", ["fresh", "merged"])
def test_a_round_of_nothing_but_rejected_work_moves_nothing(yard: Yard, town: Town, moments: str) -> None:
    way = PLAIN_MERGE.model_copy(update={"moments": moments, "encoding": "int4"})
    check = CHECKED.model_copy(update={"before_merge": 100})
    job = town.publish(rounds=3, shards=1, check=check, merge=way)
    for number in (1, 2):
        bad = yard.work(town.person(), job, segment=1, cheat=cheat_at(0))
        yard.answer(bad)
        assert yard.verdict(bad) == ("failed", "audit.wrong_start")
        assert job.round(number)["adapter"] == job.round(number)["start"]
        assert job.view()["round"] == number + 1
    good = yard.passed(town.person(), job)
    assert job.round(3)["state"] == "merged"
    assert job.round(3)["adapter"] != job.round(3)["start"]
    assert yard.given(good)["merge"]["weight"] == 1.0


def test_merged_work_that_is_rejected_stays_merged(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=2, shards=1, check=CHECKED)
    work = yard.work(anna, job, segment=1, cheat=cheat_at(2))
    adapter = job.round(1)["adapter"]
    yard.answer(work)
    yard.audit(job.owner, job)
    yard.answer(work)
    yard.audit(yard.operator, job)

    assert yard.verdict(work) == ("failed", "audit.differs")
    assert job.round(1)["adapter"] == adapter is not None
    assert yard.given(work)["merge"]["weight"] == 1.0


def test_what_waits_with_a_rejected_shard_is_void_and_lost_with_it(yard: Yard, town: Town, anna: Person) -> None:
    check = CHECKED.model_copy(update={"timeout": 10**5})
    job = town.publish(rounds=1, shards=8, check=check, **LONG)
    silent, work = yard.work(anna, job, drawn=True), yard.work(anna, job, segment=1)
    town.clock.forward(job.recipe.check.answer - 100)
    yard.answer(work)
    town.clock.forward(95)
    offer = yard.must_take(job.owner, job)
    end = yard.replayed(job.owner, job, offer)
    town.clock.at = max(town.clock.at, silent.draw["answer_by"] + 1)  # type: ignore[index]
    town.tick()

    assert yard.verdict(silent) == ("failed", "audit.silent")
    assert yard.verdict(work) == ("void", None)
    assert code(job.owner.post(f"/v1/leases/{offer['lease']}/beat", {})) == "audit.too_late"
    late = job.owner.post(f"/v1/leases/{offer['lease']}/replay", yard.signed(job.owner, offer, end))
    assert code(late) == "audit.too_late"
    assert code(yard.put(work, 1)) == "audit.none"
    given = yard.given(work)
    assert (given["resolved"], given["forfeited"]) == (None, 1)
    document = yard.evidence(silent)
    assert (document["forfeits"]["first"], document["forfeits"]["last"]) == (1, 2)
    assert town.http.get(f"{town.url}/v1/jobs/{job.id}/evidence/{work.id}").status_code == 404


def test_two_draws_that_lapse_together_are_one_verdict(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=8, check=CHECKED, **LONG)
    first, second = (yard.work(anna, job, drawn=True) for _ in range(2))
    other = yard.work(town.person(), job, drawn=True)
    town.clock.forward(job.recipe.check.answer + 1)

    assert audits.tick(town.hub)
    assert [yard.verdict(work)[0] for work in (first, second, other)] == ["failed", "void", "failed"]
    assert not audits.tick(town.hub)


END: dict[str, Callable[[Job], None]] = {
    "cancelled": lambda job: job.owner.post(f"/v1/jobs/{job.id}/cancel").raise_for_status() and None,
    "expired": lambda job: job.town.clock.forward(job.row["deadline"] - job.town.clock() + 1),
}


@pytest.mark.parametrize("end", END)
def test_a_job_s_end_waits_for_the_answer_and_for_no_auditor(yard: Yard, town: Town, end: str) -> None:
    check = CHECKED.model_copy(update={"answer": 10**6, "timeout": 10**6})
    job = town.publish(rounds=1, shards=6, check=check)
    answered, silent, held = town.person(), town.person(), town.person()
    lease = held.must_lease(job)
    good = yard.work(answered, job, drawn=True)
    yard.answer(good)
    bad = yard.work(silent, job, drawn=True)
    over = job.row["deadline"] + job.row["grace"] / 2
    assert yard.row(bad)["answer_by"] == job.row["deadline"] + job.row["grace"] / 4
    END[end](job)
    held.post(f"/v1/leases/{lease['lease']}/beat", {})
    town.tick()
    assert job.state == end
    assert {yard.verdict(good), yard.verdict(bad)} == {("answered", None), ("drawn", None)}
    town.clock.at = over + 1
    town.tick()

    assert yard.verdict(good) == ("unaudited", "audit.unaudited")
    assert yard.verdict(bad) == ("failed", "audit.silent")
    assert job.state == "settled"
    owed = {row["account"]: row["cumulative"] for row in town.rows(schema.vouchers, job=job.id)}
    assert owed == {answered.address: int(good.receipt["amount"])}


def test_a_job_that_ends_is_still_audited(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=1, check=CHECKED)
    work = yard.work(anna, job, drawn=True)
    assert job.state == "finished"
    yard.answer(work)
    yard.audit(job.owner, job)

    assert yard.verdict(work) == ("passed", "audit.passed")
    assert job.state == "settled"
    assert town.rows(schema.states, job=job.id) == []


def forged(at: int, state: State) -> State:
    return moved(state, LEARNING_RATE / 2) if at else state


def test_a_whole_job_pays_honest_work_and_no_other(yard: Yard, town: Town) -> None:
    """Three honest workers, one who forges every segment, one who answers no draw; owner and operator audit."""
    job = town.publish(rounds=3, shards=12, check=CHECKED, quorum=1.0, **LONG)
    honest, forger, mute = [town.person() for _ in range(3)], town.person(), town.person()
    caught = 0
    while job.view()["state"] == "running":
        for who in (*honest, forger, mute):
            if (lease := who.lease(job)) is None or lease["kind"] != "train":
                continue
            work = yard.work(who, job, lease=lease, cheat=forged if who is forger else None)
            if work.draw is None or who is mute:
                continue
            yard.answer(work)
            yard.audit(job.owner, job)
            if yard.row(work)["wants"]:
                yard.answer(work)
            if who is forger:
                yard.audit(yard.operator, job)
            assert yard.verdict(work)[1] == ("audit.differs" if who is forger else "audit.passed")
            caught += who is forger
    town.clock.forward(job.recipe.check.answer + 1)
    town.tick()

    assert job.state == "settled"
    rows = town.rows(schema.contributions, job=job.id)
    assert len(rows) == 36
    lost = {row["worker"] for row in rows if row["forfeited"] is not None}
    assert caught, "its first shard is drawn, and so is the first after each rejection"
    assert lost == {forger.address, mute.address}
    audits_ = town.rows(schema.audits, job=job.id)
    assert {row["code"] for row in audits_ if row["worker"] in {who.address for who in honest}} == {"audit.passed"}
    assert {row["state"] for row in audits_} <= {"passed", "failed", "void"}
    owed = {row["account"]: row["cumulative"] for row in town.rows(schema.vouchers, job=job.id)}
    for who in honest:
        assert owed[who.address] == sum(row["reward"] for row in rows if row["worker"] == who.address)
    assert mute.address not in owed
    works = [row for row in rows if row["worker"] == forger.address]
    assert owed.get(forger.address, 0) == sum(row["reward"] for row in works if row["forfeited"] is None)
    for number in range(1, 4):
        told = job.view()["rounds_done"][number - 1]
        assert secret_hash(bytes.fromhex(told["secret"][2:])) == told["secret_hash"]


def test_a_private_job_is_audited_by_its_own(yard: Yard, town: Town, anna: Person, ben: Person) -> None:
    """The auditor gets the keys of that shard, and everything else stays shut."""
    job = town.publish_sealed(workers=[anna.address, ben.address], check=CHECKED)
    work = yard.work(anna, job, segment=1, cheat=cheat_at(2))
    yard.answer(work)
    stranger = town.person()
    assert stranger.get(f"/v1/jobs/{job.id}/audits").status_code == 403
    offer = yard.must_take(job.owner, job)
    opened = job.owner.opened(offer, job.owner.ask_keys(offer))
    block = job.sealed.blocks[offer["round"] - 1][offer["shard"]].sha256
    assert opened == {digest: job.identities[digest] for digest in [block, *(ref.sha256 for ref in job.sealed.base)]}
    start = sha256(state_bytes(work.states[1]))
    assert offer["state"] == start
    for who in (ben, stranger, yard.operator):
        assert who.get(f"/v1/objects/{start}").status_code == 404
    yard.send(job.owner, offer, yard.replayed(job.owner, job, offer))
    yard.answer(work)
    yard.audit(yard.operator, job)

    assert yard.verdict(work) == ("failed", "audit.differs")
    digest, path = yard.row(work)["evidence"], f"/v1/jobs/{job.id}/evidence/{work.id}"
    assert town.http.get(f"{town.url}{path}").status_code == 401
    assert stranger.get(path).status_code == 403
    assert anna.get(path).json()["code"] == "audit.differs"
    assert town.http.get(f"{town.url}/v1/objects/{digest}").status_code == 401
    ben.must_lease(job)
    for name in (digest, start):
        assert ben.get(f"/v1/objects/{name}").status_code == 200
        assert stranger.get(f"/v1/objects/{name}").status_code == 404


def test_states_are_for_an_audit_s_parties(yard: Yard, town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=1, shards=8, check=CHECKED, **LONG)
    work, other = yard.work(anna, job, segment=1), yard.work(ben, job, drawn=True)
    yard.answer(work)
    start, end = (sha256(state_bytes(work.states[index])) for index in (1, len(ENDS)))
    assert other.draw is not None

    for who in (ben, town.person(), job.owner, yard.operator):
        assert {who.get(f"/v1/objects/{digest}").status_code for digest in (start, end)} == {404}
    assert town.http.get(f"{town.url}/v1/objects/{start}").status_code == 401
    assert anna.get(f"/v1/objects/{start}").status_code == 200
    offer = yard.must_take(job.owner, job)
    assert job.owner.get(f"/v1/objects/{start}").status_code == 200
    assert job.owner.get(f"/v1/objects/{end}").status_code == 404, "never the claimed end"
    replayed = moved(yard.replayed(job.owner, job, offer), 0.005)
    yard.send(job.owner, offer, replayed)
    yard.put(work, 2).raise_for_status()
    for who in (ben, job.owner, yard.operator):
        assert who.get(f"/v1/objects/{sha256(state_bytes(work.states[2]))}").status_code == 404
    assert anna.get(f"/v1/objects/{sha256(state_bytes(replayed))}").status_code == 404


def test_where_nothing_is_audited_nothing_is_drawn(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=3)
    works = [yard.work(anna, job) for _ in range(3)]

    assert [work.draw for work in works] == [None] * 3
    assert {yard.given(work)["resolved"] for work in works} == {0}
    assert town.ask(f"/v1/jobs/{job.id}/audits") == {"audits": [], "next": None}


def test_audits_are_told_in_pages(yard: Yard, town: Town) -> None:
    job = town.publish(rounds=1, shards=5, check=OWN)
    works = [yard.work(town.person(), job) for _ in range(5)]
    found, after = [], 0
    while after is not None:
        page = town.ask(f"/v1/jobs/{job.id}/audits?limit=2&after={after}")
        assert len(page["audits"]) <= 2
        found += [row["lease"] for row in page["audits"]]
        after = page["next"]
    assert found == [work.id for work in sorted(works, key=lambda work: work.lease["shard"])]


def test_the_evidence_has_the_distances_and_their_bounds(yard: Yard, town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=2, check=CHECKED, **LONG)
    work = yard.work(anna, job, segment=1)
    yard.answer(work)
    yard.audit(job.owner, job, lambda state: nudged(state, 1e-6), numericClass="another machine")
    yard.answer(work)

    assert yard.verdict(work) == ("passed", "audit.passed")
    told = yard.evidence(work)
    distances, limits = told["replays"][0]["distances"], told["tolerance"]
    assert all(distances[name] <= limits[name] for name in limits)
    assert limits["furthest"] == pytest.approx(3 * LEARNING_RATE, rel=1e-3), "what one step can move"
    assert told["cold"] is True or told["cold"] is False


def test_judging_loads_no_torch() -> None:
    code = "import sys, trainchain.core.hub.api; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)

    assert done.stdout.strip() == "[]"
