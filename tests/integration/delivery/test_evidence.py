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
        "contribution.bad_signature",
    ),
    "another delta": (
        "contributions.json",
        lambda d: d["contributions"][0]["contribution"].update(deltaHash="0x" + "ab" * 32),
        "contribution.bad_signature",
    ),
    "another signature": (
        "contributions.json",
        lambda d: d["contributions"][0].update(signature=d["contributions"][1]["signature"]),
        "contribution.bad_signature",
    ),
    "a better receipt": (
        "contributions.json",
        lambda d: d["contributions"][0]["receipt"].update(amount="9" * 18),
        "receipt.invalid",
    ),
    "a receipt of another": (
        "contributions.json",
        lambda d: d["contributions"][0].update(receipt=d["contributions"][1]["receipt"]),
        "receipt.invalid",
    ),
    "a receipt of another escrow": (
        "contributions.json",
        lambda d: d["contributions"][0]["receipt"].update(escrow="0x" + "ab" * 20),
        "receipt.invalid",
    ),
    "a contribution twice": (
        "contributions.json",
        lambda d: d["contributions"].append(d["contributions"][0]),
        "job.invalid",
    ),
    "a contribution less": ("contributions.json", lambda d: d["contributions"].pop(), "settlement.mismatch"),
    "another total": (
        "settlements.json",
        lambda d: d["settlements"][0].update(total="1"),
        "settlement.mismatch",
    ),
    "another root": (
        "settlements.json",
        lambda d: d["settlements"][0].update(root="0x" + "ab" * 32),
        "settlement.mismatch",
    ),
    "other leaves": (
        "settlements.json",
        lambda d: d["settlements"][0].update(leaves="leaves-2.json"),
        "settlement.mismatch",
    ),
    "a recipe that pays more": (
        "recipe.json",
        lambda d: d["pay"].update(per_million_tokens="9" * 19),
        "object.digest",
    ),
    "another hub": ("manifest.json", lambda d: d["chain"].update(hub="0x" + "ab" * 20), "receipt.invalid"),
    "another chain": ("manifest.json", lambda d: d["chain"].update(chain_id=1), "contribution.bad_signature"),
    "another job": ("manifest.json", lambda d: d.update(job="0x" + "ab" * 32), "job.invalid"),
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
        with pytest.raises(TrainChainError) as error:
            delivery.verify(folder)
        caught[name] = error.value.code

    assert caught == {name: code for name, (_, _, code) in FORGERIES.items()}
