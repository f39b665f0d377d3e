"""What holds for a job's money after any sequence of calls, with an honest hub and everybody else at liberty."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.fixtures_chain import World, no_sleep
from trainchain.chain.devnet.node import Devnet
from trainchain.chain.escrow import ChainClient
from trainchain.chain.provider import EmbeddedProvider
from trainchain.core.errors import TrainChainError

FUNDED = 300
workers = st.sampled_from(["anna", "ben"])
amounts = st.integers(1, 150)


def machine(client):
    class Escrow(RuleBasedStateMachine):
        @initialize(delay=st.sampled_from([0, 60]))
        def start(self, delay):
            self.world = World(client, client.faucet(), client.node)
            self.job_id = self.world.job(amount=FUNDED, activation_delay=delay, round_cap=200, grace=200)
            self.before = self.world.holds(client.escrow) - FUNDED
            self.owed = {"anna": 0, "ben": 0}
            self.roots = []
            self.round = 0
            self.paid = {"anna": 0, "ben": 0}

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

        @rule(seconds=st.sampled_from([1, 59, 60, 1300]))
        def wait(self, seconds):
            self.world.advance(seconds)

        @rule()
        def reclaim(self):
            self.attempt(client.reclaim, self.world.owner, self.job_id)

        @invariant()
        def the_money_is_there(self):
            if not hasattr(self, "world"):
                return
            job = client.job(self.job_id)
            assert job.claimed <= job.settled <= job.funded - job.refunded
            in_escrow = self.world.holds(client.escrow) - self.before
            assert in_escrow == job.funded - job.refunded - job.claimed
            advances = sum(self.advanced(name) for name in self.paid)
            assert job.settled == job.total + advances
            assert sum(self.paid.values()) == job.claimed
            for name, amount in self.paid.items():
                assert self.world.holds(getattr(self.world, name)) == amount
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
