import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.fixtures_model import make_tiny_model
from trainchain.core.adapter import adapter_bytes
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.train.model import find_targets, initial_adapter, load_model, load_tokenizer

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


@pytest.mark.parametrize("wanted", [["query"], ["q_proj", "lm_head"], "all"])
def test_an_unknown_target_lists_what_there_is(folder: Path, wanted: str | list[str]) -> None:
    with pytest.raises(TrainChainError, match="it has: q_proj, k_proj") as caught:
        find_targets(folder, wanted)
    assert caught.value.code == "recipe.invalid"


def test_gpt2_has_targets_too(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)

    assert find_targets(tmp_path, ["c_attn"]) == {"transformer.h.0.attn.c_attn": (96, 32)}
    assert len(find_targets(tmp_path, "all-linear")) == 4


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


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "quantum"}')


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def broken_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no tensors")


def lacking_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


def own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (no_config, "there is no config.json"),
        (break_config, "config.json cannot be read"),
        (unknown_model, "model type `quantum`"),
        (no_weights, "there is no model.safetensors; it holds pytorch_model.bin"),
        (broken_weights, "cannot be loaded"),
        (lacking_shard, "there is no model-00002.safetensors"),
        (own_code, "auto_map"),
        (other_shape, "weights are missing or misshapen|cannot be loaded"),
        (more_layers, "9 weights are missing"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_its_folder(folder: Path, spoil: object, says: str) -> None:
    assert callable(spoil)
    spoil(folder)

    with pytest.raises(TrainChainError, match=says) as caught:
        load(folder)

    assert caught.value.code == ("model.unreadable")
    assert str(folder) in caught.value.message


def test_a_folder_without_a_tokenizer_is_named(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()

    with pytest.raises(TrainChainError, match="tokenizer cannot be loaded"):
        load_tokenizer(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainChainError, match="gone does not exist") as caught:
        load(tmp_path / "gone")
    assert caught.value.code == "source.missing"
