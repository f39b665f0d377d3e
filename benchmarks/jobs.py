"""What every side of a benchmark trains on, written into one folder: base, pinned recipe, start adapter, rows.

The rows of every step come from TrainChain's data order, so that all sides see the same ones, in the same
order, with the same supervised tokens; a peer reads them from `steps.json` and needs no line of TrainChain.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

R, ALPHA = 8, 16
IGNORED = -100
SPARE_STEPS = 2
"""Beyond the last one: the very last is what the trained adapters are scored on."""

Document = tuple[list[int], list[int]]
"""Token ids, and the labels: the ids the loss is taken on, `IGNORED` elsewhere."""
Step = list[list[Document]]
"""The packed sequences of one optimizer step, each a list of documents."""

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
"""SmolLM2-135M, Llama-3.2-1B, Llama-3.1-8B, with their own vocabularies: the head costs what it costs there."""


@dataclass(frozen=True)
class Size:
    """Of one job: `shards` of `steps` in each of `rounds`; the sides train shard 0 of each round."""

    steps: int
    batch: int
    sequence_len: int = 512
    rounds: int = 1
    shards: int = 1


@dataclass(frozen=True)
class Job:
    """A folder as `prepare` left it."""

    folder: Path

    def load(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
        return found

    def steps(self) -> list[Step]:
        found: list[Step] = json.loads((self.folder / "steps.json").read_text(encoding="utf-8"))
        return found

    @property
    def complete(self) -> bool:
        return (self.folder / "job.json").is_file()

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.json"

    @property
    def start(self) -> Path:
        return self.folder / "initial.safetensors"


def make_shape(shape: str, tokenizer_of: Path, folder: Path, *, bf16: bool) -> Path:
    """A random Llama of that shape, saved with the tokenizer of another model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width = SHAPES[shape]["hidden_size"]
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, initializer_range=width**-0.5)
    dtype = torch.bfloat16 if bf16 else torch.float32
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    model.cpu().save_pretrained(folder)
    for file in sorted(tokenizer_of.iterdir()):
        if file.name.startswith(("tokenizer", "chat_template", "special_tokens", "vocab", "merges")):
            shutil.copy(file, folder)
    return folder


def prepare(folder: Path, model: Path, data: Path, size: Size, training: Mapping[str, Any]) -> Job:
    """Resolve the job as an owner's machine does, then set the fields of `training` in what was resolved."""
    from trainchain.cli.bring import Bringer
    from trainchain.cli.plan import resolve
    from trainchain.core.digests import canonical_json
    from trainchain.core.models import Training
    from trainchain.core.train.data import data_order, load_documents
    from trainchain.core.train.model import load_tokenizer
    from trainchain.core.worker.cache import Cache

    folder.mkdir(parents=True)
    job = Job(folder)
    bringer = Bringer(lambda: Cache(folder / "cache"), note=lambda _: None)
    plan = resolve(_recipe_file(folder, model, data, size, int(training.get("seed", 0))), bringer)
    fields = plan.resolved.training.model_dump() | dict(training)
    recipe = plan.resolved.model_copy(update={"training": Training(**fields)})
    job.recipe.write_bytes(canonical_json(recipe.model_dump(mode="json")))
    job.start.write_bytes(plan.initial)
    documents = load_documents([(data, recipe.datasets[0].format)], load_tokenizer(model), size.sequence_len)
    rows = [_document(documents.ids[row], documents.masks[row]) for row in range(len(documents.ids))]
    count = (size.rounds * size.steps + SPARE_STEPS) * size.batch
    sequences = data_order(recipe, documents).sequences(0, count)
    packed = [[rows[row] for row in sequence] for sequence in sequences]
    steps = [packed[at : at + size.batch] for at in range(0, len(packed), size.batch)]
    (folder / "steps.json").write_text(json.dumps(steps), encoding="utf-8")
    files = {digest: str(path) for digest, path in plan.files.items()}
    (folder / "job.json").write_text(json.dumps({"model": str(model), "files": files}), encoding="utf-8")
    return job


def document_rows(model: Path, data: Path, sequence_len: int, first: int, count: int) -> list[Document]:
    """The documents `first` to `first + count - 1` of a file, cut; those without a supervised token not counted."""
    from trainchain.core.train.data import load_documents
    from trainchain.core.train.model import load_tokenizer
    from trainchain.core.train.rows import format_of

    found = load_documents([(data, format_of(data))], load_tokenizer(model), sequence_len, limit=first + count)
    return [_document(found.ids[row], found.masks[row]) for row in range(first, len(found.ids))]


def flops_per_token(model: Path, steps: Sequence[Step]) -> dict[str, float]:
    """The least arithmetic a LoRA step on a frozen base needs, per token, and what it is computed from.

    4N + 6n + 4 d V rho + 6 L q l - 2 d (q + 2 kv): N the weights of the linear layers without the head, n those
    of the adapter, rho the supervised share, l the mean document length over tokens; layer 0 needs no
    gradient of its input.
    """
    from trainchain.core.train.model import find_targets, load_config

    config = load_config(model)
    shapes = find_targets(model, "all-linear").values()
    heads, layers, width = config.num_attention_heads, config.num_hidden_layers, config.hidden_size
    head = getattr(config, "head_dim", None) or width // heads
    q, kv = heads * head, config.num_key_value_heads * head
    lengths = [len(ids) for step in steps for sequence in step for ids, _ in sequence]
    targets = sum(label != IGNORED for step in steps for sequence in step for _, labels in sequence for label in labels)
    rho, length = targets / sum(lengths), sum(x * x for x in lengths) / sum(lengths)
    weights, adapter = sum(a * b for a, b in shapes), R * sum(a + b for a, b in shapes)
    flops = 4 * weights + 6 * adapter + 4 * width * config.vocab_size * rho + 6 * layers * q * length
    flops -= 2 * width * (q + 2 * kv)
    return {
        "flops_per_token": round(flops),
        "linear_weights": weights,
        "adapter_weights": adapter,
        "supervised_share": round(rho, 4),
        "document_length": round(length, 1),
    }


def real_tokens(step: Step) -> int:
    return sum(len(ids) for sequence in step for ids, _ in sequence)


def longest(model: Path, wanted: int) -> int:
    """The sequence length: `wanted`, or what the base goes up to where its folder says so."""
    path = model / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return min(wanted, int(config.get("max_position_embeddings", wanted)))


def _recipe_file(folder: Path, model: Path, data: Path, size: Size, seed: int) -> Path:
    path = folder / "recipe.yaml"
    recipe = {
        "name": "benchmark",
        "base_model": str(model),
        "datasets": [{"path": str(data)}],
        "lora_r": R,
        "lora_alpha": ALPHA,
        "lora_target_modules": "all-linear",
        "sequence_len": size.sequence_len,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": size.batch,
        "seed": seed,
        "rounds": size.rounds,
        "shards": size.shards,
        "steps": size.steps,
        "pay": {"per_million_tokens": "0", "budget": "1"},
    }
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def _document(ids: Any, mask: Any) -> Document:
    labels = [int(token) if mark else IGNORED for token, mark in zip(ids, mask, strict=True)]
    labels[0] = IGNORED  # nothing of its own document predicts it
    return ids.tolist(), labels
