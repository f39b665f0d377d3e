"""The held-out loss of a base with one adapter after another, by transformers and PEFT as anybody would load them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import PeftModel

from trainchain.core.errors import TrainChainError
from trainchain.core.train.data import TokenizedData, load_documents, vocabulary
from trainchain.core.train.fold import stored_dtype
from trainchain.core.train.model import check_folder, default_attention, load_config, load_model, load_tokenizer
from trainchain.core.train.rows import format_of

LONGEST = 2048
"""Tokens of a row that are looked at, where the base takes as many."""


def held_out_losses(base: Path, rows: Path, adapters: Sequence[Path], *, limit: int) -> Iterator[float]:
    """Mean negative log-likelihood per supervised token over the first `limit` rows, of the base, then of each adapter.

    Raises TrainChainError: model.unreadable, data.*; adapter.unfit for an adapter of another base.
    """
    check_folder(base)
    config = load_config(base)
    length = min(LONGEST, int(getattr(config, "max_position_embeddings", LONGEST)))
    tokenizer = load_tokenizer(base)
    documents = load_documents([(rows, format_of(rows))], tokenizer, length, limit, vocab_size=vocabulary(config))
    model = load_model(base, dtype=stored_dtype(base), attention=default_attention(config)).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    yield _loss(model, documents, device)
    for folder in adapters:
        try:
            adapted = PeftModel.from_pretrained(model, str(folder))
        except (ValueError, RuntimeError, KeyError) as error:
            why = str(error).splitlines()[0][:200]
            raise TrainChainError("adapter.unfit", f"{folder} does not fit the base in {base}: {why}.") from None
        yield _loss(adapted.eval(), documents, device)
        model = adapted.unload()


def _loss(model: torch.nn.Module, documents: TokenizedData, device: torch.device) -> float:
    total = 0.0
    for ids, mask in zip(documents.ids, documents.masks, strict=True):
        tokens = torch.tensor(ids.tolist(), device=device)
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        total += float(losses[torch.tensor(mask.tolist(), device=device)[1:].bool()].double().sum())
    return total / int(sum(documents.supervised))
