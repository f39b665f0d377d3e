"""The beat that keeps a lease while its shard is trained."""

import threading
from typing import Any

from trainchain.core.client import HubClient
from trainchain.core.errors import TrainChainError

BEAT_SECONDS = 5.0
OVER = frozenset({"shard.already_accepted", "contribution.too_late", "job.closed", "lease.not_yours", "lease.unknown"})


class Heart:
    """Beats for one lease in a thread of its own. `over` is set when the hub says the work is no longer wanted."""

    def __init__(self, client: HubClient, lease_id: str) -> None:
        self.progress: dict[str, Any] = {}
        self.over: TrainChainError | None = None
        self._client = client
        self._lease = lease_id
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def __enter__(self) -> "Heart":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=1)

    def _run(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            try:
                self._client.post(f"/v1/leases/{self._lease}/beat", self.progress)
            except TrainChainError as error:
                if error.code in OVER:
                    self.over = error
                    return
