"""serve-gpu: offer this machine's GPU (or CPU) to a hub's jobs."""

import os
import sys
from typing import Annotated, Any

import typer

from trainchain.cli.options import Home, HubUrl, JsonLines
from trainchain.cli.output import Output
from trainchain.core import money


def serve_gpu(
    hub: HubUrl = None,
    job: Annotated[str | None, typer.Option(metavar="JOB", help="Work for this job only.")] = None,
    shards: Annotated[int | None, typer.Option(min=1, help="Stop after this many shards.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: every core.")] = None,
    home: Home = None,
    json_: JsonLines = False,
    with_parent: Annotated[bool, typer.Option("--until-stdin-closes", hidden=True)] = False,
) -> None:
    """Train shards for a hub and be paid for what is accepted. A wallet is made on first use.

    \b
    Examples:
      trainchain serve-gpu --hub https://hub.example.org
      trainchain serve-gpu --hub http://127.0.0.1:7070 --shards 1 --json
    """
    from trainchain.cli import parent, wiring
    from trainchain.core.settings import Settings
    from trainchain.core.worker.agent import Worker
    from trainchain.core.worker.child import Child, child_environment

    out = Output(json_mode=json_)
    settings = Settings.load(home, hub)
    if with_parent:
        parent.end_with_parent()
    client, wallet = wiring.signed_client(settings, out)
    chain = wiring.chain_of(client)
    count = threads or os.cpu_count() or 1
    command = [sys.executable, "-m", "trainchain.core.train", "--threads", str(count)]
    child = Child(command, child_environment(count), settings.home / "trainer.log")
    worker = Worker(
        client,
        settings.home,
        child,
        sign=wiring.contribution_signer(wallet, chain),
        check_job=wiring.job_checker(chain, client.info()["chain"]),
        check_receipt=wiring.receipt_checker(chain, client.info()["chain"]["hub"]),
        on_event=lambda event: out.event(event, describe(event)),
        job=wiring.job_id_of(client, settings, job) if job else None,
    )
    out.event(
        {"event": "serving", "hub": settings.hub, "wallet": wallet.address, "threads": count},
        f"serving  {settings.hub}  wallet {wiring.short(wallet.address)}  {count} threads",
    )
    worker.run(shards=shards)


def describe(event: dict[str, Any]) -> str | None:
    """One line for a person."""
    match event["event"]:
        case "waiting":
            return f"waiting  {event['reason']}; asking again as soon as there is one"
        case "leased":
            what = f"shard {event['shard']}" if event["kind"] == "train" else "held-out loss"
            return f"leased   {event['name']}  round {event['round']}  {what}"
        case "accepted":
            return (
                f"accepted round {event['round']}  shard {event['shard']}  +{money.show(int(event['amount']))} TRAIN  "
                f"{event['tokens']:,} tokens in {event['train_seconds']:.1f} s"
            )
        case "evaluated":
            loss = "" if event["loss"] is None else f"  held-out loss {event['loss']:.4f}"
            return f"measured round {event['round']}{loss}"
        case "failed":
            return f"failed   {event['message']}" + (f" {event['hint']}" if event["hint"] else "")
        case "away":
            return f"away     {event['message']} Trying again."
        case "given_back":
            return "stopped  the lease went back to the hub"
        case _:
            return None
