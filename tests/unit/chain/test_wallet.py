import json
import os
import pickle
import stat
import threading

import pytest

from trainchain.chain import wallet
from trainchain.chain.recursion import restore_limit
from trainchain.core.errors import TrainChainError

KEY = bytes(range(1, 33))


def code_of(call, *args):
    with pytest.raises(TrainChainError) as caught:
        call(*args)
    assert caught.value.exit_code == 7
    return caught.value.code


def test_a_wallet_comes_back_with_its_password_and_without_it_does_not(tmp_path):
    path = tmp_path / "wallets" / "mine.json"
    made = wallet.create(path, "open sesame")
    assert wallet.open(path, "open sesame").address == made.address
    assert code_of(wallet.open, path, "") == "wallet.wrong_password"
    assert code_of(wallet.open, path, "Open sesame") == "wallet.wrong_password"


def test_another_library_opens_the_file(tmp_path):
    from eth_account import Account

    restore_limit()
    path = tmp_path / "w.json"
    made = wallet.create(path, "pässword", key=KEY)
    keystore = json.loads(path.read_text(encoding="utf-8"))
    assert keystore["version"] == 3
    assert Account.decrypt(keystore, "pässword") == KEY
    assert Account.from_key(KEY).address == made.address


@pytest.mark.skipif(os.name == "nt", reason="Windows has no file modes")
def test_only_the_user_can_read_it(tmp_path):
    path = tmp_path / "new" / "folder" / "w.json"
    wallet.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["w.json"]


def test_nothing_is_ever_overwritten(tmp_path):
    path = tmp_path / "w.json"
    made = wallet.create(path)
    before = path.read_bytes()
    assert code_of(wallet.create, path) == "wallet.exists"
    assert path.read_bytes() == before
    assert wallet.load_or_create(path).address == made.address


def test_a_missing_or_garbled_file_is_told_apart(tmp_path):
    path = tmp_path / "w.json"
    assert code_of(wallet.open, path, "") == "wallet.missing"
    good = wallet.Wallet(KEY).keystore("")
    crypto = good["crypto"]
    for garbage in (
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"version": 1}',
        b'{"version": 3}',
        b'{"version": 3, "crypto": []}',
        json.dumps({**good, "crypto": {**crypto, "kdf": "md5"}}).encode(),
        json.dumps({**good, "crypto": {**crypto, "mac": 5}}).encode(),
        json.dumps({**good, "crypto": {**crypto, "kdfparams": {}}}).encode(),
    ):
        path.write_bytes(garbage)
        assert code_of(wallet.open, path, "") == "wallet.unreadable"
    assert code_of(wallet.open, tmp_path, "") == "wallet.unreadable"


@pytest.mark.parametrize(
    "costly",
    [
        {"kdf": "scrypt", "n": 2**24, "r": 8, "p": 1, "dklen": 32},
        {"kdf": "scrypt", "n": 2, "r": 8, "p": 1, "dklen": 2**20},
        {"kdf": "pbkdf2", "c": 10**7 + 1, "prf": "hmac-sha256", "dklen": 32},
        {"kdf": "pbkdf2", "c": 1, "prf": "hmac-sha256", "dklen": 2**20},
    ],
)
def test_a_file_that_would_take_all_memory_or_days_to_open_is_not_opened(costly):
    good = wallet.Wallet(KEY).keystore("")
    crypto = {**good["crypto"], "kdf": costly["kdf"], "kdfparams": {**costly, "salt": "00" * 16}}
    assert code_of(wallet.unlock, json.dumps({**good, "crypto": crypto}).encode(), "", "here") == "wallet.unreadable"


def test_what_it_takes_to_open_a_file_is_read_where_it_is_opened():
    good = wallet.Wallet(KEY).keystore("")
    costly = {"c": 10**7 + 1, "prf": "hmac-sha256", "dklen": 32, "salt": "00" * 16}
    crypto = {**good["crypto"], "kdf": "pbkdf2", "kdfparams": costly}
    decoy = {"a": {"kdfparams": {"c": 1}}, **good, "crypto": crypto}
    assert code_of(wallet.unlock, json.dumps(decoy).encode(), "", "here") == "wallet.unreadable"


def test_the_key_does_not_show():
    made = wallet.Wallet(KEY)
    for text in (repr(made), str(made), repr(vars(type(made)).keys())):
        assert KEY.hex() not in text
    assert repr(made) == f"Wallet({made.address})"
    with pytest.raises(TypeError):
        pickle.dumps(made)


def test_threads_that_start_at_once_get_one_wallet(tmp_path):
    path, found = tmp_path / "deep" / "w.json", []
    threads = [threading.Thread(target=lambda: found.append(wallet.load_or_create(path).address)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
