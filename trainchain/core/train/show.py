"""What a data file becomes under a recipe: lengths, packing, what carries loss, and what is cut or left out. No torch.

Nothing here decides anything: documents, cuts and order come from the code that trains.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainchain.core.errors import TrainChainError
from trainchain.core.models import DataFormat
from trainchain.core.sharding import DataOrder
from trainchain.core.train.chats import NOT_TRAINED, ChatTemplate
from trainchain.core.train.rows import FIELDS, Document, format_of, read_documents
from trainchain.core.train.tables import check_suffix, field_names, unit_of
from trainchain.core.train.tokenized import TokenizedData

NAMED = 1000
"""Of the rows that are cut or left out, how many are named."""
BINS = 10
PACKED = 6
"""Sequences of which is shown how they are packed; of the first of them also what is in it."""
TOLD_EVERY = 50_000
MANY_CUT = 0.05
"""The share of rows that may be cut before another length is proposed."""


@dataclass(frozen=True)
class Job:
    """What of a recipe decides how its data is packed; `sequences` is how many the whole job trains."""

    sequence_len: int
    batch_size: int
    seed: int
    sequences: int
    files: int


@dataclass(frozen=True)
class Places:
    """Some rows: how many, the first of them by number, and what becomes of them."""

    why: str
    count: int
    rows: list[int]


@dataclass(frozen=True)
class Bin:
    """How many rows have `low` to `high` tokens; `cut` where these are more than a sequence takes."""

    low: int
    high: int
    rows: int
    cut: bool


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of a row that all carry loss, or all do not."""

    text: str
    loss: bool


@dataclass(frozen=True)
class Packed:
    """A row in a packed sequence: its number, and for each of its tokens whether it carries loss."""

    row: int
    loss: list[bool]


@dataclass(frozen=True)
class Example:
    """A row as the model sees it; `length` is how many tokens it had before it was cut."""

    row: int
    length: int
    ids: list[int]
    loss: list[bool]
    pieces: list[Piece]


@dataclass(frozen=True)
class Report:
    """Tokens are counted after the cut, `lengths` before it: the median, what 95 % do not exceed, and the longest."""

    file: str
    format: DataFormat
    unit: Literal["row", "line"]
    """What the numbers of rows count."""
    rows: int
    limited: bool
    """Whether rows may follow that were not read."""
    job: Job
    fields_not_used: list[str]
    tokens: int
    supervised: int
    lengths: tuple[int, int, int]
    histogram: list[Bin]
    cut: Places
    left_out: list[Places]
    sequences: int
    """In one epoch of this file alone."""
    packed: list[list[Packed]]
    examples: list[Example]
    notes: list[str] = field(default_factory=list)

    @property
    def fill(self) -> float:
        """The share of an epoch's places that hold a token."""
        return self.tokens / (self.sequences * self.job.sequence_len) if self.sequences else 0.0

    @property
    def epochs(self) -> float:
        """How often the whole job goes over this file, were it the only one."""
        return self.job.sequences / self.sequences if self.sequences else 0.0

    def document(self) -> dict[str, Any]:
        """All of it as JSON values."""
        found = asdict(self)
        job = found.pop("job")
        median, most, longest = found.pop("lengths")
        sequences = found.pop("sequences")
        for row in [*chain.from_iterable(found["packed"]), *found["examples"]]:
            row["loss"] = [int(on) for on in row["loss"]]
        return {
            **found,
            "sequence_len": job["sequence_len"],
            "lengths": {"median": median, "p95": most, "longest": longest},
            "packing": {
                "sequences": sequences,
                "fill": round(self.fill, 4),
                "batch_size": job["batch_size"],
                "job_sequences": job["sequences"],
                "epochs": round(self.epochs, 4),
            },
        }


def examine(
    path: Path,
    form: DataFormat | None,
    tokenizer: Any,
    job: Job,
    *,
    limit: int | None = None,
    vocab_size: int | None = None,
    tell: Callable[[int], None] = lambda rows: None,
) -> Report:
    """Read a file as training would; `tell` hears now and then how many rows have been read.

    Raises TrainChainError: source.missing, source.unsupported, data.format, data.empty, model.unreadable.
    """
    if path.exists():
        check_suffix(path)
    form = form or format_of(path)
    numbers, lengths, targets = array("q"), array("q"), array("q")

    def read() -> Any:
        for number, (ids, mask) in read_documents(path, form, tokenizer, limit, vocab_size=vocab_size):
            numbers.append(number)
            lengths.append(len(ids))
            targets.append(sum(mask[1:]))
            if len(numbers) % TOLD_EVERY == 0:
                tell(len(numbers))
            yield ids, mask

    documents = TokenizedData.of(read(), job.sequence_len)
    if not numbers:
        raise TrainChainError("data.empty", f"{path.name} has no rows.", hint="Check what wrote the file.")
    kept, cut, left_out = _fates(documents, numbers, lengths, targets, form, job.sequence_len)
    order = None
    if len(documents):
        order = DataOrder(documents.sizes.data, sequence_len=job.sequence_len, seed=job.seed)
    sequences = 0 if order is None else order.size(0)
    first = [] if order is None else order.sequences(0, min(PACKED, sequences))
    used = {name for fields in FIELDS[form] for name in fields} | set(NOT_TRAINED)
    sizes = np.frombuffer(lengths, np.int64)
    examples = (
        [_example(documents, at, numbers[kept[at]], lengths[kept[at]], tokenizer) for at in first[0]] if first else []
    )
    return Report(
        file=path.name,
        format=form,
        unit=unit_of(path),
        rows=len(numbers),
        limited=limit is not None and len(numbers) == limit,
        job=job,
        fields_not_used=[name for name in field_names(path) if name not in used],
        tokens=int(documents.sizes.sum()),
        supervised=int(documents.arrays["supervised"].sum(dtype=np.int64)),
        lengths=(int(np.median(sizes)), int(np.quantile(sizes, 0.95)), int(sizes.max())),
        histogram=histogram(lengths, job.sequence_len),
        cut=cut,
        left_out=left_out,
        sequences=sequences,
        packed=[[Packed(numbers[kept[at]], _loss(documents.masks[at])) for at in rows] for rows in first],
        examples=examples,
        notes=_notes(form, tokenizer, sequences, job, sizes),
    )


def _fates(
    documents: TokenizedData,
    numbers: Sequence[int],
    lengths: Sequence[int],
    targets: Sequence[int],
    form: DataFormat,
    sequence_len: int,
) -> tuple[list[int], Places, list[Places]]:
    """Which row each document is of, counted from 0; the rows that are cut; those that are left out."""
    # TokenizedData.of counts documents from 1, whatever rows they stand on
    skipped = [place.line - 1 for place in documents.skipped_at(documents.skipped)]
    gone = set(skipped)
    cut = [numbers[at] for at, length in enumerate(lengths) if length > sequence_len and at not in gone]
    nothing = [numbers[at] for at in skipped if not targets[at]]
    beyond = [numbers[at] for at in skipped if targets[at]]
    empty = "the chat template marks nothing as the assistant's" if form == "chat_template" else "no text to learn"
    late = f"all that carries loss lies beyond token {sequence_len}"
    left_out = [Places(why, len(rows), rows[:NAMED]) for why, rows in ((empty, nothing), (late, beyond)) if rows]
    kept = [at for at in range(len(numbers)) if at not in gone]
    return kept, Places(f"longer than {sequence_len} tokens", len(cut), cut[:NAMED]), left_out


def histogram(lengths: Sequence[int], sequence_len: int) -> list[Bin]:
    """Rows by length, in at most BINS steps of a power of two up to `sequence_len`; what is longer stands apart."""
    shortest, longest = min(lengths), max(lengths)
    top = max(1, min(longest, sequence_len))
    step = 1
    while top - min(shortest, top - 1) // step * step > step * BINS:
        step *= 2
    first = min(shortest, top - 1) // step * step
    highs = [*range(first + step, top, step), top if top == sequence_len else -(-top // step) * step]
    if longest > sequence_len:
        highs.append(longest)
    counts = np.histogram(np.asarray(lengths), bins=np.asarray([-1, *highs]) + 0.5)[0]
    lows = [first + 1, *(high + 1 for high in highs)]
    return [Bin(low, high, int(rows), low > sequence_len) for low, high, rows in zip(lows, highs, counts, strict=False)]


def _loss(mask: Any) -> list[bool]:
    """Which tokens are targets: the first never is, as nothing predicts it."""
    return [False, *map(bool, mask[1:])]


def _example(documents: TokenizedData, at: int, row: int, length: int, tokenizer: Any) -> Example:
    ids: list[int] = documents.ids[at].tolist()
    loss = _loss(documents.masks[at])
    return Example(row, length, ids, loss, pieces_of((ids, loss), tokenizer))


def pieces_of(document: Document, tokenizer: Any) -> list[Piece]:
    """The document's text, cut where loss begins and ends."""
    ids, loss = document
    found = []
    begun, before = 0, ""
    for at in range(1, len(ids) + 1):
        if at < len(ids) and loss[at] == loss[begun]:
            continue
        whole = _decoded(ids[:at], tokenizer)
        # what a piece reads may depend on what stands before it: a blank at the beginning of a text may be lost
        text = whole[len(before) :] if whole.startswith(before) else _decoded(ids[begun:at], tokenizer)
        found.append(Piece(text, loss[begun]))
        begun, before = at, whole
    return found


def _decoded(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _notes(form: DataFormat, tokenizer: Any, sequences: int, job: Job, sizes: "NDArray[np.int64]") -> list[str]:
    """What an owner may not have meant."""
    notes = []
    if form == "chat_template" and not ChatTemplate(tokenizer).closes_turns():
        notes.append(
            "The chat template marks the assistant's words without the token that ends a turn, so the model does not "
            "learn to stop. Put that token before {% endgeneration %}."
        )
    if np.mean(sizes > job.sequence_len) > MANY_CUT:
        enough = -(-int(np.quantile(sizes, 1 - MANY_CUT)) // 64) * 64
        notes.append(f"With sequence_len {enough:,}, {1 - MANY_CUT:.0%} of the rows would stay whole.")
    if not sequences:
        notes.append("Nothing is left to train on.")
    elif sequences < job.batch_size and job.files == 1:
        notes.append(f"One step takes {job.batch_size} sequences: this is too little data to submit.")
    if job.files > 1:
        notes.append(f"The recipe names {job.files} data sets, which are shuffled together; here this one is alone.")
    return notes
