"""push JOB [TARGET]: publish the merged adapter with its card and audit bundle."""

from typing import Annotated

import typer

from trainchain.cli.options import Home, HubUrl, JobName, Json
from trainchain.cli.output import Output


def push(
    job: JobName,
    target: Annotated[
        str | None,
        typer.Argument(metavar="[TARGET]", help="hf://you/name or azureml:name. Default: the recipe's hub_model_id."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public. One that exists is never changed.")
    ] = False,
    round_: Annotated[int | None, typer.Option("--round", help="A round's adapter. Default: the job's last.")] = None,
    hub: HubUrl = None,
    home: Home = None,
    json_: Json = False,
) -> None:
    """Publish the merged adapter of JOB on Hugging Face or Azure ML, with a model card and the audit bundle.

    New repositories are private. The same again changes nothing. Prints the address.

    \b
    Examples:
      trainchain push @last hf://me/support-bot-lora
      trainchain push support-bot azureml:support-bot-lora --json
    """
    from trainchain.cli import delivery
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    settings = Settings.load(home, hub)
    job_id = delivery.job_named(settings, job)
    document = delivery.as_reader(
        settings, out, lambda reader: delivery.push(reader, job_id, target, note=out.note, round_=round_, public=public)
    )
    if not document["created"]:
        out.note("already there: nothing was written")
    out.result(document["url"], document)
