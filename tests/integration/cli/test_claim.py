"""claim and earnings, against a real hub over HTTP and the escrow on its chain; the hub may be gone or lie."""

import csv
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from tests.fixtures_hub import COIN, Job, Person, Town, new_wallet
from trainchain.chain.settlement import leaves_file
from trainchain.cli import collect, hubs, ledger, wiring
from trainchain.cli.output import Output
from trainchain.cli.survey import Survey, survey
from trainchain.core.client import HubClient
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema
from trainchain.core.rewards import VESTING
from trainchain.core.settings import Settings


class Earner(Person):
    """A worker with a home, who keeps what the hub signs."""

    def __init__(self, town: Town, home: Path) -> None:
        super().__init__(town, new_wallet())
        self.home = Settings(home, town.url)
        self.away = False

    def earn(self, job: Job, shards: int = 1) -> list[int]:
        """Work, and write down what comes; the amounts."""
        client = self.client()
        chain = wiring.chain_of(client)
        hubs.remember(self.home, client)
        book = wiring.paybook_of(self.home, self.wallet, chain, self.town.keys.address)
        amounts = []
        for _ in range(shards):
            receipt = self.work(job)
            names = ("jobId", "round", "shard", "lease", "worker", "deltaHash")
            promised = {**{name: receipt[name] for name in names}, "amount": int(receipt["amount"])}
            book.keep(promised, receipt, book.vested(job.id))
            amounts.append(promised["amount"])
        client.close()
        chain.close()
        return amounts

    def _dial(self, _: Settings, __: Any) -> HubClient:
        client = self.client()
        if self.away:
            client.url, client.attempts = "http://127.0.0.1:9", 1
        return client

    def claim(self, **options: Any) -> dict[str, Any]:
        return collect.claim_all(
            self.home,
            Output(json_mode=True),
            now=self.town.clock,
            wallet=self.wallet,
            dial=self._dial,
            **{"only": False, **options},
        )

    def look(self, read: Callable[[Survey], Any]) -> Any:
        options = {"wallet": self.wallet, "dial": self._dial, "now": self.town.clock}
        with survey(self.home, Output(json_mode=True), only=False, **options) as known:
            return read(known)

    def totals(self) -> dict[str, int]:
        found: dict[str, int] = self.look(lambda known: ledger.sums(ledger.lines(known)))
        return found

    @property
    def tokens(self) -> int:
        return self.town.chain.token_balance(self.town.token, self.address)


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    made = Town(tmp_path_factory.mktemp("town"))
    yield made
    made.close()


@pytest.fixture
def anna(town: Town, tmp_path: Path) -> Earner:
    return Earner(town, tmp_path / "anna")


def finished(town: Town, anna: Earner, shards: int = 2, **options: Any) -> tuple[Job, int]:
    """A job that anna did alone, settled; what she earned in it."""
    job = town.publish(rounds=1, shards=shards, **options)
    amounts = anna.earn(job, shards)
    town.tick()
    assert job.state == "settled"
    return job, sum(amounts)


def test_the_hub_pays_the_gas_of_one_transaction_for_all_jobs(town: Town, anna: Earner) -> None:
    (one, first), (two, second) = finished(town, anna), finished(town, anna, shards=1)

    before = town.chain.node.head()
    dry = anna.claim(dry_run=True)
    assert town.chain.node.head() == before
    done = anna.claim()
    again = anna.claim()

    assert (int(dry["claimable"]), dry["claimed"]) == (first + second, "0")
    assert dry["costs"] == [{"chain_id": town.chain.chain_id, "gas": 0, "coin": "0", "relayed": 2}]
    assert {row["job"]: int(row["claimed"]) for row in done["claims"]} == {one.id: first, two.id: second}
    assert len({row["tx"] for row in done["claims"]}) == 1
    assert (again["claimed"], [row["tx"] for row in again["claims"]]) == ("0", [None, None])
    assert (anna.tokens, town.chain.gas_balance(anna.address)) == (first + second, 0)


def test_own_gas_sends_one_transaction_too_and_two_at_once_pay_once(town: Town, anna: Earner) -> None:
    (_, first), (_, second) = finished(town, anna), finished(town, anna, shards=1)
    town.give(anna.address, 0)
    done: list[dict[str, Any]] = []

    threads = [threading.Thread(target=lambda: done.append(anna.claim(own_gas=True))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert [one["failed"] for one in done] == [[], []]
    assert sum(int(one["claimed"]) for one in done) == anna.tokens == first + second
    assert len({row["tx"] for one in done for row in one["claims"] if int(row["claimed"])}) == 1


def test_a_claim_can_go_to_another_address(town: Town, anna: Earner) -> None:
    job, amount = finished(town, anna)
    town.give(anna.address, 0)
    safe = new_wallet().address

    done = anna.claim(to=safe)

    assert (done["to"], int(done["claimed"]), [row["job"] for row in done["claims"]]) == (safe, amount, [job.id])
    assert (town.chain.token_balance(town.token, safe), anna.tokens) == (amount, 0)


def test_one_job_of_a_home_can_be_named_by_its_name_and_id(town: Town, anna: Earner) -> None:
    (one, first), (_, second) = finished(town, anna), finished(town, anna, shards=1)

    assert int(anna.claim(job=one.id[:20])["claimed"]) == first
    with pytest.raises(TrainChainError) as caught:
        anna.claim(job="nobody-s")
    town.clock.forward(61)
    assert int(anna.claim(job="tiny")["claimed"]) == second
    assert caught.value.code == "job.unknown"


def test_a_hub_that_lives_is_left_to_settle_unless_vouchers_are_asked_for(town: Town, anna: Earner) -> None:
    job = town.publish(rounds=1, shards=VESTING + 3)
    amounts = anna.earn(job, VESTING + 2)
    vested = sum(amounts[:2])

    left = anna.claim()
    taken = anna.claim(vouchers=True)
    last = anna.earn(job)
    town.tick()
    town.clock.forward(61)
    rest = anna.claim()

    assert (left["claims"], left["claimed"]) == ([], "0")
    assert "the hub does that" in left["jobs"][0]["why"]
    assert (int(left["jobs"][0]["unsettled"]), int(left["jobs"][0]["vesting"])) == (vested, sum(amounts) - vested)
    assert [(row["kind"], int(row["claimed"])) for row in taken["claims"]] == [("voucher", vested)]
    assert job.state == "settled"
    whole = int(rest["jobs"][0]["accepted"])
    assert whole == sum(amounts) + last[0] == anna.tokens, (
        "the hub counts what vouchers paid, and pays the rest with it"
    )
    assert rest["claimed"] == "0"


@pytest.mark.parametrize("mirrored", [True, False])
def test_a_hub_that_is_gone_is_not_needed(town: Town, anna: Earner, mirrored: bool) -> None:
    """With the settlement copied, its leaf is claimed; without, the last voucher pays the same."""
    job, amount = finished(town, anna)
    open_job = town.publish(rounds=1, shards=VESTING + 3)
    amounts = anna.earn(open_job, VESTING + 2)
    if mirrored:
        anna.claim(dry_run=True)
    else:
        client = anna.client()
        book = wiring.paybook_of(anna.home, anna.wallet, town.chain, town.keys.address)
        book.keep_voucher(job.id, client.get(f"/v1/jobs/{job.id}/voucher", signed=True)["voucher"], amount)
        client.close()
    town.give(anna.address, 0)
    anna.away = True
    assert anna.totals()["claimable"] == amount + sum(amounts[:2])

    done, again = anna.claim(), anna.claim()

    kinds = {row["job"]: (row["kind"], int(row["claimed"])) for row in done["claims"]}
    assert kinds == {job.id: ("leaf" if mirrored else "voucher", amount), open_job.id: ("voucher", sum(amounts[:2]))}
    assert (done["failed"], again["failed"], again["claimed"]) == ([], [], "0")
    assert all("the hub does not answer" in row["from"] for row in done["claims"] if row["kind"] == "voucher")
    assert anna.totals() == {
        "accepted": amount + sum(amounts),
        "forfeited": 0,
        "held": 0,
        "vesting": sum(amounts[2:]),
        "settling": 0,
        "claimable": 0,
        "claimed": amount + sum(amounts[:2]),
    }


def test_without_copy_voucher_or_hub_it_is_tried_again_later(town: Town, anna: Earner) -> None:
    finished(town, anna)
    anna.away = True

    with pytest.raises(TrainChainError) as caught:
        anna.claim()

    assert (caught.value.code, caught.value.exit_code) == ("hub.unreachable", 3)


def test_a_leaf_that_fell_is_told_and_the_voucher_still_pays(town: Town, anna: Earner) -> None:
    job, amount = finished(town, anna)
    town.give(anna.address, 0)
    kept = anna.home.home / "leaves" / job.id / "0.json"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(leaves_file(job.id, 0, {anna.address: amount + 5}))

    done = anna.claim()

    assert [failure["code"] for failure in done["failed"]] == ["settlement.mismatch"]
    assert (collect.exit_code(done["failed"]), int(done["claimed"]), anna.tokens) == (4, amount, amount)


def test_one_bad_job_stops_no_other(town: Town, anna: Earner) -> None:
    """Nor does a doctored leaves file cost its job's workers anything: there is the voucher."""
    (good, amount), (bad, other) = finished(town, anna), finished(town, anna)
    leaves = town.row(schema.settlements, job=bad.id)["leaves"]
    path = town.root / "objects" / leaves[:2] / leaves[2:]
    path.write_bytes(path.read_bytes().replace(b"leaves/2", b"leaves/1"))

    done = anna.claim()

    assert [(failure["what"], failure["code"]) for failure in done["failed"]] == [(bad.id, "object.digest")]
    paid = {row["job"]: (row["kind"], int(row["claimed"])) for row in done["claims"]}
    assert paid == {good.id: ("leaf", amount), bad.id: ("voucher", other)}
    assert collect.exit_code(done["failed"]) == 4


def test_a_hub_that_now_names_another_chain_is_as_good_as_gone(
    town: Town, anna: Earner, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, amount = finished(town, anna)
    anna.claim(dry_run=True)
    town.give(anna.address, 0)
    told = town.port.describe()
    monkeypatch.setattr(town.port, "describe", lambda: {**told, "escrow": "0x" + "77" * 20})

    done = anna.claim()

    assert [failure["code"] for failure in done["failed"]] == ["chain.wrong"]
    assert (int(done["claimed"]), anna.tokens) == (amount, amount)


def test_a_halted_job_pays_by_voucher_and_after_the_window_nothing(town: Town, anna: Earner) -> None:
    jobs = [town.publish(rounds=1, shards=VESTING + 3) for _ in range(2)]
    amounts = [anna.earn(job, VESTING + 1) for job in jobs]
    for job in jobs:
        town.chain.halt(job.owner.wallet, job.id)
    town.give(anna.address, 0)

    done = anna.claim(job=jobs[0].id)
    town.clock.forward(jobs[1].recipe.pay.deadline + jobs[1].recipe.pay.grace + 1)
    lost = anna.claim(job=jobs[1].id)

    assert [(row["kind"], int(row["claimed"])) for row in done["claims"]] == [("voucher", amounts[0][0])]
    assert "halted" in done["claims"][0]["from"]
    assert lost["claims"] == []
    assert "the time to redeem vouchers ended" in lost["jobs"][0]["why"]


def test_earnings_say_of_each_shard_where_its_pay_is(town: Town, anna: Earner) -> None:
    job, whole = finished(town, anna)
    anna.claim()
    open_job = town.publish(rounds=1, shards=VESTING + 3)
    amounts = anna.earn(open_job, VESTING + 1)

    rows = anna.look(ledger.lines)
    table = list(csv.DictReader(io.StringIO(ledger.as_csv(rows))))

    by_place = {row.place: row for row in rows if row.job == open_job.id}
    assert by_place[1].reason.startswith("vested, not settled yet")
    assert by_place[2].reason == "vests after 1 more accepted shard, or when the job ends"
    assert by_place[10].reason == "vests after 9 more accepted shards, or when the job ends"
    assert all(json.loads(Path(row.receipt).read_bytes())["lease"] == row.lease for row in rows)
    for row in rows:
        assert row.accepted == row.vesting + row.settling + row.claimable + row.claimed
    assert anna.totals() == {
        "accepted": whole + sum(amounts),
        "forfeited": 0,
        "held": 0,
        "vesting": sum(amounts[1:]),
        "settling": amounts[0],
        "claimable": 0,
        "claimed": whole,
    }
    assert len(table) == len(rows) == VESTING + 1 + 2
    assert {row["job"] for row in table} == {job.id, open_job.id}
    assert all(row["accepted"] == row["claimed"] for row in table if row["job"] == job.id)


def test_a_hub_that_forgets_what_it_signed_is_named(town: Town, anna: Earner) -> None:
    job = town.publish(rounds=1, shards=2)
    anna.earn(job)
    assert anna.look(ledger.disagreements) == []
    lease = town.row(schema.contributions, job=job.id)["lease"]
    with town.hub.store.write() as db:
        db.execute(delete(schema.contributions).where(schema.contributions.c.lease == lease))

    ((named, error),) = anna.look(ledger.disagreements)

    assert (named, error.code, error.exit_code) == (job.id, "receipt.invalid", 4)
    assert f"{lease}.json" in error.message


def test_nothing_of_an_account_is_relayed_twice_a_minute(town: Town, anna: Earner) -> None:
    finished(town, anna)
    anna.claim()
    finished(town, anna, shards=1)

    done = anna.claim()

    assert [failure["code"] for failure in done["failed"]] == ["claim.too_often"]
    assert collect.exit_code(done["failed"]) == 3
    assert town.chain.gas_balance(anna.address) < COIN


@pytest.mark.parametrize(
    "told",
    [
        {"jobs": 7},
        {"jobs": [7]},
        {"jobs": [{"job": "../../elsewhere"}]},
        {"jobs": [{"job": "0x" + "ab" * 32, "accepted": "many"}]},
        {},
    ],
)
def test_a_hub_that_tells_nonsense_of_what_was_earned_stops_no_claim(
    town: Town, anna: Earner, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any]
) -> None:
    job = town.publish(rounds=1, shards=1)
    amounts = anna.earn(job)
    town.tick()
    honest = HubClient.get

    def lie(client: HubClient, path: str, **options: Any) -> dict[str, Any]:
        return told if path == "/v1/earned" else honest(client, path, **options)

    monkeypatch.setattr(HubClient, "get", lie)

    document = anna.claim()

    assert anna.tokens == sum(amounts)
    assert [one["code"] for one in document["failed"]] == ["hub.not_a_hub"]
