"""submit RECIPE: resolve it, publish it, put its pay in escrow."""

from pathlib import Path
from typing import Annotated

import typer

from trainchain.cli.options import Home, HubUrl, Json, Yes
from trainchain.cli.output import Output, may_ask
from trainchain.core import money
from trainchain.core.errors import TrainChainError


def submit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    hub: HubUrl = None,
    home: Home = None,
    own_hub: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="The hub of this address is run by you; see docs/private.md.")
    ] = None,
    yes: Yes = False,
    json_: Json = False,
) -> None:
    """Publish a fine-tuning job and put its pay in escrow. Prints the job id.

    \b
    Examples:
      trainchain submit recipe.yaml --hub https://hub.example.org
      trainchain submit recipe.yaml --yes --json
    """
    from trainchain.cli import owner
    from trainchain.cli.plan import bringer_of, resolve
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    settings = Settings.load(home, hub)
    plan = resolve(recipe, bringer_of(settings, out))
    out.note(plan.describe())

    def confirm(budget: int) -> None:
        if yes:
            return
        if not may_ask():
            raise TrainChainError(
                "usage.flag",
                f"{money.show(budget)} TRAIN would go into escrow, and nobody can be asked.",
                hint=f"trainchain submit {recipe} --yes",
            )
        typer.confirm(f"Publish, and put {money.show(budget)} TRAIN in escrow?", abort=True, err=True)

    published = owner.publish(plan, settings, out, confirm, own_hub=own_hub)
    out.result(published["job"], published)
    out.hint(f"trainchain jobs show {published['job'][:12]} --hub {settings.hub}")
