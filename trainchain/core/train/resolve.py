"""Everything `submit` must know of a model and its data before a job can be pinned, in one call.

Whatever is wrong with them surfaces here, on the owner's machine, as its one clear error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainchain.core.adapter import adapter_bytes
from trainchain.core.errors import TrainChainError
from trainchain.core.models import Counts, DataFormat
from trainchain.core.train.data import count_all, load_documents, name_rows, vocabulary
from trainchain.core.train.evaluate import count_held_out
from trainchain.core.train.model import (
    Targets,
    default_attention,
    find_targets,
    initial_adapter,
    load_config,
    load_tokenizer,
    longest_document,
)
from trainchain.core.train.rows import format_of, read_rows

Kernel = Literal["sdpa", "eager", "varlen"]
Source = tuple[Path, DataFormat | None]
"""A jsonl file, and its format where the recipe names one; else it is read off the first row."""
NAMED = 3
"""Of the rows that were cut or skipped, how many are named."""


@dataclass(frozen=True)
class DataFacts:
    """Of one file: the format its rows have, how many there are."""

    format: DataFormat
    rows: int


@dataclass(frozen=True)
class HeldOutFacts:
    """`rows` is what is evaluated: those asked for, or all there are; `file` counts the whole file."""

    file: DataFacts
    rows: int
    counts: Counts


@dataclass(frozen=True)
class Inspection:
    """`counts[round - 1][shard]`, the spare shards last.

    Of the training rows `truncated` were cut and `skipped` teach nothing; `truncated_at` and `skipped_at` name the
    first of these by file and line.
    """

    datasets: list[DataFacts]
    held_out: HeldOutFacts | None
    targets: Targets
    initial: bytes
    counts: list[list[Counts]]
    attention: Kernel
    dtype: Literal["fp32", "bf16"]
    truncated: int
    skipped: int
    truncated_at: list[str]
    skipped_at: list[str]


def inspect(
    model_dir: Path,
    datasets: Sequence[Source],
    held_out: Source | None,
    *,
    held_out_rows: int,
    sequence_len: int,
    batch_size: int,
    seed: int,
    rounds: int,
    shards: int,
    steps: int,
    targets: str | Sequence[str],
    r: int,
    spares: int = 0,
    attention: Kernel | None = None,
    chat_template: str | None = None,
    cache: Path | None = None,
) -> Inspection:
    """Read model folder and data, loading no weights. `targets` is `all-linear` or a list of module names.

    `attention` is what the recipe asks for, or None for the fastest that this model can run with anywhere.

    What is tokenized is kept in the folder `cache`, where an engine on this machine finds it.
    Raises TrainChainError: model.unreadable, source.missing, recipe.invalid, data.format, data.empty,
    data.too_small.
    """
    found = find_targets(model_dir, targets)
    config = load_config(model_dir)
    _check_length(config, sequence_len)
    kernel = _kernel(config, attention)
    tokenizer = load_tokenizer(model_dir, chat_template)
    sources = [(path, form or format_of(path)) for path, form in datasets]
    vocab_size = vocabulary(config)
    documents = load_documents(sources, tokenizer, sequence_len, vocab_size=vocab_size, cache=cache)
    counts = count_all(
        documents,
        sequence_len=sequence_len,
        batch_size=batch_size,
        seed=seed,
        rounds=rounds,
        shards=shards,
        steps=steps,
        spares=spares,
    )
    tested: HeldOutFacts | None = None
    if held_out is not None:
        path, form = held_out[0], held_out[1] or format_of(held_out[0])
        total = sum(1 for _ in read_rows(path))
        limit = min(held_out_rows, total)
        held = load_documents([(path, form)], tokenizer, sequence_len, limit=limit, vocab_size=vocab_size, cache=cache)
        tested = HeldOutFacts(DataFacts(form, total), held.rows, count_held_out(held))
    return Inspection(
        datasets=[DataFacts(form, rows) for (_, form), rows in zip(sources, documents.source_rows, strict=True)],
        held_out=tested,
        targets=found,
        initial=adapter_bytes(initial_adapter(found, r, seed)),
        counts=counts,
        attention=kernel,
        dtype="bf16" if str(getattr(config, "dtype", None)) in ("torch.bfloat16", "torch.float16") else "fp32",
        truncated=documents.truncated,
        skipped=documents.skipped,
        truncated_at=name_rows(sources, documents.truncated_at(NAMED)),
        skipped_at=name_rows(sources, documents.skipped_at(NAMED)),
    )


def _kernel(config: object, wanted: Kernel | None) -> Kernel:
    able = default_attention(config)
    if wanted is not None and able == "eager" != wanted:
        raise TrainChainError(
            "recipe.invalid",
            f"attention is {wanted}, but the base model's attention needs eager.",
            hint="Write `attention: eager`, or leave it out.",
        )
    return wanted or able


def _check_length(config: object, sequence_len: int) -> None:
    longest = longest_document(config)
    if longest is not None and sequence_len > longest:
        raise TrainChainError(
            "recipe.invalid",
            f"sequence_len is {sequence_len}, but the base model goes up to {longest} positions.",
            hint=f"Set sequence_len to {longest} or less.",
        )
