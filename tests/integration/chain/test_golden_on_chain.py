"""What ethers signed (golden/eip712.json) is what the contract checks, where it was signed for."""

import json
from collections.abc import Iterator

import pytest

from tests.fixtures_chain import ANVIL_KEY, GOLDEN, World, anvil
from trainchain.chain.hexes import bytes32, from_hex, keccak, to_hex
from trainchain.chain.records import JobOnChain
from trainchain.chain.wallet import Wallet

SIGNED = json.loads((GOLDEN / "eip712.json").read_text(encoding="utf-8"))
JOBS = 2
"""The storage slot of the escrow's jobs: two of EIP712's strings come first."""
EARLIER, LATER = 100_000_000, 2**48 - 2
"""Before a vector's `validUntil`, and after everything."""


@pytest.fixture(scope="module")
def placed() -> Iterator[World]:
    """The escrow at the golden address of the golden chain. It was made elsewhere, so it makes its domain anew."""
    domain = SIGNED["domain"]
    with anvil(chain_id=domain["chainId"], time=EARLIER) as client:
        world = World(client, Wallet(ANVIL_KEY), None)
        code = client.w3.eth.get_code(client.escrow)
        client.escrow = domain["verifyingContract"]
        ask(client, "anvil_setCode", client.escrow, to_hex(bytes(code)))
        yield world


def ask(client, method, *params) -> None:
    assert "error" not in client.w3.provider.make_request(method, list(params))


def cases(kind) -> list:
    return [pytest.param(case, id=f"{kind}-{at}") for at, case in enumerate(of(kind))]


def of(kind) -> list[dict]:
    return [case for case in SIGNED["cases"] if case["type"] == kind]


def values(case) -> list:
    return [int(value) if value.isdecimal() else value for value in case["message"].values()]


def open_job(world, job_id, *, owner, hub) -> JobOnChain:
    """Write the job that the vectors speak of into storage: no salt gives its id."""
    place = int.from_bytes(keccak(bytes32(job_id) + JOBS.to_bytes(32, "big")), "big")
    slots = (
        int(owner, 16) | LATER << 160,  # and its deadline
        int(hub, 16),
        int(world.token, 16),
    )
    for at, value in enumerate(slots):
        ask(world.client, "anvil_setStorageAt", world.client.escrow, f"0x{place + at:064x}", f"0x{value:064x}")
    job = world.client.job(job_id)
    assert (job.owner, job.hub, job.token, job.deadline) == (owner, hub, world.token, LATER)
    return job


def bent(signature) -> str:
    return signature[:20] + ("0" if signature[20] != "0" else "1") + signature[21:]


@pytest.mark.parametrize("case", [*cases("Settlement"), *cases("Voucher")])
def test_the_contract_hashes_as_ethers_does(placed, case):
    function = {"Settlement": "settlementDigest", "Voucher": "voucherDigest"}[case["type"]]
    call = placed.client._contract().functions[function](*values(case))
    assert to_hex(call.call()) == case["digest"]


@pytest.mark.parametrize("case", cases("Settlement"))
def test_a_settlement_that_ethers_signed_is_the_hubs(placed, refused, case):
    client, (job_id, *rest) = placed.client, values(case)
    open_job(placed, job_id, owner=placed.owner.address, hub=SIGNED["address"])
    call, send = client._contract().functions.settleWithSignature, client._sender.send
    refused("BadSignature", send, placed.anna, call(job_id, *rest, from_hex(bent(case["signature"]))))
    # Past the signature it fails for its amount, as the job has no money; the other one's root is none.
    reason = "BadRoot" if int(case["message"]["root"], 16) == 1 else "RoundCapExceeded"
    refused(reason, send, placed.anna, call(job_id, *rest, from_hex(case["signature"])))


@pytest.mark.parametrize("case", cases("Voucher"))
def test_a_voucher_that_ethers_signed_is_the_hubs(placed, refused, case):
    job_id, account, cumulative = values(case)
    open_job(placed, job_id, owner=placed.owner.address, hub=SIGNED["address"])
    redeem = placed.client.redeem_voucher
    refused("BadSignature", redeem, placed.anna, job_id, account, cumulative, bent(case["signature"]))
    refused("NotCovered", redeem, placed.anna, job_id, account, cumulative, case["signature"])


@pytest.mark.parametrize("case", cases("CloseEarly"))
def test_a_closing_that_ethers_signed_is_the_owners(placed, refused, case):
    (job_id,) = values(case)
    open_job(placed, job_id, owner=SIGNED["address"], hub=placed.hub.address)
    refused("BadSignature", placed.client.close_early, placed.hub, job_id, bent(case["signature"]))
    placed.client.close_early(placed.hub, job_id, case["signature"])
    assert placed.client.job(job_id).deadline == placed.client.now()


@pytest.mark.parametrize("case", cases("ClaimTo"))
def test_the_contract_asks_an_account_about_what_ethers_hashed(placed, refused, case):
    """The vectors' account is not who signed them. It becomes a contract that knows one digest only."""
    client, message = placed.client, case["message"]
    open_job(placed, message["jobId"], owner=placed.owner.address, hub=placed.hub.address)
    claim = dict(zip(message, values(case), strict=True))
    for digest, reason in ((to_hex(bytes(32)), "BadSignature"), (case["digest"], "BadProof")):
        # calldataload(4) == digest: answer isValidSignature's own selector, left in its word; else 0.
        code = "7f" + digest[2:] + "6004351463" + "1626ba7e" + "0260e01b5f5260205ff3"
        ask(client, "anvil_setCode", message["account"], "0x" + code)
        refused(reason, client.claim_to, placed.anna, claim, [], case["signature"])
