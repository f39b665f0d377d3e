"""What every verb of the hub stands on: state, objects, chain, clock, and the bell that wakes waiters."""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema
from trainchain.core.hub.store import Row, Store, one
from trainchain.core.models import ResolvedRecipe
from trainchain.core.objects import ObjectStore
from trainchain.core.rewards import Terms
from trainchain.core.seal import ExchangeKey
from trainchain.core.segments import StateDigests

log = logging.getLogger(__name__)

LEASE_SECONDS = 20.0
"""How long a lease lives without a beat; what a killed worker costs the round."""


JUDGES = 2
"""Audits that are judged at once: each reads states of many megabytes."""


@dataclass(frozen=True)
class EscrowJob:
    """A job as the escrow holds it; amounts in token units, times in unix seconds."""

    owner: str
    token: str
    hub: str
    deadline: int
    grace: int
    activation_delay: int
    round_cap: int
    spec_hash: str
    funded: int
    free: int
    """What is neither settled nor given back."""
    advances: int
    """What vouchers paid and no leaf has counted yet: reserved twice."""
    round: int
    """The number of the last settlement."""
    pending_at: int
    """When the last root becomes active; no other is taken before."""
    halted: bool
    next_hub: str = ""
    """Whom its owner has named to settle in place of `hub`; "" for nobody, or the same."""


@dataclass(frozen=True)
class Settlement:
    """What goes on chain for a settlement: the Merkle root, and the file of its leaves."""

    root: str
    total: int
    leaves: bytes


class Claim(NamedTuple):
    """One leaf of an active root."""

    job: str
    account: str
    cumulative: int
    proof: list[str]


class Chain(Protocol):
    """What the hub needs of a chain; given by the composition root, so core never imports chain."""

    chain_id: int
    escrow: str
    token: str
    address: str
    """The hub's own account: the `hub` that job parameters must name."""
    relays: bool
    """Whether it sends anybody's claims with its own gas."""

    def job_id(self, owner: str, salt: str) -> str: ...
    def job(self, job_id: str) -> EscrowJob | None: ...
    def recover(self, kind: str, message: Mapping[str, Any], signature: str) -> str: ...
    def recover_sign_in(self, fields: Mapping[str, Any], signature: str) -> str: ...
    def sign(self, kind: str, message: Mapping[str, Any]) -> str: ...
    def settlement(self, job_id: str, terms: Terms, amounts: Mapping[str, int]) -> Settlement: ...
    def settle(self, job_id: str, number: int, leaves: bytes) -> str: ...
    def would_pay(self, claims: Sequence[Claim]) -> list[int]: ...
    def claim_many(self, claims: Sequence[Claim]) -> tuple[str | None, list[int]]: ...
    def count_advances(self, job_id: str, leaves: bytes) -> str | None: ...
    def drip(self, address: str, tokens: int) -> dict[str, str]: ...
    def rpc(self, body: bytes) -> bytes: ...
    def describe(self) -> dict[str, Any]: ...


class Bell:
    """Wakes whoever waits for the hub's state to change; listeners are called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: set[Callable[[], None]] = set()
        self.closed = False
        """The process is ending: nobody should wait any longer."""

    def listen(self, listener: Callable[[], None]) -> None:
        with self._lock:
            self._listeners.add(listener)

    def forget(self, listener: Callable[[], None]) -> None:
        with self._lock:
            self._listeners.discard(listener)

    def close(self) -> None:
        self.closed = True
        self.ring()

    def ring(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()


@dataclass
class Hub:
    """One hub process. Everything that must survive it is in `store` and `objects`."""

    store: Store
    objects: ObjectStore
    chain: Chain
    clock: Callable[[], float] = time.time
    random_hex: Callable[[int], str] = secrets.token_hex
    evaluators: frozenset[str] = frozenset()
    """Wallets of this hub's own evaluating children: nobody else gets an `evaluate` lease."""
    exchange: ExchangeKey = field(kw_only=True)
    """What owners wrap the keys of sealed files for; another one after a restart opens none of them."""
    relay_lock: threading.Lock = field(default_factory=threading.Lock)
    relayed: dict[str, float] = field(default_factory=dict)
    """When the last claim of an account was sent."""
    relaying: int = 0
    """How many are being sent."""
    looked: dict[str, float] = field(default_factory=dict)
    """When the escrow of a running job was last looked at."""
    idle: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """What of a running job there was nothing to settle of (core/hub/earnings.py, `mark`)."""
    bell: Bell = field(default_factory=Bell)
    state_digests: dict[str, StateDigests] = field(default_factory=dict)
    """Of the last states that were uploaded, by their objects: whoever opens a leaf wrongly costs no reading."""
    _judges: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(JUDGES))
    _judged: set[str] = field(default_factory=set)
    _judged_lock: threading.Lock = field(default_factory=threading.Lock)
    _recipes: dict[str, ResolvedRecipe] = field(default_factory=dict)
    _shapes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)

    @contextmanager
    def judging(self, lease_id: str) -> Iterator[None]:
        """What is sent under a lease is judged once at a time, and a few at once in all. Raises `hub.failed` for who
        sends the same before it was answered."""
        with self._judged_lock:
            if lease_id in self._judged:
                raise TrainChainError(
                    "hub.failed", f"What was sent under the lease {lease_id} is being judged.", hint="Try again."
                )
            self._judged.add(lease_id)
        try:
            with self._judges:
                yield
        finally:
            with self._judged_lock:
                self._judged.discard(lease_id)

    def introduction(self) -> dict[str, str]:
        """The exchange key, signed by the wallet that the escrow knows the hub by."""
        public = self.exchange.public
        message = {"account": self.chain.address, "publicKey": "0x" + public}
        return {"public_key": public, "signature": self.chain.sign("ExchangeKey", message)}

    def recipe(self, job: Row) -> ResolvedRecipe:
        """The job's resolved recipe, parsed once a process."""
        found = self._recipes.get(job["id"])
        if found is None:
            found = self._recipes[job["id"]] = ResolvedRecipe.model_validate_json(job["recipe"], strict=True)
        return found

    def shapes(self, job: Row) -> dict[str, tuple[int, ...]]:
        """The adapter's tensors, read once from the job's initial adapter."""
        from trainchain.core.adapter import read_adapter

        found = self._shapes.get(job["id"])
        if found is None:
            initial = read_adapter(self.objects.get(self.recipe(job).lora.initial.sha256))
            found = self._shapes[job["id"]] = {name: tensor.shape for name, tensor in initial.items()}
        return found

    def job(self, job_id: str) -> Row:
        with self.store.read() as db:
            row = one(db, schema.jobs, id=job_id)
        if row is None:
            raise TrainChainError("job.unknown", f"This hub has no job {job_id}.")
        return row


def attempt(step: Callable[[Hub, Row], bool], hub: Hub, job: Row) -> bool:
    """One step for one job; a failure is logged and tried again later, and never holds up another job."""
    try:
        return step(hub, job)
    except TrainChainError as error:
        log.warning("job %s: %s: %s", job["id"], error.code, error.message)
    except Exception:
        log.exception("job %s: %s failed", job["id"], step.__name__)
    return False
