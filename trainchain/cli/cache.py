"""cache ls | rm | verify: what a worker keeps on this machine's disk."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainchain.cli.options import Home, Json
from trainchain.cli.output import Output, may_ask

if TYPE_CHECKING:
    from trainchain.core.settings import Settings
    from trainchain.core.worker.cache import Cache
    from trainchain.core.worker.room import Entry

SHORT = 12
SHORTEST = 4
"""Characters of a name that are taken for the whole."""

app = typer.Typer(help="Look at what workers keep on this disk, check it, remove it.", no_args_is_help=True)


@app.command("ls")
def list_entries(home: Home = None, json_: Json = False) -> None:
    """List what lies in the cache, what was used last at the end.

    \b
    Examples:
      trainchain cache ls
      trainchain cache ls --json
      TRAINCHAIN_CACHE=/big/disk trainchain cache ls
    """
    from trainchain.core.settings import Settings, show_size
    from trainchain.core.worker.room import plain

    out = Output(json_mode=json_)
    settings = Settings.load(home)
    found = _entries(settings)
    taken = sum(entry.size for entry in found)
    lines = [
        f"{plain(entry.name)[:SHORT]:<{SHORT}}  {show_size(entry.size):>8}  {_when(entry.used)}  {_what(entry)}"
        for entry in found
    ]
    document = {
        "folder": str(settings.cache),
        "cap": settings.cache_cap,
        "bytes": taken,
        "entries": [_document(entry) for entry in found],
    }
    if lines or json_:
        out.result("\n".join(lines), document)
    if not json_:
        out.note(f"{show_size(taken)} of {show_size(settings.cache_cap)} in {settings.cache}")


@app.command("rm")
def remove(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="DIGEST...", help="Digests as ls and verify print them.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Everything that no running process uses.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="All tokenised data; it is made again when needed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before removing everything.")] = False,
    home: Home = None,
    json_: Json = False,
) -> None:
    """Remove things from the cache. What a job still needs is fetched again.

    \b
    Examples:
      trainchain cache rm 3f9ab2c41d07
      trainchain cache verify | xargs trainchain cache rm
      trainchain cache rm --all
    """
    from trainchain.cli.bring import BROUGHT, FOLDING, sweep
    from trainchain.core.errors import TrainChainError
    from trainchain.core.settings import Settings, show_size

    out = Output(json_mode=json_)
    settings = Settings.load(home)
    if names and (all_ or tokens):
        raise TrainChainError("usage.flag", "Digests were named beside --all or --tokens.", hint="Name one of them.")
    found = _entries(settings)
    chosen = _named(found, names or [])
    if all_ or tokens:
        chosen = [entry for entry in found if all_ or entry.kind == "tokens"]
    elif busy := [entry for entry in chosen if entry.in_use]:
        raise TrainChainError(
            "cache.in_use",
            f"{busy[0].name[:SHORT]} is in use by a running process; nothing was removed.",
            hint="Stop serve-gpu first.",
        )
    left = [entry for entry in chosen if entry.in_use]
    chosen = [entry for entry in chosen if not entry.in_use]
    size = show_size(sum(entry.size for entry in chosen))
    if all_ and chosen and not yes and may_ask():
        typer.confirm(f"Remove all of {settings.cache} that is not in use, {size}?", abort=True, err=True)
    freed = _remove(_cache(settings), chosen) if chosen else 0
    if settings.cache.is_dir():  # else their links keep the bytes on the disk
        sweep(settings.cache, BROUGHT, FOLDING)
    gone = [entry.name for entry in chosen]
    out.result(f"{freed} bytes freed", {"freed": freed, "removed": gone, "in_use": [entry.name for entry in left]})
    if left:
        out.note(f"{len(left)} in use by running processes were left")
    if not (names or all_ or tokens):
        out.hint("Name digests, or --all, or --tokens.")


@app.command("verify")
def verify(home: Home = None, json_: Json = False) -> int:
    """Hash everything again; print what is not what its name says, one digest a line. Exit code 4 if there is any.

    \b
    Examples:
      trainchain cache verify
      trainchain cache verify | xargs trainchain cache rm
    """
    from trainchain.core.errors import TrainChainError
    from trainchain.core.settings import Settings
    from trainchain.core.worker import cache
    from trainchain.core.worker.room import plain

    out = Output(json_mode=json_)
    settings = Settings.load(home)
    entries = _entries(settings)
    damaged = list(cache.verify(_cache(settings))) if entries else []
    checked = sum(entry.kind != "tokens" and not entry.partial for entry in entries)
    if not damaged:
        out.result("", {"checked": checked, "damaged": []}) if json_ else out.note(f"{checked} checked, all as named")
        return 0
    names = list(dict.fromkeys(entry.name for entry, _ in damaged))
    error = TrainChainError(
        "cache.damaged",
        f"{len(names)} of {checked} are not what their names say: {_what(damaged[0][0])} is {damaged[0][1]}"
        f"{' and more' if len(names) > 1 else ''}.",
        hint="trainchain cache verify | xargs trainchain cache rm",
    )
    if not json_:
        out.result("\n".join(map(plain, names)), {})
        raise error
    document = {"ok": False, "checked": checked, "damaged": [_document(entry) for entry, _ in damaged]}
    out.result("", document | {"error": {"code": error.code, "message": error.message, "hint": error.hint}})
    return error.exit_code


def _cache(settings: Settings) -> Cache:
    from trainchain.core.worker.cache import Cache

    return Cache(settings.cache, cap=settings.cache_cap)


def _entries(settings: Settings) -> list[Entry]:
    """What the cache holds; no folder is made where there is none."""
    return _cache(settings).room.entries() if settings.cache.is_dir() else []


def _remove(cache: Cache, chosen: list[Entry]) -> int:
    freed = cache.room.remove(entry.key for entry in chosen)
    left = {entry.job for entry in cache.room.entries()}
    for job in cache.private_jobs():
        if job not in left:
            cache.forget(job)
    return freed


def _named(found: list[Entry], names: list[str]) -> list[Entry]:
    from trainchain.core.errors import TrainChainError

    chosen: dict[str, Entry] = {}
    for name in names:
        fits = [entry for entry in found if entry.name == name or name == entry.name[: max(len(name), SHORTEST)]]
        if len({entry.name for entry in fits}) != 1:
            why = "has nothing named" if not fits else f"has {len(fits)} things that begin with"
            raise TrainChainError(
                "usage.flag", f"The cache {why} {name[:80]!r}; nothing was removed.", hint="trainchain cache ls"
            )
        chosen |= {entry.key: entry for entry in fits}
    return list(chosen.values())


def _what(entry: Entry) -> str:
    marks = [f"private {entry.job[:10]}"] if entry.job else []
    marks += ["partly fetched"] if entry.partial else []
    marks += ["in use"] if entry.in_use else []
    return (entry.belongs or entry.kind) + (f" ({', '.join(marks)})" if marks else "")


def _when(used: float) -> str:
    return datetime.fromtimestamp(min(max(used, 0), 253402300799), UTC).strftime("%Y-%m-%d %H:%MZ")


def _document(entry: Entry) -> dict[str, Any]:
    return {
        "digest": entry.name,
        "kind": entry.kind,
        "bytes": entry.size,
        "used": round(entry.used, 3),
        "belongs": entry.belongs,
        "job": entry.job,
        "partial": entry.partial,
        "in_use": entry.in_use,
    }
