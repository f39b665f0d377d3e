"""Several devices of one machine: a child and a client each, one wallet; what stops one, stops all."""

import _thread
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fixtures_hub import Town
from tests.integration.worker.conftest import Bench
from trainchain.core.hub import schema
from trainchain.core.worker import fleet
from trainchain.core.worker.devices import environment_of
from trainchain.core.worker.fleet import Quota, Stopped


def test_two_children_of_one_wallet_share_a_job(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=1, shards=6)
    together, met = threading.Barrier(2), set()

    def wait_for_the_other(event: dict[str, object]) -> None:
        if event["event"] == "leased" and threading.get_ident() not in met:
            met.add(threading.get_ident())
            together.wait(60)

    workers = [
        bench.worker(job=job.id, device=f"gpu-{one}", environment=environment_of(one), on_event=wait_for_the_other)
        for one in ("0", "1")
    ]
    fleet.run(workers, 6)

    trained = bench.asked("train")
    assert {request["cuda"] for request in trained} == {"0", "1"}
    assert len({request["pid"] for request in trained}) == 2
    places = [Path(request["states"]).relative_to(bench.home / "work").parts[0] for request in trained]
    assert places == [f"gpu-{request['cuda']}" for request in trained]
    assert sorted(request["shard"] for request in trained) == list(range(6))
    assert {row["worker"] for row in town.rows(schema.contributions, job=job.id)} == {bench.person.address}
    assert job.shards(1) == ["accepted"] * 6


def test_an_interrupt_gives_every_lease_back(town: Town, bench: Bench) -> None:
    job = town.publish(rounds=1, shards=2)
    bench.plan(*[{"op": "train", "segment": 2, "code": "hang"}] * 2)
    reached = threading.Barrier(3)

    def note(event: dict[str, object]) -> None:
        if event["event"] == "step":
            reached.wait(60)

    workers = [bench.worker(job=job.id, device=f"gpu-{one}", on_event=note, sleep=None) for one in ("0", "1")]

    class Interrupted(BaseException):
        pass

    @dataclass
    class Interrupter:
        """Fails as soon as both are in mid-shard, as an interrupt would from outside."""

        busy: bool = False

        def run(self, quota: Quota) -> None:
            reached.wait(60)
            raise Interrupted

        def stop(self) -> None:
            pass

    with pytest.raises(Interrupted):
        fleet.run([*workers, Interrupter()], None)

    assert [row["state"] for row in town.rows(schema.leases, job=job.id)] == ["expired", "expired"]
    assert len(bench.told("given_back")) == 2
    assert all(not worker.busy for worker in workers)


@dataclass
class Toy:
    """Does its shards one after the other; those in `failing` fail once."""

    work: Callable[[], bool]
    done: list[int] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)
    busy: bool = False

    def run(self, quota: Quota) -> None:
        while quota.take():
            if self.stopped.is_set():
                raise Stopped
            if self.work():
                self.done.append(1)
            else:
                quota.give_back()

    def stop(self) -> None:
        self.stopped.set()


def test_so_many_shards_are_done_by_all_together() -> None:
    tries = iter([False, True] * 100)
    lock = threading.Lock()

    def work() -> bool:
        with lock:
            return next(tries)

    toys = [Toy(work) for _ in range(4)]
    fleet.run(toys, 17)

    assert sum(len(toy.done) for toy in toys) == 17


def test_one_that_ends_for_good_ends_all() -> None:
    def fail() -> bool:
        raise OSError("the disk is gone")

    idle = Toy(lambda: time.sleep(0.01) is not None)

    with pytest.raises(OSError, match="the disk is gone"):
        fleet.run([idle, Toy(fail)], None)

    assert idle.stopped.is_set()


@dataclass
class Slow:
    """Holds a lease until it is told to stop, and gives it back in its time; may interrupt the main thread before."""

    interrupts: bool
    gave_back: bool = False
    stopped: threading.Event = field(default_factory=threading.Event)
    busy: bool = False

    def run(self, quota: Quota) -> None:
        self.busy = True
        if self.interrupts:
            _thread.interrupt_main()
        self.stopped.wait(30)
        for _ in range(1000):
            os.sched_yield()
        self.gave_back = True
        self.busy = False

    def stop(self) -> None:
        self.stopped.set()


@pytest.mark.parametrize("attempt", range(5))
def test_a_signal_in_whatever_moment_waits_for_every_lease_to_be_given_back(attempt: int) -> None:
    slow = [Slow(False), Slow(True)]

    with pytest.raises(KeyboardInterrupt):
        fleet.run(slow, None)

    assert all(worker.gave_back for worker in slow)
