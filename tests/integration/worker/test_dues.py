"""What a worker keeps of a hub's promises, and when it takes no more work from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from tests.fixtures_hub import Town
from tests.integration.worker.conftest import Bench
from trainchain.chain.collecting import Mirror
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema, vouchers
from trainchain.core.rewards import VESTING
from trainchain.core.worker.dues import Limit
from trainchain.core.worker.fleet import Quota, Stopped
from trainchain.core.worker.paybook import Papers


def papers(bench: Bench) -> Papers:
    return Papers(bench.home, bench.person.address)


def until(wanted: str, act: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    """What to do at the first event of a kind."""
    done: list[str] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == wanted and not done:
            done.append(wanted)
            act()

    return on_event


COIN = 10**18
WRITTEN = {
    "2": Limit(2),
    "0": Limit(0),
    " 7 ": Limit(7),
    "12.5TRAIN": Limit(None, 25 * COIN // 2),
    "3 train": Limit(None, 3 * COIN),
}


@pytest.mark.parametrize(("text", "limit"), WRITTEN.items())
def test_a_limit_is_rounds_or_an_amount(text: str, limit: Limit) -> None:
    assert Limit.read(text) == limit


@pytest.mark.parametrize("text", ["", "-1", "two", "1.5", "1.2.3TRAIN", "5 ETH", "9" * 50])
def test_a_limit_that_is_neither_is_refused(text: str) -> None:
    with pytest.raises(TrainChainError) as caught:
        Limit.read(text)
    assert (caught.value.code, caught.value.hint) == ("usage.flag", "Write it as 2, or as 12.5TRAIN.")


def test_each_shard_leaves_its_receipt_and_the_newest_voucher(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=1, shards=VESTING + 2)

    bench.work(job.id, shards=VESTING + 2)

    kept = papers(bench)
    amounts = [receipt.amount for receipt in kept.receipts(job.id)]
    assert [receipt.place for receipt in kept.receipts(job.id)] == list(range(1, VESTING + 3))
    assert kept.vested(job.id) == amounts[0] + amounts[1]
    voucher = kept.voucher(job.id)
    assert voucher is not None
    assert voucher.cumulative == amounts[0] + amounts[1]


def test_too_much_that_is_unsettled_stops_the_work_until_it_is_settled(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=2, shards=VESTING + 2)
    other = town.person()

    def settle() -> None:
        """Somebody else does the rest of the round; it is merged, and settled."""
        assert len(bench.told("accepted")) == VESTING + 1
        assert other.lease(job) is not None
        held = town.rows(schema.leases, worker=other.address, state="held")
        lease = {**other_lease(held[0]), "start": town.row(schema.rounds, job=job.id, round=1)["start"]}
        other.contribute(lease).raise_for_status()
        town.tick()

    def other_lease(row: dict[str, Any]) -> dict[str, Any]:
        return {"job": row["job"], "round": row["round"], "shard": row["shard"], "lease": row["id"]}

    bench.work(job.id, shards=VESTING + 2, limit=Limit(0), on_event=until("unsettled", settle))

    (told,), (over,) = bench.told("unsettled"), bench.told("settled")
    first = papers(bench).receipts(job.id)[0]
    assert (told["code"], told["job"], told["amount"], told["rounds"]) == (
        "worker.unsettled",
        job.id,
        str(first.amount),
        1,
    )
    assert "trainchain claim" in told["hint"]
    assert over["job"] == job.id
    assert len(bench.told("accepted")) == VESTING + 2


def test_an_amount_limits_too_and_a_redeemed_voucher_counts_as_paid(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=1, shards=VESTING + 3)
    town.give(bench.person.address, 0)

    def redeem() -> None:
        voucher = papers(bench).voucher(job.id)
        assert voucher is not None
        town.chain.redeem_voucher(bench.person.wallet, job.id, voucher.account, voucher.cumulative, voucher.signature)

    bench.work(job.id, shards=VESTING + 2, limit=Limit(None, 1), on_event=until("unsettled", redeem))

    assert len(bench.told("unsettled")) == 1
    assert len(bench.told("accepted")) == VESTING + 2
    assert town.chain.claimed_of(job.id, bench.person.address) > 0


def test_below_the_limit_nobody_is_asked(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=1, shards=VESTING + 3)
    worker = bench.worker(job=job.id)
    asked: list[bool] = []
    look = worker._dues._look

    def count(job: str, *, fresh: bool) -> Any:
        asked.append(fresh)
        return look(job, fresh=fresh)

    worker._dues._look = count
    worker._dues._clock = lambda: 0.0  # the first look is over before anything has vested
    worker.run(Quota(VESTING + 2))

    assert True not in asked
    assert bench.told("unsettled") == []


def test_an_idle_worker_fetches_the_last_voucher_and_copies_the_settlement(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=1, shards=2)
    bench.work(job.id, shards=2)
    town.tick()
    assert papers(bench).vested(job.id) == 0
    dues = bench.worker(job=job.id)._dues

    dues.look_after(idle=True)

    kept = papers(bench)
    assert kept.vested(job.id) == kept.earned(job.id) > 0
    mirror = Mirror(bench.home / "leaves")
    assert mirror.leaf(job.id, bench.person.address) == kept.earned(job.id)
    assert dues.open(job.id).amount == 0


def test_of_many_settlements_only_the_newest_are_kept(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=4, shards=4)
    dues = bench.worker(job=job.id)._dues
    for _ in range(4):
        bench.work(job.id, shards=4)
        town.tick()
        dues.look_after(idle=True)

    numbers = sorted(int(path.stem) for path in (bench.home / "leaves" / job.id).iterdir())
    assert job.state == "settled"
    assert (len(numbers), numbers[-1]) == (2, town.rows(schema.settlements, job=job.id)[-1]["round"])


@pytest.mark.parametrize("spoil", ["signature", "place", "cumulative"])
def test_a_hub_that_promises_falsely_is_worked_for_no_more(
    town: Town, bench: Bench, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    job = town.publish(rounds=1, shards=VESTING + 2)
    bench.work(job.id, shards=VESTING)
    honest = bench.person.client().__class__.post

    def lie(client: Any, path: str, *rest: Any, **options: Any) -> Any:
        answer = honest(client, path, *rest, **options)
        if path.endswith("/contribution"):
            if spoil == "cumulative":
                return {**answer, "voucher": {**answer["voucher"], "cumulative": "1"}}
            return {**answer, spoil: 1 if spoil == "place" else "0x" + "11" * 65}
        return answer

    monkeypatch.setattr("trainchain.core.client.HubClient.post", lie)
    with pytest.raises(TrainChainError) as caught:
        bench.work(job.id, shards=2)

    code = "voucher.invalid" if spoil == "cumulative" else "receipt.invalid"
    assert (caught.value.code, caught.value.exit_code) == (code, 4)
    kept = Path(caught.value.hint.partition("keep ")[2].rstrip("."))
    assert json.loads(kept.read_bytes())
    assert len(bench.told("accepted")) == VESTING


def test_a_hub_that_loses_vouchers_is_found_out_when_it_has_ended_the_job(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=1, shards=1)
    bench.work(job.id)
    town.tick()
    dues = bench.worker(job=job.id)._dues
    real = vouchers.vest_all
    try:
        vouchers.vest_all = lambda hub, job_id: None
        with town.hub.store.write() as db:
            db.execute(delete(schema.vouchers).where(schema.vouchers.c.job == job.id))
        with pytest.raises(TrainChainError) as caught:
            dues.look_after(idle=True)
    finally:
        vouchers.vest_all = real

    assert caught.value.code == "voucher.invalid"


def test_a_stopped_worker_stops_waiting_for_money(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=1, shards=VESTING + 3)
    worker = bench.worker(job=job.id, limit=Limit(0), on_event=until("unsettled", lambda: worker.stop()))

    with pytest.raises(Stopped):
        worker.run(Quota(None))

    assert len(bench.told("accepted")) == VESTING + 1


def test_of_two_machines_with_one_wallet_each_fetches_the_last_voucher(
    town: Town, bench: Bench, tmp_path: Path
) -> None:
    """What the other one earned is no reason to stop: its receipts are not here."""
    other = Bench(town, tmp_path / "other", bench.person.wallet)
    shards = VESTING + 3
    job = town.publish(rounds=1, shards=2 * shards)
    for one in (other, bench):
        one.work(job.id, shards=shards)
    other.close()
    town.tick()
    total = sum(row["reward"] for row in town.rows(schema.contributions, job=job.id))
    assert papers(bench).earned(job.id) < papers(bench).vested(job.id) < total

    bench.worker(job=job.id)._dues.look_after(idle=True)

    assert papers(bench).vested(job.id) == total


@pytest.mark.parametrize("gone", [False, True])
def test_a_voucher_whose_time_runs_out_is_told_of_once_a_day(
    town: Town, bench: Bench, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    """Whether the hub is gone, or answers and does not settle; nobody else looks at a worker that runs by itself."""
    job = town.publish(rounds=1, shards=VESTING + 3, pay_deadline=7200)
    bench.work(job.id, shards=VESTING + 2)
    town.give(bench.person.address, 0)
    dues = bench.worker(job=job.id)._dues
    dues._clock = town.clock

    def away(*_: Any, **__: Any) -> Any:
        raise TrainChainError("hub.unreachable", "The hub is away.")

    def look(seconds: float) -> list[dict[str, Any]]:
        bench.events.clear()
        town.clock.forward(seconds)
        dues.look_after(idle=True)
        return bench.told("redeem_soon")

    if gone:
        monkeypatch.setattr("trainchain.core.client.HubClient.get", away)
    grace = job.recipe.pay.grace
    assert look(7200) == []
    (told,) = look(grace / 2 + 1)
    vested = papers(bench).vested(job.id)
    assert (told["job"], told["amount"]) == (job.id, str(vested))
    assert told["ends"] == town.chain.job(job.id).closes_after
    assert f"trainchain claim {job.id[:12]} --vouchers" in told["hint"]
    assert look(100) == []
    monkeypatch.setattr("trainchain.core.worker.dues.TELL_SECONDS", 150)
    assert len(look(100)) == 1
    voucher = papers(bench).voucher(job.id)
    assert voucher is not None
    town.chain.redeem_voucher(bench.person.wallet, job.id, voucher.account, voucher.cumulative, voucher.signature)
    monkeypatch.setattr("trainchain.core.worker.dues.TELL_SECONDS", 0)
    assert look(61) == []
