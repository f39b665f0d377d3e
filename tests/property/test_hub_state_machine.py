"""Leases, expiries and contributions in any order, in time and late: whatever happens, a shard is lent, accepted and
paid once, and no settlement asks more of the escrow than it gives."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import select, update

from tests.fixtures_hub import INITIAL, STEPS, Clock, job_files, numbers, recipe
from tests.fixtures_merge import PLAIN_MERGE
from trainchain.chain import eip712
from trainchain.chain.wallet import Wallet
from trainchain.core.adapter import adapter_bytes
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import cashier, contributions, jobs, leases, rounds, schema
from trainchain.core.hub import vouchers as hub_vouchers
from trainchain.core.hub.jobs import Publication
from trainchain.core.hub.service import Claim, EscrowJob, Hub, Settlement
from trainchain.core.hub.store import Store
from trainchain.core.messages import SignedContribution
from trainchain.core.objects import ObjectStore, Spool
from trainchain.core.rewards import VESTING, Terms, job_price, recount, round_cap, round_price, shard_reward, totals
from trainchain.core.seal import ExchangeKey

WORKERS = [Wallet(bytes([number]) * 32) for number in (1, 2, 3)]
OWNER = "0x" + "11" * 20
DELTAS = [adapter_bytes(numbers(seed)) for seed in range(24)]
REFUSALS = {
    "lease.lost",
    "shard.already_accepted",
    "contribution.too_late",
    "job.closed",
    "contribution.repeat",
    "contribution.wrong_start",
}


class Notary:
    """A chain as the hub sees it, without blocks: real signatures, and a note of what was settled."""

    chain_id = 7
    escrow = "0x" + "22" * 20
    token = "0x" + "33" * 20
    keys = Wallet(bytes([9]) * 32)
    address = keys.address
    domain = eip712.Domain(chain_id, escrow)

    relays = True

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.settled: dict[int, dict[str, int]] = {}
        self.terms: dict[str, Any] = {}
        self.claimed: dict[str, int] = {}
        self.advanced: dict[str, int] = {}
        """What vouchers have paid each worker, and the part of it that no leaf has counted yet."""
        self.away = False

    def job_id(self, owner: str, salt: str) -> str:
        return salt

    def job(self, job_id: str) -> EscrowJob:
        self._insist()
        money = {
            "free": self.free(),
            "advances": sum(self.advanced.values()),
            "pending_at": 0,
            "round": max(self.settled, default=0),
        }
        return EscrowJob(owner=OWNER, token=self.token, hub=self.address, halted=False, **money, **self.terms)

    def total(self) -> int:
        return sum(self.leaves().values())

    def leaves(self) -> dict[str, int]:
        return self.settled[max(self.settled)] if self.settled else {}

    def free(self) -> int:
        """What is neither in the last root nor advanced by a voucher."""
        return int(self.terms["funded"]) - self.total() - sum(self.advanced.values())

    def redeem(self, account: str, cumulative: int) -> None:
        """As the escrow does it: all of it or nothing, from what is free."""
        paid = cumulative - self.claimed.get(account, 0)
        if 0 < paid <= self.free():
            self.claimed[account] = cumulative
            self.advanced[account] = self.advanced.get(account, 0) + paid

    def _insist(self) -> None:
        if self.away:
            raise TrainChainError("chain.unreachable", "The chain is away.")

    def recover(self, kind: str, message: Mapping[str, Any], signature: str) -> str:
        return eip712.recover(self.domain, kind, message, signature)

    def recover_sign_in(self, fields: Mapping[str, Any], signature: str) -> str:
        raise NotImplementedError

    def sign(self, kind: str, message: Mapping[str, Any]) -> str:
        return eip712.sign(self.domain, kind, message, self.keys)

    def settlement(self, job_id: str, terms: Terms, amounts: Mapping[str, int]) -> Settlement:
        leaves = json.dumps({"number": terms.number, "amounts": amounts}).encode()
        return Settlement("0x" + "44" * 32, sum(amounts.values()), leaves)

    def settle(self, job_id: str, number: int, leaves: bytes) -> str:
        self._insist()
        amounts, before = json.loads(leaves)["amounts"], self.leaves()
        if self.settled.get(number) != amounts:  # an answer that was lost is found again
            assert number > max(self.settled, default=0), "a round is settled once"
            raised = sum(amounts.values()) - sum(before.values())
            assert 0 < raised <= self.terms["round_cap"], "RoundCapExceeded"
            assert raised <= self.free(), "NotCovered"
            assert all(amounts.get(worker, 0) >= amount for worker, amount in before.items()), "no leaf falls"
            self.settled[number] = amounts
        return "0x" + "55" * 32

    def claim_many(self, claims: Sequence[Claim]) -> tuple[str | None, list[int]]:
        raise NotImplementedError

    def count_advances(self, job_id: str, leaves: bytes) -> str | None:
        """A leaf counts what a voucher paid: it is reserved once again."""
        self._insist()
        for account, amount in self.leaves().items():
            advanced = self.advanced.get(account, 0)
            by_leaf = self.claimed.get(account, 0) - advanced
            self.advanced[account] = advanced - min(max(0, amount - by_leaf), advanced)
        return "0x" + "66" * 32

    def drip(self, address: str, tokens: int) -> dict[str, str]:
        raise NotImplementedError

    def rpc(self, body: bytes) -> bytes:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        return {}


class HubLaws(RuleBasedStateMachine):
    @initialize(
        number=st.integers(1, 5),
        shards=st.integers(1, 6),
        quorum=st.sampled_from([0.25, 0.5, 1.0]),
        spares=st.sampled_from([0.0, 0.5, 1.0]),
        funded=st.sampled_from([0.5, 0.8, 1.0]),
    )
    def publish(self, number: int, shards: int, quorum: float, spares: float, funded: float) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="hub-laws-"))
        self.clock = Clock()
        self.chain = Notary(self.clock)
        self.hub = self.opened()
        merge = PLAIN_MERGE.model_copy(update={"spares": spares})
        sizes = {"rounds": number, "shards": shards, "quorum": quorum, "round_deadline": 90, "pay_deadline": 1000}
        made = recipe(job_files(), merge=merge, **sizes)
        self.recipe = made
        self.chain.terms = {
            "deadline": int(self.clock()) + made.pay.deadline,
            "grace": made.pay.grace,
            "activation_delay": 0,
            "round_cap": round_cap(made),
            "spec_hash": made.spec_hash,
            "funded": max(round_price(made, 1), int(job_price(made) * funded)),
        }
        self.job = "0x" + "ab" * 32
        jobs.publish(self.hub, OWNER, Publication(recipe=made, salt=self.job))
        self.hub.objects.put(INITIAL)
        with self.hub.store.write() as db:
            db.execute(update(schema.objects).values(present=True))
        jobs.fund(self.hub, self.job)
        rounds.tick(self.hub)
        self.given: list[dict[str, Any]] = []
        self.accepted: dict[tuple[int, int], tuple[Any, ...]] = {}
        self.receipts: dict[tuple[int, int], int] = {}

    def opened(self) -> Hub:
        store, objects = Store(self.root / "hub.sqlite"), ObjectStore(self.root / "objects")
        return Hub(store, objects, self.chain, self.clock, exchange=ExchangeKey(bytes(32)))

    def teardown(self) -> None:
        if hasattr(self, "hub"):
            self.hub.store.close()
            shutil.rmtree(self.root)

    @rule(worker=st.sampled_from(WORKERS))
    def take(self, worker: Wallet) -> None:
        if lease := leases.take(self.hub, worker.address, None):
            self._was_given(lease, worker)

    @rule()
    def everybody_takes(self) -> None:
        for worker in WORKERS:
            if lease := leases.take(self.hub, worker.address, None):
                self._was_given(lease, worker)

    def _was_given(self, lease: dict[str, Any], worker: Wallet) -> None:
        self.given.append({**lease, "worker": worker})
        here = [row for row in self._rows(schema.shards) if row["round"] == lease["round"]]
        states = [row["state"] for row in here if not row["spare"]]
        if lease["shard"] >= self.recipe.shards:
            used = sum(row["state"] != "open" for row in here if row["spare"])
            assert "open" not in states, "spare shards are for the tail"
            assert used <= states.count("leased"), "one for each that is out"

    @precondition(lambda self: self.given)
    @rule(data=st.data(), beats=st.booleans())
    def all_but_one_hand_in(self, data: st.DataObject, beats: bool) -> None:
        """One is slow: the round's deadline passes, and he may be late."""
        slow = self._pick(data)
        for lease in [one for one in self.given if one["lease"] != slow["lease"]][-4:]:
            self._hand_in(lease, data.draw(st.sampled_from(DELTAS)))
        for _ in range(6):
            self.clock.forward(16)
            if beats:
                self._may_be_refused(leases.beat, self.hub, slow["worker"].address, slow["lease"], leases.Progress())
        rounds.tick(self.hub)

    @rule(seconds=st.sampled_from([1, 5, 19, 21, 91]))
    def wait(self, seconds: int) -> None:
        self.clock.forward(seconds)

    @precondition(lambda self: len(self.given) > 3)
    @rule(late=st.booleans())
    def end(self, late: bool) -> None:
        """The deadline passes; the hub takes note at once, or later."""
        self.clock.forward(self.recipe.pay.deadline)
        for tick in () if late else (rounds.tick, rounds.tick, cashier.tick, cashier.tick):
            tick(self.hub)

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def beat(self, data: st.DataObject) -> None:
        lease = self._pick(data)
        self._may_be_refused(leases.beat, self.hub, lease["worker"].address, lease["lease"], leases.Progress())

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        lease = self._pick(data)
        leases.give_back(self.hub, lease["worker"].address, lease["lease"])

    @precondition(lambda self: self.given)
    @rule(data=st.data(), delta=st.sampled_from(DELTAS))
    def contribute(self, data: st.DataObject, delta: bytes) -> None:
        self._hand_in(self._pick(data), delta)

    def _hand_in(self, lease: dict[str, Any], delta: bytes) -> None:
        worker: Wallet = lease["worker"]
        message = {
            "jobId": self.job,
            "round": lease["round"],
            "shard": lease["shard"],
            "lease": lease["lease"],
            "worker": worker.address,
            "startHash": "0x" + lease["start"],
            "deltaHash": "0x" + sha256(delta),
            "stateRoot": "0x" + "66" * 32,
            "encoding": "fp32",
            "numericClass": "test",
        }
        signature = worker.sign_typed(Notary.domain, "Contribution", message)
        told = {"contribution": message, "signature": signature, "micro_tokens": [128] * STEPS}
        signed = SignedContribution.model_validate(told)
        spool = Spool(len(delta))
        spool.write(delta)
        contributions.keep_delta(self.hub, worker.address, lease["lease"], sha256(delta), spool)
        spool.close()
        receipt = self._may_be_refused(contributions.contribute, self.hub, worker.address, lease["lease"], signed)
        if receipt is not None:
            place = (lease["round"], lease["shard"])
            assert place not in self.receipts, "a shard is accepted once"
            self.receipts[place] = int(receipt["amount"])

    @rule()
    def tick(self) -> None:
        rounds.tick(self.hub)

    @rule()
    def settle(self) -> None:
        cashier.tick(self.hub)

    @rule(away=st.booleans())
    def the_chain_comes_and_goes(self, away: bool) -> None:
        self.chain.away = away

    @rule(worker=st.sampled_from(WORKERS))
    def redeem(self, worker: Wallet) -> None:
        for row in self._rows(schema.vouchers):
            if row["account"] == worker.address and self.clock() <= self.recipe_end():
                self.chain.redeem(worker.address, row["cumulative"])

    def recipe_end(self) -> float:
        return float(self.chain.terms["deadline"] + self.chain.terms["grace"])

    @rule()
    def restart(self) -> None:
        """All but the folder is new."""
        self.hub.store.close()
        self.hub = self.opened()
        leases.extend_all(self.hub)

    @invariant()
    def a_shard_has_one_holder(self) -> None:
        held = [(row["round"], row["shard"]) for row in self._rows(schema.leases) if row["state"] == "held"]
        assert len(held) == len(set(held))
        lent = {(row["round"], row["shard"]) for row in self._rows(schema.shards) if row["state"] == "leased"}
        assert lent <= set(held), "a lent shard without a lease would never open again"

    @invariant()
    def what_is_accepted_stays(self) -> None:
        now = self._accepted()
        assert self.accepted.items() <= now.items()
        self.accepted = now
        states = {(row["round"], row["shard"]): row["state"] for row in self._rows(schema.shards)}
        assert {place for place, state in states.items() if state == "accepted"} == set(now)
        assert len({delta for _, delta, _, _ in now.values()}) == len(now), "no delta counts twice"

    @invariant()
    def every_acceptance_is_paid_once(self) -> None:
        assert self.receipts == {place: reward for place, (_, _, _, reward) in self._accepted().items()}
        assert self.receipts == {place: shard_reward(self.recipe, *place) for place in self.receipts}
        rows, _ = cashier.earned(self.hub, self.job)
        owed = totals(rows)
        assert sum(owed.values()) == sum(self.receipts.values()) == jobs.owed(self.hub, self.job)
        sent = [row for row in self._rows(schema.settlements) if row["tx"]]
        terms = [Terms(row["round"], row["ended"], row["limit"]) for row in sorted(sent, key=lambda row: row["round"])]
        assert (recount(rows, terms) or [{}])[-1] == self.chain.leaves(), "anyone can recompute what was settled"
        state = self.hub.job(self.job)["state"]
        vouchers = {row["account"]: row["cumulative"] for row in self._rows(schema.vouchers)}
        if state in ("settled", "closed"):
            assert vouchers == owed, "who holds a receipt has it vouched for"
            late = self.clock() > self.recipe_end() or self.chain.free() < max((row.amount for row in rows), default=0)
            assert self.chain.leaves() == owed or late, "and in the last settlement"

    @invariant()
    def vouchers_promise_what_has_vested(self) -> None:
        rows, _ = cashier.earned(self.hub, self.job)
        over = hub_vouchers.ended(self.hub, self.hub.job(self.job))
        for row in self._rows(schema.vouchers):
            mine = sorted((one for one in rows if one.worker == row["account"]), key=lambda one: one.place)
            ripe = sum(one.amount for one in mine[: max(0, len(mine) - VESTING)])
            every = sum(one.amount for one in mine)
            assert row["cumulative"] in ((ripe, every) if over else (ripe,))
        for worker in {one.worker for one in rows}:
            places = sorted(one.place for one in rows if one.worker == worker)
            assert places == list(range(1, len(places) + 1))

    @invariant()
    def the_escrow_covers_all_that_may_still_come(self) -> None:
        assert jobs.owed(self.hub, self.job, expected=True) <= self.chain.terms["funded"]

    @invariant()
    def what_is_late_is_one_round_late_and_no_quorum(self) -> None:
        here = {row["round"]: row["state"] for row in self._rows(schema.rounds)}
        given = [(row["round"], row["merged_in"]) for row in self._rows(schema.contributions)]
        for number, merged_in in given:
            assert merged_in in (number, number + 1) or (merged_in is None and number == self.recipe.rounds)
            assert merged_in is None or merged_in <= self.recipe.rounds
        for number, state in here.items():
            if state != "open":
                assert given.count((number, number)) >= self.recipe.quorum * self.recipe.shards

    def _accepted(self) -> dict[tuple[int, int], tuple[Any, ...]]:
        return {
            (row["round"], row["shard"]): (row["worker"], row["delta"], row["lease"], row["reward"])
            for row in self._rows(schema.contributions)
        }

    def _pick(self, data: st.DataObject) -> dict[str, Any]:
        return self.given[data.draw(st.integers(0, len(self.given) - 1), label="lease")]

    def _may_be_refused(self, verb: Any, *arguments: Any) -> Any:
        try:
            return verb(*arguments)
        except TrainChainError as error:
            if error.code not in REFUSALS:
                raise
            return None

    def _rows(self, table: Any) -> list[Any]:
        with self.hub.store.read() as db:
            return list(db.execute(select(table).where(table.c.job == self.job)).mappings())


HubLaws.TestCase.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
test_hub_laws = HubLaws.TestCase
