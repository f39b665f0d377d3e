"""Amounts: digits at the edges, integers inside."""

import pytest

from trainchain.core.errors import TrainChainError
from trainchain.core.money import parse, show


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("0", 0),
        ("1", 10**18),
        ("2.50", 25 * 10**17),
        ("0.000000000000000001", 1),
        ("007", 7 * 10**18),
        (" 3 ", 3 * 10**18),
        ("9" * 40, int("9" * 40) * 10**18),
    ],
)
def test_an_amount_is_read_exactly(text: str, units: int) -> None:
    assert parse(text) == units


@pytest.mark.parametrize(
    "text",
    ["", " ", ".", ".5", "5.", "-1", "+1", "1e3", "1,5", "1 000", "0x10", "1.0000000000000000001", "nan", "inf",
     "1_0", "9" * 41, "1\n2", "1.5.0"],
)  # fmt: skip
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(TrainChainError) as caught:
        parse(text)

    assert (caught.value.code, caught.value.exit_code) == ("money.not_an_amount", 2)
    assert "2.50" in caught.value.hint


@pytest.mark.parametrize(
    ("units", "text"),
    [
        (0, "0"),
        (10**18, "1"),
        (25 * 10**17, "2.5"),
        (1, "0.000000000000000001"),
        (-(10**17), "-0.1"),
        (10**30, "1" + "0" * 12),
    ],
)
def test_an_amount_is_shown_exactly(units: int, text: str) -> None:
    assert show(units) == text


def test_a_token_may_have_other_decimals() -> None:
    assert (parse("1.5", 6), show(1_500_000, 6)) == (1_500_000, "1.5")
    assert (parse("7", 0), show(7, 0)) == (7, "7")
    for text, decimals in (("1.1234567", 6), ("1.0", 0)):
        with pytest.raises(TrainChainError):
            parse(text, decimals)
