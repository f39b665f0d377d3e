"""wallet new | show: this home's key."""

import typer

from trainchain.cli.options import Home, Json
from trainchain.cli.output import Output

app = typer.Typer(help="This home's wallet: the key that signs and is paid.", no_args_is_help=True)


@app.command("new")
def new(home: Home = None, json_: Json = False) -> None:
    """Make a wallet. Its password is what TRAINCHAIN_PASSWORD_FILE holds; without one it has none.

    \b
    Examples:
      trainchain wallet new
      TRAINCHAIN_PASSWORD_FILE=~/.password trainchain wallet new --home ./owner
    """
    from trainchain.chain import wallet
    from trainchain.core.settings import Settings

    settings = Settings.load(home)
    made = wallet.create(settings.wallet_path, settings.password() or "")
    Output(json_mode=json_).result(made.address, {"address": made.address, "file": str(settings.wallet_path)})


@app.command("show")
def show(home: Home = None, json_: Json = False) -> None:
    """Print the wallet's address.

    \b
    Examples:
      trainchain wallet show
      trainchain wallet show --json
    """
    from trainchain.cli import wiring
    from trainchain.core.errors import TrainChainError
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    settings = Settings.load(home)
    if not settings.wallet_path.exists():
        raise TrainChainError(
            "wallet.missing", f"There is no wallet at {settings.wallet_path}.", hint="trainchain wallet new"
        )
    found = wiring.open_wallet(settings, out)
    out.result(found.address, {"address": found.address, "file": str(settings.wallet_path)})
