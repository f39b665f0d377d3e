"""A few coins for gas and tokens to pay with, from the wallet that an embedded chain was made with."""

from trainchain.chain.escrow import ChainClient
from trainchain.chain.wallet import Wallet
from trainchain.core.errors import TrainChainError


def drip(client: ChainClient, faucet_wallet: Wallet, address: str, gas_wei: int, token_units: int) -> list[str]:
    """Send both, whichever is not zero; returns the transactions. Raises `faucet.closed` on any other chain.

    How much a wallet may have in all is for the caller to decide.
    """
    if client.node is None:
        raise TrainChainError("faucet.closed", "Only an embedded chain has a faucet.")
    sent = []
    if gas_wei:
        sent.append(client.transfer_gas(faucet_wallet, address, gas_wei))
    if token_units:
        sent.append(client.transfer_token(faucet_wallet, client.token, address, token_units))
    return sent
