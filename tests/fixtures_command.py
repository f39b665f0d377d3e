"""The `trainchain` command as a person, a script or a terminal would run it, with a home of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "trainchain"]


class Ended:
    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        self.code, self.stdout, self.stderr = code, stdout, stderr

    @property
    def said(self) -> str:
        return self.stdout + self.stderr

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.stdout)
        return found

    def failed_as(self, code: str, exit_code: int) -> dict[str, Any]:
        assert self.code == exit_code, self.said
        assert f"error[{code}]" in self.stderr, self.said
        assert "Traceback" not in self.said
        if self.stdout:
            assert self.document["ok"] is False
            assert self.document["error"]["code"] == code
        return self.document["error"] if self.stdout else {}


class Desk:
    """Runs commands with one home. Nobody sits there, unless a test types."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.home = folder, folder / "home"
        self.command = COMMAND
        self.set = {"TRAINCHAIN_HOME": str(self.home), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        self.set.update(environment)

    def environment(self, **more: str) -> dict[str, str]:
        return {**os.environ, **self.set, **more}

    def run(self, *arguments: str, stdin: str = "", **more: str) -> Ended:
        done = subprocess.run(
            [*self.command, *arguments], cwd=self.folder, env=self.environment(**more), input=stdin,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        return Ended(done.returncode, done.stdout, done.stderr)

    def answer(self, *arguments: str, **more: str) -> dict[str, Any]:
        done = self.run(*arguments, "--json", **more)
        assert done.code == 0, done.stderr
        return done.document

    def typed(self, *arguments: str, answers: list[str]) -> tuple[int, str]:
        """The command on a terminal, at which these lines are typed as they are asked for."""
        import pty

        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(self.folder)
            os.execvpe(self.command[0], [*self.command, *arguments], self.environment())
        said = b""
        try:
            while True:
                said += (piece := os.read(terminal, 4096))
                if not piece:
                    break
                if answers and piece.endswith(b": "):
                    os.write(terminal, answers.pop(0).encode() + b"\n")
        except OSError:  # what a terminal says when the other end is gone
            pass
        os.close(terminal)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode().replace("\r\n", "\n")
