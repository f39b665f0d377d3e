"""earnings: the one view of what a wallet earned, and where each amount is."""

import textwrap
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainchain.cli.options import Home, HubUrl, Json
from trainchain.cli.output import Output
from trainchain.core import money
from trainchain.core.errors import TrainChainError
from trainchain.core.markdown import count

if TYPE_CHECKING:
    from trainchain.cli.ledger import Line

WIDTH = 80


class By(StrEnum):
    JOB = "job"
    DAY = "day"


def earnings(
    by: Annotated[By, typer.Option("--by", help="One block for each job, or for each day (UTC).")] = By.JOB,
    csv: Annotated[bool, typer.Option("--csv", help="Print one line for each shard, as CSV.")] = False,
    hub: HubUrl = None,
    home: Home = None,
    json_: Json = False,
) -> None:
    """Show what was accepted, is held or vesting, can be claimed and was claimed, and why it is not more.

    \b
    Examples:
      trainchain earnings
      trainchain earnings --by day
      trainchain earnings --csv > earnings.csv
    """
    from trainchain.cli import collect, ledger
    from trainchain.cli.survey import Failure, survey
    from trainchain.core.settings import Settings

    if csv and json_:
        raise TrainChainError("usage.flag", "--csv and --json are two forms of one answer.", hint="Leave one out.")
    out = Output(json_mode=json_)
    with survey(Settings.load(home, hub), out, only=hub is not None) as known:
        rows = ledger.lines(known)
        failures = known.failures + [Failure(job, error) for job, error in ledger.disagreements(known)]
    if failures and not rows:
        raise failures[0].error
    for failure in failures:
        out.note(f"error[{failure.error.code}] {failure.error.message}")
        out.hint(failure.error.hint)
    groups: dict[str, list[Line]] = {}
    for row in sorted(rows, key=lambda row: (row.at, row.place)):
        groups.setdefault(row.job if by is By.JOB else row.day, []).append(row)
    failed = [failure.document() for failure in failures]
    code = collect.exit_code(failed)
    document: dict[str, Any] = {
        "wallet": known.wallet.address,
        "by": str(by),
        "lines": [{str(by): name, **_counts(group), **_strings(ledger.sums(group))} for name, group in groups.items()],
        "total": _strings(ledger.sums(rows)),
        "shards": [row.document() for row in rows if not row.replays],
        "fees": [row.document() for row in rows if row.replays],
        "failed": failed,
        **({"ok": False, "error": failed[0]} if code else {}),
    }
    if not rows:
        out.note("nothing was accepted from this wallet yet")
    text = ledger.as_csv(rows) if csv else "\n".join(_screen(groups, by, ledger.sums(rows)))
    out.result(text, document)
    if code:
        raise typer.Exit(code)


def _counts(group: list["Line"]) -> dict[str, int]:
    return {"shards": sum(not row.replays for row in group), "replays": sum(row.replays for row in group)}


def _strings(parts: dict[str, int]) -> dict[str, str]:
    return {name: str(amount) for name, amount in parts.items()}


def _screen(groups: dict[str, list["Line"]], by: By, total: dict[str, int]) -> list[str]:
    from pathlib import Path

    from trainchain.cli.ledger import sums
    from trainchain.cli.wiring import friendly

    found = []
    for name, group in groups.items():
        first = group[0]
        title = [first.name] if first.name != first.job[:12] else []
        title += [f"{first.job[:14]}..", first.hub.partition("://")[2]]
        found.append(name if by is By.DAY else "  ".join(title).rstrip())
        parts = sums(group)
        fees = sum(row.accepted for row in group if row.replays)
        told = [count(number, what.removesuffix("s")) for what, number in _counts(group).items() if number]
        found += _part("accepted", parts["accepted"], ", ".join(told) + (f" for {money.show(fees)}" if fees else ""))
        for part in ("forfeited", "held", "vesting", "settling", "claimable"):
            if parts[part]:
                found += _part(part, parts[part], "; ".join(_reasons(group, part)))
        found += _part("claimed", parts["claimed"], "")
        folder = next((str(Path(row.receipt).parent) for row in group if by is By.JOB and row.receipt), "")
        if folder:
            found.append(f"  receipts   {friendly(Path(folder))}")
    shown = "  ".join(f"{part} {money.show(amount)}" for part, amount in total.items() if amount or part == "accepted")
    return [*found, *textwrap.wrap(f"total {shown} TRAIN", WIDTH, subsequent_indent="      ")]


def _reasons(group: list["Line"], part: str) -> list[str]:
    """Why this part of theirs is where it is: of what is vesting that of the next one."""
    if part == "forfeited":
        return list(dict.fromkeys(row.reason.removeprefix("lost with another, ") for row in group if row.forfeited))
    found = list(dict.fromkeys(row.reason for row in group if row.state == part))
    return found[:1] + (["the rest after it"] if len(found) > 1 and part == "vesting" else found[1:2])


def _part(name: str, amount: int, why: str) -> list[str]:
    head = f"  {name:<10} {money.show(amount):<14} "
    return textwrap.wrap(head + why, WIDTH, subsequent_indent=" " * 28, break_on_hyphens=False, drop_whitespace=True)
