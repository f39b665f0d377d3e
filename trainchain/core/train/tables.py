"""Rows out of data files, JSON lines or parquet: in bounded memory, the same on any machine. No torch."""

import json
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from trainchain.core.errors import TrainChainError

Row = dict[str, Any]

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json")
MAX_ROW = 1 << 24
"""Bytes of a row; far more than any sequence_len takes."""
BATCH_ROWS = 64
BATCH_BYTES = 1 << 18
PARQUET = b"PAR1"
PARQUET_ROWS = 16
"""Rows that are decoded at a time, so that no more than that many long ones lie in memory."""
MAX_FOOTER = 1 << 24
"""Bytes of a parquet file's list of its columns and parts; a file of ten thousand parts has a tenth of it."""
MAX_DEPTH = 32
"""How deep a column may nest; conversations with tool calls come to 12."""
VALUE = 16
"""Bytes that each value in a list counts as, at least; so a row holds a million of them at most."""
LONG = "Split it: of a row only the first sequence_len tokens are used."
DAMAGED = "The file is damaged or cut short; fetch it or write it again."

PYTHON = "python -c "
TO_PARQUET = "import pyarrow as a, pyarrow.parquet as p"
UNPACK = {".gz": "gunzip -k", ".zst": "unzstd", ".bz2": "bunzip2 -k", ".xz": "unxz -k", ".zip": "unzip"}
CONVERT = {
    ".csv": "import pyarrow.csv as c, pyarrow.parquet as p; p.write_table(c.read_csv('{old}'), '{new}')",
    ".tsv": "import pyarrow.csv as c, pyarrow.parquet as p; "
    "p.write_table(c.read_csv('{old}', parse_options=c.ParseOptions(delimiter='\\t')), '{new}')",
    ".arrow": TO_PARQUET + "; p.write_table(a.ipc.open_stream('{old}').read_all(), '{new}')",
    ".feather": TO_PARQUET + ", pyarrow.feather as f; p.write_table(f.read_table('{old}'), '{new}')",
}
ARRAY_TO_LINES = "import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)]"


def check_suffix(path: Path, what: str = "") -> None:
    """Raise TrainChainError source.unsupported on a file of another kind; `what` names the place that names it."""
    if path.suffix.lower() in SUFFIXES:
        return
    raise TrainChainError("source.unsupported", f"{what}{_not_read(path)}.", hint=_conversion(path))


def _not_read(path: Path) -> str:
    return f"{path.name} is neither JSON lines (.jsonl) nor parquet (.parquet)"


def _conversion(path: Path) -> str:
    """What brings a file of another kind into one that is read."""
    suffix = path.suffix.lower()
    if suffix in UNPACK:
        return f"Unpack it: {UNPACK[suffix]} {quote(path.name)}"
    if suffix in CONVERT:
        script = CONVERT[suffix].format(old=path.name, new=path.with_suffix(".parquet").name)
        return f'Convert it: {PYTHON}"{script}"'
    return "Convert it to one JSON object a line, and name it .jsonl."


def unit_of(path: Path) -> Literal["row", "line"]:
    """What the numbers of the file's rows count."""
    return "row" if path.suffix == ".parquet" or _is_parquet(path) else "line"


def place_of(path: Path, row: int) -> str:
    """How a row is named to people."""
    return f"{path.name} {unit_of(path)} {row}"


def bad_row(path: Path, row: int, what: str | ValueError, hint: str = "") -> TrainChainError:
    """The error that names file and row; `what` continues the sentence."""
    hint = hint or getattr(what, "hint", "") or "Correct that row, or give `type:` the format that the file has."
    return TrainChainError("data.format", f"{place_of(path, row)} {what}.", hint=hint, file=path.name, line=row)


def bad_file(path: Path, what: str, hint: str) -> TrainChainError:
    return TrainChainError("data.format", f"{path.name} {what}.", hint=hint, file=path.name)


def unreadable(path: Path, error: OSError) -> TrainChainError:
    return TrainChainError("source.missing", f"{path} cannot be read: {error.strerror}.")


def field_names(path: Path) -> list[str]:
    """The fields of the file's first row; of parquet, its columns. None where there is no row."""
    if _is_parquet(path):
        with _Parquet(path) as table:
            return table.names
    return list(next((row for _, row, _ in _json_rows(path)), {}))


def sized_rows(path: Path, fields: Collection[str]) -> Iterator[tuple[int, Row, int]]:
    """Each row with its 1-based number (of JSON its line, blank ones passed over) and its rough size in bytes.

    Of parquet only the `fields` are decoded, and a field that is null is left out. What kind of file it is follows
    from its first bytes, since a worker's copy is named by digest.
    Raises TrainChainError: source.missing, source.unsupported, and data.format naming file and row.
    """
    if path.suffix.lower() in UNPACK | CONVERT:
        check_suffix(path)
    if _is_parquet(path):
        return _parquet_rows(path, fields)
    if path.suffix.lower() == ".parquet":
        raise bad_file(path, "is not a parquet file: it does not begin with PAR1", DAMAGED)
    return _json_rows(path)


def batches(path: Path, fields: Collection[str], limit: int | None = None) -> Iterator[list[tuple[int, Row]]]:
    """The first `limit` rows as sized_rows has them, some at a time; rows before a bad one come before its error."""
    rows = islice(sized_rows(path, fields), limit)
    while True:
        batch: list[tuple[int, Row]] = []
        size = 0
        try:
            for number, row, length in rows:
                batch.append((number, row))
                size += length
                if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
                    break
        except TrainChainError:
            if batch:
                yield batch
            raise
        if not batch:
            return
        yield batch


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == PARQUET
    except OSError:
        return False


def _json_rows(path: Path) -> Iterator[tuple[int, Row, int]]:
    for number, line in enumerate(_lines(path), 1):
        text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip(b"\r\n")
        if number == 1 and text.lstrip().startswith(b"["):
            raise bad_file(path, "begins a JSON list; it should have one JSON object a line", _unlist(path))
        if len(text) > MAX_ROW:
            raise bad_row(path, number, f"is longer than {MAX_ROW >> 20} MiB", LONG)
        if not text.strip():
            continue
        try:
            row = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError as error:
            what = f"is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start + 1})"
            raise bad_row(path, number, what) from None
        except (ValueError, RecursionError) as error:
            hint = "Write each object on a line of its own: jq -c . FILE" if text.strip() == b"{" else ""
            raise bad_row(path, number, f"is not JSON ({error})", hint) from None
        if not isinstance(row, dict):
            raise bad_row(path, number, f"is a JSON {type(row).__name__}, not an object")
        yield number, row, len(text)


def _unlist(path: Path) -> str:
    new = path.with_suffix(".jsonl").name
    new = f"lines-{new}" if new == path.name else new
    return f'Write a row a line: {PYTHON}"{ARRAY_TO_LINES}" < {quote(path.name)} > {quote(new)}'


def _lines(path: Path) -> Iterator[bytes]:
    """The file's lines, each read up to what a mark and a line end add to MAX_ROW bytes, and a little more."""
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_ROW + 8):
                yield line
    except OSError as error:
        raise unreadable(path, error) from None


class _Parquet:
    """A parquet file, opened with bounds on what its footer may make the library do. Raises as sized_rows does."""

    def __init__(self, path: Path) -> None:
        from pyarrow.parquet import ParquetFile

        self._check_footer(path)
        try:
            self._file = ParquetFile(
                str(path),
                buffer_size=1 << 20,
                pre_buffer=False,
                page_checksum_verification=True,
                arrow_extensions_enabled=False,
                schema_depth_limit=MAX_DEPTH,
            )
            self.names: list[str] = list(self._file.schema_arrow.names)
            self.rows: int = self._file.metadata.num_rows
        except FileNotFoundError as error:
            raise unreadable(path, error) from None
        except Exception as error:  # a stranger's file: whatever it makes the library raise
            raise bad_file(path, f"cannot be read as parquet ({_brief(error)})", DAMAGED) from None

    @staticmethod
    def _check_footer(path: Path) -> None:
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - 8))
                tail = file.read(8)
        except OSError as error:
            raise unreadable(path, error) from None
        length = int.from_bytes(tail[:4], "little")
        if size < 12 or tail[4:] != PARQUET or length > size - 12:
            raise bad_file(path, "is no whole parquet file: its end is missing", DAMAGED)
        if length > MAX_FOOTER:
            what = f"describes its columns and parts in {length:,} bytes; {MAX_FOOTER:,} are read"
            raise bad_file(path, what, "Write it again with fewer columns or larger row groups.")

    def __enter__(self) -> "_Parquet":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def batches(self, columns: list[str]) -> Iterator[Any]:
        """Record batches of these columns, of PARQUET_ROWS rows at most."""
        return iter(self._file.iter_batches(batch_size=PARQUET_ROWS, columns=columns, use_threads=False))


def _parquet_rows(path: Path, fields: Collection[str]) -> Iterator[tuple[int, Row, int]]:
    with _Parquet(path) as table:
        columns = sorted(set(table.names) & set(fields))
        for name in columns:
            if table.names.count(name) > 1:
                raise bad_file(path, f"has the column `{name}` twice", "Write it again with one of them.")
        if not columns:
            yield from ((number, {}, 0) for number in range(1, table.rows + 1))
            return
        found = table.batches(columns)
        number = 1
        while True:
            try:
                batch = next(found, None)
            except Exception as error:  # as above
                raise bad_row(path, number, f"cannot be read ({_brief(error)})", DAMAGED) from None
            if batch is None:
                return
            arrays = {name: batch.column(name) for name in columns}
            for row, size in _decoded(path, number, arrays, batch.num_rows):
                yield number, row, size
                number += 1


def _decoded(path: Path, first: int, arrays: dict[str, Any], count: int) -> Iterator[tuple[Row, int]]:
    """The batch's rows with their rough sizes; none is made into objects before it is known to be small."""
    weight = sum(map(_weight, arrays.values()))
    if weight <= MAX_ROW:
        try:
            values = {name: array.to_pylist() for name, array in arrays.items()}
        except Exception:  # of which row, is found below
            pass
        else:
            for at in range(count):
                yield {name: found[at] for name, found in values.items() if found[at] is not None}, weight // count
            return
    for at in range(count):
        row = {name: array.slice(at, 1) for name, array in arrays.items()}
        size = sum(map(_weight, row.values()))
        if size > MAX_ROW:
            raise bad_row(path, first + at, f"is longer than {MAX_ROW >> 20} MiB", LONG)
        try:
            values = {name: array.to_pylist()[0] for name, array in row.items()}
        except UnicodeDecodeError:
            raise bad_row(path, first + at, "has text that is not UTF-8") from None
        except Exception as error:  # as above
            raise bad_row(path, first + at, f"cannot be read ({_brief(error)})", DAMAGED) from None
        yield {name: value for name, value in values.items() if value is not None}, size


def _weight(array: Any) -> int:
    """The bytes of an array; each value in a list counts VALUE at least, as nulls and empty texts take next to none."""
    from pyarrow import types

    kind = array.type
    if types.is_dictionary(kind):
        return _weight(array.dictionary_decode())
    if types.is_struct(kind):
        return sum(map(_weight, array.flatten()))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_map(kind):
        inner = array.values.slice(*_span(array)) if types.is_map(kind) else array.flatten()
        return VALUE * len(inner) + _weight(inner)
    return int(array.nbytes)


def _span(array: Any) -> tuple[int, int]:
    """Where the entries of a map array lie among its values: the first, and how many."""
    offsets = array.offsets
    return offsets[0].as_py(), offsets[len(array)].as_py() - offsets[0].as_py()


def _brief(error: Exception) -> str:
    """What a library says, in one line."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:160].rstrip(" .:")
