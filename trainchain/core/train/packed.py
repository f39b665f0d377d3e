"""Packed documents as one row without padding, and the summed loss on their supervised targets.

A micro-batch is laid out as a single row of documents one after the other. Every layer but attention works
on single tokens; attention runs on each document by itself, so no mask is built and nothing crosses from one
to the next.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trainchain.core.train.data import TokenizedData

ATTENTION = {"sdpa": "trainchain_sdpa", "eager": "trainchain_eager", "varlen": "trainchain_varlen"}
"""The recipe's kernel -> the name of its per-document form among transformers' attention functions."""


@dataclass(frozen=True)
class MicroBatch:
    """`keep` are the places in the row whose logits are needed, `labels` the tokens that follow them."""

    ids: torch.Tensor
    positions: torch.Tensor
    keep: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]
    bounds: torch.Tensor
    """Where documents begin and the last ends, as the varlen kernel wants it: int32, one more than documents."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def inputs(self) -> dict[str, Any]:
        """What a model (or its decoder) is called with."""
        return {
            "input_ids": self.ids,
            "position_ids": self.positions,
            "attention_mask": None,
            "use_cache": False,
            "document_lengths": self.lengths,
            "document_bounds": self.bounds,
        }


def micro_batch(documents: TokenizedData, rows: Sequence[int], device: torch.device) -> MicroBatch:
    """The documents `rows`, laid out on the device."""
    return lay_out([(documents.ids[row], documents.masks[row]) for row in rows], device)


def lay_out(documents: Sequence[tuple[NDArray[Any], NDArray[Any]]], device: torch.device) -> MicroBatch:
    """Documents, each its tokens and which of them are supervised, one after the other on the device."""
    ids = [tokens for tokens, _ in documents]
    lengths = tuple(len(tokens) for tokens in ids)
    keep: list[Any] = []
    labels: list[Any] = []
    offset = 0
    for tokens, mask in documents:
        targets = np.flatnonzero(mask[1:])
        keep.append(offset + targets)
        labels.append(tokens[1 + targets])
        offset += len(tokens)

    def to_device(parts: Sequence[Any], dtype: Any = np.int64) -> torch.Tensor:
        array = torch.from_numpy(np.concatenate(parts).astype(dtype))
        return array.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else array.to(device)

    positions = to_device([np.arange(length) for length in lengths])
    bounds = to_device([np.cumsum([0, *lengths])], np.int32)
    return MicroBatch(to_device(ids)[None], positions[None], to_device(keep), to_device(labels), lengths, bounds)


def split(lengths: Sequence[int], rows: Sequence[int], budget: int) -> list[list[int]]:
    """The rows in order, in groups of at most `budget` tokens; a longer document is a group of its own."""
    groups: list[list[int]] = []
    room = 0
    for row in rows:
        if not groups or lengths[row] > room:
            groups.append([])
            room = budget
        groups[-1].append(row)
        room -= lengths[row]
    return groups


def deal(lengths: Sequence[int], rows: Sequence[int], budget: int, hands: int) -> list[list[list[int]]]:
    """The rows in groups of at most `budget` tokens (or one row), and for each of `hands` its groups.

    All groups are about as long, so that nobody waits for another: the longest rows go first, each to the group
    that is the shortest (LPT, Graham 1969). Within a group the rows keep their order.
    """
    place = {row: at for at, row in enumerate(rows)}
    longest_first = sorted(rows, key=lambda row: (-lengths[row], place[row]))
    total = sum(lengths[row] for row in rows)
    count = hands * max(1, -(-total // (budget * hands)))
    while True:
        shortest = [(0, index) for index in range(min(count, len(rows)))]
        groups: list[list[int]] = [[] for _ in shortest]
        for row in longest_first:
            filled, index = heapq.heappop(shortest)
            groups[index].append(row)
            heapq.heappush(shortest, (filled + lengths[row], index))
        if all(len(group) == 1 or sum(lengths[row] for row in group) <= budget for group in groups):
            ordered = [sorted(group, key=place.__getitem__) for group in groups]
            return [ordered[hand::hands] for hand in range(hands)]
        count += hands


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
        document_bounds: torch.Tensor | None = None,
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


def _varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    document_lengths: Sequence[int] | None = None,
    document_bounds: torch.Tensor | None = None,
    sliding_window: int | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """All documents in one call of the flash kernel, which takes their bounds."""
    from torch.nn.attention.varlen import varlen_attn

    if document_lengths is None or document_bounds is None:
        raise ValueError("the model does not hand document_lengths down to its attention")
    if softcap is not None:
        raise ValueError("the varlen kernel cannot cap attention scores")
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    longest = max(document_lengths)
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    gqa = q.shape[1] != k.shape[1]
    found = varlen_attn(
        q, k, v, document_bounds, document_bounds, longest, longest, scale=scaling, window_size=window, enable_gqa=gqa
    )
    return found[None], None


def _window(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask a sliding window needs, or None where causal attention over the whole document is meant."""
    if sliding_window is None or length <= sliding_window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - sliding_window)


AttentionInterface.register(ATTENTION["sdpa"], _per_document(sdpa_attention_forward))
AttentionInterface.register(ATTENTION["eager"], _per_document(_eager))
AttentionInterface.register(ATTENTION["varlen"], _varlen)
