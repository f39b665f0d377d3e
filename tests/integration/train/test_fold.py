"""A base with an adapter folded in computes what base and adapter compute side by side."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fixtures_architectures import FAMILIES
from tests.fixtures_hub import recipe as a_recipe
from tests.fixtures_model import make_tiny_model
from trainchain.core.adapter import Adapter, write_peft_folder
from trainchain.core.errors import TrainChainError
from trainchain.core.models import FileRef, Lora
from trainchain.core.train.fold import fold, stored_dtype
from trainchain.core.train.model import find_targets, initial_adapter

IDS = torch.tensor([[5, 9, 42, 200, 7, 7, 31, 100, 12, 3]])
NOTHING = FileRef(name="initial.safetensors", sha256="0" * 64, size=0)


def trained(base: Path, scale: float = 0.2) -> tuple[Lora, Adapter]:
    """An adapter on all linear modules of a base, far from its start."""
    targets = find_targets(base, "all-linear")
    random = np.random.default_rng(1)
    adapter = {
        name: random.normal(0, scale, tensor.shape).astype(np.float32)
        for name, tensor in initial_adapter(targets, 4, 0).items()
    }
    return Lora(r=4, alpha=8, targets=sorted(targets), initial=NOTHING), adapter


def side_by_side(base: Path, lora: Lora, adapter: Adapter, folder: Path, **how: Any) -> torch.Tensor:
    """What plain transformers and peft compute from the base and the adapter's folder."""
    write_peft_folder(folder, adapter, a_recipe({"model.safetensors": b"", "train-0.jsonl": b""}, lora=lora), str(base))
    model = AutoModelForCausalLM.from_pretrained(base, **how)
    return logits(PeftModel.from_pretrained(model, folder))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_folded_model_gives_the_logits_of_base_and_adapter(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base = family.make(tmp_path / "base")
    lora, adapter = trained(base)
    wanted = side_by_side(base, lora, adapter, tmp_path / "adapter", dtype=torch.float32)

    (tmp_path / "merged").mkdir()
    dtype = fold(base, adapter, lora, tmp_path / "merged")

    assert dtype == "fp32"
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert float((found - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))
    assert float((found - plain).abs().max()) > 1e-2


def test_what_is_not_weights_is_the_base_s_own(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    odd = {"temperature": 0.3, "do_sample": False, "eos_token_id": [2, 4]}  # transformers would not save it again
    (base / "generation_config.json").write_text(json.dumps(odd), encoding="utf-8")
    config = json.loads((base / "config.json").read_bytes()) | {"attention_dropout": 0.25}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (base / "README.md").write_text("of the base", encoding="utf-8")
    (base / "modeling_odd.py").write_text("raise SystemExit", encoding="utf-8")
    lora, adapter = trained(base)
    (tmp_path / "merged").mkdir()

    fold(base, adapter, lora, tmp_path / "merged")

    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {path.name for path in base.iterdir()} - {"README.md", "modeling_odd.py"}
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    said = AutoTokenizer.from_pretrained(tmp_path / "merged")("The sky is blue.").input_ids
    assert said == AutoTokenizer.from_pretrained(base)("The sky is blue.").input_ids


def test_weights_that_share_their_numbers_still_do(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")  # its output layer is its embedding
    lora, adapter = trained(base)
    (tmp_path / "merged").mkdir()

    fold(base, adapter, lora, tmp_path / "merged")

    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"{target}.weight" for target in lora.targets}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_a_sum_is_rounded_once_to_what_the_base_is_stored_in(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    base = FAMILIES["gpt2"].make(tmp_path / "fp32")
    stored = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    stored.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()
    lora, adapter = trained(tmp_path / "base")
    (tmp_path / "merged").mkdir()

    assert fold(tmp_path / "base", adapter, lora, tmp_path / "merged") == name

    weights = {
        key: value for file in (tmp_path / "base").glob("*.safetensors") for key, value in load_file(file).items()
    }
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert {value.dtype for value in found.values()} == {dtype}
    for target in lora.targets:
        key = target + ".weight"
        a, b = (torch.from_numpy(adapter[f"base_model.model.{target}.lora_{side}.weight"]) for side in "AB")
        exact = weights[key].float() + 2.0 * (b @ a).T
        assert torch.equal(found[key], exact.to(dtype))


def test_files_that_mix_dtypes_lose_nothing(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in weights.items()}
    save_file(mixed, base / "model.safetensors", {"format": "pt"})
    lora, adapter = trained(base)
    (tmp_path / "merged").mkdir()

    assert fold(base, adapter, lora, tmp_path / "merged") == "fp32"

    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(found[name], mixed[name].float()) for name in mixed if "proj" not in name)


def test_an_adapter_of_another_base_is_refused_by_the_tensor(tmp_path: Path) -> None:
    base, other = make_tiny_model(tmp_path / "base"), FAMILIES["gpt2"].make(tmp_path / "other")
    lora, adapter = trained(base)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"

    for folder, wrong, named in (
        (other, adapter, "modules are not those of the base"),
        (base, {**adapter, key: adapter[key][:, :-1]}, f"{key} is (4, 31)"),
        (base, {name: tensor for name, tensor in adapter.items() if name != key}, f"{key} is not there"),
        (base, {**adapter, "base_model.model.odd": adapter[key]}, "base_model.model.odd is (4, 32)"),
    ):
        with pytest.raises(TrainChainError) as caught:
            fold(folder, wrong, lora, tmp_path / "merged")

        assert caught.value.code == "adapter.unfit"
        assert named in caught.value.message
        assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("scale", "dtype"), [(1e30, "fp32"), (300.0, "fp16")])
def test_numbers_that_the_dtype_does_not_hold_are_refused(scale: float, dtype: str, tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    if dtype == "fp16":
        weights = {name: tensor.half() for name, tensor in load_file(base / "model.safetensors").items()}
        save_file(weights, base / "model.safetensors", {"format": "pt"})
    lora, adapter = trained(base, scale)

    with pytest.raises(TrainChainError) as caught:
        fold(base, adapter, lora, tmp_path / "merged")

    assert caught.value.code == "merge.unmergeable"
    assert f"numbers that {dtype} does not hold" in caught.value.message


def test_weights_in_bytes_are_not_folded_into(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(weights, base / "model.safetensors", {"format": "pt"})

    with pytest.raises(TrainChainError, match="F8_E4M3") as caught:
        stored_dtype(base)

    assert caught.value.code == "model.unreadable"
    (base / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0[1,2]")
    with pytest.raises(TrainChainError, match="is not a safetensors file"):
        stored_dtype(base)
