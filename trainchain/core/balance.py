"""What an escrow's log of one job adds up to: money in and out, settlements, who was paid. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol


class Entry(Protocol):
    """One event of the contract; `chain.records.Event` is."""

    @property
    def name(self) -> str: ...
    @property
    def args(self) -> Mapping[str, Any]: ...
    @property
    def tx(self) -> str: ...


class Settled(NamedTuple):
    """A settlement as it stands on chain; `free` is what was free in escrow before it."""

    number: int
    root: str
    total: int
    data_hash: str
    tx: str
    free: int


class Balance(NamedTuple):
    """`settled` in all is the last total and `advances`, which vouchers paid and no leaf has counted."""

    funded: int
    refunded: int
    total: int
    advances: int
    paid: Mapping[str, int]
    """By account, by leaf or voucher."""
    settlements: list[Settled]
    hubs: list[tuple[str, int]]
    """Who was named to settle, and from when on."""

    @property
    def claimed(self) -> int:
        return sum(self.paid.values())

    @property
    def settled(self) -> int:
        return self.total + self.advances

    def served(self, present: str, grace: int) -> set[str]:
        """Who was the job's hub at any time: `present` is, and whoever came into office before another was named."""
        named = [until - grace for _, until in self.hubs[1:]]
        before = {hub for (hub, since), until in zip(self.hubs, named, strict=False) if since <= until}
        return before | {present}


def balance(log: Iterable[Entry]) -> Balance:
    """Add a job's log up, oldest entry first."""
    funded = refunded = total = advances = 0
    paid: dict[str, int] = {}
    settlements: list[Settled] = []
    hubs: list[tuple[str, int]] = []
    for entry in log:
        args = entry.args
        if entry.name in ("JobCreated", "Funded"):
            funded += args["amount"]
        elif entry.name == "Reclaimed":
            refunded += args["amount"]
        elif entry.name == "AdvanceCounted":
            advances -= args["amount"]
        elif entry.name == "Settled":
            free = funded - refunded - total - advances
            total = args["total"]
            settlements.append(Settled(args["round"], args["root"], total, args["dataHash"], entry.tx, free))
        elif entry.name in ("Claimed", "VoucherRedeemed"):
            advances += args["amount"] if entry.name == "VoucherRedeemed" else 0
            paid[args["account"]] = paid.get(args["account"], 0) + args["amount"]
        if entry.name in ("JobCreated", "HubProposed"):
            hubs.append((args["hub"], args.get("activeAt", 0)))
    return Balance(funded, refunded, total, advances, paid, settlements, hubs)
