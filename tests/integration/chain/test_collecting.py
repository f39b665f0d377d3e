"""What a wallet can take of its jobs, what that costs, and taking it: on our chain and at a node that is not ours."""

import pytest

from tests.fixtures_chain import World
from trainchain.chain.collecting import Item, Known, Mirror, collect, cost, plan
from trainchain.chain.records import Paid
from trainchain.chain.settlement import leaves_file
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError


class Store:
    """Objects by their digest."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def __call__(self, digest: str) -> bytes:
        return self.held[digest]


def settle(world: World, store: Store, job: str, number: int, amounts: dict) -> bytes:
    world.settle(job, number, amounts)
    data = leaves_file(job, number, {who.address: amount for who, amount in amounts.items()})
    store.held[sha256(data)] = data
    return data


def look(world: World, store: Store, job: str, *, voucher: int | None = None, leaves=(), redeem: str = ""):
    kept = None if voucher is None else (voucher, world.voucher(job, world.anna, voucher))
    now = world.client.now()
    return plan(world.client, world.anna.address, Known(job, leaves, kept), store, now=now, redeem=redeem)


def test_a_leaf_and_what_a_voucher_promises_beyond_it(world: World) -> None:
    store, job = Store(), world.job()
    settle(world, store, job, 1, {world.anna: 100, world.ben: 50})
    second = world.job()
    settle(world, store, second, 1, {world.anna: 7})

    found = look(world, store, job, voucher=130, redeem="asked for")
    other = look(world, store, second)
    items = [*found.items, *other.items]

    assert [(item.kind, item.amount) for item in items] == [("leaf", 100), ("voucher", 30), ("leaf", 7)]
    gas, coin = cost(world.client, world.anna.address, items)
    assert coin >= gas > 100_000
    before = world.client.gas_balance(world.anna.address)
    done = collect(world.client, world.anna, items)
    assert [one.amount for one in done if isinstance(one, Paid)] == [100, 30, 7]
    assert done[0].tx == done[2].tx != done[1].tx
    assert (world.holds(world.anna), world.gas(done[0].tx) + world.gas(done[1].tx) <= gas * 11 // 10) == (137, True)
    assert before > world.client.gas_balance(world.anna.address)
    assert [one for one in collect(world.client, world.anna, items) if one != Paid(None, 0)] == []
    assert look(world, store, job, voucher=130, redeem="asked for").items == []


def test_a_living_hub_is_left_to_settle_and_what_is_free_limits_a_voucher(world: World) -> None:
    store, job = Store(), world.job(1000, round_cap=1000)
    settle(world, store, job, 1, {world.ben: 900})

    assert (look(world, store, job, voucher=50).items, look(world, store, job, voucher=50).promised) == ([], 50)
    beyond = look(world, store, job, voucher=101, redeem="asked for")

    assert beyond.items == []
    assert "the voucher promises" in beyond.why


def test_the_newest_settlement_waits_and_the_one_before_is_claimed(world: World) -> None:
    store, job = Store(), world.job(activation_delay=100)
    first = settle(world, store, job, 1, {world.anna: 10})
    world.advance(101)
    second = settle(world, store, job, 2, {world.anna: 25})

    found = look(world, store, job, leaves=[first, second])

    assert [(item.round, item.amount) for item in found.items] == [(1, 10)]
    assert (found.leaf, found.pending) == (10, 25)
    world.advance(101)
    world.client.transfer_gas(world.rich, world.ben.address, 1)
    assert [(item.round, item.amount) for item in look(world, store, job, leaves=[first, second]).items] == [(2, 25)]


def test_a_voucher_is_used_unasked_when_nothing_else_will_come(world: World) -> None:
    store, halted, late, moved = Store(), world.job(), world.job(), world.job()
    world.client.halt(world.owner, halted)
    world.client.propose_hub(world.owner, moved, world.ben.address)

    reasons = [look(world, store, job, voucher=5).items[0].why for job in (halted, moved)]
    assert look(world, store, late, voucher=5).items == []
    world.advance(1300)
    world.client.transfer_gas(world.rich, world.ben.address, 1)
    reasons += [item.why for item in look(world, store, late, voucher=5).items]

    assert ["halted" in reasons[0], "another hub" in reasons[1], "grace time" in reasons[2]] == [True] * 3


def test_a_stranger_s_voucher_is_doubted(world: World) -> None:
    job = world.job()
    kept = (5, world.voucher(job, world.anna, 5, signer=world.ben))

    found = plan(world.client, world.anna.address, Known(job, (), kept), Store(), now=world.client.now(), redeem="x")

    assert (found.items, found.doubt.code) == ([], "voucher.invalid")


def test_one_that_fails_stops_no_other(world: World) -> None:
    store, job, other = Store(), world.job(), world.job()
    settle(world, store, job, 1, {world.anna: 10, world.ben: 1})
    good = look(world, store, job).items[0]
    bad = Item("leaf", other, world.anna.address, 10, 10, "", 1, good.proof)

    done = collect(world.client, world.anna, [bad, good])

    assert isinstance(done[0], TrainChainError)
    assert (done[0].code, done[1].amount, world.holds(world.anna)) == ("chain.reverted", 10, 10)


def test_a_copy_is_made_once_checked_and_forgotten_in_time(world: World, tmp_path) -> None:
    store, job, mirror = Store(), world.job(), Mirror(tmp_path)
    for number, amount in enumerate((10, 20, 30), 1):
        settle(world, store, job, number, {world.anna: amount})
        mirror.update(world.client, job, world.anna.address, store)
        mirror.update(world.client, job, world.anna.address, None)  # nothing new: nobody is asked
    assert (list(mirror.read(job)), mirror.leaf(job, world.anna.address)) == ([2, 3], 30)

    settle(world, store, job, 4, {world.anna: 25, world.ben: 10})
    with pytest.raises(TrainChainError) as fell:
        mirror.update(world.client, job, world.anna.address, store)
    assert fell.value.code == "settlement.mismatch"
    found = look(world, store, job, leaves=list(mirror.read(job).values()), voucher=40)

    assert found.doubt.code == "settlement.mismatch"
    assert [(item.kind, item.amount) for item in found.items] == [("leaf", 25), ("voucher", 15)]
