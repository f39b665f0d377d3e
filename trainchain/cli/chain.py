"""chain deploy: put token and escrow on a chain."""

from typing import Annotated

import typer

from trainchain.cli.options import Home, Json
from trainchain.cli.output import Output

app = typer.Typer(help="The contracts that hold and pay the money.", no_args_is_help=True)


@app.command("deploy")
def deploy(
    rpc: Annotated[str, typer.Option("--rpc", metavar="URL", help="The chain's RPC, or embedded:NAME.")],
    home: Home = None,
    json_: Json = False,
) -> None:
    """Put TrainToken and TrainEscrow on a chain with this home's wallet, or find those it put there before.

    \b
    Examples:
      trainchain chain deploy --rpc http://127.0.0.1:8545
      trainchain chain deploy --rpc embedded:local --json
    """
    from trainchain.chain import escrow
    from trainchain.cli import wiring
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    settings = Settings.load(home)
    chain = escrow.connect(rpc, home=settings.home)
    made = chain.deploy(chain.faucet() or wiring.open_wallet(settings, out))
    out.result(
        f"token  {made.token}\nescrow {made.escrow}",
        {"chain_id": chain.chain_id, "token": made.token, "escrow": made.escrow},
    )
