"""The worker: lease, fetch, train, sign, contribute, keep the receipt. It only ever dials out.

Imports no torch and no chain: the trainer is a child process, and signing is a function that is passed in.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainchain.core.client import HubClient
from trainchain.core.digests import sha256_file
from trainchain.core.errors import TrainChainError
from trainchain.core.models import Lease, ResolvedRecipe, parse
from trainchain.core.rewards import shard_reward
from trainchain.core.settings import private_folder, write_private
from trainchain.core.worker.child import Child
from trainchain.core.worker.files import Cache, JobFiles

BEAT_SECONDS = 5.0
POLL_SECONDS = 20.0
AWAY_SECONDS = 2.0
LONGEST_SECONDS = 120.0
OVER = frozenset({"shard.already_accepted", "round.closed", "job.closed", "lease.not_yours", "lease.unknown"})
AWAY = frozenset({"hub.unreachable", "hub.failed", "chain.unreachable"})

OnEvent = Callable[[dict[str, Any]], None]
Sign = Callable[[Mapping[str, Any]], str]
CheckJob = Callable[[str, str], None]
"""(job id, spec hash): raises unless the escrow on chain holds that job's money under that recipe."""
CheckReceipt = Callable[[Mapping[str, Any], str], bool]
"""(the Receipt's fields as they should be, its signature): whether the hub of the escrow signed exactly this."""


class Worker:
    """One device's worker. An interrupt (Ctrl-C, SIGTERM) gives the lease back on its way out."""

    def __init__(
        self,
        client: HubClient,
        home: Path,
        child: Child,
        *,
        sign: Sign,
        check_job: CheckJob,
        check_receipt: CheckReceipt,
        on_event: OnEvent,
        job: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._client = client
        self._home = home
        self._child = child
        self._sign = sign
        self._check_job = check_job
        self._check_receipt = check_receipt
        self._on_event = on_event
        self._sleep = sleep
        self._job = job
        self._cache = Cache(home / "cache")
        self._open: str | None = None
        self._failures = 0

    def run(self, *, shards: int | None = None) -> None:
        """Work until interrupted, or until `shards` leases are done."""
        done = 0
        waiting = False
        try:
            while shards is None or done < shards:
                lease = self._lease()
                if lease is None:
                    if not waiting:
                        self._tell("waiting", reason="no shard is open")
                    waiting = True
                    continue
                waiting = False
                if self._work(lease):
                    done += 1
        finally:
            self._child.stop()

    def _lease(self) -> Lease | None:
        body: dict[str, Any] = {"wait": POLL_SECONDS}
        if self._job:
            body["job"] = self._job
        try:
            found = self._client.post("/v1/leases", body)
            return parse(Lease, found, code="hub.not_a_hub", what="The hub's lease") if found else None
        except TrainChainError as error:
            if error.code not in AWAY:
                raise
            self._tell("away", code=error.code, message=error.message)
            self._sleep(AWAY_SECONDS)
            return None

    def _work(self, lease: Lease) -> bool:
        """One lease from beginning to end; whatever goes wrong is told, and the lease goes back.

        Failures in a row wait longer and longer, so that a machine that cannot do a job does not hold it up.
        """
        self._tell("leased", **lease.model_dump(include={"lease", "kind", "job", "name", "round", "shard"}))
        with _Heart(self._client, lease.lease) as heart:
            try:
                self._check_job(lease.job, lease.spec_hash)
                files = self._prepare(lease)
                if lease.kind == "evaluate":
                    self._evaluate(lease, files)
                else:
                    self._train(lease, files, heart)
                self._failures = 0
                return True
            except TrainChainError as error:
                self._tell("failed", lease=lease.lease, code=error.code, message=error.message, hint=error.hint)
                if error.code not in OVER:
                    self._give_back(lease)
                    self._sleep(min(AWAY_SECONDS * 2**self._failures, LONGEST_SECONDS))
                    self._failures += 1
                return False
            except BaseException:
                self._child.stop()
                self._client.attempts = 1
                self._give_back(lease)
                raise

    def _prepare(self, lease: Lease) -> JobFiles:
        files = self._cache.job(self._client, lease.job, lease.spec_hash, held_out=lease.kind == "evaluate")
        if self._open != lease.job or not self._child.alive:
            request = {
                "op": "open",
                "recipe": str(files.recipe_path),
                "model_dir": str(files.model_dir),
                "data": {digest: str(path) for digest, path in files.data.items()},
            }
            self._open = None
            self._child.answer(request)
            self._open = lease.job
        return files

    def _evaluate(self, lease: Lease, files: JobFiles) -> None:
        adapter = self._start(lease, files.recipe)
        result = self._child.answer({"op": "evaluate", "adapter": str(adapter)})
        self._insist("POST", f"/v1/leases/{lease.lease}/evaluation", {"loss": result["loss"]})
        self._tell("evaluated", job=lease.job, round=lease.round, loss=result["loss"])

    def _start(self, lease: Lease, recipe: ResolvedRecipe) -> Path:
        """The adapter a lease starts from: as large as the job's initial one, since it has the same tensors."""
        return self._cache.object(self._client, lease.start, recipe.lora.initial.size)

    def _train(self, lease: Lease, files: JobFiles, heart: "_Heart") -> None:
        out = private_folder(self._home / "work" / lease.lease[2:18])
        start = self._start(lease, files.recipe)
        began = time.monotonic()
        result: dict[str, Any] = {}
        request = {
            "op": "train",
            "start": str(start),
            "round": lease.round,
            "shard": lease.shard,
            "lease": lease.lease,
            "out": str(out),
        }
        for event in self._child.ask(request):
            if heart.over is not None:
                self._child.stop()
                raise heart.over
            if event["event"] == "step":
                speed = event["tokens"] / max(time.monotonic() - began, 1e-6)
                heart.progress = {"step": event["step"], "steps": event["steps"], "tokens_per_second": speed}
                self._tell("step", round=lease.round, shard=lease.shard, **heart.progress)
            result = event
        self._contribute(lease, files.recipe, result, time.monotonic() - began)
        for path in sorted(out.iterdir()):
            path.unlink()
        out.rmdir()

    def _contribute(self, lease: Lease, recipe: ResolvedRecipe, result: dict[str, Any], seconds: float) -> None:
        delta = Path(result["delta"])
        digest = sha256_file(delta)
        message = {
            "jobId": lease.job,
            "round": lease.round,
            "shard": lease.shard,
            "lease": lease.lease,
            "worker": self._client.address,
            "startHash": "0x" + lease.start,
            "deltaHash": "0x" + digest,
            "stateRoot": result["state_root"],
            "encoding": "fp32",
            "numericClass": result["numeric_class"],
        }
        signed = {
            "contribution": message,
            "signature": self._sign(message),
            "losses": result["losses"],
            "seconds": round(float(result["seconds"]), 3),
        }
        here = f"/v1/leases/{lease.lease}"
        try:
            self._insist("PUT", f"{here}/objects/{digest}", delta)
            receipt = self._insist("POST", f"{here}/contribution", signed)
        except TrainChainError as error:
            kept = error.facts.get("receipt") if error.code == "contribution.repeat" else None
            if not isinstance(kept, dict):
                raise
            receipt = kept
        path = self._home / "receipts" / lease.job / f"{lease.lease}.json"
        write_private(path, json.dumps(receipt, indent=1, sort_keys=True).encode())
        promised = {key: message[key] for key in ("jobId", "round", "shard", "lease", "worker", "deltaHash")}
        promised["amount"] = shard_reward(recipe, lease.round, lease.shard or 0)
        if receipt.get("amount") != str(promised["amount"]) or not self._check_receipt(
            promised, str(receipt.get("signature", ""))
        ):
            raise TrainChainError(
                "receipt.invalid",
                f"The hub's receipt for round {lease.round}, shard {lease.shard} does not promise what it should.",
                hint=f"Stop working for this hub, and keep {path}.",
            )
        self._tell(
            "accepted",
            job=lease.job,
            round=lease.round,
            shard=lease.shard,
            amount=receipt["amount"],
            tokens=result["tokens"],
            train_seconds=result["seconds"],
            seconds=seconds,
            delta_bytes=delta.stat().st_size,
            bytes_up=self._client.sent,
            bytes_down=self._client.received,
            receipt=str(path),
        )

    def _insist(self, method: str, path: str, body: Mapping[str, Any] | Path) -> dict[str, Any]:
        """Finished work is not thrown away because the hub is away: try until it answers or we are stopped."""
        while True:
            try:
                if isinstance(body, Path):
                    return self._client.upload(path, body)
                return self._client.post(path, body)
            except TrainChainError as error:
                if error.code not in AWAY:
                    raise
                self._tell("away", code=error.code, message=error.message)
                self._sleep(AWAY_SECONDS)

    def _give_back(self, lease: Lease) -> None:
        try:
            self._client.delete(f"/v1/leases/{lease.lease}")
            self._tell("given_back", lease=lease.lease, round=lease.round, shard=lease.shard)
        except TrainChainError as error:
            self._tell("away", code=error.code, message=error.message)

    def _tell(self, event: str, **fields: Any) -> None:
        self._on_event({"event": event, **fields})


class _Heart:
    """Beats for one lease in a thread of its own. `over` is set when the hub says the work is no longer wanted."""

    def __init__(self, client: HubClient, lease_id: str) -> None:
        self.progress: dict[str, Any] = {}
        self.over: TrainChainError | None = None
        self._client = client
        self._lease = lease_id
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def __enter__(self) -> "_Heart":
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
