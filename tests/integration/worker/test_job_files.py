"""What a job is opened from: files of hubs and sources, hashed at every opening, and a folder of them alone."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_cache import SOURCE, Source
from tests.fixtures_hf import Hub
from tests.fixtures_hub import Job, Person, Town, ref
from trainchain.core.client import HubClient
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.models import Base, DataSet, FileRef, parse
from trainchain.core.worker.cache import Cache, verify
from trainchain.core.worker.files import Clear, JobFiles, job_files, sealed_files

FILES = {"model.safetensors": b"weights " * 500, "config.json": b"{}", "train-0.jsonl": b'{"text": "a"}\n' * 9}


@dataclass
class Home:
    """A worker's cache over a real hub."""

    town: Town
    folder: Path
    person: Person
    source: Source = field(default_factory=lambda: Source({}))
    events: list[dict[str, Any]] = field(default_factory=list)
    clients: list[HubClient] = field(default_factory=list)
    cap: int = 10**9

    def __post_init__(self) -> None:
        self.again()

    def again(self, **options: Any) -> None:
        """As a new process."""
        self.cache = Cache(self.folder, cap=self.cap, on_event=self.events.append, **options)

    def open(self, job: Job, **options: Any) -> JobFiles:
        client = self.person.client()
        self.clients.append(client)
        return job_files(self.cache, client, job.id, job.recipe.spec_hash, **{"held_out": False, **options})

    def lease(self, job: Job) -> dict[str, Any]:
        return self.person.must_lease(job)

    def told(self, event: str) -> list[dict[str, Any]]:
        return [one for one in self.events if one["event"] == event]


@pytest.fixture
def home(town: Town, tmp_path: Path) -> Iterator[Home]:
    made = Home(town, tmp_path / "cache", town.person())
    yield made
    for client in made.clients:
        client.close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hugging Face Hub that this process's clients know."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with Hub() as made:
        made.use(monkeypatch)
        yield made


def publish(town: Town, files: dict[str, bytes] | None = None, **options: Any) -> Job:
    """A job whose base has every one of the files but the data."""
    files = files or FILES
    base = Base(source=None, license=None, files=[ref(name, files[name]) for name in files if name != "train-0.jsonl"])
    usual = {"model.safetensors": b"", **files}  # the base is replaced by one of all files
    return town.publish(usual, rounds=1, shards=4, **{"base_model": base, **options})


def failure(call: Callable[..., Any], *arguments: Any, **options: Any) -> TrainChainError:
    with pytest.raises(TrainChainError) as caught:
        call(*arguments, **options)
    return caught.value


def test_a_job_is_laid_out_as_its_recipe_names_it(town: Town, home: Home) -> None:
    job = publish(town)
    home.lease(job)

    opened = home.open(job)

    assert {path.name: path.read_bytes() for path in opened.model_dir.iterdir()} == {
        name: FILES[name] for name in ("model.safetensors", "config.json")
    }
    (data,) = opened.data.values()
    assert data.read_bytes() == FILES["train-0.jsonl"]
    assert opened.recipe == job.recipe
    assert opened.recipe_path.read_bytes() == job.recipe.canonical()
    assert all(path.stat().st_nlink == 2 for path in opened.model_dir.iterdir())
    fetched = len(home.told("fetched"))
    home.again()
    assert home.open(job) == opened
    assert len(home.told("fetched")) == fetched
    assert home.told("damaged") == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "modeling_x.py").write_bytes(b"import os"),
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"pickle"),
        lambda folder: (folder / "inside").mkdir(),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").write_bytes(b'{"auto_map": {}}')),
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").symlink_to("model.safetensors")),
        lambda folder: (folder / "config.json").write_bytes(b'{"auto_map": {}}'),
        lambda folder: os.truncate(folder / "model.safetensors", 99),
    ],
    ids=["code", "a pickle", "a folder", "taken out", "exchanged", "a link", "written through", "truncated"],
)
def test_whatever_is_done_to_a_model_folder_is_put_right(town: Town, home: Home, spoil: Callable[[Path], Any]) -> None:
    job = publish(town)
    home.lease(job)
    folder = home.open(job).model_dir
    spoil(folder)

    again = home.open(job).model_dir

    assert again == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in ("model.safetensors", "config.json")
    }
    assert home.told("damaged")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert list(verify(home.cache)) == []


def test_two_shards_that_were_swapped_come_right(town: Town, home: Home) -> None:
    job = publish(town, {"a.safetensors": b"a" * 99, "b.safetensors": b"b" * 99, "train-0.jsonl": b"{}"})
    home.lease(job)
    folder = home.open(job).model_dir
    one, other = folder / "a.safetensors", folder / "b.safetensors"
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)

    home.open(job)

    assert (one.read_bytes(), other.read_bytes()) == (b"a" * 99, b"b" * 99)


def test_on_a_disk_without_links_the_model_is_copied_and_hashed(
    town: Town, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    job = publish(town)
    home.lease(job)
    folder = home.open(job).model_dir
    assert {path.stat().st_nlink for path in folder.iterdir()} == {1}
    assert home.open(job).model_dir == folder
    assert home.told("damaged") == []
    (folder / "config.json").write_bytes(b"[]")
    assert [entry.kind for entry, _ in verify(home.cache)] == ["model"]

    assert (home.open(job).model_dir / "config.json").read_bytes() == b"{}"


def test_a_job_that_cannot_fit_is_refused_before_any_of_it_is_fetched(town: Town, home: Home) -> None:
    job = publish(town)
    home.lease(job)
    home.cap = 2000
    home.again()

    error = failure(home.open, job)

    assert error.code == "cache.full"
    assert error.facts["cap"] == 2000
    assert home.told("fetched") == []
    assert not any(path.is_file() for path in (home.folder / "objects").rglob("*"))


def test_the_next_job_takes_the_place_of_the_last(town: Town, home: Home) -> None:
    first = publish(town)
    second = publish(town, {**FILES, "model.safetensors": b"other w " * 500})
    home.lease(first)
    home.lease(second)
    home.cap = 9_000
    home.again()
    one = home.open(first)

    home.open(second)

    assert {told["kind"] for told in home.told("evicted")} <= {"object", "model"}
    assert not one.model_dir.exists()
    assert home.open(first).model_dir.exists()


def test_held_out_data_is_for_who_measures(town: Town, home: Home) -> None:
    job = town.publish(rounds=1, shards=1, held_out=True)
    held_out = sha256(job.files["held-out.jsonl"])
    home.lease(job)

    assert held_out not in home.open(job).data
    home.person = job.owner
    assert held_out in home.open(job, held_out=True).data


def test_a_base_of_the_hub_of_models_is_fetched_from_there(town: Town, home: Home, hub: Hub) -> None:
    weights = b"weights " * 50_000
    commit = hub.put("alice/tiny", {"model.safetensors": weights, "config.json": b"{}", "train.jsonl": b"{}\n"})
    source = f"hf://alice/tiny@{commit}"
    base = Base(source=source, license=None, files=[named("model.safetensors", weights), named("config.json", b"{}")])
    job = publish(town, base_model=base)
    home.lease(job)
    hub.fail("GET", cut=100_000)

    folder = home.open(job).model_dir

    assert (folder / "model.safetensors").read_bytes() == weights
    assert {entry.belongs for entry in home.cache.room.entries()} >= {
        f"model.safetensors of {source}",
        f"model {source}",
        "recipe of tiny",
        "train-0.jsonl of tiny",
    }


def test_a_hub_of_models_that_tampers_is_named(town: Town, home: Home, hub: Hub) -> None:
    weights = b"weights " * 5000
    commit = hub.put("alice/tiny", {"model.safetensors": weights, "config.json": b"{}"})
    base = Base(source=f"hf://alice/tiny@{commit}", license=None, files=[named("model.safetensors", weights)])
    job = publish(town, base_model=base)
    home.lease(job)
    hub.tamper("alice/tiny", "model.safetensors")

    error = failure(home.open, job)

    assert error.code == "source.changed"
    assert all(word in error.message for word in ("model.safetensors", "alice/tiny", commit, sha256(weights)))
    assert len(home.told("damaged")) == 2
    hub.heal()
    assert home.open(job).model_dir.exists()


def test_data_comes_from_its_source_too(town: Town, home: Home) -> None:
    home.source = Source({"data/train.jsonl": b"{}\n"})
    home.again(fetch=home.source)
    rows = named("train-0.jsonl", b"{}\n", "data/train.jsonl")
    dataset = DataSet(source=SOURCE, file=rows, format="text", rows=1)
    job = publish(town, datasets=[dataset])
    home.lease(job)

    opened = home.open(job)

    assert opened.data[rows.sha256].read_bytes() == b"{}\n"
    assert home.source.fetched == [("data/train.jsonl", 3)]


def test_an_index_that_names_a_part_that_is_not_there_is_refused(town: Town, home: Home) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    name = "model.safetensors.index.json"
    files = {name: json.dumps(index).encode(), "model-1.safetensors": b"1", "train-0.jsonl": b"{}"}
    job = publish(town, files)
    home.lease(job)

    error = failure(home.open, job)

    assert error.code == "source.incomplete"
    assert "model-2.safetensors" in error.message
    assert name in error.message


@pytest.mark.parametrize("index", [b"", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"a": 1}}', b"[" * 99_999])
def test_an_index_that_is_none_is_refused(town: Town, home: Home, index: bytes) -> None:
    job = publish(town, {"model.safetensors.index.json": index + b" " * len(os.urandom(1)), "train-0.jsonl": b"{}"})
    home.lease(job)

    assert failure(home.open, job).code == "source.incomplete"


@pytest.mark.parametrize("other", ["config.json", "Config.JSON"])
def test_a_model_with_two_files_of_one_name_is_refused_whatever_the_hub_let_pass(
    town: Town, home: Home, other: str
) -> None:
    job = publish(town)
    files = [ref("config.json", b"{}"), ref(other, FILES["model.safetensors"])]
    made = job.recipe.model_copy(update={"base_model": Base(source=SOURCE, license=None, files=files)})

    class Careless:
        url = town.url

        def object(self, digest: str) -> bytes:
            return made.canonical()

    error = failure(job_files, home.cache, Careless(), job.id, made.spec_hash, held_out=False)

    assert error.code == "job.invalid"
    assert other in error.message
    assert home.told("fetched") == []


LEAD_OUT = ["../x", "/etc/passwd", "..", "a\nb", "a\x1b[31m", "", "a\\b", "a" * 600]


@pytest.mark.parametrize(
    ("what", "name"),
    [*(("name", name) for name in [*LEAD_OUT, "a/b", ".hidden"]), *(("path", name) for name in [*LEAD_OUT, "a/../b"])],
)
def test_a_recipe_whose_names_lead_out_is_refused(what: str, name: str) -> None:
    values = {"name": "x", "sha256": "0" * 64, "size": 1, "path": None, what: name}

    assert failure(parse, FileRef, values, code="job.invalid", what="It").code == "job.invalid"


def test_a_recipe_that_is_not_the_one_in_escrow_is_refused(town: Town, home: Home) -> None:
    job, other = publish(town), publish(town, {**FILES, "config.json": b"[]"})
    home.lease(job)
    path = town.root / "objects" / job.recipe.spec_hash[:2] / job.recipe.spec_hash[2:]
    path.chmod(0o600)
    path.write_bytes(other.recipe.canonical())

    assert failure(home.open, job).code == "object.digest"
    assert home.told("fetched") == []


# -- private jobs -----------------------------------------------------------------------------------------------------


def test_of_a_private_job_only_ciphertexts_lie_in_a_cache_of_its_own(town: Town, home: Home, tmp_path: Path) -> None:
    job = town.publish_sealed(rounds=1, shards=2, base=True)
    lease = home.lease(job)
    asked: list[tuple[str, bytes, Path]] = []

    def unseal(file: FileRef, sealed: Path, target: Path) -> None:
        asked.append((file.name, sealed.read_bytes(), target))
        target.write_bytes(b"clear")

    def folder(size: int) -> Path:
        assert size == sum(file.size for file in job.sealed.base)
        (tmp_path / "volatile").mkdir()
        return tmp_path / "volatile"

    opened = home.open(job, clear=Clear(folder, unseal))
    found = sealed_files(
        home.cache, home.clients[0], job.id, opened.recipe, lease["round"], lease["shard"], held_out=False
    )

    block = job.sealed.blocks[0][lease["shard"]]
    assert set(found) == {block.sha256}
    assert [name for name, _, _ in asked] == [file.name for file in job.sealed.base]
    assert (opened.model_dir, opened.data) == (tmp_path / "volatile", {})
    private = home.folder / "private" / job.id
    assert not any(path.is_file() for path in (home.folder / "objects").rglob("*"))
    objects = [path for path in (private / "objects").rglob("*") if path.is_file()]
    assert {sha256(path.read_bytes()) for path in objects} == {
        block.sha256,
        job.recipe.spec_hash,
        *(file.sha256 for file in job.sealed.base),
    }
    assert not any(b"clear" in path.read_bytes() for path in home.folder.rglob("*") if path.is_file())
    assert {entry.job for entry in home.cache.room.entries()} == {job.id}

    home.cache.forget(job.id)

    assert home.cache.room.entries() == []
    assert not any(job.id in str(path) for path in home.folder.rglob("*"))


def test_a_sealed_base_without_a_key_is_told(town: Town, home: Home) -> None:
    job = town.publish_sealed(rounds=1, shards=1, base=True)
    home.lease(job)

    assert failure(home.open, job).code == "key.invalid"


def test_a_block_that_was_tampered_with_is_fetched_again(town: Town, home: Home) -> None:
    job = town.publish_sealed(rounds=1, shards=1)
    lease = home.lease(job)
    client = home.person.client()
    home.clients.append(client)

    def bring() -> Path:
        (path,) = sealed_files(home.cache, client, job.id, job.recipe, 1, lease["shard"], held_out=False).values()
        return path

    right = bring().read_bytes()
    bring().write_bytes(b"x")

    assert bring().read_bytes() == right
    assert len(home.told("damaged")) == 1


def test_a_job_that_is_not_sealed_has_no_sealed_files(town: Town, home: Home) -> None:
    job = publish(town)

    assert sealed_files(home.cache, home.person.client(), job.id, job.recipe, 1, 0, held_out=True) == {}


def named(name: str, data: bytes, path: str | None = None) -> FileRef:
    return ref(name, data).model_copy(update={"path": path or name})
