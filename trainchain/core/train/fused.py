"""W x + s B A x as one function: PEFT's parameters without PEFT's passes over the whole output.

PEFT computes the base's product, the two small products, a product with the scale and a sum, each with its own
pass and its own saved tensor. Here the adapter is added to the base's product inside the matrix library, and
linears that are fed the same tensor (query, key, value; gate, up) share one product.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.pytorch_utils import Conv1D


def attach(model: torch.nn.Module, probe: Callable[[], object]) -> int:
    """Take over the forward of every LoRA layer on a plain linear; returns how many.

    `probe` runs the model once, to see which layers are fed the same tensor. Other kinds (quantised ones) keep
    PEFT's forward. The weights of a group become slices of one matrix: no memory is added.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and _plain(module)]
    for group in _fed_alike(layers, probe):
        joined = _Group(group)
        for place, layer in enumerate(group):
            layer.forward = _Member(joined, place)
    return len(layers)


def detach(model: torch.nn.Module) -> None:
    """Give every layer PEFT's own forward back."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.__dict__.pop("forward", None)


def tensors(model: torch.nn.Module) -> list[Tensor]:
    """What groups of layers hold beside the layers' own weights."""
    groups = {id(member._group): member._group for member in _members(model)}
    held = [each for group in groups.values() for each in (group.weight, group.biases)]
    return [each for each in held if each is not None]


def _members(model: torch.nn.Module) -> "list[_Member]":
    found = (vars(module).get("forward") for module in model.modules())
    return [member for member in found if isinstance(member, _Member)]


def _plain(layer: Any) -> bool:
    return type(layer.base_layer) in (torch.nn.Linear, Conv1D) and not any(layer.use_dora.values())


def _fed_alike(layers: Sequence[Any], probe: Callable[[], object]) -> list[list[Any]]:
    """The layers in groups: in each, neighbours in the order of calls that got the same tensor object."""
    calls: list[tuple[Any, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs: calls.append((module, inputs[0]))) for layer in layers
    ]
    try:
        probe()
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[Any]] = []
    fed: Tensor | None = None
    called = [layer for layer, _ in calls]
    for layer, tensor in calls:
        if called.count(layer) > 1:
            continue
        alike = tensor is fed and _kind(layer) == _kind(groups[-1][-1])
        if alike:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        fed = tensor
    grouped = {id(layer) for group in groups for layer in group}
    return groups + [[layer] for layer in layers if id(layer) not in grouped]


def _kind(layer: Any) -> tuple[type, bool]:
    return type(layer.base_layer), layer.base_layer.bias is None


class _Group:
    """Linears with one input. The first member's call computes for all; the others find their part waiting."""

    def __init__(self, layers: Sequence[Any]) -> None:
        bases = [layer.base_layer for layer in layers]
        self.weight: Tensor | None = None
        across = isinstance(bases[0], Conv1D)  # Conv1D keeps its weight as (in, out)
        with torch.no_grad():
            if len(bases) > 1 and not across:
                weight = torch.cat([base.weight for base in bases])
                parts = weight.split([base.weight.shape[0] for base in bases])
                for base, part in zip(bases, parts, strict=True):
                    base.weight.data = part
                self.weight = weight
            self.biases = None if bases[0].bias is None else torch.cat([base.bias for base in bases])
        self._bases = bases
        self._across = across
        self._layers = layers
        self._fed: Tensor | None = None
        self._waiting: list[Tensor | None] = []

    def output(self, place: int, x: Tensor) -> Tensor:
        if self._fed is not x:
            self._fed, self._waiting = x, list(self._compute(x))
        found, self._waiting[place] = self._waiting[place], None
        if found is None:  # the same member twice with one tensor: nothing waits for it any more
            found = self._compute(x)[place]
        if place == len(self._layers) - 1:
            self._fed, self._waiting = None, []
        return found

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        weight = self._joined()
        factors = [
            factor for layer in self._layers for factor in (layer.lora_A.default.weight, layer.lora_B.default.weight)
        ]
        scale = float(self._layers[0].scaling["default"])
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        found = _Adapted.apply(flat, weight, self.biases, scale, *factors)
        outputs = found if isinstance(found, tuple) else (found,)
        return tuple(part.view(*x.shape[:-1], part.shape[-1]) for part in outputs)

    def _joined(self) -> Tensor:
        """(out, in) of all members, wherever the weights were moved to meanwhile."""
        if self._across:
            found: Tensor = self._bases[0].weight.t()
            return found
        return self.weight if self.weight is not None else self._bases[0].weight


class _Member:
    """What stands in for one PEFT layer's forward."""

    def __init__(self, group: _Group, place: int) -> None:
        self._group = group
        self._place = place

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self._group._layers[self._place]
        if layer.disable_adapters:
            plain: Tensor = layer.base_layer(x, *args, **kwargs)
            return plain
        return self._group.output(self._place, x)


class _Adapted(torch.autograd.Function):  # type: ignore[misc]
    """(x, W, bias, s, A1, B1, A2, B2, ...) -> one output a pair, in the rows of W that belong to it.

    x is (tokens, in), W (sum of out, in) and frozen, A (r, in), B (out, r). Only x and the small h = A x are kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, *factors: Tensor) -> Any:
        a, b = _cast(factors, weight.dtype)
        joined = a[0] if len(a) == 1 else torch.cat(a)
        y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
        h = x @ joined.t()
        parts = y.split([len(each) for each in b], dim=1)
        for part, low, each in zip(parts, h.split([len(each) for each in a], dim=1), b, strict=True):
            part.addmm_(low, each.t(), alpha=scale)
        ctx.save_for_backward(x, weight, h, *factors)
        ctx.scale = scale
        return y if len(parts) == 1 else tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, h, *factors = ctx.saved_tensors
        a, b = _cast(factors, weight.dtype)
        lows = h.split([len(each) for each in a], dim=1)
        g = h.new_empty(h.shape)
        down: list[Tensor] = []
        for part, gradient, low, each in zip(
            g.split([len(each) for each in a], dim=1), gradients, lows, b, strict=True
        ):
            part.copy_(gradient @ each)
            down.append((gradient.t() @ low).mul_(ctx.scale))
        g.mul_(ctx.scale)
        up = (g.t() @ x).split([len(each) for each in a])
        dx = None
        if ctx.needs_input_grad[0]:
            rows = weight.split([len(each) for each in b])
            dx = gradients[0] @ rows[0]
            for gradient, row in zip(gradients[1:], rows[1:], strict=True):
                dx.addmm_(gradient, row)
            dx.addmm_(g, a[0] if len(a) == 1 else torch.cat(a))
        small = [each.to(factors[0].dtype) for pair in zip(up, down, strict=True) for each in pair]
        return (dx, None, None, None, *small)


def _cast(factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    return [each.to(dtype) for each in factors[0::2]], [each.to(dtype) for each in factors[1::2]]
