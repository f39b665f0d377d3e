"""Trying TrainChain on a hub's own chain: gas for everybody, and tokens once for each wallet that asks."""

from sqlalchemy import delete, insert

from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import one
from trainchain.core.models import Model

GRANT = 100_000 * 10**18


class GrantRequest(Model):
    """`tokens`: an owner's grant to fund jobs with; a worker asks for gas only."""

    tokens: bool = False


def grant(hub: Hub, address: str, request: GrantRequest) -> dict[str, str]:
    """Send gas, and tokens where asked for. Raises `faucet.closed` for a second grant or on a real chain."""
    if not request.tokens:
        return hub.chain.drip(address, 0)
    with hub.store.write() as db:
        if one(db, schema.grants, address=address) is not None:
            raise TrainChainError(
                "faucet.closed", f"{address} has had its tokens.", hint="Use another wallet, or a smaller budget."
            )
        db.execute(insert(schema.grants).values(address=address, at=hub.clock()))
    try:
        return hub.chain.drip(address, GRANT)
    except BaseException:
        with hub.store.write() as db:
            db.execute(delete(schema.grants).where(schema.grants.c.address == address))
        raise
