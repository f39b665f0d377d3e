"""What comes back to the owner: the merged adapter as a folder; with card and audit bundle, on a model hub."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainchain.cli import wiring
from trainchain.core.errors import TrainChainError

if TYPE_CHECKING:
    from trainchain.cli.output import Output
    from trainchain.core.bundle import Checks
    from trainchain.core.client import HubClient
    from trainchain.core.history import Accepted, Chain, History, ToldAudit, ToldRound
    from trainchain.core.models import ResolvedRecipe
    from trainchain.core.recount import Leaves
    from trainchain.core.settings import Settings

ENDED = ("finished", "settled", "closed", "expired", "cancelled")
MAX_ADAPTER = 1 << 34
PULLED = "trainchain.json"
"""Stands in every folder that was pulled."""
PULLING = ".pulling-"
Document = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Merged:
    """A job and one of its merged rounds, as its hub tells of them and as its recipe pins them."""

    job: str
    recipe: ResolvedRecipe
    history: History
    round: ToldRound

    @property
    def number(self) -> int:
        return self.round.round


def as_reader(settings: Settings, out: Output, action: Callable[[HubClient], T]) -> T:
    """Do something with the hub as nobody, and where it asks who that is, as this home's wallet.

    So a public job asks for no password; only its owner and its workers get a private one's adapter.
    """
    try:
        with contextlib.closing(wiring.hub_client(settings)) as nobody:
            return action(nobody)
    except TrainChainError as error:
        if error.code != "session.required":
            raise
        if not settings.wallet_path.exists():
            raise TrainChainError(
                error.code,
                "That is for the job's owner and workers alone, and there is no wallet in this home.",
                hint="--home DIR names the home from which the job was submitted.",
            ) from None
    with contextlib.closing(wiring.signed_client(settings, out)[0]) as client:
        return action(client)


def job_named(settings: Settings, name: str) -> str:
    """The full id behind what was typed for a job; see `wiring.job_id_of`."""
    with contextlib.closing(wiring.hub_client(settings)) as client:
        return wiring.job_id_of(client, settings, name)


def look(client: HubClient, job_id: str, round_: int | None) -> Merged:
    """The round whose adapter is asked for (default: the last merged). Raises `job.not_ready` where there is none."""
    from trainchain.core.history import read_history
    from trainchain.core.models import ResolvedRecipe, parse

    view = client.get(f"/v1/jobs/{job_id}", signed=client.address is not None)
    text = client.object(str(view.get("spec_hash")))
    recipe = parse(ResolvedRecipe, text, code="job.invalid", what=f"The recipe of {job_id}")
    history = read_history(view, recipe)
    merged = [row for row in history.merged() if round_ in (None, row.round)]
    if not merged:
        what = "no round is merged yet" if round_ is None else f"round {round_} is not merged"
        raise TrainChainError(
            "job.not_ready", f"Job {job_id[:12]} has no adapter to pull: {what}.", hint=f"trainchain jobs show {job_id}"
        )
    return Merged(history.job, recipe, history, merged[-1])


def fetch(client: HubClient, job_id: str, target: Path | None, *, round_: int | None = None) -> Document:
    """Write the merged adapter of a round (default: the last merged one) as a standard PEFT folder."""
    found = look(client, job_id, round_)
    target = target or Path(f"{found.recipe.name}-lora")
    taken = target.exists() and (
        not target.is_dir() or any(not path.name.startswith(PULLING) for path in target.iterdir())
    )
    if taken and not (target / PULLED).exists():
        raise TrainChainError("usage.flag", f"{target} exists and is not empty.", hint="Name another folder with -o.")
    recipe, history = found.recipe, found.history
    answers = next((row.samples for row in history.evaluations if row.round == found.number), None)
    facts = {
        "job": found.job,
        "name": recipe.name,
        "spec_hash": recipe.spec_hash,
        "round": found.number,
        "adapter": found.round.adapter,
        "loss": history.loss(found.number),
        "samples": [
            {"prompt": prompt, "answer": answer} for prompt, answer in zip(recipe.samples, answers or [], strict=False)
        ],
        "base_model": [ref.model_dump() for ref in recipe.base_model.files],
    }
    with _put_into(target) as making:
        _write_adapter(client, found, making)
        (making / PULLED).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8", newline="\n")
    return {"folder": str(target), **facts}


@contextlib.contextmanager
def _put_into(target: Path) -> Iterator[Path]:
    """A folder whose files are moved into `target` once all of them are there; after a failure nothing is left."""
    from trainchain.core.adapter import TEMPLATE_FILE
    from trainchain.core.worker.room import full_disk

    fresh = not target.exists()
    with full_disk(target, "the adapter was written", hint="Free some, or name a folder on another disk with -o."):
        target.mkdir(parents=True, exist_ok=True)
        for left in target.glob(f"{PULLING}*"):
            shutil.rmtree(left, ignore_errors=True)
        making = Path(tempfile.mkdtemp(prefix=PULLING, dir=target))
        try:
            yield making
            if not (making / TEMPLATE_FILE).exists():  # an adapter that lay here may have had one
                (target / TEMPLATE_FILE).unlink(missing_ok=True)
            for path in making.iterdir():
                path.replace(target / path.name)
        finally:
            shutil.rmtree(making, ignore_errors=True)
            if fresh:
                with contextlib.suppress(OSError):  # it is not empty where all went well
                    target.rmdir()


def assemble(client: HubClient, found: Merged, folder: Path, *, where: str | None) -> list[Document]:
    """Write what is published of an adapter: PEFT's two files, the card, the audit bundle. Returns path, size, sha256.

    The same for the same job, round and settlements. `where` is the repository that it is to be read in.
    """
    from trainchain.core.bundle import FOLDER, bundle_files
    from trainchain.core.card import CARD_FILE, card
    from trainchain.core.digests import sha256_file

    told = chain_told(client)
    rows = _covered(client, found)
    leaves = {row.leaves: client.object(row.leaves) for row in found.history.settled(found.number)}
    _write_adapter(client, found, folder)
    text = card(found.recipe, found.history, told, found.number, where=where)
    (folder / CARD_FILE).write_text(text, encoding="utf-8", newline="\n")
    (folder / FOLDER).mkdir()
    bundle = bundle_files(found.recipe, found.history, told, found.number, rows, leaves, _audits_of(client, found))
    for name, data in bundle.items():
        (folder / FOLDER / name).write_bytes(data)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {"path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    ]


def push(
    client: HubClient,
    job_id: str,
    target: str | None,
    *,
    note: Callable[[str], None],
    round_: int | None = None,
    public: bool = False,
) -> Document:
    """Publish the adapter of a job that has ended, or of a merged round, where `target` or the recipe says.

    The same again writes nothing there. Raises TrainChainError: job.not_ready, source.*, push.conflict; the adapter on
    the hub is what it was.
    """
    from trainchain.core.sources.address import HubAddress, Local, parse
    from trainchain.core.sources.table import source_of
    from trainchain.core.worker.room import full_disk

    # What is wrong with the target is said before anything is asked for.
    address = parse(target, "target") if target is not None else None
    found = look(client, job_id, round_)
    if round_ is None and found.history.state not in ENDED:
        raise TrainChainError(
            "job.not_ready",
            f"Job {job_id[:12]} is still being trained; the last merged round is {found.number}.",
            hint=f"--round {found.number} pushes that round's adapter.",
        )
    if address is None:
        if found.recipe.hub_model_id is None:
            raise TrainChainError(
                "usage.flag",
                f"Job {job_id[:12]} names no hub_model_id, so where to is not known.",
                hint=f"trainchain push {job_id[:12]} hf://you/{found.recipe.name}",
            )
        address = parse(found.recipe.hub_model_id, "target")
    assert not isinstance(address, Local)
    where = address.repo if isinstance(address, HubAddress) else None
    with tempfile.TemporaryDirectory(prefix="trainchain-push-") as scratch:
        with full_disk(Path(scratch), "the adapter was laid out", hint="Free some, or name another disk with TMPDIR."):
            files = assemble(client, found, Path(scratch), where=where)
        note(f"pushing  round {found.number} of {found.recipe.name} to {address.text}: {_listed(files)}")
        note("         trainchain/recipe.json is the whole recipe, with its sample prompts and who was paid")
        if found.recipe.private:
            note("         the job is private: who can read the target can read that, and use the adapter")
        message = f"Round {found.number} of TrainChain job {found.job[:12]}"
        pushed = source_of(address).push(Path(scratch), address, message=message, private=not public)
    return {
        "url": pushed.url,
        "commit": pushed.commit,
        "created": pushed.created,
        "target": address.text,
        "job": found.job,
        "round": found.number,
        "files": files,
    }


def verify(folder: str | Path) -> Document:
    """Check the audit bundle of an adapter's folder offline; returns whose it is. Raises what `bundle.check` raises.

    That the spec hash and the roots stand on chain is to be looked up there.
    """
    from trainchain.core.bundle import check

    manifest = check(Path(folder), chain_checks())
    return {
        "job": manifest.job,
        "round": manifest.round,
        "adapter": manifest.adapter,
        "spec_hash": manifest.spec_hash,
        "chain_id": manifest.chain.chain_id,
        "escrow": manifest.chain.escrow,
    }


def chain_told(client: HubClient) -> Chain:
    """What the hub says of the chain that its job's money is on."""
    from trainchain.core.history import Chain
    from trainchain.core.models import parse

    return parse(Chain, client.info()["chain"], code="hub.not_a_hub", what="What the hub says of its chain")


def _write_adapter(client: HubClient, found: Merged, folder: Path) -> None:
    from trainchain.core.adapter import read_adapter, write_peft_folder
    from trainchain.core.card import base_name

    adapter = read_adapter(client.object(str(found.round.adapter), cap=MAX_ADAPTER))
    write_peft_folder(folder, adapter, found.recipe, *base_name(found.recipe))


def contributions(client: HubClient, job_id: str, recipe: ResolvedRecipe) -> list[Accepted]:
    """Every accepted contribution that the hub tells of."""
    from trainchain.core.history import Contributions
    from trainchain.core.models import parse

    rows: list[Accepted] = []
    after: Any = 0
    while after is not None:
        page = client.get(f"/v1/jobs/{job_id}/contributions", signed=client.address is not None, after=after)
        told = parse(Contributions, page, code="hub.not_a_hub", what="What the hub says of the contributions")
        rows += told.contributions
        if len(rows) > recipe.rounds * recipe.all_shards:
            raise TrainChainError("hub.not_a_hub", f"The hub tells of more contributions than job {job_id} has shards.")
        following = page.get("next") if told.contributions else None
        after = following if type(following) is int and following > after else None
    return rows


def _audits_of(client: HubClient, found: Merged) -> list[ToldAudit]:
    """Of a job whose work is not audited nothing is asked."""
    from trainchain.cli.gather import audits

    return audits(client, found.job, found.recipe) if found.recipe.audited else []


def chain_checks() -> Checks:
    """How this chain's signatures and leaves files are read."""
    from trainchain.chain import eip712
    from trainchain.chain.settlement import read_leaves, settle_leaves
    from trainchain.core.bundle import Checks
    from trainchain.core.recount import Leaves
    from trainchain.core.rewards import Terms

    def recover(chain: Chain, kind: str, fields: Any, signature: str) -> str:
        return eip712.recover(eip712.Domain(chain.chain_id, chain.escrow), kind, fields, signature)

    def leaves(data: bytes) -> Leaves:
        read, made = read_leaves(data), settle_leaves(data)
        terms = Terms(read.round, read.ended, read.limit)
        return Leaves(read.job_id, terms, made.root, made.total, read.amounts)

    return Checks(recover, leaves)


def _covered(client: HubClient, found: Merged) -> list[Accepted]:
    """Every accepted contribution that the adapter was made of, or that is paid with its last round."""
    wanted = found.history.covered(found.number)
    rows = [row for row in contributions(client, found.job, found.recipe) if row.which in wanted]
    if {row.which for row in rows} != wanted or len(rows) != len(wanted):
        raise TrainChainError(
            "hub.not_a_hub", f"The hub tells of {len(rows)} contributions, and the job has {len(wanted)} accepted ones."
        )
    return rows


def _listed(files: list[Document]) -> str:
    size = sum(file["size"] for file in files)
    return f"{len(files)} files, {size / 1e6:,.1f} MB"
