"""train RECIPE: one shard on this machine, without a hub."""

from pathlib import Path
from typing import Annotated

import typer

from trainchain.cli.options import Checkpointing, Home, Json, MicroTokens
from trainchain.cli.output import Output


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    shard: Annotated[int, typer.Option("--shard", min=0, help="Which shard of the round, from 0.")],
    round_: Annotated[int, typer.Option("--round", min=1, help="Which round, from 1.")] = 1,
    start: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The PEFT folder to start from. Default: the initial adapter.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Default: NAME-round-R-shard-N.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: every core.")] = None,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Processes that train the shard together.")] = 1,
    checkpointing: Checkpointing = False,
    micro_tokens: MicroTokens = None,
    home: Home = None,
    json_: Json = False,
) -> None:
    """Train one shard of a recipe here, as a worker would. Prints the folder of the adapter it ends with.

    Beside the adapter lie its delta and the commitments that a worker would sign. Interrupted, the same command goes
    on from the last segment.

    \b
    Examples:
      trainchain train recipe.yaml --shard 0 -o shard-0
      trainchain train recipe.yaml --round 2 --shard 1 --start merged --json
      trainchain train recipe.yaml --shard 0 | xargs ls
    """
    from trainchain.cli import one_shard
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    document = one_shard.train(
        recipe,
        out,
        settings=Settings.load(home),
        round_=round_,
        shard=shard,
        start=start,
        output=output,
        threads=threads,
        processes=processes,
        checkpointing=checkpointing,
        micro_tokens=micro_tokens,
    )
    out.result(document["folder"], document)
