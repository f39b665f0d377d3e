"""`verify`: an honest hub holds in every step; each fraud of a crooked one, on a real chain, is found and named."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, update

from tests.fixtures_hub import Job, Person, Town, job_files, new_wallet, recipe
from trainchain.chain.settlement import leaves_file, proof_for, read_leaves, settle_leaves
from trainchain.cli import verify as command
from trainchain.cli.main import run_command
from trainchain.core.client import HubClient
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema, views
from trainchain.core.hub.service import Settlement
from trainchain.core.rewards import Terms, job_price


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    made = Town(tmp_path_factory.mktemp("town"))
    yield made
    made.close()


@dataclass
class Said:
    code: int
    document: dict[str, Any]
    err: str

    @property
    def findings(self) -> list[tuple[str, str]]:
        return [(one["code"], one["message"]) for step in self.document["steps"] for one in step["findings"]]


@dataclass
class Desk:
    """Somebody with nothing but the command."""

    home: Path
    capture: pytest.CaptureFixture[str]

    def verify(self, job: Job | str, url: str | None = None, *options: str) -> Said:
        hub = url or (job.town.url if isinstance(job, Job) else "")
        name = job.id if isinstance(job, Job) else job
        self.capture.readouterr()
        code = run_command(["verify", name, "--hub", hub, "--home", str(self.home), "--json", *options])
        out, err = self.capture.readouterr()
        return Said(code, json.loads(out), err)

    def read(self, job: Job) -> tuple[int, str]:
        self.capture.readouterr()
        code = run_command(["verify", job.id, "--hub", job.town.url, "--home", str(self.home)])
        return code, self.capture.readouterr().out


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path / "home", capsys)


def work(job: Job, *workers: Person, shards: int | None = None) -> None:
    """Let the workers take turns, by default until the job has no more work; the hub does all that is due."""
    turn = 0
    while turn != shards and (lease := workers[turn % len(workers)].lease(job)) is not None:
        workers[turn % len(workers)].contribute(lease).raise_for_status()
        job.town.tick()
        turn += 1


def claim(town: Town, job: Job, worker: Person) -> None:
    """Take what the last settlement holds for a worker."""
    settled = town.chain.settlements(job.id)[-1]
    leaves = read_leaves(town.hub.objects.get(settled.data_hash.removeprefix("0x")))
    town.chain.claim(town.rich, job.id, worker.address, *proof_for(leaves, worker.address))


def doctored(monkeypatch: pytest.MonkeyPatch, town: Town, change: Any, *, number: int | None = None) -> None:
    """Let the hub's key settle other amounts than its books have, from now on or once."""

    def settlement(job_id: str, terms: Terms, amounts: Mapping[str, int]) -> Settlement:
        if number in (None, terms.number):
            amounts = change(dict(amounts))
        leaves = leaves_file(job_id, terms.number, amounts, ended=terms.ended, limit=terms.limit)
        made = settle_leaves(leaves)
        return Settlement(made.root, made.total, leaves)

    monkeypatch.setattr(town.port, "settlement", settlement)


def test_an_honest_job_holds_while_it_runs_and_at_its_end(town: Town, desk: Desk) -> None:
    job, anna, ben = town.publish(rounds=4, shards=6), town.person(), town.person()

    fresh = desk.verify(job)
    work(job, anna, anna, ben, shards=20)
    running = desk.verify(job)
    claim(town, job, anna)
    work(job, anna, ben)
    claim(town, job, ben)
    ended = desk.verify(job)

    assert [said.code for said in (fresh, running, ended)] == [0, 0, 0], (fresh.err, running.err, ended.err)
    assert [len(said.document["settlements"]) for said in (fresh, running, ended)] == [0, 1, 4]
    assert [step["step"] for step in ended.document["steps"]] == [
        "recipe", "contributions", "verdicts", "draws", "evidence", "forfeits", "leaves", "roots", "money"
    ]  # fmt: skip
    assert ended.document["ok"] is True
    assert all(step["holds"] for step in ended.document["steps"])
    workers = {line["account"]: line for line in ended.document["workers"]}
    chain = town.chain.job(job.id)
    assert sum(int(line["accepted"]) for line in workers.values()) == chain.settled
    assert workers[ben.address]["paid"] == workers[ben.address]["accepted"]
    assert 0 < int(workers[anna.address]["paid"]) < int(workers[anna.address]["settled"])
    vesting = {line["account"]: line for line in running.document["workers"]}[anna.address]
    assert int(vesting["settled"]) <= int(vesting["vested"]) < int(vesting["accepted"])


def redeem(town: Town, job: Job, worker: Person) -> None:
    """Take what the worker's newest voucher promises, where it promises more than was paid."""
    voucher = worker.get(f"/v1/jobs/{job.id}/voucher").raise_for_status().json()["voucher"]
    if voucher is not None:
        amount, signature = int(voucher["cumulative"]), voucher["signature"]
        town.chain.redeem_voucher(town.rich, job.id, worker.address, amount, signature)


def test_vouchers_and_a_budget_without_a_rest_accuse_nobody(town: Town, desk: Desk) -> None:
    """What vouchers took is reserved twice for a while, so settlements are limited by what is free."""
    files, anna, ben = job_files(), town.person(), town.person()
    made = recipe(files, rounds=4, shards=6)
    made = made.model_copy(update={"pay": made.pay.model_copy(update={"budget": job_price(made)})})
    job = town.open(made, files, town.owner)

    said = []
    for shards in (13, 5, 4):
        work(job, anna, anna, ben, shards=shards)
        redeem(town, job, anna)
        said.append(desk.verify(job))
    work(job, anna, anna, ben)
    said.append(desk.verify(job))
    claim(town, job, anna)
    claim(town, job, ben)
    said.append(desk.verify(job))

    assert [one.code for one in said] == [0] * 5, [one.err for one in said]
    limits = [int(one["limit"]) for one in said[-1].document["settlements"]]
    assert min(limits) < town.chain.job(job.id).round_cap
    _, text = desk.read(job)
    assert "below the round cap of" in text
    for line in said[-1].document["workers"]:
        assert line["paid"] == line["accepted"] != "0"


def test_each_step_is_a_line_and_every_worker_too(town: Town, desk: Desk) -> None:
    job, anna = town.publish(rounds=1, shards=2), town.person()
    work(job, anna)

    code, text = desk.read(job)

    assert code == 0
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        "job", "recipe", "contributions", "verdicts", "draws", "evidence", "forfeits", "leaves", "roots", "money", "all"
    ]  # fmt: skip
    assert any(line.startswith(f"  {anna.address}") for line in lines)
    assert f"  settlement {town.chain.settlements(job.id)[0].round}: 1 leaves" in text


def test_a_changed_amount_is_named(town: Town, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    job, anna, ben = town.publish(rounds=1, shards=2), town.person(), town.person()

    def shift(amounts: dict[str, int]) -> dict[str, int]:
        return {**amounts, anna.address: amounts[anna.address] - 1, ben.address: amounts[ben.address] + 1}

    doctored(monkeypatch, town, shift)
    work(job, anna, ben)
    said = desk.verify(job)

    assert said.code == 4
    assert said.document["ok"] is False
    assert [code for code, _ in said.findings] == ["verify.leaves", "verify.leaves"]
    assert {who.address for who in (anna, ben) if any(who.address in text for _, text in said.findings)} == {
        anna.address, ben.address
    }  # fmt: skip
    assert all("Settlement 1 owes" in text for _, text in said.findings)
    assert said.document["error"]["code"] == "verify.leaves"
    assert "(1 more)" in said.document["error"]["message"]
    code, text = desk.read(job)
    assert code == 4
    assert [line.split()[0] for line in text.splitlines() if " FAILS " in line] == ["leaves"]
    assert [line.split()[0] for line in text.splitlines() if " owes " in line] == ["verify.leaves"] * 2


def test_a_worker_left_out_of_the_leaves_is_named(town: Town, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    job, anna, ben = town.publish(rounds=1, shards=2), town.person(), town.person()
    doctored(monkeypatch, town, lambda amounts: {who: x for who, x in amounts.items() if who != ben.address})
    work(job, anna, ben)

    said = desk.verify(job)

    assert said.code == 4
    assert [code for code, _ in said.findings] == ["verify.leaves"]
    assert f"Settlement 1 leaves out {ben.address}" in said.findings[0][1]


def stored(town: Town, digest: str) -> Path:
    """Where the hub keeps an object."""
    (path,) = (
        path for path in (town.root / "objects").rglob("*") if path.is_file() and sha256(path.read_bytes()) == digest
    )
    return path


def forget(town: Town, job: Job, worker: Person, *, shards: bool, last: int = 10**6) -> None:
    """A crooked hub loses a worker's contributions: of its list, and of its own view of the job."""
    rows = [row for row in town.rows(schema.contributions, job=job.id, worker=worker.address) if row["place"] <= last]
    with town.hub.store.write() as db:
        for row in rows:
            here = {"job": job.id, "round": row["round"], "shard": row["shard"]}
            table = schema.contributions
            db.execute(delete(table).where(*(table.c[name] == value for name, value in here.items())))
            if shards:
                table = schema.shards
                where = (table.c[name] == value for name, value in here.items())
                db.execute(update(table).where(*where).values(state="abandoned"))


def test_a_worker_that_is_forgotten_before_it_is_settled_is_told_by_its_receipt(
    town: Town, desk: Desk, tmp_path: Path
) -> None:
    job, anna, ben = town.publish(rounds=1, shards=3), town.person(), town.person()
    anna.work(job)
    receipt = ben.work(job)
    forget(town, job, ben, shards=True)
    anna.work(job)
    town.tick()

    stranger = desk.verify(job)
    folder = desk.home / "receipts" / job.id
    folder.mkdir(parents=True)
    (folder / f"{receipt['lease']}.json").write_text(json.dumps(receipt), encoding="utf-8")
    (folder / "odd.json").write_text("{", encoding="utf-8")
    said = desk.verify(job)

    assert stranger.code == 0  # nobody else can know
    assert said.code == 4
    assert [code for code, _ in said.findings] == ["verify.rewards"]
    assert f"{ben.address} holds a signed receipt of" in said.findings[0][1]
    assert "odd.json" in said.err


def test_a_worker_that_is_forgotten_after_it_was_settled_is_named(town: Town, desk: Desk) -> None:
    job, anna, ben = town.publish(rounds=1, shards=3), town.person(), town.person()
    work(job, anna, ben)
    forget(town, job, ben, shards=True)

    said = desk.verify(job)

    assert said.code == 4
    assert [code for code, _ in said.findings] == ["verify.leaves"]
    assert f"Settlement 1 owes {ben.address}" in said.findings[0][1]


def test_a_contribution_less_leaves_a_gap_and_an_accepted_shard(town: Town, desk: Desk) -> None:
    job, anna = town.publish(rounds=1, shards=3), town.person()
    work(job, anna)
    forget(town, job, anna, shards=False, last=1)

    said = desk.verify(job)

    assert said.code == 4
    texts = " ".join(text for code, text in said.findings if code == "verify.rewards")
    assert f"{anna.address} has 2 accepted shards at the places 2, 3: none is at place 1" in texts


def test_a_total_that_its_leaves_do_not_reach_is_named(town: Town, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    job, anna = town.publish(rounds=1, shards=2, escrow=0), town.person()
    job.create_escrow(job.recipe.pay.budget, round_cap=10**18)
    job.owner.post(f"/v1/jobs/{job.id}/fund").raise_for_status()
    town.tick()
    settle = town.chain.settle

    def inflated(wallet: Any, job_id: str, number: int, root: str, total: int, data_hash: str) -> str:
        return settle(wallet, job_id, number, root, total + 7, data_hash)

    monkeypatch.setattr(town.chain, "settle", inflated)
    work(job, anna)
    said = desk.verify(job)

    assert said.code == 4
    assert [code for code, _ in said.findings] == ["verify.root", "verify.root"]
    assert "Settlement 1 has the total" in said.findings[0][1]
    assert "0.000000000000000007 belong to nobody" in said.findings[0][1]
    assert said.findings[1][1].startswith("The hub tells of settlement 1 with the root")


def test_a_root_of_other_leaves_is_named(town: Town, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    job, anna, thief = town.publish(rounds=1, shards=2), town.person(), new_wallet()
    settle = town.chain.settle

    def stolen(wallet: Any, job_id: str, number: int, root: str, total: int, data_hash: str) -> str:
        other = settle_leaves(leaves_file(job_id, number, {thief.address: total}))
        return settle(wallet, job_id, number, other.root, total, data_hash)

    monkeypatch.setattr(town.chain, "settle", stolen)
    work(job, anna)
    said = desk.verify(job)

    assert said.code == 4
    assert [code for code, _ in said.findings] == ["verify.root", "verify.root"]
    assert "Settlement 1 has the root" in said.findings[0][1]
    assert said.findings[1][1].startswith("The hub tells of settlement 1 with the root")


def test_a_doctored_leaves_file_is_named_and_so_is_one_that_is_gone(town: Town, desk: Desk) -> None:
    job, anna = town.publish(rounds=1, shards=2), town.person()
    work(job, anna)
    digest = town.chain.settlements(job.id)[0].data_hash.removeprefix("0x")
    path = stored(town, digest)
    kept = path.read_bytes()

    path.write_bytes(kept.replace(anna.address[2:].encode(), new_wallet().address[2:].encode()))
    changed = desk.verify(job)
    path.unlink()
    gone = desk.verify(job)
    path.write_bytes(kept)

    for said in (changed, gone):
        assert said.code == 4
        assert [code for code, _ in said.findings] == ["verify.leaves"]
        assert f"The leaves file of settlement 1, {digest} on chain, cannot be had" in said.findings[0][1]
    assert desk.verify(job).code == 0


def test_what_follows_a_file_that_is_gone_is_held_to_bounds(
    town: Town, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, anna, ben = town.publish(rounds=4, shards=6), town.person(), town.person()

    def shift(amounts: dict[str, int]) -> dict[str, int]:
        return {ben.address: 1, anna.address: sum(amounts.values()) - 1}

    doctored(monkeypatch, town, shift, number=5)
    work(job, anna, anna, ben)
    digest = town.chain.settlements(job.id)[0].data_hash.removeprefix("0x")
    path = stored(town, digest)
    path.unlink()

    said = desk.verify(job)

    assert said.code == 4
    assert {code for code, _ in said.findings} == {"verify.leaves"}
    texts = [text for _, text in said.findings]
    assert "settlement 3" in texts[0]
    low = f"Settlement 5 owes {ben.address} 0.000000000000000001; it was owed"
    assert [text.startswith(low) for text in texts].count(True) == 1
    assert not any("Settlement 4" in text for text in texts)


def test_a_hub_that_pays_itself_by_voucher_is_named(town: Town, desk: Desk) -> None:
    job, anna, thief = town.publish(rounds=2, shards=2), town.person(), new_wallet()
    work(job, anna, shards=2)
    message = {"jobId": job.id, "account": thief.address, "cumulative": 12}
    signature = town.keys.sign_typed(town.chain.domain, "Voucher", message)
    town.chain.redeem_voucher(town.rich, job.id, thief.address, 12, signature)

    said = desk.verify(job)

    assert said.code == 4
    assert [code for code, _ in said.findings] == ["verify.chain"]
    assert f"{thief.address} was paid 0.000000000000000012; 0 had vested" in said.findings[0][1]


def test_a_hub_that_pays_as_if_the_job_had_ended_is_named(
    town: Town, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, anna = town.publish(rounds=4, shards=6), town.person()

    def settlement(job_id: str, terms: Terms, amounts: Mapping[str, int]) -> Settlement:
        leaves = leaves_file(job_id, terms.number, amounts, ended=True, limit=2**100)
        made = settle_leaves(leaves)
        return Settlement(made.root, made.total, leaves)

    monkeypatch.setattr(town.port, "settlement", settlement)
    work(job, anna, shards=13)
    said = desk.verify(job)

    assert said.code == 4
    texts = [text for code, text in said.findings if code == "verify.leaves"]
    assert any("Settlement 2 pays as if the job had ended, and it goes on" in text for text in texts)
    assert any("Settlement 2 allowed itself to add" in text for text in texts)


def test_a_receipt_for_another_amount_is_named(town: Town, desk: Desk) -> None:
    job, anna = town.publish(rounds=1, shards=1), town.person()
    work(job, anna)
    (row,) = town.rows(schema.contributions, job=job.id)
    with town.hub.store.write() as db:
        table = schema.contributions
        receipt = {**row["receipt"], "amount": "9"}
        db.execute(update(table).where(table.c.lease == row["lease"]).values(receipt=receipt))

    said = desk.verify(job)

    assert said.code == 4
    where = f"The receipt of round 1, shard 0, by {anna.address},"
    assert [text.startswith(where) for _, text in said.findings] == [True, True]
    assert "promises 0.000000000000000009; the recipe gives" in said.findings[1][1]


def test_receipts_of_the_hub_before_still_count(town: Town, desk: Desk) -> None:
    job, anna = town.publish(rounds=2, shards=2), town.person()
    work(job, anna, shards=2)
    town.chain.propose_hub(job.owner.wallet, job.id, new_wallet().address)
    waiting = desk.verify(job)
    town.clock.forward(job.recipe.pay.grace + 1)

    said = desk.verify(job)
    town.chain.propose_hub(job.owner.wallet, job.id, town.keys.address)
    back = desk.verify(job)

    assert (waiting.code, said.code, back.code) == (0, 0, 0), said.err + back.err


def test_a_private_job_is_for_those_who_may_read_it(town: Town, desk: Desk) -> None:
    anna = town.person()
    job = town.publish_sealed(rounds=1, shards=1)
    work(job, anna)
    client = anna.client()

    stranger = desk.verify(job)
    document = command.report(command.gather(client, job.id, []), lambda line: None)
    client.close()

    assert stranger.code == 7
    assert stranger.document["error"]["code"] == "session.required"
    assert "owner and workers" in stranger.document["error"]["message"]
    assert all(step["holds"] for step in document["steps"])


def test_what_is_not_there_has_its_code(town: Town, desk: Desk) -> None:
    unknown = desk.verify("0x" + "ab" * 32, town.url)
    unfunded = desk.verify(town.publish(escrow=0))
    nobody = desk.verify("x", "http://127.0.0.1:9")

    assert (unknown.code, unknown.document["error"]["code"]) == (1, "job.unknown")
    assert (unfunded.code, unfunded.document["error"]["code"]) == (6, "job.unfunded")
    assert (nobody.code, nobody.document["error"]["code"]) == (3, "hub.unreachable")


def test_the_chain_can_be_asked_elsewhere(town: Town, desk: Desk) -> None:
    job = town.publish()

    assert desk.verify(job, None, "--chain", f"{town.url}/chain").code == 0
    wrong = desk.verify(job, None, "--chain", "ftp://x")
    assert (wrong.code, wrong.document["error"]["code"]) == (1, "chain.unknown")


ODD: list[Any] = [
    {"contributions": None},
    {"contributions": [{}]},
    {"contributions": [[]] * 3, "next": 1},
    {"contributions": "x", "next": "y"},
    {},
]


@pytest.mark.parametrize("answer", ODD, ids=str)
def test_what_no_hub_says_is_refused(town: Town, desk: Desk, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    job = town.publish()
    monkeypatch.setattr(views, "contributions_of", lambda *_: answer)

    said = desk.verify(job)

    assert (said.code, said.document["error"]["code"]) == (1, "hub.not_a_hub")


def test_contributions_without_end_are_refused(town: Town, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    job, anna = town.publish(rounds=1, shards=1), town.person()
    work(job, anna)
    honest = views.contributions_of

    def endless(hub: Any, job_id: str, round_: Any, after: int, limit: int) -> dict[str, Any]:
        return {**honest(hub, job_id, round_, 0, limit), "next": after + 1}

    monkeypatch.setattr(views, "contributions_of", endless)
    said = desk.verify(job)

    assert (said.code, said.document["error"]["code"]) == (1, "hub.not_a_hub")
    assert "more contributions" in said.document["error"]["message"]


def test_another_recipe_than_the_escrow_s_is_named(town: Town, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    job, other = town.publish(), town.publish(rounds=3)
    honest = views.show_job

    def lying(hub: Any, job_id: str, asker: str | None = None) -> dict[str, Any]:
        return {**honest(hub, other.id, asker), "job": job_id}

    monkeypatch.setattr(views, "show_job", lying)
    said = desk.verify(job)

    assert (said.code, said.document["error"]["code"]) == (4, "verify.chain")
    assert other.recipe.spec_hash in said.document["error"]["message"]


def test_a_log_with_a_part_kept_back_is_named(town: Town, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    job, anna = town.publish(rounds=1, shards=1), town.person()
    work(job, anna)
    logs = town._public.logs

    def fewer(*args: Any) -> list[dict[str, Any]]:
        return [log for log in logs(*args) if log["data"][-64:] != sha256(b"") and len(log["topics"]) != 3]

    monkeypatch.setattr(town._public, "logs", fewer)
    said = desk.verify(job)

    assert said.code == 4
    assert any(code == "verify.chain" and "kept back" in text for code, text in said.findings)


SPOILED: list[dict[str, Any]] = [
    {"topics": []},
    {"topics": ["0x" + "12" * 32]},
    {"data": "0x12"},
    {"data": "no hex"},
    {"data": None},
    {"blockNumber": "x"},
]


@pytest.mark.parametrize("change", SPOILED, ids=str)
def test_a_log_that_is_none_is_refused(
    town: Town, desk: Desk, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    job, logs = town.publish(), town._public.logs
    monkeypatch.setattr(town._public, "logs", lambda *args: [{**log, **change} for log in logs(*args)])

    said = desk.verify(job)

    assert (said.code, said.document["error"]["code"]) == (1, "chain.wrong")


def test_a_hub_that_goes_away_in_the_middle_is_no_fraud(
    town: Town, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, anna = town.publish(rounds=1, shards=1), town.person()
    work(job, anna)

    def away(self: HubClient, digest: str, **_: Any) -> bytes:
        raise TrainChainError("hub.unreachable", "The hub did not answer.")

    monkeypatch.setattr(HubClient, "object", away)
    said = desk.verify(job)

    assert (said.code, said.document["error"]["code"]) == (3, "hub.unreachable")


@pytest.mark.parametrize(
    "change", [{"escrow": 5}, {"escrow": "0x" + "12" * 20}, {"chain_id": 1}, {"chain_id": []}], ids=str
)
def test_another_chain_or_escrow_than_named_is_refused(
    town: Town, desk: Desk, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    job, told = town.publish(), town.port.describe()
    monkeypatch.setattr(town.port, "describe", lambda: {**told, **change})

    said = desk.verify(job)

    assert (said.code, said.document["error"]["code"]) == (1, "chain.wrong")


@pytest.mark.parametrize("name", ["rpc", "chain_id", "escrow", "hub", "embedded"])
def test_a_hub_that_does_not_name_its_chain_is_refused(
    town: Town, desk: Desk, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    job, told = town.publish(), town.port.describe()
    monkeypatch.setattr(town.port, "describe", lambda: {key: value for key, value in told.items() if key != name})

    said = desk.verify(job)

    assert said.code == 1
    assert said.document["error"]["code"] in ("chain.wrong", "hub.not_a_hub")
