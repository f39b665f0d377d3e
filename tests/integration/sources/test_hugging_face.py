"""Finding models and data on a hub on loopback: what is kept of them, and every way in which it is refused."""

import hashlib
import os
from pathlib import Path

import pytest

from tests.fixtures_hf import Hub
from tests.integration.sources.hugging_face import MODEL, WEIGHTS, find, paths, refused
from trainchain.core.sources import hf
from trainchain.core.sources.address import parse
from trainchain.core.sources.hf import HuggingFace
from trainchain.core.sources.table import source_of


def test_a_model_is_pinned_to_its_commit_and_only_what_it_is_made_of_is_kept(
    hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.put("alice/tiny", MODEL)
    hub.use(monkeypatch)

    found = find(source, "hf://alice/tiny@main")

    assert found.source == f"hf://alice/tiny@{commit}"
    assert found.license == "apache-2.0"
    assert found.page == f"{hub.url}/alice/tiny/tree/{commit}"
    assert paths(found) == [
        "chat_template.jinja", "config.json", "merges.txt", "model.safetensors", "tokenizer.json", "tokenizer.model",
    ]  # fmt: skip
    known = {file.path: file for file in found.files}
    assert known["model.safetensors"].sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert known["model.safetensors"].size == len(WEIGHTS)
    assert known["config.json"].sha256 is None
    hub.put("alice/tiny", {"config.json": b"{}"})
    assert find(source, found.source) == found
    assert find(source, "hf://alice/tiny").source != found.source
    assert isinstance(source_of(found.source), HuggingFace)


def test_a_model_in_a_folder_and_one_of_an_old_name_are_found(
    hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("alice/tiny", MODEL)
    hub.put("gpt2", {"config.json": b"{}", "model.safetensors": b"w"}, owner="nobody")
    hub.put("alice/tiny", {"config.json": b"{}", "model.safetensors": b"pr"}, ref="refs/pr/1")
    hub.use(monkeypatch)

    assert paths(find(source, "hf://alice/tiny/sub")) == ["sub/config.json", "sub/model.safetensors"]
    assert find(source, "hf://gpt2").source == f"hf://gpt2@{hub.head('gpt2')}"
    assert find(source, "hf://alice/tiny@refs/pr/1").source != find(source, "hf://alice/tiny").source


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("hf://datasets/org/rows", ["a.jsonl", "data/test-0.parquet", "data/train-0.parquet", "data/train-1.parquet"]),
        ("hf://datasets/org/rows/data", ["data/test-0.parquet", "data/train-0.parquet", "data/train-1.parquet"]),
        ("hf://datasets/org/rows@main/data/train-*.parquet", ["data/train-0.parquet", "data/train-1.parquet"]),
        ("hf://datasets/org/rows/**/*-0.parquet", ["data/test-0.parquet", "data/train-0.parquet"]),
        ("hf://datasets/org/rows/a.jsonl", ["a.jsonl"]),
    ],
)
def test_of_a_data_set_the_files_are_kept_that_the_address_means(
    hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch, text: str, kept: list[str]
) -> None:
    names = [
        "a.jsonl",
        "b.csv",
        "README.md",
        ".hidden.json",
        "dataset_infos.json",
        "data/train-0.parquet",
        "data/train-1.parquet",
    ]
    commit = hub.put("org/rows", dict.fromkeys([*names, "data/test-0.parquet"], b"rows"), kind="dataset")
    hub.use(monkeypatch)

    found = find(source, text)

    assert found.source == f"hf://datasets/org/rows@{commit}"
    assert paths(found) == kept


def test_a_licence_is_read_from_wherever_the_card_names_it(
    hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = {
        "own": (b"license: other\nlicense_name: llama3.1", "other (llama3.1)"),
        "many": (b"license:\n- mit\n- apache-2.0", "mit, apache-2.0"),
        "none": (b"tags: []", None),
    }
    hub.use(monkeypatch)
    for name, (card, told) in cards.items():
        readme = b"---\n" + card + b"\n---\n"
        hub.put(f"a/{name}", {"config.json": b"{}", "model.safetensors": b"w", "README.md": readme})

        assert find(source, f"hf://a/{name}").license == told


@pytest.mark.parametrize("user", [None, "mallory"])
def test_a_private_repository_is_not_told_from_a_typo_but_the_message_says_both(
    hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch, user: str | None
) -> None:
    hub.put("alice/tiny", MODEL, private=True)
    hub.use(monkeypatch, user)

    for name in ("alice/tiny", "alice/tinny"):
        error = refused("source.not_found", find, source, f"hf://{name}")
        assert name in error.message
        assert "private" in error.message
        assert ("no token was sent" if user is None else "the token that was sent") in error.message


def test_a_private_repository_opens_with_its_reader_s_own_token(
    hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.put("alice/tiny", MODEL, private=True)
    hub.allow("alice/tiny", "worker")
    hub.use(monkeypatch, "worker")

    found = find(source, "hf://alice/tiny")
    source.fetch(found.source, "model.safetensors", tmp_path / "part", size=len(WEIGHTS))

    assert (tmp_path / "part").read_bytes() == WEIGHTS
    assert not any(request.token for request in hub.requests if request.path.startswith("/cdn/"))
    monkeypatch.delenv("HF_TOKEN")
    refused("source.not_found", source.fetch, found.source, "config.json", tmp_path / "other", size=23)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("user", [None, "mallory"])
def test_a_gated_repository_is_told_at_once_with_its_page(
    hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch, user: str | None
) -> None:
    hub.put("meta/llama", MODEL, gated=True)
    hub.use(monkeypatch, user)

    error = refused("source.gated", find, source, "hf://meta/llama")

    assert f"{hub.url}/meta/llama" in error.hint
    assert ("hf auth login" in error.hint) == (user is None)
    hub.allow("meta/llama", "mallory")
    hub.use(monkeypatch, "mallory")
    assert "model.safetensors" in paths(find(source, "hf://meta/llama"))


def test_a_revoked_token_is_told_as_one_and_never_shown(
    hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.put("alice/tiny", MODEL)
    hub.use(monkeypatch, "alice")
    found = find(source, "hf://alice/tiny")
    hub.revoke(os.environ["HF_TOKEN"])

    refused("source.token", find, source, "hf://alice/tiny")
    refused("source.token", source.fetch, found.source, "config.json", tmp_path / "part", size=23)
    refused("source.token", source.head, found.source, "config.json", 4)
    target = parse("alice/out", "target")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "a.json").write_text("{}")
    refused("source.token", source.push, tmp_path / "adapter", target, message="m", private=True)
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize("token", ["hf_ä", "hf_a hf_b"])
def test_a_token_that_is_none_is_not_sent(
    hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    hub.use(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", token)

    refused("source.token", find, source, "hf://alice/tiny")

    assert hub.requests == []


def test_a_revision_a_folder_or_a_file_that_is_not_there_is_named(
    hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.put("alice/tiny", MODEL)
    hub.put("org/rows", {"a.jsonl": b"rows"}, kind="dataset")
    hub.use(monkeypatch)
    pinned = f"hf://alice/tiny@{hub.head('alice/tiny')}"

    assert "'v9'" in refused("source.not_found", find, source, "hf://alice/tiny@v9").message
    assert "'subb'" in refused("source.not_found", find, source, "hf://alice/tiny/subb").message
    assert "a.jsonl" in refused("source.not_found", find, source, "hf://datasets/org/rows/b.jsonl").message
    fetched = refused("source.not_found", source.fetch, pinned, "no.json", tmp_path / "part", size=1)
    assert "'no.json'" in fetched.message
    refused("source.address", source.fetch, "hf://alice/tiny@main", "config.json", tmp_path / "part", size=1)
    refused("source.unsafe", source.fetch, pinned, "../x", tmp_path / "part", size=1)
    assert list(tmp_path.iterdir()) == []


def test_a_repository_of_pickles_an_adapter_and_one_without_rows_are_told_by_their_names(
    hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("a/pickle", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.put("a/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    hub.put("a/csv", {"rows.csv": b"x"}, kind="dataset")
    hub.use(monkeypatch)

    assert "pytorch_model.bin" in refused("model.unreadable", find, source, "hf://a/pickle").message
    assert "adapter" in refused("model.unreadable", find, source, "hf://a/adapter").message
    assert "refs/convert/parquet" in refused("data.empty", find, source, "hf://datasets/a/csv").hint


def test_a_shard_that_the_index_names_and_nobody_uploaded_is_missed_before_anything_is_fetched(
    hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = b'{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}'
    half = {"config.json": b"{}", "model.safetensors.index.json": index, "model-1-of-2.safetensors": b"1"}
    hub.put("a/half", half)
    hub.put("a/torn", {**half, "model.safetensors.index.json": index[:40]})
    hub.use(monkeypatch)

    assert "model-2-of-2.safetensors" in refused("source.incomplete", find, source, "hf://a/half").message
    assert "index.json" in refused("source.incomplete", find, source, "hf://a/torn").message
    hub.put("a/half", {"model-2-of-2.safetensors": b"2"})
    assert "model-2-of-2.safetensors" in paths(find(source, "hf://a/half"))


def test_a_listing_of_a_million_entries_is_not_read_to_its_end(
    hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("big/rows", {"0.json": b"rows"}, kind="dataset")
    hub.repos["dataset", "big/rows"].endless = 1_000_000
    hub.use(monkeypatch)

    error = refused("source.unsafe", find, source, "hf://datasets/big/rows")

    assert "10,000" in error.message
    assert hub.count("/tree/") == 10
    monkeypatch.setattr(hf, "LONGEST_PAGE", 1000)
    refused("source.unsafe", find, source, "hf://datasets/big/rows")


@pytest.mark.parametrize(
    "name", ["../../etc/x.json", "/etc/x.json", "a//b.json", "a\\b.json", "a\x1b[2J.json", "a:b.json"]
)
def test_a_name_that_leads_out_or_cannot_be_shown_is_refused_before_anything_is_fetched(
    hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    hub.put("a/evil", {"config.json": b"{}", "model.safetensors": b"x", name: b"x"})
    hub.put("a/evil", {"x.jsonl": b"x", name: b"x"}, kind="dataset")
    hub.use(monkeypatch)

    refused("source.unsafe", find, source, "hf://datasets/a/evil")
    if name == "a:b.json":  # no library looks for it in a model
        assert [file.path for file in find(source, "hf://a/evil").files] == ["config.json", "model.safetensors"]
    elif "/" not in name:
        refused("source.unsafe", find, source, "hf://a/evil")


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_hub_is_asked_again_with_growing_pauses(
    hub: Hub, source: HuggingFace, waits: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int
) -> None:
    hub.put("alice/tiny", MODEL)
    hub.use(monkeypatch)
    for match in ("/api/models/alice/tiny?", "/tree/", "HEAD ", "/cdn/"):
        hub.fail(match, status=status, times=2)

    found = find(source, "hf://alice/tiny")
    source.fetch(found.source, "model.safetensors", tmp_path / "part", size=len(WEIGHTS))

    assert (tmp_path / "part").read_bytes() == WEIGHTS
    assert len(waits) == 8
    assert all(1 <= first <= 2 <= second <= 4 for first, second in zip(waits[::2], waits[1::2], strict=True))


def test_a_hub_that_stays_busy_is_given_up_after_a_bounded_time(
    hub: Hub, source: HuggingFace, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("alice/tiny", MODEL)
    hub.use(monkeypatch)
    hub.fail("/api/", status=429, times=1, headers={"Retry-After": "7"})
    hub.fail("/api/", status=429, times=1, headers={"RateLimit": '"api";r=0;t=11'})
    hub.fail("/api/", status=429, times=99, headers={"Retry-After": "86400"})

    error = refused("source.unavailable", find, source, "hf://alice/tiny")

    assert waits == [7, 11, 60, 60]
    assert "429" in error.message
    assert "86400 seconds" in error.message
    assert "hf auth login" in error.hint


def test_nobody_there_and_a_page_that_is_no_hub_are_told(
    hub: Hub, source: HuggingFace, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.use(monkeypatch)
    hub.fail("/api/", status=200, times=99)
    refused("source.unavailable", find, source, "hf://alice/tiny")
    for endpoint in ("ftp://example.org", "nonsense", "http://[::1", "http://user:hf_secret@127.0.0.1:9"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        refused("source.unavailable", find, source, "hf://alice/tiny")
    assert len(waits) == 4


def test_offline_is_said_to_be_so(hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.use(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert "HF_HUB_OFFLINE" in refused("source.unavailable", find, source, "hf://alice/tiny").message
    assert hub.requests == []


def test_a_listing_does_not_lead_the_token_to_another_host(
    hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("big/rows", {"0.json": b"rows"}, kind="dataset")
    hub.repos["dataset", "big/rows"].endless = 5000
    hub.use(monkeypatch, "alice")
    hub.url, url = hub.store_url, hub.url  # where the next page is said to be

    refused("source.unavailable", find, source, "hf://datasets/big/rows")

    hub.url = url
    assert hub.count("/tree/") == 1
