"""Bases that cannot be trained: refused by their name where the owner submits, and again by every worker."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    DogeConfig,
    FalconConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    MambaConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
    RwkvConfig,
    StableLmConfig,
    T5Config,
    ViTConfig,
)

from tests.fixtures_architectures import ALTERNATING, FAMILIES, GROUPED, SMALL, SPECIAL, WINDOW, save_random
from tests.fixtures_model import make_tokenizer
from tests.integration.train.conftest import Job
from trainchain.core.adapter import read_adapter
from trainchain.core.errors import TrainChainError
from trainchain.core.train.model import find_targets

MakeJob = Callable[..., Job]
LEASE = "0x" + "ef" * 32
VOCABULARY = {"vocab_size": 320}
PLAIN = SMALL | VOCABULARY
DENSE = GROUPED | VOCABULARY
EXPERTS = DENSE | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, **VOCABULARY}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}

CASES: list[tuple[Callable[[], PreTrainedConfig], Any, str]] = [
    (lambda: T5Config(**T5), AutoModelForSeq2SeqLM, "t5 is an encoder-decoder model"),
    (lambda: BartConfig(**BART, **VOCABULARY, **SPECIAL), AutoModelForSeq2SeqLM, "bart is an encoder-decoder model"),
    (lambda: BertConfig(**PLAIN), AutoModelForMaskedLM, "bert is an encoder, which sees later tokens"),
    (lambda: ViTConfig(**VISION), AutoModel, "vit is not a causal language model"),
    (
        lambda: Gemma3TextConfig(**DENSE, **ALTERNATING, head_dim=16, use_bidirectional_attention=True),
        None,
        "gemma3_text has attention that sees later tokens",
    ),
    (
        lambda: Gemma3Config(text_config=DENSE | ALTERNATING | {"head_dim": 16}, vision_config=VISION),
        None,
        "gemma3 is a multimodal model",
    ),
    (
        lambda: MambaConfig(hidden_size=32, num_hidden_layers=2, **VOCABULARY),
        None,
        "mamba has layers of the kind linear",
    ),
    (
        lambda: RwkvConfig(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, **VOCABULARY),
        None,
        "rwkv carries a state from token to token",
    ),
    (
        lambda: Qwen3NextConfig(**EXPERTS, **LINEAR, shared_expert_intermediate_size=16, head_dim=8),
        None,
        "qwen3_next has layers of the kind linear_attention",
    ),
    (
        lambda: Lfm2Config(**DENSE, layer_types=["conv", "full_attention"]),
        None,
        "lfm2 has layers of the kind conv",
    ),
    (
        lambda: Llama4TextConfig(**EXPERTS, intermediate_size_mlp=32, head_dim=8, attention_chunk_size=WINDOW),
        None,
        "llama4_text has layers of the kind chunked_attention",
    ),
    (
        lambda: FalconConfig(**PLAIN, new_decoder_architecture=False),
        None,
        "falcon computes attention in a way of its own in 2 of 2 layers",
    ),
    (
        lambda: BloomConfig(hidden_size=32, n_layer=2, n_head=4, **VOCABULARY),
        None,
        "bloom computes attention in a way of its own",
    ),
    (lambda: StableLmConfig(**DENSE), None, "stablelm does not hand document_lengths down to its attention"),
    (lambda: GptOssConfig(**EXPERTS, head_dim=8), None, "gpt_oss attends with attention sinks"),
    (lambda: DogeConfig(**DENSE), None, "doge attends with a mask of its own"),
    (
        lambda: PhimoeConfig(**EXPERTS, sliding_window=WINDOW),
        None,
        "phimoe does not tell its attention of the sliding window",
    ),
]


@pytest.mark.parametrize(("config", "kind", "says"), CASES, ids=[says.split()[0] for _, _, says in CASES])
def test_a_model_of_another_nature_is_refused_by_name(
    config: Callable[[], PreTrainedConfig], kind: Any, says: str, make_job: MakeJob, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    save_random(config(), folder, *([kind] if kind else []))
    make_tokenizer().save_pretrained(folder)

    with pytest.raises(TrainChainError, match=says) as caught:
        make_job(folder)
    assert caught.value.code == "model.unreadable"
    assert str(folder) in caught.value.message
    assert caught.value.hint

    job = replace(make_job(), model=folder)
    with pytest.raises(TrainChainError) as caught:
        job.engine()
    assert caught.value.code == "model.unreadable"


def spoiled(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["model.layers.0.self_attn.k_proj.weight"].flat[0] = np.nan
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (spoiled, "model.layers.0.self_attn.k_proj.weight holds NaN or infinity"),
        (pickled, "there is no model.safetensors; it holds pytorch_model.bin, and only safetensors are read"),
    ],
)
def test_a_worker_names_what_is_wrong_with_the_weights(
    change: Callable[[Path], None], says: str, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(FAMILIES["llama"].make(tmp_path / "model"))
    change(job.model)

    with pytest.raises(TrainChainError, match=says) as caught:
        job.engine()
    assert caught.value.code == "model.unreadable"


@pytest.mark.parametrize("path", ["peft", "fused"])
def test_an_adapter_of_another_base_is_refused_with_its_tensor(path: str, make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(adapter_path=path)
    engine = job.engine()
    wide = make_job(FAMILIES["llama"].make(tmp_path / "wide", intermediate_size=40))
    other = make_job(FAMILIES["gpt2"].make(tmp_path / "gpt2"))

    for start, tensor in (
        (read_adapter(wide.initial), r"layers.0.mlp.down_proj.lora_A.weight"),
        (read_adapter(other.initial), r"model.layers.0.mlp.down_proj.lora_A.weight"),
    ):
        for use in (lambda start=start: engine.train(start, 1, 0, LEASE), lambda start=start: engine.evaluate(start)):
            with pytest.raises(TrainChainError, match=tensor) as caught:
                use()
            assert caught.value.code == "job.invalid"
    engine.train(job.start, 1, 0, LEASE)
    engine.close()


def test_a_recipe_of_another_base_is_refused(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job()
    other = FAMILIES["gpt2"].make(tmp_path / "gpt2")

    with pytest.raises(TrainChainError) as caught:
        replace(job, model=other).engine()
    assert caught.value.code == "job.invalid"
    assert set(find_targets(other, "all-linear")).isdisjoint(job.recipe.lora.targets)
