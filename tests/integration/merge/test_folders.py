"""Adapters of PEFT's merged on disk: what comes out, as PEFT loads it; what is refused, leaving nothing behind."""

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import AutoTokenizer

from tests.fixtures_adapters import change_config, each, off, save_adapter, weight_changes
from tests.fixtures_model import make_tiny_model
from trainchain.core.adapter import CONFIG_FILE, WEIGHTS_FILE
from trainchain.core.errors import TrainChainError
from trainchain.core.merge.folders import merge_folders

SHARES = [0.5, 0.3, 0.2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def three(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("three")
    return [save_adapter(base, folder / name, seed) for seed, name in enumerate("abc")]


def mean_of(base: Path, adapters: list[Path], shares: list[float]) -> dict[str, np.ndarray]:
    changes = [weight_changes(base, adapter) for adapter in adapters]
    return each(changes, lambda found: sum(s * f.astype(np.float64) for s, f in zip(shares, found, strict=True)))


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def test_a_stack_is_the_exact_mean(base: Path, three: list[Path], tmp_path: Path) -> None:
    document = merge_folders(three, tmp_path / "out", method="stacking", weights=SHARES)

    assert off(weight_changes(base, tmp_path / "out"), mean_of(base, three, SHARES)) < 1e-5
    assert document["rank"] == 12
    assert set(document["errors"].values()) == {0.0}


@pytest.mark.parametrize("rank", [None, 2, 7, 12])
def test_the_product_mean_is_the_best_of_its_rank(
    base: Path, three: list[Path], tmp_path: Path, rank: int | None
) -> None:
    document = merge_folders(three, tmp_path / "out", weights=SHARES, rank=rank)

    exact = mean_of(base, three, SHARES)
    best = {name: truncated(matrix, rank or 4) for name, matrix in exact.items()}
    assert off(weight_changes(base, tmp_path / "out"), best) < 1e-5
    errors = {f"{module}.weight": error for module, error in document["errors"].items()}
    for name, matrix in exact.items():
        lost = np.linalg.norm(matrix - best[name]) / np.linalg.norm(matrix)
        assert errors[name] == pytest.approx(lost, abs=1e-5)


def test_a_mean_of_copies_is_what_it_is_a_mean_of(base: Path, three: list[Path], tmp_path: Path) -> None:
    """PEFT's own `linear` with these weights gives the sum of them."""
    for method in ("product-mean", "factor-mean"):
        merge_folders([three[0]] * 4, tmp_path / method, method=method)
        assert off(weight_changes(base, tmp_path / method), weight_changes(base, three[0])) < 1e-5


def test_ranks_and_scales_mix_by_their_products(base: Path, three: list[Path], tmp_path: Path) -> None:
    other = save_adapter(base, tmp_path / "other", 9, r=6, lora_alpha=3, rank_pattern={"layers.0.self_attn.q_proj": 2},
                         alpha_pattern={"layers.0.self_attn.q_proj": 5})  # fmt: skip
    half = save_adapter(base, tmp_path / "half", 10, dtype=torch.bfloat16)

    document = merge_folders([three[0], other, half], tmp_path / "out", method="stacking", weights=SHARES)
    merge_folders([three[0], other, half], tmp_path / "low", weights=SHARES)

    exact = mean_of(base, [three[0], other, half], SHARES)
    assert off(weight_changes(base, tmp_path / "out"), exact) < 1e-5
    assert document["rank"] == 14
    best = {name: truncated(matrix, 6) for name, matrix in exact.items()}
    assert off(weight_changes(base, tmp_path / "low"), best) < 1e-5


def test_a_dot_in_a_pattern_means_any_mark_as_to_peft(base: Path, three: list[Path], tmp_path: Path) -> None:
    other = save_adapter(base, tmp_path / "other", 9, alpha_pattern={"layers.1.self.attn.q.proj": 5})

    merge_folders([three[0], other], tmp_path / "out", method="stacking")

    assert off(weight_changes(base, tmp_path / "out"), mean_of(base, [three[0], other], [0.5, 0.5])) < 1e-5


def test_a_factor_mean_takes_scales_that_differ_between_modules_only(base: Path, tmp_path: Path) -> None:
    two = [save_adapter(base, tmp_path / name, 9, alpha_pattern={"q_proj": 5}) for name in "ab"]

    merge_folders(two, tmp_path / "out", method="factor-mean")

    assert off(weight_changes(base, tmp_path / "out"), weight_changes(base, two[0])) < 1e-5


def test_neither_does_it_change_what_lies_beside_the_weights(three: list[Path], tmp_path: Path) -> None:
    copies = [shutil.copytree(adapter, tmp_path / adapter.name) for adapter in three]
    change_config(copies[1], lora_dropout=0.1)
    for copy in copies:
        (copy / "tokenizer.json").write_text("{}")
        (copy / "tokenizer_config.json").write_text(copy.name)

    merge_folders(copies, tmp_path / "1")
    merge_folders(copies[::-1], tmp_path / "2")

    for file in (tmp_path / "1").iterdir():
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes()


def test_the_order_of_the_folders_changes_no_byte(three: list[Path], tmp_path: Path) -> None:
    for method in ("product-mean", "factor-mean", "stacking", "ties", "dare"):
        one = merge_folders(three, tmp_path / f"{method}-1", method=method, weights=SHARES)
        turned = merge_folders([three[2], three[0], three[1]], tmp_path / f"{method}-2", method=method,
                               weights=[SHARES[2], SHARES[0], SHARES[1]])  # fmt: skip
        assert one["sha256"] == turned["sha256"]


def test_ties_elects_a_sign_for_every_number(base: Path, three: list[Path], tmp_path: Path) -> None:
    merge_folders(three, tmp_path / "out", method="ties", rank=32)

    def ties(found: list[np.ndarray]) -> np.ndarray:
        kept = []
        for change in found:
            least = np.sort(np.abs(change), axis=None)[::-1][round(0.2 * change.size) - 1]
            kept.append(np.where(np.abs(change) >= least, change, 0))
        sign = np.sign(sum(kept))
        agree = [np.where(np.sign(change) == sign, change, 0) for change in kept]
        counts = sum(change != 0 for change in agree)
        return sum(agree) / np.maximum(counts, 1)

    wanted = each([weight_changes(base, adapter) for adapter in three], ties)
    assert off(weight_changes(base, tmp_path / "out"), wanted) < 1e-3


def test_dare_keeps_the_mean_and_drops_the_same_numbers_again(base: Path, three: list[Path], tmp_path: Path) -> None:
    one = merge_folders(three, tmp_path / "1", method="dare", density=0.5, rank=32)
    again = merge_folders(three, tmp_path / "2", method="dare", density=0.5, rank=32)
    merge_folders(three, tmp_path / "all", method="dare", density=1.0, rank=12)

    assert one["sha256"] == again["sha256"]
    exact = mean_of(base, three, [1 / 3] * 3)
    assert off(weight_changes(base, tmp_path / "all"), exact) < 1e-5
    dropped = weight_changes(base, tmp_path / "1")
    for name, wanted in exact.items():
        assert float(np.vdot(dropped[name], wanted) / np.vdot(wanted, wanted)) == pytest.approx(1, abs=0.2)
        assert 0.3 < np.linalg.norm(dropped[name] - wanted) / np.linalg.norm(wanted) < 1.5


def test_the_result_stands_beside_its_tokenizer_and_names_its_base(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    copies = [shutil.copytree(adapter, tmp_path / adapter.name) for adapter in three]
    shutil.copyfile(base / "tokenizer.json", copies[1] / "tokenizer.json")

    merge_folders(copies, tmp_path / "out")

    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_bytes())
    assert config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, "tokenizer.json"}


def test_tokenizers_that_cut_rows_elsewhere_are_one(base: Path, three: list[Path], tmp_path: Path) -> None:
    """A tokenizer is written with the truncation that it was last called with."""
    copies = [shutil.copytree(adapter, tmp_path / adapter.name) for adapter in three[:2]]
    for copy, length in zip(copies, (128, 512), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer("some text", truncation=True, max_length=length)
        tokenizer.save_pretrained(copy)
    assert (copies[0] / "tokenizer.json").read_bytes() != (copies[1] / "tokenizer.json").read_bytes()

    merge_folders(copies, tmp_path / "out")

    assert (tmp_path / "out" / "tokenizer.json").is_file()


Spoil = Callable[[Path], Any]


def spoil_weights(change: Callable[[dict[str, np.ndarray]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / WEIGHTS_FILE)

    return spoil


def first(tensors: dict[str, np.ndarray]) -> str:
    return min(tensors)


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[:-10])


def pickled(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")


def config(**changes: Any) -> Spoil:
    return lambda folder: change_config(folder, **changes)


UNREADABLE: dict[str, tuple[Spoil, str]] = {
    "a false rank": (config(r=5), "rank 4"),
    "an odd alpha": (config(lora_alpha="8"), "lora_alpha"),
    "no configuration": (lambda folder: (folder / CONFIG_FILE).unlink(), CONFIG_FILE),
    "no JSON": (lambda folder: (folder / CONFIG_FILE).write_text("{"), "JSON"),
    "a list": (lambda folder: (folder / CONFIG_FILE).write_text("[]"), "JSON"),
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), WEIGHTS_FILE),
    "a file that was cut": (cut, "cut"),
    "no safetensors": (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"\x80\x04pickle"), "cut"),
    "an empty file": (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b""), "cut"),
    "no tensors": (spoil_weights(dict.clear), "no tensor"),
    "half a pair": (spoil_weights(lambda t: t.pop(first(t))), "pair"),
    "a rank of zero": (
        spoil_weights(lambda t: t.update({n: t[n][:0] if "lora_A" in n else t[n][:, :0] for n in t})),
        "pair",
    ),
    "an endless alpha": (config(lora_alpha=10**400), "lora_alpha"),
    "a folder for a file": (
        lambda folder: [(folder / WEIGHTS_FILE).unlink(), (folder / WEIGHTS_FILE).mkdir()],
        "no adapter_m",
    ),
    "a pickle": (pickled, "pickle"),
    "no folder": (shutil.rmtree, "no folder"),
}
UNMERGEABLE: dict[str, tuple[Spoil, str]] = {
    "another base": (config(base_model_name_or_path="other/base"), "different bases"),
    "another revision": (config(revision="abc"), "different bases"),
    "DoRA": (config(use_dora=True), "DoRA"),
    "biases": (config(bias="all"), "biases"),
    "a bias of its own": (config(lora_bias=True), "biases"),
    "whole modules": (config(modules_to_save=["lm_head"]), "modules_to_save"),
    "whole modules, a number": (config(modules_to_save=5), "modules_to_save"),
    "tokens that wake it": (config(alora_invocation_tokens=[5]), "alora_invocation_tokens"),
    "parameters": (config(target_parameters=["mlp.experts"]), "target_parameters"),
    "blocks of a quantized base": (config(use_qalora=True), "use_qalora"),
    "other layers": (config(layer_replication=[[0, 1], [0, 1]]), "layer_replication"),
    "another scale of rsLoRA": (config(use_rslora=True), "rsLoRA"),
    "a changed base": (config(init_lora_weights="pissa"), "pissa"),
    "no LoRA": (config(peft_type="IA3"), "IA3"),
    "a pattern": (config(alpha_pattern={".*q_proj": 2}), "alpha_pattern"),
    "another tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizers"),
    "another tokenizer of words": (lambda folder: (folder / "tokenizer.model").write_text("b"), "tokenizer.model"),
    "a convolution": (
        spoil_weights(lambda t: t.update({n: t[n][..., None, None] for n in t if "down_proj" in n})),
        "linear",
    ),
    "fewer modules": (spoil_weights(lambda t: [t.pop(name) for name in list(t) if "layers.1." in name]), "modules"),
    "a tensor besides": (spoil_weights(lambda t: t.update(x=np.ones(2))), "'x'"),
    "NaN": (spoil_weights(lambda t: t.update({first(t): t[first(t)] * np.nan})), "NaN"),
    "other widths": (spoil_weights(lambda t: t.update({first(t): np.ones((4, 3), np.float32)})), "different bases"),
    "integers": (spoil_weights(lambda t: t.update({first(t): t[first(t)].astype(np.int8)})), "I8"),
}
BAD = {name: (spoil, "adapter.unreadable", word) for name, (spoil, word) in UNREADABLE.items()} | {
    name: (spoil, "merge.unmergeable", word) for name, (spoil, word) in UNMERGEABLE.items()
}


@pytest.mark.parametrize("what", BAD)
def test_one_bad_adapter_is_named_and_nothing_is_left(base: Path, three: list[Path], tmp_path: Path, what: str) -> None:
    spoil, code, word = BAD[what]
    copies = [shutil.copytree(adapter, tmp_path / "in" / adapter.name) for adapter in three]
    for copy in copies:
        shutil.copyfile(base / "tokenizer.json", copy / "tokenizer.json")
        (copy / "tokenizer.model").write_text("a")
    spoil(copies[1])

    with pytest.raises(TrainChainError) as caught:
        merge_folders(copies, tmp_path / "out" / "merged")

    assert caught.value.code == code
    assert word in caught.value.message
    assert str(copies[1]) in caught.value.message
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def refused(code: str, *arguments: Any, **options: Any) -> TrainChainError:
    with pytest.raises(TrainChainError) as caught:
        merge_folders(*arguments, **options)
    assert caught.value.code == code
    return caught.value


@pytest.mark.parametrize(
    "weights", [[0.5, 0.5], [0.5, 0.7, -0.2], [0.5, 0.5, float("nan")], [1, 2, 3], [0, 0, 0], [1e308] * 3]
)
def test_weights_that_are_no_shares_are_refused(three: list[Path], tmp_path: Path, weights: list[float]) -> None:
    error = refused("usage.flag", three, tmp_path / "out", weights=weights)

    assert "--weights" in error.message
    if sum(weights) == 6:
        assert error.hint == "--weights 0.166666667,0.333333333,0.5"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", [[1, 2, 3], [1, 1, 1], [1] * 7, [2] * 99])
def test_a_hint_s_weights_are_taken(three: list[Path], tmp_path: Path, weights: list[float]) -> None:
    adapters = [three[0]] * len(weights)
    hint = refused("usage.flag", adapters, tmp_path / "out", weights=weights).hint

    merge_folders(adapters, tmp_path / "out", weights=[float(each) for each in hint.split()[1].split(",")])


def test_the_weight_that_is_wrong_is_named(three: list[Path], tmp_path: Path) -> None:
    assert "has inf" in refused("usage.flag", three, tmp_path / "out", weights=[0, 1, math.inf]).message
    assert "1.000002" in refused("usage.flag", three, tmp_path / "out", weights=[0, 1, 2e-6]).message


def test_what_makes_no_merge_is_refused(base: Path, three: list[Path], tmp_path: Path) -> None:
    other = save_adapter(base, tmp_path / "other", 9, r=6, lora_alpha=12)
    scaled = save_adapter(base, tmp_path / "scaled", 9, lora_alpha=4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    out = tmp_path / "out"

    assert "One adapter" in refused("usage.flag", three[:1], out).message
    assert "One adapter" in refused("usage.flag", [], out).message
    assert "4, 6" in refused("merge.unmergeable", [three[0], other], out, method="factor-mean").message
    assert "mix scales" in refused("merge.unmergeable", [three[0], scaled], out, method="factor-mean").message
    assert "'mean'" in refused("usage.flag", three, out, method="mean").message
    assert "rank" in refused("usage.flag", three, out, method="stacking", rank=4).message
    assert "--rank" in refused("usage.flag", three, out, rank=0).message
    assert "--density" in refused("usage.flag", three, out, density=0.5).message
    assert "not empty" in refused("usage.flag", three, tmp_path / "full").message
    assert "nowhere" in refused("adapter.unreadable", [three[0], tmp_path / "nowhere"], out).message
    assert not out.exists()
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_a_base_that_was_named_makes_two_names_one(three: list[Path], tmp_path: Path) -> None:
    renamed = change_config(shutil.copytree(three[1], tmp_path / "renamed"), base_model_name_or_path="org/base")

    merge_folders([three[0], renamed], tmp_path / "out", any_base=True)

    assert (tmp_path / "out" / WEIGHTS_FILE).exists()


def test_what_cannot_be_put_in_place_whole_is_refused_before_the_work(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")

    for target in (Path(), tmp_path / "here", tmp_path / "link"):
        assert "put in place" in refused("usage.flag", three, target, ready=pytest.fail).message
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("method", ["product-mean", "factor-mean", "stacking", "ties", "dare"])
@pytest.mark.parametrize("size", [1e60, 1e160, 1e300])
def test_numbers_too_large_to_merge_are_refused_without_a_warning(
    three: list[Path], tmp_path: Path, method: str, size: float
) -> None:
    huge = [shutil.copytree(adapter, tmp_path / adapter.name) for adapter in three]
    for folder in huge:
        spoil_weights(lambda t: t.update({name: t[name] * np.float64(size) for name in t}))(folder)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "fp32" in refused("merge.unmergeable", huge, tmp_path / "out", method=method).message


def test_a_file_that_is_cut_meanwhile_is_told_of(three: list[Path], tmp_path: Path) -> None:
    copy = shutil.copytree(three[0], tmp_path / "copy")

    assert "cut" in refused("adapter.unreadable", [copy, three[1]], tmp_path / "out", ready=lambda: cut(copy)).message
    assert not (tmp_path / "out").exists()
