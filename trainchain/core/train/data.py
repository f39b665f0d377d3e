"""Tokenized documents of a job, and the counts of its shards. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainchain.core.errors import TrainChainError
from trainchain.core.models import Counts, DataFormat, ResolvedRecipe
from trainchain.core.sharding import DataOrder
from trainchain.core.train.rows import Document, bad_row, encoder, read_rows

Tokens = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass
class TokenizedData:
    """Documents with at least one supervised target, in file order, and what became of the others.

    `supervised[i]` counts document i's targets: masked tokens but for the first, which nothing predicts.
    """

    ids: list[Tokens] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    rows: int = 0
    truncated: int = 0
    skipped: int = 0

    def add(self, document: Document, sequence_len: int) -> None:
        ids, mask = document
        self.rows += 1
        self.truncated += len(ids) > sequence_len
        supervised = sum(mask[1:sequence_len])
        if not supervised:
            self.skipped += 1
            return
        self.ids.append(np.array(ids[:sequence_len], np.int32))
        self.masks.append(np.array(mask[:sequence_len], np.bool_))
        self.supervised.append(supervised)

    def extend(self, other: "TokenizedData") -> None:
        self.ids += other.ids
        self.masks += other.masks
        self.supervised += other.supervised
        self.rows += other.rows
        self.truncated += other.truncated
        self.skipped += other.skipped

    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    def counts(self, documents: Sequence[int]) -> Counts:
        return Counts(
            rows=len(documents),
            tokens=sum(len(self.ids[row]) for row in documents),
            supervised=sum(self.supervised[row] for row in documents),
        )


def load_documents(
    sources: Sequence[tuple[Path, DataFormat]], tokenizer: Any, sequence_len: int, limit: int | None = None
) -> TokenizedData:
    """The documents of all files in order, each cut at `sequence_len`; of each file the first `limit` rows.

    Raises TrainChainError: data.format naming file and line, data.empty when nothing can be trained on.
    """
    every = TokenizedData()
    for path, form in sources:
        encode = encoder(form, tokenizer)
        found = TokenizedData()
        for number, row in islice(read_rows(path), limit):
            try:
                document = encode(row)
            except ValueError as error:
                raise bad_row(path, number, str(error)) from None
            found.add(document, sequence_len)
        if not found.rows:
            raise TrainChainError("data.empty", f"{path.name} has no rows.", hint="It needs one JSON object a line.")
        every.extend(found)
    if not every.ids:
        names = ", ".join(path.name for path, _ in sources) or "The recipe"
        raise TrainChainError(
            "data.empty",
            f"{names} has no row with a token to train on within sequence_len {sequence_len}.",
            hint="Raise sequence_len, or look at what the rows hold.",
        )
    return every


def data_order(recipe: ResolvedRecipe, documents: TokenizedData) -> DataOrder:
    training = recipe.training
    return DataOrder(documents.lengths(), sequence_len=training.sequence_len, seed=training.seed)


def shard_batches(recipe: ResolvedRecipe, order: DataOrder, round: int, shard: int) -> list[list[list[int]]]:
    """Per step the packed sequences, each a list of rows of the tokenized data."""
    batch_size = recipe.training.batch_size
    return order.shard(round, shard, shards=recipe.shards, steps=recipe.steps, batch_size=batch_size)


def count_shard(documents: TokenizedData, batches: Sequence[Sequence[Sequence[int]]]) -> Counts:
    return documents.counts([row for step in batches for sequence in step for row in sequence])


def count_all(
    documents: TokenizedData,
    *,
    sequence_len: int,
    batch_size: int,
    seed: int,
    rounds: int,
    shards: int,
    steps: int,
) -> list[list[Counts]]:
    """`counts[round - 1][shard]` as a recipe pins them; data.too_small when an epoch is less than a step."""
    order = DataOrder(documents.lengths(), sequence_len=sequence_len, seed=seed)
    sequences = len(order.epoch(0))
    if sequences < batch_size:
        raise TrainChainError(
            "data.too_small",
            f"The data fills {sequences} sequences of {sequence_len} tokens; one step takes {batch_size}.",
            hint="Lower the batch size or sequence_len, or add data.",
        )

    def counted(round: int, shard: int) -> Counts:
        batches = order.shard(round, shard, shards=shards, steps=steps, batch_size=batch_size)
        return count_shard(documents, batches)

    return [[counted(round, shard) for shard in range(shards)] for round in range(1, rounds + 1)]


def check_counts(counted: Counts, pinned: Counts, what: str) -> None:
    """Raise TrainChainError data.count_mismatch unless both say the same; `what` names what was counted."""
    if counted == pinned:
        return
    mine, theirs = counted.model_dump(), pinned.model_dump()
    raise TrainChainError(
        "data.count_mismatch",
        f"In {what} this machine counts {mine}, the recipe pins {theirs}.",
        hint="The tokenizer library or a file differs from the owner's; nothing was trained.",
        counted=mine,
        pinned=theirs,
    )
