"""What earlier work left on this disk and nobody needs any more."""

from collections.abc import Callable
from typing import Any

from trainchain.core.client import HubClient
from trainchain.core.errors import TrainChainError
from trainchain.core.states import Job
from trainchain.core.worker.bench import Bench
from trainchain.core.worker.cache import Cache
from trainchain.core.worker.faults import AWAY

GOING_ON = frozenset({Job.UNFUNDED, Job.OPEN, Job.RUNNING})


class Tidying:
    """Of one device's bench, and of private jobs' files in the cache that its workers share."""

    def __init__(
        self, client: HubClient, bench: Bench, cache: Cache, close: Callable[[], None], on_event: Callable[..., None]
    ) -> None:
        """`close` lets go of the job that is open."""
        self._client, self._bench, self._cache = client, bench, cache
        self._close, self._tell = close, on_event

    def rounds(self) -> None:
        """Throw away what earlier runs left of rounds and jobs that are over."""
        for job in self._bench.jobs():
            try:
                view: dict[str, Any] = self._client.get(f"/v1/jobs/{job}")
            except TrainChainError as error:
                if error.code in AWAY:
                    return
                continue  # another hub's job
            self._bench.clear(job, before=int(view["round"]) if view.get("state") in GOING_ON else None)

    def private(self, *, but: str | None = None) -> None:
        """Remove what lies here of private jobs that are over, `but` the one at hand; another worker who uses the
        same cache may be at one, and removes it later. One that has finished is still measured and audited."""
        for job in self._cache.private_jobs():
            if job == but:
                continue
            try:
                state = self._client.get(f"/v1/jobs/{job}").get("state")
            except TrainChainError:
                continue  # the hub is away, or it is another hub's job
            if state not in {*GOING_ON, Job.FINISHED}:
                if but is None:
                    self._close()
                if self._cache.forget(job):
                    self._bench.clear(job)
                    self._tell("forgotten", job=job)
