"""Sending transactions: gas and funds looked at first, one nonce at a time, reverts told in the contract's words."""

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from eth_abi.exceptions import DecodingError
from web3 import Web3
from web3.exceptions import (
    BadFunctionCallOutput,
    ContractLogicError,
    TransactionNotFound,
    Web3Exception,
    Web3RPCError,
)

from trainchain.chain.artifacts import explain
from trainchain.chain.hexes import from_hex, keccak, to_hex
from trainchain.chain.journal import Journal, Sent
from trainchain.chain.wallet import Wallet
from trainchain.core.errors import TrainChainError
from trainchain.core.money import show

log = logging.getLogger(__name__)

_NONCE_TRIES = 10
_SPREAD = 5_000
_PERMIT = "WithPermit"
_PERMIT_ARGUMENTS = 4
_MAKES_A_JOB = "createJob"
_UNSURE = ("chain.unreachable", "chain.wrong")

Build = Callable[[dict[str, Any]], Any]


class Sender:
    """Signs, sends and waits, one transaction of a key at a time.

    What was sent is noted beside the key's file until its receipt is seen. The same call, made again after an answer
    was lost or the process died, finds that transaction and waits for it instead of sending another.
    """

    def __init__(
        self,
        w3: Web3,
        chain_id: int,
        *,
        patience: float,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._w3, self._chain_id, self._patience, self._sleep, self._clock = w3, chain_id, patience, sleep, clock

    def send(self, wallet: Wallet, call: Any, *, value: int = 0, harmless: bool = False) -> Any:
        """Send a contract's function (or its constructor) and return the receipt.

        What is `harmless` to repeat is not looked for first: it may have to be done again after it was done.

        Raises `chain.reverted` before anything is sent where the call would fail, `money.insufficient` where gas or
        value is not there, `chain.timeout` where the transaction was sent but did not come back in a block.
        """

        def estimate() -> int:
            gas: int = call.estimate_gas({"from": wallet.address, "value": value})
            return gas + gas // 10

        purpose = "" if harmless else _purpose(call, value)
        return self._send(wallet, purpose, call.build_transaction, estimate, value)

    def pay(self, wallet: Wallet, to: str, value: int) -> Any:
        """Send the chain's own coin."""

        def estimate() -> int:
            gas: int = self._w3.eth.estimate_gas({"from": wallet.address, "to": to, "value": value})
            return gas

        return self._send(wallet, _told("coin", to, value), lambda fields: {**fields, "to": to}, estimate, value)

    def again(self, wallet: Wallet, call: Any, *, value: int = 0) -> Any:
        """The receipt of the same call where it was sent before and not seen to end, else None. Sends nothing new.

        To be asked before balances are: they may be what they are because that transaction was done.
        """
        journal = self._journal(wallet)
        if not journal.find(_purpose(call, value)):
            return None
        with telling(), journal.turn(self._patience):
            self._same_chain()
            return self._found(journal, wallet.address, _purpose(call, value))[0]

    def _send(self, wallet: Wallet, purpose: str, build: Build, estimate: Callable[[], int], value: int) -> Any:
        journal = self._journal(wallet)
        with telling(), journal.turn(self._patience):
            self._same_chain()
            receipt, nonce = self._found(journal, wallet.address, purpose)
            if receipt is not None:
                return receipt
            fields = self._fields(wallet.address, estimate(), value)
            sent = self._hand_in(journal, wallet, purpose, build, fields, nonce)
            try:
                receipt = self._wait(sent)
            except TrainChainError as problem:
                raise _unsure(problem, sent, journal) from None
            journal.end(sent.nonce)
            if receipt["status"] != 1:
                # Run it again on the state it met, for the reason; that this raises is what we want.
                again = {key: value for key, value in build({**fields, "nonce": 0}).items() if key != "nonce"}
                self._w3.eth.call({**again, "from": wallet.address})
                raise TrainChainError("chain.reverted", f"The transaction {sent.hash} failed on chain.")
            return receipt

    def _fields(self, address: str, gas: int, value: int) -> dict[str, Any]:
        fees = self._fees()
        most = (gas + _SPREAD) * fees.get("maxFeePerGas", fees.get("gasPrice", 0)) + value
        held = self._w3.eth.get_balance(address)
        if held < most:
            raise TrainChainError(
                "money.insufficient",
                f"{address} holds {show(held)} of the chain's coin; this can cost {show(most)}.",
                hint="Send it some coin for gas; on an embedded chain the hub's faucet does.",
            )
        # Two homes that pay the same twice with one key would else sign the same bytes for the same nonce: one
        # transaction, and both would take it for theirs. Gas that is not used costs nothing.
        gas += secrets.randbelow(_SPREAD)
        return {"chainId": self._chain_id, "from": address, "gas": gas, "value": value, **fees}

    def _hand_in(
        self, journal: Journal, wallet: Wallet, purpose: str, build: Build, fields: dict[str, Any], nonce: int | None
    ) -> Sent:
        for attempt in range(_NONCE_TRIES):
            place = nonce
            if place is None:
                place = self._w3.eth.get_transaction_count(wallet.address, "pending")
            transaction = build({**fields, "nonce": place})
            transaction.pop("from", None)
            raw = wallet.sign_transaction(transaction)
            sent = Sent(purpose, place, to_hex(raw))
            journal.add(sent)
            try:
                self._w3.eth.send_raw_transaction(raw)
            except Web3RPCError as problem:
                if self._knows(sent.hash):
                    return sent
                # Another home with the same key was faster; its transaction took the nonce.
                if "nonce" not in str(problem).lower() and "underpriced" not in str(problem).lower():
                    raise
                journal.drop(sent)
                if nonce is not None:
                    # What holds this place was sent for the same before: in another place, both would come.
                    raise _unsure(_no_block(), journal.find(purpose)[0], journal) from None
                self._sleep(0.05 * (attempt + 1))
            except TrainChainError as problem:
                raise _unsure(problem, sent, journal) from None
            else:
                return sent
        raise TrainChainError(
            "chain.timeout", f"Other transactions of {wallet.address} kept taking its nonce.", hint="Try again."
        )

    def _wait(self, sent: Sent) -> Any:
        naps = self._naps(self._clock())
        while True:
            receipt = self._receipt(sent.hash)
            if receipt is not None:
                return receipt
            if not next(naps):
                raise _no_block()

    def _naps(self, began: float) -> Iterator[bool]:
        """Sleeps a little longer each time; False once all patience is gone, with sleeping or with slow answers."""
        slept, pause = 0.0, 0.05
        while max(slept, self._clock() - began) < self._patience:
            self._sleep(pause)
            slept, pause = slept + pause, min(pause * 2, 2.0)
            yield True
        yield False

    def _found(self, journal: Journal, address: str, purpose: str) -> tuple[Any, int | None]:
        """The receipt of what was sent for this purpose before, or the nonce that sending it anew must have: of two
        transactions with one nonce only one can ever be in a block."""
        earlier = journal.find(purpose)
        if not earlier:
            return None, None
        newest, naps, pushed = earlier[0], self._naps(self._clock()), False
        while True:
            used = self._w3.eth.get_transaction_count(address, "latest")
            # Asked for after the count: what the count has seen, the node can show.
            receipt = next((one for one in map(self._receipt, [sent.hash for sent in earlier]) if one), None)
            if receipt is not None:
                journal.end(newest.nonce)
                if receipt["status"] != 1:
                    return None, None
                log.warning("The transaction %s of before was found; nothing new was sent.", newest.hash)
                return receipt, None
            if used <= newest.nonce and not pushed:
                pushed = True
                if not self._push(newest):
                    return None, newest.nonce
            if not next(naps):
                break
        if used <= newest.nonce:
            problem = _unsure(_no_block(), newest, journal)
            if used < newest.nonce:
                problem.hint = (
                    f"Earlier ones of {address} come first. If the chain was begun anew, remove {journal.path}."
                )
            raise problem
        journal.end(newest.nonce)  # another program took the nonce with the same key
        return None, None

    def _push(self, sent: Sent) -> bool:
        """Hand in once more what a node may have lost; False where it takes it no more, for its fees as it were."""
        try:
            self._w3.eth.send_raw_transaction(from_hex(sent.raw))
        except Web3RPCError as problem:
            return "nonce" in str(problem).lower() or self._knows(sent.hash)
        except TrainChainError as problem:
            if problem.code not in _UNSURE:
                raise
        return True

    def _receipt(self, tx_hash: str) -> Any:
        try:
            return self._w3.eth.get_transaction_receipt(tx_hash)
        except (TransactionNotFound, Web3RPCError):  # some nodes refuse to look before they have their index
            return None

    def _same_chain(self) -> None:
        found = self._w3.eth.chain_id
        if found != self._chain_id:
            raise TrainChainError(
                "chain.wrong",
                f"The chain's RPC first answered for chain {self._chain_id} and now for chain {found}.",
                hint="Nothing was sent. Check the chain's URL.",
            )

    def _journal(self, wallet: Wallet) -> Journal:
        return Journal(wallet.notes, self._chain_id, wallet.address)

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
    except (Web3Exception, DecodingError) as problem:
        raise TrainChainError("chain.wrong", f"The chain answered strangely: {_words(problem)}.") from None


def _no_funds() -> TrainChainError:
    return TrainChainError("money.insufficient", "The wallet does not hold enough of the chain's coin for gas.")


def _no_block() -> TrainChainError:
    return TrainChainError("chain.unreachable", "No block came.")


def _unsure(problem: TrainChainError, sent: Sent, journal: Journal) -> TrainChainError:
    """What went wrong after a transaction was signed: it may be in a block, and nobody can tell yet."""
    if problem.code not in _UNSURE:
        return problem
    hint = "Look again before you repeat it; repeating a settlement or a claim is safe."
    if journal.path is not None:
        hint = "Repeat the command later: it looks for this transaction first, and does nothing twice."
    why = "" if problem.code == "chain.unreachable" else f" {problem.message}"
    return TrainChainError(
        "chain.timeout" if problem.code == "chain.unreachable" else problem.code,
        f"The transaction {sent.hash} was sent, but is not in a block yet; it may still come.{why}",
        hint=hint,
        tx=sent.hash,
    )


def _purpose(call: Any, value: int) -> str:
    """What a call is for. A permit is left out: it is signed anew each time, and differs once the first was used."""
    if not hasattr(call, "fn_name"):
        return _told("constructor", call.data_in_transaction, value)
    name, arguments = str(call.fn_name), tuple(call.arguments)
    if name.endswith(_PERMIT):
        name, arguments = name.removesuffix(_PERMIT), arguments[:-_PERMIT_ARGUMENTS]
    if name == _MAKES_A_JOB:
        arguments = arguments[0][-1:]  # the salt: a job is made once, whatever its deadline would be by now
    return _told(call.address, name, arguments, value)


def _told(*parts: Any) -> str:
    return to_hex(keccak(repr(parts).encode()))


def _words(problem: Exception) -> str:
    response = getattr(problem, "rpc_response", None) or {}
    error = response.get("error") if isinstance(response, dict) else None
    text = error.get("message") if isinstance(error, dict) else None
    return str(text or problem)[:300]
