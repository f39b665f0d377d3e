"""The worker: lease, fetch, train or replay, sign, hand in, keep what the hub signed. It only ever dials out.

Imports no torch and no chain: the trainer is a child process, and signing is a function that is passed in.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainchain.core.adapter import read_adapter, tensor_specs
from trainchain.core.client import HubClient
from trainchain.core.errors import TrainChainError
from trainchain.core.messages import Lease
from trainchain.core.models import MAX_ANSWER, ResolvedRecipe, parse
from trainchain.core.rewards import shard_reward
from trainchain.core.settings import private_folder
from trainchain.core.worker import handing
from trainchain.core.worker.answers import Answers
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
from trainchain.core.worker.paybook import Signed
from trainchain.core.worker.splits import Splits
from trainchain.core.worker.starts import Start, fetch_start
from trainchain.core.worker.tidying import Tidying
from trainchain.core.worker.volatile import Volatile

POLL_SECONDS = 20.0
AWAY_SECONDS = 2.0
LONGEST_SECONDS = 120.0
OnEvent = Callable[[dict[str, Any]], None]
CheckJob = Callable[[str, str], str]
"""(job id, spec hash): the job's owner; raises unless the escrow on chain holds its money under that recipe."""


class Worker:
    """One device's worker. An interrupt (Ctrl-C, SIGTERM), or `stop` from another thread, gives the lease back.

    `signed` tells what the hub of the escrow has signed. With `audits_only` it trains nothing and replays for audits.
    `micro_tokens` (how many tokens go through the model at once; the child's own choice by default) and
    `checkpointing` are the machine's affair: they change memory and last bits, not the mathematics.
    """

    def __init__(
        self,
        client: HubClient,
        home: Path,
        child: Child,
        *,
        sign: handing.SignTyped,
        signed: Signed,
        check_job: CheckJob,
        dues: Dues,
        on_event: OnEvent,
        exchange: Exchange,
        cache: Cache,
        job: str | None = None,
        audits_only: bool = False,
        device: str = "device",
        checkpointing: bool = False,
        micro_tokens: int | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._client = client
        self._child = child
        self._sign = sign
        self._signed = signed
        self._check_job = check_job
        self._dues = dues
        self._on_event = on_event
        self._wait = sleep
        self._job = job
        self._audits_only = audits_only
        self._nothing = "no replay is wanted" if audits_only else "no shard is open"
        self._splits = Splits(micro_tokens)
        self._unable: list[str] = []
        """Jobs that this machine cannot do."""
        self._cache = cache
        self._opened = OpenedJob(client, cache, Volatile(home), exchange, self._ask, checkpointing=checkpointing)
        self._bench = Bench(home / "work" / device)
        self._tidying = Tidying(client, self._bench, cache, self._opened.close, self._tell)
        self._answers = Answers(client, home / "work", cache, dues.book.bound, self._tell)
        self._failures = 0
        self._stopping = threading.Event()
        self._owner = ""
        self.busy = False

    def run(self, quota: Quota) -> None:
        """Work until interrupted, or until the quota is done and nothing that was handed in waits for its verdict."""
        waiting, looks = False, 0
        try:
            due = self._answers.look_after()
            self._tidying.rounds()
            self._tidying.private()
            while quota.take():
                self._go_on()
                owed = self._dues.too_much()
                lease, done = None if owed else self._lease(AWAY_SECONDS if due else POLL_SECONDS), False
                if lease is not None:
                    done = self._work(lease)
                    self._tidying.private(but=lease.job)
                else:
                    self._tidying.private()
                    if owed:
                        self._sleep(_pause(looks))
                    elif not waiting:
                        self._tell("waiting", reason=self._nothing)
                waiting, looks = lease is None, min(looks + 1, 8) if owed else 0
                self._dues.look_after(idle=waiting)
                due = self._answers.look_after()
                if not done:
                    quota.give_back()
            self._linger()
        finally:
            self._child.stop()
            self._client.attempts = 1
            self._tidying.private()

    def _linger(self) -> None:
        """Stay, with no lease, as long as the hub may want something of what was handed in."""
        looks = 0
        while self._answers.look_after():
            self._answers.tell_waiting()
            self._dues.look_after(idle=True)
            self._sleep(_pause(looks))
            looks = min(looks + 1, 8)

    def stop(self) -> None:
        """End soon, from another thread: the child at once, then the lease goes back."""
        self._stopping.set()
        self._client.attempts = 1
        self._child.close()

    def _lease(self, wait: float) -> Lease | None:
        body: dict[str, Any] = {"wait": wait} | ({"only": "replay"} if self._audits_only else {})
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
        """One lease from beginning to end, and whether it counts; whatever goes wrong is told, and the lease goes back.

        Failures in a row wait longer and longer, so that a machine that cannot do a job does not hold it up.
        """
        self._tell("leased", **lease.model_dump(include={"lease", "kind", "job", "name", "round", "shard", "segment"}))
        self.busy = True
        with Heart(self._client, lease.lease) as heart:
            try:
                self._go_on()
                self._owner = self._check_job(lease.job, lease.spec_hash)
                files, sealed = self._prepare(lease)
                if lease.kind == "evaluate":
                    self._evaluate(lease, files, sealed)
                elif lease.kind == "replay":
                    self._replay(lease, files, sealed, heart)
                else:
                    self._train(lease, files, sealed, heart)
                self._failures = 0
                return lease.kind != "replay" or self._audits_only
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
        return self._opened.prepare(lease, self._owner, self._splits.at_once(lease))

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
        handing.insist_on_secret(lease, files.recipe, self._signed)
        self._bench.clear(lease.job, before=lease.round)
        place = self._bench.place(lease)
        start = self._start(lease, files.recipe)
        began = time.monotonic()
        request = {
            "op": "train",
            **start.for_child(),
            **lease.model_dump(include={"round", "shard", "lease"}),
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
            drawn = self._contribute(lease, files.recipe, start, place, result, time.monotonic() - began)
        except TrainChainError as error:
            if error.code not in DISHONEST:
                remove(place)  # the same bytes would be refused again
            raise
        if not drawn:
            remove(place)

    def _replay(self, lease: Lease, files: JobFiles, sealed: Mapping[str, Any], heart: Heart) -> None:
        """Train a segment of somebody's shard again, and say what that comes to; the claimed end is not known here."""
        recipe, asked, place = files.recipe, handing.Asked.of(lease, files.recipe), self._bench.replay(lease)
        try:
            start, state = self._start(lease, recipe), None
            if lease.state is not None:
                shapes = tensor_specs(read_adapter(start.adapter))
                state = handing.fetch_state(self._client, lease.state, shapes, place)
            asks = lease.model_dump(include={"round", "shard", "segment", "target"})
            places = {**start.for_child(), "state": state and str(state), "out": str(place)}
            request = {"op": "replay", **asks, **places, **sealed}
            result = self._fitted(lease, recipe, lambda: self._trained(request, lease, heart))
            signed = handing.replay(lease, asked, str(self._client.address), result, self._sign)
            here = f"/v1/leases/{lease.lease}"
            if self._insist("POST", f"{here}/replay", signed).get("wants_state") and result["state"]:
                self._insist("PUT", f"{here}/states/{asked.segment + 1}", Path(result["state"]))
                self._insist("POST", f"{here}/replay", signed)
        finally:
            remove(place)
        told = lease.model_dump(include={"lease", "job", "round", "shard", "segment", "target"})
        self._tell("replayed", **told, **asked.worth(lease, recipe), seconds=result["seconds"])

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
        """Do it; where it does not fit, once more with less at once, and a replay, whose worker's split this machine
        may never have met, until it fits. No shape that did not fit is tried twice."""
        again = True
        while True:
            try:
                return work()
            except TrainChainError as error:
                if error.code not in TOO_LARGE:
                    raise
                half = self._smaller(lease, recipe, error)
                if not again:
                    raise
            self._prepare(lease)
            again = lease.kind == "replay" and half > 1

    def _smaller(self, lease: Lease, recipe: ResolvedRecipe, error: TrainChainError) -> int:
        """End the child; the next one that opens this job puts half as much through the model at once."""
        self._child.stop()
        self._opened.close()
        half = self._splits.halve(lease, recipe)
        self._tell("smaller", round=lease.round, shard=lease.shard, code=error.code, micro_tokens=half)
        return half

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

    def _contribute(
        self, lease: Lease, recipe: ResolvedRecipe, start: Start, place: Path, result: dict[str, Any], seconds: float
    ) -> bool:
        """Hand the shard in, and keep the receipt; whether a draw fell on it."""
        signed = handing.contribution(lease, recipe, str(self._client.address), result, self._sign)
        message, delta = signed["contribution"], Path(result["delta"])
        here, floor = f"/v1/leases/{lease.lease}", self._dues.book.vested(lease.job)
        with self._answers.handing_in(place, lease, recipe):
            try:
                self._insist("PUT", f"{here}/objects/{message['deltaHash'].removeprefix('0x')}", delta)
                receipt = self._insist("POST", f"{here}/contribution", signed)
            except TrainChainError as error:
                receipt = handing.receipt_in(error)
            size = delta.stat().st_size
            receipt |= lease.model_dump(include={"secret_hash", "secret_signature"}, exclude_none=True)
            promised = {key: message[key] for key in ("jobId", "round", "shard", "lease", "worker", "deltaHash")}
            promised["amount"] = shard_reward(recipe, lease.round, lease.shard or 0)
            path = self._dues.book.keep(promised, receipt, floor)  # before anything else: it is the pay
            drawn = self._answers.keep(place, recipe, start, receipt.get("draw"))
        self._tell(
            "accepted",
            **lease.model_dump(include={"job", "round", "shard"}),
            amount=receipt["amount"],
            tokens=result["tokens"],
            train_seconds=result["seconds"],
            seconds=seconds,
            resumed=result["resumed"],
            delta_bytes=size,
            drawn=drawn,
            bytes_up=self._client.sent,
            bytes_audits=self._answers.sent,
            bytes_down=self._client.received,
            receipt=str(path),
        )
        return drawn

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


def _pause(looks: int) -> float:
    return float(min(AWAY_SECONDS * 2**looks, POLL_SECONDS))
