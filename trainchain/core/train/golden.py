"""Golden segments: a tiny base, rows and states that ship with the package, and how their segments are replayed.

`benchmarks/golden.py` made them. What a machine makes of them tells how its replays will compare with others'.
"""

import json
from pathlib import Path

from trainchain.core.models import FileRef, Lora, Training
from trainchain.core.segments import State, read_state, start_state
from trainchain.core.train.adapted import AdaptedModel
from trainchain.core.train.packed import micro_batch, split
from trainchain.core.train.tokenized import TokenizedData

FOLDER = Path(__file__).with_name("golden_segments")
BASE = FOLDER / "base"
ROWS = FOLDER / "rows.json"
START = "start"
PRECISIONS = ("fp32", "bf16")
STEPS, BATCH, MICRO_TOKENS, RATE = 5, 6, 96, 5e-3
BEFORE = 10
"""Steps that the warm segment's moments have seen; the cold one starts from the same adapter without them."""
RANK = 2
SHAPES = {"q_proj": (48, 48), "k_proj": (24, 48), "v_proj": (24, 48), "o_proj": (48, 48)}
SHAPES |= {"gate_proj": (96, 48), "up_proj": (96, 48), "down_proj": (48, 96)}
"""(out, in) of the linears of each of the base's layers."""
LAYERS = 2


def targets() -> list[str]:
    return [
        f"model.layers.{layer}.{'mlp' if size in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{size}"
        for layer in range(LAYERS)
        for size in SHAPES
    ]


def shapes() -> dict[str, tuple[int, ...]]:
    """The adapter's tensors."""
    found: dict[str, tuple[int, ...]] = {}
    for target in targets():
        out, inside = SHAPES[target.rpartition(".")[2]]
        found[f"base_model.model.{target}.lora_A.weight"] = (RANK, inside)
        found[f"base_model.model.{target}.lora_B.weight"] = (out, RANK)
    return found


def training(precision: str) -> Training:
    return Training.model_validate(
        {
            **{"sequence_len": 64, "batch_size": BATCH, "micro_batch_size": 2, "learning_rate": RATE},
            **{"lr_scheduler": "constant", "warmup_steps": 0, "shard_warmup_steps": 0, "max_grad_norm": 1.0},
            **{"weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8},
            **{"precision": precision, "quantization": "none", "attention": "sdpa", "adapter_path": "fused"},
            **{"segment_steps": STEPS, "seed": 0},
        }
    )


def lora() -> Lora:
    none = FileRef(name="initial.safetensors", sha256="0" * 64, size=0)
    return Lora(r=RANK, alpha=2 * RANK, targets=targets(), initial=none)


def documents() -> TokenizedData:
    """Each row is its tokens and where its answer begins, on which alone the loss is taken."""
    rows = json.loads(ROWS.read_text(encoding="utf-8"))
    pairs = ((row["ids"], [at >= row["answer"] for at in range(len(row["ids"]))]) for row in rows)
    return TokenizedData.of(pairs, 64)


def model(precision: str, rows: TokenizedData) -> AdaptedModel:
    found = AdaptedModel(training(precision), lora(), BASE)
    found.prove(rows)
    return found


def start(*, cold: bool) -> State:
    """Where a golden segment starts."""
    warm = _state(START, BEFORE)
    return start_state(warm.w) if cold else warm


def expected(precision: str, *, cold: bool) -> State:
    """Where it ends on the machine that made it."""
    return _state(name_of(precision, cold=cold), STEPS if cold else BEFORE + STEPS)


def name_of(precision: str, *, cold: bool) -> str:
    return f"{precision}-{'cold' if cold else 'warm'}"


def replay(model: AdaptedModel, rows: TokenizedData, begin: State, steps: int = STEPS) -> State:
    """So many steps from a state on, over rows that follow from the step's number."""
    model.restore(begin)
    lengths = rows.lengths()
    for step in range(begin.t, begin.t + steps):
        batch = [(step * BATCH + place) % len(rows) for place in range(BATCH)]
        groups = [micro_batch(rows, group, model.device) for group in split(lengths, batch, MICRO_TOKENS)]
        model.step([groups], sum(int(rows.supervised[row]) for row in batch), RATE)
    return model.snapshot(begin.t + steps)


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"


def _state(name: str, t: int) -> State:
    return read_state(path_of(name).read_bytes(), t, shapes())
