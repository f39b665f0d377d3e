"""One worker process put together: wallet, hub, chain, and a resident training child for each device."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from trainchain.cli import audits, wiring
from trainchain.cli.output import Output
from trainchain.core import money

if TYPE_CHECKING:
    from trainchain.core.settings import Settings


WORTH_TELLING = 10_000_000
"""Bytes of a file whose fetching takes long enough to be told of."""


def serve(
    settings: Settings,
    out: Output,
    *,
    job: str | None,
    shards: int | None,
    audits_only: bool,
    threads: int | None,
    devices: str | None,
    checkpointing: bool,
    micro_tokens: int | None,
    max_unsettled: str | None,
) -> None:
    """Work until stopped, or until `shards` are done. `devices` names GPUs; by default every one there is."""
    from trainchain.cli import hubs
    from trainchain.core.worker import devices as gpus
    from trainchain.core.worker import fleet
    from trainchain.core.worker.agent import Worker
    from trainchain.core.worker.cache import Cache
    from trainchain.core.worker.child import Child, child_environment
    from trainchain.core.worker.dues import Dues, Limit
    from trainchain.core.worker.keys import Exchange

    limit = Limit() if max_unsettled is None else Limit.read(max_unsettled)
    named = gpus.chosen(devices) if devices else gpus.visible()
    used: list[str | None] = list(named) if devices or len(named) > 1 else [None]
    first, wallet = wiring.signed_client(settings, out)
    count = threads or max(1, (os.cpu_count() or 1) // len(used))
    only = wiring.job_id_of(first, settings, job) if job else None
    one_line = threading.Lock()

    def worker(device: str | None) -> Worker:
        client = first if device == used[0] else wiring.hub_client(settings, wallet)
        chain = wiring.chain_of(client)
        hubs.remember(settings, client)
        told = client.info()["chain"]
        several = {} if len(used) == 1 else {"device": device}

        def on_event(event: dict[str, Any]) -> None:
            text = describe(event)
            with one_line:
                out.event({**event, **several}, f"gpu {device}  {text}" if several and text else text)

        label = "device" if device is None else "gpu-" + device.replace("/", "_")
        command = [sys.executable, "-m", "trainchain.core.train", "--threads", str(count)]
        environment = child_environment(count) | (gpus.environment_of(device) if device is not None else {})
        log = settings.home / ("trainer.log" if device is None else f"trainer-{label}.log")
        key, signature = wiring.exchange_of(settings, wallet, chain)
        return Worker(
            client,
            settings.home,
            Child(command, environment, log),
            sign=wiring.work_signer(wallet, chain),
            signed=wiring.promise_checker(chain, told["hub"]),
            check_job=wiring.job_checker(chain, told),
            dues=Dues(
                client,
                wiring.paybook_of(settings, wallet, chain, told["hub"]),
                wiring.onlooker(settings, wallet, chain, client),
                wiring.window_of(wallet, chain),
                on_event,
                limit=limit,
            ),
            on_event=on_event,
            exchange=Exchange(key, signature, chain.chain_id),
            cache=Cache(settings.cache, cap=settings.cache_cap, on_event=on_event),
            job=only,
            audits_only=audits_only,
            device=label,
            checkpointing=checkpointing,
            micro_tokens=micro_tokens,
        )

    workers = [worker(device) for device in used]
    serving = {"event": "serving", "hub": settings.hub, "wallet": wallet.address, "threads": count, "devices": named}
    where = f"{len(used)} GPUs, {count} threads each" if len(used) > 1 else f"{count} threads"
    out.event(serving, f"serving  {settings.hub}  wallet {wiring.short(wallet.address)}  {where}")
    fleet.run(workers, shards)


def describe(event: dict[str, Any]) -> str | None:
    """One line for a person."""
    match event["event"]:
        case "waiting":
            return f"waiting  {event['reason']}; asking again as soon as there is one"
        case "leased":
            what = f"shard {event['shard']}" if event["kind"] != "evaluate" else "held-out data and samples"
            more = f"  to replay segment {event['segment']}" if event["kind"] == "replay" else ""
            return f"leased   {event['name']}  round {event['round']}  {what}{more}"
        case "accepted":
            on = f", on from segment {event['resumed']}" if event["resumed"] else ""
            return (
                f"accepted round {event['round']}  shard {event['shard']}  +{money.show(int(event['amount']))} TRAIN  "
                f"{event['tokens']:,} tokens in {event['train_seconds']:.1f} s{on}"
            )
        case "drawn" | "answered" | "audited" | "auditing" | "replayed":
            return audits.describe(event)
        case "evaluated":
            loss = "" if event["loss"] is None else f"  held-out loss {event['loss']:.4f}"
            return f"measured round {event['round']}{loss}"
        case "unsettled":
            return f"unsettled {event['message']} Looking again and again. {event['hint']}"
        case "settled":
            return f"settled  job {event['job'][:12]} is below the limit again"
        case "redeem_soon":
            return f"REDEEM   {event['message']} {event['hint']}"
        case "doubt":
            return f"doubt    job {event['job'][:12]}: {event['message']}"
        case "smaller":
            return f"smaller  it did not fit: {event['micro_tokens']:,} tokens at once from here on"
        case "failed":
            left = " This job is left alone until serve-gpu starts again." if event["unable"] else ""
            return f"failed   {event['message']}" + (f" {event['hint']}" if event["hint"] else "") + left
        case "fetching" if (event["bytes"] or 0) >= WORTH_TELLING:
            on = f", on from {event['resumed'] / 1e6:,.0f} MB" if event["resumed"] else ""
            return f"fetching {event['name']}  {event['bytes'] / 1e6:,.0f} MB{on}"
        case "damaged":
            return f"damaged  {event['name']} ({event['where']}) is not what it should be; it is fetched again"
        case "evicted":
            return f"evicted  {event['name'][:60]}  {event['bytes'] / 1e6:,.0f} MB, to make room in the cache"
        case "forgotten":
            return f"removed  all files of the private job {event['job'][:12]}, which is over"
        case "away":
            return f"away     {event['message']} Trying again."
        case "given_back":
            return "stopped  the lease went back to the hub"
        case _:
            return None
