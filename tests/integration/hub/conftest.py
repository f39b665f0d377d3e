from collections.abc import Iterator

import pytest

from tests.fixtures_hub import Person, Town


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    """One hub and one chain for the tests of a file; every test has jobs of its own there."""
    made = Town(tmp_path_factory.mktemp("town"))
    yield made
    made.close()


@pytest.fixture
def anna(town: Town) -> Person:
    return town.person()


@pytest.fixture
def ben(town: Town) -> Person:
    return town.person()
