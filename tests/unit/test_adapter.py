from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from trainchain.core.adapter import (
    adapter_bytes,
    apply,
    delta,
    read_adapter,
    tensor_specs,
)
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([0.5], np.float32),
}


def test_bytes_are_safetensors_in_one_form() -> None:
    data = adapter_bytes(TENSORS)

    assert data == adapter_bytes(dict(reversed(TENSORS.items())))
    assert data == safetensors.numpy.save(TENSORS)
    assert sha256(data) == "759f9909ac8c2ea1b1d434e3c7fb5a4131fefcb143aa9708601fd0c60e0d215b"
    assert all(np.array_equal(read_adapter(data)[name], TENSORS[name]) for name in TENSORS)
    assert list(read_adapter(data)) == ["a", "b"]


def test_other_layouts_of_the_same_array_are_the_same_bytes() -> None:
    assert adapter_bytes({"b": np.asfortranarray(TENSORS["b"])}) == adapter_bytes({"b": TENSORS["b"]})


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "delta.not_safetensors"),
        (b"PK\x03\x04 a pickle in a zip", "delta.not_safetensors"),
        (adapter_bytes(TENSORS)[:-1], "delta.not_safetensors"),
        ((2**62).to_bytes(8, "little") + b"{}", "delta.not_safetensors"),
        (safetensors.numpy.save({"a": np.zeros(2, np.float64)}), "delta.wrong_dtype"),
    ],
)
def test_anything_else_is_refused(data: bytes, code: str) -> None:
    with pytest.raises(TrainChainError) as caught:
        read_adapter(data)

    assert caught.value.code == code


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainChainError, match=r"gone\.safetensors"):
        read_adapter(tmp_path / "gone.safetensors")


def test_delta_and_apply_are_inverse_up_to_rounding() -> None:
    end = {name: tensor * np.float32(1.1) + np.float32(0.3) for name, tensor in TENSORS.items()}

    change = delta(end, TENSORS)

    assert all(tensor.dtype == np.float32 for tensor in change.values())
    for name, tensor in apply(TENSORS, change).items():
        np.testing.assert_allclose(tensor, end[name], rtol=1e-6)
    assert tensor_specs(change) == {"a": (1,), "b": (2, 3)}
