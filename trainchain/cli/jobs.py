"""jobs ls | show | cancel | reclaim: what becomes of a job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainchain.cli.options import Home, HubUrl, JobName, Json
from trainchain.cli.output import Output
from trainchain.core import money
from trainchain.core.errors import TrainChainError
from trainchain.core.markdown import count

if TYPE_CHECKING:
    from trainchain.core.client import HubClient
    from trainchain.core.settings import Settings

WIDTH = 80

app = typer.Typer(help="Look at jobs, and take back what they did not spend.", no_args_is_help=True)


@app.command("ls")
def list_jobs(hub: HubUrl = None, home: Home = None, json_: Json = False) -> None:
    """List a hub's jobs, the newest first.

    \b
    Examples:
      trainchain jobs ls
      trainchain jobs ls --hub https://hub.example.org --json
    """
    from trainchain.cli import wiring
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    found = wiring.hub_client(Settings.load(home, hub)).get("/v1/jobs")
    lines = [
        f"{row['job'][:12]}  {row['state']:<9}  round {row['round']}/{row['rounds']}  "
        f"spent {money.show(int(row['spent']))} of {money.show(int(row['budget']))} TRAIN  {row['name']}"
        for row in found["jobs"]
    ]
    out.result("\n".join(lines) if lines else "no jobs", found)


@app.command("show")
def show(
    job: JobName,
    lease: Annotated[
        str | None, typer.Argument(metavar="[LEASE]", help="With --evidence: of this lease alone.", show_default=False)
    ] = None,
    evidence: Annotated[bool, typer.Option("--evidence", help="Show the audits, or one's evidence.")] = False,
    hub: HubUrl = None,
    home: Home = None,
    json_: Json = False,
) -> None:
    """Show a job: its rounds, losses, shards, workers and money; or its audits, and why one ended as it did.

    \b
    Examples:
      trainchain jobs show @last
      trainchain jobs show 0x7f3a9c --evidence
      trainchain jobs show 0x7f3a9c --evidence 0x51c2d8 --json
    """
    from trainchain.cli import wiring
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    settings = Settings.load(home, hub)
    if lease is not None and not evidence:
        raise TrainChainError(
            "usage.flag", f"What is {lease[:80]!r} for?", hint="trainchain jobs show JOB --evidence LEASE"
        )
    client = wiring.hub_client(settings)
    view = client.get(f"/v1/jobs/{wiring.job_id_of(client, settings, job)}")
    if evidence:
        _show_evidence(client, settings, out, view, lease)
        return
    if view["private"] and wiring.address_in(settings.wallet_path) == view["owner"].lower():
        client, _ = wiring.signed_client(settings, out)  # what it answers to the samples is for its owner
        view = client.get(f"/v1/jobs/{view['job']}", signed=True)
    document = {**view, "money": _money(client, view["job"])}
    out.result(describe(document), document)


def _show_evidence(client: HubClient, settings: Settings, out: Output, view: dict[str, Any], lease: str | None) -> None:
    from trainchain.cli import audits, wiring

    signed, job_id = bool(view["private"]), view["job"]
    if signed:  # what became of work on a private job is for its owner and its workers
        client, _ = wiring.signed_client(settings, out)
    rows = audits.of_job(client, job_id, signed=signed)
    if lease is None:
        out.result(audits.listed(rows), {"job": job_id, "audits": rows})
        return
    full = audits.lease_of(rows, lease)
    document = client.get(f"/v1/jobs/{job_id}/evidence/{full}", signed=signed)
    out.result(audits.in_words(document), document)


@app.command("reclaim")
def reclaim(job: JobName, hub: HubUrl = None, home: Home = None, json_: Json = False) -> None:
    """Take back what a job never earned, once its deadline and its grace time are over. Owner only.

    \b
    Examples:
      trainchain jobs reclaim @last
      trainchain jobs reclaim support-bot --json
    """
    from trainchain.cli import collect, wiring
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    settings = Settings.load(home, hub)
    client, wallet = wiring.signed_client(settings, out)
    chain = wiring.chain_of(client)
    document = collect.reclaim(client, chain, wallet, wiring.job_id_of(client, settings, job))
    out.result(f"refunded {money.show(int(document['refunded']))} TRAIN to {wallet.address}", document)


@app.command("cancel")
def cancel(job: JobName, hub: HubUrl = None, home: Home = None, json_: Json = False) -> None:
    """Stop a job: no shard is leased any more; what is being trained may still be handed in and is paid. Owner only.

    \b
    Examples:
      trainchain jobs cancel @last
      trainchain jobs cancel support-bot --json
    """
    from trainchain.cli import wiring
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    settings = Settings.load(home, hub)
    client, _ = wiring.signed_client(settings, out)
    document = client.post(f"/v1/jobs/{wiring.job_id_of(client, settings, job)}/cancel")
    out.result(document["state"], document)


def _money(client: Any, job_id: str) -> dict[str, str] | None:
    """The escrow's own figures for a job, read from the chain and not from the hub; None before it is there."""
    from trainchain.cli import wiring

    found = wiring.escrow_job(wiring.chain_of(client), job_id)
    if found is None:
        return None
    return {
        "funded": str(found.funded),
        "settled": str(found.settled),
        "claimed": str(found.claimed),
        "claimable": str(found.settled - found.claimed),
        "refundable": str(found.free),
        "refunded": str(found.refunded),
    }


def describe(view: dict[str, Any]) -> str:
    """A job on one screen of 80 columns."""
    from trainchain.cli.wiring import short

    lines = [
        f"{view['name']}  {view['job'][:18]}..  {view['state']}  round {view['round']}/{view['rounds']}",
        f"price at most {money.show(int(view['price']))}, spent {money.show(int(view['spent']))} "
        f"of {money.show(int(view['budget']))} TRAIN",
    ]
    held = [row for row in view["evaluations"] if row["loss"] is not None or row["state"] != "done"]
    if any(row["loss"] is not None for row in held):
        shown = [f"{row['loss']:.4f}" if row["loss"] is not None else "pending" for row in held]
        lines.append("held-out loss  " + " > ".join(shown))
    for row in view["rounds_done"]:
        lines.append(f"round {row['round']}  {row['state']}")
        for shard in row["shards"]:
            if shard["spare"] and shard["state"] in ("open", "abandoned"):
                continue
            who = short(shard["worker"]) if "worker" in shard else ""
            tail = f"+{money.show(int(shard['reward']))} TRAIN" if "reward" in shard else ""
            progress = shard.get("progress") or {}
            if progress:
                tail = f"step {progress['step']}/{progress['steps']}"
            if shard["state"] == "accepted" and shard["merged_in"] != row["round"]:
                tail += "  late" if shard["merged_in"] else "  too late to be merged"
            elif shard["spare"]:
                tail += "  spare"
            if (shard.get("merge") or {}).get("why") == "leave-one-out":
                tail += "  left out"
            if shard.get("audit"):
                tail += f"  audit {shard['audit']['state']}"
            if shard.get("forfeited"):
                tail += "  forfeited"
            lines.append(f"  shard {shard['shard']:<3} {shard['state']:<9} {shard['tokens']:>8,} tokens  {who}  {tail}")
    for address, worker in view["workers"].items():
        lines.append(f"worker {address}  {worker['accepted']} accepted  {money.show(int(worker['reward']))} TRAIN")
    for address, auditor in view["auditors"].items():
        lines.append(
            f"auditor {address}  {count(auditor['replays'], 'replay')}  {money.show(int(auditor['fees']))} TRAIN"
        )
    for row in view["settlements"]:
        lines.append(f"settlement {row['round']}  total {money.show(int(row['total']))} TRAIN  tx {short(row['tx'])}")
    if money_held := view.get("money"):
        lines.append(
            "escrow  " + "  ".join(f"{name} {money.show(int(money_held[name]))}" for name in
            ("funded", "claimed", "claimable", "refundable", "refunded"))
        )  # fmt: skip
    return "\n".join(lines + _samples(view))


def _samples(view: dict[str, Any]) -> list[str]:
    """What the newest adapter that was asked answered to each sample prompt, a line each."""
    asked = [row for row in view["evaluations"] if row["samples"]]
    if not asked:
        return []
    last = asked[-1]
    pairs = zip(view["samples"], last["samples"], strict=True)
    head = "samples of the base" if last["round"] == 0 else f"samples after round {last['round']}"
    return [head, *sample_lines([{"prompt": prompt, "answer": answer} for prompt, answer in pairs])]


def sample_lines(samples: list[dict[str, str]]) -> list[str]:
    """A line for each prompt and one for its answer, cut to a terminal's width."""
    return [line for one in samples for line in (_cut(f"  > {one['prompt']}"), _cut(f"    {one['answer']}"))]


def _cut(text: str) -> str:
    """A text that strangers' models wrote, as one line of a terminal and without its control characters."""
    indent = len(text) - len(text.lstrip())
    line = " " * indent + "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= WIDTH else line[: WIDTH - 2] + ".."
