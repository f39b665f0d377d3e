"""A small job published openly and the same job sealed: its ciphertexts, and the keys to them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainchain.core import seal
from trainchain.core.digests import sha256_file
from trainchain.core.models import Access, Base, FileRef, ResolvedRecipe, Sealed
from trainchain.core.train.blocks import Blocks, blocks_of


@dataclass(frozen=True)
class SealedJob:
    """`recipe` is the sealed one, `plain` makes the blocks' plain text."""

    recipe: ResolvedRecipe
    plain: Blocks
    folder: Path
    identities: dict[str, str] = field(repr=False)

    def request(self, ref: FileRef | None) -> dict[str, Any]:
        """A sealed file as a request to the training child names it."""
        assert ref is not None
        return {"path": str(self.folder / ref.sha256), "identity": self.identities[ref.sha256]}

    def block(self, round: int, shard: int) -> dict[str, Any]:
        sealed = self.recipe.sealed
        assert sealed is not None
        return self.request(sealed.blocks[round - 1][shard])

    def unseal(self, folder: Path) -> dict[str, Any]:
        sealed = self.recipe.sealed
        assert sealed is not None
        return {"folder": str(folder), "files": [{"name": ref.name, **self.request(ref)} for ref in sealed.base]}


def seal_job(recipe: ResolvedRecipe, model: Path, files: dict[str, Path], folder: Path) -> SealedJob:
    """Seal an open job whose base is the owner's own."""
    folder.mkdir()
    identities: dict[str, str] = {}

    def sealed(name: str, plain: Path | bytes) -> FileRef:
        identity, draft = seal.new_identity(), folder / "draft"
        seal.seal(plain, draft, identity)
        ref = FileRef(name=name, sha256=sha256_file(draft), size=draft.stat().st_size)
        draft.replace(folder / ref.sha256)
        identities[ref.sha256] = identity
        return ref

    made = blocks_of(model, files, recipe)
    blocks: list[list[FileRef]] = [[] for _ in range(recipe.rounds)]
    for round, shard, text in made:
        blocks[round - 1].append(sealed(f"block-{round}-{shard}.age", text))
    held_out = recipe.held_out
    refs = Sealed(
        blocks=blocks,
        held_out=sealed("held-out.age", made.held_out()) if held_out else None,
        base=[sealed(ref.name, model / ref.name) for ref in recipe.base_model.files],
    )
    hidden = {"source": None, "file": None}
    data = held_out and held_out.dataset.model_copy(update=hidden)
    private = recipe.model_copy(
        update={
            "access": Access(workers="owner", keys="owner"),
            "sealed": refs,
            "base_model": Base(source=None, license=None, files=[]),
            "datasets": [entry.model_copy(update=hidden) for entry in recipe.datasets],
            "held_out": held_out and held_out.model_copy(update={"dataset": data}),
        }
    )
    return SealedJob(private, made, folder, identities)
