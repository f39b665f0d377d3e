"""`run`, put together from what the separate commands use: a hub process, worker processes, submit, claim, pull."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainchain.cli import audits, collect, delivery, owner, parent, wiring
from trainchain.cli.jobs import sample_lines
from trainchain.cli.output import Output
from trainchain.cli.plan import Plan, bringer_of, resolve
from trainchain.cli.progress import Progress
from trainchain.cli.workers import Fleet, drain
from trainchain.core import money
from trainchain.core.errors import TrainChainError
from trainchain.core.markdown import count
from trainchain.core.settings import write_private

if TYPE_CHECKING:
    from trainchain.core.client import HubClient

READY_SECONDS = 90.0
LOOK_SECONDS = 0.5
Document = dict[str, Any]

ENDED = ("finished", "settled", "closed", "expired", "cancelled")


@dataclass
class Clock:
    """Where the wall time went, in seconds."""

    began: float = field(default_factory=time.monotonic)
    chain: float = 0.0

    @contextlib.contextmanager
    def on_chain(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.chain += time.monotonic() - start


def run(recipe_path: Path, keep: Path | None, home: Path, workers: int, output: Path | None, out: Output) -> Document:
    """Run a recipe to its end; returns the document of `run --json`. All children end with this process.

    Hub, chain and wallets lie in `keep`, else under `home` by the recipe's name.
    """
    from trainchain.core.settings import Settings, private_folder

    clock = Clock()
    own = Settings(home, "")
    plan = resolve(recipe_path, bringer_of(own, out))
    _check_workers(plan)
    out.note(plan.describe())
    target = output or Path(f"{plan.resolved.name}-lora")
    state = private_folder((keep or home / "runs" / plan.resolved.name).absolute())
    memory = _Memory(state / "run.json", plan.resolved.spec_hash)
    with contextlib.ExitStack() as stack:
        # A base on a model hub is fetched once for all; what the hub sends each worker fetches for itself.
        shared = {"TRAINCHAIN_CACHE": str(own.cache)} if plan.resolved.base_model.source and not plan.keys else {}
        hub_url = _start_hub(stack, state, memory, shared)
        settings = Settings(state / "owner", hub_url)
        progress = stack.enter_context(Progress(out, plan.resolved))
        lend = settings.wallet_path if plan.resolved.access.workers == "owner" else None
        if lend is not None:
            wiring.open_wallet(settings, out)
        fleet = Fleet(stack, state, hub_url, workers, progress, shared, lend)
        job_id = memory.job
        if job_id is None:
            with clock.on_chain():
                hub = wiring.hub_client(settings).info()["chain"]["hub"]
                job_id = owner.publish(plan, settings, out, lambda _: None, own_hub=hub)["job"]
            memory.remember(job_id)
        else:
            out.note(f"going on with job {job_id[:12]}")
        client = wiring.hub_client(settings, wiring.open_wallet(settings, out))
        view = _watch(client, job_id, fleet, progress)
        if view["state"] in ("expired", "cancelled"):
            memory.forget()
            raise TrainChainError("job.ended_badly", f"Job {job_id[:12]} is {view['state']}.")
        with clock.on_chain():
            view = _wait_settled(client, job_id, view, progress)
        view = _wait_measured(client, job_id, view, progress)
        fleet.stop()
        with clock.on_chain():
            homes = [*(fleet.homes if lend is None else fleet.homes[:1]), *_auditors(state)]
            claims = [_claim(home, hub_url, out) for home in homes]
        for failed in (row for claim in claims for row in claim["failed"]):
            out.note(f"not claimed: {failed['message']} {failed['hint']}".rstrip())
        pulled = delivery.fetch(client, job_id, target)
        escrow = _escrow(client, job_id)
        pushed = _push(client, job_id, pulled["folder"], out) if plan.resolved.hub_model_id else None
        memory.forget()
    document = _document(view, claims, pulled, escrow, clock, workers, state)
    document["samples"] = pulled["samples"]
    document["pushed"] = pushed
    document["bytes"] = {
        "up": sum(up for up, _, _ in fleet.traffic.values()),
        "down": sum(down for _, down, _ in fleet.traffic.values()),
        "audits": sum(audits for _, _, audits in fleet.traffic.values()),
        "base_and_data": sum(ref.size for ref in plan.resolved.files()),
        "adapter": plan.resolved.lora.initial.size,
    }
    _say(document, out)
    return document


class _Memory:
    """Which job an interrupted run was at, so that the same command goes on with it."""

    def __init__(self, path: Path, spec_hash: str) -> None:
        self._path = path
        self._spec_hash = spec_hash
        self.job: str | None = None
        self.port = 0
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_bytes())
            self.port = int(found.get("port", 0))
            if found.get("spec_hash") == spec_hash:
                self.job = found.get("job")

    def remember(self, job: str | None) -> None:

        self.job = job
        document = {"port": self.port, "spec_hash": self._spec_hash, "job": job}
        write_private(self._path, json.dumps(document).encode())

    def forget(self) -> None:
        self.remember(None)


def _check_workers(plan: Plan) -> None:
    if not isinstance(plan.resolved.access.workers, str):
        raise TrainChainError(
            "access.denied",
            "The recipe admits wallets of a list, and the workers of `run` have wallets of their own.",
            hint="Write `workers: owner` to train here alone, or publish the recipe: trainchain submit RECIPE",
        )


def _start_hub(stack: contextlib.ExitStack, state: Path, memory: _Memory, environment: dict[str, str]) -> str:
    """Start the hub where it listened before, if that port is free; else on any."""
    for port in dict.fromkeys((memory.port, 0)):
        arguments = ["serve-hub", "--listen", f"127.0.0.1:{port}", "--home", str(state / "hub"), "--json"]
        process = parent.start([*arguments, "--until-stdin-closes"], state / "hub.log", environment)
        stack.callback(parent.stop, process)
        ready = _first_line(process)
        if ready.get("event") == "ready":
            memory.port = int(str(ready["url"]).rpartition(":")[2])
            memory.remember(memory.job)
            drain(process)
            return str(ready["url"])
        if error := ready.get("error"):
            if error["code"] != "hub.address_in_use":
                raise TrainChainError(error["code"], error["message"], hint=error["hint"])
        else:
            break
    raise TrainChainError("hub.failed", "The hub did not start.", hint=f"Its last words are in {state / 'hub.log'}.")


def _first_line(process: subprocess.Popen[str]) -> Document:
    assert process.stdout is not None
    watchdog = threading.Timer(READY_SECONDS, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline()
    finally:
        watchdog.cancel()
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    return {}


def _watch(client: HubClient, job_id: str, fleet: Fleet, progress: Progress) -> Document:
    """Follow the job to its end."""
    while True:
        view = client.get(f"/v1/jobs/{job_id}")
        progress.job(view)
        if view["state"] in ENDED:
            return view
        fleet.check()
        time.sleep(LOOK_SECONDS)


def _wait_settled(
    client: HubClient, job_id: str, view: Document, progress: Progress, seconds: float = 300.0
) -> Document:
    until = time.monotonic() + seconds
    while view["state"] not in ("settled", "closed"):
        if audits.pending(view):  # they have a time of their own
            until = time.monotonic() + seconds
            progress.job(view)
        if time.monotonic() > until:
            raise TrainChainError(
                "job.not_ready",
                f"Job {job_id[:12]} has finished, but is not settled on chain after {seconds:.0f} s.",
                hint="Read hub.log in the folder of --keep; the same command goes on from here.",
            )
        time.sleep(LOOK_SECONDS / 5)
        view = client.get(f"/v1/jobs/{job_id}")
    return view


def _wait_measured(
    client: HubClient, job_id: str, view: Document, progress: Progress, seconds: float = 300.0
) -> Document:
    """Wait for the held-out losses that the hub's child still measures; they are worth minutes, not for ever."""
    until = time.monotonic() + seconds
    while any(row["state"] != "done" for row in view["evaluations"]) and time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
        view = client.get(f"/v1/jobs/{job_id}")
        progress.job(view)
    return view


def _auditors(state: Path) -> list[Path]:
    """The home of the hub's own child, whose wallet earns what its replays pay."""
    home = state / "hub" / "evaluator"
    return [home] if (home / "wallet.json").exists() else []


def _claim(home: Path, hub_url: str, out: Output) -> Document:
    from trainchain.core.settings import Settings

    return collect.claim_all(Settings(home, hub_url), out)


def _push(client: HubClient, job_id: str, folder: str, out: Output) -> Document:
    try:
        done = delivery.push(client, job_id, None, note=out.note)
    except TrainChainError as error:
        message = f"{error.message} The adapter is in {folder}; the same command goes on with the push."
        raise TrainChainError(error.code, message, hint=error.hint, **error.facts) from None
    out.note(f"pushed   {done['url']}" + ("" if done["created"] else ", where it was already"))
    return {name: done[name] for name in ("url", "commit", "created", "target")}


def _escrow(client: HubClient, job_id: str) -> dict[str, str]:
    found = wiring.chain_of(client).job(job_id)
    return {
        "funded": str(found.funded),
        "claimed": str(found.claimed),
        "claimable": str(found.settled - found.claimed),
        "refundable": str(found.free),
    }


def _document(
    view: Document,
    claims: list[Document],
    pulled: Document,
    escrow: dict[str, str],
    clock: Clock,
    workers: int,
    state: Path,
) -> Document:
    shards = [shard for row in view["rounds_done"] for shard in row["shards"]]
    training = sum(shard.get("seconds", 0.0) for shard in shards) / workers
    merging = sum(row["merge_seconds"] or 0.0 for row in view["rounds_done"])
    wall = time.monotonic() - clock.began
    losses = {row["round"]: row["loss"] for row in view["evaluations"]}
    by_wallet = {claim["wallet"]: claim for claim in claims}
    return {
        "job": view["job"],
        "name": view["name"],
        "spec_hash": view["spec_hash"],
        "adapter": pulled["folder"],
        "state": str(state),
        "rounds": [
            {
                "round": row["round"],
                "loss_before": losses.get(row["round"] - 1),
                "loss_after": losses.get(row["round"]),
                "accepted": sum(shard["state"] == "accepted" for shard in row["shards"]),
                "merge_error": row["merge_error"],
            }
            for row in view["rounds_done"]
        ],
        "audits": audits.counted(view),
        "loss_before": losses.get(0),
        "loss_after": losses.get(len(view["rounds_done"])),
        "tokens": sum(shard["tokens"] for shard in shards if shard["state"] == "accepted"),
        "workers": [
            {
                "wallet": address,
                "accepted": worker["accepted"],
                "tokens": worker["tokens"],
                "reward": worker["reward"],
                "claimed": by_wallet.get(address, {}).get("claimed", "0"),
                "claim_txs": [row["tx"] for row in by_wallet.get(address, {}).get("claims", []) if row["tx"]],
            }
            for address, worker in view["workers"].items()
        ],
        "auditors": [{"wallet": address, **auditor} for address, auditor in view["auditors"].items()],
        "settlements": [
            {"round": row["round"], "root": row["root"], "total": row["total"], "tx": row["tx"]}
            for row in view["settlements"]
        ],
        "escrow": escrow,
        "seconds": {
            "total": round(wall, 2),
            "training": round(training, 2),
            "merging": round(merging, 2),
            "chain": round(clock.chain, 2),
            "waiting": round(max(0.0, wall - training - merging - clock.chain), 2),
        },
    }


def _say(document: Document, out: Output) -> None:
    seconds = document["seconds"]
    before, after = document["loss_before"], document["loss_after"]
    if before is not None and after is not None:
        out.note(f"held-out loss {before:.4f} > {after:.4f} over {document['tokens']:,} tokens")
    for line in sample_lines(document["samples"]):
        out.note(line)
    out.note(audits.summary(document["audits"], sum(row["accepted"] for row in document["workers"])))
    for worker in document["workers"]:
        out.note(
            f"worker {wiring.short(worker['wallet'])}  {worker['accepted']} shards accepted  "
            f"claimed {money.show(int(worker['claimed']))} TRAIN"
        )
    for auditor in document["auditors"]:
        out.note(
            f"auditor {wiring.short(auditor['wallet'])}  {count(auditor['replays'], 'replay')}  "
            f"earned {money.show(int(auditor['fees']))} TRAIN"
        )
    out.note(f"{money.show(int(document['escrow']['refundable']))} TRAIN unspent; they come back after the grace time")
    out.note(
        f"{seconds['total']:.0f} s: training {seconds['training']:.0f}, waiting {seconds['waiting']:.0f}, "
        f"merging {seconds['merging']:.1f}, chain {seconds['chain']:.1f}"
    )
