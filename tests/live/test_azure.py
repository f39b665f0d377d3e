"""The real Azure ML, asked by name only: TRAINCHAIN_LIVE=1 pytest -m live tests/live/test_azure.py

Reads a small public model of the catalogue; with AZUREML_SUBSCRIPTION_ID, AZUREML_RESOURCE_GROUP and
AZUREML_WORKSPACE_NAME set it also registers a model named trainchain-live-test in that workspace and reads it again.
"""

import os
from pathlib import Path

import pytest

from trainchain.core.sources.address import parse
from trainchain.core.sources.azureml import AzureML
from trainchain.core.sources.azureml_session import CONTEXT

pytestmark = [
    pytest.mark.live,
    pytest.mark.azure,
    pytest.mark.skipif(os.environ.get("TRAINCHAIN_LIVE") != "1", reason="asks the real Azure: set TRAINCHAIN_LIVE=1"),
]
MODEL = os.environ.get(
    "TRAINCHAIN_LIVE_AZURE_MODEL", "azureml://registries/azureml/models/Phi-4-mini-instruct/labels/latest"
)


@pytest.fixture(scope="module")
def source() -> AzureML:
    return AzureML()


def test_a_model_of_the_catalogue_is_found_and_begins_as_a_model_does(source: AzureML, tmp_path: Path) -> None:
    found = source.find(parse(MODEL, "model"), "model")
    assert "/versions/" in found.source
    config = next(file for file in found.files if file.path == "config.json")
    head = source.head(found.source, config.path, 1)
    assert head == b"{"
    source.fetch(found.source, config.path, tmp_path / "config.json", size=config.size)
    assert (tmp_path / "config.json").read_bytes().startswith(b"{")


@pytest.mark.skipif(not all(os.environ.get(name) for name in CONTEXT), reason=f"needs {', '.join(CONTEXT)}")
def test_a_folder_is_registered_once_and_read_again(source: AzureML, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    target = parse("azureml:trainchain-live-test", "target")
    first = source.push(folder, target, message="A test of TrainChain", private=True)
    again = source.push(folder, target, message="A test of TrainChain", private=True)
    assert (again.commit, again.created) == (first.commit, False)
    assert source.head(first.url, "adapter_config.json", 2) == b"{}"
