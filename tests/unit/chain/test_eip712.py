import json
from pathlib import Path

import pytest
from coincurve import PrivateKey

from trainchain.chain import eip712
from trainchain.chain.recursion import restore_limit
from trainchain.chain.wallet import Wallet
from trainchain.core.errors import TrainChainError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "eip712.json").read_text(encoding="utf-8"))
DOMAIN = eip712.Domain(GOLDEN["domain"]["chainId"], GOLDEN["domain"]["verifyingContract"])
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


def message(case):
    kinds = {field: kind for kind, field in eip712.TYPES[case["type"]]}
    return {field: int(value) if kinds[field].startswith("uint") else value for field, value in case["message"].items()}


CASES = [pytest.param(case, id=f"{case['type']}-{place}") for place, case in enumerate(GOLDEN["cases"])]


@pytest.mark.parametrize("case", CASES)
def test_ethers_hashes_signs_and_recovers_the_same(case):
    assert eip712.encode_type(case["type"]) == case["encodeType"]
    assert "0x" + eip712.digest(DOMAIN, case["type"], message(case)).hex() == case["digest"]
    for signer in (GOLDEN["key"], bytes.fromhex(GOLDEN["key"][2:]), Wallet(GOLDEN["key"])):
        assert eip712.sign(DOMAIN, case["type"], message(case), signer) == case["signature"]
    assert eip712.recover(DOMAIN, case["type"], message(case), case["signature"]) == GOLDEN["address"]


@pytest.mark.parametrize("case", CASES)
def test_eth_account_hashes_the_same(case):
    from eth_account import Account
    from eth_account.messages import encode_typed_data

    restore_limit()
    types = {case["type"]: [{"name": field, "type": kind} for kind, field in eip712.TYPES[case["type"]]]}
    values = {
        field: bytes.fromhex(value[2:]) if isinstance(value, str) and len(value) == 66 else value
        for field, value in message(case).items()
    }
    signable = encode_typed_data(GOLDEN["domain"], types, values)
    assert Account.sign_message(signable, GOLDEN["key"]).signature.hex() == case["signature"][2:]


def test_every_type_has_a_golden_vector():
    assert {case["type"] for case in GOLDEN["cases"]} == set(eip712.TYPES)
    assert "0x" + DOMAIN.separator().hex() == GOLDEN["domainSeparator"]


def high_s(signature):
    r, s, v = signature[2:66], int(signature[66:130], 16), int(signature[130:], 16)
    return f"0x{r}{ORDER - s:064x}{55 - v:02x}"


GOOD = GOLDEN["cases"][0]["signature"]
BAD = {
    "empty": "",
    "0x": "0x",
    "short": GOOD[:-2],
    "long": GOOD + "00",
    "compact": GOOD[:130],
    "not hex": GOOD[:-1] + "g",
    "no 0x": GOOD[2:] + "00",
    "spaces": "0x " + GOOD[3:],
    "full-width digits": "0x" + "\uff11" * 130,
    "high s": high_s(GOOD),
    "v 0": GOOD[:-2] + "00",
    "v 29": GOOD[:-2] + "1d",
    "zero r": "0x" + "00" * 32 + GOOD[66:],
    "zero s": GOOD[:66] + "00" * 32 + GOOD[130:],
    "r of the order": f"0x{ORDER:064x}" + GOOD[66:],
    "all ones": "0x" + "ff" * 64 + "1b",
    "bytes": b"1" * 65,
    "none": None,
    "list": [1],
}


@pytest.mark.parametrize("signature", BAD.values(), ids=BAD.keys())
def test_a_malformed_signature_is_one_error_and_no_other(signature):
    case = GOLDEN["cases"][0]
    with pytest.raises(TrainChainError) as caught:
        eip712.recover(DOMAIN, case["type"], message(case), signature)
    assert caught.value.code == "contribution.bad_signature"


@pytest.mark.parametrize(
    "change",
    [
        {"jobId": "0x12"},
        {"jobId": 5},
        {"jobId": None},
        {"round": -1},
        {"round": 2**64},
        {"round": "1"},
        {"round": True},
        {"total": 2**128},
        {"more": 1},
    ],
)
def test_a_malformed_message_is_the_same_error(change):
    changed = {**message(GOLDEN["cases"][0]), **change}
    with pytest.raises(TrainChainError) as caught:
        eip712.recover(DOMAIN, "Settlement", changed, GOOD)
    assert caught.value.code == "contribution.bad_signature"
    with pytest.raises(ValueError, match=r"jobId|round|total|fields"):
        eip712.digest(DOMAIN, "Settlement", changed)


def test_another_chain_or_contract_recovers_somebody_else():
    case = GOLDEN["cases"][0]
    for domain in (eip712.Domain(1, DOMAIN.escrow), eip712.Domain(DOMAIN.chain_id, "0x" + "12" * 20)):
        assert eip712.recover(domain, case["type"], message(case), GOOD) != GOLDEN["address"]


def test_a_key_is_the_address_that_it_signs_as():
    key = b"\x07" * 32
    public = PrivateKey(key).public_key.format(compressed=False)
    assert eip712.address_of(public) == Wallet(key).address
