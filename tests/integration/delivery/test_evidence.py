"""The audit bundle beside an adapter: true as it comes, and no change of it goes unseen."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_delivery import Trained
from trainchain.cli import delivery
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError


def test_the_evidence_beside_it_holds_and_any_change_of_it_is_found(trained: Trained, tmp_path: Path) -> None:
    found = delivery.look(trained.client, trained.job.id, None)
    delivery.assemble(trained.client, found, tmp_path, where=None)

    held = delivery.verify(tmp_path)

    assert held["job"] == trained.job.id
    assert held["escrow"] == trained.job.town.chain.escrow
    beside = [tmp_path / name for name in ("adapter_model.safetensors", "adapter_config.json")]
    for path in [*sorted((tmp_path / "trainchain").iterdir()), *beside]:
        kept = path.read_bytes()
        for wrong in (b"", kept[:-2] + bytes([kept[-2] ^ 1]) + kept[-1:], None):
            if wrong is None:
                path.unlink()
            else:
                path.write_bytes(wrong)
            with pytest.raises(TrainChainError):
                delivery.verify(tmp_path)
            path.write_bytes(kept)
    (tmp_path / "chat_template.jinja").write_bytes(b"which the recipe did not bring")
    with pytest.raises(TrainChainError, match=r"chat_template\.jinja"):
        delivery.verify(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "trainchain" / "more.json").write_bytes(b"{}")
    with pytest.raises(TrainChainError, match=r"more\.json"):
        delivery.verify(tmp_path)


def rewrite(folder: Path, name: str, change: Any) -> None:
    """Change a JSON file of the bundle, and the manifest so that it names what is there now."""
    inside = folder / "trainchain"
    document = json.loads((inside / name).read_bytes())
    change(document)
    data = json.dumps(document).encode()
    (inside / name).write_bytes(data)
    manifest = json.loads((inside / "manifest.json").read_bytes())
    if name != "manifest.json":
        manifest["files"][name] = {"sha256": sha256(data), "size": len(data)}
        (inside / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


FORGERIES: dict[str, tuple[str, Any, str]] = {
    "another worker": (
        "contributions.json",
        lambda d: d["contributions"][0]["contribution"].update(worker="0x" + "ab" * 20),
        "verify.rewards",
    ),
    "another delta": (
        "contributions.json",
        lambda d: d["contributions"][0]["contribution"].update(deltaHash="0x" + "ab" * 32),
        "verify.rewards",
    ),
    "another signature": (
        "contributions.json",
        lambda d: d["contributions"][0].update(signature=d["contributions"][1]["signature"]),
        "verify.rewards",
    ),
    "a better receipt": (
        "contributions.json",
        lambda d: d["contributions"][0]["receipt"].update(amount="9" * 18),
        "verify.rewards",
    ),
    "a receipt of another": (
        "contributions.json",
        lambda d: d["contributions"][0].update(receipt=d["contributions"][1]["receipt"]),
        "verify.rewards",
    ),
    "a receipt of another escrow": (
        "contributions.json",
        lambda d: d["contributions"][0]["receipt"].update(escrow="0x" + "ab" * 20),
        "verify.rewards",
    ),
    "a contribution twice": (
        "contributions.json",
        lambda d: d["contributions"].append(d["contributions"][0]),
        "verify.rewards",
    ),
    "a contribution less": ("contributions.json", lambda d: d["contributions"].pop(), "verify.leaves"),
    "a contribution less at the front": ("contributions.json", lambda d: d["contributions"].pop(0), "verify.rewards"),
    "another place in the queue": (
        "contributions.json",
        lambda d: d["contributions"][0]["receipt"].update(place=2),
        "verify.rewards",
    ),
    "another total": (
        "settlements.json",
        lambda d: d["settlements"][0].update(total="1"),
        "verify.root",
    ),
    "another root": (
        "settlements.json",
        lambda d: d["settlements"][0].update(root="0x" + "ab" * 32),
        "verify.root",
    ),
    "other leaves": (
        "settlements.json",
        lambda d: d["settlements"][0].update(leaves=d["settlements"][1]["leaves"]),
        "verify.leaves",
    ),
    "a recipe that pays more": (
        "recipe.json",
        lambda d: d["pay"].update(per_million_tokens="9" * 19),
        "object.digest",
    ),
    "another hub": ("manifest.json", lambda d: d["chain"].update(hub="0x" + "ab" * 20), "verify.rewards"),
    "another chain": ("manifest.json", lambda d: d["chain"].update(chain_id=1), "verify.rewards"),
    "another job": ("manifest.json", lambda d: d.update(job="0x" + "ab" * 32), "verify.rewards"),
    "no manifest of ours": ("manifest.json", lambda d: d.update(format="x"), "job.invalid"),
}


def test_evidence_that_was_forged_with_its_manifest_is_found(trained: Trained, tmp_path: Path) -> None:
    found = delivery.look(trained.client, trained.job.id, None)
    delivery.assemble(trained.client, found, tmp_path / "true", where=None)

    caught = {}
    for name, (file, change, _) in FORGERIES.items():
        folder = tmp_path / name
        shutil.copytree(tmp_path / "true", folder)
        rewrite(folder, file, change)
        try:
            delivery.verify(folder)
        except TrainChainError as error:
            caught[name] = error.code

    assert caught == {name: code for name, (_, _, code) in FORGERIES.items()}
