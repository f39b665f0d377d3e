"""Azure ML against a small Azure of the tests' own: the vendor's client as it is, and ours on top of it."""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fixtures_azure
from tests.fixtures_azure import (
    ARM,
    GROUP,
    GUID,
    KEY,
    LONG,
    REGISTRY,
    SUBSCRIPTION,
    TOKEN,
    WORKSPACE,
    Certificate,
    Fault,
    Person,
    Stub,
)
from trainchain.core.errors import TrainChainError
from trainchain.core.models import FileRef
from trainchain.core.sources.address import AzureAddress, parse
from trainchain.core.sources.azureml import AzureML
from trainchain.core.sources.azureml_push import CONTENT_TAG
from trainchain.core.sources.azureml_session import CONTEXT, Session, sdk
from trainchain.core.worker.cache import Cache

pytestmark = pytest.mark.azure
WEIGHTS = os.urandom(300_000)
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "README.md": b"# A model",
    "pytorch_model.bin": b"\x80pickle",
    "modeling_x.py": b"import os",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
}
KEPT = ["config.json", "model.safetensors", "tokenizer.json"]
ROWS = {"a.jsonl": b'{"text": "a"}\n', "more/b.parquet": b"PAR1", "more/readme.md": b"no rows", "c.csv": b"1,2"}
FULL = dict(zip(CONTEXT, (SUBSCRIPTION, GROUP, WORKSPACE), strict=True))
OURS = f"azureml://registries/{REGISTRY}/models/llama/versions/3"
THEIRS = f"{LONG}/models/llama/versions/3"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return fixtures_azure.certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def storage_port(own: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with contextlib.suppress(TrainChainError):
        sdk("azure.ai.ml")
    if "azure.ai.ml" not in sys.modules:
        pytest.skip('azure-ai-ml is not installed: pip install -e ".[dev,azure]"')
    with fixtures_azure.azurite(fixtures_azure.azurite_binary(), own, tmp_path_factory.mktemp("azurite")) as port:
        yield port


@pytest.fixture
def stub(own: Certificate, storage_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stub]:
    """An Azure with one container for the workspace and one for the registry, new for this test."""
    fixtures_azure.resolve_here(monkeypatch)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(own.certificate))
    monkeypatch.setenv("AZUREML_CURRENT_CLOUD", "AzureCloud")  # the SDK sets it; this takes it back afterwards
    monkeypatch.chdir(tmp_path)
    unique = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]
    with fixtures_azure.control_plane(own, storage_port) as stub:
        for name in (f"ws{unique}", f"reg{unique}"):
            stub.container(name).create_container()
        stub.registry_container = f"reg{unique}"
        stub.store("workspaceblobstore", f"ws{unique}")
        yield stub


def azure(stub: Stub, environ: dict[str, str] | None = None, person: Any = None, folder: Path | None = None) -> AzureML:
    session = Session(stub.cloud, person or Person(), environ or {}, folder, sleep=stub.waited.append)
    return AzureML(session)


def at(text: str) -> AzureAddress:
    return AzureAddress(text)


def with_models(stub: Stub) -> Stub:
    """The same model as version 3 in the workspace and in the registry, and data beside them."""
    store = stub.stores["workspaceblobstore"]["container"]
    stub.put(store, "LocalUpload/abc/llama", MODEL)
    stub.put(stub.registry_container, "llama-3", MODEL)
    stub.put(store, "talks", ROWS)
    inside = f"{LONG}/datastores/workspaceblobstore/paths"
    stub.register(WORKSPACE, "models", "llama", "1", f"{inside}/LocalUpload/old/llama")
    stub.register(WORKSPACE, "models", "llama", "3", f"{inside}/LocalUpload/abc/llama", {"license": "apache-2.0"})
    stub.register(REGISTRY, "models", "llama", "3", f"{stub.account_address}/{stub.registry_container}/llama-3")
    stub.register(WORKSPACE, "data", "talks", "2", f"{inside}/talks/")
    stub.register(REGISTRY, "data", "talks", "2", f"{stub.account_address}/{stub.registry_container}/talks")
    stub.put(stub.registry_container, "talks", ROWS)
    return stub


# -- the vendor's client, unmodified, which shows that the stub answers as it expects ----------------------------------


def vendor(stub: Stub, **names: str) -> Any:
    ml = sdk("azure.ai.ml")
    return ml.MLClient(
        Person(), cloud=stub.cloud.name, cloud_metadata=dict(stub.cloud.metadata or {}), enable_telemetry=False,
        show_progress=False, **names,
    )  # fmt: skip


def test_the_vendors_client_downloads_from_a_registry(stub: Stub, tmp_path: Path) -> None:
    with_models(stub)
    client = vendor(stub, registry_name=REGISTRY)
    assert client.models.get("llama", label="latest").version == "3"
    client.models.download("llama", "3", tmp_path / "to")
    assert (tmp_path / "to/llama/llama-3/model.safetensors").read_bytes() == WEIGHTS


def test_the_vendors_client_registers_in_a_workspace_and_downloads_again(stub: Stub, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    names = {"subscription_id": SUBSCRIPTION, "resource_group_name": GROUP, "workspace_name": WORKSPACE}
    client = vendor(stub, **names)
    model = sdk("azure.ai.ml.entities").Model(name="talker", path=str(folder), type="custom_model")
    with contextlib.redirect_stderr(io.StringIO()):
        assert client.models.create_or_update(model).version == "1"
    client.models.download("talker", "1", tmp_path / "to")
    assert (tmp_path / "to/talker/adapter/adapter_model.safetensors").read_bytes() == WEIGHTS


# -- ours: in ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pinned"),
    [
        ("azureml:llama:3", THEIRS),
        ("azureml:llama@latest", THEIRS),
        (THEIRS, THEIRS),
        (f"{LONG}/models/llama/labels/latest", THEIRS),
        (f"{ARM}/models/llama/versions/3", THEIRS),
        (f"azureml:{ARM}/models/llama/versions/3", THEIRS),
        (f"azureml://locations/westeurope/workspaces/{GUID}/models/llama/versions/3", THEIRS),
        (f"azureml://locations/westeurope/workspaces/{GUID}/models/llama/labels/latest", THEIRS),
        (OURS, OURS),
        (f"azureml://registries/{REGISTRY}/models/llama/labels/latest", OURS),
        ("azureml://datastores/workspaceblobstore/paths/LocalUpload/abc/llama", None),
    ],
)
def test_a_model_is_found_by_every_form_and_pinned(stub: Stub, tmp_path: Path, text: str, pinned: str | None) -> None:
    source = azure(with_models(stub), FULL)
    found = source.find(parse(text, "model"), "model")
    assert found.source == (pinned or f"{LONG}/datastores/workspaceblobstore/paths/LocalUpload/abc/llama")
    assert [file.path for file in found.files] == KEPT
    sizes = {file.path: (file.size, file.sha256) for file in found.files}
    assert sizes["model.safetensors"] == (len(WEIGHTS), None)
    assert found.license == ("apache-2.0" if found.source == THEIRS else None)
    assert source.head(found.source, "model.safetensors", 16) == WEIGHTS[:16]
    fetched = tmp_path / "model.safetensors"
    source.fetch(found.source, "model.safetensors", fetched, size=len(WEIGHTS))
    assert fetched.read_bytes() == WEIGHTS
    again = azure(stub).find(parse(found.source, "model"), "model")  # a pinned source needs no workspace around it
    assert again == found


@pytest.mark.parametrize(
    "text",
    [
        "azureml:talks:2",
        "azureml:talks@latest",
        f"{LONG}/data/talks/versions/2",
        f"{ARM}/data/talks/versions/2",
        f"azureml://registries/{REGISTRY}/data/talks/versions/2",
        "azureml://datastores/workspaceblobstore/paths/talks",
        f"{LONG}/datastores/workspaceblobstore/paths/talks/",
    ],
)
def test_data_is_found_by_every_form_and_only_rows_are_kept(stub: Stub, tmp_path: Path, text: str) -> None:
    source = azure(with_models(stub), FULL)
    found = source.find(parse(text, "data"), "data")
    assert [file.path for file in found.files] == ["a.jsonl", "more/b.parquet"]
    source.fetch(found.source, "more/b.parquet", tmp_path / "b", size=4)
    assert (tmp_path / "b").read_bytes() == ROWS["more/b.parquet"]
    assert azure(stub).find(parse(found.source, "data"), "data") == found


def test_one_file_of_a_datastore_is_data_too(stub: Stub, tmp_path: Path) -> None:
    source = azure(with_models(stub), FULL)
    found = source.find(at("azureml://datastores/workspaceblobstore/paths/talks/a.jsonl"), "data")
    assert [(file.path, file.size) for file in found.files] == [("a.jsonl", len(ROWS["a.jsonl"]))]
    source.fetch(found.source, "a.jsonl", tmp_path / "a", size=len(ROWS["a.jsonl"]))
    assert (tmp_path / "a").read_bytes() == ROWS["a.jsonl"]


def test_the_workspace_of_short_forms_may_stand_in_a_config_file(stub: Stub, tmp_path: Path) -> None:
    inner = tmp_path / "project/deep"
    inner.mkdir(parents=True)
    config = {"subscription_id": SUBSCRIPTION, "resource_group": GROUP, "workspace_name": WORKSPACE}
    (tmp_path / "project/config.json").write_text(json.dumps(config), encoding="utf-8")
    found = azure(with_models(stub), folder=inner).find(at("azureml:llama:3"), "model")
    assert found.source == THEIRS


def test_a_short_form_without_a_workspace_says_what_to_set(stub: Stub, tmp_path: Path) -> None:
    told = refused(azure(stub, folder=tmp_path), "azureml:llama:3", "source.address")
    assert all(name in told.hint for name in CONTEXT)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    refused(azure(stub, folder=tmp_path), "azureml:llama:3", "source.address")
    (tmp_path / "config.json").write_text("not JSON", encoding="utf-8")
    refused(azure(stub, folder=tmp_path), "azureml:llama:3", "source.address")
    some = {CONTEXT[0]: SUBSCRIPTION, CONTEXT[2]: WORKSPACE}
    assert CONTEXT[1] in refused(azure(stub, some), "azureml:llama:3", "source.address").message
    wrong = {**FULL, CONTEXT[0]: "my-subscription"}
    assert "my-subscription" in refused(azure(stub, wrong), "azureml:llama:3", "source.address").message


def test_weights_in_a_folder_are_pointed_at_and_can_be_named(stub: Stub) -> None:
    stub.put(stub.registry_container, "phi", {"MLmodel": b"x", **{f"data/model/{k}": v for k, v in MODEL.items()}})
    uri = f"{stub.account_address}/{stub.registry_container}/phi"
    stub.register(REGISTRY, "models", "phi", "1", uri)
    root = f"azureml://registries/{REGISTRY}/models/phi/versions/1"
    told = refused(azure(stub), root, "model.unreadable")
    assert told.hint.endswith(f"{root}/paths/data/model")
    found = azure(stub).find(at(f"{root}/paths/data/model"), "model")
    assert [file.path for file in found.files] == KEPT
    assert azure(stub).head(found.source, "config.json", 4) == b'{"mo'


def test_a_shard_that_the_index_names_and_that_is_not_there_is_named(stub: Stub) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": b"half",
    }
    place(stub, files)
    told = refused(azure(stub), THEIRS, "source.incomplete")
    assert "model-00002-of-00002.safetensors" in told.message
    place(stub, {**files, "model.safetensors.index.json": b"[" * 100_000})
    assert "weight_map" in refused(azure(stub), THEIRS, "source.incomplete").message


def test_a_model_of_pickles_only_is_refused(stub: Stub) -> None:
    place(stub, {"config.json": b"{}", "pytorch_model.bin": b"\x80"})
    refused(azure(stub), THEIRS, "model.unreadable")


def test_an_asset_whose_files_are_gone_is_told_from_one_that_never_was(stub: Stub) -> None:
    stub.register(WORKSPACE, "models", "llama", "3", f"{LONG}/datastores/workspaceblobstore/paths/gone")
    assert "no files lie there" in refused(azure(stub), THEIRS, "source.not_found").message
    for text in (
        THEIRS.replace("/3", "/4"),
        THEIRS.replace("llama", "lama"),
        OURS,
        f"{LONG}/models/lama/labels/latest",
        f"{LONG}/datastores/nostore/paths/x",
        f"azureml://locations/westeurope/workspaces/{GUID[::-1][:8]}{GUID[8:]}/models/llama/versions/3",
    ):
        refused(azure(stub, FULL), text, "source.not_found")


def test_a_label_that_azure_does_not_know_is_refused(stub: Stub) -> None:
    refused(azure(with_models(stub)), f"{LONG}/models/llama/labels/champion", "source.not_found")


def test_an_asset_outside_the_datastores_is_refused(stub: Stub) -> None:
    stub.register(WORKSPACE, "models", "llama", "3", "https://elsewhere.example/x?sig=SECRET")
    told = refused(azure(stub), THEIRS, "source.unsupported")
    assert "SECRET" not in told.message + told.hint


def test_names_that_could_lead_elsewhere_are_refused(stub: Stub) -> None:
    place(stub, {**MODEL, "a\\..\\passwd.json": b"x"})
    assert ".." in refused(azure(stub), THEIRS, "source.unsafe").message


def test_a_listing_without_end_is_left(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainchain.core.sources.azureml.MOST_LISTED", 5)
    place(stub, MODEL)
    refused(azure(stub), THEIRS, "source.unsafe")


def test_a_folder_of_another_asset_with_the_same_beginning_is_not_mixed_in(stub: Stub) -> None:
    place(stub, MODEL)
    stub.put(stub.stores["workspaceblobstore"]["container"], "LocalUpload/abc/llama-2", {"extra.json": b"{}"})
    assert [file.path for file in azure(stub).find(at(THEIRS), "model").files] == KEPT


def test_what_only_stands_for_a_folder_is_no_file(stub: Stub) -> None:
    place(stub, MODEL)
    store = stub.stores["workspaceblobstore"]["container"]
    for name in ("LocalUpload/abc/llama", "LocalUpload/abc/llama/empty.json"):
        stub.container(store).upload_blob(name, b"", metadata={"hdi_isfolder": "true"})
    assert [file.path for file in azure(stub).find(at(THEIRS), "model").files] == KEPT


# -- ours: fetching ----------------------------------------------------------------------------------------------------


def test_a_fetch_goes_on_where_it_broke_off(stub: Stub, tmp_path: Path) -> None:
    place(stub, MODEL)
    partial = tmp_path / "model.partial"
    for have in (0, 1, 100_000, len(WEIGHTS) - 1, len(WEIGHTS)):
        partial.write_bytes(WEIGHTS[:have])
        azure(stub).fetch(THEIRS, "model.safetensors", partial, size=len(WEIGHTS))
        assert partial.read_bytes() == WEIGHTS
    partial.write_bytes(b"\0" * 1000 + WEIGHTS[1000:5000])  # what lies there is not looked at: the caller hashes
    azure(stub).fetch(THEIRS, "model.safetensors", partial, size=len(WEIGHTS))
    assert partial.read_bytes() == b"\0" * 1000 + WEIGHTS[1000:]
    partial.write_bytes(WEIGHTS + b"too long")
    azure(stub).fetch(THEIRS, "model.safetensors", partial, size=len(WEIGHTS))
    assert partial.read_bytes() == WEIGHTS


def test_a_blob_that_was_cut_or_grew_is_refused_before_a_byte_comes(stub: Stub, tmp_path: Path) -> None:
    place(stub, {**MODEL, "model.safetensors": WEIGHTS[:-1]})
    with pytest.raises(TrainChainError) as told:
        azure(stub).fetch(THEIRS, "model.safetensors", tmp_path / "m", size=len(WEIGHTS))
    assert told.value.code == "source.changed"
    assert f"{len(WEIGHTS) - 1:,}" in told.value.message
    assert not (tmp_path / "m").exists()


def test_a_blob_with_other_bytes_of_the_same_size_comes_as_it_is_for_the_caller_to_hash(
    stub: Stub, tmp_path: Path
) -> None:
    other = bytes(reversed(WEIGHTS))
    place(stub, {**MODEL, "model.safetensors": other})
    azure(stub).fetch(THEIRS, "model.safetensors", tmp_path / "m", size=len(WEIGHTS))
    assert hashlib.sha256((tmp_path / "m").read_bytes()).digest() == hashlib.sha256(other).digest()


def test_an_empty_file_and_a_missing_one(stub: Stub, tmp_path: Path) -> None:
    place(stub, {**MODEL, "special.txt": b""})
    azure(stub).fetch(THEIRS, "special.txt", tmp_path / "e", size=0)
    assert (tmp_path / "e").read_bytes() == b""
    assert azure(stub).head(THEIRS, "special.txt", 8) == b""
    for call in (
        lambda: azure(stub).fetch(THEIRS, "gone.json", tmp_path / "g", size=3),
        lambda: azure(stub).head(THEIRS, "gone.json", 3),
    ):
        with pytest.raises(TrainChainError) as told:
            call()
        assert told.value.code == "source.not_found"
        assert "gone.json" in told.value.message
    assert not (tmp_path / "g").exists()


def test_many_files_ask_the_control_plane_once_and_a_signature_that_ran_out_is_renewed(
    stub: Stub, tmp_path: Path
) -> None:
    with_models(stub)
    source = azure(stub)
    stub.allow_signatures()
    source.fetch(OURS, "config.json", tmp_path / "c", size=len(MODEL["config.json"]))
    stub.asked.clear()
    source.fetch(OURS, "tokenizer.json", tmp_path / "t", size=2)
    assert not stub.asked
    stub.withdraw_signatures()
    source.fetch(OURS, "README.md", tmp_path / "r", size=len(MODEL["README.md"]))
    assert sum("datarefs" in line for line in stub.asked) == 1
    stub.signature_hours = -1
    with pytest.raises(TrainChainError) as told:
        azure(stub).fetch(OURS, "README.md", tmp_path / "r", size=len(MODEL["README.md"]))
    assert told.value.code == "source.forbidden"
    clean(told.value)


def test_a_file_that_cannot_be_written_is_told(stub: Stub, tmp_path: Path) -> None:
    place(stub, MODEL)
    (tmp_path / "file").write_bytes(b"")
    for partial, code in ((tmp_path / "file/m", "usage.file"), (Path("/dev/full"), "disk.full")):
        with pytest.raises(TrainChainError) as told:
            azure(stub).fetch(THEIRS, "model.safetensors", partial, size=len(WEIGHTS))
        assert told.value.code == code


def test_what_the_disk_has_no_room_for_is_not_begun(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(stub, MODEL)
    free = shutil.disk_usage(tmp_path)._replace(free=len(WEIGHTS) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(TrainChainError) as told:
        azure(stub).fetch(THEIRS, "model.safetensors", tmp_path / "deep/m", size=len(WEIGHTS))
    assert told.value.code == "disk.full"
    assert not (tmp_path / "deep/m").exists()


def test_what_the_cache_pins_is_what_lies_there_also_after_a_change_in_place(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"{LONG}/datastores/workspaceblobstore/paths/talks"
    monkeypatch.setattr("trainchain.core.sources.azureml.shared", lambda: azure(stub))
    cache = Cache(tmp_path / "cache")
    digests = []
    for row in (b'{"text": "a"}\n', b'{"text": "b"}\n', None):
        if row is not None:
            stub.put(stub.stores["workspaceblobstore"]["container"], "talks", {"rows.jsonl": row})
        found = azure(stub).find(at(text), "data")
        (file,) = found.files
        digest, path = cache.pin(found.source, file.path, file.size, file.state)
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
        digests.append(digest)
    assert digests[0] != digests[1] == digests[2]
    other = Cache(tmp_path / "worker")
    ref = FileRef(name="data-0.jsonl", sha256=digests[0], size=14, path="rows.jsonl")
    with pytest.raises(TrainChainError) as told:  # published before the change, fetched after it
        other.file(text, ref)
    assert told.value.code == "source.changed"
    assert other.file(text, ref.model_copy(update={"sha256": digests[1]})).read_bytes() == b'{"text": "b"}\n'


# -- ours: sign-in, rights, trouble ------------------------------------------------------------------------------------


def test_without_the_extra_it_is_named(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "azure.ai.ml", None)
    told = refused(azure(stub), THEIRS, "source.needs_extra")
    assert told.hint == 'pip install "trainchain[azure]"'


def test_nobody_signed_in_shows_what_was_tried(stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("AZURE_", "IDENTITY_", "MSI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))  # no az, no azd, no pwsh
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "dev")
    identity = sdk("azure.identity")
    told = refused(azure(stub, person=identity.DefaultAzureCredential()), THEIRS, "source.token")
    assert "AzureCliCredential: Azure CLI not found on path" in told.message
    assert all(len(line) < 170 for line in told.message.splitlines())
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "everything")
    told = refused(AzureML(Session(stub.cloud, environ={})), THEIRS, "source.token")
    assert "AZURE_TOKEN_CREDENTIALS" in told.message


def test_a_token_that_is_not_accepted(stub: Stub) -> None:
    for text in (THEIRS, OURS):
        told = refused(azure(with_models(stub), person=Person("another")), text, "source.token")
        assert "InvalidAuthenticationToken" in told.message


def test_a_reader_without_the_storage_is_told_which_role_to_ask_for(stub: Stub) -> None:
    place(stub, MODEL)
    stub.faults.append(Fault("listSecrets", 403))
    told = refused(azure(stub, person=Person(storage=False)), THEIRS, "source.forbidden")
    assert "AzureML Data Scientist" in told.hint
    assert "Storage Blob Data Reader" in told.hint


def test_a_reader_of_the_storage_needs_no_keys(stub: Stub) -> None:
    place(stub, MODEL)
    stub.faults.append(Fault("listSecrets", 403))
    assert [file.path for file in azure(stub).find(at(THEIRS), "model").files] == KEPT


@pytest.mark.parametrize("credentials", ["AccountKey", "Sas", "None"])
@pytest.mark.parametrize("kind", ["AzureBlob", "AzureDataLakeGen2"])
def test_every_kind_of_datastore_credential_opens_it(stub: Stub, credentials: str, kind: str) -> None:
    container = stub.stores["workspaceblobstore"]["container"]
    stub.store("workspaceblobstore", container, credentials, kind)
    place(stub, MODEL)
    assert [file.path for file in azure(stub).find(at(THEIRS), "model").files] == KEPT


def test_a_file_share_is_refused(stub: Stub) -> None:
    stub.store("share", "share", kind="AzureFile")
    told = refused(azure(stub), f"{LONG}/datastores/share/paths/x", "source.unsupported")
    assert "share" in told.message


@pytest.mark.parametrize(("status", "code"), [(403, "source.forbidden"), (404, "source.not_found")])
def test_a_registry_that_is_closed_or_is_not(stub: Stub, status: int, code: str) -> None:
    stub.faults.append(Fault("discovery", status))
    refused(azure(stub), OURS, code)


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("text", [THEIRS, OURS])
def test_trouble_that_lasts_is_told_after_bounded_tries(stub: Stub, status: int, text: str) -> None:
    stub.faults.append(Fault("GET .*/versions/3|datarefs", status, headers={"Retry-After": "3600"}))
    with_models(stub)
    assert str(status) in refused(azure(stub), text, "source.unavailable").message
    assert 2 <= len(stub.waited) <= 6
    assert max(stub.waited) <= 60


@pytest.mark.parametrize("text", [THEIRS, OURS])
def test_trouble_that_passes_is_waited_for(stub: Stub, text: str) -> None:
    with_models(stub)
    stub.faults.append(Fault("GET .*/versions/3", 429, times=2))
    stub.faults.append(Fault("datarefs|listSecrets", 503, times=2))
    assert [file.path for file in azure(stub).find(at(text), "model").files] == KEPT


def test_a_cloud_that_does_not_answer(stub: Stub) -> None:
    stub.origin = "https://localhost:1"
    for text in (THEIRS, OURS):
        assert "did not answer" in refused(azure(stub), text, "source.unavailable").message
    assert stub.waited


def test_a_storage_that_does_not_answer(stub: Stub, tmp_path: Path) -> None:
    with_models(stub)
    stub.storage_port = 1
    for text in (THEIRS, OURS):
        stub.register(REGISTRY, "models", "llama", "3", f"{stub.account_address}/{stub.registry_container}/llama-3")
        assert "did not answer" in refused(azure(stub), text, "source.unavailable").message
    assert 2 <= len(stub.waited) <= 10


def test_a_line_that_keeps_breaking_gets_a_file_through_piece_by_piece(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainchain.core.sources.azureml_session._PIECE", 65_536)
    place(stub, MODEL)
    partial, sizes = tmp_path / "m", []
    with fixtures_azure.bad_line(stub.storage_port, 150_000) as line:
        stub.storage_port = line.server_address[1]
        while not sizes or (sizes[-1] < len(WEIGHTS) and len(sizes) < 30):
            with contextlib.suppress(TrainChainError):  # which one, the next test tells
                azure(stub).fetch(THEIRS, "model.safetensors", partial, size=len(WEIGHTS))
            sizes.append(partial.stat().st_size if partial.exists() else 0)
        assert line.cut
    assert sizes == sorted(sizes)
    assert partial.read_bytes() == WEIGHTS


def test_a_line_that_lets_nothing_through_is_told_and_what_came_stays(stub: Stub, tmp_path: Path) -> None:
    place(stub, MODEL)
    (tmp_path / "m").write_bytes(WEIGHTS[:1000])
    with fixtures_azure.bad_line(stub.storage_port, 20_000) as line:
        stub.storage_port = line.server_address[1]
        with pytest.raises(TrainChainError) as told:
            azure(stub).fetch(THEIRS, "model.safetensors", tmp_path / "m", size=len(WEIGHTS))
    assert told.value.code == "source.unavailable"
    have = (tmp_path / "m").read_bytes()
    assert len(have) >= 1000
    assert have == WEIGHTS[: len(have)]


def test_an_answer_that_is_no_answer(stub: Stub) -> None:
    stub.register(WORKSPACE, "models", "llama", "3", f"{LONG}/datastores/workspaceblobstore/paths/x")
    stub.faults.append(Fault("datastores", 200))
    refused(azure(stub), THEIRS, "source.unsupported")


def test_the_vendors_logs_go_nowhere(stub: Stub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root, lines = logging.getLogger(), io.StringIO()
    handler, level = logging.StreamHandler(lines), root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        source = azure(with_models(stub))
        for text in (OURS, THEIRS):
            source.find(at(text), "model")
            source.fetch(text, "config.json", tmp_path / text[-60:].replace("/", "-"), size=len(MODEL["config.json"]))
        stub.faults.append(Fault("PUT .*/versions/1", 400))
        with pytest.raises(TrainChainError):
            azure(stub).push(adapter(tmp_path), at(f"{LONG}/models/talker"), message="x", private=True)
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
    assert "localhost" not in lines.getvalue()
    assert not any(secret in lines.getvalue() for secret in (TOKEN, KEY, "sig="))
    assert capfd.readouterr() == ("", "")


# -- ours: out ---------------------------------------------------------------------------------------------------------


def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    (folder / "audit").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "audit/job.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("target", "pinned"),
    [
        ("azureml:talker", f"{LONG}/models/talker/versions"),
        (f"{ARM}/models/talker", f"{LONG}/models/talker/versions"),
        (f"azureml://registries/{REGISTRY}/models/talker", f"azureml://registries/{REGISTRY}/models/talker/versions"),
    ],
)
def test_an_adapter_is_pushed_once_and_again_only_when_it_changed(
    stub: Stub, tmp_path: Path, target: str, pinned: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(tmp_path)
    address = parse(target, "target")
    first = azure(stub, FULL).push(folder, address, message="Job 1", private=True)
    assert (first.url, first.commit, first.created) == (f"{pinned}/1", "1", True)
    again = azure(stub, FULL).push(folder, address, message="Job 1, once more", private=True)
    assert (again.url, again.commit, again.created) == (f"{pinned}/1", "1", False)
    (folder / "adapter_config.json").write_text('{"r": 8}', encoding="utf-8")
    second = azure(stub, FULL).push(folder, address, message="Job 2", private=True)
    assert (second.commit, second.created) == ("2", True)
    where = REGISTRY if "registries" in target else WORKSPACE
    known = stub.assets[(where, "models", "talker")]
    assert set(known) == {"1", "2"}
    assert known["1"]["modelType"] == "custom_model"
    assert known["1"]["description"] == "Job 1"
    assert known["1"]["tags"][CONTENT_TAG] != known["2"]["tags"][CONTENT_TAG]
    assert capfd.readouterr() == ("", "")
    assert all(version["modelUri"].rstrip("/").rpartition("/")[2].startswith("talker-") for version in known.values())
    back = azure(stub).head(first.url, "adapter_model.safetensors", 8)
    assert back == WEIGHTS[:8]
    assert azure(stub).head(second.url, "audit/job.json", 2) == b"{}"


def test_a_push_that_meets_another_is_told(stub: Stub, tmp_path: Path) -> None:
    stub.faults.append(Fault("PUT .*/models/talker/versions/1", 409))
    with pytest.raises(TrainChainError) as told:
        azure(stub).push(adapter(tmp_path), at(f"{LONG}/models/talker"), message="x", private=True)
    assert told.value.code == "push.conflict"


@pytest.mark.parametrize(
    ("status", "code"), [(403, "source.forbidden"), (500, "source.unavailable"), (400, "source.unsupported")]
)
@pytest.mark.parametrize("target", [f"{LONG}/models/talker", f"azureml://registries/{REGISTRY}/models/talker"])
def test_a_push_that_is_refused_registers_nothing(
    stub: Stub, tmp_path: Path, target: str, status: int, code: str
) -> None:
    stub.faults.append(Fault("PUT .*/versions/1", status))
    with pytest.raises(TrainChainError) as told:
        azure(stub).push(adapter(tmp_path), at(target), message="x", private=True)
    assert told.value.code == code
    clean(told.value)
    assert not stub.assets


def test_an_upload_that_is_refused_ends_and_may_be_tried_again(stub: Stub, tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    container = stub.stores["workspaceblobstore"]["container"]
    stub.store("workspaceblobstore", container, "Sas")  # which may be read with, and not written
    with pytest.raises(TrainChainError) as told:
        azure(stub).push(folder, at(f"{LONG}/models/talker"), message="x", private=True)
    assert told.value.code == "source.forbidden"
    assert "Storage Blob Data Contributor" in told.value.hint
    stub.store("workspaceblobstore", container)
    assert azure(stub).push(folder, at(f"{LONG}/models/talker"), message="x", private=True).commit == "1"


def test_a_folder_that_is_a_link_is_pushed_whole(stub: Stub, tmp_path: Path) -> None:
    adapter(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "adapter", target_is_directory=True)
    pushed = azure(stub).push(tmp_path / "link", at(f"{LONG}/models/talker"), message="x", private=True)
    assert azure(stub).head(pushed.url, "audit/job.json", 2) == b"{}"


# -- what the tests above share ----------------------------------------------------------------------------------------


def place(stub: Stub, files: dict[str, bytes]) -> None:
    """Version 3 of the workspace's model, made of these files."""
    stub.put(stub.stores["workspaceblobstore"]["container"], "LocalUpload/abc/llama", files)
    uri = f"{LONG}/datastores/workspaceblobstore/paths/LocalUpload/abc/llama"
    stub.register(WORKSPACE, "models", "llama", "3", uri)


def refused(source: AzureML, text: str, code: str) -> TrainChainError:
    """What `find` raises: with this code, a hint where one is needed, and no secret."""
    with pytest.raises(TrainChainError) as told:
        source.find(at(text), "model")
    assert told.value.code == code, told.value.message
    clean(told.value)
    assert told.value.__cause__ is None
    return told.value


def clean(error: TrainChainError) -> None:
    for secret in (TOKEN, KEY, "sig=", "SharedKey", "Bearer"):
        assert secret not in error.message + error.hint
