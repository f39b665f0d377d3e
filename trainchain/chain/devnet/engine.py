"""py-evm set up as our chain: one fork, fixed gas limit, blocks as fast as they come."""

import logging
from typing import Any

from eth import constants
from eth.chains.base import MiningChain
from eth.vm.forks.prague import PragueVM

from trainchain.chain.recursion import restore_limit

restore_limit()

GAS_LIMIT = 30_000_000

# py-evm announces every opcode and block at levels that a root logger may let through.
logging.getLogger("eth").setLevel(logging.WARNING)


class _VM(PragueVM):  # type: ignore[misc]  # py-evm has no types
    @classmethod
    def validate_header(cls, header: Any, parent_header: Any) -> None:
        # Blocks of one second share its timestamp; else a burst would push the chain ahead of the clock.
        if parent_header is not None and header.timestamp == parent_header.timestamp:
            parent_header = parent_header.copy(timestamp=header.timestamp - 1)
        super().validate_header(header, parent_header)


def engine(chain_id: int) -> Any:
    """The chain's class; make it over a database, or give it a genesis block there."""
    rules = ((constants.GENESIS_BLOCK_NUMBER, _VM),)
    return MiningChain.configure("TrainChainDevnet", vm_configuration=rules, chain_id=chain_id)


def write_genesis(database: Any, chain_id: int, *, time: int, funded: bytes, coins: int) -> None:
    params = {"difficulty": 0, "gas_limit": GAS_LIMIT, "timestamp": time}
    account = {"balance": coins, "nonce": 0, "code": b"", "storage": {}}
    engine(chain_id).from_genesis(database, params, {funded: account})
