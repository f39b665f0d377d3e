"""An adapter fetched, and folded into its base: wherever the base lies."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from tests.fixtures_delivery import Trained, logits, start, train
from tests.fixtures_hf import Hub
from tests.fixtures_hub import Town
from tests.fixtures_model import make_tiny_model
from trainchain.cli import delivery, folding
from trainchain.cli.main import run_command
from trainchain.core.adapter import read_adapter
from trainchain.core.client import HubClient
from trainchain.core.errors import TrainChainError
from trainchain.core.worker.cache import Cache


def test_a_folded_model_stands_by_itself(trained: Trained, hub: Hub, tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []

    document = folding.fetch_merged(
        trained.client, Cache(tmp_path / "cache"), trained.job.id, tmp_path / "model", note=said.append
    )

    delivery.fetch(trained.client, trained.job.id, tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {path.name for path in tiny.iterdir()} | {"README.md"}
    assert document["dtype"] == "fp32"
    assert float((logits(tmp_path / "model") - logits(tiny, tmp_path / "adapter")).abs().max()) < 1e-5
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert any("of memory and" in line for line in said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "cache", "model"]


def test_a_base_that_our_hub_has_is_brought_from_there_for_its_owner(town: Town, tiny: Path, tmp_path: Path) -> None:
    job = start(town, tiny, None, rounds=1)
    train(town, job, [town.person()], 1)
    nobody, owner = HubClient(town.url), job.owner.client()

    with pytest.raises(TrainChainError) as caught:
        folding.fetch_merged(nobody, Cache(tmp_path / "a"), job.id, tmp_path / "model", note=lambda _: None)
    assert not (tmp_path / "model").exists()
    folding.fetch_merged(owner, Cache(tmp_path / "b"), job.id, tmp_path / "model", note=lambda _: None)

    assert caught.value.code == "session.required"
    assert "--base" in caught.value.hint
    delivery.fetch(nobody, job.id, tmp_path / "adapter")
    assert torch.allclose(logits(tmp_path / "model"), logits(tiny, tmp_path / "adapter"), atol=1e-5)
    nobody.close()
    owner.close()


def test_a_base_that_was_named_is_checked_against_the_job(trained: Trained, tiny: Path, tmp_path: Path) -> None:
    def folded(base: Path, target: str) -> dict[str, Any]:
        cache = Cache(tmp_path / "cache")
        return folding.fetch_merged(
            trained.client, cache, trained.job.id, tmp_path / target, note=lambda _: None, base=base
        )

    assert folded(tiny, "one")["dtype"] == "fp32"
    other = make_tiny_model(tmp_path / "other", seed=1)
    for base, code in ((other, "source.changed"), (tmp_path / "nowhere", "source.missing")):
        with pytest.raises(TrainChainError) as caught:
            folded(base, "two")
        assert caught.value.code == code
        assert not (tmp_path / "two").exists()
    with pytest.raises(TrainChainError) as caught:
        folded(tiny, "one")
    assert caught.value.code == "usage.flag"


def test_a_fetched_adapter_names_its_base_and_commit(trained: Trained, hub: Hub, tmp_path: Path) -> None:
    delivery.fetch(trained.client, trained.job.id, tmp_path / "adapter")

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_bytes())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/tiny", hub.head("acme/tiny"))
    found = read_adapter(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(np.array_equal(found[name], trained.adapter[name]) for name in trained.adapter)


def test_an_adapter_pulled_over_another_keeps_nothing_of_it(trained: Trained, tmp_path: Path) -> None:
    delivery.fetch(trained.client, trained.job.id, tmp_path / "one")
    delivery.fetch(trained.client, trained.job.id, tmp_path / "two")
    (tmp_path / "two" / "chat_template.jinja").write_text("of a job that brought one", encoding="utf-8")
    (tmp_path / "two" / "notes.txt").write_text("mine", encoding="utf-8")

    delivery.fetch(trained.client, trained.job.id, tmp_path / "two", round_=1)

    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names | {"notes.txt"}


def test_what_cannot_be_folded_leaves_nothing_behind(
    trained: Trained, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def codes() -> str:
        with pytest.raises(TrainChainError) as caught:
            folding.fetch_merged(
                trained.client, Cache(tmp_path / "cache"), trained.job.id, tmp_path / "out" / "model",
                note=lambda _: None, base=tiny,
            )  # fmt: skip
        assert not list(tmp_path.glob("out/*"))
        assert not list(tmp_path.glob("out/.*"))
        return caught.value.code

    huge = {name: np.full_like(tensor, 1e30) for name, tensor in trained.adapter.items()}
    with monkeypatch.context() as patched:
        patched.setattr("trainchain.core.adapter.read_adapter", lambda _: huge)
        assert codes() == "merge.unmergeable"
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert codes() == "disk.full"


def test_folding_says_what_it_takes_and_nothing_else(trained: Trained, tiny: Path, tmp_path: Path) -> None:
    """In a process of its own: here the libraries have said what they have to say."""
    ends = ["--base", str(tiny), "-o", "model", "--hub", trained.client.url, "--home", str(tmp_path / "home")]
    command = [sys.executable, "-m", "trainchain", "pull", trained.job.id, "--merged", *ends]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False)

    assert (done.returncode, done.stdout) == (0, "model\n"), done.stderr
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["folding"], done.stderr


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
from trainchain.cli.main import run_command
sys.exit(run_command(sys.argv[1:]))
"""
"""The command in a process no file of which grows beyond 2000 bytes: as near to a full disk as a test comes without
one. Of the process alone: this one holds the hubs."""


def test_a_disk_that_fills_is_told_of_and_leaves_nothing_half_written(
    trained: Trained, tiny: Path, tmp_path: Path
) -> None:
    pytest.importorskip("resource")
    old = {"trainchain.json": b"{}", "adapter_model.safetensors": b"of an earlier round"}
    (tmp_path / "old").mkdir()
    for name, data in old.items():
        (tmp_path / "old" / name).write_bytes(data)
    ways = [
        ["pull", trained.job.id, "-o", str(tmp_path / "new")],
        ["pull", trained.job.id, "-o", str(tmp_path / "old")],
        ["pull", trained.job.id, "--merged", "--base", str(tiny), "-o", str(tmp_path / "model")],
        ["push", trained.job.id],
    ]

    for way in ways:
        ends = ["--hub", trained.client.url, "--home", str(tmp_path / "home")]
        command = [sys.executable, "-c", FULL, *way, *ends]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
        assert (ended.returncode, ended.stdout) == (1, ""), ended.stderr
        assert "disk.full" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert "TRAINCHAIN_CACHE" not in ended.stderr, "it is another folder that is full"

    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["old"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == old


def test_what_a_killed_pull_left_does_no_harm(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "adapter" / ".pulling-abc").mkdir(parents=True)
    (tmp_path / "adapter" / ".pulling-abc" / "adapter_model.safetensors").write_bytes(b"half")

    delivery.fetch(trained.client, trained.job.id, tmp_path / "adapter")

    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "trainchain.json"}


def test_what_a_killed_fold_left_goes_with_the_next_and_nothing_else_does(
    trained: Trained, tiny: Path, tmp_path: Path
) -> None:
    """Links to the base's files, which would keep them on the disk when the cache lets go of them."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    cache, other = Cache(tmp_path / "cache"), tmp_path / ".model.of-mine"
    left = [cache.folder / f".folding-{gone.pid}-abcdefgh", tmp_path / f".model.folding-{gone.pid}-abcdefgh"]
    busy = cache.folder / f".folding-{os.getpid()}-abcdefgh"
    for folder in (*left, busy, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")

    folding.fetch_merged(trained.client, cache, trained.job.id, tmp_path / "model", note=lambda _: None)

    assert not any(folder.exists() for folder in left)
    assert {path.name for path in cache.folder.glob(".*")} == {busy.name}
    assert (other / "model.safetensors").exists()
    (cache.folder / f".folding-{gone.pid}-abcdefgh").mkdir()
    assert run_command(["cache", "rm", "--all", "--home", str(tmp_path)]) == 0
    assert {path.name for path in cache.folder.glob(".*")} == {busy.name}


def test_a_folder_that_cannot_be_replaced_is_refused_before_anything_is_folded(
    trained: Trained, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    said: list[str] = []

    for target in (Path(), tmp_path / "link"):
        with pytest.raises(TrainChainError) as caught:
            folding.fetch_merged(
                trained.client, Cache(tmp_path / "cache"), trained.job.id, target, note=said.append, base=tiny
            )
        assert (caught.value.code, "-merged" in caught.value.hint) == ("usage.flag", True)
    assert said == []
