"""Moving tokens and coin, and letting the escrow take tokens: by permit where the token has ours, else by approval."""

import time
from collections.abc import Callable
from typing import Any

from web3 import Web3
from web3.exceptions import Web3Exception

from trainchain.chain.eip712 import Domain
from trainchain.chain.hexes import checksum, from_hex, to_hex
from trainchain.chain.reading import ChainReader
from trainchain.chain.transactions import Sender
from trainchain.chain.wallet import Wallet
from trainchain.core.errors import TrainChainError
from trainchain.core.money import show

_PERMIT_TIME = 3600


class TokenClient(ChainReader):
    """A reader that can also send."""

    def __init__(
        self,
        w3: Web3,
        *,
        escrow: str,
        first_block: int,
        patience: float,
        sleep: Callable[[float], None],
        clock: Callable[[], float],
    ) -> None:
        super().__init__(w3, escrow=escrow, first_block=first_block)
        self._sender = Sender(w3, self.chain_id, patience=patience, sleep=sleep, clock=clock)

    def transfer_token(self, wallet: Wallet, token: str, to: str, amount: int) -> str:
        """Raises `money.insufficient` before anything is sent."""
        call = self._token(token).functions.transfer(checksum(to), amount)
        again = self._sender.again(wallet, call)
        if again is not None:
            return hash_of(again)
        self._must_hold(wallet, token, amount)
        return self._send(wallet, call)

    def transfer_gas(self, wallet: Wallet, to: str, amount: int) -> str:
        """Send the chain's own coin."""
        return hash_of(self._sender.pay(wallet, checksum(to), amount))

    def _send(self, wallet: Wallet, call: Any) -> str:
        return hash_of(self._sender.send(wallet, call))

    def _must_hold(self, wallet: Wallet, token: str, amount: int) -> None:
        held = self.token_balance(token, wallet.address)
        if held < amount:
            raise TrainChainError(
                "money.insufficient",
                f"{wallet.address} holds {show(held)} of the token {token}; this takes {show(amount)}.",
            )

    def _permission(self, wallet: Wallet, token: str, amount: int) -> tuple[int, int, bytes, bytes] | None:
        """Let the escrow take `amount`: the rest of a permit's arguments, or None where the allowance is there."""
        self._must_hold(wallet, token, amount)
        if self.allowance(token, wallet.address) >= amount:
            return None
        if not self._has_our_permit(token):
            call = self._token(token).functions.approve(checksum(self.escrow), amount)
            self._sender.send(wallet, call, harmless=True)
            return None  # the escrow's own call is a second transaction
        deadline = max(self.now(), int(time.time())) + _PERMIT_TIME
        message = {
            "owner": wallet.address,
            "spender": checksum(self.escrow),
            "value": amount,
            "nonce": int(self._token(token).functions.nonces(wallet.address).call()),
            "deadline": deadline,
        }
        raw = from_hex(wallet.sign_typed(Domain(self.chain_id, checksum(token)), "Permit", message))
        return deadline, raw[64], raw[:32], raw[32:64]

    def _has_our_permit(self, token: str) -> bool:
        try:
            found = bytes(self._token(token).functions.DOMAIN_SEPARATOR().call())
        except Web3Exception:
            return False
        return found == Domain(self.chain_id, checksum(token)).separator()


def hash_of(receipt: Any) -> str:
    """The hash of a receipt's transaction."""
    return to_hex(bytes(receipt["transactionHash"]))
