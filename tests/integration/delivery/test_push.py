"""An adapter on a model hub: what lies there, who can read it, how it loads, what refuses it.

Our hub, its chain and the model hub answer over real HTTP on loopback; the clients are the vendors' own.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.fixtures_delivery import TOKENS, Trained, logits, start, train
from tests.fixtures_hf import Hub
from tests.fixtures_hub import Town
from tests.fixtures_model import make_tiny_model
from trainchain.cli import delivery, folding
from trainchain.core.client import HubClient
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.worker.cache import Cache


def test_what_is_pushed_is_whole_and_private_and_says_what_is_so(trained: Trained, hub: Hub) -> None:
    pushed, said = trained.push()

    files = hub.read("me/bot")
    assert pushed["created"]
    assert pushed["commit"] == hub.head("me/bot")
    assert hub.repos["model", "me/bot"].private
    assert pushed["url"].endswith("/me/bot")
    inside = (
        "README",
        "contributions.json",
        "fees.json",
        "leaves-2.json",
        "leaves-3.json",
        "losses.json",
        "manifest.json",
    )
    named = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    named |= {f"trainchain/{name}" for name in (*inside, "recipe.json", "settlements.json")}
    assert set(files) == named | {".gitattributes"}
    assert {file["path"]: file["sha256"] for file in pushed["files"]} == {name: sha256(files[name]) for name in named}
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/tiny", hub.head("acme/tiny"))
    assert sha256(files["adapter_model.safetensors"]) == trained.job.round(2)["adapter"]
    assert sha256(files["trainchain/recipe.json"]) == trained.job.recipe.spec_hash
    text = files["README.md"].decode()
    assert "Held-out loss: 3.0000 before, 1.0000 after." in text
    for row in trained.job.view()["settlements"]:
        assert row["tx"] in text
    assert "sample prompts" in " ".join(said)


def test_the_vendor_s_own_client_reads_the_card(trained: Trained, hub: Hub, tmp_path: Path) -> None:
    trained.push()

    code = (
        "import json; from huggingface_hub import ModelCard; print(json.dumps(ModelCard.load('me/bot').data.to_dict()))"
    )
    environment = {**hub.environment("me"), "HF_HOME": str(tmp_path), "PATH": ""}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )

    assert json.loads(found.stdout) == {
        "base_model": "acme/tiny",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "tags": ["base_model:adapter:acme/tiny", "lora", "transformers", "trainchain"],
    }


def test_what_the_card_shows_loads_the_base_at_its_commit(
    trained: Trained, hub: Hub, tiny: Path, tmp_path: Path
) -> None:
    """By their names alone, also when the base has moved on; and so does PEFT's own short way."""
    trained.push()
    hub.put("acme/tiny", make_tiny_model(tmp_path / "newer", seed=1))
    text = hub.read("me/bot")["README.md"].decode()
    snippet = text.split("```python\n")[1].split("```")[0]
    assert 'PeftModel.from_pretrained(model, "me/bot")' in snippet

    code = f"""{snippet}
import torch
from peft import AutoPeftModelForCausalLM
for each in (model, AutoPeftModelForCausalLM.from_pretrained("me/bot")):
    print(each(torch.tensor({TOKENS.tolist()})).logits.sum().item())
"""
    environment = {**hub.environment("me"), "HF_HOME": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )

    assert found.returncode == 0, found.stderr
    folder = delivery.fetch(trained.client, trained.job.id, tmp_path / "adapter")["folder"]
    wanted = logits(tiny, Path(folder)).sum().item()
    assert [float(line) for line in found.stdout.split()] == [pytest.approx(wanted, rel=1e-4)] * 2
    assert abs(wanted - logits(tiny).sum().item()) > 1e-2


def test_the_same_again_writes_nothing(trained: Trained, hub: Hub) -> None:
    first, _ = trained.push()
    commits = hub.repos["model", "me/bot"].commits.copy()

    again, _ = trained.push()

    assert not again["created"]
    assert {**again, "created": True} == first
    assert hub.repos["model", "me/bot"].commits == commits


def test_public_makes_a_new_repository_public_and_changes_none_that_is_there(trained: Trained, hub: Hub) -> None:
    trained.push("me/open", public=True)
    trained.push("me/closed")

    trained.push("me/closed", public=True)

    with pytest.raises(TrainChainError, match="everybody can read it") as caught:
        trained.push("me/open", round_=1)
    assert caught.value.code == "usage.flag"
    assert not hub.repos["model", "me/open"].private
    assert hub.repos["model", "me/closed"].private


def test_the_recipe_says_where_to_by_itself(trained: Trained, hub: Hub) -> None:
    pushed, _ = trained.push(None)

    assert pushed["target"] == "hf://me/support-bot-lora"
    assert "README.md" in hub.read("me/support-bot-lora")


def test_somebody_else_s_commit_meanwhile_is_a_conflict(trained: Trained, hub: Hub) -> None:
    trained.push()
    hub.fail("commit/main", status=412)

    with pytest.raises(TrainChainError) as caught:
        trained.push(round_=1)

    assert (caught.value.code, caught.value.exit_code) == ("push.conflict", 3)
    assert trained.push(round_=1)[0]["created"]


def test_a_round_is_pushed_with_its_own_evidence(trained: Trained, hub: Hub, tmp_path: Path) -> None:
    trained.push(round_=1)

    files = hub.read("me/bot")
    told = json.loads(files["trainchain/contributions.json"])["contributions"]
    assert {row["contribution"]["round"] for row in told} == {1}
    assert {name for name in files if "leaves-" in name} == {"trainchain/leaves-2.json"}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert delivery.verify(tmp_path)["round"] == 1


def test_a_bad_target_is_refused_before_anything_is_asked_for(trained: Trained, hub: Hub) -> None:
    for target in ("nobody", "hf://datasets/me/x", "https://huggingface.co/me/x", "s3://bucket/x", "me/x/y", " "):
        with pytest.raises(TrainChainError) as caught:
            trained.push(target)
        assert caught.value.code in ("source.address", "source.unsupported")
    assert hub.requests == []


def test_without_a_target_anywhere_the_way_to_say_it_is_told(town: Town, tiny: Path, hub: Hub) -> None:
    job = start(town, tiny, None, rounds=1)
    train(town, job, [town.person()], 1)
    client = HubClient(town.url)

    with pytest.raises(TrainChainError) as caught:
        delivery.push(client, job.id, None, note=lambda _: None)

    client.close()
    assert caught.value.code == "usage.flag"
    assert caught.value.hint == f"trainchain push {job.id[:12]} hf://you/support-bot"
    assert hub.requests == []


def test_a_job_that_is_still_trained_is_pushed_by_the_round_only(town: Town, tiny: Path, hub: Hub) -> None:
    job, worker = start(town, tiny, None, rounds=3), town.person()
    client = HubClient(town.url)
    with pytest.raises(TrainChainError) as early:
        delivery.push(client, job.id, "me/x", note=lambda _: None)
    train(town, job, [worker], 1)

    with pytest.raises(TrainChainError) as running:
        delivery.push(client, job.id, "me/x", note=lambda _: None)
    pushed = delivery.push(client, job.id, "me/x", note=lambda _: None, round_=1)

    client.close()
    assert [error.value.code for error in (early, running)] == ["job.not_ready"] * 2
    assert running.value.hint == "--round 1 pushes that round's adapter."
    assert pushed["round"] == 1
    assert "this is the adapter of round 1" in hub.read("me/x")["README.md"].decode()


def test_a_base_of_the_owner_s_own_is_named_by_the_recipe(town: Town, tiny: Path, hub: Hub) -> None:
    job = start(town, tiny, None, rounds=1)
    train(town, job, [town.person()], 1)
    client = HubClient(town.url)

    delivery.push(client, job.id, "me/own", note=lambda _: None)

    client.close()
    config = json.loads(hub.read("me/own")["adapter_config.json"])
    card = ModelCard(hub.read("me/own")["README.md"].decode())
    assert (config["base_model_name_or_path"], config["revision"]) == ("support-bot", None)
    assert "base_model" not in card.data.to_dict()
    assert sha256((tiny / "model.safetensors").read_bytes()) in card.text


def test_a_private_job_s_adapter_and_evidence_are_its_owner_s_to_push(town: Town, hub: Hub, tmp_path: Path) -> None:
    job, worker = town.publish_sealed(rounds=1, shards=1, name="secret", samples=["Who?"]), town.person()
    worker.work(job)
    town.tick()
    said: list[str] = []
    for stranger in (HubClient(town.url), town.person().client()):
        with pytest.raises(TrainChainError) as caught:
            delivery.push(stranger, job.id, "me/secret", note=said.append)
        assert caught.value.code in ("session.required", "access.denied", "object.unknown")
        stranger.close()
    owner = job.owner.client()

    delivery.push(owner, job.id, "me/secret", note=said.append)

    with pytest.raises(TrainChainError, match="no hub gives it out in clear") as caught:
        folding.fetch_merged(owner, Cache(tmp_path / "cache"), job.id, tmp_path / "model", note=said.append)
    owner.close()
    assert "--base DIR" in caught.value.hint
    files = hub.read("me/secret")
    assert hub.repos["model", "me/secret"].private
    assert "Private and not named here." in files["README.md"].decode()
    assert not any(ref.sha256 in files["README.md"].decode() for ref in job.sealed.files())
    assert all(row.get("samples") is None for row in json.loads(files["trainchain/losses.json"])["rounds"])
    assert any("the job is private" in line for line in said)
