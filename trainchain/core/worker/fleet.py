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
    # Not Thread.join and is_alive: a signal in the middle of a join makes Python 3.11 take the thread for ended.
    ended = [threading.Event() for _ in workers]

    def one(worker: Hand, end: threading.Event) -> None:
        try:
            worker.run(quota)
        except Stopped:
            pass
        except BaseException as error:
            failures.append(error)
        finally:
            end.set()

    try:
        for pair in zip(workers, ended, strict=True):
            threading.Thread(target=one, args=pair, name="worker", daemon=True).start()
        while not failures and not all(end.is_set() for end in ended):
            next((end for end in ended if not end.is_set()), ended[0]).wait(LOOK_SECONDS)
    finally:
        for worker in workers:
            worker.stop()
        _wait_until_idle(workers, ended)
    if failures:
        raise failures[0]


def _wait_until_idle(workers: Sequence[Hand], ended: Sequence[threading.Event]) -> None:
    """Until no worker holds a lease. Those that wait for one at the hub's end with the process."""
    until = time.monotonic() + STOP_SECONDS
    for worker, end in zip(workers, ended, strict=True):
        while worker.busy and not end.is_set() and time.monotonic() < until:
            end.wait(LOOK_SECONDS)
