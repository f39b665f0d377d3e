"""A small model, and how a refusal of ours has to look."""

import os
from typing import Any

import pytest

from trainchain.core.errors import TrainChainError
from trainchain.core.sources.address import parse
from trainchain.core.sources.found import Found
from trainchain.core.sources.hf import HuggingFace

WEIGHTS = os.urandom(1_500_000)
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer.model": b"spm",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "modeling_tiny.py": b"import os",
    "README.md": b"---\nlicense: apache-2.0\n---\n# Tiny",
    "onnx/model.onnx": b"onnx",
    "sub/config.json": b"{}",
    "sub/model.safetensors": b"sub",
}


def refused(code: str, do: Any, *args: Any, **options: Any) -> TrainChainError:
    with pytest.raises(TrainChainError) as failed:
        do(*args, **options)
    assert failed.value.code == code, failed.value.message
    text = f"{failed.value.message} {failed.value.hint}"
    assert "hf_" not in text
    assert "Signature" not in text
    assert text.isprintable()
    assert failed.value.hint
    return failed.value


def find(source: HuggingFace, text: str) -> Found:
    kind = "data" if text.startswith("hf://datasets/") else "model"
    return source.find(parse(text, kind), kind)  # type: ignore[arg-type]


def paths(found: Found) -> list[str]:
    return [file.path for file in found.files]
