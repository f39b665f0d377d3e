"""doctor --calibrate with its real child: what this machine's kernels make of the golden segments."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def doctor(*arguments: str, package: Path = ROOT, **environment: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "trainchain", "doctor", *arguments]
    process = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(package), "CUDA_VISIBLE_DEVICES": ""} | environment,
        cwd=package,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return process.returncode, process.stdout, process.stderr


def calibrated(**environment: str) -> dict[str, Any]:
    code, said, talk = doctor("--calibrate", "--threads", "1", "--json", **environment)
    document: dict[str, Any] = json.loads(said)
    assert (code, document["ok"]) == (0, True), talk
    return document


def test_a_machine_is_told_its_class_and_how_its_replays_compare() -> None:
    (device,) = calibrated()["devices"]

    assert [part["precision"] for part in device["precisions"]] == ["fp32", "bf16"]
    for part in device["precisions"]:
        assert f"/{part['precision']}/" in part["numeric_class"]
        assert [each["segment"] for each in part["segments"]] == [f"{part['precision']}-{k}" for k in ("cold", "warm")]
        for each in part["segments"]:
            assert each["repeats"]
            assert each["beyond"] == []
            assert each["distances"].keys() == each["tolerance"].keys()
            assert not each["equal"] or set(each["distances"].values()) == {0.0}


@pytest.mark.long
def test_another_machine_has_another_class_and_is_within_the_tolerance() -> None:
    plain, other = calibrated(), calibrated(**AVX2)

    classes = [[part["numeric_class"] for part in each["devices"][0]["precisions"]] for each in (plain, other)]
    # On a machine without AVX-512 both are the same.
    assert classes[0] == classes[1] or not set(classes[0]) & set(classes[1])


def test_people_are_told_what_it_means() -> None:
    code, said, _ = doctor("--calibrate", "--threads", "1")

    assert code == 0
    assert "fp32  cpu-" in said
    assert "compared by equality with machines of this class" in said
    assert said.endswith("every golden segment is within the tolerance\n")


def test_a_machine_that_computes_something_else_is_told_so(tmp_path: Path) -> None:
    """As faulty memory would have it: one of the reference's states is another segment's."""
    shutil.copytree(ROOT / "trainchain", tmp_path / "trainchain", ignore=shutil.ignore_patterns("node_modules"))
    golden = tmp_path / "trainchain" / "core" / "train" / "golden_segments"
    shutil.copy(golden / "fp32-cold.safetensors", golden / "fp32-warm.safetensors")

    code, said, talk = doctor("--calibrate", "--threads", "1", "--json", package=tmp_path)

    document = json.loads(said)
    assert code == 4, talk
    assert document["error"]["code"] == "doctor.calibration"
    assert document["error"]["message"].startswith("fp32-warm ended beyond the tolerance")
    segments = document["devices"][0]["precisions"][0]["segments"]
    assert [bool(each["beyond"]) for each in segments] == [False, True]


@pytest.mark.long
def test_a_gpu_that_is_not_there_is_no_processor() -> None:
    code, said, talk = doctor("--calibrate", "--devices", "7")

    assert (code, said) == (1, "")
    assert "PyTorch sees no GPU 7 on this machine." in talk


def test_without_a_word_it_says_what_it_can_do() -> None:
    code, _, talk = doctor()

    assert code == 2
    assert "hint: trainchain doctor --calibrate" in talk


def test_the_command_itself_loads_no_torch() -> None:
    program = "import sys, trainchain.cli.doctor as d; d._ask(None, 1); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)

    assert found.stdout == "False\n"
