"""What holds for a job's money after any sequence of calls, with an honest hub and everybody else at liberty."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.fixtures_chain import World, no_sleep
from trainchain.chain import settlement
from trainchain.chain.devnet.node import Devnet
from trainchain.chain.escrow import ChainClient
from trainchain.chain.provider import EmbeddedProvider
from trainchain.chain.records import ClaimItem
from trainchain.core.errors import TrainChainError

FUNDED, ROUND_CAP = 300, 200
HEAP = "0x" + "47" * 20
START = SimpleNamespace(total=0)
workers = st.sampled_from(["anna", "ben"])
amounts = st.integers(1, 150)


def machine(client):
    class Escrow(RuleBasedStateMachine):
        @initialize(delay=st.sampled_from([0, 60]))
        def start(self, delay):
            self.world = World(client, client.faucet(), client.node)
            self.job_id = self.world.job(amount=FUNDED, activation_delay=delay, round_cap=ROUND_CAP, grace=200)
            self.before = self.world.holds(client.escrow) - FUNDED
            self.owed = {"anna": 0, "ben": 0}
            self.roots = []
            self.round = 0
            self.paid = {"anna": 0, "ben": 0}
            self.elsewhere = {"anna": 0, "ben": 0}
            self.funded, self.reclaimed = FUNDED, 0

        def attempt(self, call, *args):
            """What the contract refuses may change nothing; the invariants look at that."""
            try:
                return call(*args)
            except TrainChainError as problem:
                if problem.code not in ("chain.reverted", "money.too_early"):
                    raise
                return None

        @rule(who=workers, amount=amounts)
        def settle(self, who, amount):
            owed = {**self.owed, who: self.owed[who] + amount}
            people = {getattr(self.world, name): owed[name] for name in owed if owed[name]}
            leaves = self.attempt(self.world.settle, self.job_id, self.round + 1, people)
            if leaves is not None:
                self.owed, self.round = owed, self.round + 1
                self.roots.append(leaves)

        @precondition(lambda self: self.roots)
        @rule(who=workers, late=st.integers(0, 1))
        def claim(self, who, late):
            leaves = self.roots[-1 - late if late < len(self.roots) else -1]
            person = getattr(self.world, who)
            done = self.attempt(self.world.count, leaves, person)
            if done is not None:
                self.paid[who] += done.amount
                assert self.paid[who] >= leaves.amounts.get(person.address, 0)

        @rule(who=workers, amount=amounts)
        def redeem(self, who, amount):
            person = getattr(self.world, who)
            done = self.attempt(self.world.redeem, self.job_id, person, self.owed[who] + amount)
            if done is not None:
                self.paid[who] += done.amount

        @precondition(lambda self: self.roots)
        @rule(late=st.integers(0, 1))
        def claim_all_twice_in_one_batch(self, late):
            leaves = self.roots[-1 - late if late < len(self.roots) else -1]
            people = {name: getattr(self.world, name) for name in self.paid}
            items = [
                ClaimItem(self.job_id, who.address, *settlement.proof_for(leaves, who.address))
                for who in (*people.values(), *people.values())
            ]
            _, amounts = client.claim_many(self.world.hub, items)
            for name, first, again in zip(people, amounts, amounts[len(people) :], strict=False):
                assert again == 0
                self.paid[name] += first

        @precondition(lambda self: self.roots)
        @rule(who=workers, tip=st.integers(0, 5))
        def claim_elsewhere(self, who, tip):
            person, leaves = getattr(self.world, who), self.roots[-1]
            cumulative, proof = settlement.proof_for(leaves, person.address)
            fields = {"account": person.address, "to": HEAP, "cumulative": cumulative, "tip": tip}
            message = {"jobId": self.job_id, **fields, "validUntil": client.now()}
            signature = person.sign_typed(client.domain, "ClaimTo", message)
            done = self.attempt(client.claim_to, self.world.hub, message, proof, signature)
            if done is not None:
                self.paid[who] += done.amount
                self.elsewhere[who] += done.amount

        @rule(amount=amounts)
        def fund(self, amount):
            if self.attempt(client.fund, self.world.owner, self.job_id, amount) is not None:
                self.funded += amount

        @rule()
        def close_early(self):
            signature = self.world.owner.sign_typed(client.domain, "CloseEarly", {"jobId": self.job_id})
            self.attempt(client.close_early, self.world.hub, self.job_id, signature)

        @rule()
        def halt(self):
            self.attempt(client.halt, self.world.owner, self.job_id)

        @rule(seconds=st.sampled_from([1, 59, 60, 199, 1300]))
        def wait(self, seconds):
            self.world.advance(seconds)

        @rule()
        def reclaim(self):
            job = client.job(self.job_id)
            done = self.attempt(client.reclaim, self.world.owner, self.job_id)
            if done is not None and done.amount:
                assert client.now() > job.closes_after
                self.reclaimed += done.amount

        @invariant()
        def the_money_is_there(self):
            if not hasattr(self, "world"):
                return
            job = client.job(self.job_id)
            assert job.claimed <= job.settled <= job.funded - job.refunded
            in_escrow = self.world.holds(client.escrow) - self.before
            assert in_escrow == job.funded - job.refunded - job.claimed
            assert (job.funded, job.refunded) == (self.funded, self.reclaimed)
            raises = [later.total - one.total for one, later in pairwise([START, *client.settlements(self.job_id)])]
            assert all(0 <= raised <= ROUND_CAP for raised in raises)
            advances = sum(self.advanced(name) for name in self.paid)
            assert job.settled == job.total + advances
            assert sum(self.paid.values()) == job.claimed
            for name, amount in self.paid.items():
                assert self.world.holds(getattr(self.world, name)) == amount - self.elsewhere[name]
            for leaves in self.roots[-2:]:
                due = (amount - self.paid_to(address) for address, amount in leaves.amounts.items())
                assert sum(max(0, amount) for amount in due) <= job.settled - job.claimed

        def teardown(self):
            if not hasattr(self, "world"):
                return
            self.world.advance(2000)
            for name in self.paid:
                if self.roots:
                    self.attempt(self.world.count, self.roots[-1], getattr(self.world, name))
                assert client.claimed_of(self.job_id, getattr(self.world, name).address) >= self.owed[name]
            self.attempt(client.reclaim, self.world.owner, self.job_id)
            assert self.world.holds(client.escrow) == self.before

        def advanced(self, name):
            return client.advanced_of(self.job_id, getattr(self.world, name).address)

        def paid_to(self, address):
            return next(self.paid[name] for name in self.paid if getattr(self.world, name).address == address)

    return Escrow


@pytest.mark.parametrize("examples", [12])
def test_the_money_adds_up(tmp_path, examples):
    node = Devnet(tmp_path / "x.sqlite", clock=lambda: 1_800_000_000.0)
    client = ChainClient(EmbeddedProvider(node), sleep=no_sleep)
    case = machine(client).TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=14,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    case().runTest()
    client.close()
