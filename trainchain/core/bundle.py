"""The audit bundle beside an adapter: what anybody needs to recheck who trained it, on what terms, for what pay.

A folder `trainchain/` of plain files, each named with its sha256 in a manifest; later kinds of evidence are more files.
All of it can be checked offline: `check` is told how signatures and settlements are read, as core knows no chain.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from trainchain.core.adapter import CONFIG_FILE, TEMPLATE_FILE, WEIGHTS_FILE, beside_weights
from trainchain.core.card import base_name
from trainchain.core.digests import canonical_json, sha256, sha256_file
from trainchain.core.errors import TrainChainError
from trainchain.core.history import Chain, History, Told
from trainchain.core.models import (
    Address,
    Amount,
    Contribution,
    Count,
    Digest,
    FileName,
    Hash32,
    Model,
    Positive,
    ResolvedRecipe,
    parse,
)
from trainchain.core.rewards import Earned, Terms, recount, shard_reward

FOLDER = "trainchain"
FORMAT: Literal["trainchain.bundle/2"] = "trainchain.bundle/2"
MANIFEST = "manifest.json"
RECIPE = "recipe.json"
CONTRIBUTIONS = "contributions.json"
LOSSES = "losses.json"
SETTLEMENTS = "settlements.json"
README = "README"
TEXT = """The audit bundle of a LoRA adapter that was trained with TrainChain.

recipe.json         what was trained: the resolved recipe; its sha256 is the spec hash that stands in escrow
contributions.json  every accepted contribution: signed by its worker, with the hub's signed receipt
losses.json         each round: its adapters, merge error, held-out loss, answers to the sample prompts
settlements.json    what was settled on chain, and the leaves files that say who was paid how much
manifest.json       job, chain, and the sha256 of each of these files

python -c "from trainchain.cli.delivery import verify; print(verify('..'))" checks it all offline.
"""


class Receipt(Told):
    """The hub's promise to pay, as it was signed."""

    jobId: Hash32
    round: Positive
    shard: Count
    lease: Hash32
    worker: Address
    deltaHash: Hash32
    amount: Amount
    place: Positive
    hub: Address
    chain_id: Positive
    escrow: Address
    signature: Annotated[str, Field(max_length=200)]

    def fields(self) -> dict[str, Any]:
        """What the signature is over."""
        names = ("jobId", "round", "shard", "lease", "worker", "deltaHash", "amount", "place")
        return {name: getattr(self, name) for name in names}


class Accepted(Told):
    """One accepted contribution, as `GET /v1/jobs/{id}/contributions` tells of it."""

    contribution: Contribution
    signature: Annotated[str, Field(max_length=200)]
    losses: Annotated[list[float], Field(default_factory=list)]
    seconds: float = 0.0
    micro_tokens: Annotated[list[Positive], Field(default_factory=list)]
    receipt: Receipt
    merged_in: Positive | None = None

    @property
    def counted(self) -> int:
        """The round that it is settled with: whose merge took it in, or the last one where it came too late for any."""
        return self.merged_in or self.contribution.round

    @property
    def place(self) -> tuple[int, int]:
        return self.contribution.round, self.contribution.shard


class Contributions(Told):
    contributions: list[Accepted]


class Entry(Model):
    sha256: Digest
    size: Count


class Manifest(Model):
    format: Literal["trainchain.bundle/2"]
    job: Hash32
    round: Positive
    """Whose adapter lies beside it."""
    adapter: Digest
    spec_hash: Digest
    chain: Chain
    files: dict[FileName, Entry]


class SettlementEntry(Model):
    round: Count
    root: Hash32
    total: Amount
    tx: Hash32
    leaves: FileName


class Leaves(NamedTuple):
    """What a leaves file says and what it hashes to."""

    job: str
    terms: Terms
    root: str
    total: int
    amounts: Mapping[str, int]


class Checks(NamedTuple):
    """How a chain reads what it signs and settles: `recover(type, fields, signature)` is who signed, and `leaves` a
    leaves file. Both raise TrainChainError for what does not hold."""

    recover: Callable[[Chain, str, Mapping[str, Any], str], str]
    leaves: Callable[[bytes], Leaves]


def bundle_files(
    recipe: ResolvedRecipe,
    history: History,
    chain: Chain,
    round_: int,
    contributions: list[Accepted],
    leaves: Mapping[str, bytes],
) -> dict[str, bytes]:
    """The bundle's files by name, the manifest among them: the same for the same job, round and settlements.

    `leaves` are the leaves files of `history.settled(round_)` by their digests.
    """
    done = history.through(round_)
    rows = [one for one in contributions if one.counted <= round_]
    # What an adapter of private data answers may tell of the data.
    answers = {} if recipe.private else {row.round: row.samples for row in history.evaluations}
    losses: list[dict[str, Any]] = [{"round": 0, "loss": history.loss(0), "samples": answers.get(0)}]
    losses += [
        {
            "round": row.round,
            "start": row.start,
            "adapter": row.adapter,
            "merge_error": row.merge_error,
            "loss": history.loss(row.round),
            "samples": answers.get(row.round),
        }
        for row in done
    ]
    settled = history.settled(round_)
    names = {row.leaves: f"leaves-{row.round}.json" for row in settled}
    settlements = [
        SettlementEntry(round=row.round, root=row.root, total=row.total, tx=row.tx, leaves=names[row.leaves])
        for row in settled
    ]
    files = {
        RECIPE: recipe.canonical(),
        CONTRIBUTIONS: _json({"contributions": [_dump(one) for one in sorted(rows, key=lambda one: one.place)]}),
        LOSSES: _json({"rounds": losses}),
        SETTLEMENTS: _json({"settlements": [_dump(row) for row in settlements]}),
        README: TEXT.encode(),
        **{name: leaves[digest] for digest, name in names.items()},
    }
    manifest = Manifest(
        format=FORMAT,
        job=history.job,
        round=round_,
        adapter=next(row.adapter for row in done if row.round == round_ and row.adapter),
        spec_hash=recipe.spec_hash,
        chain=chain,
        files={name: Entry(sha256=sha256(data), size=len(data)) for name, data in sorted(files.items())},
    )
    return {**files, MANIFEST: _json(_dump(manifest))}


def check(folder: Path, checks: Checks) -> Manifest:
    """Check the bundle of an adapter's folder, offline; returns its manifest.

    Raises TrainChainError naming what does not hold: `object.digest` for bytes that are not those of the manifest,
    `contribution.bad_signature`, `receipt.invalid`, `settlement.mismatch`, `job.invalid` for what cannot be read.
    What only the chain can tell (that spec hash and roots stand there) is the caller's to ask.
    """
    inside = folder / FOLDER
    manifest = parse(Manifest, _read(inside / MANIFEST), code="job.invalid", what=f"{MANIFEST} of the bundle")
    found = {path.name for path in inside.iterdir()} - {MANIFEST}
    if found != set(manifest.files):
        odd = sorted(found ^ set(manifest.files))[0]
        raise TrainChainError("object.digest", f"The bundle's {odd} is not both in its folder and in its manifest.")
    for name, entry in manifest.files.items():
        _same(inside / name, entry.sha256)
    _same(folder / WEIGHTS_FILE, manifest.adapter)
    text = _read(inside / RECIPE)
    recipe = parse(ResolvedRecipe, text, code="job.invalid", what=RECIPE)
    if not recipe.spec_hash == sha256(text) == manifest.spec_hash:
        raise TrainChainError("object.digest", f"{RECIPE} does not have the spec hash {manifest.spec_hash}.")
    _check_layout(folder, recipe)
    told = parse(Contributions, _read(inside / CONTRIBUTIONS), code="job.invalid", what=CONTRIBUTIONS)
    earned = _check_contributions(recipe, manifest, told.contributions, checks)
    _check_settlements(inside, manifest, earned, checks)
    return manifest


def _check_layout(folder: Path, recipe: ResolvedRecipe) -> None:
    """What stands beside the weights decides what is computed with them: scale, base, template."""
    wanted = beside_weights(recipe, *base_name(recipe))
    for name in (CONFIG_FILE, TEMPLATE_FILE):
        path = folder / name
        if (_read(path) if path.exists() else None) != wanted.get(name):
            raise TrainChainError("object.digest", f"{name} is not the one that follows from the recipe.")


def _check_contributions(
    recipe: ResolvedRecipe, manifest: Manifest, rows: list[Accepted], checks: Checks
) -> list[Earned]:
    """Every signature, receipt and reward; returns what was earned."""
    chain = manifest.chain
    earned: list[Earned] = []
    places: set[tuple[str, int]] = set()
    seen: set[tuple[int, int]] = set()
    for row in rows:
        given, receipt, place = row.contribution, row.receipt, row.place
        where = f"round {given.round}, shard {given.shard}"
        inside = given.round <= row.counted <= min(manifest.round, given.round + 1) and given.shard < recipe.all_shards
        if given.jobId != manifest.job or not inside:
            raise TrainChainError("job.invalid", f"{CONTRIBUTIONS}: {where} is not of this job's adapter.")
        if place in seen:
            raise TrainChainError("job.invalid", f"{CONTRIBUTIONS}: {where} stands there twice.")
        seen.add(place)
        signer = checks.recover(chain, "Contribution", given.model_dump(), row.signature)
        if signer.lower() != given.worker.lower():
            raise TrainChainError("contribution.bad_signature", f"{where} is signed by {signer}, not {given.worker}.")
        same = ("jobId", "round", "shard", "lease", "deltaHash")
        signer = checks.recover(chain, "Receipt", receipt.fields(), receipt.signature)
        reward = shard_reward(recipe, given.round, given.shard)
        wrong = None
        if any(getattr(given, name) != getattr(receipt, name) for name in same) or (
            receipt.worker.lower() != given.worker.lower()
        ):
            wrong = "is of another contribution"
        elif (receipt.chain_id, receipt.escrow.lower()) != (chain.chain_id, chain.escrow.lower()):
            wrong = f"is bound to another escrow, {receipt.escrow} on chain {receipt.chain_id}"
        elif signer.lower() != chain.hub.lower():
            wrong = f"is signed by {signer}, not by the hub {chain.hub}"
        elif receipt.amount != reward:
            wrong = f"promises {receipt.amount} and not the {reward} that the recipe gives"
        elif (given.worker.lower(), receipt.place) in places:
            wrong = f"gives place {receipt.place} a second time"
        if wrong:
            raise TrainChainError("receipt.invalid", f"The receipt of {where} {wrong}.")
        places.add((given.worker.lower(), receipt.place))
        earned.append(Earned(*row.place, given.worker.lower(), receipt.place, reward, row.counted))
    return earned


def _check_settlements(inside: Path, manifest: Manifest, earned: Sequence[Earned], checks: Checks) -> None:
    """A settlement up to the adapter's round pays exactly what had vested of what was earned, and so does each that
    follows a job's end; a later one of a job that went on pays no less."""
    told = parse(Settlements, _read(inside / SETTLEMENTS), code="job.invalid", what=SETTLEMENTS)
    terms: list[Terms] = []
    due: dict[str, int] = {}
    for row in sorted(told.settlements, key=lambda row: row.round):
        leaves = checks.leaves(_read(inside / row.leaves))
        pairs = (
            ("job", leaves.job, manifest.job),
            ("round", leaves.terms.number, row.round),
            ("root", leaves.root, row.root),
            ("total", leaves.total, row.total),
        )
        for name, here, there in pairs:
            if here != there:
                raise TrainChainError("settlement.mismatch", f"{row.leaves} has the {name} {here}, not {there}.")
        exact = row.round <= manifest.round or (bool(terms) and terms[-1].ended)
        if exact:
            terms.append(leaves.terms)
            due = recount(earned, terms)[-1]
        paid = {account.lower(): amount for account, amount in leaves.amounts.items()}
        for worker in sorted(set(due) | (set(paid) if exact else set())):
            here, there = paid.get(worker, 0), due.get(worker, 0)
            if here < there or (exact and here != there):
                raise TrainChainError(
                    "settlement.mismatch",
                    f"{row.leaves} pays {worker} {here}; of its contributions {there} had vested.",
                )


class Settlements(Model):
    settlements: list[SettlementEntry]


def _same(path: Path, digest: str) -> None:
    if not path.is_file():
        raise TrainChainError("object.digest", f"{path.name} is missing from the bundle.")
    if (found := sha256_file(path)) != digest:
        raise TrainChainError("object.digest", f"{path.name} has the sha256 {found}; the bundle names {digest}.")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainChainError("usage.file", f"{path} cannot be read: {error.strerror}.") from None


def _dump(model: Model) -> Any:
    return model.model_dump(mode="json")


def _json(value: Any) -> bytes:
    """Canonical in its content, laid out for people."""
    return json.dumps(json.loads(canonical_json(value)), indent=1, ensure_ascii=False).encode() + b"\n"
