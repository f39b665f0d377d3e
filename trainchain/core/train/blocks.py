"""Blocks: what one shard of a sealed job needs of the data and nothing more, as its owner writes and a worker reads it.

A block's plain text is JSON lines in UTF-8. First a header with the number of rows in each packed sequence, then the
rows in the order they are trained in, each with its format and only the fields that this format has. A row that
comes again in the same shard is named instead of repeated, as `{"again": 3}` for row 3 (from 0). The order is that of
the same recipe published openly: a shard of a sealed job is trained to the same bits.

No torch. No error about what a block holds shows any of it.
"""

import json
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from trainchain.core.digests import sha256_file
from trainchain.core.errors import TrainChainError
from trainchain.core.models import DataFormat, DataSet, ResolvedRecipe
from trainchain.core.train.data import Plan, Sources, check_counts, data_order, plan_shard, shard_batches
from trainchain.core.train.rows import FIELDS, bad_row, encoder, read_batches
from trainchain.core.train.tokenized import Collector, Parts, TokenizedData

VERSION = 1
BATCH_ROWS = 64
"""Rows that are tokenized at once."""
IN_MEMORY = 1 << 26
"""Bytes of rows that Blocks holds in memory; with more they lie in a file without a name until it is let go."""


class Blocks:
    """The plain text of every block of a job, and of its held-out rows, on the owner's machine.

    `recipe` is the job as it would be published openly, `documents` are the rows of `sources` tokenized.
    Reads each source once: raises TrainChainError source.changed where one is not what the recipe names,
    data.format for a row that JSON cannot hold, disk.full, and what reading raises.
    """

    def __init__(
        self, recipe: ResolvedRecipe, documents: TokenizedData, sources: Sources, held_out: Path | None
    ) -> None:
        self._recipe = recipe
        self._documents = documents
        self._lengths = documents.lengths()
        self._order = data_order(recipe, documents)
        self._held_out = held_out
        self._rows = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 (closed with this object)
        weakref.finalize(self, self._rows.close)
        self._offsets = array("q", [0])
        skipped = set(documents.skipped_at(documents.skipped))
        for index, ((path, form), data) in enumerate(zip(sources, recipe.datasets, strict=True)):
            for line, text in _texts(path, form, None):
                if (index, line) not in skipped:
                    self._keep(text)
                    self._offsets.append(self._offsets[-1] + len(text))
            _check_file(path, data)
        if len(self._offsets) - 1 != len(documents):
            raise TrainChainError("source.changed", "The data changed while it was read.", hint="Submit again.")

    def block(self, round: int, shard: int) -> bytes:
        """The block of one shard. Raises TrainChainError data.count_mismatch where the recipe pins other counts."""
        recipe = self._recipe
        batches = shard_batches(recipe, self._order, round, shard)
        plan = plan_shard(self._documents, self._lengths, batches)
        check_counts(plan.counts, recipe.counts[round - 1][shard], f"shard {shard} of round {round}")
        sequences = [len(sequence) for step in batches for sequence in step]
        header = {"trainchain": VERSION, "kind": "block", "round": round, "shard": shard, "sequences": sequences}
        first: dict[int, int] = {}
        lines = [_line(header)]
        for at, row in enumerate(row for step in plan.steps for row in step):
            before = first.setdefault(row, at)
            lines.append(self._text(row) if before == at else _line({"again": before}))
        return b"".join(lines)

    def held_out(self) -> bytes:
        """The rows that the job is judged by."""
        held_out = self._recipe.held_out
        if held_out is None or self._held_out is None:
            raise TrainChainError("data.empty", "The job has no held-out data to evaluate on.")
        rows = [text for _, text in _texts(self._held_out, held_out.dataset.format, held_out.rows)]
        _check_file(self._held_out, held_out.dataset)
        return b"".join([_line({"trainchain": VERSION, "kind": "held_out"}), *rows])

    def __iter__(self) -> Iterator[tuple[int, int, bytes]]:
        """(round, shard, block) of all shards."""
        for round in range(1, self._recipe.rounds + 1):
            for shard in range(self._recipe.all_shards):
                yield round, shard, self.block(round, shard)

    def _keep(self, text: bytes) -> None:
        try:
            self._rows.write(text)
        except OSError as error:
            folder = tempfile.gettempdir()
            what = f"The rows to be sealed do not fit into {folder}: {error.strerror}."
            raise TrainChainError(
                "disk.full", what, hint="Make room there, or name another folder in TMPDIR."
            ) from None

    def _text(self, row: int) -> bytes:
        self._rows.seek(self._offsets[row])
        return self._rows.read(self._offsets[row + 1] - self._offsets[row])


def blocks_of(
    model_dir: Path, files: Mapping[str, Path], recipe: ResolvedRecipe, *, cache: Path | None = None
) -> Blocks:
    """The blocks of a job that is not sealed yet; `files` are its files by digest, `cache` is `inspect`'s."""
    from trainchain.core.train.data import load_documents, vocabulary
    from trainchain.core.train.model import load_config, load_tokenizer

    def path(data: DataSet) -> Path:
        if data.file is None or data.file.sha256 not in files:
            raise TrainChainError("source.missing", f"The data file {data.file and data.file.name} is not here.")
        return files[data.file.sha256]

    sources = [(path(data), data.format) for data in recipe.datasets]
    length, size = recipe.training.sequence_len, vocabulary(load_config(model_dir))
    tokenizer = load_tokenizer(model_dir, recipe.chat_template)
    documents = load_documents(sources, tokenizer, length, vocab_size=size, cache=cache)
    return Blocks(recipe, documents, sources, path(recipe.held_out.dataset) if recipe.held_out else None)


def _texts(path: Path, form: DataFormat, limit: int | None) -> Iterator[tuple[int, bytes]]:
    """The file's rows with their lines, as lines of a block."""
    fields = [name for group in FIELDS[form] for name in group]
    for batch in read_batches(path, limit):
        for number, row in batch:
            try:
                yield number, _line({"format": form, "row": {name: row[name] for name in fields if name in row}})
            except (TypeError, ValueError, RecursionError):
                raise bad_row(path, number, "holds a value that JSON cannot") from None


def _line(value: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half a surrogate pair, in a field that no template reads
        text = json.dumps(value, separators=(",", ":")).encode()
    return text + b"\n"


def _check_file(path: Path, data: DataSet) -> None:
    if data.file is not None and sha256_file(path) != data.file.sha256:
        raise TrainChainError("source.changed", f"{path} changed while it was read.", hint="Submit again.")


class _Row(NamedTuple):
    """A row of a block, and its line there."""

    line: int
    format: DataFormat
    row: Mapping[str, Any]


def read_block(
    data: bytes, recipe: ResolvedRecipe, round: int, shard: int, tokenizer: Any, vocab_size: int | None
) -> Plan:
    """What is trained in a shard of a sealed job.

    Nothing that the block says is taken unchecked but the rows' own words. Raises TrainChainError data.format, naming
    the block and its line, and data.count_mismatch where it holds other counts than the recipe pins.
    """
    what = f"shard {shard} of round {round}"
    name, training = f"The block of {what}", recipe.training
    header, lines = _parsed(data, name)
    sequences = header.get("sequences")
    if header != {"trainchain": VERSION, "kind": "block", "round": round, "shard": shard, "sequences": sequences}:
        raise _bad(name, 1, "is not the header of that block")
    if (
        not isinstance(sequences, list)
        or len(sequences) != recipe.steps * training.batch_size
        or not all(type(size) is int and size > 0 for size in sequences)
        or sum(sequences) != len(lines)
    ):
        raise _bad(name, 1, "does not divide its rows into the sequences of the shard's steps")
    pinned = recipe.counts[round - 1][shard]
    if len(lines) != pinned.rows:
        raise _bad(name, 1, f"is followed by {len(lines)} rows, and the recipe pins {pinned.rows}")
    formats = {entry.format for entry in recipe.datasets}
    rows: list[_Row] = []
    which: list[int] = []
    for at, value in enumerate(lines):
        again = value.get("again")
        if value.keys() == {"again"} and type(again) is int and 0 <= again < at:
            which.append(which[again])
        else:
            which.append(len(rows))
            rows.append(_row(value, formats, name, at + 2))
    documents = _tokenized(rows, training.sequence_len, tokenizer, vocab_size, name)
    if documents.skipped:
        raise _bad(name, documents.skipped_at(1)[0].line, "has no token to train on")
    lengths = documents.lengths()
    packed = [which[start:stop] for start, stop in pairwise(accumulate(sequences, initial=0))]
    for at, sequence in zip(accumulate(sequences, initial=2), packed, strict=False):
        if sum(lengths[row] for row in sequence) > training.sequence_len:
            raise _bad(name, at, f"begins a sequence of more than {training.sequence_len} tokens")
    size = training.batch_size
    plan = plan_shard(documents, lengths, [packed[at : at + size] for at in range(0, len(packed), size)])
    check_counts(plan.counts, pinned, what)
    return plan


def read_held_out(data: bytes, recipe: ResolvedRecipe, tokenizer: Any, vocab_size: int | None) -> TokenizedData:
    """The held-out rows of a sealed job, as `read_block` reads; their counts are for the caller to check."""
    name, held_out = "The held-out file", recipe.held_out
    if held_out is None:
        raise TrainChainError("data.empty", "The job has no held-out data to evaluate on.")
    header, lines = _parsed(data, name)
    if header != {"trainchain": VERSION, "kind": "held_out"}:
        raise _bad(name, 1, "is not the header of a held-out file")
    if len(lines) != held_out.rows:
        raise _bad(name, 1, f"is followed by {len(lines)} rows, and the recipe pins {held_out.rows}")
    rows = [_row(value, {held_out.dataset.format}, name, line) for line, value in enumerate(lines, 2)]
    return _tokenized(rows, recipe.training.sequence_len, tokenizer, vocab_size, name)


def _parsed(data: bytes, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the other lines, each an object."""
    *lines, rest = data.split(b"\n")
    if rest or not lines:
        raise _bad(name, len(lines) + 1, "is torn")
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            raise _bad(name, number, "is not JSON in UTF-8") from None
        if not isinstance(value, dict):
            raise _bad(name, number, "is not a JSON object")
        found.append(value)
    return found[0], found[1:]


def _row(value: Mapping[str, Any], formats: Iterable[DataFormat], name: str, line: int) -> _Row:
    if value.keys() != {"format", "row"} or not isinstance(value["row"], dict):
        raise _bad(name, line, "is not a row with its format")
    form = next((known for known in formats if known == value["format"]), None)
    if form is None:
        raise _bad(name, line, "has a format that the recipe does not name")
    return _Row(line, form, value["row"])


def _tokenized(
    rows: Sequence[_Row], sequence_len: int, tokenizer: Any, vocab_size: int | None, name: str
) -> TokenizedData:
    """The rows' documents in memory; as the Collector of an open job takes them from files."""
    documents: dict[int, tuple[list[int], list[bool]]] = {}
    for form in sorted({row.format for row in rows}):
        encode = encoder(form, tokenizer)
        alike = [row for row in rows if row.format == form]
        for batch in (alike[at : at + BATCH_ROWS] for at in range(0, len(alike), BATCH_ROWS)):
            try:
                found = encode([row.row for row in batch])
            except ValueError:  # its words may be the row's
                for row in batch:
                    try:
                        encode([row.row])
                    except ValueError:
                        raise _bad(name, row.line, f"cannot be tokenized as {form}") from None
                raise _bad(name, batch[0].line, f"begins rows that cannot be tokenized as {form}") from None
            documents.update(zip((row.line for row in batch), found, strict=True))
    parts = Parts()
    collector = Collector(sequence_len, parts.write)
    collector.next_source()
    for row in rows:
        ids, mask = documents.pop(row.line)
        limit = vocab_size or 1 << 31
        if not all(type(token) is int and 0 <= token < limit for token in ids[:sequence_len]):
            raise _bad(name, row.line, "has a token that the base model does not know")
        collector.add((ids, mask), row.line)
    facts = collector.close()
    return TokenizedData(parts.joined(), facts["rows"])


def _bad(name: str, line: int, what: str) -> TrainChainError:
    return TrainChainError(
        "data.format",
        f"{name} is not sound: line {line} {what}.",
        hint="Nothing was trained. The job's owner has to publish it anew.",
        line=line,
    )
