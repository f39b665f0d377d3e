"""Whom an owner gives the keys of a private job, and what is asked of a hub before it gets anything."""

import dataclasses
import errno
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_hub import Person, Town, new_wallet, seal_files, sealed_recipe
from trainchain.cli import sealing, wiring
from trainchain.cli.bring import Bringer
from trainchain.cli.output import Output
from trainchain.cli.owner import _missing, publish
from trainchain.cli.plan import Plan
from trainchain.cli.sealing import Holder, key_holder
from trainchain.core import seal
from trainchain.core.errors import TrainChainError

Told = dict[str, Any]
JOB = "0x" + "12" * 32


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    made = Town(tmp_path_factory.mktemp("town"))
    yield made
    made.close()


@pytest.fixture
def owner(town: Town) -> Person:
    return town.person()


def plan(keys: Any = "owner") -> Plan:
    recipe = sealed_recipe(seal_files(rounds=1, shards=1, held_out=False, base=True))
    bringer = Bringer(lambda: pytest.fail("nothing here has to be fetched"), print)
    return Plan(recipe, keys, Path(), {}, b"", 0, 0, [], [], recipe.spec_hash, None, bringer)


def asked(
    owner: Person, home: Path, own_hub: str | None, lie: Callable[[Told], object] = lambda told: None, **changes: Any
) -> Holder:
    """Who is given the keys, where the hub tells a lie of itself."""
    client = owner.client()
    chain = wiring.chain_of(client)
    lie(client.info())
    try:
        return key_holder(plan(**changes), client, chain, owner.settings(home), own_hub)
    finally:
        chain.close()
        client.close()


def test_a_hub_that_the_owner_names_is_given_the_keys(town: Town, owner: Person, tmp_path: Path) -> None:
    wanted = Holder(town.keys.address, town.hub.exchange.public)

    assert asked(owner, tmp_path, town.keys.address.lower()) == wanted
    assert asked(owner, tmp_path, None, keys="hub") == wanted


def test_a_hub_that_nobody_names_is_given_none(town: Town, owner: Person, tmp_path: Path) -> None:
    with pytest.raises(TrainChainError) as caught:
        asked(owner, tmp_path, None)

    assert caught.value.code == "access.not_your_hub"
    assert f"--own-hub {town.keys.address}" in caught.value.hint


def test_another_hub_than_the_one_named_is_told_as_that(town: Town, owner: Person, tmp_path: Path) -> None:
    with pytest.raises(TrainChainError) as caught:
        asked(owner, tmp_path, owner.address)

    assert caught.value.code == "access.not_your_hub"
    assert owner.address in caught.value.message
    assert f"--own-hub {town.keys.address}" not in caught.value.hint


@pytest.mark.parametrize("given", ["", "0x123", "mine", "0x" + "g" * 40])
def test_what_is_no_address_of_a_hub_is_a_usage_error(owner: Person, tmp_path: Path, given: str) -> None:
    with pytest.raises(TrainChainError) as caught:
        asked(owner, tmp_path, given)

    assert caught.value.code == "usage.flag"


OTHER = seal.ExchangeKey(bytes(range(32))).public
STRANGER = new_wallet()
LIES: dict[str, Callable[[Told], object]] = {
    "another's key": lambda told: told["exchange"].update(public_key=OTHER),
    "no key": lambda told: told.pop("exchange"),
    "a word for a key": lambda told: told["exchange"].update(public_key="zz"),
    "a list for a key": lambda told: told["exchange"].update(public_key=[1]),
    "a list": lambda told: told.update(exchange=[1]),
    "a short signature": lambda told: told["exchange"].update(signature="0x12"),
    "a word for a signature": lambda told: told["exchange"].update(signature="zz"),
    "a number for a signature": lambda told: told["exchange"].update(signature=7),
    "another's wallet": lambda told: told["chain"].update(hub=STRANGER.address),
    "a word for a wallet": lambda told: told["chain"].update(hub="zz"),
    "a number for a wallet": lambda told: told["chain"].update(hub=7),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("keys", ["owner", "hub"])
def test_a_hub_without_a_key_that_its_wallet_signed_is_given_none(
    town: Town, owner: Person, tmp_path: Path, lie: str, keys: str
) -> None:
    with pytest.raises(TrainChainError) as caught:
        asked(owner, tmp_path, town.keys.address, LIES[lie], keys=keys)

    assert caught.value.code == "key.invalid"


def test_a_signature_of_another_chain_does_not_count(town: Town, owner: Person, tmp_path: Path) -> None:
    """A hub's word for its exchange key is bound to chain and escrow."""
    from trainchain.chain import eip712

    def lie(told: Told) -> None:
        domain = eip712.Domain(town.chain.chain_id + 1, town.chain.escrow)
        message = {"account": town.keys.address, "publicKey": "0x" + OTHER}
        told["exchange"] = {"public_key": OTHER, "signature": eip712.sign(domain, "ExchangeKey", message, town.keys)}

    with pytest.raises(TrainChainError) as caught:
        asked(owner, tmp_path, town.keys.address, lie)

    assert caught.value.code == "key.invalid"


@pytest.mark.parametrize("plain", [b"rows", "file"])
def test_a_sealed_file_is_of_its_user_alone(tmp_path: Path, plain: bytes | str) -> None:
    source = tmp_path / "plain"
    source.write_bytes(b"rows")

    seal.seal(plain if isinstance(plain, bytes) else source, tmp_path / "sealed", seal.new_identity())

    assert (tmp_path / "sealed").stat().st_mode & 0o777 == 0o600


FILL = """
import resource, signal, sys
from pathlib import Path
from trainchain.core import seal

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    seal.seal(Path(sys.argv[1]), Path(sys.argv[2]), seal.new_identity())
except OSError as error:
    print(error.errno)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits to set")
def test_a_disk_that_fills_while_a_file_is_sealed_is_told_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(bytes(300_000))
    command = [sys.executable, "-c", FILL, str(tmp_path / "plain"), str(tmp_path / "sealed")]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.strip() == str(errno.EFBIG)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_a_disk_that_fills_is_said_and_nothing_half_sealed_is_left(
    town: Town, owner: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(_: Plan, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "block").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sealing, "_seal", fill)
    with closing(owner.client()) as client, closing(wiring.chain_of(client)) as chain:
        monkeypatch.setattr(wiring, "signed_client", lambda *_: (client, owner.wallet))
        monkeypatch.setattr(wiring, "chain_of", lambda _: chain)
        with pytest.raises(TrainChainError) as caught:
            publish(plan(), owner.settings(tmp_path), Output(json_mode=True), lambda _: None, own_hub=town.keys.address)

    assert caught.value.code == "disk.full"
    assert "--home" in caught.value.hint
    assert not list((tmp_path / "submissions").glob("sealed-*"))


def test_a_plan_shows_no_key() -> None:
    shown = repr(dataclasses.replace(plan(), identities={"of": "AGE-SECRET-KEY-1"}))

    assert "AGE-SECRET" not in shown


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"job": "0x12", "missing": []},
        {"job": "0x" + "34" * 32, "missing": []},
        {"job": JOB},
        {"job": JOB, "missing": {}},
        {"job": JOB, "missing": ["ab" * 32]},
        {"job": JOB, "missing": [7]},
        {"job": JOB, "missing": [["ab" * 32]]},
    ],
)
def test_a_hub_is_brought_only_what_the_job_names(answer: Told) -> None:
    """Rows and base lie there in clear too, by their digests."""
    with pytest.raises(TrainChainError) as caught:
        _missing(answer, JOB, plan().resolved)

    assert caught.value.code == "hub.not_a_hub"


def test_a_hub_is_brought_what_it_misses() -> None:
    recipe = plan().resolved
    wanted = [ref.sha256 for ref in recipe.files()]

    assert _missing({"job": JOB, "missing": wanted}, JOB, recipe) == wanted


def test_a_hub_prints_the_address_that_own_hub_wants(tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    command = [
        sys.executable,
        "-m",
        "trainchain",
        "serve-hub",
        "--home",
        home,
        "--listen",
        "127.0.0.1:0",
        "--no-evaluate",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as hub:
        assert hub.stdout is not None
        assert hub.stderr is not None
        hub.stdout.readline()  # once this is there, so is the rest
        hub.terminate()
        told = hub.stderr.read()

    assert str(wiring.address_in(tmp_path / "home" / "hub-wallet.json")) in told.lower()
