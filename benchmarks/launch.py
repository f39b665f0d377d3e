"""Runs sides of a benchmark as processes of their own, and says which peers are installed."""

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

log = logging.getLogger("benchmark")

SCRIPT = Path(__file__).with_name("sides.py")
OWN_PROCESS = {
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""For every side, but those that say `spins`: spinning at barriers makes a busy machine several times slower."""


_running: set[subprocess.Popen[bytes]] = set()
_ending = threading.Event()


class SideFailedError(Exception):
    """A side did not come to its end; the message is its last word."""


def run_side(spec: dict[str, Any], folder: Path, name: str, limit: float) -> dict[str, Any]:
    """What the side found. Its output goes into a file of `folder`, of which only the last line is told."""
    path, result, said = (folder / (name + suffix) for suffix in (".spec.json", ".json", ".log"))
    result.unlink(missing_ok=True)
    threads = str(spec["threads"])
    environment = os.environ | OWN_PROCESS | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if spec.get("spins"):
        del environment["OMP_WAIT_POLICY"]
    path.write_text(json.dumps(spec | {"result": str(result), "spawned": time.time()}), encoding="utf-8")
    with said.open("wb") as output:
        if _ending.is_set():
            raise SideFailedError("It was not begun: the benchmark was told to end.")
        command = [sys.executable, str(SCRIPT), str(path)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        _running.add(process)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise SideFailedError(f"It did not end within {limit:.0f} s.") from None
        finally:
            process.kill()
            process.wait()
            _running.discard(process)
    if code or not result.is_file():
        lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise SideFailedError(f"It ended with {code}: {lines[-1] if lines else 'without a word'}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def absent_peer() -> str | None:
    """Why TRL cannot be measured here, or None where it can."""
    missing = [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
    return f"left out: no {' and no '.join(missing)} here; pip install 'trainchain[bench]'" if missing else None


def begin(name: str) -> None:
    """Logging to stderr for a benchmark's own process, which like its sides waits passively and fetches nothing."""
    os.environ |= OWN_PROCESS
    logging.basicConfig(level=logging.WARNING, format=f"{name}: %(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _end)


def _end(*_: object) -> None:
    """No side outlives the benchmark."""
    _ending.set()
    for process in list(_running):
        process.kill()
    sys.exit(143)
