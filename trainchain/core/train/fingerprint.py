"""What this machine's kernels make of fixed numbers: a digest that tells apart machines whose last bits differ.

The version of PyTorch does not say it: its libraries choose kernels by the instructions that a processor has, by the
cores that it has for so many threads, and by what the environment forbids them.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

PRODUCTS = ((5, 64, 48), (96, 192, 8), (96, 8, 192), (33, 512, 192), (130, 800, 288))
"""(tokens, in, out): few tokens, an adapter's narrow sides, and sums so long that half precisions' kernels cut them."""
VOCABULARY = 1000
DIGITS = 8


@functools.lru_cache
def fingerprint(device: torch.device, precision: torch.dtype, threads: int) -> str:
    """Hex digits over the bits of representative kernels, forward and backward, in fp32 and in `precision`; of matrix
    products with `threads` besides, of all with one. Equal in every process of a machine.

    A kernel that the device does not have leaves a mark of its own. The number of threads stays what it was.
    """
    digest, before = hashlib.sha256(), torch.get_num_threads()
    counts = (1, threads) if device.type == "cpu" and threads > 1 else (1,)
    try:
        for count in counts:
            if device.type == "cpu":
                torch.set_num_threads(count)
            for dtype in dict.fromkeys((torch.float32, precision) if count == 1 else (precision,)):
                for kernel in (_products, _attention, _loss, _pointwise, _adam) if count == 1 else (_products,):
                    digest.update(_bits(kernel, functools.partial(_numbers, device=device, dtype=dtype)))
    finally:
        torch.set_num_threads(before)
    return digest.hexdigest()[:DIGITS]


Numbers = Callable[..., Tensor]


def _bits(kernel: Callable[[Numbers], Iterator[Tensor | None]], numbers: Numbers) -> bytes:
    try:
        found = [tensor.detach().float().cpu().contiguous() for tensor in kernel(numbers) if tensor is not None]
    except (RuntimeError, NotImplementedError):
        return b"absent"
    return b"".join(tensor.numpy().tobytes() for tensor in found)


def _products(numbers: Numbers) -> Iterator[Tensor | None]:
    for tokens, inside, out in PRODUCTS:
        x, weight = numbers(tokens, inside), numbers(out, inside)
        y = functional.linear(x, weight)
        y.backward(numbers(tokens, out))
        yield from (y, x.grad, weight.grad, torch.addmm(y.detach(), x.detach(), weight.detach().T, alpha=0.5))


def _attention(numbers: Numbers) -> Iterator[Tensor | None]:
    q, k, v = numbers(1, 4, 70, 48), numbers(1, 4, 70, 48), numbers(1, 4, 70, 48)
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    y.backward(numbers(1, 4, 70, 48))
    yield from (y, q.grad, k.grad, v.grad)
    yield torch.softmax((q @ k.transpose(2, 3)).float(), -1).to(v.dtype) @ v


def _loss(numbers: Numbers) -> Iterator[Tensor | None]:
    x = numbers(40, VOCABULARY)
    targets = torch.arange(40, device=x.device) * 13 % VOCABULARY
    loss = functional.cross_entropy(x.float(), targets, reduction="sum")
    loss.backward()
    yield from (loss, x.grad)


def _pointwise(numbers: Numbers) -> Iterator[Tensor | None]:
    x = numbers(37, 451)
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    y = functional.silu(normed.to(x.dtype)) * functional.gelu(x)
    y.sum().backward()
    yield from (y, x.grad, x.float().norm(), torch.exp(x), torch.tanh(x), torch.cos(x.float()))


def _adam(numbers: Numbers) -> Iterator[Tensor | None]:
    weights = torch.nn.Parameter(numbers(1003).detach().float())
    optimizer = torch.optim.AdamW([weights], lr=1e-3, fused=weights.device.type in ("cpu", "cuda"))
    for _ in range(2):
        weights.grad = weights.detach() * 0.01
        optimizer.step()
    yield weights


def _numbers(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Between -2 and 2 and with a gradient, made from their places by whole-number arithmetic.

    Of sizes far apart: sums of a half precision's products would else be exact, in whatever order they are made.
    """
    places = torch.arange(1, math.prod(shape) + 1, dtype=torch.int64) * 2654435761 % 2**32
    sizes = torch.pow(2.0, ((places >> 7) % 10 - 8).to(torch.float64))
    values = ((places.to(torch.float64) / 2**31 - 1) * sizes).to(dtype).reshape(shape)
    return values.to(device).requires_grad_()
