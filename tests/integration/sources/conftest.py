"""A hub on loopback for each test, and our side of it, which waits by writing down for how long."""

from collections.abc import Iterator

import pytest

from tests.fixtures_hf import Hub
from trainchain.core.sources.hf import HuggingFace


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def source(waits: list[float]) -> HuggingFace:
    return HuggingFace(sleep=waits.append)
