"""What holds of every encoding of a delta, whatever the numbers."""

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainchain.core.adapter import Adapter, tensor_bytes
from trainchain.core.encodings import BITS, BLOCK, ENCODINGS, LEAST, SPREAD, decode, encode, encoded_size, ideal_size
from trainchain.core.errors import TrainChainError
from trainchain.core.segments import Moments

every = pytest.mark.parametrize("encoding", ENCODINGS)
seeds = st.integers(0, 2**32 - 1)
sizes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 150)), min_size=1, max_size=4)
magnitudes = st.integers(-40, 37)
EXACT = {"fp32": 0.0, "bf16": 2.0**-8}


def delta(seed: int, size: list[tuple[int, int]], magnitude: int) -> Adapter:
    """Numbers of all orders up to a power of ten, some of them 0 or -0."""
    random = np.random.default_rng(seed)
    made: Adapter = {}
    for at, shape in enumerate(size):
        numbers = random.normal(size=shape) * 10.0 ** (magnitude - random.integers(0, 8, size=shape))
        numbers[random.random(shape) < 0.1] = random.choice([0.0, -0.0])
        made[f"module{at}.weight"] = numbers.astype(np.float32)
    return made


def shapes(made: Adapter) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in made.items()}


def refused(data: bytes, encoding: str, made: Adapter) -> str:
    with pytest.raises(TrainChainError) as caught:
        decode(data, encoding, shapes(made))
    return caught.value.code


@every
@settings(deadline=None, max_examples=100)
@given(seed=seeds, size=sizes, magnitude=magnitudes)
def test_what_was_decoded_has_the_same_bytes_again(
    encoding: str, seed: int, size: list[tuple[int, int]], magnitude: int
) -> None:
    made = delta(seed, size, magnitude)
    data = encode(made, encoding)

    again = decode(data, encoding, shapes(made)).delta

    assert encode(again, encoding) == data
    assert len(data) == encoded_size(encoding, shapes(made))
    assert encode(dict(reversed(made.items())), encoding) == data


@every
@settings(deadline=None, max_examples=100)
@given(seed=seeds, size=sizes, magnitude=magnitudes)
def test_every_number_comes_back_as_near_as_its_block_allows(
    encoding: str, seed: int, size: list[tuple[int, int]], magnitude: int
) -> None:
    made = delta(seed, size, magnitude)

    again = decode(encode(made, encoding), encoding, shapes(made)).delta

    for name, tensor in made.items():
        flat, back = tensor.ravel().astype(np.float64), again[name].ravel().astype(np.float64)
        if encoding in EXACT:
            assert np.all(np.abs(back - flat) <= EXACT[encoding] * np.abs(flat) + 2.0**-126)
            continue
        top = (1 << (BITS[encoding] - 1)) - 1
        for at in range(0, flat.size, BLOCK):
            furthest = float(np.abs(flat[at : at + BLOCK]).max())
            assert (
                np.abs(back[at : at + BLOCK] - flat[at : at + BLOCK]).max() <= furthest * (0.5 / top + SPREAD) + 2e-30
            )
            assert np.abs(back[at : at + BLOCK]).max() <= furthest * (1 + SPREAD)


@every
@settings(deadline=None, max_examples=60)
@given(seed=seeds, size=sizes, data=st.data())
def test_a_changed_byte_changes_the_numbers_or_is_refused(
    encoding: str, seed: int, size: list[tuple[int, int]], data: st.DataObject
) -> None:
    made = delta(seed, size, 0)
    file = bytearray(encode(made, encoding))
    at = data.draw(st.integers(0, len(file) - 1))
    file[at] ^= data.draw(st.integers(1, 255))

    with contextlib.suppress(TrainChainError):
        again = decode(bytes(file), encoding, shapes(made)).delta
        assert encode(again, encoding) == bytes(file), "two files stand for one delta"


@every
def test_no_file_is_much_larger_than_its_numbers(encoding: str) -> None:
    small = {f"base_model.model.layer{at}.lora_A.weight": (8, 192) for at in range(6)}
    large = {f"base_model.model.layer{at}.lora_A.weight": (16, 4096) for at in range(448)}

    for made in (small, large):
        assert encoded_size(encoding, made) <= 1.05 * ideal_size(encoding, made)


@pytest.mark.parametrize("encoding", ["bf16", "int8", "int4"])
def test_other_writings_of_the_same_numbers_are_refused(encoding: str) -> None:
    made = {"a": np.array([[1.0, -2.0, 0.25]], np.float32)}
    data = encode(made, encoding)
    longer = len(data).to_bytes(8, "little")

    assert refused(data[:8] + b" " + data[8:], encoding, made) == "delta.not_safetensors"
    header = int.from_bytes(data[:8], "little")
    spaced = (header + 8).to_bytes(8, "little") + data[8 : 8 + header] + b" " * 8 + data[8 + header :]
    assert refused(spaced, encoding, made) == "delta.not_canonical"
    assert refused(longer, encoding, made) == "delta.not_safetensors"


def test_a_block_that_could_be_written_with_a_smaller_scale_is_refused() -> None:
    made = {"a": np.zeros((1, 4), np.float32)}
    one = np.array([0x3F80], "<u2")
    halves = tensor_bytes({"codes": np.array([0x99, 0x88], np.uint8), "scales": one})
    nothing = tensor_bytes({"codes": np.array([0x88, 0x88], np.uint8), "scales": one})
    lowest = tensor_bytes({"codes": np.array([0x80, 0x88], np.uint8), "scales": one})

    assert {refused(data, "int4", made) for data in (halves, nothing, lowest)} == {"delta.not_canonical"}


@pytest.mark.parametrize("encoding", sorted(BITS))
@settings(deadline=None, max_examples=200)
@given(share=st.floats(0.99, 1.02))
def test_a_block_that_is_nearly_nothing_has_one_form_too(encoding: str, share: float) -> None:
    """A hub that could not read its own step would never come to the end of a round."""
    made = {"a": np.array([[share * LEAST, 0.0]], np.float32)}

    data = encode(made, encoding)

    assert encode(decode(data, encoding, shapes(made)).delta, encoding) == data


@pytest.mark.parametrize("bits", [0x7F80, 0x7FC0, 0xFF80])
def test_a_scale_that_is_no_number_is_refused(bits: int) -> None:
    made = {"a": np.ones((1, 2), np.float32)}
    data = tensor_bytes({"codes": np.array([0x8F], np.uint8), "scales": np.array([bits], "<u2")})

    assert refused(data, "int4", made) == "delta.not_finite"


@every
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_nothing_that_is_not_finite_is_encoded(encoding: str, odd: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        encode({"a": np.array([[odd, 1.0]], np.float32)}, encoding)


def moments(seed: int, size: list[tuple[int, int]], magnitude: int) -> Moments:
    """First moments as `delta` makes them; second ones of all orders, some rows and columns zero."""
    m, v = delta(seed, size, magnitude), delta(seed + 1, size, magnitude)
    random = np.random.default_rng(seed)
    for tensor in v.values():
        np.square(tensor, out=tensor)
        tensor[random.random(tensor.shape[0]) < 0.2] = 0.0
        tensor[:, random.random(tensor.shape[1]) < 0.2] = 0.0
    return Moments(m, v)


@every
@settings(deadline=None, max_examples=100)
@given(seed=seeds, size=sizes, magnitude=st.integers(-12, 4))
def test_moments_travel_in_one_form_of_bytes(
    encoding: str, seed: int, size: list[tuple[int, int]], magnitude: int
) -> None:
    made, with_ = delta(seed, size, magnitude), moments(seed, size, magnitude)
    data = encode(made, encoding, with_)

    again = decode(data, encoding, shapes(made), moments=True)

    assert again.moments is not None
    assert encode(again.delta, encoding, again.moments) == data
    assert encode(again.delta, encoding) == encode(made, encoding)
    assert len(data) == encoded_size(encoding, shapes(made), moments=True)
    assert all(np.all(tensor >= 0) for tensor in again.moments.v.values())
    assert refused(data, encoding, made) == "delta.extra_tensor"


@settings(deadline=None, max_examples=100)
@given(seed=seeds, rows=st.integers(1, 9), columns=st.integers(1, 90), magnitude=st.integers(-14, 4))
def test_a_second_moment_of_rank_one_comes_back_within_a_sixth_of_a_power_of_two(
    seed: int, rows: int, columns: int, magnitude: int
) -> None:
    random = np.random.default_rng(seed)
    v = 10.0**magnitude * np.outer(random.lognormal(size=rows), random.lognormal(size=columns))
    zeros = {"a": np.zeros_like(v, np.float32)}

    data = encode(zeros, "int4", Moments(zeros, {"a": v.astype(np.float32)}))
    again = decode(data, "int4", shapes(zeros), moments=True).moments

    assert again is not None
    # a row's mean, a column's share and the columns' mean share are each rounded by a sixth of a power of two at most
    assert np.all(np.abs(np.log2(again.v["a"] / v)) <= 3 / 6 + 1e-3)


@every
def test_no_file_with_moments_is_much_larger_than_its_numbers(encoding: str) -> None:
    small = {f"base_model.model.layer{at}.lora_A.weight": (8, 192) for at in range(6)}

    assert encoded_size(encoding, small, moments=True) <= 1.05 * ideal_size(encoding, small, moments=True)


@every
@settings(deadline=None, max_examples=60)
@given(seed=seeds, size=sizes, data=st.data())
def test_a_changed_byte_of_moments_changes_them_or_is_refused(
    encoding: str, seed: int, size: list[tuple[int, int]], data: st.DataObject
) -> None:
    made = delta(seed, size, 0)
    file = bytearray(encode(made, encoding, moments(seed, size, -3)))
    at = data.draw(st.integers(0, len(file) - 1))
    file[at] ^= data.draw(st.integers(1, 255))

    with contextlib.suppress(TrainChainError):
        again = decode(bytes(file), encoding, shapes(made), moments=True)
        assert encode(again.delta, encoding, again.moments) == bytes(file), "two files stand for one delta"


def test_a_negative_second_moment_has_no_bytes() -> None:
    zeros = {"a": np.zeros((2, 3), np.float32)}

    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="of a holds"):
            encode(zeros, "int4", Moments(zeros, {"a": np.full((2, 3), wrong, np.float32)}))
