"""A key is given iff a held lease of an admitted wallet asks for it, and it opens that lease's files and no other."""

from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.fixtures_hub import Town
from trainchain.core.hub.service import LEASE_SECONDS

PEOPLE = 4
SHARDS = 3
WHO = st.integers(0, PEOPLE - 1)
LISTS = st.lists(st.tuples(WHO, st.sampled_from([str, str.lower])), min_size=1, max_size=PEOPLE + 1)
WORKERS = st.sampled_from(["anyone", "owner"]) | LISTS
LEASE = st.integers(0, 9)
STEPS = st.one_of(
    st.tuples(st.just("take"), WHO),
    st.tuples(st.just("take"), WHO),
    st.tuples(st.just("ask"), WHO, LEASE, WHO),
    st.tuples(st.just("ask_rightly"), LEASE),
    st.tuples(st.just("give_back"), WHO, LEASE),
    st.tuples(st.just("contribute"), LEASE),
    st.tuples(st.just("expire")),
)


class Example:
    """One private job, four wallets of which the first is its owner's, and what must be true of them."""

    def __init__(self, town: Town, workers: Any, *, base: bool) -> None:
        self.town = town
        self.people = [town.person() for _ in range(PEOPLE)]
        if isinstance(workers, list):
            self.admitted = {number for number, _ in workers}
            workers = [case(self.people[number].address) for number, case in workers]
        else:
            self.admitted = {0} if workers == "owner" else set(range(PEOPLE))
        self.job = town.publish_sealed(owner=self.people[0], workers=workers, rounds=1, shards=SHARDS, base=base)
        self.leases: list[dict[str, Any]] = []
        self.held: dict[str, int] = {}
        self.open = set(range(SHARDS))

    def take(self, who: int) -> None:
        lease = self.people[who].lease(self.job)
        access = self.job.recipe.access
        assert access.admits(self.people[who].address, self.people[0].address) == (who in self.admitted)
        assert (lease is not None) == (who in self.admitted and bool(self.open))
        if lease is not None:
            self.open.remove(lease["shard"])
            self.leases.append(lease)
            self.held[lease["lease"]] = who

    def ask(self, who: int, at: int, signer: int) -> None:
        if not self.leases:
            return
        lease, person = self.leases[at % len(self.leases)], self.people[who]
        request = person.exchange_request(by=self.people[signer].wallet)
        answer = person.ask_keys(lease, request)
        assert (answer.status_code == 200) == (self.held.get(lease["lease"]) == who == signer), answer.text
        if answer.status_code == 200:
            assert who in self.admitted
            own = [self.job.sealed.blocks[0][lease["shard"]], *self.job.sealed.base]
            assert person.opened(lease, answer) == {ref.sha256: self.job.identities[ref.sha256] for ref in own}
        else:
            assert not answer.json().keys() & {"keys", "wrapped"}

    def ask_rightly(self, at: int) -> None:
        if self.held:
            lease, who = list(self.held.items())[at % len(self.held)]
            self.ask(who, [given["lease"] for given in self.leases].index(lease), who)

    def give_back(self, who: int, at: int) -> None:
        if not self.leases:
            return
        lease = self.leases[at % len(self.leases)]
        self.people[who].request("DELETE", f"/v1/leases/{lease['lease']}")
        if self.held.get(lease["lease"]) == who:
            del self.held[lease["lease"]]
            self.open.add(lease["shard"])

    def contribute(self, at: int) -> None:
        if self.held:
            lease, who = list(self.held.items())[at % len(self.held)]
            offer = next(given for given in self.leases if given["lease"] == lease)
            self.people[who].contribute(offer).raise_for_status()
            del self.held[lease]

    def expire(self) -> None:
        self.town.clock.forward(LEASE_SECONDS + 1)
        self.open |= {lease["shard"] for lease in self.leases if lease["lease"] in self.held}
        self.held.clear()


# Not shrunk: an example is short, and each costs a job in escrow.
@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(workers=WORKERS, base=st.booleans(), steps=st.lists(STEPS, min_size=4, max_size=14))
def test_a_key_is_given_iff_a_held_lease_of_an_admitted_wallet_asks(
    town: Town, workers: Any, base: bool, steps: list[tuple[Any, ...]]
) -> None:
    example = Example(town, workers, base=base)

    for name, *arguments in steps:
        getattr(example, name)(*arguments)

    for lease in list(example.leases):
        for who in range(PEOPLE):
            example.ask(who, example.leases.index(lease), who)
