"""A wallet whose password lies in the system's keyring, and keyrings that are missing, locked or forgetful."""

import json
import sys

import pytest

from tests.fixtures_command import Desk
from trainchain.chain import wallet as wallets

pytest.importorskip("keyring", reason="the extra `keyring` is not installed")


@pytest.fixture
def desk(tmp_path):
    backend = {"PYTHON_KEYRING_BACKEND": "tests.fixtures_keyring.FileKeyring", "TRAINCHAIN_KEYRING": "1"}
    return Desk(tmp_path, TEST_KEYRING_FILE=str(tmp_path / "ring"), **backend)


def ring(desk):
    return json.loads((desk.folder / "ring").read_text(encoding="utf-8"))


def test_the_password_lies_in_the_keyring_and_nowhere_else(desk):
    made = desk.answer("wallet", "new")
    assert made["password"] == "keyring"
    ((name, password),) = ring(desk).items()
    assert name == f"trainchain {made['address'].lower()}"
    assert len(password) >= 40
    assert wallets.open(desk.home / "wallet.json", password).address == made["address"]
    assert desk.answer("wallet", "show") == made
    desk.run("wallet", "show", "--json", TRAINCHAIN_KEYRING="0").failed_as("wallet.locked", 7)


def test_a_password_file_comes_first_and_no_password_needs_no_keyring(desk):
    (desk.folder / "words").write_text("from the file", encoding="utf-8")
    given = {"TRAINCHAIN_PASSWORD_FILE": str(desk.folder / "words")}
    assert desk.answer("wallet", "new", **given)["password"] == "file"
    assert not (desk.folder / "ring").exists()
    assert desk.answer("wallet", "show", **given)["password"] == "file"
    desk.answer("wallet", "new", "--home", "bare", TRAINCHAIN_KEYRING="")
    fails = {"PYTHON_KEYRING_BACKEND": "keyring.backends.fail.Keyring"}
    assert desk.answer("wallet", "show", "--home", "bare", **fails)["password"] == "none"


def test_a_copy_gets_a_password_that_does_not_die_with_the_machine(desk):
    address = desk.answer("wallet", "new")["address"]
    desk.run("wallet", "backup", "copy.json", "--json").failed_as("wallet.locked", 7)
    (desk.folder / "words").write_text("one that I know", encoding="utf-8")
    given = {"TRAINCHAIN_PASSWORD_FILE": str(desk.folder / "words")}
    assert desk.answer("wallet", "backup", "copy.json", **given)["password"] == "file"
    assert wallets.open(desk.folder / "copy.json", "one that I know").address == address
    other = Desk(desk.folder, **given)
    other.home = desk.folder / "other"
    assert other.answer("wallet", "import", "copy.json", "--home", str(other.home))["address"] == address


def test_a_key_that_is_taken_over_goes_the_same_way(desk):
    made = desk.run("wallet", "import", "-", "--json", stdin="0x" + "09" * 32).document
    assert made["password"] == "keyring"
    assert len(ring(desk)) == 1
    desk.run("wallet", "import", "-", "--json", stdin="0x" + "08" * 32).failed_as("wallet.exists", 7)
    assert len(ring(desk)) == 1


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("keyring.backends.fail.Keyring", "NoKeyringError"),
        ("keyring.backends.null.Keyring", "does not keep"),
        ("tests.fixtures_keyring.FileKeyring", "KeyringLocked"),
        ("no.such.Backend", "cannot be used"),
    ],
)
def test_a_keyring_that_is_no_use_is_told_as_such_and_no_wallet_is_made(desk, backend, words):
    (desk.folder / "ring").write_text(json.dumps({"locked": "a secret of somebody's"}), encoding="utf-8")
    done = desk.run("wallet", "new", "--json", PYTHON_KEYRING_BACKEND=backend)
    problem = done.failed_as("wallet.keyring", 7)
    assert words in problem["message"]
    assert "TRAINCHAIN_KEYRING" in problem["hint"]
    assert "a secret" not in done.said
    assert not desk.home.exists()


def test_a_keyring_that_forgot_leaves_the_wallet_locked_and_whole(desk):
    desk.answer("wallet", "new")
    before = (desk.home / "wallet.json").read_bytes()
    (desk.folder / "ring").unlink()
    desk.run("wallet", "show", "--json").failed_as("wallet.locked", 7)
    (desk.folder / "ring").write_text('{"locked": 1}', encoding="utf-8")
    desk.run("wallet", "show", "--json").failed_as("wallet.keyring", 7)
    assert (desk.home / "wallet.json").read_bytes() == before


def test_the_variable_is_1_or_0(desk):
    desk.run("wallet", "new", "--json", TRAINCHAIN_KEYRING="yes please").failed_as("usage.flag", 2)


def test_the_library_is_asked_for_only_by_those_who_want_it(desk):
    without = "import sys; sys.modules['keyring'] = None; from trainchain.cli.main import main; main(sys.argv[1:])"
    plain = Desk(desk.folder)
    for told, code in (("0", 0), ("1", 7)):
        plain.command = [sys.executable, "-c", without]
        done = plain.run("wallet", "new", "--json", "--home", f"home{told}", TRAINCHAIN_KEYRING=told)
        assert done.code == code, done.said
    assert "trainchain[keyring]" in done.failed_as("wallet.keyring", 7)["hint"]
