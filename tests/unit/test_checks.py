"""The cheap checks, byte by byte. What the hub makes of them stands in the integration tests."""

import json
import struct
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.fixtures_hub import LEARNING_RATE, REACH, SHAPES, STEPS, job_files, numbers, recipe
from trainchain.core.adapter import adapter_bytes
from trainchain.core.checks import SLACK, reach, read_delta
from trainchain.core.encodings import ENCODINGS, encode
from trainchain.core.errors import TrainChainError
from trainchain.core.models import ResolvedRecipe

RECIPE = recipe(job_files())
BOUND = reach(RECIPE, 1)
NAME = min(SHAPES)


def code_of(data: bytes) -> str:
    with pytest.raises(TrainChainError) as caught:
        read_delta(data, RECIPE, SHAPES, 1)
    assert 400 <= caught.value.status < 500
    return caught.value.code


def with_header(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def test_a_good_delta_comes_out_as_it_went_in() -> None:
    tensors = numbers(1)

    found = read_delta(adapter_bytes(tensors), RECIPE, SHAPES, 1).delta

    assert list(found) == sorted(SHAPES)
    assert all(np.array_equal(found[name], tensors[name]) for name in SHAPES)


def test_the_same_numbers_in_another_file_are_refused() -> None:
    tensors = numbers(1)

    assert code_of(safetensors.numpy.save(tensors, metadata={"made": "elsewhere"})) == "delta.not_canonical"


def test_what_rounding_in_an_encoding_adds_is_within_reach() -> None:
    furthest = {name: np.full_like(tensor, BOUND) for name, tensor in numbers(1).items()}

    for encoding in ENCODINGS:
        read_delta(encode(furthest, encoding), with_merge(encoding=encoding), SHAPES, 1)


def test_a_delta_of_zeros_is_a_delta() -> None:
    read_delta(adapter_bytes({n: np.zeros_like(t) for n, t in numbers(1).items()}), RECIPE, SHAPES, 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\x80\x05pickle",
        with_header(b""),
        with_header(b"{"),
        with_header(b"[]"),
        with_header(b"null"),
        with_header(b"\xff\xfe"),
        with_header(b"[" * 5000),
        (2**63).to_bytes(8, "little") + b"{}",
        (2**64 - 1).to_bytes(8, "little"),
        with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}', b"\0" * 4),
        with_header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"\0" * 4),
        with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b"\0" * 4),
        with_header(b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        with_header(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'),
        with_header(b'{"a":{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,0]}}'),
        with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 5),
    ],
)
def test_what_is_no_safetensors_file_is_refused(data: bytes) -> None:
    assert code_of(data) == "delta.not_safetensors"


def test_two_tensors_cannot_share_their_bytes() -> None:
    header = {
        name: {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * int(np.prod(shape))]}
        for name, shape in SHAPES.items()
    }

    assert code_of(with_header(json.dumps(header).encode(), b"\0" * 48)) == "delta.not_safetensors"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({NAME: None}, "delta.missing_tensor"),
        ({"lm_head.weight": np.zeros(1, np.float32)}, "delta.extra_tensor"),
        ({NAME: np.zeros(SHAPES[NAME], np.float64)}, "delta.wrong_dtype"),
        ({NAME: np.zeros(SHAPES[NAME], np.float16)}, "delta.wrong_dtype"),
        ({NAME: np.zeros(SHAPES[NAME], np.int32)}, "delta.wrong_dtype"),
        ({NAME: np.zeros((1, *SHAPES[NAME]), np.float32)}, "delta.wrong_shape"),
        ({NAME: np.zeros(SHAPES[NAME][::-1], np.float32)}, "delta.wrong_shape"),
        ({NAME: np.zeros((0, 6), np.float32)}, "delta.wrong_shape"),
        ({NAME: np.full(SHAPES[NAME], np.nan, np.float32)}, "delta.not_finite"),
        ({NAME: np.full(SHAPES[NAME], np.inf, np.float32)}, "delta.not_finite"),
        ({NAME: np.full(SHAPES[NAME], 1.01 * REACH, np.float32)}, "delta.out_of_reach"),
        ({NAME: np.full(SHAPES[NAME], -1.01 * REACH, np.float32)}, "delta.out_of_reach"),
        ({NAME: np.full(SHAPES[NAME], 3e38, np.float32)}, "delta.out_of_reach"),
    ],
)
def test_one_wrong_tensor_refuses_the_delta(change: dict[str, np.ndarray | None], code: str) -> None:
    tensors = {name: tensor for name, tensor in {**numbers(2), **change}.items() if tensor is not None}

    assert code_of(safetensors.numpy.save(tensors)) == code


def test_one_element_is_enough() -> None:
    for value, code in ((np.nan, "delta.not_finite"), (REACH * 1.5, "delta.out_of_reach")):
        tensors = numbers(3)
        tensors[NAME][-1, -1] = value
        assert code_of(adapter_bytes(tensors)) == code


def test_the_reach_is_three_times_the_learning_rates_of_the_shard_s_steps() -> None:
    data = adapter_bytes({**numbers(1), NAME: np.full(SHAPES[NAME], 1.5 * REACH, np.float32)})

    assert pytest.approx(REACH + SLACK) == BOUND
    assert code_of(data) == "delta.out_of_reach"
    read_delta(data, RECIPE.model_copy(update={"steps": 2 * STEPS}), SHAPES, 1)
    read_delta(data, with_training(learning_rate=2 * RECIPE.training.learning_rate), SHAPES, 1)


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"warmup_steps": 4}, [(1 + 2 + 3 + 4) / 4, 4.0]),
        ({"shard_warmup_steps": 2}, [3.5, 3.5]),
        ({"warmup_steps": 4, "shard_warmup_steps": 2}, [1 / 8 + 2 / 4 + 3 / 4 + 1, 3.5]),
        ({"warmup_steps": 0, "lr_scheduler": "cosine"}, [3.5069, 0.9932]),
    ],
)
def test_each_round_s_reach_follows_the_schedule(changes: dict[str, Any], rates: list[float]) -> None:
    scheduled = with_training(**changes)

    found = [reach(scheduled, round_) for round_ in (1, 2)]

    assert found == pytest.approx([3 * LEARNING_RATE * sum_ + SLACK for sum_ in rates], rel=1e-3)


def test_what_a_later_round_can_no_longer_do_is_refused_there() -> None:
    cosine = with_training(lr_scheduler="cosine")
    data = adapter_bytes({**numbers(1), NAME: np.full(SHAPES[NAME], 0.5 * REACH, np.float32)})

    read_delta(data, cosine, SHAPES, 1)
    with pytest.raises(TrainChainError) as caught:
        read_delta(data, cosine, SHAPES, 2)

    assert caught.value.code == "delta.out_of_reach"


def with_merge(**changes: Any) -> ResolvedRecipe:
    return RECIPE.model_copy(update={"merge": RECIPE.merge.model_copy(update=changes)})


def with_training(**changes: Any) -> ResolvedRecipe:
    return RECIPE.model_copy(update={"training": RECIPE.training.model_copy(update=changes)})


def test_a_message_never_carries_a_stranger_s_novel() -> None:
    with pytest.raises(TrainChainError) as caught:
        read_delta(adapter_bytes({**numbers(1), "x" * 100_000: np.zeros(1, np.float32)}), RECIPE, SHAPES, 1)

    assert len(caught.value.message) < 400
