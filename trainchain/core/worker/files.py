"""A job's files on the worker: fetched into its cache, hashed there, and laid out for the trainer.

Base and data come from the source that the recipe pins, with the worker's own token, or from the hub. A private job
has a cache of its own, and of sealed files only the ciphertexts lie there.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainchain.core.client import HubClient
from trainchain.core.digests import canonical_json, sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.models import FileRef, ResolvedRecipe, parse
from trainchain.core.settings import private_folder
from trainchain.core.sources.found import missing_shards
from trainchain.core.worker.cache import LAST, Cache, odd_file
from trainchain.core.worker.room import FOLDERS, delete, full_disk

JOB, LEASE, MODEL = "job", "lease", "model"
"""What a worker uses: while a job is open; for the present lease; while a model folder is made of no hard links."""
INDEX = ".safetensors.index.json"
LARGEST_INDEX = 64 << 20


class Clear(NamedTuple):
    """How a worker opens a sealed base: whoever gives it removes the folder when the job is closed."""

    folder: Callable[[int], Path]
    """A new empty folder of this user alone, with room for so many bytes."""
    unseal: Callable[[FileRef, Path, Path], None]
    """(what it is, the ciphertext, where to put what it holds)."""


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


def job_files(
    cache: Cache,
    client: HubClient,
    job_id: str,
    spec_hash: str,
    *,
    held_out: bool,
    clear: Clear | None = None,
    admit: Callable[[ResolvedRecipe], None] = lambda recipe: None,
) -> JobFiles:
    """What it takes to open a job; held-out data only to measure with, since nobody else is given it.

    Every byte is hashed now, so call this once for each time the job is opened. `clear` is used where the base is
    sealed; `admit` sees the recipe before anything else is fetched. The files are in use until the next job's. Raises
    `object.digest` where the hub's recipe is not the one in escrow, `source.incomplete` where a model's index names
    files that the job has not, and what `Cache.object`, `Cache.file`, `Cache.hold` and `admit` raise.
    """
    known = cache.private(job_id) if job_id in cache.private_jobs() else cache
    data = known.read(spec_hash) or client.object(spec_hash)
    recipe = parse(ResolvedRecipe, data, code="job.invalid", what=f"The recipe of {job_id}")
    if recipe.spec_hash != spec_hash:
        raise TrainChainError("object.digest", f"The recipe of {job_id} is not in its canonical form.")
    admit(recipe)
    place = cache.private(job_id) if recipe.private else cache
    sealed = recipe.sealed.base if recipe.sealed else []
    base = recipe.base_model.files
    _check_names(job_id, [*base, *sealed])
    sets = [*recipe.datasets, *([recipe.held_out.dataset] if held_out and recipe.held_out else [])]
    rows = [(entry.source, entry.file) for entry in sets if entry.file is not None]
    sizes = {ref.sha256: ref.size for ref in (*base, *sealed, *(ref for _, ref in rows))}
    cache.let_go(LAST, LEASE, MODEL)
    place.hold(JOB, sizes | {spec_hash: len(data)}, models={} if sealed else {_folder_name(base): 0})

    def bring(source: str | None, ref: FileRef) -> Path:
        belongs = f"{ref.name} of {source or recipe.name}"
        if source is None:
            return place.object(client, ref.sha256, ref.size, belongs=belongs)
        return place.file(source, ref, belongs=belongs)

    path = place.keep(spec_hash, data, belongs=f"recipe of {recipe.name}")
    source = recipe.base_model.source
    for ref in base:
        bring(source, ref)
    if sealed:
        parts = {ref.name: bring(None, ref) for ref in sealed}
        folder = _clear_folder(job_id, sealed, parts, clear)
    else:
        folder = model_folder(place, base, belongs=f"model {source or 'of ' + recipe.name}")
    _check_index(folder)
    return JobFiles(recipe, path, folder, {ref.sha256: bring(source, ref) for source, ref in rows})


def sealed_files(
    cache: Cache,
    client: HubClient,
    job_id: str,
    recipe: ResolvedRecipe,
    round_: int,
    shard: int | None,
    *,
    held_out: bool,
) -> dict[str, Path]:
    """The ciphertexts of one lease of a sealed job by their digests, in its private cache, hashed just now.

    The block of `shard`, if one is named, and the held-out data to measure with. They are in use until the next lease.
    """
    if recipe.sealed is None:
        return {}
    refs = [] if shard is None else [recipe.sealed.blocks[round_ - 1][shard]]
    refs += [recipe.sealed.held_out] if held_out and recipe.sealed.held_out else []
    place = cache.private(job_id)
    place.hold(LEASE, {ref.sha256: ref.size for ref in refs})
    return {
        ref.sha256: place.object(client, ref.sha256, ref.size, belongs=f"{ref.name} of {recipe.name}") for ref in refs
    }


def model_folder(cache: Cache, files: Sequence[FileRef], *, belongs: str) -> Path:
    """A folder with the objects of `files` under their names and nothing else, links to them where the disk can.

    Looked through on every use: where anything was put in, taken out or exchanged, it is made anew.
    """
    name = _folder_name(files)
    wanted = {ref.name: ref.sha256 for ref in files}
    folder = cache.folder / FOLDERS["model"] / name
    with cache.lock(name):
        odd = odd_file(cache.folder, name, wanted) if folder.is_dir() else None
        if odd is not None:
            cache.tell("damaged", name=odd, where=f"the model folder {folder}", digest=wanted.get(odd), found="another")
        if odd is not None or not folder.is_dir():

            def put(target: Path) -> None:
                source = _object(cache, wanted[target.name])
                try:
                    target.hardlink_to(source)
                except OSError:  # a disk without links
                    cache.hold(MODEL, {}, models={name: sum(ref.size for ref in files)})
                    shutil.copyfile(source, target)

            _make(cache, folder, list(wanted), put)
            cache.note(name, {"belongs": belongs, "files": wanted})
        cache.touch(folder)
    return folder


def _clear_folder(job_id: str, files: Sequence[FileRef], parts: Mapping[str, Path], clear: Clear | None) -> Path:
    """A sealed base as it is, in a folder of the caller's, made anew each time: nothing else says what it was."""
    if clear is None:
        raise TrainChainError("key.invalid", f"The base model of {job_id} is sealed, and there is no key for it.")
    folder = clear.folder(sum(ref.size for ref in files))
    try:
        with full_disk(folder, "the base model was opened"):
            for ref in files:
                clear.unseal(ref, parts[ref.name], folder / ref.name)
    except BaseException:
        delete(folder)
        raise
    return folder


def _make(cache: Cache, folder: Path, names: Sequence[str], put: Callable[[Path], None]) -> None:
    """Put the files into a new folder, and that in the place of `folder`. Called under the folder's lock."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        delete(left)
    making = private_folder(private_folder(folder.parent) / f".{folder.name}.{os.urandom(4).hex()}")
    try:
        with full_disk(folder, "its files were laid out"):
            for name in names:
                put(making / name)
        delete(folder)
        making.rename(folder)
    finally:
        delete(making)


def _folder_name(files: Sequence[FileRef]) -> str:
    return sha256(canonical_json([[ref.name, ref.sha256] for ref in files]))


def _object(cache: Cache, digest: str) -> Path:
    return cache.folder / FOLDERS["object"] / digest[:2] / digest[2:]


def _check_names(job_id: str, files: Sequence[FileRef]) -> None:
    """No two files of a model may be one on any disk, as `A` and `a` are on some."""
    seen: dict[str, str] = {}
    for ref in files:
        if (other := seen.get(ref.name.casefold())) is not None:
            raise TrainChainError("job.invalid", f"The base model of {job_id} has both {other!r} and {ref.name!r}.")
        seen[ref.name.casefold()] = ref.name


def _check_index(folder: Path) -> None:
    """Raises `source.incomplete` where the index of the model's shards names one that is not there."""
    for path in sorted(folder.glob(f"*{INDEX}")):
        try:
            index = json.loads(path.read_bytes()) if path.stat().st_size <= LARGEST_INDEX else None
        except (ValueError, RecursionError):
            index = None
        if missing := missing_shards(index, [there.name for there in folder.iterdir()]):
            more = f", nor are {len(missing) - 1} more" if len(missing) > 1 else ""
            raise TrainChainError(
                "source.incomplete",
                f"The model's {path.name} names {missing[0][:200]!r}, which is not among the job's files{more}.",
                hint="The job was published with a part of its model; its owner has to publish it again.",
            )
