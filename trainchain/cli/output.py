"""What a command says: the answer on stdout, talk on stderr, one JSON document where it was asked for."""

import contextlib
import errno
import json
import os
import sys
from typing import Any, TextIO

from trainchain.core.errors import TrainChainError


class Output:
    """One command's voice. With `json_mode` the answer is exactly one document, also on failure."""

    def __init__(self, *, json_mode: bool) -> None:
        self.json_mode = json_mode

    def result(self, text: str, document: dict[str, Any]) -> None:
        """The answer: `text` for people and pipes, `document` for programs."""
        self._write(json.dumps({"ok": True, **document}) if self.json_mode else text)

    def line(self, text: str) -> None:
        """A part of an answer that comes piece by piece; with `json_mode` the one document says it all."""
        if not self.json_mode:
            self._write(_harmless(text))

    def event(self, event: dict[str, Any], text: str | None) -> None:
        """One line of a serving or watching command: JSON on stdout, or talk on stderr."""
        if self.json_mode:
            self._write(json.dumps(event))
        elif text:
            self.note(text)

    def note(self, text: str) -> None:
        _print(_harmless(text), sys.stderr)

    def hint(self, text: str) -> None:
        if text:
            self.note(f"hint: {text}")

    def error(self, error: TrainChainError, **more: Any) -> None:
        """A failure; `more` is what was found until then, for programs."""
        if self.json_mode:
            document = {"code": error.code, "message": error.message, "hint": error.hint}
            with contextlib.suppress(TrainChainError):  # stderr says it, too
                self._write(json.dumps({"ok": False, "error": document, **more}))
        self.note(f"error[{error.code}] {error.message}")
        self.hint(error.hint)

    def _write(self, text: str) -> None:
        try:
            _print(text, sys.stdout)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            with contextlib.suppress(OSError):
                sys.stdout.close()  # or the interpreter would try again at its end, and fail
            sys.stdout = None
            raise TrainChainError("disk.full", f"The answer cannot be written to stdout: {error.strerror}.") from None


def _at_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _print(text: str, stream: TextIO | None) -> None:
    if stream is not None:  # as it is where a program was started with the stream closed
        print(_printable(text, stream.encoding), file=stream, flush=True)


def _harmless(text: str) -> str:
    """The text with nothing in it that a terminal would obey: names and messages come from strangers."""
    return "".join(mark if mark.isprintable() or mark == "\n" else ascii(mark)[1:-1] for mark in text)


def _printable(text: str, encoding: str | None) -> str:
    """The text with what the stream cannot say replaced, so that a name can never crash a command."""
    name = encoding or "utf-8"
    return text.encode(name, errors="replace").decode(name)


def may_ask() -> bool:
    """Whether somebody sits at a terminal who can answer a question."""
    return _at_terminal(sys.stdin) and _at_terminal(sys.stderr)


def fancy() -> bool:
    """Whether stderr is a terminal that takes colours and a live display."""
    return _at_terminal(sys.stderr) and os.environ.get("TERM") != "dumb" and "NO_COLOR" not in os.environ
