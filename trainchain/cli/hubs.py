"""The hubs that a home has dealt with, and what its wallet needs to be paid when one of them is gone."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from filelock import FileLock

from trainchain.core.settings import DEFAULT_HUB, private_folder, write_private

if TYPE_CHECKING:
    from trainchain.core.client import HubClient
    from trainchain.core.settings import Settings


@dataclass(frozen=True)
class Place:
    """A hub's chain: the RPC in full, the escrow, the token it pays in, and the account it settles and signs with."""

    rpc: str
    chain_id: int
    escrow: str
    token: str
    hub: str


def place_of(client: HubClient) -> Place:
    """What a hub says now."""
    told = client.info()["chain"]
    rpc = urljoin(client.url + "/", str(told.get("rpc")))
    names = ("escrow", "token", "hub")
    return Place(rpc, told.get("chain_id"), *(str(told.get(name)) for name in names))


def known(settings: Settings) -> dict[str, Place]:
    """By the hub's address. What cannot be read is passed over."""
    found: dict[str, Place] = {}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        for url, fields in json.loads((settings.home / "hubs.json").read_bytes()).items():
            with contextlib.suppress(TypeError):
                found[url] = Place(**fields)
    return found


def remember(settings: Settings, client: HubClient) -> Place:
    """Write down what a hub says of its chain, once that was checked."""
    place = place_of(client)
    if known(settings).get(client.url) != place:
        with FileLock(private_folder(settings.home) / ".hubs.lock", mode=0o600):
            hubs = {url: asdict(one) for url, one in known(settings).items()} | {client.url: asdict(place)}
            write_private(settings.home / "hubs.json", json.dumps(hubs, indent=1, sort_keys=True).encode())
    return place


def addresses(settings: Settings, *, only: bool) -> list[str]:
    """The hubs to ask: `only` the one of the settings, else also every one that this home has dealt with."""
    if only:
        return [settings.hub]
    here = list(known(settings))
    return list(dict.fromkeys([*here, *([settings.hub] if settings.hub != DEFAULT_HUB or not here else [])]))
