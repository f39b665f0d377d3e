"""What a job is judged by: its held-out loss, each row by itself, and its answers to the owner's prompts."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trainchain.core.models import Counts
from trainchain.core.train.data import TokenizedData
from trainchain.core.train.packed import MicroBatch, micro_batch, split

WORST = 1e6
"""The highest held-out loss that a hub takes down."""


def count_held_out(documents: TokenizedData) -> Counts:
    """What a resolved recipe pins of its held-out rows."""
    return documents.counts(range(len(documents.ids)))


def mean_loss(
    loss_sums: Callable[[list[MicroBatch]], list[torch.Tensor]],
    documents: TokenizedData,
    *,
    device: torch.device,
    budget: int,
) -> float:
    """Mean negative log-likelihood per supervised token, in batches of at most `budget` tokens (or one row).

    WORST where it is more, or not a number: an adapter that ruins the model must be told of, not passed over.
    """
    groups = split(documents.lengths(), range(len(documents.ids)), budget)
    sums = loss_sums([micro_batch(documents, rows, device) for rows in groups])
    total = torch.stack(sums).cpu().double()
    loss = float(total.sum()) / int(sum(documents.supervised))
    return min(loss, WORST) if math.isfinite(loss) else WORST


def answers(base: Any, tokenizer: Any, prompts: Sequence[str], *, new_tokens: int, device: torch.device) -> list[str]:
    """What the model says to each prompt, greedily, all in one batch.

    A prompt is a user's message where the tokenizer has a chat template, else the text as it is.
    """
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    longest = max(len(ids) for ids in encoded)
    end = base.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id] if end is None else end if isinstance(end, list) else [end]
    ends = [token for token in ends if token is not None]
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    ids = torch.tensor([[filler] * (longest - len(each)) + each for each in encoded], device=device)
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in encoded], device=device)
    ours = base.config._attn_implementation
    try:
        base.set_attn_implementation("eager")
        with torch.no_grad():
            made = base.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=new_tokens,
                pad_token_id=filler,
                eos_token_id=ends or None,
            )
    finally:
        base.set_attn_implementation(ours)
    found: list[str] = tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in found]


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    if tokenizer.chat_template is None:
        return list(tokenizer(prompt).input_ids)
    message = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"])
