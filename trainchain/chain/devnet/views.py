"""Blocks, transactions and receipts of py-evm as the JSON that Ethereum clients expect."""

from typing import Any

from trainchain.chain.hexes import to_hex


def block(header: Any, transactions: list[dict[str, Any]], *, full: bool) -> dict[str, Any]:
    return {
        "number": hex(header.block_number),
        "hash": to_hex(header.hash),
        "parentHash": to_hex(header.parent_hash),
        "nonce": to_hex(header.nonce),
        "mixHash": to_hex(header.mix_hash),
        "sha3Uncles": to_hex(header.uncles_hash),
        "logsBloom": _bloom(header.bloom),
        "transactionsRoot": to_hex(header.transaction_root),
        "stateRoot": to_hex(header.state_root),
        "receiptsRoot": to_hex(header.receipt_root),
        "withdrawalsRoot": to_hex(header.withdrawals_root),
        "miner": to_hex(header.coinbase),
        "difficulty": "0x0",
        "totalDifficulty": "0x0",
        "extraData": to_hex(header.extra_data),
        "size": "0x0",
        "gasLimit": hex(header.gas_limit),
        "gasUsed": hex(header.gas_used),
        "timestamp": hex(header.timestamp),
        "baseFeePerGas": hex(header.base_fee_per_gas),
        "transactions": transactions if full else [tx["hash"] for tx in transactions],
        "uncles": [],
        "withdrawals": [],
    }


def transaction(tx: Any, sender: bytes, header: Any) -> dict[str, Any]:
    kind = getattr(tx, "type_id", None) or 0
    shown: dict[str, Any] = {
        "hash": to_hex(tx.hash),
        "type": hex(kind),
        "blockHash": to_hex(header.hash),
        "blockNumber": hex(header.block_number),
        "transactionIndex": "0x0",
        "from": to_hex(sender),
        "to": to_hex(tx.to) if tx.to else None,
        "nonce": hex(tx.nonce),
        "value": hex(tx.value),
        "gas": hex(tx.gas),
        "input": to_hex(tx.data),
        "chainId": hex(tx.chain_id),
        "v": hex(tx.y_parity if kind else tx.v),
        "r": hex(tx.r),
        "s": hex(tx.s),
    }
    base = header.base_fee_per_gas
    if kind >= 2:
        shown["maxFeePerGas"] = hex(tx.max_fee_per_gas)
        shown["maxPriorityFeePerGas"] = hex(tx.max_priority_fee_per_gas)
        shown["gasPrice"] = hex(min(tx.max_fee_per_gas, base + tx.max_priority_fee_per_gas))
    else:
        shown["gasPrice"] = hex(tx.gas_price)
    if kind:
        shown["accessList"] = []
    return shown


def receipt(shown: dict[str, Any], made: Any, computation: Any, header: Any) -> dict[str, Any]:
    place = {key: shown[key] for key in ("blockHash", "blockNumber", "transactionIndex")}
    logs = [
        {
            **place,
            "transactionHash": shown["hash"],
            "logIndex": hex(index),
            "address": to_hex(log.address),
            "topics": [to_hex(topic.to_bytes(32, "big")) for topic in log.topics],
            "data": to_hex(log.data),
            "removed": False,
        }
        for index, log in enumerate(made.logs)
    ]
    created = None
    if shown["to"] is None and not computation.is_error:
        created = to_hex(computation.msg.storage_address)
    return {
        **place,
        "transactionHash": shown["hash"],
        "type": shown["type"],
        "from": shown["from"],
        "to": shown["to"],
        "contractAddress": created,
        "status": "0x0" if computation.is_error else "0x1",
        "gasUsed": hex(made.gas_used),
        "cumulativeGasUsed": hex(made.gas_used),
        "effectiveGasPrice": shown["gasPrice"],
        "logs": logs,
        "logsBloom": _bloom(header.bloom),
    }


def _bloom(bloom: int) -> str:
    return to_hex(bloom.to_bytes(256, "big"))
