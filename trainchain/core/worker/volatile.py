"""A folder for a private base while it is loaded: in memory where the system offers that, of this user alone.

What a killed process left there is removed by the next one.
"""

import os
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

from trainchain.core.settings import private_folder

MEMORY = Path("/dev/shm")
"""Where Linux keeps files in memory."""
_MADE: set[str] = set()
"""The folders of this process: in a container the one before it most often had the same number."""


class Volatile:
    """The volatile folders of one worker process. `memory` is a file system in memory, if the machine has one."""

    def __init__(self, home: Path, memory: Path = MEMORY) -> None:
        owner = sha256(str(home.absolute()).encode()).hexdigest()[:16]
        self._prefix = f"trainchain-{owner}-"
        self._memory = memory
        self._disk = home / "work"
        for root in (memory, self._disk):
            self._sweep(root)

    def folder(self, size: int) -> Path:
        """A new empty folder with room for `size` bytes: in memory if they fit there twice, else on the disk."""
        roomy = (
            self._memory.is_dir()
            and os.access(self._memory, os.W_OK)
            and shutil.disk_usage(self._memory).free > 2 * size
        )
        root = self._memory if roomy else private_folder(self._disk)
        made = Path(tempfile.mkdtemp(prefix=f"{self._prefix}{os.getpid()}-", dir=root))
        _MADE.add(made.name)
        return made

    def _sweep(self, root: Path) -> None:
        for path in root.glob(f"{self._prefix}*") if root.is_dir() else ():
            pid = path.name.removeprefix(self._prefix).partition("-")[0]
            mine = pid == str(os.getpid())
            if path.name not in _MADE if mine else not (pid.isdigit() and lives(int(pid))):
                shutil.rmtree(path, ignore_errors=True)


def lives(pid: int) -> bool:
    """Whether a process of that number runs; where that cannot be asked without harm, this one alone."""
    if os.name == "nt":
        return pid == os.getpid()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
