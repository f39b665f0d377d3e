"""merge DIR...: one adapter out of several that lie on disk."""

from pathlib import Path
from typing import Annotated

import typer

from trainchain.cli.options import Json
from trainchain.cli.output import Output


def merge(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders of LoRA adapters, as PEFT has them.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="A new folder for the result.")],
    method: Annotated[
        str, typer.Option(metavar="M", help="product-mean, factor-mean, stacking, residual, ties or dare.")
    ] = "product-mean",
    weights: Annotated[
        str | None, typer.Option(metavar="W,...", help="A share for each adapter, together 1. Default: equal shares.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="R", help="Of the result. Default: the largest of the adapters.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(metavar="D", help="Of ties and dare: the share of numbers that stay.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The base's folder: for --eval, and for bases named differently.")
    ] = None,
    eval_: Annotated[
        Path | None, typer.Option("--eval", metavar="FILE", help="Rows that base, adapters and result are measured on.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many of them.")] = 200,
    json_: Json = False,
) -> None:
    """Merge adapters of one base into one adapter, which PEFT loads like any other. Prints its folder.

    What a method cannot merge exactly is refused by name. Every module's error is told as it is merged: the distance
    of the result from what its method stands for (of ties and dare a matrix of their own, else the mean of B·A).

    \b
    Examples:
      trainchain merge monday tuesday -o week
      trainchain merge a b c -o abc --weights 0.5,0.3,0.2 --rank 16
      trainchain merge chat code -o both --method ties
      trainchain merge a b -o ab --base ./base --eval held-out.jsonl --json
    """
    from trainchain.cli import merging

    out = Output(json_mode=json_)
    document = merging.merge(
        adapters,
        output,
        out,
        method=method,
        weights=weights,
        rank=rank,
        density=density,
        base=base,
        eval_=eval_,
        rows=rows,
    )
    out.result(document["folder"], document)
