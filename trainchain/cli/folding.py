"""`pull --merged`: the base with the adapter folded in, as a folder that needs neither PEFT nor TrainChain."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainchain.cli import delivery
from trainchain.cli.bring import FOLDING, scratch
from trainchain.core.errors import TrainChainError

if TYPE_CHECKING:
    from trainchain.core.client import HubClient
    from trainchain.core.models import FileRef, ResolvedRecipe
    from trainchain.core.worker.cache import Cache

SLOT = "folding"
MEMORY = 2.3
"""Times the weights: the most that was measured, the mapped files of the base included."""
OTHER_DISK = "Free some, or name a folder on another disk with -o."
Note = Callable[[str], None]


def fetch_merged(
    client: HubClient,
    cache: Cache,
    job_id: str,
    target: Path | None,
    *,
    note: Note,
    base: Path | None = None,
    round_: int | None = None,
) -> dict[str, Any]:
    """Write the folded model of a round (default: the last merged one) into a new folder, whole or not at all.

    `base` is a folder that holds the base here; without it the base is brought from where its job's workers had it.
    """
    from trainchain.core.adapter import TEMPLATE_FILE, read_adapter
    from trainchain.core.card import CARD_FILE, card
    from trainchain.core.worker.room import full_disk

    found = delivery.look(client, job_id, round_)
    recipe = found.recipe
    target = target or Path(f"{recipe.name}-merged")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TrainChainError("usage.flag", f"{target} exists and is not empty.", hint="Name another folder with -o.")
    if target.is_symlink() or os.path.ismount(target) or (target.exists() and target.samefile(Path.cwd())):
        raise TrainChainError(
            "usage.flag",
            f"{target} is a link, a disk of its own or the folder that you are in, so it cannot be put in place whole.",
            hint=f"Name a new folder in it: -o {target / f'{recipe.name}-merged'}",
        )
    told = delivery.chain_told(client)
    with _base(client, cache, recipe, base, note) as folder:
        _room(folder, target.absolute().parent, note)
        adapter = read_adapter(client.object(str(found.round.adapter), cap=delivery.MAX_ADAPTER))
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        making = scratch(target.absolute().parent, f".{target.name}{FOLDING}")
        try:
            making.chmod(0o755)
            with full_disk(target.absolute().parent, "the folded model was written", hint=OTHER_DISK):
                dtype = _fold(folder, adapter, recipe, making)
                if recipe.chat_template is not None:
                    (making / TEMPLATE_FILE).write_text(recipe.chat_template, encoding="utf-8", newline="")
                text = card(recipe, found.history, told, found.number, folded=dtype)
                (making / CARD_FILE).write_text(text, encoding="utf-8", newline="\n")
            if target.exists():
                target.rmdir()
            making.rename(target)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return {
        "folder": str(target),
        "job": found.job,
        "name": recipe.name,
        "spec_hash": recipe.spec_hash,
        "round": found.number,
        "adapter": found.round.adapter,
        "loss": found.history.loss(found.number),
        "dtype": dtype,
    }


def _fold(folder: Path, adapter: Any, recipe: ResolvedRecipe, target: Path) -> str:
    from trainchain.cli.plan import hush

    hush()
    from trainchain.core.train.fold import fold

    return fold(folder, adapter, recipe.lora, target)


@contextlib.contextmanager
def _base(client: HubClient, cache: Cache, recipe: ResolvedRecipe, base: Path | None, note: Note) -> Iterator[Path]:
    """The base's folder, as long as it is needed: the one that was named, or its files from hub or source."""
    files, source = recipe.base_model.files, recipe.base_model.source
    if base is not None:
        _check_base(base, recipe, note)
        yield base
        return
    if not files:
        raise TrainChainError(
            "usage.flag",
            f"The base of {recipe.name} is private: no source and no hub gives it out in clear.",
            hint="--base DIR names the folder of the base on this machine.",
        )
    note(f"base     {len(files)} files, {_gb(sum(ref.size for ref in files))}, from {source or 'the hub'}")
    cache.hold(SLOT, {ref.sha256: ref.size for ref in files})
    try:
        folder = scratch(cache.folder, FOLDING)
        try:
            for ref in files:
                path = cache.file(source, ref) if source else _from_hub(client, cache, ref)
                _link(path, folder / ref.name)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        cache.let_go(SLOT)


def _from_hub(client: HubClient, cache: Cache, ref: FileRef) -> Path:
    try:
        return cache.object(client, ref.sha256, ref.size)
    except TrainChainError as error:
        if error.code not in ("session.required", "object.unknown"):
            raise
        raise TrainChainError(
            error.code,
            f"The hub gives the base's files (here {ref.name}) to the job's owner and its workers alone.",
            hint="--home DIR names the owner's home; --base DIR the folder of the base, if you have it.",
        ) from None


def _check_base(base: Path, recipe: ResolvedRecipe, note: Note) -> None:
    """A folder that was named must hold the job's own files, where the job names them."""
    from trainchain.core.digests import sha256_file

    if not base.is_dir():
        raise TrainChainError("source.missing", f"--base: {base} is not a folder.", hint="Check the path.")
    if not recipe.base_model.files:
        note(
            "base     the job does not name its private base's files: only names and shapes of its weights are checked"
        )
    for ref in recipe.base_model.files:
        path = base / ref.name
        if not path.is_file() or path.stat().st_size != ref.size or sha256_file(path) != ref.sha256:
            what = "is not the file that the job was trained on" if path.is_file() else "is missing"
            raise TrainChainError(
                "source.changed", f"--base: {path} {what} (sha256 {ref.sha256}).", hint="Leave --base out to fetch it."
            )


def _room(base: Path, parent: Path, note: Note) -> None:
    """Say what folding takes, and refuse before it where the disk has no room."""
    sizes = [path.stat().st_size for path in base.iterdir() if path.suffix == ".safetensors"]
    needed = sum(sizes)
    note(f"folding  takes about {_gb(needed * MEMORY)} of memory and {_gb(needed)} of disk")
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise TrainChainError(
            "disk.full",
            f"The folded model takes {_gb(needed)}, and the disk of {existing} has {_gb(free)} free.",
            hint=OTHER_DISK,
        )


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _gb(size: float) -> str:
    from trainchain.core.settings import show_size

    return show_size(round(size))
