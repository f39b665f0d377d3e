"""The worker's copy of a job's files: fetched by digest, hashed by us before every use, laid out for the trainer."""

import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainchain.core.client import HubClient
from trainchain.core.digests import canonical_json, sha256, sha256_file
from trainchain.core.errors import TrainChainError
from trainchain.core.models import FileRef, ResolvedRecipe, parse
from trainchain.core.settings import private_folder


@dataclass(frozen=True)
class JobFiles:
    """Where a job's files lie on this machine: the base as a model folder, data by digest."""

    recipe: ResolvedRecipe
    recipe_path: Path
    model_dir: Path
    data: dict[str, Path]

    def for_child(self) -> dict[str, Any]:
        """The places as the training child's `open` names them."""
        return {
            "recipe": str(self.recipe_path),
            "model_dir": str(self.model_dir),
            "data": {digest: str(path) for digest, path in self.data.items()},
        }


class Cache:
    """One folder of objects named by digest; nothing in it is used before its hash was checked again."""

    def __init__(self, folder: Path) -> None:
        self.folder = private_folder(folder)
        self.tokens = private_folder(folder / "tokens")
        """Where training children keep a job's tokenised data."""
        self._checked: set[str] = set()

    def object(self, client: HubClient, digest: str, size: int | None = None) -> Path:
        """The path of an object, fetched if it is not here or not what it should be."""
        path = self.folder / "objects" / digest[:2] / digest[2:]
        private_folder(path.parent)
        if digest in self._checked and path.exists():
            return path
        if not path.exists() or sha256_file(path) != digest:
            client.download(digest, path, size=size)
        self._checked.add(digest)
        return path

    def job(self, client: HubClient, job_id: str, spec_hash: str, *, held_out: bool) -> JobFiles:
        """What a lease of a job needs; held-out data only to measure with, since nobody else is given it.

        Raises `object.digest` where the hub's recipe is not the one in escrow.
        """
        path = self.object(client, spec_hash)
        recipe = parse(ResolvedRecipe, path.read_bytes(), code="job.invalid", what=f"The recipe of {job_id}")
        if recipe.spec_hash != spec_hash:
            raise TrainChainError("object.digest", f"The recipe of {job_id} is not in its canonical form.")
        files = [dataset.file for dataset in recipe.datasets if dataset.file]
        if held_out and recipe.held_out is not None and recipe.held_out.dataset.file:
            files.append(recipe.held_out.dataset.file)
        data = {ref.sha256: self.object(client, ref.sha256, ref.size) for ref in files}
        return JobFiles(recipe, path, self._model(client, recipe.base_model.files), data)

    def _model(self, client: HubClient, files: list[FileRef]) -> Path:
        """A folder that holds the base's files under their names and nothing else."""
        name = sha256(canonical_json([ref.model_dump() for ref in files]))
        folder = self.folder / "models" / name
        sources = [(ref, self.object(client, ref.sha256, ref.size)) for ref in files]
        if not folder.exists():
            making = private_folder(self.folder / "models" / f".{name}.{os.getpid()}.{threading.get_ident()}")
            for ref, source in sources:
                _link(source, making / ref.name)
            try:
                making.rename(folder)
            except OSError:  # another worker of this home was first
                shutil.rmtree(making)
        return folder


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
