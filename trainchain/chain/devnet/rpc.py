"""The embedded chain's JSON-RPC: exactly the methods in `METHODS`, for clients near and far."""

import copy
import logging
from collections.abc import Callable
from typing import Any

from trainchain.chain.devnet.engine import GAS_LIMIT
from trainchain.chain.devnet.node import Devnet, Outcome, Refused
from trainchain.chain.hexes import from_hex, to_hex

log = logging.getLogger(__name__)

MAX_BATCH = 50
MAX_BODY = 256 * 1024
MAX_BLOCKS = 100_000
MAX_LOGS = 10_000
PUBLIC_GAS = 8_000_000
"""What a stranger's call or transaction may burn of this machine's time; deploying the escrow takes half."""

_LEAST_GAS = 300_000
_TIP = 1
_NEWEST = ("latest", "pending", "safe", "finalized")


class RpcError(Exception):
    def __init__(self, code: int, message: str, data: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.data = code, message, data


class Rpc:
    """Answers JSON-RPC requests, one or a batch. `public` caps what strangers may ask for.

    A call holds the node while it runs, for up to a second or two. Who serves strangers beside work of its own gives
    this a `Devnet` of its own on the same file.
    """

    def __init__(self, node: Devnet, *, public: bool = True) -> None:
        self.node = node
        self._gas = self._most_gas = PUBLIC_GAS if public else GAS_LIMIT

    def handle(self, request: dict[str, Any] | list[Any]) -> dict[str, Any] | list[Any]:
        if not isinstance(request, list):
            return self._answer(request)
        if not 0 < len(request) <= MAX_BATCH:
            return _failure(None, RpcError(-32600, f"a batch has from 1 to {MAX_BATCH} requests"))
        part = copy.copy(self)
        # Calls cost nothing, so a batch of them may burn little more than one.
        part._gas = max(self._gas // len(request), _LEAST_GAS)
        return [part._answer(one) for one in request]

    def _answer(self, request: Any) -> dict[str, Any]:
        key = request.get("id") if isinstance(request, dict) else None
        if not isinstance(key, str | int | None):
            key = None
        try:
            if not isinstance(request, dict) or not isinstance(request.get("method"), str):
                raise RpcError(-32600, "not a JSON-RPC request")
            method = METHODS.get(request["method"])
            if method is None:
                raise RpcError(-32601, f"the method {request['method'][:60]} is not offered here")
            params = request.get("params", [])
            if not isinstance(params, list):
                raise RpcError(-32602, "params must be a list")
            return {"jsonrpc": "2.0", "id": key, "result": method(self, params)}
        except RpcError as problem:
            return _failure(key, problem)
        except Refused as problem:
            return _failure(key, RpcError(-32000, str(problem)))
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as problem:
            log.debug("bad parameters", exc_info=problem)
            return _failure(key, RpcError(-32602, "the parameters are not what the method takes"))

    def chain_id(self, params: list[Any]) -> str:
        return hex(self.node.chain_id)

    def net_version(self, params: list[Any]) -> str:
        return str(self.node.chain_id)

    def client_version(self, params: list[Any]) -> str:
        return "TrainChain/devnet"

    def syncing(self, params: list[Any]) -> bool:
        return False

    def accounts(self, params: list[Any]) -> list[str]:
        return []

    def block_number(self, params: list[Any]) -> str:
        return hex(self.node.head())

    def block_by_number(self, params: list[Any]) -> dict[str, Any] | None:
        number = self._number(params[0])
        return self.node.block(self.node.head() if number is None else number, full=bool(params[1:] == [True]))

    def block_by_hash(self, params: list[Any]) -> dict[str, Any] | None:
        from_hex(params[0], 32)
        return self.node.block(params[0], full=bool(params[1:] == [True]))

    def balance(self, params: list[Any]) -> str:
        return hex(self._account(params)[0])

    def nonce(self, params: list[Any]) -> str:
        return hex(self._account(params)[1])

    def code(self, params: list[Any]) -> str:
        return to_hex(self._account(params)[2])

    def storage_at(self, params: list[Any]) -> str:
        value = self.node.storage(from_hex(params[0], 20), int(params[1], 16), self._state_of(params[2:]))
        return to_hex(value.to_bytes(32, "big"))

    def call(self, params: list[Any]) -> str:
        message = self._message(params[0])
        return to_hex(_output(self.node.call(*message, self._state_of(params[1:]))))

    def estimate_gas(self, params: list[Any]) -> str:
        outcome = self.node.estimate(*self._message(params[0]))
        _output(outcome)
        return hex(outcome.gas)

    def gas_price(self, params: list[Any]) -> str:
        return hex(self.node.base_fee() + _TIP)

    def priority_fee(self, params: list[Any]) -> str:
        return hex(_TIP)

    def fee_history(self, params: list[Any]) -> dict[str, Any]:
        count = params[0] if isinstance(params[0], int) else int(params[0], 16)
        last = self._number(params[1])
        last = self.node.head() if last is None else last
        first = max(0, last - min(max(count, 1), 32) + 1)
        blocks = [self.node.block(number, full=False) for number in range(first, last + 1)]
        found = [block for block in blocks if block is not None]
        percentiles = params[2] if len(params) > 2 and isinstance(params[2], list) else []
        return {
            "oldestBlock": hex(first),
            "baseFeePerGas": [block["baseFeePerGas"] for block in found] + [hex(self.node.base_fee())],
            "gasUsedRatio": [int(block["gasUsed"], 16) / int(block["gasLimit"], 16) for block in found],
            "reward": [[hex(_TIP)] * min(len(percentiles), 100) for _ in found],
        }

    def send_raw(self, params: list[Any]) -> str:
        return self.node.send(from_hex(params[0]), most_gas=self._most_gas)

    def transaction(self, params: list[Any]) -> dict[str, Any] | None:
        found = self.node.transaction(to_hex(from_hex(params[0], 32)))
        return found[0] if found else None

    def receipt(self, params: list[Any]) -> dict[str, Any] | None:
        found = self.node.transaction(to_hex(from_hex(params[0], 32)))
        return found[1] if found else None

    def logs(self, params: list[Any]) -> list[dict[str, Any]]:
        query = params[0]
        if query.get("blockHash") is not None:
            block = self.node.block(query["blockHash"], full=False)
            if block is None:
                raise RpcError(-32000, "unknown block")
            first = last = int(block["number"], 16)
        else:
            head = self.node.head()
            begin, end = self._number(query.get("fromBlock")), self._number(query.get("toBlock"))
            first, last = head if begin is None else begin, head if end is None else end
        if last - first >= MAX_BLOCKS:
            raise RpcError(-32005, f"the block range is too large: at most {MAX_BLOCKS} blocks")
        addresses = [to_hex(from_hex(one, 20)) for one in _choices(query.get("address"))]
        topics = [[to_hex(from_hex(one, 32)) for one in _choices(place)] for place in (query.get("topics") or [])[:4]]
        found = self.node.logs(first, last, addresses, topics, MAX_LOGS + 1)
        if len(found) > MAX_LOGS:
            raise RpcError(-32005, f"the query has more than {MAX_LOGS} results; ask for fewer blocks")
        return found

    def _account(self, params: list[Any]) -> tuple[int, int, bytes]:
        return self.node.account(from_hex(params[0], 20), self._state_of(params[1:]))

    def _state_of(self, params: list[Any]) -> int | None:
        number = self._number(params[0]) if params else None
        if number is not None and number > self.node.head():
            raise RpcError(-32000, "unknown block")
        return number

    def _number(self, tag: Any) -> int | None:
        """None is the newest block."""
        if tag is None or tag in _NEWEST:
            return None
        if tag == "earliest":
            return 0
        number = tag if isinstance(tag, int) else int(tag, 16)
        if not 0 <= number < 2**62:
            raise RpcError(-32602, "no such block number")
        return number

    def _message(self, tx: dict[str, Any]) -> tuple[bytes, bytes | None, bytes, int, int]:
        data = tx.get("input") or tx.get("data") or "0x"
        gas = int(tx["gas"], 16) if tx.get("gas") else self._gas
        return (
            from_hex(tx["from"], 20) if tx.get("from") else bytes(20),
            from_hex(tx["to"], 20) if tx.get("to") else None,
            from_hex(data),
            int(tx.get("value") or "0x0", 16),
            min(gas, self._gas),
        )


def _choices(value: Any) -> list[str]:
    if value is None:
        return []
    choices = value if isinstance(value, list) else [value]
    if len(choices) > 100:
        raise RpcError(-32602, "at most 100 alternatives")
    return choices


def _output(outcome: Outcome) -> bytes:
    if outcome.reverted:
        raise RpcError(3, "execution reverted", to_hex(outcome.output))
    if outcome.failed:
        raise RpcError(-32000, "execution failed: out of gas or not a valid program")
    return outcome.output


def _failure(key: Any, problem: RpcError) -> dict[str, Any]:
    error: dict[str, Any] = {"code": problem.code, "message": problem.message}
    if problem.data is not None:
        error["data"] = problem.data
    return {"jsonrpc": "2.0", "id": key, "error": error}


METHODS: dict[str, Callable[[Rpc, list[Any]], Any]] = {
    "eth_chainId": Rpc.chain_id,
    "net_version": Rpc.net_version,
    "web3_clientVersion": Rpc.client_version,
    "eth_syncing": Rpc.syncing,
    "eth_accounts": Rpc.accounts,
    "eth_blockNumber": Rpc.block_number,
    "eth_getBlockByNumber": Rpc.block_by_number,
    "eth_getBlockByHash": Rpc.block_by_hash,
    "eth_getBalance": Rpc.balance,
    "eth_getTransactionCount": Rpc.nonce,
    "eth_getCode": Rpc.code,
    "eth_getStorageAt": Rpc.storage_at,
    "eth_call": Rpc.call,
    "eth_estimateGas": Rpc.estimate_gas,
    "eth_gasPrice": Rpc.gas_price,
    "eth_maxPriorityFeePerGas": Rpc.priority_fee,
    "eth_feeHistory": Rpc.fee_history,
    "eth_sendRawTransaction": Rpc.send_raw,
    "eth_getTransactionByHash": Rpc.transaction,
    "eth_getTransactionReceipt": Rpc.receipt,
    "eth_getLogs": Rpc.logs,
}
