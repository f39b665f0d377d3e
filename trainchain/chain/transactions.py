"""Sending transactions: gas and funds looked at first, one nonce at a time, reverts told in the contract's words."""

import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from web3 import Web3
from web3.exceptions import (
    BadFunctionCallOutput,
    ContractLogicError,
    TransactionNotFound,
    Web3Exception,
    Web3RPCError,
)

from trainchain.chain.artifacts import explain
from trainchain.chain.hexes import keccak, to_hex
from trainchain.chain.wallet import Wallet
from trainchain.core.errors import TrainChainError
from trainchain.core.money import show

_NONCE_TRIES = 10
_SPREAD = 5_000
_locks: defaultdict[tuple[int, str], threading.Lock] = defaultdict(threading.Lock)
_locks_lock = threading.Lock()


class Sender:
    """Signs, sends and waits. Threads that share a wallet take turns at its nonce."""

    def __init__(
        self, w3: Web3, chain_id: int, *, patience: float, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._w3, self._chain_id, self._patience, self._sleep = w3, chain_id, patience, sleep

    def send(self, wallet: Wallet, call: Any, *, value: int = 0) -> Any:
        """Send a contract's function (or its constructor) and return the receipt.

        Raises `chain.reverted` before anything is sent where the call would fail, `money.insufficient` where gas or
        value is not there, `chain.timeout` where the transaction was sent but did not come back in a block.
        """
        with telling():
            gas = call.estimate_gas({"from": wallet.address, "value": value})
            return self._send(wallet, call.build_transaction, gas + gas // 10, value)

    def pay(self, wallet: Wallet, to: str, value: int) -> Any:
        """Send the chain's own coin."""
        with telling():
            gas = self._w3.eth.estimate_gas({"from": wallet.address, "to": to, "value": value})
            return self._send(wallet, lambda fields: {**fields, "to": to}, gas, value)

    def _send(self, wallet: Wallet, build: Callable[[dict[str, Any]], Any], gas: int, value: int) -> Any:
        fees = self._fees()
        most = (gas + _SPREAD) * fees.get("maxFeePerGas", fees.get("gasPrice", 0)) + value
        held = self._w3.eth.get_balance(wallet.address)
        if held < most:
            raise TrainChainError(
                "money.insufficient",
                f"{wallet.address} holds {show(held)} of the chain's coin; this can cost {show(most)}.",
                hint="Send it some coin for gas; on an embedded chain the hub's faucet does.",
            )
        # Two processes that pay the same twice with one wallet would else sign the same bytes for the same nonce:
        # one transaction, and both would take it for theirs. Gas that is not used costs nothing.
        gas += secrets.randbelow(_SPREAD)
        fields = {"chainId": self._chain_id, "from": wallet.address, "gas": gas, "value": value, **fees}
        with self._lock(wallet.address):
            tx_hash = self._hand_in(wallet, build, fields)
        return self._wait(tx_hash, fields, build)

    def _hand_in(self, wallet: Wallet, build: Callable[[dict[str, Any]], Any], fields: dict[str, Any]) -> str:
        for attempt in range(_NONCE_TRIES):
            nonce = self._w3.eth.get_transaction_count(wallet.address, "pending")
            transaction = build({**fields, "nonce": nonce})
            transaction.pop("from", None)
            raw = wallet.sign_transaction(transaction)
            tx_hash = to_hex(keccak(raw))
            try:
                self._w3.eth.send_raw_transaction(raw)
            except Web3RPCError as problem:
                if self._knows(tx_hash):
                    return tx_hash
                # Another process with the same wallet was faster; its transaction took the nonce.
                if "nonce" not in str(problem).lower() and "underpriced" not in str(problem).lower():
                    raise
                self._sleep(0.05 * (attempt + 1))
            except TrainChainError as problem:
                if problem.code != "chain.unreachable":
                    raise
                raise _timeout(tx_hash) from None
            else:
                return tx_hash
        raise TrainChainError(
            "chain.timeout", f"Other transactions of {wallet.address} kept taking its nonce.", hint="Try again."
        )

    def _wait(self, tx_hash: str, fields: dict[str, Any], build: Callable[[dict[str, Any]], Any]) -> Any:
        waited, pause = 0.0, 0.05
        while True:
            try:
                receipt = self._w3.eth.get_transaction_receipt(tx_hash)
                break
            except TransactionNotFound:
                if waited >= self._patience:
                    raise _timeout(tx_hash) from None
            self._sleep(pause)
            waited, pause = waited + pause, min(pause * 2, 2.0)
        if receipt["status"] != 1:
            # Run it again on the state it met, for the reason; that this raises is what we want.
            again = {key: value for key, value in build({**fields, "nonce": 0}).items() if key != "nonce"}
            self._w3.eth.call({**again, "from": fields["from"]})
            raise TrainChainError("chain.reverted", f"The transaction {tx_hash} failed on chain.")
        return receipt

    def _fees(self) -> dict[str, int]:
        base = self._w3.eth.get_block("latest").get("baseFeePerGas")
        if base is None:
            return {"gasPrice": self._w3.eth.gas_price}
        tip = self._w3.eth.max_priority_fee
        return {"maxFeePerGas": 2 * base + tip, "maxPriorityFeePerGas": tip}

    def _knows(self, tx_hash: str) -> bool:
        try:
            self._w3.eth.get_transaction(tx_hash)
        except TransactionNotFound:
            return False
        return True

    def _lock(self, address: str) -> threading.Lock:
        with _locks_lock:
            return _locks[self._chain_id, address]


@contextmanager
def telling() -> Iterator[None]:
    """Turn web3's errors into ours."""
    try:
        yield
    except ContractLogicError as problem:
        data = problem.data if isinstance(problem.data, str) else ""
        if "insufficient funds" in str(problem).lower():
            raise _no_funds() from None
        raise TrainChainError("chain.reverted", f"{explain(data)}.") from None
    except BadFunctionCallOutput:
        raise TrainChainError(
            "chain.wrong", "There is no such contract on this chain.", hint="Check --chain and --escrow."
        ) from None
    except Web3RPCError as problem:
        if "insufficient funds" in str(problem).lower():
            raise _no_funds() from None
        raise TrainChainError("chain.reverted", f"The chain refused: {_words(problem)}.") from None
    except Web3Exception as problem:
        raise TrainChainError("chain.wrong", f"The chain answered strangely: {_words(problem)}.") from None


def _no_funds() -> TrainChainError:
    return TrainChainError("money.insufficient", "The wallet does not hold enough of the chain's coin for gas.")


def _timeout(tx_hash: str) -> TrainChainError:
    return TrainChainError(
        "chain.timeout",
        f"The transaction {tx_hash} was sent, but is not in a block yet; it may still come.",
        hint="Look again before you repeat it; repeating a settlement or a claim is safe.",
        tx=tx_hash,
    )


def _words(problem: Web3Exception) -> str:
    response = getattr(problem, "rpc_response", None) or {}
    error = response.get("error") if isinstance(response, dict) else None
    text = error.get("message") if isinstance(error, dict) else None
    return str(text or problem)[:300]
