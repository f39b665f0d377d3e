"""The folders of a private base: what a killed process left of one goes, whatever its number was."""

import os
from pathlib import Path

import pytest

from trainchain.core.worker import volatile
from trainchain.core.worker.volatile import Volatile


def test_what_a_process_of_the_same_number_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, no_memory = tmp_path / "home", tmp_path / "none"
    left = Volatile(home, no_memory).folder(10)
    (left / "model.safetensors").write_bytes(b"numbers")
    monkeypatch.setattr(volatile, "_MADE", set())  # as in a container that is started again

    Volatile(home, no_memory)

    assert not left.exists()


def test_another_device_of_the_same_process_keeps_its_own(tmp_path: Path) -> None:
    home, no_memory = tmp_path / "home", tmp_path / "none"
    used = Volatile(home, no_memory).folder(10)

    Volatile(home, no_memory)

    assert used.is_dir()
    assert str(os.getpid()) in used.name
