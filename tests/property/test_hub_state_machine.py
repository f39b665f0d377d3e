"""Leases, expiries and contributions in any order, in time and late: whatever happens, a shard is lent, accepted and
paid once, and no settlement asks more of the escrow than it gives."""

import shutil
import tempfile
from collections.abc import Mapping
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
from trainchain.core.hub.jobs import Publication
from trainchain.core.hub.service import EscrowJob, Hub, Settled
from trainchain.core.hub.store import Store
from trainchain.core.models import SignedContribution
from trainchain.core.objects import ObjectStore, Spool
from trainchain.core.rewards import job_price, round_cap, round_price, shard_reward
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

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.settled: dict[int, dict[str, int]] = {}
        self.terms: dict[str, Any] = {}

    def job_id(self, owner: str, salt: str) -> str:
        return salt

    def job(self, job_id: str) -> EscrowJob:
        return EscrowJob(owner=OWNER, token=self.token, hub=self.address, halted=False, **self.terms)

    def recover(self, kind: str, message: Mapping[str, Any], signature: str) -> str:
        return eip712.recover(self.domain, kind, message, signature)

    def recover_sign_in(self, fields: Mapping[str, Any], signature: str) -> str:
        raise NotImplementedError

    def sign(self, kind: str, message: Mapping[str, Any]) -> str:
        return eip712.sign(self.domain, kind, message, self.keys)

    def settle(self, job_id: str, round_: int, amounts: Mapping[str, int]) -> Settled:
        assert round_ not in self.settled, "a round is settled once"
        last = max(self.settled, default=0)
        before = self.settled.get(last, {})
        assert round_ > last
        raised = sum(amounts.values()) - sum(before.values())
        assert raised <= self.terms["round_cap"] * (round_ - last), "RoundCapExceeded"
        assert sum(amounts.values()) <= self.terms["funded"], "NotCovered"
        assert all(amounts.get(worker, 0) >= amount for worker, amount in before.items()), "no leaf falls"
        self.settled[round_] = dict(amounts)
        return Settled("0x" + "44" * 32, sum(amounts.values()), repr(amounts).encode(), "0x" + "55" * 32)

    def drip(self, address: str, tokens: int) -> dict[str, str]:
        raise NotImplementedError

    def rpc(self, body: bytes) -> bytes:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        return {}


class HubLaws(RuleBasedStateMachine):
    @initialize(
        number=st.integers(1, 3),
        shards=st.integers(1, 4),
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
        owed = cashier.amounts(self.hub, self.job, self.recipe.rounds)
        assert sum(owed.values()) == sum(self.receipts.values()) == jobs.owed(self.hub, self.job)
        state = self.hub.job(self.job)["state"]
        if state in ("settled", "closed"):
            last = self.chain.settled[max(self.chain.settled)] if self.chain.settled else {}
            assert last == owed, "who holds a receipt is in the last settlement"

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
