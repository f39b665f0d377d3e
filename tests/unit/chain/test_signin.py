import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from trainchain.chain.signin import SignIn, recover_sign_in, sign_in
from trainchain.chain.wallet import Wallet
from trainchain.core.errors import TrainChainError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "eip712.json").read_text(encoding="utf-8"))
WALLET = Wallet(GOLDEN["key"])
FIELDS = SignIn(
    domain="hub.example:8000",
    address=WALLET.address,
    uri="https://hub.example:8000/session",
    chain_id=1099511627775,
    nonce="abcDEF0123456789",
    issued_at="2026-01-02T03:04:05Z",
    expiration_time="2026-01-02T03:14:05Z",
)
DURING = datetime(2026, 1, 2, 3, 10, tzinfo=UTC)


def test_the_text_and_its_signature_are_those_of_any_wallet():
    assert FIELDS.text() == GOLDEN["signIn"]["text"]
    assert sign_in(FIELDS, WALLET) == GOLDEN["signIn"]["signature"] == WALLET.sign_text(FIELDS.text())
    assert recover_sign_in(FIELDS, GOLDEN["signIn"]["signature"], now=DURING) == WALLET.address


@pytest.mark.parametrize(
    "change",
    [
        {"domain": "evil.example"},
        {"domain": "hub.example\nNonce: x"},
        {"uri": "https://evil.example"},
        {"address": "0x" + "11" * 20},
        {"address": "me"},
        {"chain_id": 1},
        {"chain_id": 0},
        {"nonce": "abcDEF0123456780"},
        {"nonce": "short"},
        {"nonce": "abcDEF01 3456789"},
        {"issued_at": "2026-01-02T03:04:06Z"},
        {"expiration_time": "2027-01-02T03:14:05Z"},
        {"expiration_time": None},
    ],
    ids=str,
)
def test_any_other_field_is_refused(change):
    signature = GOLDEN["signIn"]["signature"]
    with pytest.raises(TrainChainError) as caught:
        recover_sign_in(replace(FIELDS, **change), signature)
    assert caught.value.code == "session.refused"


@pytest.mark.parametrize("signature", ["", "0x", GOLDEN["signIn"]["signature"][:-2] + "05", None, 5])
def test_a_malformed_signature_is_refused(signature):
    with pytest.raises(TrainChainError) as caught:
        recover_sign_in(FIELDS, signature)
    assert caught.value.code == "session.refused"


@pytest.mark.parametrize("now", [datetime(2026, 1, 2, 3, 4, 4, tzinfo=UTC), datetime(2026, 1, 2, 3, 14, 5, tzinfo=UTC)])
def test_a_message_is_refused_outside_its_time(now):
    with pytest.raises(TrainChainError, match="it holds from"):
        recover_sign_in(FIELDS, GOLDEN["signIn"]["signature"], now=now)


@pytest.mark.parametrize("time", ["2026-01-02T03:04:05", "yesterday"])
def test_a_time_without_a_zone_is_refused(time):
    fields = replace(FIELDS, issued_at=time)
    with pytest.raises(TrainChainError, match="time"):
        recover_sign_in(fields, sign_in(fields, WALLET), now=DURING)
