"""What paying costs: gas of settlements and claims, and what a hub and a worker compute and wait for.

All on an embedded chain in a scratch folder, with TRAIN in eighteen decimals; gas is the same on every EVM chain of the
Cancun rules. Leaves are the accounts 1, 2, 3 and so on with a little more than one token each, and one of an account
that claims. "First" is a job's first settlement, and a claim of an account without the token; "repeat" is the same
account's claim of the next round. A settlement computed off chain is all that a hub does before its transaction: the
leaves file, its check, tree, total and digest. Seconds of it and of signatures are CPU time of one core.

Prints one JSON document on stdout. Exits 0 whatever it finds, 1 where it did not run to its end.
"""

import argparse
import json
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from launch import begin, log
from report import Figure, at_most, must

PACKAGES = ("trainchain", "web3", "eth-account", "py-evm", "coincurve", "pycryptodome")
COIN = 10**18
HASH = "0x" + "5a" * 32
DISTRIBUTOR = "Uniswap's merkle-distributor, which pays once only, of 100,000: 95,256, say its tests"
JS = Path(__file__).parents[1] / "tests" / "integration" / "chain" / "js"
OPENZEPPELIN = """
import { readFileSync } from "node:fs";
import { StandardMerkleTree } from "@openzeppelin/merkle-tree";
const leaves = JSON.parse(readFileSync(0, "utf8"));
const before = process.cpuUsage();
const { root } = StandardMerkleTree.of(leaves, ["address", "uint256"]);
const { user, system } = process.cpuUsage(before);
console.log(JSON.stringify({ root, seconds: (user + system) / 1e6 }));
"""
OPENED = """
import sys, time
from pathlib import Path
import trainchain.chain.devnet.node
from trainchain.chain.escrow import connect
began = time.perf_counter()
connect("embedded:bench", home=Path(sys.argv[1])).close()
print(time.perf_counter() - began)
"""


def main() -> int:
    begin("chain")
    parser = argparse.ArgumentParser(description="Gas, and what paying takes of a hub and a worker.")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the leaves, and fewer repetitions")
    parser.add_argument("--scratch", type=Path, help="a folder for the chain")
    given = parser.parse_args()
    scale = 100 if given.quick else 1
    settings = {"leaves": 10_000 // scale, "most_leaves": 100_000 // scale, "quick": given.quick}
    figures: list[Figure] = []
    code = 0
    with tempfile.TemporaryDirectory(prefix="trainchain-bench-", dir=given.scratch) as folder:
        try:
            town = Town.made(Path(folder))
            figures += settling(town, (1, settings["leaves"], settings["most_leaves"]))
            figures += claiming(town, settings["leaves"])
            figures += computing(settings["leaves"])
            figures += signing(500 // scale + 20)
            figures += waiting(town, Path(folder), 100 // scale + 10)
            town.client.close()
        except Exception as problem:
            log.exception("it stopped")
            figures.append(report.failure("the chain", str(problem)))
            code = 1
    report.write(report.document("chain", PACKAGES, settings, figures))
    return code


@dataclass
class Town:
    """An embedded chain, and wallets with coin: who pays for jobs, and who settles and claims."""

    client: Any
    owner: Any
    hub: Any

    @classmethod
    def made(cls, home: Path) -> "Town":
        from trainchain.chain.escrow import connect
        from trainchain.chain.wallet import Wallet

        client = connect("embedded:bench", home=home)
        owner, hub = client.faucet(), Wallet(secrets.token_bytes(32))
        client.deploy(owner)
        client.transfer_gas(owner, hub.address, COIN)
        return cls(client, owner, hub)

    def job(self, tree: Any, *, rounds: int = 1) -> str:
        """A job whose money is enough for `rounds` settlements of this tree's size."""
        from trainchain.chain.records import JobParams

        most, salt = rounds * tree.total, "0x" + secrets.token_hex(32)
        later = self.client.now() + 10_000
        params = JobParams(self.client.token, self.hub.address, later, 600, 0, most, HASH, salt)
        made: str = self.client.create_job(self.owner, params, most).job_id
        return made

    def settle(self, job_id: str, round: int, tree: Any) -> int:
        return self.gas(self.client.settle(self.hub, job_id, round, tree.root, tree.total, HASH))

    def gas(self, tx: str) -> int:
        return int(self.client.w3.eth.get_transaction_receipt(tx)["gasUsed"])


def leaves(size: int, account: str, times: int = 1) -> dict[str, int]:
    others = {f"0x{place:040x}": times * (COIN + place) for place in range(1, size)}
    return {**others, account: times * (COIN + 1)}


def settling(town: Town, sizes: tuple[int, ...]) -> list[Figure]:
    from trainchain.chain.merkle import Tree

    found, firsts = [], []
    for size in sizes:
        first, second = (Tree(leaves(size, town.hub.address, times)) for times in (1, 2))
        job_id = town.job(second)
        costs = [town.settle(job_id, round, tree) for round, tree in ((1, first), (2, second))]
        workers = f"{size:,} worker{'s' if size > 1 else ''}"
        found.append(at_most(f"settle {workers}, first", costs[0], "gas", 95_000))
        found.append(at_most(f"settle {workers}, after", costs[1], "gas", 75_000))
        firsts.append(costs[0])
    spread = max(firsts) - min(firsts)
    return [*found, at_most("settle, between the least and the most workers", spread, "gas", 200)]


def claiming(town: Town, size: int) -> list[Figure]:
    from trainchain.chain.merkle import Tree, checksum
    from trainchain.chain.records import ClaimItem

    client, account = town.client, checksum(f"0x{secrets.token_hex(20)}")
    trees = [Tree(leaves(size, account, times)) for times in (1, 2)]
    job_id, costs = town.job(trees[1]), []
    for round, tree in enumerate(trees, 1):
        town.settle(job_id, round, tree)
        paid = client.claim(town.hub, job_id, account, tree.amounts[account], tree.proof(account))
        costs.append(town.gas(paid.tx))
    figures = [
        at_most(f"claim of {size:,}, first", costs[0], "gas", 106_000, peer=DISTRIBUTOR),
        at_most(f"claim of {size:,}, repeat", costs[1], "gas", 72_000),
    ]
    for number in sorted({min(256, size), size}):
        # Somebody who was never paid in these jobs and holds no token yet.
        account = checksum(f"0x{secrets.token_hex(20)}")
        tree, items = Tree(leaves(number, account)), []
        for _ in range(10):
            job_id = town.job(tree)
            town.settle(job_id, 1, tree)
            items.append(ClaimItem(job_id, account, tree.amounts[account], tree.proof(account)))
        tx, amounts = client.claim_many(town.hub, items)
        if not all(amounts):
            raise RuntimeError("claimMany left out an item")
        figures.append(at_most(f"claimMany of {number:,}, each of ten jobs", town.gas(tx) / 10, "gas", 56_000))
    return figures


def cpu(call: Callable[[], Any], times: int = 1) -> float:
    """Seconds of one core."""
    taken = []
    for _ in range(times):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def computing(size: int) -> list[Figure]:
    from trainchain.chain import settlement
    from trainchain.chain.merkle import Tree

    amounts = leaves(size, "0x" + "a1" * 20)
    whole = cpu(lambda: settlement.settle_leaves(settlement.leaves_file(HASH, 1, amounts)), 3)
    tree = cpu(lambda: Tree(amounts), 3)
    peer = openzeppelin(amounts, Tree(amounts).root)
    told = peer if isinstance(peer, str) else f"OpenZeppelin's in JavaScript: {peer:.2f} s"
    return [
        at_most(f"settlement of {size:,} workers off chain", whole, "s", 3.0, digits=2),
        Figure(f"tree of {size:,} leaves alone", round(tree, 2), "s", peer=told),
    ]


def openzeppelin(amounts: dict[str, int], root: str) -> float | str:
    """Seconds of its tree, or why there is none."""
    node = shutil.which("node")
    if node is None or not (JS / "node_modules" / "@openzeppelin").is_dir():
        return "OpenZeppelin's tree: left out, as it is not installed"
    asked = json.dumps([[account, str(amount)] for account, amount in amounts.items()])
    command = [node, "--input-type=module", "-e", OPENZEPPELIN]
    # The package is found from where the script runs.
    said = subprocess.run(command, input=asked, cwd=JS, capture_output=True, text=True, timeout=300, check=True)
    told = json.loads(said.stdout)
    if told["root"] != root:
        raise RuntimeError("OpenZeppelin's tree has another root")
    return float(told["seconds"])


def signing(count: int) -> list[Figure]:
    """Contributions as a hub checks them, each another one, beside eth_account's way of the same."""
    from eth_account import Account
    from eth_account.messages import encode_typed_data

    from trainchain.chain import eip712
    from trainchain.chain.wallet import Wallet

    worker, domain = Wallet(secrets.token_bytes(32)), eip712.Domain(2**39, "0x" + "e5" * 20)
    fields = {"round": 1, "shard": 1, "worker": worker.address, "encoding": "int4", "numericClass": "cpu"}
    hashes = dict.fromkeys(("jobId", "lease", "startHash", "deltaHash", "stateRoot"), HASH)
    messages = [{**hashes, **fields, "shard": shard} for shard in range(count)]
    signatures = [worker.sign_typed(domain, "Contribution", message) for message in messages]
    types = {"Contribution": [{"name": name, "type": kind} for kind, name in eip712.TYPES["Contribution"]]}
    where = {"name": "TrainChain", "version": "1", "chainId": domain.chain_id, "verifyingContract": domain.escrow}

    def ours() -> bool:
        pairs = zip(messages, signatures, strict=True)
        return all(eip712.recover(domain, "Contribution", one, signed) == worker.address for one, signed in pairs)

    def theirs() -> bool:
        pairs = zip(messages, signatures, strict=True)
        return all(
            Account.recover_message(encode_typed_data(where, types, one), signature=signed) == worker.address
            for one, signed in pairs
        )

    if not ours() or not theirs():
        raise RuntimeError("a signature was not its worker's")
    rate, peer = count / cpu(ours, 5), count / cpu(theirs)
    told = f"eth_account: {peer:,.0f}"
    name = "contribution signatures verified"
    return [must(name, round(rate), "/s of one core", ">= 1000", rate >= 1000, peer=told)]


def waiting(town: Town, home: Path, claims: int) -> list[Figure]:
    """What a command waits for on an embedded chain: to open it, and for each claim, reads and block included."""
    from trainchain.chain.merkle import Tree

    command = [sys.executable, "-c", OPENED, str(home)]
    opened = [
        float(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout) for _ in range(5)
    ]
    tree = Tree(leaves(claims, town.hub.address))
    job_id = town.job(tree)
    town.settle(job_id, 1, tree)
    proofs = [(account, amount, tree.proof(account)) for account, amount in tree.amounts.items()]
    began = time.perf_counter()
    for account, amount, proof in proofs:
        town.client.claim(town.hub, job_id, account, amount, proof)
    rate = claims / (time.perf_counter() - began)
    return [
        at_most("embedded chain opened after import, median", 1000 * statistics.median(opened), "ms", 50, digits=1),
        Figure("embedded chain opened after import, slowest of 5", round(1000 * max(opened), 1), "ms"),
        must("claims through the whole client", round(rate, 1), "/s", ">= 10", rate >= 10),
    ]


if __name__ == "__main__":
    sys.exit(main())
