"""The paybook loses no promise: whatever comes, in whatever order, torn or forged, the highest that holds is kept."""

import json
import secrets
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainchain.chain import eip712
from trainchain.chain.eip712 import Domain
from trainchain.chain.wallet import Wallet
from trainchain.core.errors import TrainChainError
from trainchain.core.rewards import VESTING
from trainchain.core.worker.paybook import REFUSED, Papers, Paybook, Ties

HUB, STRANGER, WORKER = (Wallet(bytes([number]) * 32) for number in (1, 2, 3))
DOMAIN = Domain(31337, "0x" + "ee" * 20)
TIES = Ties(DOMAIN.chain_id, DOMAIN.escrow, HUB.address)
JOB, OTHER = "0x" + "0a" * 32, "0x" + "0b" * 32


def signed(kind: str, fields: Any, signature: str) -> bool:
    try:
        return eip712.recover(DOMAIN, kind, fields, signature) == HUB.address
    except TrainChainError:
        return False


def paybook(home: str) -> Paybook:
    return Paybook(Path(home), WORKER.address, TIES, signed)


def voucher(cumulative: int, *, job: str = JOB, account: str = WORKER.address, by: Wallet = HUB) -> dict[str, Any]:
    fields = {"jobId": job, "account": account, "cumulative": cumulative}
    bound = {"hub": HUB.address, "chain_id": DOMAIN.chain_id, "escrow": DOMAIN.escrow}
    signature = eip712.sign(DOMAIN, "Voucher", fields, by)
    return {**fields, "cumulative": str(cumulative), **bound, "signature": signature}


def promised(place: int, amount: int) -> dict[str, Any]:
    return {
        "jobId": JOB,
        "round": 1,
        "shard": place,
        "lease": "0x" + place.to_bytes(32, "big").hex(),
        "worker": WORKER.address,
        "deltaHash": "0x" + "5a" * 32,
        "amount": amount,
    }


def answer(place: int, amount: int, vested: int, /, **changes: Any) -> dict[str, Any]:
    """What an honest hub answers to a contribution."""
    fields = {**promised(place, amount), "place": place}
    bound = {"hub": HUB.address, "chain_id": DOMAIN.chain_id, "escrow": DOMAIN.escrow}
    receipt = {**fields, "amount": str(amount), **bound, "signature": eip712.sign(DOMAIN, "Receipt", fields, HUB)}
    return {**receipt, "voucher": voucher(vested) if vested else None, **changes}


def hub_says(amounts: list[int]) -> list[dict[str, Any]]:
    """The answers to shards accepted one after the other."""
    return [answer(place, amount, sum(amounts[: max(0, place - VESTING)])) for place, amount in enumerate(amounts, 1)]


amounts = st.lists(st.integers(1, 10**20), min_size=1, max_size=16)


@settings(max_examples=60, deadline=None)
@given(amounts=amounts, data=st.data())
def test_the_highest_voucher_is_kept_in_any_order_of_arrival_and_on_any_of_several_machines(
    amounts: list[int], data: Any
) -> None:
    """Of several devices one may be told of an earlier shard later; of several machines each has some shards only."""
    answers = hub_says(amounts)
    here = data.draw(st.permutations(range(len(answers))))[: data.draw(st.integers(1, len(answers)))]
    with tempfile.TemporaryDirectory() as home:
        for at in here:
            # All were sent before the first answer came, so none could know more than it did.
            paybook(home).keep(promised(at + 1, amounts[at]), answers[at], floor=0)

        papers = Papers(Path(home), WORKER.address)
        kept = papers.voucher(JOB)
        highest = max((int(answers[at]["voucher"]["cumulative"]) for at in here if answers[at]["voucher"]), default=0)
        assert (kept.cumulative if kept else 0) == highest == papers.vested(JOB)
        assert [receipt.place for receipt in papers.receipts(JOB)] == sorted(at + 1 for at in here)
        assert papers.earned(JOB) == sum(amounts[at] for at in here)


BAD = {
    "another signer": lambda amount: voucher(amount, by=STRANGER),
    "another job's": lambda amount: voucher(amount, job=OTHER),
    "another job's, renamed": lambda amount: {**voucher(amount, job=OTHER), "jobId": JOB},
    "another wallet's": lambda amount: voucher(amount, account=STRANGER.address),
    "another amount": lambda amount: {**voucher(amount), "cumulative": str(amount + 1)},
    "another chain": lambda amount: {**voucher(amount), "chain_id": 1},
    "another hub named": lambda amount: {**voucher(amount), "hub": STRANGER.address},
    "no signature": lambda amount: {**voucher(amount), "signature": "0x"},
    "not a voucher": lambda amount: {"cumulative": str(amount)},
    "a list": lambda amount: [amount],
}


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(1, 10**30), st.sampled_from([None, *BAD])), min_size=1, max_size=8))
def test_what_does_not_hold_is_refused_kept_aside_and_changes_nothing(steps: list[tuple[int, str | None]]) -> None:
    with tempfile.TemporaryDirectory() as home:
        highest = 0
        for amount, bad in steps:
            if bad is None:
                paybook(home).keep_voucher(JOB, voucher(amount), floor=0)
                highest = max(highest, amount)
            else:
                with pytest.raises(TrainChainError) as caught:
                    paybook(home).keep_voucher(JOB, BAD[bad](amount), floor=0)
                assert caught.value.code == "voucher.invalid"
                assert json.loads((Path(home) / "vouchers" / REFUSED / f"{JOB}.json").read_bytes())

        assert paybook(home).vested(JOB) == highest
        assert paybook(home).jobs() == ([JOB] if highest else [])


@settings(max_examples=60, deadline=None)
@given(amounts=amounts, data=st.data())
def test_a_torn_file_costs_itself_alone(amounts: list[int], data: Any) -> None:
    answers = hub_says(amounts)
    with tempfile.TemporaryDirectory() as home:
        book = paybook(home)
        for at, one in enumerate(answers):
            book.keep(promised(at + 1, amounts[at]), one, floor=book.vested(JOB))
        files = sorted(path for path in Path(home).rglob("0x*.json"))
        torn = data.draw(st.sampled_from(files))
        torn.write_bytes(torn.read_bytes()[: data.draw(st.integers(0, torn.stat().st_size - 1))])

        again = paybook(home)
        left = [at + 1 for at in range(len(answers)) if torn.stem != promised(at + 1, 0)["lease"]]
        assert [receipt.place for receipt in again.receipts(JOB)] == left
        again.keep_voucher(JOB, voucher(sum(amounts)), floor=again.vested(JOB))
        assert paybook(home).vested(JOB) == sum(amounts)


@pytest.mark.parametrize("floor", [1, 5])
def test_a_voucher_below_what_was_known_to_have_vested_is_refused(tmp_path: Path, floor: int) -> None:
    book = paybook(str(tmp_path))
    for document in (None, voucher(floor - 1) if floor > 1 else None):
        with pytest.raises(TrainChainError) as caught:
            book.keep_voucher(JOB, document, floor=floor)
        assert caught.value.code == "voucher.invalid"
        assert "Stop working for this hub" in caught.value.hint


def test_a_hub_that_signs_receipts_and_holds_back_the_voucher_is_found_out(tmp_path: Path) -> None:
    book = paybook(str(tmp_path))
    for place in range(1, VESTING + 1):
        book.keep(promised(place, 7), answer(place, 7, 0), floor=0)

    with pytest.raises(TrainChainError) as caught:
        book.keep(promised(VESTING + 1, 7), answer(VESTING + 1, 7, 0), floor=0)

    assert caught.value.code == "voucher.invalid"
    assert len(book.receipts(JOB)) == VESTING + 1, "the receipt holds, and counts"


@pytest.mark.parametrize(
    "changes",
    [
        {"amount": "6"},
        {"place": 0},
        {"place": 2},
        {"place": "1"},
        {"lease": "0x" + secrets.token_hex(32)},
        {"worker": STRANGER.address},
        {"hub": STRANGER.address},
        {"escrow": "0x" + "ab" * 20},
        {"signature": voucher(1)["signature"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_receipt_that_is_not_what_it_should_be_is_kept_aside(tmp_path: Path, changes: dict[str, Any]) -> None:
    book = paybook(str(tmp_path))
    with pytest.raises(TrainChainError) as caught:
        book.keep(promised(1, 7), answer(1, 7, 0, **changes), floor=0)

    assert caught.value.code == "receipt.invalid"
    assert (tmp_path / "receipts" / JOB / REFUSED / f"{promised(1, 7)['lease']}.json").exists()
    assert (book.receipts(JOB), book.jobs()) == ([], [])


def test_a_place_is_given_once_and_the_same_receipt_may_come_again(tmp_path: Path) -> None:
    book = paybook(str(tmp_path))
    book.keep(promised(1, 7), answer(1, 7, 0), floor=0)
    book.keep(promised(1, 7), answer(1, 7, 0), floor=0)
    fields = {**promised(2, 7), "place": 1}
    twice = {**answer(2, 7, 0), "place": 1, "signature": eip712.sign(DOMAIN, "Receipt", fields, HUB)}

    with pytest.raises(TrainChainError) as caught:
        book.keep(promised(2, 7), twice, floor=0)

    assert caught.value.code == "receipt.invalid"
    assert "place 1" in caught.value.message
    assert [receipt.place for receipt in book.receipts(JOB)] == [1]


def test_what_is_kept_is_for_its_user_alone(tmp_path: Path) -> None:
    book = paybook(str(tmp_path))
    for place in range(1, VESTING + 2):
        book.keep(promised(place, 7), answer(place, 7, 7 * max(0, place - VESTING)), floor=0)

    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o600}
