"""What a chain's RPC may answer, method by method. What fits goes on; what does not never reaches web3."""

import re
from collections.abc import Callable
from typing import Any

MOST_GAS = 10**9
MOST_PRICE = 10**16
"""Wei per unit of gas. Above this a node does not tell a price, it empties a wallet."""

_QUANTITY = re.compile(r"0x[0-9a-fA-F]{1,64}")
_BYTES = re.compile(r"0x(?:[0-9a-fA-F]{2})*")

Kind = Callable[[Any], Any]
"""Returns what it was given, or a part of it that will do. Raises ValueError for anything else."""


def checked(method: str, params: Any, result: Any) -> Any:
    """The result as far as it is used here. Raises ValueError where no honest node answers so."""
    kind = _ANSWERS.get(method)
    if kind is None:
        return result
    found = kind(result)
    name = _NAMED.get(method)
    if name and found is not None and found[name].lower() != str(params[0]).lower():
        raise ValueError("it answers for another transaction than it was asked for")
    return found


def _number(below: int, *, least: int = 0) -> Kind:
    def check(value: Any) -> Any:
        if not isinstance(value, str) or _QUANTITY.fullmatch(value) is None or not least <= int(value, 16) < below:
            raise ValueError("a number is missing, or out of all bounds")
        return value

    return check


def _data(length: int | None = None) -> Kind:
    def check(value: Any) -> Any:
        if not isinstance(value, str) or _BYTES.fullmatch(value) is None:
            raise ValueError("it is not 0x and hex digits")
        if length is not None and len(value) != 2 + 2 * length:
            raise ValueError(f"it is not {length} bytes long")
        return value

    return check


def _or_none(kind: Kind) -> Kind:
    return lambda value: None if value is None else kind(value)


def _list(kind: Kind) -> Kind:
    def check(value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError("it is not a list")
        return [kind(one) for one in value]

    return check


def _fields(needed: dict[str, Kind], more: dict[str, Kind] | None = None) -> Kind:
    """A mapping with these fields; `more` may be missing, and whatever else there is stays outside."""

    def check(value: Any) -> Any:
        if not isinstance(value, dict) or not needed.keys() <= value.keys():
            raise ValueError("fields are missing")
        kinds = {**needed, **(more or {})}
        return {name: kind(value[name]) for name, kind in kinds.items() if name in value}

    return check


_SMALL, _WORD, _HASH, _ADDRESS = _number(2**63), _number(2**256), _data(32), _data(20)
_PRICE = _number(MOST_PRICE)
_WHERE = {"transactionHash": _HASH, "blockHash": _HASH, "blockNumber": _SMALL, "transactionIndex": _SMALL}
_LOGS = _list(
    _fields({**_WHERE, "address": _ADDRESS, "topics": _list(_HASH), "data": _data(), "logIndex": _SMALL}),
)
_RECEIPT = _fields(
    {**_WHERE, "status": _number(2), "gasUsed": _SMALL, "logs": _LOGS},
    {"contractAddress": _or_none(_ADDRESS), "from": _ADDRESS, "to": _or_none(_ADDRESS), "effectiveGasPrice": _WORD},
)
_TRANSACTION = _fields(
    {"hash": _HASH, "nonce": _SMALL, "blockNumber": _or_none(_SMALL)},
    {"from": _ADDRESS, "to": _or_none(_ADDRESS), "value": _WORD, "input": _data(), "gas": _SMALL},
)
_BLOCK = _fields(
    {"number": _SMALL, "hash": _HASH, "timestamp": _number(2**40)},
    {"parentHash": _HASH, "baseFeePerGas": _PRICE, "gasLimit": _SMALL, "gasUsed": _SMALL},
)
_FEES = _fields({"oldestBlock": _SMALL}, {"baseFeePerGas": _list(_WORD), "reward": _or_none(_list(_list(_PRICE)))})

_ANSWERS: dict[str, Kind] = {
    "eth_chainId": _number(2**63, least=1),
    "eth_blockNumber": _SMALL,
    "eth_getBlockByNumber": _or_none(_BLOCK),
    "eth_getBlockByHash": _or_none(_BLOCK),
    "eth_getBalance": _WORD,
    "eth_getTransactionCount": _SMALL,
    "eth_getCode": _data(),
    "eth_call": _data(),
    "eth_estimateGas": _number(MOST_GAS),
    "eth_gasPrice": _PRICE,
    "eth_maxPriorityFeePerGas": _PRICE,
    "eth_feeHistory": _FEES,
    "eth_sendRawTransaction": _HASH,
    "eth_getTransactionByHash": _or_none(_TRANSACTION),
    "eth_getTransactionReceipt": _or_none(_RECEIPT),
    "eth_getLogs": _LOGS,
}
_NAMED = {"eth_getTransactionByHash": "hash", "eth_getTransactionReceipt": "transactionHash"}
