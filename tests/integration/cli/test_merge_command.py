"""`merge` as it is typed: what is on stdout, what is on stderr, how it ends."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.numpy
from transformers import AutoConfig, AutoModelForCausalLM

from tests.fixtures_adapters import change_config, each, off, save_adapter, weight_changes
from tests.fixtures_model import make_tiny_model
from trainchain.cli.main import run_command
from trainchain.core.adapter import WEIGHTS_FILE

ROWS = [{"text": "The sky is blue."}, {"text": "A spider has eight legs."}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def two(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("two")
    return [str(save_adapter(base, folder / name, seed)) for seed, name in enumerate("ab")]


def typed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = run_command(["merge", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_it_prints_the_folder_and_tells_every_module(
    two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = typed(capsys, *two, "-o", tmp_path / "out")

    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    assert err.count("  error ") == 4
    assert "4/4  error " in err
    assert "merged   2 adapters by product-mean, rank 4; largest error" in err
    assert "hint: A higher --rank loses less, --method stacking nothing." in err


def test_it_measures_the_base_the_adapters_and_the_result(
    base: Path, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")

    code, said, _ = typed(capsys, *two, "-o", out, "--method", "stacking", "--base", base, "--eval", rows, "--json")

    document = json.loads(said)
    assert (code, document["ok"], document["rank"]) == (0, True, 8)
    assert list(document["losses"]) == ["base", *two, str(out)]
    assert len(set(document["losses"].values())) == 4
    assert all(0 < loss < 20 for loss in document["losses"].values())


def test_the_residual_makes_base_and_adapter_exact_together(
    base: Path, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    code, _, err = typed(capsys, *two, "-o", out, "--method", "residual", "--base", base)

    exact = each([weight_changes(base, Path(adapter)) for adapter in two], lambda found: (found[0] + found[1]) / 2)
    plain = weight_changes(base, base_to(out, base))
    assert code == 0
    assert "use both" in err
    assert off(plain, exact) < 1e-4


def test_a_residual_s_adapter_names_the_base_that_belongs_to_it(
    base: Path, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the base that it was merged on it is wrong, and nothing would say so."""
    from peft import AutoPeftModelForCausalLM

    named = change_config(shutil.copytree(two[1], tmp_path / "named"), revision="main")
    change_config(shutil.copytree(two[0], tmp_path / "other"), revision="main")
    code, _, _ = typed(
        capsys, tmp_path / "other", named, "-o", tmp_path / "out", "--method", "residual", "--base", base
    )

    found = dict(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").merge_and_unload().named_parameters())
    plain = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    exact = each([weight_changes(base, Path(adapter)) for adapter in two], lambda found: (found[0] + found[1]) / 2)
    assert code == 0
    assert off({name: (found[name] - plain[name]).detach().numpy() for name in exact}, exact) < 1e-4


def test_a_residual_s_base_does_not_hang_on_the_order_of_the_folders(
    base: Path, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(capsys, *two, "-o", tmp_path / "1", "--method", "residual", "--base", base)
    typed(capsys, *two[::-1], "-o", tmp_path / "2", "--method", "residual", "--base", base)

    one, other = (tmp_path / name / "base" / "model.safetensors" for name in "12")
    assert one.read_bytes() == other.read_bytes()


def base_to(out: Path, base: Path) -> Path:
    """An adapter of the old base that does what new base and adapter do: found by PEFT, as a stack of the two."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    together = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out / "base"), out).merge_and_unload()
    old = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    folder = save_adapter(base, out.parent / "found", 0, r=32, lora_alpha=32)
    import safetensors.torch

    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    for name in [name for name in tensors if "lora_A" in name]:
        weight = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        change = (dict(together.named_parameters())[weight] - old[weight]).detach()
        u, s, vt = torch.linalg.svd(change, full_matrices=False)
        rank = min(32, len(s))
        a, b = torch.zeros(tensors[name].shape), torch.zeros(tensors[name.replace("lora_A", "lora_B")].shape)
        a[:rank], b[:, :rank] = vt[:rank], u[:, :rank] * s[:rank]
        tensors[name], tensors[name.replace("lora_A", "lora_B")] = a, b
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--weights", "0.5;0.5"], "not a list of numbers"),
        (["--weights", "1,1"], "sum to 2"),
        (["--method", "mean"], "'mean'"),
        (["--eval", "rows.jsonl"], "needs the base"),
        (["--method", "residual"], "needs the base"),
        (["--base", "nowhere"], "nowhere is not there"),
        (["--density", "0", "--method", "ties"], "--density"),
        (["--rank", "0"], "--rank"),
    ],
)
def test_what_makes_no_sense_is_refused_with_nothing_written(
    two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    code, out, err = typed(capsys, *two, "-o", tmp_path / "out", *flags)

    assert (code, out) == (2, "")
    assert words in err
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (%d, %d))
from trainchain.cli.main import run_command
sys.exit(run_command(sys.argv[1:]))
"""


@pytest.mark.parametrize(("method", "room"), [("product-mean", 2000), ("residual", 50000)])
def test_a_full_disk_is_told_of_and_nothing_is_left(
    base: Path, two: list[str], tmp_path: Path, method: str, room: int
) -> None:
    pytest.importorskip("resource")
    flags = ["-o", str(tmp_path / "out"), "--method", method, "--base", str(base)]
    command = [sys.executable, "-c", FULL % (room, room), "merge", *two, *flags]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ))

    assert (ended.returncode, ended.stdout) == (1, "")
    assert "error[disk.full]" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_rows_that_nothing_can_be_measured_on_are_refused_before_anything_is_merged(
    base: Path, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text('{"x": 1}\n', encoding="utf-8")

    code, _, err = typed(capsys, *two, "-o", out, "--base", base, "--eval", rows)

    assert code == 2
    assert "error[data.format]" in err
    assert "error " not in err.splitlines()[0]
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}


def test_every_method_is_named_to_who_names_none_of_them(
    two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = typed(capsys, *two, "-o", tmp_path / "out", "--method", "mean")

    assert code == 2
    assert "stacking, ties, dare, residual" in err


def test_an_adapter_that_does_not_fit_the_base_is_refused_before_anything_is_merged(
    base: Path, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, other = tmp_path / "rows.jsonl", tmp_path / "other"
    rows.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    shutil.copytree(base, other)
    narrow = AutoConfig.from_pretrained(base, intermediate_size=48)
    AutoModelForCausalLM.from_config(narrow).save_pretrained(other)

    code, _, err = typed(capsys, *two, "-o", tmp_path / "out", "--base", other, "--eval", rows)

    assert code == 2
    assert "error[adapter.unfit]" in err
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "other"}


def test_a_loss_that_is_no_number_is_still_json(
    base: Path, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    wild = shutil.copytree(two[1], tmp_path / "wild")
    tensors = safetensors.numpy.load_file(wild / WEIGHTS_FILE)
    safetensors.numpy.save_file({name: tensor * 1e25 for name, tensor in tensors.items()}, wild / WEIGHTS_FILE)

    flags = ["--base", base, "--eval", rows, "--json"]
    code, said, err = typed(capsys, two[0], wild, "-o", tmp_path / "out", *flags)

    losses = json.loads(said, parse_constant=pytest.fail)["losses"]
    assert (code, losses[str(wild)]) == (0, None)
    assert losses[two[0]] > 0
    assert f"loss     nan  {wild}" in err


def test_an_error_below_rounding_is_told_as_that(
    two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, err = typed(capsys, two[0], two[0], "-o", tmp_path / "out")

    assert "4/4  error  < 1e-07  " in err
    assert "hint" not in err
