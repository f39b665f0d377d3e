"""What a hub owes: the last vouchers are fetched from it, and no lease is taken while too much that has vested stands
on no settlement. Whether it does, the chain says, not the hub."""

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from trainchain.core import money
from trainchain.core.client import HubClient
from trainchain.core.errors import TrainChainError
from trainchain.core.history import Receipt
from trainchain.core.messages import Lost
from trainchain.core.worker.faults import AWAY, DISHONEST
from trainchain.core.worker.paybook import Paybook

LOOK_SECONDS = 60.0
"""How often a worker that is never idle looks after what is owed."""
TELL_SECONDS = 86_400.0
"""Between two times that a worker tells of a voucher whose time runs out."""
ROUNDS = 2
_LIMIT = re.compile(r"(\d{1,6})|(\d[\d.]*) ?TRAIN", re.IGNORECASE | re.ASCII)
OnEvent = Callable[[dict[str, Any]], None]


class Limit(NamedTuple):
    """How much may be open: the pay of so many rounds of a job, or so much of one job's."""

    rounds: int | None = ROUNDS
    amount: int | None = None

    @classmethod
    def read(cls, text: str) -> "Limit":
        """`2`, or `12.5TRAIN`. Raises `usage.flag` for anything else."""
        found = _LIMIT.fullmatch(text.strip())
        try:
            if found and found[1]:
                return cls(rounds=int(found[1]))
            if found:
                return cls(rounds=None, amount=money.parse(found[2]))
        except TrainChainError:
            pass
        raise TrainChainError(
            "usage.flag",
            f"--max-unsettled is {text[:60]!r}, which is neither a number of rounds nor an amount.",
            hint="Write it as 2, or as 12.5TRAIN.",
        )

    def __str__(self) -> str:
        if self.amount is not None:
            return f"{money.show(self.amount)} TRAIN"
        return "1 round" if self.rounds == 1 else f"{self.rounds} rounds"


class Standing(NamedTuple):
    """Of one wallet in one job: what its newest settlement says, be it active or not yet, and what it was paid."""

    settled: int
    paid: int


class Look(Protocol):
    """How the wallet stands in a job: by what lies on this disk, or `fresh`, by the chain."""

    def __call__(self, job: str, *, fresh: bool) -> Standing: ...


class Closing(NamedTuple):
    """Of one wallet in one job, by the chain alone: what it was paid, when half of the grace time is over, and when no
    voucher is taken any more."""

    paid: int
    half: float
    ends: float


Closes = Callable[[str], Closing]


class Open(NamedTuple):
    """Pay of a job that has vested and stands on no settlement; `since` is when the oldest of it was accepted."""

    amount: int
    rounds: int
    since: float


class Dues:
    """One hub's, as a worker sees them before each lease. The chain is asked only where something is open."""

    def __init__(
        self,
        client: HubClient,
        book: Paybook,
        look: Look,
        closes: Closes,
        on_event: OnEvent,
        *,
        limit: Limit | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._client, self.book, self._look, self._on_event = client, book, look, on_event
        self._closes, self._limit, self._clock, self._now = closes, limit or Limit(), clock, now
        self._covered: dict[str, int] = {}
        """By job: what stands on a settlement, or was paid, as far as is known here."""
        self._last: dict[str, int] = {}
        """By job: what its last voucher promises, where no newer one will come."""
        self._told: set[str] = set()
        self._doubted: set[str] = set()
        self._looked = self._watched = float("-inf")
        self._told_soon: dict[str, float] = {}
        """By job: when it was last told that the time for its voucher runs out."""

    def too_much(self) -> bool:
        """Whether no lease is to be taken; says why once, and once more when it is over."""
        blocked = [job for job in self.book.here() if self._beyond(job)]
        for job in self._told - set(blocked):
            self._on_event({"event": "settled", "job": job})
        self._told = set(blocked)
        return bool(blocked)

    def look_after(self, *, idle: bool) -> None:
        """Bring what is signed and settled meanwhile onto this disk, so that nobody is needed to be paid; and tell of
        vouchers whose time runs out, also where the hub is away.

        Raises `voucher.invalid`.
        """
        if not idle and self._clock() - self._looked < LOOK_SECONDS:
            return
        self._looked = self._clock()
        self._fetch()
        if self._clock() - self._watched >= LOOK_SECONDS:
            self._watched = self._clock()
            for job in self.book.here():
                self._watch(job)

    def _fetch(self) -> None:
        for job in self.book.here():
            try:
                self._newest_voucher(job)
                if self.open(job).amount:
                    self._refresh(job)
            except TrainChainError as error:
                if error.code in DISHONEST:
                    raise
                if error.code in AWAY:
                    return
                if error.code == "job.unknown":  # the hub has lost it: there is nothing to fetch any more
                    self._last[job] = self.book.earned(job)
                if error.code != "object.unknown" and job not in self._doubted:
                    self._doubted.add(job)
                    self._on_event({"event": "doubt", "job": job, "code": error.code, "message": error.message})

    def _watch(self, job: str) -> None:
        """What stands on a settlement can be claimed for ever; a voucher has an end."""
        now = self._now()
        if not self.open(job).amount or now < self._told_soon.get(job, float("-inf")) + TELL_SECONDS:
            return
        try:
            closing = self._closes(job)
        except TrainChainError:
            return  # the chain is away, too: asked again with the next look
        self._covered[job] = max(self._covered[job], closing.paid)
        found = self.open(job)
        if not found.amount or not closing.half < now <= closing.ends:
            return
        self._told_soon[job] = now
        end = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(closing.ends))
        self._on_event(
            {
                "event": "redeem_soon",
                "job": job,
                "amount": str(found.amount),
                "ends": closing.ends,
                "message": f"{money.show(found.amount)} TRAIN of job {job[:12]} have vested, not settled; "
                f"the time to redeem the hub's voucher ends {end}, and then they are lost.",
                "hint": f"trainchain claim {job[:12]} --vouchers  takes them, with this wallet's gas.",
            }
        )

    def open(self, job: str) -> Open:
        """By what is known here."""
        if job not in self._covered:
            self._covered[job] = max(self._look(job, fresh=False))
        left = amount = max(0, self.book.vested(job) - self._covered[job])
        rounds, since = set(), 0.0
        for receipt in self._newest_first(job):
            if left <= 0:
                break
            left -= receipt.amount
            rounds.add(receipt.round)
            since = self.book.path(receipt).stat().st_mtime
        return Open(amount, len(rounds), since)

    def _newest_first(self, job: str) -> list[Receipt]:
        """The shards here whose pay has vested."""
        receipts, vested = self.book.receipts(job), self.book.vested(job)
        found, total = [], 0
        for receipt in receipts:
            total += receipt.amount
            if total <= vested:
                found.append(receipt)
        return found[::-1]

    def _beyond(self, job: str) -> bool:
        if not self._exceeds(self.open(job)):
            return False
        why = ""
        try:
            self._refresh(job)
        except TrainChainError as error:
            why = f" It could not be looked up now: {error.message}"
        found = self.open(job)
        if self._exceeds(found) and job not in self._told:
            self._on_event(
                {
                    "event": "unsettled",
                    "code": "worker.unsettled",
                    "job": job,
                    "amount": str(found.amount),
                    "rounds": found.rounds,
                    "since": found.since,
                    "limit": str(self._limit),
                    "message": f"This hub owes {money.show(found.amount)} TRAIN of {found.rounds} rounds in job "
                    f"{job[:12]}, which have vested and stand on no settlement; the limit is {self._limit}.{why}",
                    "hint": f"trainchain claim {job[:12]} --vouchers  takes it by the hub's voucher; "
                    "--max-unsettled sets another limit.",
                }
            )
        return self._exceeds(found)

    def _exceeds(self, found: Open) -> bool:
        if self._limit.amount is not None:
            return found.amount > self._limit.amount
        return found.rounds > (self._limit.rounds or 0)

    def _refresh(self, job: str) -> None:
        self._covered[job] = max(self._covered.get(job, 0), *self._look(job, fresh=True))

    def _newest_voucher(self, job: str) -> None:
        """A voucher comes with each accepted shard; only what vests without one, as a job ends, has to be fetched.

        Where places are missing here, another machine of the wallet has their receipts: only the hub knows the end.
        """
        receipts = self.book.receipts(job)
        alone = not receipts or receipts[-1].place <= len(receipts)
        if job in self._last and (not alone or self.book.earned(job) <= self._last[job]):
            return
        if alone and self.book.earned(job) <= self.book.vested(job):
            return
        answer = self._client.get(f"/v1/jobs/{job}/voucher", signed=True)
        known = len(self.book.verdicts(job).forfeited)
        self.book.keep_answer(job, answer, receipts)
        for lost in self.book.verdicts(job).forfeited[known:]:
            self._tell_of(job, lost)
        if answer.get("ended") is True:
            self._last[job] = self.book.vested(job)

    def _tell_of(self, job: str, lost: Lost) -> None:
        gone = sum(receipt.amount for receipt in self.book.receipts(job) if lost.first <= receipt.place <= lost.last)
        self._on_event(
            {
                "event": "forfeited",
                "job": job,
                "lease": lost.lease,
                "code": lost.code,
                "amount": str(gone),
                "message": f"A shard of job {job[:12]} was rejected ({lost.code}): {money.show(gone)} TRAIN that had "
                f"not vested are forfeited, the places {lost.first} to {lost.last}.",
                "hint": f"trainchain jobs show {job[:12]} --evidence {lost.lease}",
            }
        )
