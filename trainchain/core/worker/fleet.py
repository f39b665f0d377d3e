"""Several devices of one machine: a worker in a thread of its own for each, all of one wallet."""

import threading
import time
from collections.abc import Sequence
from typing import Protocol

STOP_SECONDS = 10.0
LOOK_SECONDS = 0.2


class Stopped(BaseException):
    """A worker was told to stop from another thread: what an interrupt is to a worker in the main one."""


class Quota:
    """How many shards are still to be done, by all workers together; None is without end."""

    def __init__(self, shards: int | None) -> None:
        self._left = shards
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Set one aside before asking for it."""
        with self._lock:
            if self._left is None:
                return True
            if self._left == 0:
                return False
            self._left -= 1
            return True

    def give_back(self) -> None:
        """It was not done."""
        with self._lock:
            if self._left is not None:
                self._left += 1


class Hand(Protocol):
    """A worker, as far as a fleet needs to know it. `busy` while it holds a lease."""

    busy: bool

    def run(self, quota: Quota) -> None: ...
    def stop(self) -> None: ...


def run(workers: Sequence[Hand], shards: int | None) -> None:
    """Let all work until interrupted, or until `shards` are done; what ends one for good ends all.

    A single worker runs in this thread.
    """
    quota = Quota(shards)
    if len(workers) == 1:
        workers[0].run(quota)
        return
    failures: list[BaseException] = []

    def one(worker: Hand) -> None:
        try:
            worker.run(quota)
        except Stopped:
            pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(worker,), name="worker", daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        while not failures and any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(LOOK_SECONDS)
    finally:
        for worker in workers:
            worker.stop()
        _wait_until_idle(workers, threads)
    if failures:
        raise failures[0]


def _wait_until_idle(workers: Sequence[Hand], threads: Sequence[threading.Thread]) -> None:
    """Until no worker holds a lease. Those that wait for one at the hub's end with the process."""
    until = time.monotonic() + STOP_SECONDS
    for worker, thread in zip(workers, threads, strict=True):
        while worker.busy and thread.is_alive() and time.monotonic() < until:
            thread.join(LOOK_SECONDS)
