"""The hub's two background threads: one moves rounds, one moves money, so that a slow chain never holds up a merge."""

import logging
import threading
from collections.abc import Callable
from functools import partial

from trainchain.core.hub import audits, cashier, leases, rounds
from trainchain.core.hub.service import Hub

log = logging.getLogger(__name__)

ROUNDS_SECONDS = 1.0
MONEY_SECONDS = 5.0
RETRY_SECONDS = 2.0
AWAY_SECONDS = 60.0
"""Between two ticks: with more the hub slept, or its clock was set, and nobody could answer it meanwhile."""


class Steward:
    """Ticks when the bell rings, and at least every few seconds. Every tick may be killed at any instruction."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._ticked = hub.clock()
        self._stop = threading.Event()
        money = partial(cashier.tick, hub)
        self._threads = [
            threading.Thread(target=self._run, args=(self.tick, ROUNDS_SECONDS), name="rounds", daemon=True),
            threading.Thread(target=self._run, args=(money, MONEY_SECONDS), name="cashier", daemon=True),
        ]

    def start(self) -> None:
        self._extend()
        for thread in self._threads:
            thread.start()

    def tick(self) -> bool:
        """Move rounds; after the hub was away nothing ends for want of what it could not have heard."""
        now = self._hub.clock()
        if now - self._ticked > AWAY_SECONDS:
            log.warning(
                "the hub was away for %.0f s: what was due meanwhile is given its time again", now - self._ticked
            )
            self._extend()
        moved = rounds.tick(self._hub)
        self._ticked = self._hub.clock()  # a long merge is no absence
        return moved

    def _extend(self) -> None:
        self._ticked = self._hub.clock()
        leases.extend_all(self._hub)
        audits.extend_all(self._hub)

    def stop(self) -> None:
        self._stop.set()
        self._hub.bell.close()
        for thread in self._threads:
            thread.join(timeout=10)

    def _run(self, tick: Callable[[], bool], seconds: float) -> None:
        rung = threading.Event()
        self._hub.bell.listen(rung.set)
        while not self._stop.is_set():
            rung.clear()
            try:
                if tick():
                    continue
            except Exception:
                log.exception("a tick of %s failed; it will be tried again", threading.current_thread().name)
                self._stop.wait(RETRY_SECONDS)
            rung.wait(seconds)
