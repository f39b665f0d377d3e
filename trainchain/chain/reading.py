"""Reading a chain: the escrow's jobs and log, balances, and whether the code there is ours."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from eth_abi.exceptions import DecodingError
from eth_utils.abi import event_abi_to_log_topic
from web3 import Web3
from web3.exceptions import Web3Exception

from trainchain.chain.artifacts import load
from trainchain.chain.hexes import bytes32, checksum, is_address, to_hex
from trainchain.chain.records import Claimed, Event, JobOnChain, Settled
from trainchain.chain.transactions import telling
from trainchain.core.errors import TrainChainError


class ChainReader:
    """What can be known without a wallet. `escrow` is the contract that everything asks; "" before there is one.

    `first_block` is where the search through the log begins: the escrow's own block, on a chain with a long past.
    """

    def __init__(self, w3: Web3, *, escrow: str = "", first_block: int = 0) -> None:
        self.w3 = w3
        self.escrow = escrow
        self.first_block = first_block

    @cached_property
    def chain_id(self) -> int:
        """Which chain this is. Raises `chain.wrong` where the answer is not a number."""
        try:
            with telling():
                return int(self.w3.eth.chain_id)
        except (ValueError, TypeError):
            raise TrainChainError("chain.wrong", "The address answers, but not with a chain's id.") from None

    def now(self) -> int:
        """The newest block's timestamp."""
        with telling():
            return int(self.w3.eth.get_block("latest")["timestamp"])

    def gas_balance(self, address: str) -> int:
        with telling():
            return int(self.w3.eth.get_balance(checksum(address)))

    def token_balance(self, token: str, address: str) -> int:
        with telling():
            return int(self._token(token).functions.balanceOf(checksum(address)).call())

    def allowance(self, token: str, owner: str) -> int:
        """What the escrow may take of the owner's tokens."""
        with telling():
            call = self._token(token).functions.allowance(checksum(owner), checksum(self.escrow))
            return int(call.call())

    def check_code(self, escrow: str | None = None) -> str:
        """The hash of the escrow's code, immutables left out. Raises `chain.wrong` where it is not our contract."""
        address = self.escrow if escrow is None else escrow
        if not self._is("TrainEscrow", address):
            raise TrainChainError(
                "chain.wrong",
                f"The code at {address or 'no address'} is not the TrainEscrow of this version.",
                hint="Check the chain's URL and the escrow's address.",
            )
        return load("TrainEscrow").code_hash()

    def job_id(self, owner: str, salt: str) -> str:
        with telling():
            found = self._contract().functions.jobIdOf(checksum(owner), bytes32(salt)).call()
            return to_hex(bytes(found))

    def job(self, job_id: str) -> JobOnChain:
        """A job's terms and money. Raises `chain.reverted` (NoSuchJob) where it is not there."""
        with telling():
            found = self._contract().functions.job(bytes32(job_id)).call()
        names = [part["name"] for part in self._abi("job")["outputs"][0]["components"]]
        values = dict(zip(names, found, strict=True))
        for name, value in values.items():
            if isinstance(value, bytes):
                values[name] = to_hex(value)
        return JobOnChain(
            job_id=to_hex(bytes32(job_id)),
            owner=values["owner"],
            token=values["token"],
            hub=values["hub"],
            deadline=values["deadline"],
            grace=values["grace"],
            activation_delay=values["activationDelay"],
            round_cap=values["roundCap"],
            spec_hash=values["specHash"],
            funded=values["funded"],
            refunded=values["refunded"],
            settled=values["settled"],
            claimed=values["claimed"],
            total=values["total"],
            round=values["round"],
            root=values["root"],
            pending_root=values["pendingRoot"],
            pending_at=values["pendingAt"],
            next_hub=values["nextHub"],
            next_hub_at=values["nextHubAt"],
            halted=values["halted"],
        )

    def claimed_of(self, job_id: str, account: str) -> int:
        """Everything the account was paid in the job, by leaf or voucher."""
        with telling():
            call = self._contract().functions.claimedOf(bytes32(job_id), checksum(account))
            return int(call.call())

    def advanced_of(self, job_id: str, account: str) -> int:
        """What vouchers paid the account that no proven leaf has counted yet."""
        with telling():
            call = self._contract().functions.advancedOf(bytes32(job_id), checksum(account))
            return int(call.call())

    def claimable(self, job_id: str, account: str, cumulative: int) -> int:
        """What a leaf of `cumulative` would still pay."""
        return max(0, cumulative - self.claimed_of(job_id, account))

    def settlements(self, job_id: str) -> list[Settled]:
        """The job's settlements, oldest first."""
        return [
            Settled(
                job_id=to_hex(bytes(log["args"]["jobId"])),
                round=log["args"]["round"],
                root=to_hex(bytes(log["args"]["root"])),
                total=log["args"]["total"],
                data_hash=to_hex(bytes(log["args"]["dataHash"])),
                active_at=log["args"]["activeAt"],
                tx=to_hex(bytes(log["transactionHash"])),
                block=log["blockNumber"],
            )
            for log in self._logs("Settled", job_id)
        ]

    def claims(self, job_id: str) -> list[Claimed]:
        """The job's payments, by leaf and by voucher, oldest first."""
        found = [(log, False) for log in self._logs("Claimed", job_id)]
        found += [(log, True) for log in self._logs("VoucherRedeemed", job_id)]
        found.sort(key=lambda pair: (pair[0]["blockNumber"], pair[0]["logIndex"]))
        return [
            Claimed(
                job_id=to_hex(bytes(log["args"]["jobId"])),
                account=log["args"]["account"],
                to=log["args"]["account"] if voucher else log["args"]["to"],
                amount=log["args"]["amount"],
                cumulative=log["args"]["cumulative"],
                voucher=voucher,
                tx=to_hex(bytes(log["transactionHash"])),
                block=log["blockNumber"],
            )
            for log, voucher in found
        ]

    def events(self, job_id: str) -> list[Event]:
        """All that the escrow's log tells of a job, oldest first, asked for at once."""
        contract = self._contract()
        kinds = {
            to_hex(event_abi_to_log_topic(entry)): entry["name"]
            for entry in contract.abi
            if entry["type"] == "event" and any(part["name"] == "jobId" for part in entry["inputs"])
        }
        query = {"address": contract.address, "topics": [list(kinds), to_hex(bytes32(job_id))]}

        def ask(first: int, last: int) -> list[Any]:
            return list(self.w3.eth.get_logs({**query, "fromBlock": first, "toBlock": last}))

        try:
            with telling():
                found = _in_parts(ask, self.first_block, self.w3.eth.block_number)
                found.sort(key=lambda log: (log["blockNumber"], log["logIndex"]))
                return [_event(contract, kinds[to_hex(bytes(log["topics"][0]))], log) for log in found]
        except (ValueError, TypeError, LookupError, DecodingError):
            raise TrainChainError("chain.wrong", "The chain's log of the escrow cannot be read.") from None

    def _is(self, name: str, address: str) -> bool:
        if not is_address(address):
            return False
        with telling():
            return load(name).fits(bytes(self.w3.eth.get_code(checksum(address))))

    def _contract(self) -> Any:
        if not is_address(self.escrow):
            raise TrainChainError("chain.wrong", "This chain has no escrow yet.", hint="trainchain chain deploy")
        return self.w3.eth.contract(address=checksum(self.escrow), abi=load("TrainEscrow").abi)

    def _token(self, token: str) -> Any:
        if not is_address(token):
            raise TrainChainError("chain.wrong", f"{token!r} is not a token's address.")
        return self.w3.eth.contract(address=checksum(token), abi=load("TrainToken").abi)

    def _abi(self, function: str) -> dict[str, Any]:
        return next(entry for entry in load("TrainEscrow").abi if entry.get("name") == function)

    def _logs(self, event: str, job_id: str) -> list[Any]:
        source = self._contract().events[event]()
        filters = {"jobId": bytes32(job_id)}

        def ask(first: int, last: int) -> list[Any]:
            return list(source.get_logs(argument_filters=filters, from_block=first, to_block=last))

        with telling():
            return _in_parts(ask, self.first_block, self.w3.eth.block_number)


def _event(contract: Any, name: str, log: Any) -> Event:
    read = contract.events[name]().process_log(log)
    args = {part: to_hex(bytes(value)) if isinstance(value, bytes) else value for part, value in read["args"].items()}
    return Event(name, args, to_hex(bytes(read["transactionHash"])), read["blockNumber"])


def _in_parts(ask: Callable[[int, int], list[Any]], first: int, last: int) -> list[Any]:
    """Ask for a range; where the node finds it too large, for its halves. Every node draws that line elsewhere."""
    try:
        return ask(first, last)
    except Web3Exception:
        if last - first < 1_000:
            raise
    middle = (first + last) // 2
    return _in_parts(ask, first, middle) + _in_parts(ask, middle + 1, last)
