"""From hidden states to the loss without the whole sequence's logits: only supervised targets, tile by tile."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor

from trainchain.core.train.packed import MicroBatch

TILE = {"cpu": 256}
"""Targets scored at once, by device; part of the numeric class, since it orders the sums of the loss."""
OTHER_TILE = 1024
SELECTED = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "SmolLM3DecoderLayer")
"""Layers of one shape: norm, attention, sum, norm, MLP, sum. The last of them can skip what nobody scores."""


class Head(Protocol):
    """Scores the supervised targets of a micro-batch."""

    def logits(self, batch: MicroBatch) -> Tensor:
        """(targets, vocabulary)."""

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """The negative log-likelihood of all targets, summed in fp32, on the device."""


class ModelHead:
    """The model's own output, at supervised places only. For models whose output is not a plain matrix."""

    def __init__(self, base: Any) -> None:
        self._base = base

    def logits(self, batch: MicroBatch) -> Tensor:
        found: Tensor = self._base(**batch.inputs(), logits_to_keep=batch.keep).logits[0]
        return found

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        return torch.nn.functional.cross_entropy(self.logits(batch).float(), batch.labels, reduction="sum")


class TiledHead:
    """The decoder's last hidden states and the output matrix; the hidden states' gradient is made on the way.

    Where the last layer is one of `SELECTED`, its output projection and MLP too run at supervised places only.
    Raises ValueError when the model does not show these parts.
    """

    def __init__(self, base: Any) -> None:
        self._decoder = base.get_decoder()
        output = base.get_output_embeddings()
        if self._decoder is base or not isinstance(output, torch.nn.Linear):
            raise ValueError("the model is not a decoder with a matrix on top")
        self._output = output
        config = base.config.get_text_config()
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._scale = float(getattr(config, "logit_scale", 1.0)) / float(getattr(config, "logits_scaling", 1.0))
        layers = getattr(self._decoder, "layers", None)
        self._last = layers[-1] if layers is not None and type(layers[-1]).__name__ in SELECTED else None

    def logits(self, batch: MicroBatch) -> Tensor:
        z = self._output(self._hidden(batch)).float() * self._scale
        return z if self._softcap is None else torch.tanh(z / self._softcap) * self._softcap

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        hidden = self._hidden(batch)
        weight, bias = self._output.weight, self._output.bias
        tile = TILE.get(hidden.device.type, OTHER_TILE)
        found: Tensor = _TiledLoss.apply(
            hidden.to(weight.dtype), weight, bias, batch.labels, self._scale, self._softcap, tile
        )
        return found

    def _hidden(self, batch: MicroBatch) -> Tensor:
        """(targets, width)."""
        if self._last is None:
            return select(self._decoder(**batch.inputs()).last_hidden_state[0], batch.keep)
        with _only_at(self._last, batch.keep):
            found: Tensor = self._decoder(**batch.inputs()).last_hidden_state[0]
        return found


class _Select(torch.autograd.Function):  # type: ignore[misc]
    """Rows of a matrix, each at most once: the gradient is written and not added, which is exact on any device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        found = gradient.new_zeros(ctx.count, gradient.shape[1])
        return found.index_copy_(0, rows, gradient), None


def select(x: Tensor, rows: Tensor) -> Tensor:
    """The rows of x (tokens, width); `rows` are distinct."""
    found: Tensor = _Select.apply(x, rows)
    return found


@contextmanager
def _only_at(layer: Any, rows: Tensor) -> Iterator[None]:
    """Let the layer's output projection and all after it run on these rows only."""

    def selected(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed = layer.input_layernorm(hidden_states)
        attended, _ = layer.self_attn(hidden_states=normed, **kwargs)
        hidden = select(hidden_states[0], rows)[None] + attended
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    project = layer.self_attn.o_proj
    hook = project.register_forward_pre_hook(lambda _, inputs: (select(inputs[0][0], rows)[None],))
    layer.forward = MethodType(selected, layer)
    try:
        yield
    finally:
        hook.remove()
        del layer.forward


class _TiledLoss(torch.autograd.Function):  # type: ignore[misc]
    """(hidden (n, d), W (V, d), bias, labels (n), scale, softcap, tile) -> summed loss.

    The output matrix is frozen, so the gradient of the hidden states is all there is; it is computed while the
    tile's logits are there, and the logits are let go (as in Cut Your Losses, arXiv 2411.09009, and Liger).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        softcap: float | None,
        tile: int,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(hidden), tile):
            h, y = hidden[start : start + tile], labels[start : start + tile, None]
            z = (h @ weight.t() if bias is None else torch.addmm(bias, h, weight.t())).float()
            if scale != 1.0:
                z.mul_(scale)
            slope = None
            if softcap is not None:
                bent = z.div_(softcap).tanh_()
                slope = 1.0 - bent.square() if wanted else None
                z = bent.mul_(softcap)
            picked = z.gather(1, y)
            top = z.amax(dim=1, keepdim=True)
            z.sub_(top).exp_()
            norm = z.sum(dim=1, keepdim=True)
            total += (norm.log() + top - picked).sum()
            if gradient is not None:
                z.div_(norm)
                z.scatter_(1, y, z.gather(1, y) - 1.0)
                if slope is not None:
                    z.mul_(slope)
                if scale != 1.0:
                    z.mul_(scale)
                gradient[start : start + tile] = z.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer.to(gradient.dtype), None, None, None, None, None, None)
