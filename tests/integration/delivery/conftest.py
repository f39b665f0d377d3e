from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures_delivery import Trained, start, train
from tests.fixtures_hf import Hub
from tests.fixtures_hub import Town
from tests.fixtures_model import make_tiny_model
from trainchain.core.client import HubClient


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    made = Town(tmp_path_factory.mktemp("town"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as made:
        yield made.use(monkeypatch, user="me")


@pytest.fixture
def trained(town: Town, tiny: Path, hub: Hub) -> Iterator[Trained]:
    commit = hub.put("acme/tiny", tiny)
    job = start(town, tiny, f"hf://acme/tiny@{commit}", samples=["Who?"], hub_model_id="me/support-bot-lora")
    adapter = train(town, job, [town.person(), town.person()], 2)
    client = HubClient(town.url)
    yield Trained(job, client, adapter)
    client.close()
