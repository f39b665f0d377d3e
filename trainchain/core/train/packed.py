"""Packed documents as one row without padding, and the summed loss on their supervised targets.

A micro-batch is laid out as a single row of documents one after the other. Every layer but attention works
on single tokens; attention runs on each document by itself, so no mask is built and nothing crosses from one
to the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trainchain.core.train.data import TokenizedData

ATTENTION = {"sdpa": "trainchain_sdpa", "eager": "trainchain_eager"}
"""The recipe's kernel -> the name of its per-document form among transformers' attention functions."""


@dataclass(frozen=True)
class MicroBatch:
    """`keep` are the places in the row whose logits are needed, `labels` the tokens that follow them."""

    ids: torch.Tensor
    positions: torch.Tensor
    keep: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]


def micro_batch(documents: TokenizedData, rows: Sequence[int], device: torch.device) -> MicroBatch:
    """The documents `rows`, laid out on the device."""
    ids = [documents.ids[row] for row in rows]
    lengths = tuple(len(tokens) for tokens in ids)
    keep: list[Any] = []
    labels: list[Any] = []
    offset = 0
    for row, tokens in zip(rows, ids, strict=True):
        targets = np.flatnonzero(documents.masks[row][1:])
        keep.append(offset + targets)
        labels.append(tokens[1 + targets])
        offset += len(tokens)

    def to_device(parts: Sequence[Any]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)

    positions = to_device([np.arange(length) for length in lengths])
    return MicroBatch(to_device(ids)[None], positions[None], to_device(keep), to_device(labels), lengths)


def logits(model: Any, batch: MicroBatch) -> torch.Tensor:
    """(targets, vocabulary): the model's own logits, at the kept places only."""
    out = model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=None,
        use_cache=False,
        logits_to_keep=batch.keep,
        document_lengths=batch.lengths,
    )
    found: torch.Tensor = out.logits[0]
    return found


def loss_sum(model: Any, batch: MicroBatch) -> torch.Tensor:
    """The negative log-likelihood of all targets, summed, in fp32, on the device."""
    return torch.nn.functional.cross_entropy(logits(model, batch).float(), batch.labels, reduction="sum")


def _eager(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    length = query.shape[2]
    allowed = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    allowed = allowed if attention_mask is None else allowed & attention_mask
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _per_document(
    kernel: Callable[..., tuple[torch.Tensor, None]],
) -> Callable[..., tuple[torch.Tensor, None]]:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        document_lengths: Sequence[int] | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if document_lengths is None:
            raise ValueError("the model does not hand document_lengths down to its attention")
        parts = []
        pieces = (tensor.split(list(document_lengths), dim=2) for tensor in (query, key, value))
        for length, q, k, v in zip(document_lengths, *pieces, strict=True):
            window = _window(length, sliding_window, query.device)
            parts.append(kernel(module, q, k, v, window, **kwargs)[0])
        return torch.cat(parts, dim=1), None

    return attention


def _window(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask a sliding window needs, or None where causal attention over the whole document is meant."""
    if sliding_window is None or length <= sliding_window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - sliding_window)


AttentionInterface.register(ATTENTION["sdpa"], _per_document(sdpa_attention_forward))
AttentionInterface.register(ATTENTION["eager"], _per_document(_eager))
