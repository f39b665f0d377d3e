"""A tiny random model with a real tokenizer, data for it, and the resolved recipe of a job on them."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.fixtures_merge import PLAIN_MERGE, UNCHECKED
from trainchain.core.digests import sha256, sha256_file
from trainchain.core.models import (
    Access,
    Base,
    DataSet,
    FileRef,
    HeldOut,
    Lora,
    Pay,
    ResolvedRecipe,
    Training,
)
from trainchain.core.train.resolve import Inspection, inspect

SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
LINES = [
    "What is the colour of the sky? The sky is blue.",
    "How many legs has a spider? A spider has eight legs.",
    "Where do fish live? Fish live in the water, and some in the sea.",
    "Who wrote this? Nobody wrote this, it was made by a small machine.",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 tokens, with a ChatML template that marks what the assistant says."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        additional_special_tokens=SPECIAL[3:],
        chat_template=TEMPLATE,
    )


def make_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Save a random Llama (hidden 32, 2 layers, grouped heads) and its tokenizer; returns `folder`."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Little chats of differing length."""
    rows = []
    for at in range(count):
        question, answer = LINES[at % len(LINES)].split("? ")
        answer = " ".join([answer] * (1 + at % 3))
        messages = [{"role": "user", "content": f"{at}: {question}?"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages})
    return rows


def file_ref(path: Path, name: str | None = None) -> FileRef:
    return FileRef(name=name or path.name, sha256=sha256_file(path), size=path.stat().st_size)


def resolve_recipe(
    model: Path, data: Path | list[Path], held_out: Path | None = None, **options: Any
) -> tuple[ResolvedRecipe, bytes]:
    """The resolved recipe of a small job, and its initial adapter. Options: sizes, and `Training` fields."""
    paths = [data] if isinstance(data, Path) else data
    sizes: dict[str, Any] = {"rounds": 2, "shards": 2, "steps": 4, "held_out_rows": 5, "r": 4, "targets": "all-linear"}
    samples = options.pop("samples", [])
    merge = PLAIN_MERGE.model_copy(update=options.pop("merge", {}))
    check = options.pop("check", {})
    sizes |= {key: options.pop(key) for key in list(options) if key in sizes}
    training = Training(
        **{
            "sequence_len": 96,
            "batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-2,
            "lr_scheduler": "constant",
            "warmup_steps": 2,
            "shard_warmup_steps": 0,
            "max_grad_norm": 1.0,
            "weight_decay": 0.0,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "adam_epsilon": 1e-8,
            "precision": "fp32",
            "quantization": "none",
            "attention": "sdpa",
            "adapter_path": "fused",
            "segment_steps": 2,
            "seed": 0,
            **options,
        }
    )
    facts = inspect(
        model,
        [(path, None) for path in paths],
        (held_out, None) if held_out else None,
        sequence_len=training.sequence_len,
        batch_size=training.batch_size,
        seed=training.seed,
        **sizes,
    )
    recipe = ResolvedRecipe(
        trainchain=1,
        name="tiny",
        base_model=Base(source=None, license=None, files=[file_ref(path) for path in sorted(model.iterdir())]),
        datasets=[
            DataSet(source=None, file=file_ref(path), format=found.format, rows=found.rows)
            for path, found in zip(paths, facts.datasets, strict=True)
        ],
        held_out=_held_out(held_out, facts),
        access=Access(workers="anyone", keys=None),
        sealed=None,
        chat_template=None,
        hub_model_id=None,
        lora=Lora(
            r=sizes["r"],
            alpha=2 * sizes["r"],
            targets=list(facts.targets),
            initial=FileRef(name="initial.safetensors", sha256=sha256(facts.initial), size=len(facts.initial)),
        ),
        training=training,
        rounds=sizes["rounds"],
        shards=sizes["shards"],
        steps=sizes["steps"],
        round_deadline=60,
        quorum=0.5,
        merge=merge,
        check=UNCHECKED.model_copy(update=check),
        pay=Pay(token="TRAIN", per_million_tokens=1, budget=1, deadline=3600, grace=60, activation_delay=0),
        samples=samples,
        sample_tokens=8,
        counts=facts.counts,
    )
    return recipe, facts.initial


def _held_out(path: Path | None, facts: Inspection) -> HeldOut | None:
    if path is None or facts.held_out is None:
        return None
    found = facts.held_out
    return HeldOut(
        dataset=DataSet(source=None, file=file_ref(path), format=found.file.format, rows=found.file.rows),
        rows=found.rows,
        tokens=found.counts.tokens,
        supervised=found.counts.supervised,
    )
