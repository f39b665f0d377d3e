"""Held-out loss: each row by itself, cut at the sequence length."""

from typing import Any

import torch

from trainchain.core.errors import TrainChainError
from trainchain.core.models import Counts
from trainchain.core.train.data import TokenizedData
from trainchain.core.train.packed import loss_sum, micro_batch


def count_held_out(documents: TokenizedData) -> Counts:
    """What a resolved recipe pins of its held-out rows."""
    return documents.counts(range(len(documents.ids)))


def mean_loss(model: Any, documents: TokenizedData, *, device: torch.device, budget: int) -> float:
    """Mean negative log-likelihood per supervised token, in batches of at most `budget` tokens (or one row).

    Raises TrainChainError train.diverged when it is not a finite number.
    """
    rows: list[int] = []
    sums: list[torch.Tensor] = []
    tokens = 0
    with torch.no_grad():
        for row, ids in enumerate(documents.ids):
            if rows and tokens + len(ids) > budget:
                sums.append(loss_sum(model, micro_batch(documents, rows, device)))
                rows, tokens = [], 0
            rows.append(row)
            tokens += len(ids)
        sums.append(loss_sum(model, micro_batch(documents, rows, device)))
    total = torch.stack(sums).cpu().double()
    if not torch.isfinite(total).all():
        raise TrainChainError("train.diverged", "The held-out loss is not a finite number.")
    return float(total.sum()) / sum(documents.supervised)
