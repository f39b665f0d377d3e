"""Keys of sealed files: who brings them, who is given them, and that nobody else ever has one in clear."""

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.fixtures_hub import Job, Person, Town, seal_files, sealed_recipe
from tests.fixtures_merge import PLAIN_MERGE
from trainchain.chain import eip712
from trainchain.core import seal
from trainchain.core.errors import CODES, TrainChainError
from trainchain.core.hub import schema
from trainchain.core.hub.service import LEASE_SECONDS

NEVER = "0x" + "12" * 32
SECRET = b"AGE-SECRET-KEY-"


def insist(answer: httpx.Response, code: str) -> dict[str, Any]:
    """The answer is the problem document of `code`, and no key is in it."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    document: dict[str, Any] = answer.json()
    assert (document["code"], answer.status_code) == (code, CODES[code].status)
    assert "wrapped" not in document
    assert "keys" not in document
    return document


def test_a_hub_shows_the_exchange_key_that_its_wallet_signed(tmp_path: Any) -> None:
    town = Town(tmp_path)
    told = town.ask("/v1/hub")
    exchange = told["exchange"]
    domain = eip712.Domain(told["chain"]["chain_id"], told["chain"]["escrow"])
    message = {"account": told["chain"]["hub"], "publicKey": "0x" + exchange["public_key"]}

    assert eip712.recover(domain, "ExchangeKey", message, exchange["signature"]) == town.keys.address
    assert exchange["public_key"] == town.hub.exchange.public

    town.stop()
    town.start()
    assert town.ask("/v1/hub")["exchange"] == exchange
    assert (tmp_path / "exchange-key").stat().st_mode & 0o777 == 0o600
    town.close()


@dataclass
class Offer:
    """A private job that is about to be published by an owner of its own."""

    town: Town
    owner: Person

    def __post_init__(self) -> None:
        self.salt = "0x" + secrets.token_hex(32)
        self.job = self.town.chain.job_id(self.owner.address, self.salt)
        self.files = seal_files(rounds=1, shards=2, held_out=True, base=True)
        self.recipe = sealed_recipe(self.files)
        self.one, self.other, *_ = (ref.sha256 for ref in self.files.refs.blocks[0])

    def wrapped(self, **changes: Any) -> dict[str, str]:
        return self.town.wrapped(self.job, self.files.identities, **changes)

    def send(self, keys: Any) -> httpx.Response:
        recipe = self.recipe.model_dump(mode="json")
        return self.owner.post("/v1/jobs", {"recipe": recipe, "salt": self.salt, "keys": keys})


@pytest.fixture
def offer(town: Town) -> Offer:
    return Offer(town, town.person())


def without(keys: dict[str, str], digest: str) -> dict[str, str]:
    return {name: wrapped for name, wrapped in keys.items() if name != digest}


def with_key(offer: Offer, identity: str) -> dict[str, str]:
    """The key of one file is this text, rightly wrapped."""
    return {**offer.wrapped(), **offer.town.wrapped(offer.job, {offer.one: identity})}


WRONG_KEYS: dict[str, Callable[[Offer], Any]] = {
    "none at all": lambda o: {},
    "one missing": lambda o: without(o.wrapped(), o.one),
    "a held-out file's missing": lambda o: without(o.wrapped(), o.files.refs.held_out.sha256),
    "a base file's missing": lambda o: without(o.wrapped(), o.files.refs.base[0].sha256),
    "one too many": lambda o: {**o.wrapped(), **o.town.wrapped(o.job, {"ab" * 32: seal.new_identity()})},
    "two swapped": lambda o: {**(keys := o.wrapped()), o.one: keys[o.other], o.other: keys[o.one]},
    "wrapped for another hub's key": lambda o: o.wrapped(public=seal.ExchangeKey(secrets.token_bytes(32)).public),
    "wrapped for another hub's wallet": lambda o: o.wrapped(hub=o.owner.address),
    "wrapped for another chain": lambda o: o.wrapped(chain=1),
    "wrapped for another job": lambda o: o.town.wrapped(NEVER, o.files.identities),
    "no base64": lambda o: {**o.wrapped(), o.one: "please"},
    "empty": lambda o: {**o.wrapped(), o.one: ""},
    "damaged": lambda o: {**(keys := o.wrapped()), o.one: keys[o.one][:-8] + "AAAAAAA="},
    "no identity": lambda o: with_key(o, "a word"),
    "an identity and more": lambda o: with_key(o, seal.new_identity() + "\n"),
    "an identity in clear": lambda o: {**o.wrapped(), o.one: o.files.identities[o.one]},
}


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_a_private_job_is_refused_with_keys_that_are(offer: Offer, name: str) -> None:
    keys = WRONG_KEYS[name](offer)
    before = [offer.town.rows(table) for table in (schema.jobs, schema.keys, schema.objects, schema.events)]

    document = insist(offer.send(keys), "key.invalid")

    named = [digest for digest in {*offer.files.identities, *keys} if digest in document["detail"]]
    assert len(named) == 1
    assert all(wrapped not in document["detail"] for wrapped in keys.values() if wrapped)
    after = [offer.town.rows(table) for table in (schema.jobs, schema.keys, schema.objects, schema.events)]
    assert after == before
    assert offer.send(offer.wrapped()).status_code == 200


@pytest.mark.parametrize(
    "keys",
    [[], "", {"ab": "x"}, {"AB" * 32: "x"}, {"ab" * 32: 3}, {"ab" * 32: "x" * 401}, {"ab" * 32: None}],
    ids=lambda keys: str(keys)[:30],
)
def test_keys_that_are_not_even_shaped_as_such_are_refused(offer: Offer, keys: Any) -> None:
    insist(offer.send(keys), "http.bad_request")


def test_an_open_job_takes_no_key(town: Town, anna: Person) -> None:
    made, job = town.publish().recipe.model_dump(mode="json"), town.chain.job_id(anna.address, NEVER)
    keys = town.wrapped(job, {"ab" * 32: seal.new_identity()})

    document = insist(anna.post("/v1/jobs", {"recipe": made, "salt": NEVER, "keys": keys}), "key.invalid")

    assert "ab" * 32 in document["detail"]


def test_what_the_hub_keeps_is_what_the_owner_wrapped(offer: Offer) -> None:
    keys = offer.wrapped()
    offer.send(keys).raise_for_status()

    assert {row["digest"]: row["wrapped"] for row in offer.town.rows(schema.keys, job=offer.job)} == keys


def test_publishing_again_answers_the_same_and_brings_the_keys_anew(offer: Offer) -> None:
    first = offer.send(offer.wrapped()).raise_for_status().json()
    again = offer.wrapped()

    assert offer.send(again).raise_for_status().json() == first

    assert {row["digest"]: row["wrapped"] for row in offer.town.rows(schema.keys, job=offer.job)} == again
    insist(offer.send(without(again, offer.one)), "key.invalid")
    assert len(offer.town.rows(schema.keys, job=offer.job)) == len(again)


@pytest.fixture
def job(town: Town, anna: Person, ben: Person) -> Job:
    return town.publish_sealed(workers=[anna.address, ben.address], held_out=True)


def test_who_trains_a_shard_is_given_its_block_s_key_and_the_base_s_and_no_other(job: Job, anna: Person) -> None:
    lease = anna.must_lease(job)

    opened = anna.opened(lease, anna.ask_keys(lease))

    own = [job.sealed.blocks[0][lease["shard"]], *job.sealed.base]
    assert opened == {ref.sha256: job.identities[ref.sha256] for ref in own}


def test_a_key_that_is_given_opens_its_file(job: Job, anna: Person, tmp_path: Any) -> None:
    lease = anna.must_lease(job)
    digest = job.sealed.blocks[0][lease["shard"]].sha256
    sealed = tmp_path / "block.age"
    sealed.write_bytes(anna.fetch(digest))

    identity = anna.opened(lease, anna.ask_keys(lease))[digest]

    assert seal.unseal(sealed, identity).startswith(b"block-1-0.age ")


def test_every_lease_of_a_job_opens_its_own_block(job: Job, anna: Person, ben: Person) -> None:
    blocks = []
    for number in (1, 2):
        for who in (anna, ben):
            lease = who.must_lease(job)
            opened = who.opened(lease, who.ask_keys(lease))
            (block,) = set(opened) - {ref.sha256 for ref in job.sealed.base}
            assert (lease["round"], block) == (number, job.sealed.blocks[number - 1][lease["shard"]].sha256)
            blocks.append(block)
            who.contribute(lease).raise_for_status()
        job.town.tick()
    assert len(set(blocks)) == 4


def test_a_spare_shard_has_a_block_of_its_own(town: Town, anna: Person) -> None:
    files = seal_files(rounds=1, shards=3, held_out=False, base=True)
    merge = PLAIN_MERGE.model_copy(update={"spares": 0.5})
    job = town.open(sealed_recipe(files, shards=2, merge=merge), {}, town.owner, sealed=files)
    held = [anna.must_lease(job) for _ in range(3)]

    assert [lease["shard"] for lease in held] == [0, 1, 2]
    assert job.sealed.blocks[0][2].sha256 in anna.opened(held[2], anna.ask_keys(held[2]))


def test_the_hub_s_evaluator_is_given_the_held_out_file_s_key_and_no_block_s(town: Town, job: Job) -> None:
    evaluator = town.person(town.evaluator_keys)
    lease = next(lease for lease in iter(evaluator.lease, None) if lease["job"] == job.id)
    assert job.sealed.held_out is not None

    opened = evaluator.opened(lease, evaluator.ask_keys(lease))

    wanted = [job.sealed.held_out, *job.sealed.base]
    assert opened == {ref.sha256: job.identities[ref.sha256] for ref in wanted}


def test_an_evaluator_without_held_out_data_is_given_the_base_s_keys(town: Town) -> None:
    job, evaluator = town.publish_sealed(samples=["Who?"]), town.person(town.evaluator_keys)
    lease = next(lease for lease in iter(evaluator.lease, None) if lease["job"] == job.id)

    assert evaluator.opened(lease, evaluator.ask_keys(lease)).keys() == {ref.sha256 for ref in job.sealed.base}


def test_a_key_is_bound_to_worker_lease_and_file(town: Town, job: Job, anna: Person, ben: Person) -> None:
    lease, other = anna.must_lease(job), ben.must_lease(job)
    answer = anna.ask_keys(lease)
    (first, *_), chain = answer.json()["keys"], town.chain.chain_id
    place = (job.id, lease["round"], lease["shard"])
    right = seal.for_lease(chain, *place, lease["lease"], first["digest"], anna.address)
    assert anna.exchange.unwrap(first["wrapped"], right) == job.identities[first["digest"]]

    for key, purpose in (
        (ben.exchange, right),
        (town.hub.exchange, right),
        (anna.exchange, {**right, "lease": other["lease"]}),
        (anna.exchange, {**right, "account": ben.address.lower()}),
        (anna.exchange, {**right, "digest": job.sealed.base[0].sha256}),
        (anna.exchange, {**right, "job": NEVER}),
        (anna.exchange, {**right, "shard": 1}),
        (anna.exchange, {**right, "round": 2}),
        (anna.exchange, {**right, "chain": 1}),
    ):
        with pytest.raises(TrainChainError, match="does not open"):
            key.unwrap(first["wrapped"], purpose)


def expired(town: Town, job: Job, anna: Person, ben: Person) -> httpx.Response:
    lease = anna.must_lease(job)
    town.clock.forward(LEASE_SECONDS + 1)
    return anna.ask_keys(lease)


def given_back(town: Town, job: Job, anna: Person, ben: Person) -> httpx.Response:
    lease = anna.must_lease(job)
    anna.request("DELETE", f"/v1/leases/{lease['lease']}").raise_for_status()
    return anna.ask_keys(lease)


def taken_on(town: Town, job: Job, anna: Person, ben: Person) -> httpx.Response:
    lease = anna.must_lease(job)
    town.clock.forward(LEASE_SECONDS + 1)
    ben.must_lease(job)
    return anna.ask_keys(lease)


def done(town: Town, job: Job, anna: Person, ben: Person) -> httpx.Response:
    lease = anna.must_lease(job)
    anna.contribute(lease).raise_for_status()
    return anna.ask_keys(lease)


def of_the_round_before_last(town: Town, job: Job, anna: Person, ben: Person) -> httpx.Response:
    job = town.publish_sealed(workers=[anna.address, ben.address], rounds=3)
    lease = anna.must_lease(job)
    for _ in range(2):
        ben.work(job)
        town.clock.forward(job.recipe.round_deadline + 1)
        town.tick()
    return anna.ask_keys(lease)


def expired_in_a_closed_round(town: Town, job: Job, anna: Person, ben: Person) -> httpx.Response:
    lease = anna.must_lease(job)
    ben.work(job)
    town.clock.forward(job.recipe.round_deadline + 1)
    town.tick()
    return anna.ask_keys(lease)


def anothers(town: Town, job: Job, anna: Person, ben: Person) -> httpx.Response:
    return ben.ask_keys(anna.must_lease(job))


def with_anothers_key(town: Town, job: Job, anna: Person, ben: Person) -> httpx.Response:
    return anna.ask_keys(anna.must_lease(job), anna.exchange_request(exchange=ben.exchange, by=ben.wallet))


def signed_as_anothers(town: Town, job: Job, anna: Person, ben: Person) -> httpx.Response:
    return anna.ask_keys(anna.must_lease(job), ben.exchange_request())


def naming_another(town: Town, job: Job, anna: Person, ben: Person) -> httpx.Response:
    return anna.ask_keys(anna.must_lease(job), anna.exchange_request(account=ben.address))


def with_a_key_put_in_its_place(town: Town, job: Job, anna: Person, ben: Person) -> httpx.Response:
    return anna.ask_keys(anna.must_lease(job), {**anna.exchange_request(), "public_key": ben.exchange.public})


def unsigned(town: Town, job: Job, anna: Person, ben: Person) -> httpx.Response:
    return anna.ask_keys(anna.must_lease(job), {**anna.exchange_request(), "signature": ""})


def no_key(town: Town, job: Job, anna: Person, ben: Person) -> httpx.Response:
    """A point from which anybody could derive what is wrapped for it, rightly signed."""
    lease, zero = anna.must_lease(job), "00" * 32
    domain = eip712.Domain(town.chain.chain_id, town.chain.escrow)
    signature = anna.wallet.sign_typed(domain, "ExchangeKey", {"account": anna.address, "publicKey": "0x" + zero})
    return anna.ask_keys(lease, {"public_key": zero, "signature": signature})


def never_given(town: Town, job: Job, anna: Person, ben: Person) -> httpx.Response:
    return anna.ask_keys({"lease": NEVER})


def of_an_open_job(town: Town, job: Job, anna: Person, ben: Person) -> httpx.Response:
    return anna.ask_keys(anna.must_lease(town.publish()))


def unfinished_measure(town: Town, job: Job, anna: Person, ben: Person) -> httpx.Response:
    evaluator = town.person(town.evaluator_keys)
    lease = next(lease for lease in iter(evaluator.lease, None) if lease["job"] == job.id)
    town.clock.forward(LEASE_SECONDS + 1)
    return evaluator.ask_keys(lease)


Ask = Callable[[Town, Job, Person, Person], httpx.Response]
REFUSED: list[tuple[Ask, str]] = [
    (never_given, "lease.unknown"),
    (anothers, "lease.not_yours"),
    (expired, "lease.lost"),
    (given_back, "lease.lost"),
    (taken_on, "lease.lost"),
    (unfinished_measure, "lease.lost"),
    (done, "shard.already_accepted"),
    (expired_in_a_closed_round, "lease.lost"),
    (of_the_round_before_last, "contribution.too_late"),
    (of_an_open_job, "object.unexpected"),
    (unsigned, "key.invalid"),
    (with_anothers_key, "key.invalid"),
    (signed_as_anothers, "key.invalid"),
    (naming_another, "key.invalid"),
    (with_a_key_put_in_its_place, "key.invalid"),
    (no_key, "key.invalid"),
]


@pytest.mark.parametrize(("ask", "code"), REFUSED, ids=lambda value: getattr(value, "__name__", value))
def test_no_key_is_given_for_a_lease_or_to_a_key_that_is(
    town: Town, job: Job, anna: Person, ben: Person, ask: Ask, code: str
) -> None:
    insist(ask(town, job, anna, ben), code)


def test_no_key_is_given_without_a_session(town: Town, job: Job, anna: Person) -> None:
    lease = anna.must_lease(job)

    answer = town.http.post(f"{town.url}/v1/leases/{lease['lease']}/keys", json=anna.exchange_request())

    insist(answer, "session.required")


def test_a_lease_of_an_ended_job_that_still_counts_still_opens(town: Town, job: Job, anna: Person) -> None:
    lease = anna.must_lease(job)
    job.owner.post(f"/v1/jobs/{job.id}/cancel").raise_for_status()

    assert len(anna.opened(lease, anna.ask_keys(lease))) == 3


def test_a_shard_that_is_lent_again_opens_to_its_new_worker_without_a_byte_uploaded(
    town: Town, anna: Person, ben: Person
) -> None:
    job = town.publish_sealed(workers=[anna.address, ben.address], shards=1)
    first = anna.must_lease(job)
    given = anna.opened(first, anna.ask_keys(first))
    before = [town.rows(table, job=job.id) for table in (schema.objects, schema.keys)]
    files = {path: path.stat().st_mtime_ns for path in (town.root / "objects").rglob("*")}
    town.clock.forward(LEASE_SECONDS + 1)

    second = ben.must_lease(job)
    again = ben.opened(second, ben.ask_keys(second))

    assert (second["shard"], again) == (first["shard"], given)
    assert [town.rows(table, job=job.id) for table in (schema.objects, schema.keys)] == before
    assert {path: path.stat().st_mtime_ns for path in (town.root / "objects").rglob("*")} == files


def test_a_lease_may_ask_again_and_for_another_exchange_key(job: Job, anna: Person) -> None:
    """A worker that was started anew has its lease still, and perhaps no longer its key."""
    lease = anna.must_lease(job)
    first = anna.opened(lease, anna.ask_keys(lease))
    anna.exchange = seal.ExchangeKey(secrets.token_bytes(32))

    assert anna.opened(lease, anna.ask_keys(lease)) == first


def folder_has(town: Town, text: bytes) -> list[str]:
    return [path.name for path in town.root.rglob("*") if path.is_file() and text in path.read_bytes()]


def test_keys_outlive_the_hub_s_process_and_go_with_the_job(tmp_path: Any) -> None:
    town = Town(tmp_path)
    anna = town.person()
    job = town.publish_sealed(workers=[anna.address], rounds=1, shards=1)
    lease = anna.must_lease(job)
    wrapped = [row["wrapped"] for row in town.rows(schema.keys, job=job.id)]
    first = anna.opened(lease, anna.ask_keys(lease))

    town.stop()
    town.start()
    anna._session = ("", 0.0)

    assert anna.opened(lease, anna.ask_keys(lease)) == first
    anna.contribute(lease).raise_for_status()
    town.tick()
    assert (job.state, len(town.rows(schema.keys, job=job.id))) == ("settled", 3)
    town.clock.forward(job.row["deadline"] + job.row["grace"] + 1 - town.clock())
    town.tick()
    assert (job.state, town.rows(schema.keys)) == ("closed", [])
    keys = town.wrapped(job.id, job.identities)
    document = {"recipe": job.recipe.model_dump(mode="json"), "salt": job.salt, "keys": keys}
    job.owner._session = ("", 0.0)
    job.owner.post("/v1/jobs", document).raise_for_status()
    assert town.rows(schema.keys) == [], "a job that is closed opens no more"
    town.close()
    assert [name for text in wrapped for name in folder_has(town, text.encode())] == []


def test_a_hub_that_lost_its_exchange_key_says_so_until_the_owner_publishes_again(tmp_path: Any) -> None:
    town = Town(tmp_path)
    anna = town.person()
    job = town.publish_sealed(workers=[anna.address], rounds=1, shards=1)
    lease = anna.must_lease(job)
    town.stop()
    (tmp_path / "exchange-key").unlink()
    town.start()
    for person in (anna, job.owner):
        person._session = ("", 0.0)

    document = insist(anna.ask_keys(lease), "key.invalid")
    assert "cancels the job and submits the recipe again" in document["hint"], "submit keeps no key when it is done"

    keys = town.wrapped(job.id, job.identities)
    again = {"recipe": job.recipe.model_dump(mode="json"), "salt": job.salt, "keys": keys}
    job.owner.post("/v1/jobs", again).raise_for_status()
    assert len(anna.opened(lease, anna.ask_keys(lease))) == 3
    town.close()


def test_no_key_in_clear_is_ever_on_the_hub_s_disk_in_its_log_or_in_an_answer(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    town = Town(tmp_path)
    anna, ben = town.person(), town.person()
    answers: list[httpx.Response] = []
    town.http.event_hooks["response"].append(lambda answer: answers.append(answer))
    job = town.publish_sealed(workers=[anna.address, ben.address], held_out=True, rounds=1)
    evaluator = town.person(town.evaluator_keys)
    measured = evaluator.must_lease()
    evaluator.ask_keys(measured).raise_for_status()
    held = [anna.must_lease(job), ben.must_lease(job)]
    for who, lease in zip((anna, ben), held, strict=True):
        who.ask_keys(lease).raise_for_status()
        insist(who.ask_keys(lease, {**who.exchange_request(), "signature": "0x00"}), "key.invalid")
    with town.hub.store.write() as db:
        broken = schema.keys.update().where(schema.keys.c.digest == job.sealed.base[0].sha256)
        db.execute(broken.values(wrapped="broken"))
    insist(anna.ask_keys(held[0]), "key.invalid")
    for who, lease in zip((anna, ben), held, strict=True):
        who.contribute(lease).raise_for_status()
    town.tick()
    wrapped = [row["wrapped"] for row in town.rows(schema.keys)]
    told = [answer for answer in answers if not str(answer.url).endswith("/keys") or answer.status_code != 200]
    told += [town.http.get(f"{town.url}/v1/jobs/{job.id}{more}") for more in ("", "/events", "/recipe")]
    town.close()

    assert folder_has(town, SECRET) == []
    assert all(folder_has(town, identity.encode()) == [] for identity in job.identities.values())
    assert len(told) > 20
    for text in [caplog.text, *(answer.text for answer in told)]:
        assert SECRET.decode() not in text
        assert all(key not in text for key in wrapped)
