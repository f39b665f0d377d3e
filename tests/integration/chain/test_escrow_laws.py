"""What holds for the money of jobs after any sequence of calls, with honest hubs and everybody else at liberty."""

import secrets
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.fixtures_chain import COIN, World
from trainchain.chain import settlement
from trainchain.chain.records import ClaimItem
from trainchain.chain.wallet import Wallet
from trainchain.core.errors import TrainChainError

FUNDED, ROUND_CAP, GRACE = 300, 200, 200
HEAP = "0x" + "47" * 20
START = SimpleNamespace(total=0)
PEOPLE = ("anna", "ben")
workers = st.sampled_from(PEOPLE)
jobs = st.sampled_from([0, 1])
amounts = st.integers(1, 150)


def nothing() -> dict[str, int]:
    return dict.fromkeys(PEOPLE, 0)


@dataclass
class Kept:
    """What we know of a job without asking the contract."""

    job_id: str
    hub: Wallet
    next: Wallet
    next_at: float = float("inf")
    owed: dict[str, int] = field(default_factory=nothing)
    paid: dict[str, int] = field(default_factory=nothing)
    elsewhere: dict[str, int] = field(default_factory=nothing)
    roots: list[settlement.Leaves] = field(default_factory=list)
    funded: int = FUNDED
    reclaimed: int = 0

    def hub_at(self, now) -> Wallet:
        return self.next if now >= self.next_at else self.hub


def machine(client, rich, node):
    class Escrow(RuleBasedStateMachine):
        @initialize(delay=st.sampled_from([0, 60]))
        def start(self, delay):
            """Two jobs of one owner in one token, one of them without a delay."""
            self.world = World(client, rich, node)
            self.before = self.world.holds(client.escrow)
            other = Wallet(secrets.token_bytes(32))
            client.transfer_gas(self.world.rich, other.address, COIN)
            terms = {"amount": FUNDED, "round_cap": ROUND_CAP, "grace": GRACE}
            self.jobs = [
                Kept(self.world.job(activation_delay=waits, **terms), self.world.hub, other) for waits in (delay, 0)
            ]

        def attempt(self, call, *args, never="", **kwargs):
            """What the contract refuses may change nothing; the invariants look at that."""
            try:
                return call(*args, **kwargs)
            except TrainChainError as problem:
                expected = problem.code in ("chain.reverted", "money.too_early")
                if not expected or (never and never in problem.message):
                    raise
                return None

        def leaves(self, job, late):
            return job.roots[-1 - late if late < len(job.roots) else -1]

        @rule(which=jobs, who=workers, amount=amounts)
        def settle(self, which, who, amount):
            job = self.jobs[which]
            owed = {**job.owed, who: job.owed[who] + amount}
            people = {getattr(self.world, name): owed[name] for name in owed if owed[name]}
            hub = job.hub_at(client.now())
            leaves = self.attempt(
                self.world.settle, job.job_id, len(job.roots) + 1, people, wallet=hub, never="NotHub("
            )
            if leaves is not None:
                job.owed = owed
                job.roots.append(leaves)

        @rule(which=jobs, who=workers, late=st.integers(0, 1))
        def claim(self, which, who, late):
            job, person = self.jobs[which], getattr(self.world, who)
            if not job.roots:
                return
            leaves = self.leaves(job, late)
            done = self.attempt(self.world.count, leaves, person)
            if done is not None:
                job.paid[who] += done.amount
                assert job.paid[who] >= leaves.amounts.get(person.address, 0)

        @rule(which=jobs, who=workers, amount=amounts)
        def redeem(self, which, who, amount):
            job, person = self.jobs[which], getattr(self.world, who)
            hub = job.hub_at(client.now())
            redeem, cumulative = self.world.redeem, job.owed[who] + amount
            done = self.attempt(redeem, job.job_id, person, cumulative, signer=hub, never="BadSignature(")
            if done is not None:
                job.paid[who] += done.amount

        @rule(which=jobs, who=workers)
        def redeem_what_is_not_the_hubs(self, which, who):
            job, person = self.jobs[which], getattr(self.world, who)
            stranger = job.next if job.hub_at(client.now()) is job.hub else job.hub
            done = self.attempt(self.world.redeem, job.job_id, person, FUNDED, signer=stranger)
            assert done is None or done.tx is None

        @rule(late=st.integers(0, 1))
        def claim_all_twice_in_one_batch(self, late):
            items = [
                (job, name, ClaimItem(job.job_id, who.address, *settlement.proof_for(leaves, who.address)))
                for job in self.jobs
                if job.roots
                for leaves in [self.leaves(job, late)]
                for name, who in ((name, getattr(self.world, name)) for name in PEOPLE)
            ]
            _, paid = client.claim_many(self.world.hub, [item for _, _, item in [*items, *items]])
            for (job, name, _), first, again in zip(items, paid, paid[len(items) :], strict=False):
                assert again == 0
                job.paid[name] += first

        @rule(which=jobs, who=workers, tip=st.integers(0, 5))
        def claim_elsewhere(self, which, who, tip):
            job, person = self.jobs[which], getattr(self.world, who)
            if not job.roots:
                return
            cumulative, proof = settlement.proof_for(job.roots[-1], person.address)
            fields = {"account": person.address, "to": HEAP, "cumulative": cumulative, "tip": tip}
            message = {"jobId": job.job_id, **fields, "validUntil": client.now()}
            signature = person.sign_typed(client.domain, "ClaimTo", message)
            done = self.attempt(client.claim_to, self.world.hub, message, proof, signature)
            if done is not None:
                job.paid[who] += done.amount
                job.elsewhere[who] += done.amount

        @rule(which=jobs, amount=amounts)
        def fund(self, which, amount):
            job = self.jobs[which]
            if self.attempt(client.fund, self.world.owner, job.job_id, amount) is not None:
                job.funded += amount

        @rule(which=jobs)
        def propose_another_hub(self, which):
            job, now = self.jobs[which], client.now()
            present = job.hub_at(now)
            other = job.next if present is job.hub else job.hub
            client.propose_hub(self.world.owner, job.job_id, other.address)
            job.hub, job.next, job.next_at = present, other, now + GRACE

        @rule(which=jobs)
        def close_early(self, which):
            job = self.jobs[which]
            signature = self.world.owner.sign_typed(client.domain, "CloseEarly", {"jobId": job.job_id})
            self.attempt(client.close_early, job.hub_at(client.now()), job.job_id, signature, never="NotAParty(")

        @rule(which=jobs)
        def halt(self, which):
            self.attempt(client.halt, self.world.owner, self.jobs[which].job_id)

        @rule(seconds=st.sampled_from([1, 59, 60, 199, 1300]))
        def wait(self, seconds):
            self.world.advance(seconds)

        @rule(which=jobs)
        def reclaim(self, which):
            job = self.jobs[which]
            closes_after = client.job(job.job_id).closes_after
            done = self.attempt(client.reclaim, self.world.owner, job.job_id)
            if done is not None and done.amount:
                assert client.now() > closes_after
                job.reclaimed += done.amount

        @invariant()
        def the_money_is_there(self):
            if not hasattr(self, "jobs"):
                return
            present = [self.checked(job) for job in self.jobs]
            held = sum(job.funded - job.refunded - job.claimed for job in present)
            assert self.world.holds(client.escrow) - self.before == held
            for name in PEOPLE:
                received = sum(job.paid[name] - job.elsewhere[name] for job in self.jobs)
                assert self.world.holds(getattr(self.world, name)) == received

        def checked(self, kept):
            job = client.job(kept.job_id)
            assert job.claimed <= job.settled <= job.funded - job.refunded
            assert (job.funded, job.refunded, job.round) == (kept.funded, kept.reclaimed, len(kept.roots))
            assert job.hub == kept.hub_at(client.now()).address
            assert job.total == sum(kept.owed.values())
            assert job.settled == job.total + sum(self.advanced(kept, name) for name in PEOPLE)
            assert job.claimed == sum(kept.paid.values())
            paid = {getattr(self.world, name).address: amount for name, amount in kept.paid.items()}
            for leaves in kept.roots[-2:]:
                due = (amount - paid[address] for address, amount in leaves.amounts.items())
                assert sum(max(0, amount) for amount in due) <= job.settled - job.claimed
            return job

        def teardown(self):
            if not hasattr(self, "jobs"):
                return
            self.world.advance(2000)
            for job in self.jobs:
                totals = [START, *client.settlements(job.job_id)]
                assert all(0 <= later.total - one.total <= ROUND_CAP for one, later in pairwise(totals))
                for name in PEOPLE:
                    if job.roots:
                        self.attempt(self.world.count, job.roots[-1], getattr(self.world, name))
                    assert client.claimed_of(job.job_id, getattr(self.world, name).address) >= job.owed[name]
                self.attempt(client.reclaim, self.world.owner, job.job_id)
            assert self.world.holds(client.escrow) == self.before

        def advanced(self, job, name):
            return client.advanced_of(job.job_id, getattr(self.world, name).address)

    return Escrow


@pytest.mark.parametrize("examples", [8, pytest.param(100, marks=pytest.mark.long)])
def test_the_money_adds_up(still, examples):
    case = machine(*still).TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=20,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    case().runTest()
