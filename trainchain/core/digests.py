"""Bytes named by their sha256, canonical JSON, and fresh ids. Standard library only."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHUNK = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")


def sha256(data: bytes) -> str:
    """The name of `data`: 64 lower-case hex digits, no prefix."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """The name of a file's bytes, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_chunks(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, UTF-8, NaN refused.

    Floats are written as Python's shortest repr, so what is hashed is what is parsed back (RFC 8785 differs only
    in the exponents of floats; nothing here is read by another canonicaliser).
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()
