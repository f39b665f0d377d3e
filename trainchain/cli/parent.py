"""Processes that belong to another: started so that they end with it, even if it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO


def end_with_parent() -> None:
    """End this process in an orderly way when its standard input closes, which it does when its parent dies."""

    def watch() -> None:
        while os.read(0, 4096):  # not sys.stdin: its lock would outlive the interpreter
            pass
        os.kill(os.getpid(), signal.SIGTERM if os.name != "nt" else getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))

    threading.Thread(target=watch, name="parent", daemon=True).start()


def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `trainchain ARGUMENTS` with its stdout piped, its talk in `log`, and its life tied to ours.

    It gets a session of its own: Ctrl-C reaches us alone, and we stop it in the right order.
    """
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    talk: IO[bytes]
    with log.open("ab") as talk:
        return subprocess.Popen(
            [sys.executable, "-m", "trainchain", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=talk,
            env={**os.environ, **(environment or {})},
            text=True,
            encoding="utf-8",
            start_new_session=os.name != "nt",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )


def stop(process: subprocess.Popen[str], seconds: float = 10.0) -> int:
    """Ask a process to end, insist after a while; returns its exit code."""
    if process.poll() is None:
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    code = process.wait()
    if process.stdout is not None:
        process.stdout.close()
    return code
