"""Names of bytes, and the one byte form of a JSON value."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainchain.core.digests import CHUNK, canonical_json, is_digest, sha256, sha256_chunks, sha256_file

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def test_the_name_of_bytes_is_their_sha256(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "long").write_bytes(b"a" * (CHUNK + 1))

    assert sha256(b"") == sha256_file(tmp_path / "empty") == sha256_chunks([]) == EMPTY
    assert sha256(b"a" * (CHUNK + 1)) == sha256_file(tmp_path / "long") == sha256_chunks([b"a" * CHUNK, b"", b"a"])


@pytest.mark.parametrize(
    ("text", "fits"),
    [(EMPTY, True), (EMPTY.upper(), False), ("0x" + EMPTY, False), (EMPTY[:-1], False), (EMPTY + "\n", False),
     ("../" + EMPTY[3:], False), ("", False), ("\u0660" * 64, False)],
)  # fmt: skip
def test_a_digest_is_64_lower_case_hex_digits(text: str, fits: bool) -> None:
    assert is_digest(text) is fits


@pytest.mark.parametrize(
    ("value", "data"),
    [
        ({"b": 1, "a": [True, None]}, b'{"a":[true,null],"b":1}'),
        ({"ü": "ß"}, '{"ü":"ß"}'.encode()),
        ([1.0, 1e-4, 1e22, -0.0], b"[1.0,0.0001,1e+22,-0.0]"),
        ('line\nquote"', b'"line\\nquote\\""'),
    ],
)
def test_canonical_json_never_changes(value: Any, data: bytes) -> None:
    assert canonical_json(value) == data


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": -float("inf")}])
def test_what_is_no_json_has_no_bytes(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(value)


@given(VALUES)
def test_what_is_hashed_is_what_is_read_back(value: Any) -> None:
    try:
        data = canonical_json(value)
    except UnicodeEncodeError:  # a lone surrogate is no text
        return
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), st.integers()), st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(value: dict[str, int], random: Any) -> None:
    pairs = list(value.items())
    random.shuffle(pairs)

    assert canonical_json(dict(pairs)) == canonical_json(value)
