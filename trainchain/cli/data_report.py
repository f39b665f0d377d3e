"""How `data inspect` looks: a page of at most 100 columns, in colour on a terminal, with brackets elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from trainchain.core.train.show import Example, Packed, Places, Report

WIDEST = 100
LABEL = 12
NAMED = 6
"""Rows that are named on a line."""
EXAMPLES = 4
HEAD, TAIL = 500, 250
"""Of a stretch of text, how many letters are shown from its beginning and from its end."""
FORMATS = {"chat_template": "chat messages", "prompt_completion": "prompt and completion", "text": "text"}
WIDE_SIGNS = {
    "bar": "█",
    "loss": "█",
    "read": "▒░",
    "empty": "·",
    "rule": "─",
    "end": "↵",
    "open": "⟦",
    "close": "⟧",
    "gap": "…",
}
PLAIN_SIGNS = {
    "bar": "#",
    "loss": "#",
    "read": "=-",
    "empty": ".",
    "rule": "-",
    "end": "\\n",
    "open": "[[",
    "close": "]]",
    "gap": "..",
}


def coloured() -> bool:
    """Whether stdout is a terminal that takes colours."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def draw(report: Report, name: str) -> str:
    """The page for stdout as it is; `name` is the recipe's."""
    wide = (sys.stdout.encoding or "").lower().startswith("utf")
    columns = shutil.get_terminal_size((80, 24)).columns
    return Page(columns, wide=wide, colour=coloured()).draw(report, name)


class Page:
    """Lines of text with styles, drawn for one kind of terminal."""

    def __init__(self, columns: int, *, wide: bool, colour: bool) -> None:
        self._columns = min(max(columns, 60), WIDEST)
        self._signs = WIDE_SIGNS if wide else PLAIN_SIGNS
        self._colour = colour
        self._lines: list[Text] = []

    def draw(self, report: Report, name: str) -> str:
        from rich.console import Console

        self._lines = []
        self._head(report, name)
        self._lengths(report)
        self._fates(report)
        if report.packed:
            self._packing(report)
            self._examples(report)
        for note in report.notes:
            self._line("note", (note, "yellow"))
        out = StringIO()
        console = Console(
            file=out,
            width=self._columns,
            force_terminal=self._colour,
            color_system="standard" if self._colour else None,
            no_color=not self._colour,
            highlight=False,
            emoji=False,
            markup=False,
            legacy_windows=False,
        )
        for line in self._lines:
            console.print(line, soft_wrap=False, overflow="fold")
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def _line(self, label: str, *parts: str | tuple[str, str]) -> None:
        """A label and its words, wrapped under themselves."""
        from rich.text import Text

        words = Text.assemble(*parts)
        for at, line in enumerate(self._wrapped(words, self._columns - LABEL)):
            self._lines.append(Text.assemble(((label if at == 0 else "").ljust(LABEL), "dim"), line))

    def _wrapped(self, text: Text, width: int) -> list[Text]:
        from rich.console import Console

        return list(text.wrap(Console(width=width, file=StringIO()), width, overflow="fold"))

    def _gap(self) -> None:
        from rich.text import Text

        self._lines.append(Text())

    def _head(self, report: Report, name: str) -> None:
        rows = f"{'the first ' if report.limited else ''}{_rows(report.rows)} of {FORMATS[report.format]}"
        self._line("data", (self.clean(report.file), "bold"), f"  {rows}")
        self._line("recipe", (self.clean(name), "bold"), f"  sequence_len {report.job.sequence_len:,}")
        share = report.supervised / report.tokens if report.tokens else 0.0
        self._line(
            "tokens",
            f"{report.tokens:,}, of which ",
            (f"{report.supervised:,}", "bold green"),
            f" carry loss ({share:.1%})",
        )
        if report.fields_not_used:
            names = ", ".join(self.clean(field) for field in report.fields_not_used[:NAMED])
            self._line("not used", f"the fields {names}{self._more(len(report.fields_not_used))}")

    def _lengths(self, report: Report) -> None:
        median, most, longest = report.lengths
        self._gap()
        self._line("length", f"median {median:,}   95 % up to {most:,}   longest {longest:,} tokens")
        widest = max(len(f"{entry.high:,}") for entry in report.histogram) * 2 + 1
        most_rows = max(entry.rows for entry in report.histogram)
        counts = len(f"{most_rows:,}")
        room = self._columns - LABEL - widest - counts - 4 - len("  cut")
        for entry in report.histogram:
            label = f"{entry.low:,}-{entry.high:,}" if entry.low < entry.high else f"{entry.high:,}"
            filled = -(-room * entry.rows // most_rows) if entry.rows else 0
            self._lines.append(
                self._text(
                    " " * LABEL,
                    (label.rjust(widest), "dim"),
                    "  ",
                    (self._signs["bar"] * filled, "yellow" if entry.cut else "cyan"),
                    " " * (room - filled),
                    f"  {entry.rows:>{counts},}",
                    ("  cut" if entry.cut else "", "yellow"),
                )
            )

    def _fates(self, report: Report) -> None:
        if not report.cut.count and not report.left_out:
            return
        self._gap()
        if report.cut.count:
            self._line("cut", *self._places(report.cut, report.unit))
        for places in report.left_out:
            self._line("left out", *self._places(places, report.unit))

    def _places(self, places: Places, unit: str) -> list[str | tuple[str, str]]:
        rows = ", ".join(f"{row:,}" for row in places.rows[:NAMED])
        return [(_rows(places.count), "yellow"), f": {places.why} ({unit} {rows}{self._more(places.count)})"]

    def _more(self, count: int) -> str:
        return f" and {count - NAMED:,} more" if count > NAMED else ""

    def _packing(self, report: Report) -> None:
        job, signs = report.job, self._signs
        self._gap()
        said: list[str | tuple[str, str]] = [
            (f"{report.sequences:,}", "bold"),
            f" sequences of {job.sequence_len:,}, ",
            (f"{report.fill:.1%}", "bold"),
            " full",
        ]
        if not report.limited:
            steps = report.sequences / job.batch_size
            said.append(f"; an epoch is {steps:,.1f} steps of {job.batch_size:,}, the job {report.epochs:,.1f} epochs")
        self._line("packing", *said)
        room = self._columns - LABEL - 30
        for at, rows in enumerate(report.packed, 1):
            tokens = sum(len(row.loss) for row in rows)
            names = " ".join(f"{row.row}" for row in rows)
            names = names if len(names) <= 15 else names[:15].rsplit(" ", 1)[0] + f" {signs['gap']}"
            self._lines.append(
                self._text(
                    (str(at).rjust(LABEL - 2), "dim"),
                    "  ",
                    *self._bar(rows, job.sequence_len, room),
                    (f" {tokens / job.sequence_len:>4.0%}  {report.unit} {names}", "dim"),
                )
            )
        read = " ".join(signs["read"])
        self._lines.append(
            self._text(
                " " * LABEL,
                (signs["loss"], "green"),
                (f" carries loss   {read} only read, in turns by row   {signs['empty']} empty", "dim"),
            )
        )

    def _bar(self, rows: list[Packed], sequence_len: int, room: int) -> list[tuple[str, str]]:
        """A packed sequence as `room` cells, each as most of the tokens that it stands for."""
        flat = [(at % 2, on) for at, row in enumerate(rows) for on in row.loss]
        cells = []
        for cell in range(room):
            low, high = cell * sequence_len // room, max((cell + 1) * sequence_len // room, 1)
            inside = flat[low : max(high, low + 1)]
            if not inside:
                cells.append((self._signs["empty"], "dim"))
            elif sum(on for _, on in inside) * 2 > len(inside):
                cells.append((self._signs["loss"], "green"))
            else:
                cells.append((self._signs["read"][inside[len(inside) // 2][0]], "blue"))
        return cells

    def _examples(self, report: Report) -> None:
        self._gap()
        way = [("in green", "green")] if self._colour else [f"between {self._signs['open']} and {self._signs['close']}"]
        self._line("sequence 1", "What carries loss stands ", *way, "; the rest is only read.")
        for example in report.examples[:EXAMPLES]:
            self._example(example, report.unit)
        rest = len(report.examples) - EXAMPLES
        if rest > 0:
            self._lines.append(self._text(" " * LABEL, (f"{rest} more rows follow in this sequence", "dim")))
        self._gap()

    def _example(self, example: Example, unit: str) -> None:
        from rich.text import Text

        cut = f", cut from {example.length:,}" if example.length > len(example.ids) else ""
        title = f" {unit} {example.row:,}  {len(example.ids):,} tokens{cut}, {sum(example.loss):,} carry loss "
        rule = self._signs["rule"]
        self._lines.append(self._text((rule * 2 + title + rule * (self._columns - 2 - len(title)), "dim")))
        text = Text()
        for piece in example.pieces:
            text.append_text(self._piece(piece.text, piece.loss))
        for line in text.split("\n"):
            for part in self._wrapped(line, self._columns - 2):
                self._lines.append(Text.assemble("  ", part))

    def _piece(self, text: str, loss: bool) -> Text:
        from rich.text import Text

        found = Text()
        style = "green" if loss else "dim"
        most = HEAD + TAIL
        parts = [text] if len(text) <= most else [text[:HEAD], text[-TAIL:]]
        if loss and not self._colour:
            found.append(self._signs["open"])
        for at, part in enumerate(parts):
            if at:
                gap = self._signs["gap"]
                found.append(f" {gap} {len(text) - most:,} letters {gap} ", "yellow")
            found.append(self.clean(part), style)
        if loss and not self._colour:
            found.append(self._signs["close"])
        return found

    def clean(self, text: str) -> str:
        """The text with nothing in it that a terminal would obey, and its line ends shown."""
        end = self._signs["end"] + "\n"
        return "".join(
            end if letter == "\n" else letter if letter.isprintable() else letter.encode("unicode_escape").decode()
            for letter in text
        )

    @staticmethod
    def _text(*parts: str | tuple[str, str]) -> Text:
        from rich.text import Text

        return Text.assemble(*parts, no_wrap=True, overflow="crop")


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"
