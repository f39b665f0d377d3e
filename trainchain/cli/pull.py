"""pull JOB: fetch the merged adapter."""

from pathlib import Path
from typing import Annotated

import typer

from trainchain.cli.options import Home, HubUrl, JobName, Json
from trainchain.cli.output import Output


def pull(
    job: JobName,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Default: NAME-lora.")] = None,
    round_: Annotated[int | None, typer.Option("--round", help="A round's adapter. Default: the last merged.")] = None,
    hub: HubUrl = None,
    home: Home = None,
    json_: Json = False,
) -> None:
    """Fetch the merged adapter of JOB as a standard PEFT folder, its digest checked. Prints the folder.

    \b
    Examples:
      trainchain pull @last -o support-bot-lora
      trainchain pull 0x7f3a9c --round 3 --json
    """
    from trainchain.cli import delivery, wiring
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    settings = Settings.load(home, hub)
    client = wiring.hub_client(settings)
    job_id = wiring.job_id_of(client, settings, job)
    document = delivery.fetch(client, job_id, output, round_=round_)
    out.result(document["folder"], document)
