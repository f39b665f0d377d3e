"""claim [JOB]: collect rewards."""

from typing import Annotated

import typer

from trainchain.cli.options import Home, HubUrl, Json
from trainchain.cli.output import Output
from trainchain.core import money


def claim(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="One job. Default: every job earned in.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the proofs, show the amounts, send nothing.")
    ] = False,
    hub: HubUrl = None,
    home: Home = None,
    json_: Json = False,
) -> None:
    """Collect the rewards that settled jobs owe this wallet. Every proof is checked here first.

    \b
    Examples:
      trainchain claim
      trainchain claim support-bot --dry-run --json
    """
    from trainchain.cli import collect, wiring
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    settings = Settings.load(home, hub)
    client, wallet = wiring.signed_client(settings, out)
    chain = wiring.chain_of(client)
    jobs = [wiring.job_id_of(client, settings, job)] if job else collect.known_jobs(client, settings)
    document = collect.claim_all(client, chain, wallet, jobs, dry_run=dry_run)
    lines = [
        f"{row['name']:<20} round {row['through_round']:<4} "
        + (
            f"claimable {money.show(int(row['claimable']))}"
            if dry_run
            else f"claimed {money.show(int(row['claimed']))}"
        )
        + " TRAIN"
        + (f"  tx {row['tx']}" if row["tx"] else "")
        for row in document["claims"]
    ]
    if not lines:
        out.note("nothing is settled for this wallet yet")
    total = sum(int(row["claimable" if dry_run else "claimed"]) for row in document["claims"])
    lines.append(f"total {money.show(total)} TRAIN for {wallet.address}")
    out.result("\n".join(lines), document)
