"""Which GPUs a worker uses: what the driver says, what the environment says, what the owner of the machine says."""

import stat
import sys
from pathlib import Path

import pytest

from trainchain.core.errors import TrainChainError
from trainchain.core.worker import devices

TWO = """\
GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-5c2a1f6e-0000-1111-2222-333344445555)
GPU 1: NVIDIA GeForce RTX 3060 (UUID: GPU-77777777-0000-1111-2222-333344445555)
"""
SPLIT = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-a)
  MIG 3g.20gb     Device  0: (UUID: MIG-11111111-aaaa)
  MIG 3g.20gb     Device  1: (UUID: MIG-22222222-bbbb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-b)
"""


def put_nvidia_smi(folder: Path, script: str) -> Path:
    """A folder for PATH with an nvidia-smi of our own."""
    folder.mkdir(exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (TWO, ["0", "1"]),
        (SPLIT, ["MIG-11111111-aaaa", "MIG-22222222-bbbb", "1"]),
        ("", []),
        ("No devices found.\n", []),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", []),
    ],
)
def test_the_driver_s_list_is_read(text: str, ids: list[str]) -> None:
    assert devices.listed(text) == ids


@pytest.mark.skipif(sys.platform == "win32", reason="the fake nvidia-smi is a shell script")
@pytest.mark.parametrize(
    ("script", "ids"),
    [(f"cat <<END\n{TWO}END", ["0", "1"]), ("exit 9", []), (f"cat <<END\n{TWO}END\nexit 1", []), ("echo hi", [])],
)
def test_the_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, ids: list[str]) -> None:
    monkeypatch.setenv("PATH", f"{put_nvidia_smi(tmp_path / 'bin', script)}:/usr/bin:/bin")

    assert devices.visible({}) == ids


def test_without_a_driver_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert devices.visible({}) == []


@pytest.mark.parametrize(
    ("named", "ids"),
    [("0", ["0"]), ("2, 3", ["2", "3"]), ("", []), ("-1", []), ("1,-1,2", ["1"]), ("GPU-5c2a", ["GPU-5c2a"])],
)
def test_what_the_environment_hides_is_not_used(named: str, ids: list[str]) -> None:
    assert devices.visible({"CUDA_VISIBLE_DEVICES": named}) == ids


@pytest.mark.parametrize(("text", "ids"), [("0", ["0"]), ("0, 2", ["0", "2"]), ("MIG-a/1/0", ["MIG-a/1/0"])])
def test_a_list_of_devices_is_taken_as_it_is(text: str, ids: list[str]) -> None:
    assert devices.chosen(text) == ids


@pytest.mark.parametrize("text", ["", ",", "0,", "0,0", "-1", "all the best", "../0", "0;1"])
def test_what_is_no_list_of_devices_is_a_usage_error(text: str) -> None:
    with pytest.raises(TrainChainError) as refused:
        devices.chosen(text)

    assert (refused.value.code, refused.value.exit_code) == ("usage.flag", 2)


def test_workers_of_one_machine_take_its_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert [devices.one_device(number) for number in range(3)] == [["--devices", one] for one in "454"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert devices.one_device(0) == []
