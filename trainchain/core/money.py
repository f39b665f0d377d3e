"""Token amounts: integers in the token's smallest unit; decimals only at the edges. Standard library only."""

import re

from trainchain.core.errors import TrainChainError

DECIMALS = 18
_AMOUNT = re.compile(r"(\d{1,40})(?:\.(\d{1,18}))?")


def parse(text: str, decimals: int = DECIMALS) -> int:
    """Turn "2.50" into units. Raises `money.not_an_amount` for signs, exponents, and digits beyond the unit."""
    match = _AMOUNT.fullmatch(text.strip())
    fraction = (match.group(2) or "") if match else ""
    if match is None or len(fraction) > decimals:
        raise TrainChainError(
            "money.not_an_amount",
            f"{text!r} is not an amount of tokens.",
            hint=f"Write digits with at most {decimals} after the point, for example 2.50.",
        )
    unit: int = 10**decimals
    return int(match.group(1)) * unit + int(fraction.ljust(decimals, "0") or "0")


def show(units: int, decimals: int = DECIMALS) -> str:
    """Turn units into the shortest exact decimal: no rounding, no exponent."""
    whole, fraction = divmod(abs(units), 10**decimals)
    tail = str(fraction).rjust(decimals, "0").rstrip("0") if decimals else ""
    return f"{'-' if units < 0 else ''}{whole}{'.' + tail if tail else ''}"
