"""What the escrow's calls cost: within the figures that were promised, and not 2 % above what they last cost."""

import json
from itertools import pairwise

import pytest

from tests.fixtures_chain import COIN, GOLDEN, World
from trainchain.chain import merkle
from trainchain.chain.records import ClaimItem
from trainchain.chain.wallet import Wallet

HASH = "0x" + "5a" * 32
PROMISED = {
    "settle, first": 95_000,
    "settle, second": 75_000,
    "settle, later": 75_000,
    "settle with a delay, first": 95_000,
    "settle with a delay, second": 75_000,
    "settle with a delay, later": 75_000,
    "claim of 10,000, first": 106_000,
    "claim of 10,000, repeat": 72_000,
    "claimMany of 256, each of ten jobs": 56_000,
}


@pytest.fixture
def world(still) -> World:
    """With the same people every time, so that trees, and with them proofs, are the same."""
    people = {name: Wallet(bytes([7 + place]) * 32) for place, name in enumerate(("owner", "hub", "anna", "ben"))}
    made = World(*still, **people)
    made.client.transfer_token(made.rich, made.token, made.owner.address, 10**7 * COIN)
    return made


def tree(world, size, times=1) -> merkle.Tree:
    """Amounts as they are: eighteen decimals."""
    amounts = {f"0x{place:040x}": times * (COIN + place) for place in range(1, size)}
    return merkle.Tree({**amounts, world.anna.address: times * (COIN + 1)})


def job(world, **changes) -> str:
    return world.job(**{"amount": 50_000 * COIN, "round_cap": 50_000 * COIN, **changes})


def settlements(world, job_id, trees) -> list[int]:
    costs = []
    for round, made in enumerate(trees, 1):
        costs.append(world.gas(world.client.settle(world.hub, job_id, round, made.root, made.total, HASH)))
        world.advance(60)
    return costs


def measured(world) -> dict[str, int]:
    client, found = world.client, {}
    large = [tree(world, 10_000, times) for times in (1, 2, 3)]
    anna = world.anna.address

    def claim(job_id, made):
        proof = made.proof(anna)
        return world.gas(client.claim(world.ben, job_id, anna, made.amounts[anna], proof).tx)

    for name, delay in (("settle", 0), ("settle with a delay", 60)):
        costs = settlements(world, job(world, activation_delay=delay), large)
        found |= dict(zip([f"{name}, first", f"{name}, second", f"{name}, later"], costs, strict=True))
    job_id = job(world)
    settlements(world, job_id, large[:1])
    found["claim of 10,000, first"] = claim(job_id, large[0])
    client.settle(world.hub, job_id, 2, large[1].root, large[1].total, HASH)
    found["claim of 10,000, repeat"] = claim(job_id, large[1])
    for size, made in ((256, tree(world, 256)), (10_000, large[0])):
        # Somebody who was never paid in these jobs and holds no token yet.
        account = merkle.checksum(f"0x{size // 2:040x}")
        items = []
        for _ in range(10):
            job_id = job(world)
            client.settle(world.hub, job_id, 1, made.root, made.total, HASH)
            items.append(ClaimItem(job_id, account, made.amounts[account], made.proof(account)))
        tx, amounts = client.claim_many(world.ben, items)
        assert all(amounts)
        found[f"claimMany of {size:,}, each of ten jobs"] = world.gas(tx) // 10
    made = client.create_job(world.owner, world.params(round_cap=5 * COIN), 5 * COIN)
    found["createJobWithPermit"] = world.gas(made.tx)
    found["fundWithPermit"] = world.gas(client.fund(world.owner, made.job_id, 5 * COIN))
    found["redeemVoucher, first"] = world.gas(world.redeem(made.job_id, world.hub, 5 * COIN).tx)
    return found


def test_calls_cost_what_was_promised_and_no_more_than_last_time(world):
    found = measured(world)
    snapshot = json.loads((GOLDEN / "gas.json").read_text(encoding="utf-8"))
    told = json.dumps(found, indent=1)
    assert set(found) == set(snapshot), told
    assert {name: gas for name, gas in found.items() if gas > PROMISED.get(name, gas)} == {}, told
    assert {name: gas for name, gas in found.items() if gas > snapshot[name] * 1.02} == {}, told


def test_a_settlement_costs_the_same_whatever_the_number_of_workers(world):
    costs = []
    for size in (1, 100, 10_000):
        costs.append(settlements(world, job(world), [tree(world, size)])[0])
    # Of a hundred thousand only root and total reach the chain.
    root, total = "0x" + "9e" * 32, sum(COIN + place for place in range(100_000))
    costs.append(world.gas(world.client.settle(world.hub, job(world, **rich(world, total)), 1, root, total, HASH)))
    assert all(abs(one - other) <= 200 for one, other in pairwise([*costs, costs[0]])), costs


def rich(world, total) -> dict[str, int]:
    return {"amount": total, "round_cap": total}
