"""claim [JOB]: collect rewards."""

from typing import Annotated, Any

import typer

from trainchain.cli.options import Home, HubUrl, Json
from trainchain.cli.output import Output
from trainchain.core import money


def claim(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="One job. Default: every job earned in.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the proofs, show amounts and costs, send nothing.")
    ] = False,
    own_gas: Annotated[
        bool, typer.Option("--own-gas", help="Send with this wallet's gas, also where the hub would pay it.")
    ] = False,
    to: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Have settled pay sent to another address. Own gas.")
    ] = None,
    vouchers: Annotated[
        bool, typer.Option("--vouchers", help="Redeem vouchers also where the hub would settle soon. Own gas.")
    ] = False,
    hub: HubUrl = None,
    home: Home = None,
    json_: Json = False,
) -> None:
    """Collect what all jobs of all hubs owe this wallet. Every proof is checked here first; it works without a hub.

    \b
    Examples:
      trainchain claim
      trainchain claim support-bot --dry-run --json
    """
    from trainchain.cli import collect
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    document = collect.claim_all(
        Settings.load(home, hub),
        out,
        only=hub is not None,
        job=job,
        dry_run=dry_run,
        own_gas=own_gas,
        to=_address(to),
        vouchers=vouchers,
    )
    for failure in document["failed"]:
        out.note(f"error[{failure['code']}] {failure['message']}")
        out.hint(failure["hint"])
    verb = "claimable" if dry_run else "claimed"
    lines = [_line(row, verb) for row in document["claims"] if row["kind"]]
    for one in document["jobs"]:
        _explain(one, out)
    for cost in document["costs"]:
        _costs(cost, out)
    if not document["jobs"]:
        out.note("nothing was accepted from this wallet yet")
    total = sum(int(row[verb]) for row in document["claims"])
    lines.append(f"total {money.show(total)} TRAIN for {document['to']}")
    code = collect.exit_code(document["failed"])
    out.result("\n".join(lines), {**document, **({"ok": False, "error": document["failed"][0]} if code else {})})
    if code:
        raise typer.Exit(code)


def _address(text: str | None) -> str | None:
    from trainchain.chain.hexes import checksum, is_address
    from trainchain.core.errors import TrainChainError

    if text is None:
        return None
    mixed = text.lower() != text and text[2:].upper() != text[2:]
    if not is_address(text) or int(text, 16) == 0 or (mixed and checksum(text) != text):
        raise TrainChainError("usage.flag", f"--to is {text[:60]!r}, which is no address, or one with a typing error.")
    return checksum(text)


def _line(row: dict[str, Any], verb: str) -> str:
    from trainchain.cli.wiring import short

    tx = f"  tx {short(row['tx'])}" if row["tx"] else ""
    return f"{row['name']:<20} {verb} {money.show(int(row[verb]))} TRAIN  {row['from']}{tx}"


def _explain(job: dict[str, Any], out: Output) -> None:
    """What of a job's pay is not there to be claimed, and when it will be."""
    if job["why"]:
        out.note(f"{job['name']:<20} {job['why']}")
    if int(job["vesting"]) and job["waits"] is not None:
        amount = money.show(int(job["vesting"]))
        out.note(f"{job['name']:<20} {amount} TRAIN held: the shard at place {job['waits']} waits for its verdict")
    elif int(job["vesting"]):
        amount, shards = money.show(int(job["vesting"])), job["next_vests_after"]
        more = "1 more accepted shard" if shards == 1 else f"{shards} more accepted shards"
        out.note(f"{job['name']:<20} {amount} TRAIN vesting: the next after {more}, all when the job ends")


def _costs(cost: dict[str, Any], out: Output) -> None:
    if cost["relayed"]:
        out.note(f"cost                 none for {cost['relayed']} settled: the hub pays the gas")
    if cost["gas"]:
        coin = money.show(int(cost["coin"]))
        out.note(f"cost                 {cost['gas']:,} gas, now {coin} of the coin of chain {cost['chain_id']}")
