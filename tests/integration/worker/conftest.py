"""A worker against a real hub, with a child that needs no torch and fails where the test says so."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fixtures_child
from tests.fixtures_hub import Person, Town
from trainchain.chain.wallet import Wallet
from trainchain.cli import wiring
from trainchain.core.settings import Settings
from trainchain.core.worker.agent import Worker
from trainchain.core.worker.cache import Cache
from trainchain.core.worker.child import Child, child_environment
from trainchain.core.worker.dues import Dues, Limit
from trainchain.core.worker.fleet import Quota
from trainchain.core.worker.keys import Exchange


class Bench:
    """One worker's home, wallet and notes; every `worker` on it is as a new process."""

    def __init__(self, town: Town, root: Path, wallet: Wallet | None = None) -> None:
        self.town = town
        self.home, self.notes = root / "home", root / "notes"
        self.notes.mkdir(parents=True)
        self.person = Person(town, wallet or town.person().wallet)
        self.events: list[dict[str, Any]] = []
        self._open: list[Any] = []

    def close(self) -> None:
        for one in self._open:
            one.close()

    def plan(self, *items: dict[str, Any]) -> None:
        """What is to go wrong, each once."""
        (self.notes / "plan.json").write_text(json.dumps(items), encoding="utf-8")

    @property
    def requests(self) -> list[dict[str, Any]]:
        path = self.notes / "requests.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def asked(self, op: str) -> list[dict[str, Any]]:
        return [request for request in self.requests if request["op"] == op]

    def told(self, event: str) -> list[dict[str, Any]]:
        return [one for one in self.events if one["event"] == event]

    def worker(
        self,
        *,
        job: str | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        environment: dict[str, str] | None = None,
        limit: Limit | None = None,
        **options: Any,
    ) -> Worker:
        def note(event: dict[str, Any]) -> None:
            self.events.append(event)
            if on_event is not None:
                on_event(event)

        client = self.person.client()
        chain = wiring.chain_of(client)
        self._open += [client, chain]
        told = client.info()["chain"]
        command = [sys.executable, fixtures_child.__file__, str(self.notes)]
        child = Child(command, child_environment(1) | (environment or {}), self.home / "trainer.log")
        return Worker(
            client,
            self.home,
            child,
            sign=wiring.work_signer(self.person.wallet, chain),
            signed=wiring.promise_checker(chain, told["hub"]),
            check_job=wiring.job_checker(chain, told, now=self.town.clock),
            dues=Dues(
                client,
                wiring.paybook_of(Settings(self.home, ""), self.person.wallet, chain, told["hub"]),
                wiring.onlooker(Settings(self.home, ""), self.person.wallet, chain, client),
                wiring.window_of(self.person.wallet, chain),
                note,
                limit=limit,
                now=self.town.clock,
            ),
            on_event=note,
            exchange=Exchange(*wiring.exchange_of(Settings(self.home, ""), self.person.wallet, chain), chain.chain_id),
            job=job,
            **{"sleep": lambda _: None, "cache": Cache(self.home / "cache", on_event=note), **options},
        )

    def work(self, job: str, shards: int = 1, **options: Any) -> None:
        self.worker(job=job, **options).run(Quota(shards))

    def left(self) -> set[str]:
        """Files of shards in work."""
        work = self.home / "work"
        return {path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    made = Town(tmp_path_factory.mktemp("town"))
    yield made
    made.close()


@pytest.fixture
def bench(town: Town, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(town, tmp_path)
    yield made
    made.close()


@pytest.fixture
def evaluator(town: Town, tmp_path: Path) -> Iterator[Bench]:
    """The hub's own worker."""
    made = Bench(town, tmp_path / "evaluator", town.evaluator_keys)
    yield made
    made.close()
