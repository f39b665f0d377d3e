"""The keys of a private job: asked for with a lease, opened with this worker's exchange key, kept in memory alone."""

from typing import NamedTuple

from trainchain.core.client import HubClient
from trainchain.core.errors import TrainChainError
from trainchain.core.messages import Lease
from trainchain.core.seal import ExchangeKey, for_lease


class Exchange(NamedTuple):
    """This worker's exchange key, its wallet's signature that binds it to the wallet, and the chain's id."""

    key: ExchangeKey
    signature: str
    chain_id: int


def identities(client: HubClient, exchange: Exchange, lease: Lease) -> dict[str, str]:
    """The age identities of what a lease needs, by the digest of the ciphertext.

    Raises what the hub refuses with, and `key.invalid` for a key that is not for this worker, lease and file.
    """
    asked = {"public_key": exchange.key.public, "signature": exchange.signature}
    answer = client.post(f"/v1/leases/{lease.lease}/keys", asked)
    worker, found = str(client.address), {}
    try:
        wrapped = {str(entry["digest"]): str(entry["wrapped"]) for entry in answer["keys"]}
    except (KeyError, TypeError):
        raise TrainChainError("hub.not_a_hub", "The hub's answer holds no keys.") from None
    for digest, text in wrapped.items():
        purpose = for_lease(exchange.chain_id, lease.job, lease.round, lease.shard, lease.lease, digest, worker)
        found[digest] = exchange.key.unwrap(text, purpose)
    return found
