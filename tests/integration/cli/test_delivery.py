"""An adapter on its way out: fetched, published on a model hub with card and evidence, folded into its base.

Our hub, its chain and the model hub answer over real HTTP on loopback; the clients are the vendors' own.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.fixtures_hf import Hub
from tests.fixtures_hub import REACH, Job, Person, Town
from tests.fixtures_model import make_tiny_model
from trainchain.cli import delivery, folding
from trainchain.core.adapter import Adapter, adapter_bytes, read_adapter
from trainchain.core.client import HubClient
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.models import Base, FileRef, Lora
from trainchain.core.sources.found import MODEL_FILES
from trainchain.core.train.model import find_targets, initial_adapter
from trainchain.core.worker.cache import Cache

TOKENS = torch.tensor([[5, 9, 42, 200, 7, 31]])


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    made = Town(tmp_path_factory.mktemp("town"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as made:
        yield made.use(monkeypatch, user="me")


@dataclass
class Trained:
    """A job on the tiny model, trained by numbers from nowhere, and its last adapter."""

    job: Job
    client: HubClient
    adapter: Adapter

    def push(self, target: str | None = "hf://me/bot", **options: Any) -> tuple[dict[str, Any], list[str]]:
        said: list[str] = []
        return delivery.push(self.client, self.job.id, target, note=said.append, **options), said


def refs_of(model: Path, source: str | None) -> list[FileRef]:
    return [
        FileRef(
            name=path.name,
            sha256=sha256(path.read_bytes()),
            size=path.stat().st_size,
            path=path.name if source else None,
        )
        for path in sorted(model.iterdir())
        if path.suffix in MODEL_FILES
    ]


def start(town: Town, tiny: Path, source: str | None, **options: Any) -> Job:
    """Publish a job on the tiny model, which lies at `source`, or with our hub."""
    targets = find_targets(tiny, "all-linear")
    initial = adapter_bytes(initial_adapter(targets, 2, 0))
    ref = FileRef(name="initial.safetensors", sha256=sha256(initial), size=len(initial))
    own = {path.name: path.read_bytes() for path in sorted(tiny.iterdir()) if path.suffix in MODEL_FILES}
    files = {**own, "train-0.jsonl": b'{"text": "a"}\n', "held-out.jsonl": b'{"text": "b"}\n', "initial": initial}
    return town.publish(
        files,
        name="support-bot",
        base_model=Base(source=source, license="mit" if source else None, files=refs_of(tiny, source)),
        lora=Lora(r=2, alpha=4, targets=sorted(targets), initial=ref),
        **options,
    )


def train(town: Town, job: Job, workers: list[Person], rounds: int) -> Adapter:
    """Let workers contribute to every shard of the rounds, and the hub measure and settle them."""
    evaluator = town.person(town.evaluator_keys)

    def measure() -> None:
        for lease in iter(evaluator.lease, None):
            report = {"loss": 3.0 - lease["round"], "samples": [""] * len(job.recipe.samples)}
            evaluator.post(f"/v1/leases/{lease['lease']}/evaluation", report).raise_for_status()

    measure()
    for number in range(1, rounds + 1):
        for shard in range(job.recipe.shards):
            worker = workers[shard % len(workers)]
            lease = worker.must_lease(job)
            begin = worker.fetch_adapter(lease["start"])
            random = np.random.default_rng(100 * number + shard)
            delta = {
                name: random.uniform(-REACH / 2, REACH / 2, tensor.shape).astype(np.float32)
                for name, tensor in begin.items()
            }
            worker.contribute(lease, delta).raise_for_status()
        town.tick()
        measure()
    town.tick()
    return job.owner.fetch_adapter(job.round(rounds)["adapter"])


@pytest.fixture
def trained(town: Town, tiny: Path, hub: Hub) -> Iterator[Trained]:
    commit = hub.put("acme/tiny", tiny)
    job = start(town, tiny, f"hf://acme/tiny@{commit}", samples=["Who?"], hub_model_id="me/support-bot-lora")
    adapter = train(town, job, [town.person(), town.person()], 2)
    client = HubClient(town.url)
    yield Trained(job, client, adapter)
    client.close()


def test_what_is_pushed_is_whole_and_private_and_says_what_is_so(trained: Trained, hub: Hub) -> None:
    pushed, said = trained.push()

    files = hub.read("me/bot")
    assert pushed["created"]
    assert pushed["commit"] == hub.head("me/bot")
    assert hub.repos["model", "me/bot"].private
    assert pushed["url"].endswith("/me/bot")
    inside = ("README", "contributions.json", "leaves-1.json", "leaves-2.json", "losses.json", "manifest.json")
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


def test_peft_and_transformers_load_it_by_its_names_alone(
    trained: Trained, hub: Hub, tiny: Path, tmp_path: Path
) -> None:
    """As the card says how: the base by repository and commit, the adapter by repository."""
    trained.push()
    text = hub.read("me/bot")["README.md"].decode()
    snippet = text.split("```python\n")[1].split("```")[0]
    assert 'PeftModel.from_pretrained(model, "me/bot")' in snippet

    code = f"{snippet}\nimport torch\nprint(model(torch.tensor({TOKENS.tolist()})).logits.sum().item())"
    environment = {**hub.environment("me"), "HF_HOME": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:peft", "-c", code],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert found.returncode == 0, found.stderr
    folder = delivery.fetch(trained.client, trained.job.id, tmp_path / "adapter")["folder"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder)
    wanted = model(TOKENS).logits.sum().item()
    plain = AutoModelForCausalLM.from_pretrained(tiny)(TOKENS).logits.sum().item()
    assert float(found.stdout) == pytest.approx(wanted, rel=1e-4)
    assert abs(wanted - plain) > 1e-2


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
    assert "trainchain/leaves-2.json" not in files
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


def test_the_evidence_beside_it_holds_and_any_change_of_it_is_found(trained: Trained, tmp_path: Path) -> None:
    found = delivery.look(trained.client, trained.job.id, None)
    delivery.assemble(trained.client, found, tmp_path, where=None)

    held = delivery.verify(tmp_path)

    assert held["job"] == trained.job.id
    assert held["escrow"] == trained.job.town.chain.escrow
    for path in [*sorted((tmp_path / "trainchain").iterdir()), tmp_path / "adapter_model.safetensors"]:
        kept = path.read_bytes()
        for wrong in (b"", kept[:-2] + bytes([kept[-2] ^ 1]) + kept[-1:], None):
            if wrong is None:
                path.unlink()
            else:
                path.write_bytes(wrong)
            with pytest.raises(TrainChainError):
                delivery.verify(tmp_path)
            path.write_bytes(kept)
    (tmp_path / "trainchain" / "more.json").write_bytes(b"{}")
    with pytest.raises(TrainChainError, match=r"more\.json"):
        delivery.verify(tmp_path)


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


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
