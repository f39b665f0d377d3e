"""Markdown that strangers' names cannot break: code spans, tables, counts. Standard library only."""

import re
from collections.abc import Sequence


def code(text: str, limit: int = 300) -> str:
    """Any text as a Markdown code span of one line: nothing in it is read as Markdown, HTML or a link."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line if len(line) <= limit else line[: limit - 2] + ".."
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    padding = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its cells hold no stranger's text but hex digits and numbers, so no bar has to be escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def count(number: int, what: str) -> str:
    """`1 round`, `2,000 rounds`."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")
