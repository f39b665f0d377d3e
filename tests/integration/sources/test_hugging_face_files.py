"""Files fetched from a hub on loopback and adapters pushed to it, by HTTP and by xet, whatever breaks on the way."""

import errno
import io
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_hf import Hub
from tests.integration.sources.hugging_face import MODEL, WEIGHTS, refused
from trainchain.core.sources import hf
from trainchain.core.sources.address import HubAddress
from trainchain.core.sources.hf import HuggingFace


@pytest.fixture
def pinned(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    hub.use(monkeypatch)
    return f"hf://alice/tiny@{hub.put('alice/tiny', MODEL)}"


def ranges(hub: Hub) -> list[str | None]:
    return [request.range for request in hub.requests if request.path.startswith("/cdn/")]


def test_a_download_that_breaks_off_goes_on_where_it_was(
    hub: Hub, source: HuggingFace, waits: list[float], pinned: str, tmp_path: Path
) -> None:
    hub.fail("GET /cdn/", cut=1_000_000)
    hub.fail("GET /cdn/", cut=200_000)

    source.fetch(pinned, "model.safetensors", tmp_path / "part", size=len(WEIGHTS))

    assert (tmp_path / "part").read_bytes() == WEIGHTS
    assert len(waits) == 2
    first, second, third = ranges(hub)
    assert first is None
    assert second is not None
    assert third is not None
    at = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in (second, third)]
    assert 900_000 < at[0] <= 1_000_000
    assert 1_100_000 < at[1] <= 1_200_000


def test_the_token_is_for_the_hub_and_not_for_where_its_files_lie(
    hub: Hub, source: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.put("alice/own", {"model.safetensors": WEIGHTS}, private=True)
    hub.use(monkeypatch, "alice")

    source.fetch(f"hf://alice/own@{commit}", "model.safetensors", tmp_path / "part", size=len(WEIGHTS))
    assert source.head(f"hf://alice/own@{commit}", "model.safetensors", 8) == WEIGHTS[:8]

    elsewhere = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert len(elsewhere) == 2
    assert not any(request.token for request in elsewhere)
    assert all(request.token for request in hub.requests if request not in elsewhere)


def test_a_download_of_an_earlier_process_goes_on_where_it_was(
    hub: Hub, source: HuggingFace, pinned: str, tmp_path: Path
) -> None:
    hub.fail("GET /cdn/", cut=500_000)
    hub.fail("/resolve/", status=503, times=0)
    first = HuggingFace(sleep=lambda _: None, attempts=1)
    error = refused(
        "source.unavailable", first.fetch, pinned, "model.safetensors", tmp_path / "part", size=len(WEIGHTS)
    )
    assert "kept" in error.hint
    have = (tmp_path / "part").stat().st_size
    assert 400_000 < have <= 500_000

    source.fetch(pinned, "model.safetensors", tmp_path / "part", size=len(WEIGHTS))

    assert ranges(hub) == [None, f"bytes={have}-"]
    assert (tmp_path / "part").read_bytes() == WEIGHTS
    before = len(hub.requests)
    source.fetch(pinned, "model.safetensors", tmp_path / "part", size=len(WEIGHTS))
    assert len(hub.requests) == before


def test_a_server_that_ignores_ranges_is_read_from_the_beginning(
    hub: Hub, source: HuggingFace, pinned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.fixtures_hf_http import Handler

    (tmp_path / "part").write_bytes(WEIGHTS[:1000])
    monkeypatch.setattr(Handler, "bytes_of", lambda handler, data, headers: handler.reply(data, 200, headers))

    source.fetch(pinned, "model.safetensors", tmp_path / "part", size=len(WEIGHTS))

    assert (tmp_path / "part").read_bytes() == WEIGHTS
    assert source.head(pinned, "model.safetensors", 10) == WEIGHTS[:10]


def test_a_connection_that_always_breaks_is_given_up_and_what_came_is_kept(
    hub: Hub, source: HuggingFace, waits: list[float], pinned: str, tmp_path: Path
) -> None:
    hub.fail("GET /cdn/", cut=100_000, times=99)

    refused("source.unavailable", source.fetch, pinned, "model.safetensors", tmp_path / "part", size=len(WEIGHTS))

    assert len(waits) == 4
    assert WEIGHTS.startswith((tmp_path / "part").read_bytes())
    hub.heal()
    source.fetch(pinned, "model.safetensors", tmp_path / "part", size=len(WEIGHTS))
    assert (tmp_path / "part").read_bytes() == WEIGHTS


@pytest.mark.parametrize("served", [WEIGHTS[:700_000], WEIGHTS + b"more", b""])
@pytest.mark.parametrize("told", [True, False])
def test_a_file_of_another_size_is_named_and_not_kept(
    hub: Hub,
    source: HuggingFace,
    pinned: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    served: bytes,
    told: bool,
) -> None:
    hub.tamper("alice/tiny", "model.safetensors", served)
    if not told:  # the length is learned from the bytes alone
        monkeypatch.setattr(hf, "metadata", lambda *_: (None, None))

    if not told:
        (tmp_path / "part").write_bytes(WEIGHTS[:500_000])
    fetch = source.fetch
    error = refused("source.changed", fetch, pinned, "model.safetensors", tmp_path / "part", size=len(WEIGHTS))

    assert "model.safetensors" in error.message
    assert not (tmp_path / "part").exists()


def test_other_bytes_of_the_same_length_are_for_the_caller_s_hash_to_find(
    hub: Hub, source: HuggingFace, pinned: str, tmp_path: Path
) -> None:
    hub.tamper("alice/tiny", "model.safetensors")
    source.fetch(pinned, "model.safetensors", tmp_path / "part", size=len(WEIGHTS))
    assert (tmp_path / "part").read_bytes() != WEIGHTS

    hub.heal()
    (tmp_path / "part").unlink()
    source.fetch(pinned, "model.safetensors", tmp_path / "part", size=len(WEIGHTS))
    assert (tmp_path / "part").read_bytes() == WEIGHTS


def test_a_partial_file_longer_than_the_file_is_thrown_away(
    hub: Hub, source: HuggingFace, pinned: str, tmp_path: Path
) -> None:
    (tmp_path / "part").write_bytes(b"x" * 100)

    source.fetch(pinned, "config.json", tmp_path / "part", size=23)

    assert (tmp_path / "part").read_bytes() == MODEL["config.json"]


def test_an_empty_file_is_fetched(
    hub: Hub, source: HuggingFace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.use(monkeypatch)
    commit = hub.put("a/b", {"empty.json": b""})

    source.fetch(f"hf://a/b@{commit}", "empty.json", tmp_path / "new" / "part", size=0)

    assert (tmp_path / "new" / "part").read_bytes() == b""


def test_a_disk_without_room_is_told_before_and_while_it_fills(
    hub: Hub, source: HuggingFace, pinned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(WEIGHTS)
    with monkeypatch.context() as patched:
        patched.setattr(hf.shutil, "disk_usage", lambda _: hf.shutil._ntuple_diskusage(10, 10, 0))
        before = len(hub.requests)
        refused("disk.full", source.fetch, pinned, "model.safetensors", tmp_path / "part", size=size)
        assert len(hub.requests) == before

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 500_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    whole = Path.open

    def full(path: Path, *args: Any, **options: Any) -> Any:
        return Full(path, "a") if args == ("ab",) else whole(path, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    refused("disk.full", source.fetch, pinned, "model.safetensors", tmp_path / "part", size=size)
    assert list(tmp_path.iterdir()) == []


def test_the_first_bytes_of_a_file_are_had_without_the_rest(hub: Hub, source: HuggingFace, pinned: str) -> None:
    assert source.head(pinned, "model.safetensors", 8) == WEIGHTS[:8]
    assert ranges(hub) == ["bytes=0-7"]
    assert source.head(pinned, "config.json", 500) == MODEL["config.json"]
    assert source.head(pinned, "config.json", 0) == b""


TARGET = HubAddress("model", "me/out")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    (folder / "audit").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(5000))
    (folder / "adapter_config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (folder / "audit" / "recipe.json").write_text("{}")
    return folder


def test_an_adapter_is_pushed_once_private_and_the_same_again_writes_nothing(
    hub: Hub, source: HuggingFace, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.use(monkeypatch, "me")

    first = source.push(adapter, TARGET, message="Round 2", private=True)
    again = source.push(adapter, TARGET, message="Round 2", private=True)

    assert first.created
    assert first.url == f"{hub.url}/me/out"
    assert first.commit == hub.head("me/out")
    assert again == type(again)(first.url, first.commit, created=False)
    assert hub.repos["model", "me/out"].private
    held = hub.read("me/out")
    assert held["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert held["audit/recipe.json"] == b"{}"


def test_a_push_leaves_what_others_put_there_and_who_may_see_it(
    hub: Hub, source: HuggingFace, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("me/out", {"notes.md": b"mine"})
    hub.use(monkeypatch, "me")
    commits = len(hub.repos["model", "me/out"].commits)

    error = refused("usage.flag", source.push, adapter, TARGET, message="m", private=True)
    assert "everybody can read it" in error.message
    assert "notes.md" in hub.read("me/out")
    assert len(hub.repos["model", "me/out"].commits) == commits

    assert source.push(adapter, TARGET, message="m", private=False).created
    assert hub.read("me/out")["notes.md"] == b"mine"
    assert not hub.repos["model", "me/out"].private


def test_a_push_takes_away_what_an_earlier_one_left_of_its_audit_folder_and_nothing_else(
    hub: Hub, source: HuggingFace, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("me/out", {"notes.md": b"mine", "pictures/loss.png": b"png"}, private=True)
    hub.use(monkeypatch, "me")
    (adapter / "audit" / "leaves-2.json").write_text("{}")
    assert source.push(adapter, TARGET, message="Round 2", private=True).created
    (adapter / "audit" / "leaves-2.json").rename(adapter / "audit" / "leaves-1.json")

    assert source.push(adapter, TARGET, message="Round 1", private=True).created

    held = set(hub.read("me/out"))
    assert {"notes.md", "pictures/loss.png", "audit/leaves-1.json", "audit/recipe.json"} <= held
    assert "audit/leaves-2.json" not in held
    assert not source.push(adapter, TARGET, message="Round 1", private=True).created


def test_a_push_into_somebody_s_change_is_a_conflict_and_overwrites_nothing(
    hub: Hub, source: HuggingFace, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("me/out", {"README.md": b"old"}, private=True)
    hub.use(monkeypatch, "me")
    from tests.fixtures_hf_http import Handler

    honest = Handler.api_preupload

    def meanwhile(handler: Any, repo: Any, *args: Any) -> None:
        if "raced" not in hub.read("me/out"):
            hub.put("me/out", {"raced": b"!", "README.md": b"theirs"})
        honest(handler, repo, *args)

    monkeypatch.setattr(Handler, "api_preupload", meanwhile)
    refused("push.conflict", source.push, adapter, TARGET, message="m", private=True)
    assert hub.read("me/out")["README.md"] == b"theirs"

    assert source.push(adapter, TARGET, message="m", private=True).created


def test_a_push_where_it_may_not_be_is_refused_without_a_trace(
    hub: Hub, source: HuggingFace, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("alice/hers", {"x": b"x"}, private=True)
    hub.put("alice/open", {"x": b"x"})
    hub.use(monkeypatch)
    refused("source.token", source.push, adapter, TARGET, message="m", private=True)
    hub.use(monkeypatch, "me")

    refused("source.forbidden", source.push, adapter, HubAddress("model", "alice/new"), message="m", private=True)
    refused("source.forbidden", source.push, adapter, HubAddress("model", "alice/open"), message="m", private=False)
    (tmp_path / "empty").mkdir()
    refused("usage.file", source.push, tmp_path / "empty", TARGET, message="m", private=True)
    assert ("model", "alice/new") not in hub.repos
    assert ("model", "me/out") not in hub.repos


def test_what_the_hub_finds_wrong_with_a_card_is_said(
    hub: Hub, source: HuggingFace, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.use(monkeypatch, "me")
    (adapter / "README.md").write_text("---\nlicense: qwen-research\n---\n", encoding="utf-8")

    error = refused("source.unsupported", source.push, adapter, TARGET, message="m", private=True)

    assert '"license" must be one of' in error.message


def test_an_answer_lost_on_the_way_does_not_commit_twice(
    hub: Hub, source: HuggingFace, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.use(monkeypatch, "me")
    hub.fail("/commit/", cut=10)

    pushed = source.push(adapter, TARGET, message="m", private=True)

    assert pushed.commit == hub.head("me/out")
    assert len(hub.repos["model", "me/out"].commits) == 2
    assert pushed.created


def test_xet_carries_large_files_both_ways(
    adapter: Path, source: HuggingFace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Hub(xet=True) as hub:
        commit = hub.put("alice/tiny", MODEL)
        hub.use(monkeypatch, "me")
        (tmp_path / "part").write_bytes(b"begun by another way")

        source.fetch(f"hf://alice/tiny@{commit}", "model.safetensors", tmp_path / "part", size=len(WEIGHTS))
        pushed = source.push(adapter, TARGET, message="m", private=True)
        weights = adapter / "adapter_model.safetensors"
        source.fetch(f"hf://me/out@{pushed.commit}", weights.name, tmp_path / "own", size=5000)

        assert (tmp_path / "part").read_bytes() == WEIGHTS
        assert (tmp_path / "own").read_bytes() == weights.read_bytes()
        assert hub.count("GET /cdn/") == 0
        assert hub.count("xet-write-token") == 1
        assert source.push(adapter, TARGET, message="m", private=True).created is False


def test_no_token_and_no_signature_is_written_to_a_log(
    hub: Hub, source: HuggingFace, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hub.use(monkeypatch, "me")
    hub.fail("GET /cdn/", status=503)
    hub.fail("GET /cdn/", cut=10)
    with caplog.at_level(logging.INFO):
        found = source.push(adapter, TARGET, message="m", private=True)
        source.fetch(f"hf://me/out@{found.commit}", "adapter_model.safetensors", tmp_path / "part", size=5000)

    told = caplog.text + "".join(capfd.readouterr())
    assert os.environ["HF_TOKEN"] not in told
    assert "Bearer" not in told
    assert "Signature" not in told
