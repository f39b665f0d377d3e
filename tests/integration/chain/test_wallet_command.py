"""The wallet's commands: a key comes in, is shown and is copied, and never shows."""

import json
import os
import shlex
import stat
import subprocess
import sys

import pytest

from tests.fixtures_chain import ANVIL_KEY, JS, NOT_INSTALLED
from tests.fixtures_command import Desk
from trainchain.chain import wallet as wallets
from trainchain.chain.devnet.node import Devnet
from trainchain.chain.wallet import Wallet
from trainchain.cli import wiring
from trainchain.cli.output import Output
from trainchain.core.errors import TrainChainError
from trainchain.core.settings import Settings

KEY = "0x" + bytes(range(1, 33)).hex()
ADDRESS = Wallet(KEY).address
PASSWORD = "correct horse: battery staple"
# The examples of the Web3 Secret Storage Definition, whose password is "testpassword".
PUBLISHED_KEY = "7a28b5ba57c53603b0b07b56bba752f7784bf506fa95edc395f5cf6c7514fe9d"
PBKDF2 = {
    "crypto": {
        "cipher": "aes-128-ctr",
        "cipherparams": {"iv": "6087dab2f9fdbbfaddc31a909735c1e6"},
        "ciphertext": "5318b4d5bcd28de64ee5559e671353e16f075ecae9f99c7a79a38af5f869aa46",
        "kdf": "pbkdf2",
        "kdfparams": {
            "c": 262144,
            "dklen": 32,
            "prf": "hmac-sha256",
            "salt": "ae3cd4e7013836a3df6bd7241b12db061dbe2c6785853cce422d148a624ce0bd",
        },
        "mac": "517ead924a9d0dc3124507e3393d175ce3ff7c1e96529c6c555ce9e51205e9b2",
    },
    "id": "3198bc9c-6672-5ab3-d995-4942343ae5b6",
    "version": 3,
}
SCRYPT = {
    "crypto": {
        "cipher": "aes-128-ctr",
        "cipherparams": {"iv": "83dbcc02d8ccb40e466191a123791e0e"},
        "ciphertext": "d172bf743a674da9cdad04534d56926ef8358534d458fffccd4e6ad2fbde479c",
        "kdf": "scrypt",
        "kdfparams": {
            "dklen": 32,
            "n": 262144,
            "r": 1,
            "p": 8,
            "salt": "ab0c7876052600dd703518d6fc3fe8984592145b591fc8fb5c6d43190334ba19",
        },
        "mac": "2103ac29920d71da29f15d75b4a16dbe95cfd7ff8faea1056c33131d846e3097",
    },
    "id": "3198bc9c-6672-5ab3-d995-4942343ae5b6",
    "version": 3,
}


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


@pytest.fixture
def secret(tmp_path):
    """A file with a password, as TRAINCHAIN_PASSWORD_FILE names it."""
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n", encoding="utf-8")
    return str(path)


def file_of(desk, name, content):
    path = desk.folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_a_new_wallet_says_where_it_lies_and_how_to_keep_it(desk, secret):
    made = desk.run("wallet", "new", "--json", TRAINCHAIN_PASSWORD_FILE=secret)
    document = made.document
    path = desk.home / "wallet.json"
    assert document == {"ok": True, "address": document["address"], "file": str(path), "password": "file"}
    assert wallets.open(path, PASSWORD).address == document["address"]
    (advice,) = [line for line in made.stderr.splitlines() if line.startswith("back up  ")]
    command = shlex.split(advice.removeprefix("back up  trainchain "))
    assert desk.answer(*command, TRAINCHAIN_PASSWORD_FILE=secret)["file"] == str(desk.folder / "wallet-backup.json")
    before = path.read_bytes()
    desk.run("wallet", "new", "--json").failed_as("wallet.exists", 7)
    assert path.read_bytes() == before


def test_one_that_makes_itself_says_it_too(tmp_path, capsys):
    settings = Settings(tmp_path / "a home" / "worker", "")
    made = wiring.open_wallet(settings, Output(json_mode=True))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("wallet   ")
    assert first.endswith(", no password")
    assert second == f"back up  trainchain wallet backup wallet-backup.json --home '{settings.home}'"
    assert wiring.open_wallet(settings, Output(json_mode=True)).address == made.address
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", [KEY, KEY[2:], KEY.upper().replace("0X", "0x"), f"\n  {KEY}\r\n"])
@pytest.mark.parametrize("way", ["file", "stdin"])
def test_a_key_in_digits_is_taken_over(desk, secret, text, way):
    if way == "file":
        done = desk.run("wallet", "import", file_of(desk, "key", text), "--json", TRAINCHAIN_PASSWORD_FILE=secret)
        assert "still holds the key" in done.stderr
    else:
        done = desk.run("wallet", "import", "-", "--json", stdin=text, TRAINCHAIN_PASSWORD_FILE=secret)
    assert done.document["address"] == ADDRESS
    path = desk.home / "wallet.json"
    assert wallets.open(path, PASSWORD).address == ADDRESS
    assert os.name == "nt" or stat.S_IMODE(path.stat().st_mode) == 0o600
    shown = desk.run("wallet", "show", TRAINCHAIN_PASSWORD_FILE=secret)
    assert shown.stdout == ADDRESS + "\n"


def upper(keystore):
    return {key.upper() if key == "crypto" else key.title(): value for key, value in keystore.items()}


@pytest.mark.parametrize(
    "keystore",
    [PBKDF2, SCRYPT, upper(PBKDF2), {**PBKDF2, "address": "008aeeda4d805471df9b2a5b0f38a0c3bcba786b", "name": "x"}],
    ids=["pbkdf2", "scrypt", "upper case", "with more fields"],
)
def test_a_keystore_of_another_program_is_taken_over_with_its_password(desk, keystore):
    file, words = file_of(desk, "UTC--key", keystore), file_of(desk, "words", "testpassword")
    made = desk.answer("wallet", "import", file, TRAINCHAIN_PASSWORD_FILE=words)
    assert made["address"] == Wallet(PUBLISHED_KEY).address
    assert wallets.open(desk.home / "wallet.json", "testpassword").address == made["address"]


def test_what_cannot_be_taken_over_leaves_nothing(desk, secret):
    def refused(file, code, exit_code, **more):
        return desk.run("wallet", "import", file, "--json", **more).failed_as(code, exit_code)

    good = Wallet(KEY).keystore(PASSWORD)
    named = {**good, "address": "11" * 20}
    kdf = next(part for part in good.values() if isinstance(part, dict))
    dear = {**good, "crypto": {**kdf, "kdfparams": {**kdf["kdfparams"], "n": 2**30}}}
    garbage = {
        "empty": "", "text": "hello", "list": [], "v1": {**good, "version": 1}, "v4": {**good, "version": 4},
        "names another": named, "dear": dear, "short": KEY[:-2], "zero": "0" * 64, "too large": "f" * 64,
    }  # fmt: skip
    for name, content in garbage.items():
        refused(file_of(desk, name, content), "wallet.unreadable", 7, TRAINCHAIN_PASSWORD_FILE=secret)
    keystore = file_of(desk, "keystore", good)
    refused(keystore, "wallet.locked", 7)
    wrong = file_of(desk, "wrong", "something else")
    refused(keystore, "wallet.wrong_password", 7, TRAINCHAIN_PASSWORD_FILE=wrong)
    refused(str(desk.folder / "nowhere"), "usage.file", 2)
    refused(str(desk.folder), "usage.file", 2)
    assert "argument" in refused(KEY, "usage.flag", 2)["message"]
    assert "argument" in refused(KEY[2:], "usage.flag", 2)["message"]
    assert not desk.home.exists()


def test_keys_that_are_everybody_s_or_another_chain_s_are_not_taken_over(desk):
    desk.run("wallet", "import", "-", stdin=ANVIL_KEY).failed_as("chain.foreign_key", 7)
    assert not desk.home.exists()
    node = Devnet(desk.home / "chain" / "x.sqlite")
    faucet = desk.home / "chain" / "x.faucet.json"
    for home in (desk.home, desk.folder / "another home"):
        desk.run("wallet", "import", str(faucet), "--home", str(home)).failed_as("chain.foreign_key", 7)
    bare = Wallet(b"\x07" * 32)
    file_of(desk, "home/chain/y.faucet.json", bare.keystore(""))  # as earlier versions wrote it
    desk.run("wallet", "import", "-", stdin="07" * 32).failed_as("chain.foreign_key", 7)
    assert not (desk.home / "wallet.json").exists()
    node.close()


def test_nothing_is_overwritten_and_nothing_asked_before_that_is_known(desk):
    desk.answer("wallet", "new")
    before = (desk.home / "wallet.json").read_bytes()
    desk.run("wallet", "import", "-", "--json", stdin=KEY).failed_as("wallet.exists", 7)
    desk.run("wallet", "backup", "home/wallet.json", "--json").failed_as("wallet.exists", 7)
    desk.run("wallet", "backup", str(desk.folder), "--json").failed_as("wallet.exists", 7)
    desk.run("wallet", "backup", "no/such/folder/copy", "--json").failed_as("usage.file", 2)
    assert (desk.home / "wallet.json").read_bytes() == before


def test_a_copy_opens_elsewhere_with_the_password_that_its_owner_knows(desk, secret):
    address = desk.answer("wallet", "new", TRAINCHAIN_PASSWORD_FILE=secret)["address"]
    done = desk.answer("wallet", "backup", "copy.json", TRAINCHAIN_PASSWORD_FILE=secret)
    assert done == {"ok": True, "address": address, "file": str(desk.folder / "copy.json"), "password": "file"}
    copy = desk.folder / "copy.json"
    assert os.name == "nt" or stat.S_IMODE(copy.stat().st_mode) == 0o600
    kdf = next(part["kdfparams"] for part in json.loads(copy.read_text()).values() if isinstance(part, dict))
    assert kdf["n"] == wallets.BACKUP_SCRYPT_N
    (desk.home / "wallet.json").unlink()
    assert desk.answer("wallet", "import", "copy.json", TRAINCHAIN_PASSWORD_FILE=secret)["address"] == address
    wrong = file_of(desk, "wrong", "something else")
    desk.run("wallet", "backup", "b.json", TRAINCHAIN_PASSWORD_FILE=wrong).failed_as("wallet.wrong_password", 7)
    desk.run("wallet", "backup", "b.json").failed_as("wallet.locked", 7)
    assert not (desk.folder / "b.json").exists()


def test_a_copy_without_a_password_is_made_only_on_purpose_and_loudly(desk, secret):
    address = desk.answer("wallet", "new")["address"]
    refused = desk.run("wallet", "backup", "copy.json", "--json")
    assert "--no-password" in refused.failed_as("wallet.locked", 7)["hint"]
    assert not (desk.folder / "copy.json").exists()
    bare = desk.run("wallet", "backup", "copy.json", "--no-password", "--json")
    assert "HAS NO PASSWORD" in bare.stderr
    assert bare.document["password"] == "none"
    assert wallets.open(desk.folder / "copy.json").address == address
    # A wallet without one, and a copy with one.
    desk.answer("wallet", "backup", "closed.json", TRAINCHAIN_PASSWORD_FILE=secret)
    assert wallets.open(desk.folder / "closed.json", PASSWORD).address == address


def test_a_wallet_without_a_password_gets_one_on_the_way_in(desk, secret):
    bare = file_of(desk, "bare", Wallet(KEY).keystore(""))
    assert desk.answer("wallet", "import", bare, TRAINCHAIN_PASSWORD_FILE=secret)["password"] == "file"
    assert wallets.open(desk.home / "wallet.json", PASSWORD).address == ADDRESS


def test_a_home_without_a_wallet_is_told_as_such(desk):
    for command in (["show"], ["backup", "copy.json"]):
        desk.run("wallet", *command, "--json").failed_as("wallet.missing", 7)
    assert not desk.home.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_somebody_at_a_terminal_is_asked(desk):
    code, said = desk.typed("wallet", "new", answers=[PASSWORD, PASSWORD])
    assert (code, PASSWORD in said) == (0, False), said
    address = wallets.open(desk.home / "wallet.json", PASSWORD).address
    code, said = desk.typed("wallet", "backup", "copy.json", answers=[PASSWORD])
    assert code == 0, said
    assert wallets.open(desk.folder / "copy.json", PASSWORD).address == address
    code, said = desk.typed("wallet", "show", answers=["wrong"])
    assert (code, "wallet.wrong_password" in said) == (7, True)
    (desk.home / "wallet.json").unlink()
    code, said = desk.typed("wallet", "new", answers=["one", "another"])
    assert (code, "differ" in said) == (7, True)
    assert not (desk.home / "wallet.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_somebody_who_types_nothing_but_an_end_gets_no_wallet(desk):
    code, said = desk.typed("wallet", "new", answers=["\x04"])
    assert (code, "error[wallet.locked]" in said, "Traceback" in said) == (7, True, False), said
    assert not (desk.home / "wallet.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="a shell closes the streams")
def test_nobody_is_asked_through_a_stream_that_is_closed(desk):
    python, *module = desk.command
    desk.command = ["sh", "-c", 'exec "$0" "$@" <&-', python, *module]
    desk.run("wallet", "import", "-", "--json").failed_as("usage.file", 2)
    assert desk.answer("wallet", "new")["password"] == "none"
    desk.command = ["sh", "-c", 'exec "$0" "$@" 2>&-', python, *module]
    assert desk.run("wallet", "backup", "copy.json", "--json").document["error"]["code"] == "wallet.locked"


def test_a_home_of_nobody_is_no_place_for_a_file(desk):
    desk.run("wallet", "import", "~nobody-at-all/key", "--json").failed_as("usage.file", 2)
    desk.run("wallet", "new", "--home", "~nobody-at-all/x", "--json").failed_as("usage.file", 2)
    desk.answer("wallet", "new")
    desk.run("wallet", "backup", "~nobody-at-all/copy.json", "--json").failed_as("usage.file", 2)


SAYING = """
import io, json, os, pathlib, sys
from trainchain.cli.main import run_command
for command, password, stdin in json.load(sys.stdin):
    os.environ["TRAINCHAIN_PASSWORD_FILE"] = password
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    if command[:2] == ["wallet", "import"] and "keystore" in command[2]:
        pathlib.Path(os.environ["TRAINCHAIN_HOME"], "wallet.json").unlink(missing_ok=True)
    run_command(command)
    run_command([*command, "--json"])
"""
"""Every command as it is, and with --json, in one process: importing everything takes longer than what they do."""


def test_no_secret_is_ever_said(desk, secret):
    """Whatever is asked, however it fails: neither key nor password is in what is printed, logged or left behind."""
    key, wrong = KEY[2:], file_of(desk, "wrong", "wrong-password-words")
    raw, keystore = file_of(desk, "raw", KEY), file_of(desk, "keystore", Wallet(KEY).keystore(PASSWORD))
    broken = json.dumps(Wallet(KEY).keystore(PASSWORD)) + PASSWORD + KEY
    commands = [
        ["import", raw], ["show"], ["backup", "copy.json"], ["new"], ["import", keystore],
        ["import", file_of(desk, "broken", broken)], ["import", KEY], ["import", f"{KEY} "], ["import", "--key", key],
        ["backup"], ["backup", "--no-password", "bare.json"], ["import", "-"],
    ]  # fmt: skip
    todo = [(["wallet", *command], words, broken) for words in (secret, wrong, "") for command in commands]
    todo.append((["chain", "deploy", "--rpc", "http://127.0.0.1:9"], secret, ""))
    desk.command = [sys.executable, "-X", "dev", "-c", SAYING]
    done = desk.run(stdin=json.dumps(todo))
    assert (done.code, done.stderr.count("error[") >= 40) == (0, True), done.said
    said = [done.said]
    shown = "\n".join(said).lower()
    for mark in (key, KEY, PASSWORD, "wrong-password-words", str(int(KEY, 16)), repr(bytes.fromhex(key)).lower()):
        assert mark.lower() not in shown
    for path in desk.home.rglob("*"):
        assert path.is_dir() or key.encode() not in path.read_bytes()


CAST = next((JS / "node_modules" / "@foundry-rs").glob("cast-*/bin/cast*"), None)


@pytest.mark.skipif(CAST is None, reason=f"There is no cast: {NOT_INSTALLED}")
def test_cast_reads_ours_and_we_read_what_cast_writes(desk, secret):
    def cast(*arguments):
        command = [str(CAST), "wallet", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    address = desk.answer("wallet", "new", TRAINCHAIN_PASSWORD_FILE=secret)["address"]
    desk.answer("wallet", "backup", "copy.json", TRAINCHAIN_PASSWORD_FILE=secret)
    for folder, name in ((desk.home, "wallet.json"), (desk.folder, "copy.json")):
        told = cast("address", "--keystore", str(folder / name), "--password", PASSWORD)
        assert told.strip().splitlines()[-1] == address
        key = cast("decrypt-keystore", "--keystore-dir", str(folder), name, "--unsafe-password", PASSWORD)
        assert Wallet(key.split()[-1]).address == address

    cast("new", str(desk.folder), "theirs", "--unsafe-password", PASSWORD)
    (desk.home / "wallet.json").unlink()
    theirs = desk.answer("wallet", "import", str(desk.folder / "theirs"), TRAINCHAIN_PASSWORD_FILE=secret)
    told = cast("address", "--keystore", str(desk.folder / "theirs"), "--password", PASSWORD)
    assert told.strip().splitlines()[-1] == theirs["address"]


def test_a_faucet_s_keystore_is_one_for_other_programs_too(tmp_path):
    from eth_account import Account

    node = Devnet(tmp_path / "x.sqlite")
    keystore = json.loads((tmp_path / "x.faucet.json").read_text(encoding="utf-8"))
    assert Account.from_key(Account.decrypt(keystore, "")).address == node.faucet().address
    node.close()


def test_a_faucet_signs_for_its_own_chain_only(tmp_path):
    node = Devnet(tmp_path / "x.sqlite")
    fields = {"to": ADDRESS, "value": 1, "gas": 21_000, "nonce": 0, "gasPrice": 10**10}
    copied = tmp_path / "wallet.json"
    copied.write_bytes((tmp_path / "x.faucet.json").read_bytes())
    for faucet in (node.faucet(), wallets.open(copied)):
        assert faucet.sign_transaction({**fields, "chainId": node.chain_id})
        for chain in ({"chainId": 1}, {"chainId": node.chain_id + 1}, {}):
            with pytest.raises(TrainChainError) as caught:
                faucet.sign_transaction({**fields, **chain})
            assert (caught.value.code, caught.value.exit_code) == ("chain.foreign_key", 7)
            assert str(node.chain_id) in caught.value.message
    node.close()
