"""Who may work, as an owner writes it."""

import pytest

from tests.unit.test_recipe import read, refusal, with_line

WALLET = "0x52908400098527886E0F7030069857D2E4169EE7"


@pytest.mark.parametrize("written", [WALLET, f'"{WALLET}"', WALLET.lower()])
def test_a_wallet_s_address_needs_no_quotes(written: str) -> None:
    """YAML alone would read a number."""
    assert read(with_line(f"access: {{workers: [{written}]}}")).access.workers == [written.strip('"')]


@pytest.mark.parametrize(
    ("workers", "told"),
    [("[0x12]", "'18' is no"), ("[owner]", "'owner' is no"), ("[]", "or a list"), ("everyone", "or a list")],
)
def test_what_is_no_list_of_wallets_is_told_as_one(workers: str, told: str) -> None:
    message = refusal(with_line(f"access: {{workers: {workers}}}")).message

    assert "r.yaml:8: `access.workers`" in message
    assert told in message


def test_of_a_long_list_the_mistake_is_told_and_not_the_list() -> None:
    wallets = ", ".join([WALLET] * 200 + ["0x12"])

    message = refusal(with_line(f"access: {{workers: [{wallets}]}}")).message

    assert "'18' is no wallet's address" in message
    assert len(message) < 300
