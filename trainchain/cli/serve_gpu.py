"""serve-gpu: offer this machine's GPUs (or CPU) to a hub's jobs."""

from typing import Annotated

import typer

from trainchain.cli.options import Checkpointing, Home, HubUrl, JsonLines, MicroTokens
from trainchain.cli.output import Output


def serve_gpu(
    hub: HubUrl = None,
    job: Annotated[str | None, typer.Option(metavar="JOB", help="Work for this job only.")] = None,
    shards: Annotated[int | None, typer.Option(min=1, help="Stop after this many shards.")] = None,
    audit_only: Annotated[
        bool, typer.Option("--audit-only", help="Train nothing: replay segments of others' for audits.")
    ] = False,
    devices: Annotated[
        str | None, typer.Option(metavar="IDS", help="GPUs to use, as 0,1. Default: every one there is.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each GPU's child. Default: every core, shared out.")
    ] = None,
    checkpointing: Checkpointing = False,
    micro_tokens: MicroTokens = None,
    cache_cap: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The most the cache may hold, as 200GB. Default: 100GB.")
    ] = None,
    max_unsettled: Annotated[
        str | None,
        typer.Option(metavar="ROUNDS|AMOUNT", help="Pause while more than this is owed and not on chain. Default: 2."),
    ] = None,
    home: Home = None,
    json_: JsonLines = False,
    with_parent: Annotated[bool, typer.Option("--until-stdin-closes", hidden=True)] = False,
) -> None:
    """Train shards for a hub and be paid for what is accepted. A wallet is made on first use.

    After --shards it stays until what was handed in has its verdict; Ctrl-C leaves at once.

    \b
    Examples:
      trainchain serve-gpu --hub https://hub.example.org
      trainchain serve-gpu --hub http://127.0.0.1:7070 --shards 1 --json
      trainchain serve-gpu --devices 0,2 --checkpointing
      trainchain serve-gpu --audit-only --job 0x7f3a9c
      trainchain serve-gpu --max-unsettled 12.5TRAIN
    """
    from trainchain.cli import gpu_process, parent
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    settings = Settings.load(home, hub, cache_cap)
    if with_parent:
        parent.end_with_parent()
    gpu_process.serve(
        settings,
        out,
        job=job,
        shards=shards,
        audits_only=audit_only,
        threads=threads,
        devices=devices,
        checkpointing=checkpointing,
        micro_tokens=micro_tokens,
        max_unsettled=max_unsettled,
    )
