"""pull JOB: fetch the merged adapter, or the base with it folded in."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from trainchain.cli.options import Home, HubUrl, JobName, Json
from trainchain.cli.output import Output


def pull(
    job: JobName,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Default: NAME-lora, or NAME-merged.")
    ] = None,
    round_: Annotated[int | None, typer.Option("--round", help="A round's adapter. Default: the last merged.")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="The base with the adapter folded in: a model that needs no PEFT.")
    ] = False,
    base: Annotated[
        Path | None, typer.Option("--base", metavar="DIR", help="With --merged: the base's folder here.")
    ] = None,
    hub: HubUrl = None,
    home: Home = None,
    json_: Json = False,
) -> None:
    """Fetch the merged adapter of JOB as a standard PEFT folder, its digest checked. Prints the folder.

    \b
    Examples:
      trainchain pull @last -o support-bot-lora
      trainchain pull 0x7f3a9c --round 3 --json
      trainchain pull @last --merged -o support-bot
    """
    from trainchain.cli import delivery, folding, wiring
    from trainchain.core.errors import TrainChainError
    from trainchain.core.settings import Settings
    from trainchain.core.worker.cache import Cache

    out = Output(json_mode=json_)
    if base is not None and not merged:
        raise TrainChainError("usage.flag", "--base is for --merged, which was not asked for.", hint="Add --merged.")
    settings = Settings.load(home, hub)
    job_id = delivery.job_named(settings, job)
    if merged:
        # Even a public job's base is given to its owner and its workers alone.
        known = settings.wallet_path.exists()
        cache = Cache(settings.cache, cap=settings.cache_cap)
        made = wiring.signed_client(settings, out)[0] if known else wiring.hub_client(settings)
        with contextlib.closing(made) as client:
            document = folding.fetch_merged(client, cache, job_id, output, note=out.note, base=base, round_=round_)
    else:
        document = delivery.as_reader(
            settings, out, lambda client: delivery.fetch(client, job_id, output, round_=round_)
        )
    out.result(document["folder"], document)
