from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_model import chat_rows, make_tiny_model, resolve_recipe, write_jsonl
from trainchain.core.adapter import Adapter, read_adapter
from trainchain.core.digests import sha256_file
from trainchain.core.models import ResolvedRecipe
from trainchain.core.train.trainer import Engine


@dataclass
class Job:
    """A resolved job on the tiny model, and where its files are."""

    recipe: ResolvedRecipe
    model: Path
    data: dict[str, Path]
    initial: bytes

    @property
    def start(self) -> Adapter:
        return read_adapter(self.initial)

    def engine(self) -> Engine:
        return Engine(self.recipe, self.model, self.data, threads=1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def make_job(tiny: Path, tmp_path: Path) -> Callable[..., Job]:
    """A job on 24 little chats with 5 held-out ones; options as `resolve_recipe` takes them."""

    def make(model: Path = tiny, **options: Any) -> Job:
        data = write_jsonl(tmp_path / "train.jsonl", chat_rows(24))
        held_out = write_jsonl(tmp_path / "test.jsonl", chat_rows(30)[24:])
        recipe, initial = resolve_recipe(model, data, held_out, **options)
        return Job(recipe, model, {sha256_file(path): path for path in (data, held_out)}, initial)

    return make
