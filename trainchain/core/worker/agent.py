"""The worker: lease, fetch, train, sign, contribute, keep what the hub signed. It only ever dials out.

Imports no torch and no chain: the trainer is a child process, and signing is a function that is passed in.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainchain.core.client import HubClient
from trainchain.core.digests import sha256_file
from trainchain.core.errors import TrainChainError
from trainchain.core.models import MAX_ANSWER, Lease, ResolvedRecipe, parse
from trainchain.core.rewards import shard_reward
from trainchain.core.settings import private_folder
from trainchain.core.states import Job
from trainchain.core.worker.bench import Bench, remove
from trainchain.core.worker.cache import Cache
from trainchain.core.worker.child import Child
from trainchain.core.worker.dues import Dues
from trainchain.core.worker.faults import AWAY, DISHONEST, MOST_SKIPPED, SPOILED, TOO_LARGE, UNABLE
from trainchain.core.worker.files import JobFiles
from trainchain.core.worker.fleet import Quota, Stopped
from trainchain.core.worker.heart import OVER, Heart
from trainchain.core.worker.keys import Exchange
from trainchain.core.worker.opened import OpenedJob
from trainchain.core.worker.starts import Start, fetch_start
from trainchain.core.worker.volatile import Volatile

POLL_SECONDS = 20.0
AWAY_SECONDS = 2.0
LONGEST_SECONDS = 120.0
OnEvent = Callable[[dict[str, Any]], None]
Sign = Callable[[Mapping[str, Any]], str]
CheckJob = Callable[[str, str], str]
"""(job id, spec hash): the job's owner; raises unless the escrow on chain holds its money under that recipe."""


class Worker:
    """One device's worker. An interrupt (Ctrl-C, SIGTERM), or `stop` from another thread, gives the lease back.

    `micro_tokens` (how many tokens go through the model at once; the child's own choice by default) and
    `checkpointing` are the machine's affair: they change memory and last bits, not the mathematics.
    """

    def __init__(
        self,
        client: HubClient,
        home: Path,
        child: Child,
        *,
        sign: Sign,
        check_job: CheckJob,
        dues: Dues,
        on_event: OnEvent,
        exchange: Exchange,
        cache: Cache,
        job: str | None = None,
        device: str = "device",
        checkpointing: bool = False,
        micro_tokens: int | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._client = client
        self._child = child
        self._sign = sign
        self._check_job = check_job
        self._dues = dues
        self._on_event = on_event
        self._wait = sleep
        self._job = job
        self._micro_tokens = micro_tokens
        self._fitting: dict[str, int] = {}
        """Jobs whose shards did not fit: how many tokens at once are tried next."""
        self._unable: list[str] = []
        """Jobs that this machine cannot do."""
        self._cache = cache
        self._opened = OpenedJob(client, cache, Volatile(home), exchange, self._ask, checkpointing=checkpointing)
        self._bench = Bench(home / "work" / device)
        self._failures = 0
        self._stopping = threading.Event()
        self._owner = ""
        self.busy = False

    def run(self, quota: Quota) -> None:
        """Work until interrupted, or until the quota is done."""
        waiting, looks = False, 0
        try:
            self._tidy()
            while quota.take():
                self._go_on()
                owed = self._dues.too_much()
                lease, done = None if owed else self._lease(), False
                if lease is not None:
                    done = self._work(lease)
                    self._forget_private(but=lease.job)
                else:
                    self._forget_private()
                    if owed:
                        self._sleep(min(AWAY_SECONDS * 2**looks, POLL_SECONDS))
                    elif not waiting:
                        self._tell("waiting", reason="no shard is open")
                waiting, looks = lease is None, min(looks + 1, 8) if owed else 0
                self._dues.look_after(idle=waiting)
                if not done:
                    quota.give_back()
        finally:
            self._child.stop()
            self._client.attempts = 1
            self._forget_private()

    def stop(self) -> None:
        """End soon, from another thread: the child at once, then the lease goes back."""
        self._stopping.set()
        self._client.attempts = 1
        self._child.close()

    def _tidy(self) -> None:
        """Throw away what earlier runs left of rounds and jobs that are over."""
        for job in self._bench.jobs():
            try:
                view = self._client.get(f"/v1/jobs/{job}")
            except TrainChainError as error:
                if error.code in AWAY:
                    return
                continue  # another hub's job
            going_on = view.get("state") in (Job.UNFUNDED, Job.OPEN, Job.RUNNING)
            self._bench.clear(job, before=int(view["round"]) if going_on else None)
        self._forget_private()

    def _forget_private(self, *, but: str | None = None) -> None:
        """Remove what lies here of private jobs that are over, `but` the one at hand; another worker who uses the
        same cache may be at one, and removes it later. One that has finished is still measured."""
        for job in self._cache.private_jobs():
            if job == but:
                continue
            try:
                state = self._client.get(f"/v1/jobs/{job}").get("state")
            except TrainChainError:
                continue  # the hub is away, or it is another hub's job
            if state not in (Job.UNFUNDED, Job.OPEN, Job.RUNNING, Job.FINISHED):
                if but is None:
                    self._opened.close()
                if self._cache.forget(job):
                    self._bench.clear(job)
                    self._tell("forgotten", job=job)

    def _lease(self) -> Lease | None:
        body: dict[str, Any] = {"wait": POLL_SECONDS}
        if self._job:
            body["job"] = self._job
        if self._unable:
            body["skip"] = self._unable
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
        self.busy = True
        with Heart(self._client, lease.lease) as heart:
            try:
                self._go_on()
                self._owner = self._check_job(lease.job, lease.spec_hash)
                files, sealed = self._prepare(lease)
                if lease.kind == "evaluate":
                    self._evaluate(lease, files, sealed)
                else:
                    self._train(lease, files, sealed, heart)
                self._failures = 0
                return True
            except TrainChainError as error:
                told = {"code": error.code, "message": error.message, "hint": error.hint}
                unable = error.code in UNABLE
                self._tell("failed", lease=lease.lease, job=lease.job, **told, unable=unable)
                if error.code in DISHONEST:
                    raise
                if error.code not in OVER:
                    self._give_back(lease)
                if unable:
                    self._unable = [*self._unable, lease.job][-MOST_SKIPPED:]
                elif error.code not in OVER:
                    self._sleep(min(AWAY_SECONDS * 2**self._failures, LONGEST_SECONDS))
                    self._failures += 1
                return False
            except BaseException:
                self._child.stop()
                self._client.attempts = 1
                self._give_back(lease)
                raise
            finally:
                self.busy = False

    def _prepare(self, lease: Lease) -> tuple[JobFiles, dict[str, Any]]:
        """The job's files, with the job open in the child, and what a sealed lease's request needs beside."""
        if not self._child.alive:
            self._opened.close()
        return self._opened.prepare(lease, self._owner, self._fitting.get(lease.job, self._micro_tokens))

    def _evaluate(self, lease: Lease, files: JobFiles, sealed: Mapping[str, Any]) -> None:
        adapter = self._start(lease, files.recipe).adapter
        request = {"op": "evaluate", "adapter": str(adapter), **sealed}
        result = self._fitted(lease, files.recipe, lambda: [*self._ask(request)][-1])
        report = {"loss": result["loss"], "samples": [text[:MAX_ANSWER] for text in result["samples"]]}
        self._insist("POST", f"/v1/leases/{lease.lease}/evaluation", report)
        self._tell("evaluated", job=lease.job, round=lease.round, **report)

    def _start(self, lease: Lease, recipe: ResolvedRecipe) -> Start:
        return fetch_start(
            self._cache.private(lease.job) if recipe.private else self._cache, self._client, lease, recipe
        )

    def _train(self, lease: Lease, files: JobFiles, sealed: Mapping[str, Any], heart: Heart) -> None:
        """Train the shard, on from what an earlier lease of it left, and hand it in."""
        self._bench.clear(lease.job, before=lease.round)
        place = self._bench.place(lease)
        start = self._start(lease, files.recipe)
        began = time.monotonic()
        request = {
            "op": "train",
            "start": str(start.adapter),
            "outer_step": start.outer_step and str(start.outer_step),
            "round": lease.round,
            "shard": lease.shard,
            "lease": lease.lease,
            "out": str(private_folder(place / "out")),
            "states": str(private_folder(place / "states")),
            **sealed,
        }
        try:
            result = self._fitted(lease, files.recipe, lambda: self._trained(request, lease, heart))
        except TrainChainError as error:
            if error.code in SPOILED | OVER:
                remove(place)
            raise
        try:
            self._contribute(lease, files.recipe, result, time.monotonic() - began)
        except TrainChainError:
            remove(place)  # the same bytes would be refused again
            raise
        remove(place)

    def _trained(self, request: Mapping[str, Any], lease: Lease, heart: Heart) -> dict[str, Any]:
        """What the child answers; gives up where the hub does not want the shard any more."""
        began = time.monotonic()
        result: dict[str, Any] = {}
        for event in self._ask(request):
            if heart.over is not None:
                self._child.stop()
                raise heart.over
            if event["event"] == "step":
                speed = event["tokens"] / max(time.monotonic() - began, 1e-6)
                heart.progress = {"step": event["step"], "steps": event["steps"], "tokens_per_second": speed}
                self._tell("step", round=lease.round, shard=lease.shard, **heart.progress)
            result = event
        return result

    def _fitted(self, lease: Lease, recipe: ResolvedRecipe, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do it; where it does not fit, once more with less at once. No shape that did not fit is tried twice."""
        try:
            return work()
        except TrainChainError as error:
            if error.code not in TOO_LARGE:
                raise
            self._smaller(lease, recipe, error)
        self._prepare(lease)
        try:
            return work()
        except TrainChainError as error:
            if error.code in TOO_LARGE:
                self._smaller(lease, recipe, error)
            raise

    def _smaller(self, lease: Lease, recipe: ResolvedRecipe, error: TrainChainError) -> None:
        """End the child; the next one that opens this job puts half as much through the model at once."""
        self._child.stop()
        self._opened.close()
        usual = self._micro_tokens or recipe.training.micro_batch_size * recipe.training.sequence_len
        half = max(1, self._fitting.get(lease.job, usual) // 2)
        self._fitting[lease.job] = half
        self._tell("smaller", round=lease.round, shard=lease.shard, code=error.code, micro_tokens=half)

    def _ask(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The child's events; a child that ended because we are to stop is no failure."""
        try:
            for event in self._child.ask(request):
                self._go_on()
                yield event
        except TrainChainError:
            self._go_on()
            raise

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise Stopped

    def _sleep(self, seconds: float) -> None:
        if self._wait is not None:
            self._wait(seconds)
        else:
            self._stopping.wait(seconds)
        self._go_on()

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
            "encoding": recipe.merge.encoding,
            "numericClass": result["numeric_class"],
        }
        signed = {
            "contribution": message,
            "signature": self._sign(message),
            "losses": result["losses"],
            "seconds": round(float(result["seconds"]), 3),
            "micro_tokens": result["micro_tokens"],
        }
        here = f"/v1/leases/{lease.lease}"
        floor = self._dues.book.vested(lease.job)
        try:
            self._insist("PUT", f"{here}/objects/{digest}", delta)
            receipt = self._insist("POST", f"{here}/contribution", signed)
        except TrainChainError as error:
            kept = error.facts.get("receipt") if error.code == "contribution.repeat" else None
            if not isinstance(kept, dict):
                raise
            receipt = kept
        promised = {key: message[key] for key in ("jobId", "round", "shard", "lease", "worker", "deltaHash")}
        promised["amount"] = shard_reward(recipe, lease.round, lease.shard or 0)
        path = self._dues.book.keep(promised, receipt, floor)
        self._tell(
            "accepted",
            job=lease.job,
            round=lease.round,
            shard=lease.shard,
            amount=receipt["amount"],
            tokens=result["tokens"],
            train_seconds=result["seconds"],
            seconds=seconds,
            resumed=result["resumed"],
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
