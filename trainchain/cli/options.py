"""Options that several commands share, with the environment variable that stands for each."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object a line on stdout.")]
HubUrl = Annotated[str | None, typer.Option("--hub", metavar="URL", help="The hub's address. [env: TRAINCHAIN_HUB]")]
Home = Annotated[
    Path | None, typer.Option("--home", metavar="DIR", help="Where wallets and caches lie. [env: TRAINCHAIN_HOME]")
]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Less memory, more time: compute activations again. Same result.")
]
MicroTokens = Annotated[
    int | None,
    typer.Option("--micro-tokens", min=1, metavar="N", help="Tokens at once through the model. Default: the recipe's."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask before spending.")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, a unique prefix of it, its name, or @last.")]
