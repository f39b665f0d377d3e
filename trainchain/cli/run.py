"""run RECIPE: the whole journey on one machine, with one command."""

from pathlib import Path
from typing import Annotated

import typer

from trainchain.cli.options import Home, Json
from trainchain.cli.output import Output


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes to start.")] = 2,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Default: NAME-lora.")] = None,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Where hub, wallets and chain lie. Default: in --home.")
    ] = None,
    home: Home = None,
    json_: Json = False,
) -> None:
    """Run a job on this machine: a hub, a chain, workers with wallets of their own. Prints the adapter's folder.

    Interrupted with Ctrl-C, the same command goes on where it stopped.

    \b
    Examples:
      trainchain run recipes/quickstart/recipe.yaml
      trainchain run recipe.yaml --workers 4 --keep ./state --json
    """
    from trainchain.cli import one_machine
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    document = one_machine.run(recipe, keep, Settings.load(home).home, workers, output, out)
    out.result(document["adapter"], document)
