"""Sealing a private job on the owner's machine: ciphertexts and their keys, and who is given the keys."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainchain.cli import wiring
from trainchain.core import seal
from trainchain.core.errors import TrainChainError

if TYPE_CHECKING:
    from trainchain.chain.escrow import ChainClient
    from trainchain.cli.output import Output
    from trainchain.cli.plan import Plan
    from trainchain.core.client import HubClient
    from trainchain.core.models import FileRef
    from trainchain.core.settings import Settings

NOTE_FILE = "sealed.json"


@dataclass(frozen=True)
class Holder:
    """A hub that keeps keys: its address and its exchange key, which its wallet has signed."""

    address: str
    public: str


def key_holder(plan: Plan, client: HubClient, chain: ChainClient, settings: Settings, own_hub: str | None) -> Holder:
    """The hub as the keeper of a job's keys. Raises `key.invalid` unless its wallet signed its exchange key, and
    `access.not_your_hub` where the recipe wants a hub of the owner's own and nothing says that this is one."""
    from trainchain.chain import eip712

    if own_hub is not None and not re.fullmatch("0x[0-9a-fA-F]{40}", own_hub):
        raise TrainChainError(
            "usage.flag",
            f"--own-hub is {own_hub[:60]!r}, which is no wallet's address.",
            hint="Write the address that serve-hub prints when it starts: 0x and 40 hex digits.",
        )
    told = client.info()
    hub, exchange = str(told["chain"]["hub"]), told.get("exchange")
    exchange = exchange if isinstance(exchange, dict) else {}
    public, signature = str(exchange.get("public_key", "")), str(exchange.get("signature", ""))
    try:
        signer = eip712.recover(chain.domain, "ExchangeKey", {"account": hub, "publicKey": "0x" + public}, signature)
    except TrainChainError:
        signer = ""
    if signer.lower() != hub.lower():
        raise TrainChainError(
            "key.invalid", f"The hub {client.url} shows no exchange key that its wallet {hub} has signed."
        )
    if plan.keys == "owner" and hub.lower() not in {
        own_hub and own_hub.lower(),
        wiring.address_in(settings.home / "hub-wallet.json"),
    }:
        if own_hub is not None:
            raise TrainChainError(
                "access.not_your_hub",
                f"The hub at {client.url} is {hub}, not {own_hub}, which --own-hub says is yours.",
                hint="Check --hub and --own-hub: the keys would go to another hub.",
            )
        raise TrainChainError(
            "access.not_your_hub",
            f"The recipe has `access: {{keys: owner}}`, and nothing here says that the hub {hub} is yours.",
            hint=f"If you run it, add --own-hub {hub}; to trust it with the keys, write `keys: hub`.",
        )
    return Holder(hub, public)


def sealed(plan: Plan, settings: Settings, out: Output) -> Plan:
    """The plan as a private job: every block of rows, the held-out rows, and the owner's own model files encrypted.

    What an interrupted call has sealed is used again, so that the same job comes of it.
    """
    from trainchain.core.models import Access, Base, Sealed

    open_recipe = plan.resolved
    folder = _folder(plan, settings)
    found = _remembered(folder)
    if found is None:
        try:
            found = _seal(plan, folder)
        except BaseException:  # without its note it would be of no use to the next call
            shutil.rmtree(folder, ignore_errors=True)
            raise
    size = sum(ref.size for ref in found.refs.files())
    out.note(f"sealed   {len(found.refs.files())} files, {size / 1e6:.1f} MB, each under a key of its own")
    assert isinstance(found.refs, Sealed)
    local = open_recipe.base_model.source is None
    held_out = open_recipe.held_out
    hidden = {"source": None, "file": None}
    recipe = open_recipe.model_copy(
        update={
            "access": Access(workers=open_recipe.access.workers, keys=plan.keys),
            "sealed": found.refs,
            "base_model": Base(source=None, license=open_recipe.base_model.license, files=[])
            if local
            else open_recipe.base_model,
            "datasets": [data.model_copy(update=hidden) for data in open_recipe.datasets],
            "held_out": held_out
            and held_out.model_copy(update={"dataset": held_out.dataset.model_copy(update=hidden)}),
        }
    )
    files = {ref.sha256: folder / ref.sha256 for ref in found.refs.files()}
    return replace(plan, resolved=recipe, files={**plan.files, **files}, identities=found.identities)


@dataclass(frozen=True)
class _Found:
    refs: Any
    identities: dict[str, str]


def _folder(plan: Plan, settings: Settings) -> Path:
    # Named by what is sealed: the open recipe, whether the plan is it still or sealed already.
    return settings.home / "submissions" / f"sealed-{plan.open_hash}"


def _remembered(folder: Path) -> _Found | None:
    """What an interrupted call has sealed, if all of it is there and whole."""
    from trainchain.core.digests import sha256_file
    from trainchain.core.models import Sealed

    try:
        note = json.loads((folder / NOTE_FILE).read_bytes())
        refs = Sealed.model_validate(note["sealed"], strict=True)
        whole = all(sha256_file(folder / ref.sha256) == ref.sha256 for ref in refs.files())
        return _Found(refs, dict(note["identities"])) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _seal(plan: Plan, folder: Path) -> _Found:
    from trainchain.core.models import Sealed
    from trainchain.core.settings import private_folder, write_private
    from trainchain.core.train.blocks import blocks_of

    shutil.rmtree(folder, ignore_errors=True)
    private_folder(folder.parent)
    private_folder(folder)
    identities: dict[str, str] = {}

    def one(name: str, plain: Path | bytes) -> FileRef:
        from trainchain.core.digests import sha256_file
        from trainchain.core.models import FileRef

        identity, draft = seal.new_identity(), folder / "draft"
        seal.seal(plain, draft, identity)
        ref = FileRef(name=name, sha256=sha256_file(draft), size=draft.stat().st_size)
        draft.replace(folder / ref.sha256)
        identities[ref.sha256] = identity
        return ref

    recipe = plan.resolved
    made = blocks_of(plan.model_dir, plan.files, recipe, cache=plan.tokens)
    blocks = [
        [one(f"block-{row}-{shard}.age", made.block(row, shard)) for shard in range(recipe.all_shards)]
        for row in range(1, recipe.rounds + 1)
    ]
    base: Iterable[FileRef] = recipe.base_model.files if recipe.base_model.source is None else []
    refs = Sealed(
        blocks=blocks,
        held_out=one("held-out.age", made.held_out()) if recipe.held_out else None,
        base=[one(ref.name, plan.files[ref.sha256]) for ref in base],
    )
    note = {"sealed": refs.model_dump(mode="json"), "identities": identities}
    write_private(folder / NOTE_FILE, json.dumps(note).encode())
    return _Found(refs, identities)


def wrapped(plan: Plan, holder: Holder, chain: ChainClient, job_id: str) -> dict[str, str]:
    """Every file's key, wrapped for the hub that keeps it."""
    return {
        digest: seal.wrap(identity, holder.public, seal.for_hub(chain.chain_id, job_id, digest, holder.address))
        for digest, identity in plan.identities.items()
    }


def forget(plan: Plan, settings: Settings) -> None:
    """Remove ciphertexts and keys from this machine: the hub has them."""
    shutil.rmtree(_folder(plan, settings), ignore_errors=True)
