"""serve-hub: coordinate jobs on this machine."""

import os
from typing import Annotated

import typer

from trainchain.cli.options import Home, JsonLines
from trainchain.cli.output import Output


def serve_hub(
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Port 0 takes any free one.")] = "127.0.0.1:7070",
    chain: Annotated[str, typer.Option(metavar="URL", help="embedded:NAME, or a chain's RPC.")] = "embedded:local",
    escrow: Annotated[str | None, typer.Option(metavar="ADDRESS", help="The escrow, on a chain by URL.")] = None,
    token: Annotated[str | None, typer.Option(metavar="ADDRESS", help="The token, on a chain by URL.")] = None,
    public_chain: Annotated[
        str | None, typer.Option(metavar="URL", help="The RPC told to others. Default: --chain, if it holds no key.")
    ] = None,
    relay: Annotated[bool, typer.Option(help="Send workers' claims with this hub's gas. Own chain: always.")] = False,
    evaluate: Annotated[bool, typer.Option(help="Measure and audit in a child process of the hub's.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of that child.")] = 1,
    home: Home = None,
    json_: JsonLines = False,
    with_parent: Annotated[bool, typer.Option("--until-stdin-closes", hidden=True)] = False,
) -> None:
    """Coordinate jobs: publish, lease, check, merge and settle. Prints its address when it is ready.

    \b
    Examples:
      trainchain serve-hub
      trainchain serve-hub --listen 127.0.0.1:0 --home ./hub --json
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # merges are then the same bytes on every machine like this
    from trainchain.cli import hub_process
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    settings = Settings.load(home)
    hub_process.serve(
        settings,
        out,
        listen=listen,
        chain_url=chain,
        escrow=escrow,
        token=token,
        public_chain=public_chain,
        relays=relay,
        evaluator_threads=threads if evaluate else 0,
        with_parent=with_parent,
    )
