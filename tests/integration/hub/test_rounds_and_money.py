"""A job's whole life by hand, and every token unit of it: rounds, settlements, claims, what comes back."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update

from tests.fixtures_hub import COIN, INITIAL, Job, Person, Town, job_files, recipe
from tests.fixtures_merge import PLAIN_MERGE
from trainchain.chain.escrow import ChainClient
from trainchain.chain.settlement import check_against_chain, proof_for, read_leaves
from trainchain.cli import collect, delivery, wiring
from trainchain.cli.output import Output
from trainchain.core.adapter import adapter_bytes, read_adapter
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import cashier, rounds, schema
from trainchain.core.hub.store import Store
from trainchain.core.merge.updates import Update, merge, outer_step
from trainchain.core.models import ResolvedRecipe
from trainchain.core.rewards import Terms, job_price, recount, round_cap, round_price, shard_reward


def finish(job: Job, *workers: Person) -> None:
    """Let the workers take turns until the job has no more work."""
    turn = 0
    while (lease := workers[turn % len(workers)].lease(job)) is not None:
        workers[turn % len(workers)].contribute(lease).raise_for_status()
        job.town.tick()
        turn += 1


def claim(person: Person, home: Path, **options: Any) -> dict[str, Any]:
    """What `trainchain claim` does, over HTTP to the hub and to its chain."""
    return collect.claim_all(
        person.settings(home),
        Output(json_mode=True),
        now=person.town.clock,
        wallet=person.wallet,
        dial=lambda _, __: person.client(),
        **options,
    )


def reclaim(job: Job) -> dict[str, Any]:
    client = job.owner.client()
    try:
        return collect.reclaim(client, wiring.chain_of(client), job.owner.wallet, job.id)
    finally:
        client.close()


def parts(chain: ChainClient, job_id: str) -> tuple[int, int, int]:
    """Claimed, claimable, refundable: together they are the budget, to the last unit."""
    job = chain.job(job_id)
    assert job.claimed + (job.settled - job.claimed) + job.free == job.funded - job.refunded
    return job.claimed, job.settled - job.claimed, job.free


def test_every_round_merges_to_what_anybody_can_compute(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=3, shards=3)

    finish(job, anna, ben)

    view = job.view()
    recipe = ResolvedRecipe.model_validate_json(anna.fetch(view["spec_hash"]), strict=True)
    start = sha256(INITIAL)
    for row in view["rounds_done"]:
        assert (row["state"], row["start"]) == ("merged", start)
        updates = [
            Update(
                shard["delta"],
                recipe.counts[row["round"] - 1][shard["shard"]].tokens,
                anna.fetch_adapter(shard["delta"]),
            )
            for shard in row["shards"]
        ]
        merged = merge(recipe.merge, anna.fetch_adapter(row["start"]), updates)
        step = outer_step(recipe.merge, anna.fetch_adapter(row["start"]), merged)
        assert step.data == anna.fetch(row["outer_step"])
        assert adapter_bytes(step.adapter) == anna.fetch(row["adapter"])
        assert row["merge_error"] == max(merged.truncation.values())
        start = row["adapter"]
    assert (view["state"], view["round"], len(view["rounds_done"])) == ("settled", 3, 3)


def test_pulling_gives_the_last_merged_adapter(town: Town, anna: Person, tmp_path: Path) -> None:
    job = town.publish(rounds=2, shards=1)
    client = anna.client()

    with pytest.raises(TrainChainError) as early:
        delivery.fetch(client, job.id, tmp_path / "early")
    finish(job, anna)
    pulled = delivery.fetch(client, job.id, tmp_path / "adapter")
    first = delivery.fetch(client, job.id, tmp_path / "first", round_=1)
    client.close()

    assert early.value.code == "job.not_ready"
    assert not (tmp_path / "early").exists()
    assert (tmp_path / "adapter/adapter_model.safetensors").read_bytes() == anna.fetch(job.round(2)["adapter"])
    assert (pulled["round"], first["round"]) == (2, 1)
    assert first["adapter"] == job.round(1)["adapter"] == job.round(2)["start"]


def test_the_deadline_closes_a_round_that_has_its_quorum(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=2, shards=4, quorum=0.5, round_deadline=60)
    held = ben.must_lease(job)
    anna.work(job)
    town.clock.forward(61)
    town.tick()
    assert job.round(1)["state"] == "open", "below the quorum a round waits"

    anna.work(job)
    town.tick()

    assert job.round(1)["state"] == "merged"
    assert sorted(job.shards(1)) == ["abandoned", "abandoned", "accepted", "accepted"]
    assert ben.contribute(held).json()["code"] == "shard.already_accepted", "it ran out, and anna had the shard then"
    assert (job.row["round"], job.shards(2)) == (2, ["open"] * 4)


def test_before_the_deadline_a_quorum_is_not_enough(town: Town, anna: Person) -> None:
    job = town.publish(shards=4, quorum=0.5, round_deadline=60)
    for _ in range(3):
        anna.work(job)

    town.clock.forward(60)
    town.tick()

    assert job.round(1)["state"] == "open"


def test_what_has_vested_is_settled_each_round_and_every_record_agrees(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=12, shards=2)

    finish(job, anna, ben)

    on_chain = town.chain.settlements(job.id)
    # Each has one shard a round, so the first vests with the tenth; the last nine of each vest with the job's end, and
    # are paid round by round, as the cap has it.
    assert [one.round for one in on_chain] == list(range(10, 10 + len(on_chain)))
    raised = [after.total - before.total for before, after in pairwise(on_chain)]
    assert max(raised) <= round_cap(job.recipe) < sum(raised[-3:])
    rows, _ = cashier.earned(town.hub, job.id)
    terms = []
    for row, shown, settled in zip(
        town.rows(schema.settlements, job=job.id), job.view()["settlements"], on_chain, strict=True
    ):
        data = anna.fetch(row["leaves"])
        leaves = check_against_chain(data, settled)
        assert row["root"] == shown["root"] == settled.root
        assert row["total"] == int(shown["total"]) == settled.total == sum(leaves.amounts.values())
        assert "0x" + row["leaves"] == "0x" + shown["leaves"] == settled.data_hash
        assert row["tx"] == shown["tx"] == settled.tx
        assert (leaves.ended, leaves.limit) == (settled.round >= 12, round_cap(job.recipe))
        terms.append(Terms(leaves.round, leaves.ended, leaves.limit))
        assert recount(rows, terms)[-1] == leaves.amounts
    for number in (10, 11):
        paid = [shard_reward(job.recipe, round_, shard) for round_ in range(1, number - 8) for shard in (0, 1)]
        assert on_chain[number - 10].total == sum(paid)
    assert on_chain[-1].total == job_price(job.recipe)


def test_money_comes_out_to_the_last_unit(town: Town, anna: Person, ben: Person, tmp_path: Path) -> None:
    budget = 10**17 + 7
    job = town.publish(rounds=2, shards=2, budget=budget, round_deadline=60)
    before = town.chain.token_balance(town.token, job.owner.address)
    finish(job, anna, ben)
    owed = {one["worker"]: 0 for one in town.rows(schema.contributions, job=job.id)}
    for one in town.rows(schema.contributions, job=job.id):
        owed[one["worker"]] += one["reward"]
    assert parts(town.chain, job.id) == (0, sum(owed.values()), budget - sum(owed.values()))

    dry = claim(anna, tmp_path, dry_run=True)
    first = claim(anna, tmp_path)
    assert parts(town.chain, job.id)[:2] == (owed[anna.address], owed[ben.address])
    second = claim(ben, tmp_path)

    assert int(dry["claims"][0]["claimable"]) == int(first["claimed"]) == owed[anna.address]
    assert (dry["claimed"], dry["balance"]) == ("0", "0")
    assert int(second["claimed"]) == int(second["balance"]) == owed[ben.address]
    assert parts(town.chain, job.id) == (sum(owed.values()), 0, budget - sum(owed.values()))
    again = claim(anna, tmp_path)
    assert (again["claimed"], again["claims"][0]["tx"], int(again["balance"])) == ("0", None, owed[anna.address])

    with pytest.raises(TrainChainError) as early:
        reclaim(job)
    assert (early.value.code, early.value.exit_code) == ("money.too_early", 8)
    town.clock.forward(job.recipe.pay.deadline + job.recipe.pay.grace - 1)
    with pytest.raises(TrainChainError, match="when the grace time is over"):
        reclaim(job)
    town.clock.forward(2)
    assert int(reclaim(job)["refunded"]) == budget - sum(owed.values())
    assert int(reclaim(job)["refunded"]) == 0
    assert town.chain.token_balance(town.token, job.owner.address) == before + budget - sum(owed.values())
    assert parts(town.chain, job.id) == (sum(owed.values()), 0, 0)


def test_only_the_owner_takes_the_rest_back(town: Town, anna: Person) -> None:
    job = town.publish(pay_deadline=10)
    town.clock.forward(10_000)
    job.owner = anna

    with pytest.raises(TrainChainError) as caught:
        reclaim(job)

    assert caught.value.code == "chain.reverted"
    assert town.chain.job(job.id).free == job.recipe.pay.budget


def test_a_settlement_that_waits_is_claimed_when_it_is_active(town: Town, anna: Person, tmp_path: Path) -> None:
    job = town.publish(rounds=1, shards=1, activation_delay=100)
    finish(job, anna)
    assert claim(anna, tmp_path)["claims"] == []

    town.clock.forward(100)

    assert int(claim(anna, tmp_path)["claimed"]) == job_price(job.recipe)


def test_an_expired_job_pays_what_was_accepted_and_gives_the_rest_back(
    town: Town, anna: Person, tmp_path: Path
) -> None:
    job = town.publish(rounds=3, shards=2, pay_deadline=1000)
    finish_round = [anna.work(job), anna.work(job)]
    town.tick()
    unmerged = anna.work(job)
    town.clock.forward(1001)
    town.tick()

    assert job.state == "settled"
    earned = sum(int(receipt["amount"]) for receipt in [*finish_round, unmerged])
    assert int(claim(anna, tmp_path)["claimed"]) == earned
    town.clock.forward(job.recipe.pay.grace)
    assert int(reclaim(job)["refunded"]) == job.recipe.pay.budget - earned


def test_a_job_that_nobody_worked_on_gives_everything_back(town: Town) -> None:
    job = town.publish(pay_deadline=100)
    town.clock.forward(101)
    town.tick()

    assert (job.state, town.chain.settlements(job.id)) == ("settled", [])
    town.clock.forward(600)
    assert int(reclaim(job)["refunded"]) == job.recipe.pay.budget


def test_a_round_that_the_escrow_does_not_cover_waits_for_a_top_up(town: Town, anna: Person) -> None:
    job = town.publish(rounds=2, shards=2, escrow=round_price_of_first())
    finish(job, anna)
    assert (job.state, job.row["round"], anna.lease(job)) == ("unfunded", 1, None)

    short = town.owner.post(f"/v1/jobs/{job.id}/fund")
    assert (short.status_code, short.json()["code"]) == (402, "job.unfunded")
    town.chain.fund(town.owner.wallet, job.id, round_price(job.recipe, 2) - 1)
    town.tick()
    assert job.state == "unfunded"
    town.chain.fund(town.owner.wallet, job.id, 1)
    funded = town.owner.post(f"/v1/jobs/{job.id}/fund").raise_for_status()

    assert funded.json()["state"] == job.state == "running"
    town.tick()
    finish(job, anna)
    assert job.state == "settled"
    assert parts(town.chain, job.id) == (0, job_price(job.recipe), 0)


def round_price_of_first() -> int:
    """The price of round 1 of a job of two rounds of two shards."""
    return sum(tokens * 2_500_000_000_000_000_123 // 1_000_000 for tokens in (1001, 1008))


def test_the_hub_finds_a_top_up_by_itself(town: Town, anna: Person) -> None:
    job = town.publish(rounds=2, shards=2, escrow=round_price_of_first())
    finish(job, anna)
    assert job.state == "unfunded"

    town.chain.fund(town.owner.wallet, job.id, COIN)
    town.tick()

    assert (job.state, job.row["round"]) == ("running", 2)


def test_a_tick_that_has_nothing_to_do_does_nothing(town: Town, anna: Person) -> None:
    job = town.publish(rounds=1, shards=1)
    finish(job, anna)
    before = [town.rows(table, job=job.id) for table in (schema.rounds, schema.settlements, schema.events)]
    blocks = town.chain.node.head()

    for _ in range(3):
        assert not rounds.tick(town.hub)
        assert not cashier.tick(town.hub)

    assert [town.rows(table, job=job.id) for table in (schema.rounds, schema.settlements, schema.events)] == before
    assert town.chain.node.head() == blocks


def test_a_settlement_whose_answer_was_lost_is_found_again(
    town: Town, anna: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub dies after its transaction is in a block and before it knows: it settles once."""
    job = town.publish(rounds=1, shards=1)
    settle = town.port.settle

    def lost(*arguments: Any) -> Any:
        settle(*arguments)
        raise TrainChainError("chain.unreachable", "The answer was lost.")

    with monkeypatch.context() as patch:
        patch.setattr(town.port, "settle", lost)
        finish(job, anna)
    written = town.row(schema.settlements, job=job.id)
    assert (written["tx"], job.view()["settlements"], job.state) == (None, [], "finished")
    blocks = town.chain.node.head()

    town.tick()

    (settled,) = town.chain.settlements(job.id)
    assert town.row(schema.settlements, job=job.id) == {**written, "tx": settled.tx}
    assert town.chain.node.head() == blocks
    assert job.state == "settled"


@pytest.mark.parametrize("dropped", [1, 2, 3])
def test_settlements_that_the_chain_drops_are_sent_again(
    town: Town, anna: Person, monkeypatch: pytest.MonkeyPatch, dropped: int
) -> None:
    """Its last blocks were replaced by others, which do not have them."""
    job, settle = town.publish(rounds=3, shards=1), town.port.settle
    sent = []

    def send(*arguments: Any) -> Any:
        sent.append(arguments)
        return settle(*arguments) if len(sent) <= 3 - dropped else "0x" + "5a" * 32

    with monkeypatch.context() as patch:
        patch.setattr(town.port, "settle", send)
        patch.setattr(cashier, "_dropped", lambda *_: False)
        finish(job, anna)
        assert job.state == "settled"
    assert len(town.chain.settlements(job.id)) == 3 - dropped
    town.clock.forward(cashier.LOOK_SECONDS)

    town.tick()

    on_chain = town.chain.settlements(job.id)
    assert [(row.round, row.tx) for row in on_chain] == [
        (row["round"], row["tx"]) for row in town.rows(schema.settlements, job=job.id)
    ]
    assert on_chain[-1].total == job_price(job.recipe)
    assert job.state == "settled"


def test_a_settlement_that_the_chain_refuses_is_made_anew(
    town: Town, anna: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its being written and its being sent a voucher took the money that it counted on."""
    job = town.publish(rounds=1, shards=2, budget=job_price(a_recipe(rounds=1, shards=2)))
    first = anna.work(job)
    with monkeypatch.context() as patch:
        patch.setattr(town.port, "settle", away)
        finish(job, anna)
    owed = job_price(job.recipe)
    assert town.row(schema.settlements, job=job.id)["total"] == owed
    voucher = town.port.sign("Voucher", {"jobId": job.id, "account": anna.address, "cumulative": int(first["amount"])})
    town.chain.transfer_gas(town.rich, anna.address, COIN)
    town.chain.redeem_voucher(anna.wallet, job.id, anna.address, int(first["amount"]), voucher)

    town.tick()
    assert town.rows(schema.settlements, job=job.id) == [], "the escrow does not cover it"
    town.tick()

    assert job.state == "settled"
    assert town.chain.job(job.id).claimed == int(first["amount"])
    assert town.chain.job(job.id).settled == town.chain.job(job.id).total == owed, "the advance is counted"
    assert [leaf_of(job, number, anna)[0] for number in (1, 2)] == [int(first["amount"]), owed]


def a_recipe(**sizes: int) -> ResolvedRecipe:
    return recipe(job_files(), **sizes)


def away(*_: Any) -> Any:
    raise TrainChainError("chain.unreachable", "The chain is away.")


def leaf_of(job: Job, number: int, who: Person) -> tuple[int, list[str]]:
    """A leaf of a settlement and its proof."""
    leaves = who.fetch(job.town.row(schema.settlements, job=job.id, round=number)["leaves"])
    return proof_for(read_leaves(leaves), who.address)


def test_a_merge_that_was_not_written_down_comes_out_the_same(town: Town, anna: Person) -> None:
    """The hub dies between storing the merged adapter and moving the round."""
    job = town.publish(rounds=1, shards=2)
    anna.work(job)
    anna.work(job)
    rounds.tick(town.hub)
    assert job.round(1)["state"] == "merging"
    data = adapter_bytes(_merged_by_hand(job, anna))
    town.hub.objects.put(data)

    town.tick()

    assert job.round(1)["adapter"] == sha256(data)


def _merged_by_hand(job: Job, anyone: Person) -> dict[str, np.ndarray]:
    updates = [
        Update(row["delta"], job.recipe.counts[0][row["shard"]].tokens, anyone.fetch_adapter(row["delta"]))
        for row in job.town.rows(schema.contributions, job=job.id)
    ]
    start = read_adapter(INITIAL)
    return outer_step(PLAIN_MERGE, start, merge(PLAIN_MERGE, start, updates)).adapter


def test_a_restarted_hub_goes_on_with_the_same_round(tmp_path: Path) -> None:
    town = Town(tmp_path)
    try:
        anna, job = town.person(), town.publish(rounds=2, shards=2)
        anna.work(job)
        lease = anna.must_lease(job)
        before = [town.rows(table, job=job.id) for table in (schema.rounds, schema.shards, schema.contributions)]

        town.stop()
        town.start()

        assert [
            town.rows(table, job=job.id) for table in (schema.rounds, schema.shards, schema.contributions)
        ] == before
        assert anna.contribute(lease).status_code == 200
        town.tick()
        finish(job, anna)
        assert job.state == "settled"
        assert parts(town.chain, job.id)[1] == job_price(job.recipe)
    finally:
        town.close()


def test_a_hub_does_not_touch_the_tables_of_another_version(tmp_path: Path) -> None:
    store = Store(tmp_path / "hub.sqlite")
    with store.write() as db:
        db.execute(update(schema.meta).where(schema.meta.c.key == "schema").values(value="1"))
    store.close()

    with pytest.raises(TrainChainError) as refused:
        Store(tmp_path / "hub.sqlite")

    assert (refused.value.code, "version 1" in refused.value.message) == ("hub.other_version", True)


def test_nothing_moves_while_the_chain_is_away_and_nothing_is_lost(
    town: Town, anna: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = town.publish(rounds=3, shards=1)

    with monkeypatch.context() as patch:
        patch.setattr(town.port, "settle", away)
        finish(job, anna)
        assert job.state == "finished", "rounds go on without the chain"
        assert town.chain.settlements(job.id) == []

    town.tick()

    assert job.state == "settled"
    assert [one.round for one in town.chain.settlements(job.id)] == [3, 4, 5], "each adds what one may"
    assert parts(town.chain, job.id)[1] == job_price(job.recipe)


def test_settlements_that_the_chain_missed_follow_each_other_at_the_pace_of_the_delay(
    town: Town, anna: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = town.publish(rounds=3, shards=1, activation_delay=100)

    with monkeypatch.context() as patch:
        patch.setattr(town.port, "settle", away)
        finish(job, anna)

    for settled in ([3], [3, 4], [3, 4, 5]):
        assert job.state == "finished"
        town.tick()
        town.clock.forward(99)
        town.tick()
        assert [one.round for one in town.chain.settlements(job.id)] == settled, "an unripe root is not replaced"
        town.clock.forward(1)
    assert job.state == "settled"
    assert parts(town.chain, job.id)[1] == job_price(job.recipe)


def test_one_broken_job_does_not_hold_up_another(town: Town, anna: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, sound = town.publish(rounds=1, shards=1), town.publish(rounds=1, shards=1)
    anna.work(broken)
    anna.work(sound)
    delta = town.row(schema.contributions, job=broken.id)["delta"]
    get = town.hub.objects.get

    def lost(digest: str) -> bytes:
        if digest == delta:
            raise TrainChainError("object.unknown", "The disk lost it.")
        return get(digest)

    with monkeypatch.context() as patch:
        patch.setattr(town.hub.objects, "get", lost)
        town.tick()
        assert (broken.state, sound.state) == ("running", "settled")

    town.tick()

    assert broken.state == "settled"


def test_a_leaf_of_another_cannot_be_claimed_with_one_s_own_proof(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=1, shards=2)
    anna.work(job)
    ben.work(job)
    town.tick()
    leaves = read_leaves(anna.fetch(town.row(schema.settlements, job=job.id)["leaves"]))
    amount, proof = proof_for(leaves, anna.address)
    town.chain.transfer_gas(town.rich, ben.address, COIN)

    for account, claimed in ((ben.address, amount), (anna.address, amount + 1), (town.owner.address, amount)):
        with pytest.raises(TrainChainError) as caught:
            town.chain.claim(ben.wallet, job.id, account, claimed, proof)
        assert caught.value.code == "chain.reverted"

    assert parts(town.chain, job.id)[0] == 0


def test_a_hub_that_serves_other_leaves_is_found_out(
    town: Town, anna: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof is made from the file whose digest stands on chain, or not at all: then the voucher pays."""
    job = town.publish(rounds=1, shards=1)
    finish(job, anna)
    town.chain.transfer_gas(town.rich, anna.address, COIN)
    leaves = town.row(schema.settlements, job=job.id)["leaves"]
    place = town.root / "objects" / leaves[:2] / leaves[2:]
    place.write_bytes(place.read_bytes().replace(b"leaves/2", b"leaves/1"))

    found = claim(anna, tmp_path)

    assert [failure["code"] for failure in found["failed"]] == ["object.digest"]
    assert collect.exit_code(found["failed"]) == 4
    assert [(row["kind"], row["claimed"]) for row in found["claims"]] == [
        ("voucher", str(town.row(schema.contributions, job=job.id)["reward"]))
    ]


def test_the_faucet_gives_each_wallet_tokens_once(town: Town, anna: Person) -> None:
    granted = anna.post("/v1/faucet", {"tokens": True}).raise_for_status().json()
    again = anna.post("/v1/faucet", {"tokens": True})

    assert set(granted) == {"gas", "tokens"}
    assert (again.status_code, again.json()["code"]) == (403, "faucet.closed")
    assert town.chain.token_balance(town.token, anna.address) == 100_000 * COIN
    assert anna.post("/v1/faucet").json() == {}, "nobody needs gas twice"
