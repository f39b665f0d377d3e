"""A small world on a chain: an owner with tokens, a hub, workers, and jobs between them."""

import json
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from trainchain.chain import settlement
from trainchain.chain.devnet.node import Devnet
from trainchain.chain.escrow import ChainClient, connect
from trainchain.chain.records import JobParams
from trainchain.chain.wallet import Wallet
from trainchain.core.errors import TrainChainError

COIN = 10**18
NOT_INSTALLED = "nobody ran npm install in tests/integration/chain/js."
GOLDEN = Path(__file__).parent / "golden"
JS = Path(__file__).parent / "integration" / "chain" / "js"
"""Where `npm install` puts anvil, ethers, viem and OpenZeppelin's trees."""
# The first of the keys that every development node prints when it starts.
ANVIL_KEY = "0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80"


@dataclass
class World:
    """`rich` pays for everything; the others are fresh, with coin for gas, and the owner has tokens."""

    client: ChainClient
    rich: Wallet
    node: Devnet | None
    token: str = ""
    owner: Wallet = field(default_factory=lambda: Wallet(secrets.token_bytes(32)))
    hub: Wallet = field(default_factory=lambda: Wallet(secrets.token_bytes(32)))
    anna: Wallet = field(default_factory=lambda: Wallet(secrets.token_bytes(32)))
    ben: Wallet = field(default_factory=lambda: Wallet(secrets.token_bytes(32)))

    def __post_init__(self) -> None:
        self.token = self.client.deploy(self.rich).token
        for wallet in (self.owner, self.hub, self.anna, self.ben):
            self.client.transfer_gas(self.rich, wallet.address, COIN)
        self.client.transfer_token(self.rich, self.token, self.owner.address, 1_000_000)

    def params(self, **changes) -> JobParams:
        values = {
            "token": self.token,
            "hub": self.hub.address,
            "deadline": self.client.now() + 1000,
            "grace": 500,
            "activation_delay": 0,
            "round_cap": 400,
            "spec_hash": "ab" * 32,
            "salt": "0x" + secrets.token_hex(32),
        }
        return JobParams(**{**values, **changes})

    def job(self, amount=1000, **changes) -> str:
        return self.client.create_job(self.owner, self.params(**changes), amount).job_id

    def leaves(self, job_id, round, amounts) -> settlement.Leaves:
        amounts = {who.address: amount for who, amount in amounts.items()}
        return settlement.read_leaves(settlement.leaves_file(job_id, round, amounts))

    def settle(self, job_id, round, amounts, *, total=None, wallet=None) -> settlement.Leaves:
        leaves = self.leaves(job_id, round, amounts)
        made = settlement.settle_leaves(settlement.leaves_file(job_id, round, leaves.amounts))
        total = made.total if total is None else total
        self.client.settle(wallet or self.hub, job_id, round, made.root, total, made.data_hash)
        return leaves

    def claim(self, leaves, who, *, wallet=None):
        amount, proof = settlement.proof_for(leaves, who.address)
        return self.client.claim(wallet or who, leaves.job_id, who.address, amount, proof)

    def count(self, leaves, who, *, wallet=None):
        amount, proof = settlement.proof_for(leaves, who.address)
        return self.client.count_leaf(wallet or who, leaves.job_id, who.address, amount, proof)

    def voucher(self, job_id, who, cumulative, *, signer=None) -> str:
        message = {"jobId": job_id, "account": who.address, "cumulative": cumulative}
        return (signer or self.hub).sign_typed(self.client.domain, "Voucher", message)

    def redeem(self, job_id, who, cumulative, *, signer=None):
        signature = self.voucher(job_id, who, cumulative, signer=signer)
        return self.client.redeem_voucher(who, job_id, who.address, cumulative, signature)

    def holds(self, who) -> int:
        address = who if isinstance(who, str) else who.address
        return self.client.token_balance(self.token, address)

    def advance(self, seconds) -> None:
        if self.node is not None:
            self.node.advance(seconds)
        else:
            self.client.w3.provider.make_request("evm_setNextBlockTimestamp", [self.client.now() + seconds])
            self.client.w3.provider.make_request("evm_mine", [])

    def gas(self, tx) -> int:
        return self.client.w3.eth.get_transaction_receipt(tx)["gasUsed"]


class Refusals:
    """Calls that must be refused, by the name of the contract's error."""

    def __call__(self, name, call, *args, **kwargs) -> str:
        with pytest.raises(TrainChainError) as caught:
            call(*args, **kwargs)
        assert caught.value.code == "chain.reverted", caught.value.message
        assert f"refused: {name}(" in caught.value.message
        return caught.value.message


SERVER = """
import pathlib, sys
from trainchain.chain.devnet.node import Devnet
from trainchain.chain.devnet.server import make_server
server = make_server(Devnet(pathlib.Path(sys.argv[1])))
print(server.server_address[1], flush=True)
server.serve_forever()
"""


class running:
    """A process that ends with the block."""

    def __init__(self, command) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def __enter__(self):
        return self.process

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def anvil(*, chain_id: int = 990_011, time: int = 1_800_000_000) -> Iterator[ChainClient]:
    """A node that is not ours; its time, too, moves only when a test says so."""
    installed = next((JS / "node_modules" / "@foundry-rs").glob("anvil-*/bin/anvil*"), "")
    binary = os.environ.get("TRAINCHAIN_ANVIL") or str(installed)
    if not binary:
        pytest.skip(f"There is no anvil: TRAINCHAIN_ANVIL names none, and {NOT_INSTALLED}")
    port = free_port()
    command = [binary, "--port", str(port), "--silent", "--chain-id", str(chain_id), "--timestamp", str(time)]
    with running(command):
        client = connect(f"http://127.0.0.1:{port}", timeout=5, retries=8)
        client.w3.provider.make_request("anvil_setBlockTimestampInterval", [0])
        yield client
        client.close()


def script(name: str, asked: Any, *, needs: str) -> Any:
    """What a script of `js/` answers; it uses the package that it needs, and nothing of ours."""
    node = shutil.which("node")
    if node is None or not (JS / "node_modules" / needs).is_dir():
        pytest.skip(f"There is no {needs}: " + ("node is not here." if node is None else NOT_INSTALLED))
    command = [node, str(JS / name)]
    found = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def no_sleep(seconds: float) -> None:
    raise AssertionError("nothing on an embedded chain has to be waited for")
