"""The hub's two background threads: one moves rounds, one moves money, so that a slow chain never holds up a merge."""

import logging
import threading
from collections.abc import Callable

from trainchain.core.hub import cashier, leases, rounds
from trainchain.core.hub.service import Hub

log = logging.getLogger(__name__)

ROUNDS_SECONDS = 1.0
MONEY_SECONDS = 5.0
RETRY_SECONDS = 2.0


class Steward:
    """Ticks when the bell rings, and at least every few seconds. Every tick may be killed at any instruction."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(rounds.tick, ROUNDS_SECONDS), name="rounds", daemon=True),
            threading.Thread(target=self._run, args=(cashier.tick, MONEY_SECONDS), name="cashier", daemon=True),
        ]

    def start(self) -> None:
        leases.extend_all(self._hub)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._hub.bell.close()
        for thread in self._threads:
            thread.join(timeout=10)

    def _run(self, tick: Callable[[Hub], bool], seconds: float) -> None:
        rung = threading.Event()
        self._hub.bell.listen(rung.set)
        while not self._stop.is_set():
            rung.clear()
            try:
                if tick(self._hub):
                    continue
            except Exception:
                log.exception("a tick of %s failed; it will be tried again", tick.__module__)
                self._stop.wait(RETRY_SECONDS)
            rung.wait(seconds)
