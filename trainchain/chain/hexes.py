"""Bytes as the chain writes them: keccak, 0x-hex of exact length, checksummed addresses. No web3."""

import re

from eth_hash.auto import keccak as _keccak

_HEX = re.compile(r"0x(?:[0-9a-fA-F]{2})*")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")


def keccak(data: bytes) -> bytes:
    digest: bytes = _keccak(data)
    return digest


def to_hex(data: bytes) -> str:
    return "0x" + data.hex()


def from_hex(text: str, length: int | None = None) -> bytes:
    """Read 0x-hex. Raises ValueError for anything else, or where it is not `length` bytes."""
    if not isinstance(text, str) or _HEX.fullmatch(text) is None:
        raise ValueError("not 0x and hex digits")
    data = bytes.fromhex(text[2:])
    if length is not None and len(data) != length:
        raise ValueError(f"{len(data)} bytes, not {length}")
    return data


def bytes32(text: str) -> bytes:
    """Read 32 bytes written as hex, with 0x or, as `core.digests` names things, without."""
    return from_hex(text if isinstance(text, str) and text.startswith("0x") else f"0x{text}", 32)


def is_address(text: object) -> bool:
    """Whether `text` is an address: all one case, or with the right checksum."""
    if not isinstance(text, str) or _ADDRESS.fullmatch(text) is None:
        return False
    digits = text[2:]
    return digits in (digits.lower(), digits.upper()) or text == checksum(text)


def checksum(address: str) -> str:
    """The EIP-55 spelling of 0x and 40 hex digits."""
    digits = from_hex(address, 20).hex()
    marks = _keccak(digits.encode()).hex()
    letters = (d.upper() if int(m, 16) >= 8 else d for d, m in zip(digits, marks, strict=False))
    return "0x" + "".join(letters)
