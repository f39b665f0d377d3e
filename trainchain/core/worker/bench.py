"""Where a shard lies while it is worked on. Its states outlive the process and the lease, so that it goes on, and so
that a draw that falls on it can be answered."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from trainchain.core.messages import Lease
from trainchain.core.settings import private_folder

PREFIX = 18
"""Characters of a job's id that name its folder; the hub finds the job by them."""
DRAW = "draw.json"
"""The file of a place that was handed in, and whose verdict may be due (core/worker/answers.py)."""


class Bench:
    """One device's folder of shards in work, by job, round, shard and start adapter.

    A device has its own, so that two of them never write the states of one shard at a time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def place(self, lease: Lease) -> Path:
        """The folder of a leased shard; what an earlier lease of the same shard left lies in it."""
        name = f"{lease.round}-{lease.shard}-{lease.start[:16]}"
        return private_folder(private_folder(self._folder / lease.job[:PREFIX]) / name)

    def replay(self, lease: Lease) -> Path:
        """The empty folder of a replay; nothing of it outlives its lease."""
        name = f"{lease.round}-{lease.shard}-replay-{lease.lease[:PREFIX]}"
        folder = private_folder(self._folder / lease.job[:PREFIX]) / name
        remove(folder)
        return private_folder(folder)

    def jobs(self) -> list[str]:
        """The beginnings of the ids of jobs that something lies here of."""
        return sorted(path.name for path in _folders(self._folder) if re.fullmatch(r"0x[0-9a-f]{16}", path.name))

    def clear(self, job: str, *, before: int | None = None) -> None:
        """Remove what lies here of a job: all of it, or of the rounds before one. What may wait for a verdict stays."""
        folder = self._folder / job[:PREFIX]
        for path in _folders(folder):
            round_ = path.name.partition("-")[0]
            over = before is None or (round_.isdigit() and int(round_) < before)
            if over and not (path / DRAW).exists():
                remove(path)
        if before is None and folder.is_dir() and not any(folder.iterdir()):
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder; what somebody else holds open stays for the next time."""
    shutil.rmtree(folder, ignore_errors=True)


def _folders(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_dir()) if folder.is_dir() else iter(())
