"""How a home's wallet stands in every job that it earned in: by its papers and the chain, and by what hubs add.

A hub that is gone costs nothing of that: its chain is known from when it answered, the proofs lie on this disk.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from trainchain.cli import hubs, wiring
from trainchain.cli.hubs import Place
from trainchain.cli.output import Output
from trainchain.core.errors import TrainChainError
from trainchain.core.messages import Lost, Verdicts
from trainchain.core.models import Address, Amount, Count, Digest, Hash32, JobName, Model, Positive, parse
from trainchain.core.rewards import VESTING

if TYPE_CHECKING:
    from trainchain.chain.collecting import Mirror, Standing
    from trainchain.chain.escrow import ChainClient
    from trainchain.chain.wallet import Wallet
    from trainchain.core.client import HubClient
    from trainchain.core.settings import Settings
    from trainchain.core.worker.paybook import Papers

    Dial = Callable[[Settings, Wallet | None], HubClient]

Document = dict[str, Any]


class Shard(Model):
    """An accepted shard, as a hub tells of it."""

    round: Count
    shard: Count
    lease: Hash32
    amount: Amount
    place: Positive
    accepted: float
    audit: str | None
    evidence: Digest | None
    state: str
    settlement: Count | None


class Fees(Model):
    """What replays for others earned."""

    replays: Count
    accepted: Amount
    vested: Amount
    forfeited: Amount
    last: float | None
    """When the last of them was done."""


class Earned(Model):
    """What a hub says that a wallet has earned in a job."""

    job: Hash32
    name: JobName
    token: Address
    state: str
    ended: bool
    accepted: Amount
    vested: Amount
    settled: Amount
    forfeited: Amount
    waits: Positive | None
    """The first place that waits for a verdict."""
    rejections: list[Lost]
    fees: Fees
    shards: list[Shard]


class Told(Model):
    """What a hub says of all jobs. One that tells nonsense must keep no other's pay from being claimed."""

    jobs: list[Earned]


@dataclass
class Source:
    """One hub: what is known of its chain, the client where it answers, and what it says this wallet has earned."""

    url: str
    place: Place
    client: HubClient | None
    earned: dict[str, Document] = field(default_factory=dict)
    heard: bool = False
    """Whether it said so: then what it does not name it does not know."""

    @property
    def relays(self) -> bool:
        return self.client is not None and bool(self.client.info()["chain"].get("relays"))


@dataclass(frozen=True)
class Failure:
    """What could not be done, and for which job or hub; the rest is."""

    what: str
    error: TrainChainError

    def document(self) -> Document:
        return {"what": self.what, "code": self.error.code, "message": self.error.message, "hint": self.error.hint}


@dataclass
class Found:
    """One job: how the wallet stands in it, and in `accepted` and `vested` what this disk and the hub know of that is
    not forfeited, of shards and `fees` of replays alike."""

    job: str
    name: str
    source: Source
    chain: ChainClient
    standing: Standing
    accepted: int
    vested: int
    next_vests_after: int
    """How many more accepted shards the next of what is vesting waits for."""
    verdicts: Verdicts
    """What is known of verdicts on its shards."""

    @property
    def vesting(self) -> int:
        standing = self.standing
        return max(0, self.accepted - max(self.vested, standing.paid, standing.leaf, standing.pending))

    @property
    def unsettled(self) -> int:
        """What has vested and stands on no settlement, be it active or not yet."""
        standing = self.standing
        return max(0, self.vested - max(standing.paid, standing.leaf, standing.pending))

    @property
    def why(self) -> str:
        """Why what has vested is not all claimable; "" where it is."""
        from trainchain.chain.collecting import when

        standing = self.standing
        if standing.pending > max(standing.leaf, standing.paid):
            return f"settled, active from {when(standing.job.pending_at)}"
        return standing.why


@dataclass
class Survey:
    """Everything that is known of a wallet's pay."""

    wallet: Wallet
    papers: Papers
    sources: list[Source]
    found: list[Found]
    failures: list[Failure]
    missed: list[str]
    """Jobs that papers lie here of, and that nothing could be found out about."""
    chains: _Chains

    def chain_of(self, source: Source) -> ChainClient:
        return self.chains.of(source.place, source.place.escrow)


@contextlib.contextmanager
def survey(
    settings: Settings,
    out: Output,
    *,
    only: bool,
    job: str | None = None,
    redeem: str = "",
    now: Callable[[], float] = time.time,
    wallet: Wallet | None = None,
    dial: Dial | None = None,
) -> Iterator[Survey]:
    """Look at every job of this home, or at one: `only` at the settings' hub. One bad job or hub stops no other.

    `redeem` says why vouchers are used where the hub would settle; where a hub does not answer, that is why. `wallet`
    and `dial` are this home's wallet, and how a hub is reached as it.
    """
    with contextlib.ExitStack() as stack:
        yield _survey(stack, settings, out, only, job, redeem, now(), wallet, dial or _dial)


def _survey(
    stack: contextlib.ExitStack,
    settings: Settings,
    out: Output,
    only: bool,
    job: str | None,
    redeem: str,
    now: float,
    wallet: Wallet | None,
    dial: Dial,
) -> Survey:
    from trainchain.chain.collecting import Mirror
    from trainchain.core.worker.paybook import Papers

    def call(settings: Settings, wallet: Wallet | None) -> HubClient:
        client = dial(settings, wallet)
        stack.callback(client.close)
        return client

    failures: list[Failure] = []
    sources = _sources(settings, only, call, failures)
    if wallet is None and not settings.wallet_path.exists() and not any(source.client for source in sources):
        raise failures[0].error if failures else _no_wallet(settings)
    wallet = wallet or wiring.open_wallet(settings, out)
    papers, mirror = Papers(settings.home, wallet.address), Mirror(settings.home / "leaves")
    chains, bad, known = _Chains(stack), set(), hubs.known(settings)
    for at, source in enumerate(sources):
        try:  # a hub whose chain is not what it should be is told of, whether or not anything was earned there
            chains.of(source.place, source.place.escrow)
            _ask(source, settings, wallet, call, failures)
        except TrainChainError as error:
            failures.append(Failure(source.url, error))
            before = known.get(source.url)
            if source.client is not None and before is not None and before != source.place:
                sources[at] = Source(source.url, before, None)  # it was another one: what it said then still stands
            else:
                bad.add(source.url)
    found = []
    for job_id, source in _jobs(papers, sources, only, failures):
        name = str(source.earned.get(job_id, {}).get("name") or job_id[:12])
        if (job is not None and not (job_id.startswith(job) or name == job)) or source.url in bad:
            continue
        try:
            ties = papers.ties(job_id)
            chain = chains.of(source.place, ties.escrow if ties else source.place.escrow)
            _bring_up_to_date(settings, source, wallet, chain, mirror, job_id, failures)
            found.append(_look(source, wallet, chain, papers, mirror, job_id, name, redeem, now))
        except TrainChainError as error:
            failures.append(Failure(job_id, error))
    told = {(failure.what, failure.error.code) for failure in failures}
    doubts = [Failure(one.job, one.standing.doubt) for one in found if one.standing.doubt is not None]
    failures += [doubt for doubt in doubts if (doubt.what, doubt.error.code) not in told]
    told_of = {one.job for one in found}
    if job is not None:  # what is wrong with another one is not asked now
        failures = [
            one for one in failures if not one.what.startswith("0x") or one.what.startswith(job) or one.what in told_of
        ]
    if job is not None and not found and not failures:
        raise TrainChainError("job.unknown", f"This wallet has earned nothing in a job {job[:80]!r}.")
    looked = {one.job for one in found}
    missed = [] if only or job is not None else [one for one in papers.jobs() if one not in looked]
    return Survey(wallet, papers, sources, found, failures, missed, chains)


class _Chains:
    """Each chain and escrow is connected to once."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._open: dict[tuple[str, str], ChainClient | TrainChainError] = {}

    def of(self, place: Place, escrow: str) -> ChainClient:
        key = place.rpc, escrow.lower()
        if key not in self._open:
            try:
                self._open[key] = chain = wiring.chain_at(place.rpc, place.chain_id, escrow)
                self._stack.callback(chain.close)
            except TrainChainError as error:
                self._open[key] = error
        found = self._open[key]
        if isinstance(found, TrainChainError):
            raise found
        return found


def _dial(settings: Settings, wallet: Wallet | None) -> HubClient:
    return wiring.hub_client(settings, wallet, attempts=2)


def _sources(settings: Settings, only: bool, dial: Dial, failures: list[Failure]) -> list[Source]:
    """The hubs there are; one that never answered here and does not now is a failure."""
    known, found = hubs.known(settings), []
    for url in hubs.addresses(settings, only=only):
        client = dial(replace(settings, hub=url), None)
        try:
            found.append(Source(url, hubs.place_of(client), client))
        except TrainChainError as error:
            if url in known and error.exit_code == 3:
                found.append(Source(url, known[url], None))
            else:
                failures.append(Failure(url, error))
    return found


def _ask(source: Source, settings: Settings, wallet: Wallet, dial: Dial, failures: list[Failure]) -> None:
    """Sign in, and hear what the hub says that this wallet has earned."""
    if source.client is None:
        return
    source.client = dial(replace(settings, hub=source.url), wallet)
    try:
        answer = source.client.get("/v1/earned", signed=True)
        found = parse(Told, {"jobs": answer.get("jobs")}, code="hub.not_a_hub", what="What the hub says was earned")
        source.earned = {row.job: row.model_dump(mode="json") for row in found.jobs}
        source.heard = True
    except TrainChainError as error:
        failures.append(Failure(source.url, error))


def _jobs(papers: Papers, sources: list[Source], only: bool, failures: list[Failure]) -> Iterable[tuple[str, Source]]:
    """Every job that this disk or a hub knows of, with the hub that fits its papers best: of the same chain."""
    here = papers.jobs()
    for job in here:
        ties = papers.ties(job)
        assert ties is not None
        fitting = [source for source in sources if source.place.chain_id == ties.chain_id]
        fitting.sort(key=lambda one: (one.place.hub.lower() != ties.hub.lower(), job not in one.earned))
        if fitting and (not only or fitting[0].place.hub.lower() == ties.hub.lower()):
            yield job, fitting[0]
        elif not only:
            why = f"No hub is known here whose chain is {ties.chain_id}, where the pay of job {job} lies."
            failures.append(Failure(job, TrainChainError("hub.unreachable", why, hint="trainchain claim --hub URL")))
    for source in sources:
        for job in sorted(set(source.earned) - set(here)):
            yield job, source


def _bring_up_to_date(
    settings: Settings,
    source: Source,
    wallet: Wallet,
    chain: ChainClient,
    mirror: Mirror,
    job: str,
    failures: list[Failure],
) -> None:
    """Fetch the newest voucher and settlement from a hub that answers, so that they are here when it does not."""
    if source.client is None:
        return
    book, client = wiring.paybook_of(settings, wallet, chain, chain.job(job).hub), source.client

    def newest_voucher() -> None:
        before = book.receipts(job)
        book.keep_answer(job, client.get(f"/v1/jobs/{job}/voucher", signed=True), before)

    hubs.remember(settings, client)
    for bring in (newest_voucher, lambda: mirror.update(chain, job, wallet.address, client.object)):
        try:
            bring()
        except TrainChainError as error:
            failures.append(Failure(job, error))


def _look(
    source: Source,
    wallet: Wallet,
    chain: ChainClient,
    papers: Papers,
    mirror: Mirror,
    job: str,
    name: str,
    redeem: str,
    now: float,
) -> Found:
    from trainchain.chain.collecting import Known, plan

    def away(digest: str) -> bytes:
        raise TrainChainError(
            "hub.unreachable",
            f"The hub {source.url} does not answer, and the leaves file {digest[:12]} of its settlement is not here.",
            hint="Try again later; what has a voucher is paid without it.",
        )

    voucher = papers.voucher(job)
    kept = (voucher.cumulative, voucher.signature) if voucher else None
    known = Known(job, list(mirror.read(job).values()), kept)
    bring = source.client.object if source.client else away
    because = redeem or ("" if source.client else "the hub does not answer")
    standing = plan(chain, wallet.address, known, bring, now=now, redeem=because)
    told = source.earned.get(job, {})
    fees = told.get("fees", {})
    stands = sum(int(part.get("accepted", 0)) - int(part.get("forfeited", 0)) for part in (told, fees))
    accepted = max(papers.earned(job), stands)
    vested = max(papers.vested(job), int(told.get("vested", 0)))
    places = [receipt.place for receipt in papers.receipts(job)] + [row["place"] for row in told.get("shards", [])]
    waits = min(VESTING, max(0, 1 + VESTING - max(places, default=0))) or 1
    return Found(job, name, source, chain, standing, accepted, vested, waits, papers.verdicts(job))


def _no_wallet(settings: Settings) -> TrainChainError:
    return TrainChainError(
        "wallet.missing", f"There is no wallet in {settings.home}: nothing was earned from here.", hint="--home DIR"
    )
