import contextlib

from hypothesis import given
from hypothesis import strategies as st

from trainchain.core.errors import TrainChainError
from trainchain.core.money import parse, show

units = st.integers(0, 10**58 - 1)


@given(units)
def test_what_is_shown_reads_back_as_the_same_amount(amount):
    assert parse(show(amount)) == amount


@given(st.integers(0, 10**30), st.integers(0, 18))
def test_and_with_any_decimals(amount, decimals):
    assert parse(show(amount, decimals), decimals) == amount


@given(units)
def test_what_is_shown_is_the_shortest(amount):
    text = show(amount)
    assert not text.endswith(".")
    assert "." not in text or not text.endswith("0")
    assert text == "0" or not text.startswith("00")


@given(st.integers(-(10**40), 10**40))
def test_a_debt_is_the_amount_with_a_sign(amount):
    assert show(-amount) == (show(amount)[1:] if amount < 0 else ("-" if amount else "") + show(amount))


@given(st.text(max_size=30))
def test_any_text_is_an_amount_or_refused(text):
    with contextlib.suppress(TrainChainError):
        assert parse(text) >= 0
