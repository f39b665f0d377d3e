"""How far the end of an honest replay may be from what was claimed: one table, by what a recipe pins.

A tolerance serves where the two machines are of other numeric classes; within one class ends are expected to be equal.
It is at least twice the worst honest pair that was measured, and more where there are kernels that nobody measured.
Imports numpy.
"""

import math
from dataclasses import dataclass

from trainchain.core.models import Training
from trainchain.core.replays import Distances


@dataclass(frozen=True)
class Tolerance:
    """The largest distances that an honest replay may have; see `replays.Distances`."""

    gradients: float
    squares: float
    delta: float
    length: float


@dataclass(frozen=True)
class Entry:
    """One line of the table: for which recipes (None: any), how far, and where its figures come from."""

    precision: str
    quantization: str
    attention: str | None
    cold: Tolerance
    warm: Tolerance
    origin: str


FP32 = (Tolerance(1e-3, 1e-3, 1e-2, 1e-3), Tolerance(1e-3, 1e-3, 1e-3, 1e-3))
BF16 = (Tolerance(0.10, 0.12, 0.30, 0.005), Tolerance(0.06, 0.06, 0.06, 0.003))
FP16 = (Tolerance(0.05, 0.06, 0.15, 0.004), Tolerance(0.03, 0.03, 0.03, 0.002))
SEEN = "Measured with this engine on a CPU (docs/figures/replays.json)"
BF16_SEEN = "cold 0.03, 0.03, 0.13, 0.002, warm 0.01, 0.01, 0.02, 7e-4"
ROOM = "the rest is room for kernels of GPUs, which were not measured"
EMULATED = "about twice an earlier study's emulation of GPU kernels that split sums; no GPU was measured"
UNSEEN = "Not measured: it needs a GPU, or bitsandbytes; taken from"
TABLE: tuple[Entry, ...] = (
    Entry("fp32", "none", "sdpa", *FP32, f"{SEEN}: below 5e-6, and 2e-4 for a cold delta; {ROOM}."),
    Entry("fp32", "none", "eager", *FP32, f"{SEEN}: below 1e-6, and 2e-5 for a cold delta; {ROOM}."),
    Entry("fp32", "none", "varlen", *FP32, f"{UNSEEN} sdpa."),
    Entry("bf16", "none", "sdpa", *BF16, f"{SEEN}: {BF16_SEEN}; {EMULATED}."),
    Entry("bf16", "none", "eager", *BF16, f"{SEEN}: as sdpa; {EMULATED}."),
    Entry("bf16", "none", "varlen", *BF16, f"{UNSEEN} sdpa."),
    Entry("fp16", "none", "sdpa", *FP16, f"{SEEN}: cold 0.02, 0.02, 0.03, 3e-4, warm 4e-4; {ROOM}."),
    Entry("fp16", "none", None, *FP16, "Not measured with eager or varlen; taken from sdpa."),
    Entry("fp32", "nf4", None, *BF16, f"{UNSEEN} bf16, since kernels may expand a 4-bit base in half precision."),
    Entry("bf16", "nf4", None, *BF16, f"{UNSEEN} bf16."),
    Entry("fp16", "nf4", None, *BF16, f"{UNSEEN} bf16."),
)
"""The first line that fits counts. The adapter path made no difference that was seen, and is no key."""


def entry(training: Training) -> Entry:
    """The line of the table for a recipe's training."""
    wanted = (training.precision, training.quantization)
    for line in TABLE:
        if (line.precision, line.quantization) == wanted and line.attention in (None, training.attention):
            return line
    raise ValueError(f"no tolerance for {wanted} with {training.attention}")


def tolerance(training: Training, *, cold: bool) -> Tolerance:
    """How far honest replays of a recipe's segments may be apart; `cold` ones start with a second moment of zero."""
    line = entry(training)
    return line.cold if cold else line.warm


def beyond(distances: Distances, tolerance: Tolerance) -> list[str]:
    """The names of the distances that exceed the tolerance; none is within. What is not finite exceeds all."""
    return [name for name, limit in vars(tolerance).items() if not _within(getattr(distances, name), limit)]


def cold(*, start: int, fresh: bool) -> bool:
    """Whether a segment that begins after `start` steps does so where Adam knows nothing of the squares, and so steps
    as far for noise as for a gradient: before the second step of a shard whose moments are `fresh`, zero at its start.
    (LoRA's A has no gradient, and so no squares, before B has moved.)

    By the recipe and the place alone, since the start state is its worker's word: with zeros put into it a cheat would
    choose the wider tolerance.
    """
    return fresh and start < 2


def _within(value: float, limit: float) -> bool:
    return math.isfinite(value) and value <= limit
