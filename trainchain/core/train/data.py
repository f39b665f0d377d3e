"""The tokenized documents of a job, their order, and the counts of its shards. No torch."""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainchain.core.digests import canonical_json, sha256, sha256_file
from trainchain.core.errors import TrainChainError
from trainchain.core.models import Counts, DataFormat, ResolvedRecipe
from trainchain.core.sharding import DataOrder, Epoch
from trainchain.core.train.arrays import ArrayWriter, Facts, Kinds, open_arrays
from trainchain.core.train.rows import place_of, read_documents, unreadable
from trainchain.core.train.tokenized import KINDS, Collector, Parts, Place
from trainchain.core.train.tokenized import TokenizedData as TokenizedData

log = logging.getLogger(__name__)

Sources = Sequence[tuple[Path, DataFormat]]
"""Data files with their formats."""

LAYOUT = 2
"""Raised when the same rows become other documents; in every key of a cache."""
ORDER: Kinds = {"rows": np.int32, "starts": np.int32}
KEPT_ORDER = 20_000
"""The fewest documents whose order is kept: fewer are sorted faster than files are opened."""


STAND_IN = ("The sky is blue, and fish live in the sea.", "Nobody wrote this: it was made by a machine.")


@dataclass(frozen=True)
class Plan:
    """What is trained in a shard: per step rows of the documents, whose lengths come along.

    Without the packed sequences' bounds, which matter to nobody who trains.
    """

    documents: TokenizedData
    lengths: list[int]
    steps: list[list[int]]
    counts: Counts


def load_documents(
    sources: Sources,
    tokenizer: Any,
    sequence_len: int,
    limit: int | None = None,
    *,
    vocab_size: int | None = None,
    cache: Path | None = None,
) -> TokenizedData:
    """The documents of all files in order, each cut at `sequence_len`; of each file the first `limit` rows.

    With a `cache` folder they are tokenized once and mapped from there by whoever asks for the same again.
    Raises TrainChainError: source.missing; data.format naming file and line; data.empty when nothing can be
    trained on; model.unreadable on a token id not below `vocab_size`.
    """

    def fill(write: Callable[[str, NDArray[Any]], None]) -> Facts:
        collector = Collector(sequence_len, write)
        for path, form in sources:
            collector.next_source()
            for line, document in read_documents(
                path, form, tokenizer, limit, vocab_size=vocab_size, used=sequence_len
            ):
                collector.add(document, line)
        return collector.close()

    key = None if cache is None else cache_key(sources, tokenizer, sequence_len, limit, vocab_size)
    found = None if cache is None or key is None else _cached(cache / key / "documents", fill)
    if found is None:
        parts = Parts()
        facts = fill(parts.write)
        found = TokenizedData(parts.joined(), facts["rows"])
    for (path, _), rows in zip(sources, found.source_rows, strict=True):
        if not rows:
            raise TrainChainError("data.empty", f"{path.name} has no rows.", hint="Check what wrote the file.")
    if not len(found):
        raise _teaches_nothing(sources, found, sequence_len)
    return found


def cache_key(
    sources: Sources, tokenizer: Any, sequence_len: int, limit: int | None, vocab_size: int | None
) -> str | None:
    """A digest of all that the documents follow from; None for a tokenizer whose rules cannot be read off it."""
    rules = _tokenizer_digest(tokenizer)
    if rules is None:
        return None
    facts = {
        "layout": LAYOUT,
        "sources": [[_file_digest(path), form] for path, form in sources],
        "limit": limit,
        "sequence_len": sequence_len,
        "vocab_size": vocab_size,
        "tokenizer": rules,
        "libraries": {name: version(name) for name in ("tokenizers", "transformers", "jinja2")},
    }
    return sha256(canonical_json(facts))


def _tokenizer_digest(tokenizer: Any) -> str | None:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        return None
    # these two are settings of the last call, not rules; every call sets them anew
    backend.no_truncation()
    backend.no_padding()
    rest = {
        "class": type(tokenizer).__qualname__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "split_special": bool(getattr(tokenizer, "split_special_tokens", False)),
        "template": tokenizer.chat_template,
    }
    return sha256(canonical_json([sha256(backend.to_str().encode()), rest]))


def _file_digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise unreadable(path, error) from None


def _cached(folder: Path, fill: Callable[[Callable[[str, NDArray[Any]], None]], Facts]) -> TokenizedData | None:
    """The documents mapped from `folder`, written there first where they are not; None where nothing can be."""
    found = TokenizedData.mapped(folder)
    if found is not None:
        with suppress(OSError):
            os.utime(folder.parent)  # used now: a cache that must make room takes others first
        return found
    try:
        with ArrayWriter(folder, KINDS) as writer:
            writer.publish(fill(writer.write))
    except OSError as error:
        log.warning("the tokenized data is not kept in %s: %s", folder, error)
        return None
    return TokenizedData.mapped(folder)


def vocabulary(config: Any) -> int | None:
    """How many token ids a base of this config takes; None where it does not say."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def name_rows(sources: Sequence[tuple[Path, object]], places: Sequence[Place]) -> list[str]:
    return [place_of(sources[place.source][0], place.line) for place in places]


def _teaches_nothing(sources: Sources, documents: TokenizedData, sequence_len: int) -> TrainChainError:
    names = ", ".join(path.name for path, _ in sources) or "The recipe"
    first = documents.skipped_at(1)
    where = "".join(f" The first is {name}" for name in name_rows(sources, first))
    if first and first == documents.truncated_at(1):
        where += ", whose targets all lie beyond that length"
    return TrainChainError(
        "data.empty",
        f"{names} has no row with a token to train on within sequence_len {sequence_len}.{where}{'.' if where else ''}",
        hint="Raise sequence_len, or look at what the rows hold.",
    )


def data_order(recipe: ResolvedRecipe, documents: TokenizedData) -> DataOrder:
    """The job's order; kept beside the documents where these are mapped."""
    return _order(documents, recipe.training.sequence_len, recipe.training.seed)


def _order(documents: TokenizedData, sequence_len: int, seed: int) -> DataOrder:
    def keep(epoch: int, make: Callable[[], Epoch]) -> Epoch:
        if documents.folder is None or len(documents) < KEPT_ORDER:
            return make()
        folder = documents.folder / f"order-{sequence_len}-{seed}-{epoch}"
        found = open_arrays(folder, ORDER)
        if found is not None:
            return Epoch(found[1]["rows"].data, found[1]["starts"].data)
        made = make()
        with suppress(OSError), ArrayWriter(folder, ORDER) as writer:
            writer.write("rows", np.asarray(made.rows))
            writer.write("starts", np.asarray(made.starts))
            writer.publish({})
        return made

    return DataOrder(documents.sizes.data, sequence_len=sequence_len, seed=seed, keep=keep)


def shard_batches(recipe: ResolvedRecipe, order: DataOrder, round: int, shard: int) -> list[list[list[int]]]:
    """Per step the packed sequences, each a list of rows of the tokenized data.

    No step is empty: each has `batch_size` sequences, each sequence a row, and each row a supervised target.
    """
    batch_size = recipe.training.batch_size
    sizes = {"rounds": recipe.rounds, "shards": recipe.shards, "spares": recipe.spares, "steps": recipe.steps}
    return order.shard(round, shard, batch_size=batch_size, **sizes)


def plan_shard(documents: TokenizedData, lengths: list[int], batches: Sequence[Sequence[Sequence[int]]]) -> Plan:
    """The plan of the packed sequences that `shard_batches` gives."""
    rows = [[row for sequence in step for row in sequence] for step in batches]
    return Plan(documents, lengths, rows, count_shard(documents, batches))


def stand_in(tokenizer: Any, vocab_size: int | None) -> TokenizedData:
    """Two short documents of no job: what a model can be tried on where the data come later."""
    known = [[token for token in tokenizer(text).input_ids if token < (vocab_size or 1 << 31)] for text in STAND_IN]
    made = [ids if len(ids) > 1 else [0, 1, 2, 3] for ids in known]
    return TokenizedData.of([(ids, [True] * len(ids)) for ids in made], max(map(len, made)))


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
    spares: int = 0,
) -> list[list[Counts]]:
    """`counts[round - 1][shard]` as a recipe pins them; data.too_small when an epoch is less than a step.

    The spare shards of a round come last.
    """
    order = _order(documents, sequence_len, seed)
    sequences = order.size(0)
    if sequences < batch_size:
        raise TrainChainError(
            "data.too_small",
            f"The data fills {sequences} sequences of {sequence_len} tokens; one step takes {batch_size}.",
            hint="Lower the batch size or sequence_len, or add data.",
        )

    def counted(round: int, shard: int) -> Counts:
        sizes = {"rounds": rounds, "shards": shards, "spares": spares, "steps": steps}
        return count_shard(documents, order.shard(round, shard, batch_size=batch_size, **sizes))

    return [[counted(round, shard) for shard in range(shards + spares)] for round in range(1, rounds + 1)]


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
