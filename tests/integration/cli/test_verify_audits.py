"""`verify` on audited jobs: what an honest hub drew, decided and took holds; each fraud is found and named."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from tests.fixtures_checking import CHECKED, Yard, cheat_at, moved
from tests.fixtures_hub import Job, Person, Town
from tests.integration.cli.test_verify import Desk, Said, doctored
from trainchain.cli import delivery
from trainchain.core.digests import canonical_json
from trainchain.core.evidence import Evidence
from trainchain.core.hub import auditors, earnings, replays, schema, shows, states
from trainchain.core.rewards import VESTING, replay_fee
from trainchain.core.segments import state_bytes


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    made = Town(tmp_path_factory.mktemp("town"))
    yield made
    made.close()


@pytest.fixture
def yard(town: Town) -> Yard:
    made = Yard(town)
    honest = made.work

    def later(*args: Any, **options: Any) -> Any:
        """Nothing that a hub does falls in one moment with another."""
        town.clock.forward(0.5)
        found = honest(*args, **options)
        town.clock.forward(0.5)
        return found

    made.work = later  # type: ignore[method-assign]
    return made


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path / "home", capsys)


def rejected(yard: Yard, job: Job, who: Any) -> Any:
    """A forged segment that the owner and the operator do not get."""
    work = yard.work(who, job, segment=1, cheat=cheat_at(2))
    yard.answer(work)
    yard.audit(job.owner, job)
    if yard.row(work)["state"] == "drawn":
        yard.answer(work)
    yard.audit(yard.operator, job)
    assert yard.verdict(work) == ("failed", "audit.differs")
    return work


def finish(yard: Yard, job: Job, who: Any) -> None:
    while (lease := who.lease(job)) is not None:
        work = yard.work(who, job, lease=lease)
        if work.draw is not None:
            yard.answer(work)
            yard.audit(job.owner, job)
    yard.town.tick()


def bundle(who: Person, job: Job, folder: Path) -> Path:
    """The audit bundle of a job's last adapter, which holds."""
    folder.mkdir()
    client = who.client()
    delivery.assemble(client, delivery.look(client, job.id, None), folder, where=None)
    client.close()
    assert delivery.verify(folder)["job"] == job.id
    return folder / "trainchain"


def only(said: Said, code: str, *says: str) -> None:
    assert said.code == 4, said.err
    assert {found for found, _ in said.findings} == {code}, said.findings
    for text in says:
        assert any(text in message for _, message in said.findings), said.findings


def change(town: Town, table: Any, lease: str, **values: Any) -> None:
    with town.hub.store.write() as db:
        db.execute(update(table).where(table.c.lease == lease).values(**values))


def test_an_audited_job_holds_with_every_kind_of_verdict(town: Town, yard: Yard, desk: Desk) -> None:
    job, anna, ben = town.publish(rounds=3, shards=8, check=CHECKED), town.person(), town.person()
    yard.passed(anna, job)
    for _ in range(3):
        yard.work(anna, job, drawn=False)
    rejected(yard, job, anna)
    mute = yard.work(ben, job, drawn=True)
    waiting = yard.work(anna, job, drawn=True)
    running = desk.verify(job)
    assert running.code == 0, running.err
    town.clock.forward(3601)
    town.tick()
    assert yard.verdict(mute) == ("failed", "audit.silent")
    assert yard.verdict(waiting) == ("failed", "audit.silent")
    unseen = yard.work(ben, job, drawn=True)
    yard.answer(unseen)
    town.clock.forward(1801)
    town.tick()
    assert yard.verdict(unseen) == ("unaudited", "audit.unaudited")
    finish(yard, job, town.person())

    said = desk.verify(job)

    assert said.code == 0, said.err
    assert job.state == "settled"
    bundle(anna, job, desk.home.parent / "bundle")
    workers = {line["account"]: line for line in said.document["workers"]}
    assert int(workers[anna.address]["forfeited"]) > 0
    assert int(workers[anna.address]["accepted"]) == int(workers[anna.address]["settled"]) == 0
    _, text = desk.read(job)
    assert "audit.differs: 1" in text


def done(town: Town, yard: Yard) -> tuple[Job, Any, Any]:
    """A job of one round that has ended: one shard that was audited and passed, and one that was not drawn."""
    job, anna = town.publish(rounds=1, shards=2, check=CHECKED), town.person()
    passed = yard.passed(anna, job)
    plain = yard.work(anna, job, drawn=False)
    assert job.state == "settled"
    return job, passed, plain


def test_a_skipped_draw_is_named(town: Town, yard: Yard, desk: Desk) -> None:
    job, anna = town.publish(rounds=1, shards=2, check=CHECKED), town.person()
    skipped = yard.work(anna, job, drawn=True)
    with town.hub.store.write() as db:
        db.execute(schema.audits.delete().where(schema.audits.c.lease == skipped.id))
    change(town, schema.contributions, skipped.id, resolved=0)
    finish(yard, job, anna)

    only(desk.verify(job), "verify.draws", f"was to be audited in segment {skipped.segment}, and the draw was skipped")


def test_an_invented_draw_is_named(town: Town, yard: Yard, desk: Desk) -> None:
    job, passed, plain = done(town, yard)
    (row,) = town.rows(schema.audits, lease=passed.id)
    where = {"lease": plain.id, "shard": plain.lease["shard"], "state": "answered", "code": None, "evidence": None}
    with town.hub.store.write() as db:
        db.execute(insert(schema.audits).values({**row, **where, "decided": None}))
    change(town, schema.contributions, plain.id, resolved=None, settled_in=None)

    said = desk.verify(job)

    assert said.code == 4
    assert any(code == "verify.draws" and "an audit was invented" in text for code, text in said.findings)


def test_a_moved_draw_is_named(town: Town, yard: Yard, desk: Desk) -> None:
    job, passed, _ = done(town, yard)
    change(town, schema.audits, passed.id, segment=(passed.segment + 1) % 4)

    said = desk.verify(job)

    assert said.code == 4
    assert ("verify.draws", True) in [(code, "the draw was moved to" in text) for code, text in said.findings]


def test_a_draw_with_less_at_risk_is_named(town: Town, yard: Yard, desk: Desk) -> None:
    job, passed, _ = done(town, yard)
    change(town, schema.audits, passed.id, at_risk=4)

    said = desk.verify(job)

    assert ("verify.draws", True) in [(code, "4 shards at risk; there were 1" in text) for code, text in said.findings]


def test_another_secret_than_the_signed_one_is_named_and_so_is_one_kept_back(
    town: Town, yard: Yard, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _, _ = done(town, yard)
    honest = str(job.round(1)["secret"])
    with town.hub.store.write() as db:
        db.execute(update(schema.rounds).where(schema.rounds.c.job == job.id).values(secret="0x" + "7f" * 32))
    other = desk.verify(job)
    with town.hub.store.write() as db:
        db.execute(update(schema.rounds).where(schema.rounds.c.job == job.id).values(secret=honest))
    monkeypatch.setattr("trainchain.core.hub.views._is_drawn_out", lambda *_: False)
    hidden = desk.verify(job)

    assert other.code == 4
    assert any(code == "verify.draws" and "the hub signed" in text for code, text in other.findings)
    only(hidden, "verify.draws", "The secret of round 1 is kept back")


def test_what_a_worker_was_told_of_its_draw_is_held_against_what_everybody_is(
    town: Town, yard: Yard, desk: Desk
) -> None:
    job, passed, plain = done(town, yard)
    folder = desk.home / "receipts" / job.id
    folder.mkdir(parents=True)
    hashed = {name: passed.lease[name] for name in ("secret_hash", "secret_signature")}

    def keep(work: Any, draw: Any, **changes: Any) -> Said:
        receipt = {**work.receipt, "draw": draw, **hashed, **changes}
        (folder / f"{work.id}.json").write_text(json.dumps(receipt), encoding="utf-8")
        return desk.verify(job)

    assert keep(passed, passed.draw).code == 0
    assert keep(plain, None).code == 0
    only(keep(plain, {"segment": 2, "at_risk": 2}), "verify.draws", "everybody is told: no audit")
    keep(plain, None)
    only(keep(passed, None), "verify.draws", "no audit; everybody is told: segment")
    signed = {"jobId": job.id, "round": 1, "secretHash": "0x" + "12" * 32}
    two = {"secret_hash": signed["secretHash"]}
    two["secret_signature"] = town.keys.sign_typed(town.chain.domain, "RoundSecret", signed)
    only(keep(passed, passed.draw, **two), "verify.draws", "holds the signed secret hash 0x1212")


def rewrite(town: Town, work: Any, **changes: Any) -> None:
    """Another evidence document in the place of an audit's."""
    row = town.row(schema.audits, lease=work.id)
    document = json.loads(town.hub.objects.get(row["evidence"])) | changes
    data = canonical_json(Evidence.model_validate(document).model_dump(mode="json"))
    digest = town.hub.objects.put(data)
    values = {"digest": digest, "job": row["job"], "size": len(data), "public": True, "present": True}
    with town.hub.store.write() as db:
        there = select(schema.objects.c.digest).where(schema.objects.c.digest == digest)
        if db.execute(there).first() is None:
            db.execute(insert(schema.objects).values(**values))
    change(town, schema.audits, work.id, evidence=digest)


def test_an_invented_rejection_does_not_follow_from_its_evidence(town: Town, yard: Yard, desk: Desk) -> None:
    job, anna = town.publish(rounds=1, shards=3, check=CHECKED), town.person()
    passed = yard.passed(anna, job)
    reward = int(passed.receipt["amount"])
    rewrite(town, passed, code="audit.differs", forfeits={"first": 1, "last": 1, "amount": str(reward)})
    change(town, schema.audits, passed.id, state="failed", code="audit.differs")
    change(town, schema.contributions, passed.id, resolved=None, forfeited=1)
    finish(yard, job, town.person())

    only(desk.verify(job), "verify.evidence", "does not follow from its replays: audit.passed does")


def test_a_verdict_without_evidence_and_one_on_a_forged_replay_are_named(town: Town, yard: Yard, desk: Desk) -> None:
    job, passed, _ = done(town, yard)
    row = town.row(schema.audits, lease=passed.id)
    change(town, schema.audits, passed.id, evidence=None)
    only(desk.verify(job), "verify.evidence", "has no evidence that can be read")
    change(town, schema.audits, passed.id, evidence=row["evidence"])
    document = json.loads(town.hub.objects.get(row["evidence"]))
    replay = document["replays"][0]
    replay["signed"]["replay"]["endLeaf"] = "0x" + "5a" * 32
    rewrite(town, passed, replays=[replay])

    only(desk.verify(job), "verify.evidence", "did not sign", "takes a replay by")


def test_a_start_that_its_worker_did_not_open_is_named(
    town: Town, yard: Yard, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replays, "_insist_signed", lambda *_: None)  # a hub that would frame a worker
    job, anna = town.publish(rounds=1, shards=2, check=CHECKED), town.person()
    work = yard.work(anna, job, segment=1)
    yard.answer(work)
    data = state_bytes(moved(work.states[1], 0.02))
    with town.hub.store.write() as db:
        states.keep(db, job.id, work.id, 1, town.hub.objects.put(data), len(data))
    for auditor in (job.owner, yard.operator):
        yard.audit(auditor, job)
        if yard.row(work)["wants"]:
            yard.answer(work)
    finish(yard, job, town.person())

    assert yard.verdict(work) == ("failed", "audit.differs")
    framed = [
        "rests on a state 1 that is not the one opened under the signed root",
        f"rests on a replay by {job.owner.address} that started from something else than what was opened",
        f"rests on a replay by {yard.operator.address} that started from something else than what was opened",
    ]
    only(desk.verify(job), "verify.evidence", *framed)


@pytest.mark.parametrize(
    ("role", "says"),
    [
        ("earned", "told of as earned, and fewer than 10 shards"),
        ("operator", "told of as the operator's, and the hub has no such auditor"),
        ("confirms", "told of as a confirmation, and no audit of that wallet's work had passed"),
        ("owner", "told of as of the role owner, and the job's owner is"),
    ],
)
def test_a_role_that_an_auditor_has_not_is_named(
    town: Town, yard: Yard, desk: Desk, monkeypatch: pytest.MonkeyPatch, role: Any, says: str
) -> None:
    job, anna, friend = town.publish(rounds=1, shards=2, check=CHECKED), town.person(), town.person()
    work = yard.work(anna, job, segment=1)
    yard.answer(work)
    monkeypatch.setattr(auditors, "EARNED", -9)
    monkeypatch.setattr(auditors, "_line", lambda *_: [{friend.address: role}])
    yard.audit(friend, job)
    monkeypatch.undo()
    if yard.verdict(work)[1] is None:
        yard.audit(job.owner, job)
    finish(yard, job, town.person())

    said = desk.verify(job)

    assert said.code == 4
    assert any(code == "verify.evidence" and says in text for code, text in said.findings), said.findings


def test_an_auditor_who_is_put_to_the_test_holds(town: Town, yard: Yard, desk: Desk) -> None:
    job, anna = town.publish(rounds=1, shards=22, check=CHECKED), town.person()
    veteran = yard.veteran(job)
    yard.passed(anna, job)
    waiting = yard.work(anna, job, drawn=True)
    yard.answer(waiting)
    yard.ringers(True)
    yard.audit(veteran, job)
    yard.ringers(False)
    assert yard.row(waiting)["state"] == "answered"
    running = desk.verify(job)
    known = town.rows(schema.replays, auditor=veteran.address)[0]["audit"]
    told_by = {"evidence": f"/v1/jobs/{job.id}/evidence/{known}"}
    told_by["object"] = f"/v1/objects/{town.row(schema.audits, lease=known)['evidence']}"
    assert {town.http.get(town.url + path).status_code for path in told_by.values()} == {404}
    assert {veteran.get(path).status_code for path in told_by.values()} == {404}
    told = [one for audit in town.ask(f"/v1/jobs/{job.id}/audits")["audits"] for one in audit["replays"]]
    finish(yard, job, town.person())
    yard.audit(job.owner, job)
    town.tick()
    over = desk.verify(job)

    assert running.code == 0, running.err
    assert [one["signed"] for one in told] == [None, None, None], "whoever is put to the test would have the answer"
    digest = yard.row(waiting)["evidence"]
    assert digest is not None
    assert town.http.get(f"{town.url}/v1/objects/{digest}").status_code == 200, "it is no secret any more"
    assert job.state == "settled"
    assert over.code == 0, over.err


def test_an_invented_test_of_an_auditor_is_named(town: Town, yard: Yard, desk: Desk) -> None:
    job, passed, _ = done(town, yard)
    friend = town.person()
    fee = replay_fee(job.recipe, passed.lease["round"], passed.lease["shard"], passed.segment)
    with town.hub.store.write() as db:
        row = {"lease": "0x" + secrets.token_hex(32), "audit": passed.id, "job": job.id, "auditor": friend.address}
        row |= {"role": "earned", "ringer": True, "fee": fee, "place": 1, "done": town.clock()}
        db.execute(insert(schema.replays).values(**row, counted=earnings.following(db, job.id)))

    said = desk.verify(job)

    assert said.code == 4
    texts = [text for code, text in said.findings if code == "verify.evidence"]
    assert any("is told of without what was signed" in text for text in texts), said.findings
    assert any("fewer than 10 shards" in text for text in texts)


def test_a_rejection_that_keeps_its_states_back_is_named(town: Town, yard: Yard, desk: Desk) -> None:
    job, anna = town.publish(rounds=1, shards=2, check=CHECKED), town.person()
    work = rejected(yard, job, anna)
    finish(yard, job, town.person())
    assert desk.verify(job).code == 0
    shown = yard.evidence(work)["states"]
    rewrite(town, work, states={index: digest for index, digest in shown.items() if index != "2"})

    only(desk.verify(job), "verify.evidence", "rejects by states that cannot be had: 2")


def test_a_delta_that_does_not_follow_holds_with_its_end_shown(town: Town, yard: Yard, desk: Desk) -> None:
    job, anna = town.publish(rounds=1, shards=2, check=CHECKED), town.person()
    lease = anna.must_lease(job)
    other = yard.train(anna, job, lease, 7).data
    work = yard.work(anna, job, drawn=True, lease=lease, delta=other)
    yard.answer(work)
    finish(yard, job, town.person())

    assert yard.verdict(work) == ("failed", "audit.wrong_delta")
    said = desk.verify(job)
    assert said.code == 0, said.err


def test_a_silence_that_was_given_no_time_is_named(town: Town, yard: Yard, desk: Desk) -> None:
    job, anna = town.publish(rounds=1, shards=2, check=CHECKED), town.person()
    mute = yard.work(anna, job, drawn=True)
    change(town, schema.audits, mute.id, answer_by=town.clock() - 1)
    town.clock.forward(1)
    town.tick()
    finish(yard, job, town.person())

    only(desk.verify(job), "verify.evidence", "rejects a silence before there was time to answer")


def test_more_and_less_forfeited_than_the_rule_says_is_named(town: Town, yard: Yard, desk: Desk) -> None:
    job, anna = town.publish(rounds=1, shards=VESTING + 5, check=CHECKED), town.person()
    works = [yard.passed(anna, job)] + [yard.work(anna, job, drawn=False) for _ in range(VESTING + 1)]
    works.append(rejected(yard, job, anna))
    assert desk.verify(job).code == 0
    change(town, schema.contributions, works[0].id, forfeited=1)
    more = desk.verify(job)
    change(town, schema.contributions, works[0].id, forfeited=None)
    change(town, schema.contributions, works[4].id, forfeited=None)
    less = desk.verify(job)

    assert any(
        code == "verify.forfeits" and "the places 1 are forfeited, which had vested" in x for code, x in more.findings
    )
    assert any(code == "verify.forfeits" and "the places 5 are not forfeited" in x for code, x in less.findings)


def test_a_forfeit_without_a_rejection_is_named(town: Town, yard: Yard, desk: Desk) -> None:
    job, anna = town.publish(rounds=1, shards=3, check=CHECKED), town.person()
    yard.passed(anna, job)
    plain = yard.work(anna, job, drawn=False)
    change(town, schema.contributions, plain.id, forfeited=1)
    finish(yard, job, town.person())

    only(desk.verify(job), "verify.forfeits", "is forfeited, and no evidence rejects anything of that worker's")


def test_a_forfeited_shard_that_is_paid_is_named(
    town: Town, yard: Yard, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, anna, ben = town.publish(rounds=1, shards=3, check=CHECKED), town.person(), town.person()
    lost = rejected(yard, job, anna)
    doctored(monkeypatch, town, lambda amounts: {**amounts, anna.address: int(lost.receipt["amount"])})
    finish(yard, job, ben)

    only(desk.verify(job), "verify.leaves", f"owes {anna.address}")


def test_a_hidden_fee_and_a_hidden_replay_are_named(
    town: Town, yard: Yard, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = town.publish(rounds=1, shards=24, check=CHECKED)
    veteran, anna = yard.veteran(job), town.person()
    work = yard.work(anna, job, drawn=True)
    yard.answer(work)
    yard.audit(veteran, job)
    assert yard.verdict(work) == ("passed", "audit.passed")
    (replay,) = town.rows(schema.replays, auditor=veteran.address)
    assert replay["fee"] > 0
    assert desk.verify(job).code == 0
    change(town, schema.replays, replay["lease"], fee=0)
    unpaid = desk.verify(job)
    change(town, schema.replays, replay["lease"], fee=replay["fee"])
    honest = shows.audits_of

    def silent(*args: Any) -> dict[str, Any]:
        told = honest(*args)
        return {**told, "audits": [{**audit, "replays": []} for audit in told["audits"]]}

    monkeypatch.setattr(shows, "audits_of", silent)
    hidden = desk.verify(job)
    monkeypatch.undo()
    change(town, schema.replays, replay["lease"], forfeited=1)
    taken = desk.verify(job)

    only(unpaid, "verify.forfeits", "is paid 0; the recipe gives")
    assert any(code == "verify.evidence" and "no replay of it is told of" in text for code, text in hidden.findings)
    only(taken, "verify.forfeits", "is forfeited, and nothing proves it wrong")


def test_fees_are_in_the_leaves_of_a_job_that_ended(town: Town, yard: Yard, desk: Desk) -> None:
    job = town.publish(rounds=2, shards=22, check=CHECKED)
    veteran, anna = yard.veteran(job), town.person()
    work = yard.work(anna, job, drawn=True)
    yard.answer(work)
    yard.audit(veteran, job, lambda state: moved(state, 0.5))
    if yard.row(work)["state"] == "drawn":
        yard.answer(work)
    yard.audit(job.owner, job)
    assert yard.verdict(work) == ("passed", "audit.passed") or yard.row(work)["state"] == "answered"
    if yard.row(work)["state"] == "answered":
        yard.audit(yard.operator, job)
    finish(yard, job, anna)

    said = desk.verify(job)

    assert said.code == 0, said.err
    assert job.state == "settled"
    fees = json.loads((bundle(anna, job, desk.home.parent / "bundle") / "fees.json").read_bytes())["fees"]
    assert [fee["fee"] == "0" for fee in fees if fee["auditor"] == veteran.address] == [False]
