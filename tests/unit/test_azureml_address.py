"""Every form in which Azure ML's things are named, and what is none. Needs nothing of Azure."""

import contextlib
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainchain.core.errors import TrainChainError
from trainchain.core.models import Base
from trainchain.core.sources.address import AzureAddress, parse
from trainchain.core.sources.azureml_address import Asset, NumberedWorkspace, Registry, Workspace, read, shown

SUB = "0a1b2c3d-1111-2222-3333-444455556666"
GUID = "99998888-7777-6666-5555-444433332222"
HERE = Workspace(SUB, "rg-ml", "ws")
LONG = f"azureml://subscriptions/{SUB}/resourcegroups/rg-ml/workspaces/ws"
ARM = f"/subscriptions/{SUB}/resourceGroups/rg-ml/providers/Microsoft.MachineLearningServices/workspaces/ws"

MODELS = {
    "azureml:llama:3": Asset(None, "models", "llama", version="3"),
    "azureml:llama@latest": Asset(None, "models", "llama", label="latest"),
    "azureml:llama@champion": Asset(None, "models", "llama", label="champion"),
    "azureml://models/llama/versions/3": Asset(None, "models", "llama", version="3"),
    "azureml://registries/azureml/models/Phi-4/versions/7": Asset(Registry("azureml"), "models", "Phi-4", version="7"),
    "azureml://registries/azureml/models/Phi-4/versions/7/": Asset(Registry("azureml"), "models", "Phi-4", version="7"),
    "azureml://registries/azureml/models/Phi-4/labels/latest": Asset(
        Registry("azureml"), "models", "Phi-4", label="latest"
    ),
    "AzureML://Registries/azureml/Models/Phi-4/Versions/7": Asset(Registry("azureml"), "models", "Phi-4", version="7"),
    "azureml://registries/azureml/models/Phi-4/versions/7/paths/data/model": Asset(
        Registry("azureml"), "models", "Phi-4", version="7", path="data/model"
    ),
    f"azureml://locations/westeurope/workspaces/{GUID}/models/llama/versions/3": Asset(
        NumberedWorkspace("westeurope", GUID), "models", "llama", version="3"
    ),
    f"{LONG}/models/llama/versions/3": Asset(HERE, "models", "llama", version="3"),
    f"{LONG}/models/llama/labels/latest": Asset(HERE, "models", "llama", label="latest"),
    f"{ARM}/models/llama/versions/3": Asset(HERE, "models", "llama", version="3"),
    f"{ARM.lower()}/MODELS/llama/VERSIONS/3": Asset(HERE, "models", "llama", version="3"),
    f"azureml:{ARM}/models/llama/versions/3": Asset(HERE, "models", "llama", version="3"),
    f"azureml:/{ARM}/models/llama/versions/3": Asset(HERE, "models", "llama", version="3"),
    ARM.replace("workspaces/ws", "registries/ours") + "/models/llama/versions/3": Asset(
        Registry("ours"), "models", "llama", version="3"
    ),
}
DATA = {
    "azureml:talks:2": Asset(None, "data", "talks", version="2"),
    "azureml:talks@latest": Asset(None, "data", "talks", label="latest"),
    f"{LONG}/data/talks/versions/2": Asset(HERE, "data", "talks", version="2"),
    f"{ARM}/data/talks/versions/2": Asset(HERE, "data", "talks", version="2"),
    "azureml://registries/ours/data/talks/versions/2": Asset(Registry("ours"), "data", "talks", version="2"),
    "azureml://datastores/workspaceblobstore/paths/talks/a b.jsonl": Asset(
        None, "datastores", "workspaceblobstore", path="talks/a b.jsonl"
    ),
    f"{LONG}/datastores/lake/paths/talks": Asset(HERE, "datastores", "lake", path="talks"),
    f"{LONG.replace('resourcegroups', 'resourceGroups')}/datastores/lake/paths/talks/": Asset(
        HERE, "datastores", "lake", path="talks"
    ),
}
TARGETS = {
    "azureml:talker": Asset(None, "models", "talker"),
    "azureml://registries/ours/models/talker": Asset(Registry("ours"), "models", "talker"),
    f"{LONG}/models/talker": Asset(HERE, "models", "talker"),
    f"{ARM}/models/talker": Asset(HERE, "models", "talker"),
}
WRONG: list[tuple[str, Any, str]] = [
    ("azureml:", "model", "names nothing"),
    ("azureml:llama", "model", "names no version"),
    ("azureml:llama:", "model", "no version"),
    ("azureml:llama:latest", "model", "latest"),
    ("azureml:llama:1:2", "model", "no version"),
    ("azureml:../x:1", "model", "no name"),
    ("azureml:llama@", "model", "no label"),
    ("azureml://", "model", "is expected"),
    ("azureml://registries/azureml/models/Phi-4", "model", "names no version"),
    ("azureml://registries//models/Phi-4/versions/1", "model", "no registry"),
    ("azureml://registries/r/datastores/d/paths/p", "data", "registries have none"),
    ("azureml://registries/r/environments/e/versions/1", "model", "'environments'"),
    ("azureml://registries/r/models/m/versions/1/extra", "model", "'extra'"),
    ("azureml://registries/r/models/m/versions/1/paths/../x", "model", "no plain path"),
    ("azureml://registries/r/models/m/versions/1/paths/a//b", "model", "no plain path"),
    ("azureml://datastores/d", "data", "name a path"),
    ("azureml://datastores/d/paths/", "data", "name a path"),
    ("azureml://datastores/d/paths/*.jsonl", "data", "no pattern"),
    ("azureml://jobs/j/outputs/o/paths/p", "data", "output of a job"),
    ("azureml://subscriptions/mine/resourcegroups/g/workspaces/w/models/m/versions/1", "model", "GUID"),
    (f"azureml://subscriptions/{SUB}/workspaces/w/models/m/versions/1", "model", "lacks resourcegroups/"),
    (f"azureml://subscriptions/{SUB}/resourcegroups/g", "model", "lacks workspaces/"),
    (f"/subscriptions/{SUB}/resourceGroups/g/providers/Microsoft.Compute/x/y", "model", "Microsoft.Compute"),
    (
        f"/subscriptions/{SUB}/resourceGroups/g/providers/Microsoft.CognitiveServices/accounts/a/projects/p",
        "model",
        "new Foundry project",
    ),
    ("azureml:talker:1", "target", "without a version"),
    ("azureml://registries/ours/models/talker/versions/1", "target", "Azure gives the version"),
    ("azureml://datastores/d/paths/p", "target", "no datastore"),
    ("azureml:ll\u202eama:1", "model", "cannot be seen"),
    ("https://somewhere", "model", "does not begin"),
]


@pytest.mark.parametrize(("text", "asset"), MODELS.items())
def test_every_form_of_a_model_is_read(text: str, asset: Asset) -> None:
    assert read(text, "model") == asset
    assert parse(text, "model") == AzureAddress(text)


@pytest.mark.parametrize(("text", "asset"), DATA.items())
def test_every_form_of_data_is_read(text: str, asset: Asset) -> None:
    assert read(text, "data") == asset


@pytest.mark.parametrize(("text", "asset"), TARGETS.items())
def test_every_form_of_a_target_is_read(text: str, asset: Asset) -> None:
    assert read(text, "target") == asset
    assert read(str(asset), "target") == asset


@pytest.mark.parametrize(("text", "asked", "why"), WRONG)
def test_what_is_no_address_is_named_with_what_is_wrong(text: str, asked: Any, why: str) -> None:
    with pytest.raises(TrainChainError) as told:
        read(text, asked)
    assert told.value.code == "source.address"
    assert why in told.value.message
    assert told.value.hint


@pytest.mark.parametrize(
    "text",
    ["azureml:llama:3", "azureml:llama@latest", "azureml:", "azureml://jobs/j/outputs/o", f"{LONG}/data/rows",
     "azureml://registries/azureml/models/Phi-4/versions/7", "azureml://datastores/d/paths/x"],
)  # fmt: skip
def test_who_names_no_target_is_told_to_write_one(text: str) -> None:
    with pytest.raises(TrainChainError) as told:
        read(text, "target")

    assert told.value.hint == "Write azureml:name, or a long form that ends with models/name: Azure gives the version."


@pytest.mark.parametrize("text", ["azureml:", "azureml:my model"])
def test_no_address_is_made_of_what_is_no_name(text: str) -> None:
    with pytest.raises(TrainChainError) as told:
        read(text, "model")

    assert told.value.hint.startswith("Write azureml:name:version or")


def test_a_signature_that_was_pasted_along_is_not_shown() -> None:
    for text in (
        "azureml://datastores/d/paths/p?sv=1&sig=SECRET",
        "azureml:llama?sig=SECRET",
        "azureml://?sig=SECRET",
        "azureml://models/m/versions/1?sig=SECRET/",
        "azureml://models/m/versions/1/x?sig=SECRET",
    ):
        with pytest.raises(TrainChainError) as told:
            read(text, "data")
        assert "SECRET" not in told.value.message + told.value.hint
    assert shown("a?sig=SECRET") == "a?..."


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
places = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True)
groups = st.from_regex(r"[A-Za-z0-9_.()-]{0,20}[A-Za-z0-9_()-]", fullmatch=True)
guids = st.uuids().map(str)
parts = st.text(string.ascii_letters + string.digits + " ._-=#%+äß()[]&,;@!", min_size=1, max_size=12).filter(
    lambda part: part not in (".", "..")
)
paths = st.lists(parts, min_size=1, max_size=4).map("/".join)
fixed = st.one_of(st.builds(Registry, places), st.builds(Workspace, guids, groups, places))
scopes = st.one_of(st.none(), fixed, st.builds(NumberedWorkspace, st.sampled_from(["westeurope", "eastus2"]), guids))
folders = st.one_of(st.just(""), paths)
assets = st.one_of(
    st.builds(Asset, scopes, st.sampled_from(["models", "data"]), names, version=names, path=folders),
    st.builds(Asset, scopes, st.sampled_from(["models", "data"]), names, label=names, path=folders),
    st.builds(
        Asset, scopes.filter(lambda scope: not isinstance(scope, Registry)), st.just("datastores"), places, path=paths
    ),
)


@given(assets, st.sampled_from(["model", "data"]))
def test_what_is_written_reads_as_the_same(asset: Asset, asked: Any) -> None:
    assert read(str(asset), asked) == asset


@given(assets, fixed, names)
def test_a_pinned_asset_is_one_and_says_so(asset: Asset, scope: Registry | Workspace, version: str) -> None:
    there = asset.at(scope, None if asset.what == "datastores" else version)
    assert there.pinned
    assert there.label is None
    if asset.scope is None or asset.label is not None or isinstance(asset.scope, NumberedWorkspace):
        assert not asset.pinned


@pytest.mark.parametrize("path", ["UI/2026-11-02_101500_UTC/my rows.jsonl", "d\u00e9p\u00f4t/lignes.jsonl"])
def test_a_job_can_name_a_folder_as_people_name_theirs(path: str) -> None:
    pinned = str(read(f"{LONG}/datastores/workspaceblobstore/paths/{path}", "data"))

    assert Base(source=pinned, license=None, files=[]).source == pinned


@pytest.mark.parametrize("path", ["a\x1b[2J", "a\u202eb", "a\nb", "a ", "x" * 1001])
def test_a_job_s_source_is_one_line_that_can_be_shown(path: str) -> None:
    with pytest.raises(ValidationError):
        Base(source=f"{LONG}/datastores/d/paths/{path}", license=None, files=[])


@given(st.text(max_size=60))
def test_no_text_breaks_the_reader(text: str) -> None:
    for start in (
        "azureml:",
        "azureml://",
        "/subscriptions/",
        f"{LONG}/",
        f"{LONG}/models/",
        "azureml://datastores/d/",
    ):
        asset = None
        with contextlib.suppress(TrainChainError):
            asset = read(start + text, "model")
        if asset:
            assert read(str(asset), "model") == asset
