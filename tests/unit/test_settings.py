"""This machine's settings: which flag, variable or default wins, and sizes as people write them."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainchain.core.errors import TrainChainError
from trainchain.core.settings import DEFAULT_CACHE_CAP, Settings, parse_size, show_size, write_private


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * 10**9),
        ("500MB", 500 * 10**6),
        ("64GiB", 64 * 2**30),
        ("1.5 TB", 1_500_000_000_000),
        ("0.1gib", 107_374_182),
        ("7kb", 7000),
        (" 12B ", 12),
        ("999999999999999TB", 999_999_999_999_999 * 10**12),
    ],
)
def test_a_size_is_read_as_people_write_it(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "80", "GB", "-1GB", "0GB", "0.1B", "1e3GB", "nanGB", "infGB", "80 GB GB", "80Gb/s", "8O GB", "1,5GB",
     "\u0661GB", "80  GB", "9" * 400 + "GB", "80GB\n1", "0x10GB", "80GX", "80iB"],
)  # fmt: skip
def test_what_is_no_size_is_a_usage_error_that_shows_one(text: str) -> None:
    with pytest.raises(TrainChainError) as caught:
        parse_size(text, "--cache-cap")

    assert (caught.value.code, caught.value.exit_code) == ("usage.flag", 2)
    assert "--cache-cap" in caught.value.message
    assert "80GB" in caught.value.hint
    assert len(caught.value.message) < 200


@given(st.integers(1, 10**18))
def test_what_is_shown_is_read_as_about_the_same(size: int) -> None:
    assert abs(parse_size(show_size(size)) - size) <= 0.051 * size


def test_the_cache_lies_in_the_home_unless_another_place_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Settings.load(tmp_path).cache == tmp_path / "cache"
    monkeypatch.setenv("TRAINCHAIN_CACHE", str(tmp_path / "big"))

    assert Settings.load(tmp_path).cache == tmp_path / "big"


def test_the_cache_s_cap_is_the_flag_s_then_the_variable_s_then_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load().cache_cap == DEFAULT_CACHE_CAP
    monkeypatch.setenv("TRAINCHAIN_CACHE_CAP", "2GB")
    assert Settings.load().cache_cap == 2 * 10**9
    assert Settings.load(cache_cap="1GB").cache_cap == 10**9
    monkeypatch.setenv("TRAINCHAIN_CACHE_CAP", "much")

    with pytest.raises(TrainChainError) as caught:
        Settings.load()
    assert "TRAINCHAIN_CACHE_CAP" in caught.value.message


FULL = """
import pathlib, resource, signal, sys
from trainchain.core.settings import write_private
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    write_private(pathlib.Path(sys.argv[1]), b"x" * 100)
except OSError:
    print("refused")
"""
"""As on a disk that is full: no file may grow beyond ten bytes."""


@pytest.mark.skipif(os.name == "nt", reason="Windows limits no file's size")
def test_a_file_that_finds_no_room_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    write_private(path, b"old")

    said = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)

    assert said.stdout == "refused\n"
    assert [found.name for found in tmp_path.iterdir()] == ["receipt.json"]
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(os.name == "nt", reason="Windows opens no folder")
def test_a_new_name_is_on_disk_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, really = [], os.fsync

    def watched(handle: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(handle).st_mode), (tmp_path / "x").exists()))
        really(handle)

    monkeypatch.setattr(os, "fsync", watched)
    write_private(tmp_path / "x", b"1")

    assert synced == [(False, False), (True, True)]
