"""The one JSON document that every benchmark prints: the machine, the versions, the settings, the figures.

Imports the standard library only. Nothing in it names a path of this machine.
"""

import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import trainchain

Value = float | int | str | bool | None


@dataclass(frozen=True)
class Figure:
    """One measured number. `peer` is what stands beside it: the peer's number, or where a cited one comes from.

    `holds` is None where there is no target; an unmet target is told, never an error.
    """

    name: str
    value: Value
    unit: str
    target: str | None = None
    peer: Value = None
    holds: bool | None = None


def at_most(name: str, value: float, unit: str, limit: float, *, digits: int = 4, peer: Value = None) -> Figure:
    """A figure whose target is an upper bound; judged before it is rounded for print."""
    return Figure(name, round(value, digits), unit, f"<= {limit:g}", peer, value <= limit)


def must(name: str, value: Value, unit: str, target: str, holds: bool, *, peer: Value = None) -> Figure:
    """A figure whose target is not a bound, judged by the caller."""
    return Figure(name, value, unit, target, peer, holds)


def failure(what: str, message: str) -> Figure:
    """What stands in the document where something could not be measured."""
    return Figure(f"error: {what}", without_paths(message), "", "it runs", None, False)


def document(
    name: str,
    packages: Sequence[str],
    settings: Mapping[str, Any],
    figures: Sequence[Figure],
    **more: Any,
) -> dict[str, Any]:
    """The whole document; `more` is what a reader of the figures may want beside them."""
    return {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in packages}},
        "settings": dict(settings),
        "figures": [asdict(figure) for figure in figures],
        **more,
    }


def write(found: Mapping[str, Any]) -> None:
    """Print the document on stdout."""
    sys.stdout.write(json.dumps(found, indent=1, allow_nan=False) + "\n")


def machine() -> dict[str, Any]:
    """What the figures were measured on. The load tells what else ran: 1, 5 and 15 minutes before now."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def without_paths(text: str) -> str:
    """The text with every absolute path cut down to its last part."""
    return re.sub(r"(?<![\w.])(?:[A-Za-z]:)?(?:[\\/][^\s\\/:'\"]+)*[\\/](?=[^\s\\/])", "", text)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _version(package: str) -> str:
    if package == "trainchain":  # what is measured, not what was installed once
        return trainchain.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
