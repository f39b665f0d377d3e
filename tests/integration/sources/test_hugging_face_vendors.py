"""The hub of `fixtures_hf` is one to the vendor's clients as they are: huggingface_hub, transformers, peft, datasets.

What our own code is tested against must not be an invention of ours.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.fixtures_hf import Hub
from tests.fixtures_model import make_tiny_model
from tests.integration.sources.hugging_face import MODEL, find
from trainchain.core.sources.hf import HuggingFace


@pytest.fixture
def api(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    hub.use(monkeypatch, "me")
    return HfApi(endpoint=hub.url, token=hub.token("me"))


def test_the_hub_s_client_uploads_resolves_and_downloads_a_snapshot(
    hub: Hub, api: HfApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "up"
    for path, data in MODEL.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)

    assert api.whoami()["name"] == "me"
    api.create_repo("me/tiny", private=True)
    done = api.upload_folder(repo_id="me/tiny", folder_path=folder, commit_message="all of it")
    again = api.upload_folder(repo_id="me/tiny", folder_path=folder, commit_message="nothing new")

    assert done.oid == again.oid == hub.head("me/tiny")
    assert api.resolve_revision("me/tiny", cache_dir=tmp_path / "cache").resolved == done.oid
    kept = snapshot_download(
        "me/tiny", revision=done.oid, endpoint=hub.url, token=hub.token("me"), cache_dir=tmp_path / "cache",
        allow_patterns=["*.safetensors", "*.json"],
    )  # fmt: skip
    assert (Path(kept) / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert not (Path(kept) / "modeling_tiny.py").exists()
    info = api.model_info("me/tiny", files_metadata=True)
    assert info.private
    assert info.card_data is not None
    assert info.card_data.license == "apache-2.0"
    assert {file.rfilename for file in info.siblings or []} == {*MODEL, ".gitattributes"}
    assert {entry.path for entry in api.list_repo_tree("me/tiny")} >= {"sub", "config.json"}
    assert [entry.path for entry in api.get_paths_info("me/tiny", ["config.json", "nothing"])] == ["config.json"]


def test_the_hub_s_client_is_refused_as_the_real_one_refuses(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    hub.put("alice/hers", MODEL, private=True)
    hub.put("meta/llama", MODEL, gated=True)
    hub.put("me/mine", MODEL)
    nobody = HfApi(endpoint=hub.url, token=False)

    for who in (api, nobody):
        for name in ("alice/hers", "alice/nothing"):
            with pytest.raises(RepositoryNotFoundError):
                who.model_info(name)
        assert who.model_info("meta/llama").sha == hub.head("meta/llama")
        with pytest.raises(GatedRepoError):
            who.auth_check("meta/llama")
        with pytest.raises(GatedRepoError):
            who.hf_hub_download("meta/llama", "config.json", local_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/mine", revision="v9")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("me/mine", "nothing"))
    first = next(iter(hub.repos["model", "me/mine"].commits))
    with pytest.raises(HfHubHTTPError) as failed:
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="me/mine", parent_commit=first)
    assert failed.value.response.status_code == 412
    hub.revoke(hub.token("me"))
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.model_info("me/mine")


def test_the_client_alone_keeps_a_tampered_file_which_is_why_we_hash_every_one(
    hub: Hub, api: HfApi, tmp_path: Path
) -> None:
    commit = hub.put("me/mine", MODEL)
    hub.tamper("me/mine", "model.safetensors")

    path = api.hf_hub_download("me/mine", "model.safetensors", revision=commit, cache_dir=tmp_path)

    assert Path(path).read_bytes() != MODEL["model.safetensors"]


def test_transformers_peft_and_datasets_push_and_load_and_we_pin_what_they_pushed(
    hub: Hub, source: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_model(tmp_path / "model")
    hub.put("org/lines", {"train.jsonl": b'{"text": "one"}\n{"text": "two"}\n'}, kind="dataset")
    own = {"HF_HOME": str(tmp_path / "home"), "TRANSFORMERS_VERBOSITY": "error"}

    run = subprocess.run(
        [sys.executable, "-m", "tests.integration.sources.vendors", str(tmp_path)],
        env={**os.environ, **own, **hub.environment("me")}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip

    assert run.returncode == 0, run.stderr[-4000:]
    told = json.loads(run.stdout.splitlines()[-1])
    rows = [f"row {at}" for at in range(5)]
    assert told == {"weights": True, "template": True, "adapter": True, "parquet": rows, "jsonl": ["one", "two"]}
    assert hub.repos["model", "me/adapter"].private
    hub.use(monkeypatch, "me")
    assert "model.safetensors" in [file.path for file in find(source, "hf://me/tiny").files]
    (parquet,) = find(source, "hf://datasets/me/rows").files
    assert parquet.path.endswith(".parquet")
    assert parquet.sha256 is not None
