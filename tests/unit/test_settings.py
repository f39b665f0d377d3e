"""This machine's settings: which flag, variable or default wins, and sizes as people write them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainchain.core.errors import TrainChainError
from trainchain.core.settings import DEFAULT_CACHE_CAP, Settings, parse_size, show_size


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
