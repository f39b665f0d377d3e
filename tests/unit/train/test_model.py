import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.fixtures_architectures import FAMILIES
from tests.fixtures_model import make_tiny_model
from trainchain.core.adapter import adapter_bytes
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.train.model import (
    default_attention,
    find_targets,
    initial_adapter,
    load_config,
    load_model,
    load_tokenizer,
    longest_document,
)

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model")


def load(folder: Path) -> None:
    load_model(folder, dtype=torch.float32, attention="sdpa")


def test_all_linear_is_every_linear_module_but_the_head(folder: Path) -> None:
    targets = find_targets(folder, "all-linear")

    assert {name.rpartition(".")[2] for name in targets} == LINEAR
    assert len(targets) == 14
    assert targets["model.layers.0.self_attn.k_proj"] == (16, 32)


def test_a_name_stands_for_all_modules_that_end_in_it(folder: Path) -> None:
    assert len(find_targets(folder, ["q_proj", "v_proj"])) == 4
    assert list(find_targets(folder, ["layers.1.mlp.up_proj"])) == ["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("wanted", ["all-linear", ["all-linear"]])
def test_all_linear_may_stand_in_a_list(folder: Path, wanted: str | list[str]) -> None:
    assert len(find_targets(folder, wanted)) == 14


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (["query"], "the model has no linear module 'query'"),
        ("all", "the model has no linear module 'all'"),
        (["proj"], "the model has no linear module 'proj'"),
        (["input_layernorm"], "the model has no linear module 'input_layernorm'"),
        (["q_proj", "lm_head"], "'lm_head' is the output layer"),
        (["embed_tokens"], "'embed_tokens' is an embedding"),
        (["model.embed_tokens"], "'model.embed_tokens' is an embedding"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_no_target_is_said_with_those_there_are(
    tmp_path: Path, tied: bool, wanted: str | list[str], says: str
) -> None:
    folder = FAMILIES["llama"].make(tmp_path, tie_word_embeddings=tied)

    with pytest.raises(TrainChainError, match="it has: q_proj, k_proj, v_proj, o_proj") as caught:
        find_targets(folder, wanted)
    assert caught.value.code == "recipe.invalid"
    assert says in caught.value.message


def test_gpt2_has_targets_too(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)

    assert find_targets(tmp_path, ["c_attn"]) == {"transformer.h.0.attn.c_attn": (96, 32)}
    assert len(find_targets(tmp_path, "all-linear")) == 4


def test_what_peft_takes_for_experts_is_no_target(tmp_path: Path) -> None:
    folder = FAMILIES["deepseek_v3"].make(tmp_path)

    for wanted in (["up_proj"], ["shared_experts.up_proj"]):
        with pytest.raises(TrainChainError, match="up_proj' is fused into experts by PEFT; it has: q_a_proj") as caught:
            find_targets(folder, wanted)
        assert caught.value.code == "recipe.invalid"


def test_the_kernel_is_one_that_the_model_can_run_with(tmp_path: Path) -> None:
    folder = FAMILIES["gemma2"].make(tmp_path)

    assert default_attention(load_config(folder)) == "eager"
    assert default_attention(FAMILIES["llama"].config()) == "sdpa"
    load_model(folder, dtype=torch.float32, attention="eager")
    with pytest.raises(TrainChainError, match="gemma2 needs the eager attention kernel") as caught:
        load(folder)
    assert caught.value.code == "model.unreadable"
    assert "attention: eager" in caught.value.hint


def test_a_document_is_not_longer_than_the_model_can_turn() -> None:
    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 2, "long_factor": [2.0] * 2}
    stretched = {"max_position_embeddings": 512, "original_max_position_embeddings": 64, "rope_parameters": long}

    assert longest_document(GPT2Config(n_positions=128)) == 128
    assert longest_document(FAMILIES["phi3"].config(**FAMILIES["phi3"].options)) == 256
    assert longest_document(FAMILIES["phi3"].config(**FAMILIES["phi3"].options | stretched)) == 64


def test_the_initial_adapter_is_pefts_start_and_the_same_everywhere() -> None:
    targets = {"model.a": (8, 64), "model.b": (16, 4)}

    adapter = initial_adapter(targets, 4, seed=3)

    assert {name: tensor.shape for name, tensor in adapter.items()} == {
        "base_model.model.model.a.lora_A.weight": (4, 64),
        "base_model.model.model.a.lora_B.weight": (8, 4),
        "base_model.model.model.b.lora_A.weight": (4, 4),
        "base_model.model.model.b.lora_B.weight": (16, 4),
    }
    a = adapter["base_model.model.model.a.lora_A.weight"]
    assert a.dtype == np.float32
    assert np.abs(a).max() <= 1 / 8
    assert a.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
    assert not adapter["base_model.model.model.a.lora_B.weight"].any()
    assert sha256(adapter_bytes(adapter)) == "facce69ec4746da5fa44ec5df4e22aca6e8b516e770c91defa8c79835be3d7fc"
    alone, other = initial_adapter({"model.a": (8, 64)}, 4, seed=3), initial_adapter(targets, 4, seed=4)
    name = next(iter(adapter))
    assert np.array_equal(a, alone[name])
    assert not np.array_equal(a, other[name])


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(text | changes))

    return change


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def spoil(folder: Path, name: str, value: float) -> None:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors[name].flat[-1] = value
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


INDEX = "model.safetensors.index.json"
EVIL = {"AutoModelForCausalLM": "evil.Model"}
CASES = [
    (no_config, "there is no config.json"),
    (write("config.json", b"{"), "config.json cannot be read"),
    (write("config.json", b"[" * 100_000), "config.json cannot be read"),
    (write("config.json", b"[]"), "config.json is not a JSON object"),
    (edit("config.json", model_type="quantum"), "model type `quantum`"),
    (edit("config.json", hidden_size="wide"), "config.json is not understood"),
    (edit("config.json", auto_map=EVIL), "config.json has an auto_map"),
    (edit("tokenizer_config.json", auto_map=EVIL), "tokenizer_config.json has an auto_map"),
    (edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq\)"),
    (edit("config.json", quantization_config={"quant_method": "bitsandbytes"}), r"quantised \(bitsandbytes\)"),
    (edit("config.json", quantization_config="yes"), "quantised"),
    (edit("adapter_config.json", peft_type="LORA"), "it holds an adapter_config.json"),
    (no_weights, "there is no model.safetensors; it holds pytorch_model.bin"),
    (write("model.safetensors", b"no tensors"), "cannot be loaded"),
    (cut_weights, "cannot be loaded"),
    (edit(INDEX, weight_map={"a": "model.safetensors", "b": "model-2.safetensors"}), "there is no model-2.safetensors"),
    (edit(INDEX, weight_map={"a": "../../model.safetensors"}), "no weight_map to files beside it"),
    (edit(INDEX, weight_map=["model.safetensors"]), "no weight_map to files beside it"),
    (edit("config.json", intermediate_size=48), r"mlp.down_proj.weight is \(32, 64\), and .* asks for \(32, 48\)"),
    (edit("config.json", num_hidden_layers=3), "9 weights are missing, first model.layers.2"),
]


@pytest.mark.parametrize(("change", "says"), CASES, ids=[says for _, says in CASES])
def test_what_cannot_be_loaded_is_named_with_its_folder(
    folder: Path, change: Callable[[Path], None], says: str
) -> None:
    change(folder)

    for use in (load, lambda folder: find_targets(folder, "all-linear")):
        with pytest.raises(TrainChainError, match=says) as caught:
            use(folder)
        assert caught.value.code == "model.unreadable"
        assert str(folder) in caught.value.message
        assert caught.value.hint


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_named(folder: Path, value: float) -> None:
    spoil(folder, "model.layers.1.mlp.up_proj.weight", value)

    with pytest.raises(TrainChainError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or infinity") as caught:
        load(folder)
    assert caught.value.code == "model.unreadable"


def test_great_weights_are_numbers(folder: Path) -> None:
    """Their sum overflows."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    load(folder)


def test_a_folder_without_a_tokenizer_is_named(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()

    with pytest.raises(TrainChainError, match="tokenizer cannot be loaded"):
        load_tokenizer(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainChainError, match="gone does not exist") as caught:
        load(tmp_path / "gone")
    assert caught.value.code == "source.missing"
