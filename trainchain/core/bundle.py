"""The audit bundle beside an adapter: what anybody needs to recheck who trained it, on what terms, for what pay.

A folder `trainchain/` of plain files, each named with its sha256 in a manifest; later kinds of evidence are more files.
All of it can be checked offline: `check` is told how signatures and settlements are read, as core knows no chain.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainchain.core import recount
from trainchain.core.adapter import CONFIG_FILE, TEMPLATE_FILE, WEIGHTS_FILE, beside_weights
from trainchain.core.card import base_name
from trainchain.core.digests import canonical_json, sha256, sha256_file
from trainchain.core.errors import TrainChainError
from trainchain.core.history import Accepted, Chain, Contributions, History, ToldAudit
from trainchain.core.models import (
    Address,
    Amount,
    Count,
    Digest,
    FileName,
    Hash32,
    Model,
    Positive,
    ResolvedRecipe,
    parse,
)
from trainchain.core.rewards import NEVER, Earned

FOLDER = "trainchain"
FORMAT: Literal["trainchain.bundle/3"] = "trainchain.bundle/3"
MANIFEST = "manifest.json"
RECIPE = "recipe.json"
CONTRIBUTIONS = "contributions.json"
LOSSES = "losses.json"
SETTLEMENTS = "settlements.json"
FEES = "fees.json"
README = "README"
TEXT = """The audit bundle of a LoRA adapter that was trained with TrainChain.

recipe.json         what was trained: the resolved recipe; its sha256 is the spec hash that stands in escrow
contributions.json  every accepted contribution: signed by its worker, with the hub's signed receipt
fees.json           what replays of others' work earned, and what of that was forfeited
losses.json         each round: its adapters, merge error, held-out loss, answers to the sample prompts
settlements.json    what was settled on chain, and the leaves files that say who was paid how much
manifest.json       job, chain, and the sha256 of each of these files

python -c "from trainchain.cli.delivery import verify; print(verify('..'))" checks it all offline.
"""


class Entry(Model):
    sha256: Digest
    size: Count


class Manifest(Model):
    format: Literal["trainchain.bundle/3"]
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


class Fee(Model):
    """What one replay earned, as `core/rewards.py` counts it."""

    round: Positive
    shard: Count
    auditor: Address
    place: Positive
    fee: Amount
    counted: Count
    forfeited: Count | None


class Fees(Model):
    fees: list[Fee]


class Checks(NamedTuple):
    """How a chain reads what it signs and settles: `recover(type, fields, signature)` is who signed, and `leaves` a
    leaves file. Both raise TrainChainError for what does not hold."""

    recover: recount.Recover
    leaves: Callable[[bytes], recount.Leaves]


def bundle_files(
    recipe: ResolvedRecipe,
    history: History,
    chain: Chain,
    round_: int,
    contributions: list[Accepted],
    leaves: Mapping[str, bytes],
    audits: Sequence[ToldAudit] = (),
) -> dict[str, bytes]:
    """The bundle's files by name, the manifest among them: the same for the same job, round and settlements.

    `leaves` are the leaves files of `history.settled(round_)` by their digests. Of verdicts it tells what the last of
    these knew: later ones change what lies here no more.
    """
    done = history.through(round_)
    last = max((row.round for row in history.settled(round_)), default=0)
    rows = [_as_known(one, last) for one in contributions if one.counted <= round_]
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
        CONTRIBUTIONS: _json({"contributions": [_dump(one) for one in sorted(rows, key=lambda one: one.which)]}),
        LOSSES: _json({"rounds": losses}),
        SETTLEMENTS: _json({"settlements": [_dump(row) for row in settlements]}),
        FEES: _json({"fees": [_dump(fee) for fee in _fees(audits, last)]}),
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


def _as_known(row: Accepted, last: int) -> Accepted:
    stamps = {"resolved": row.resolved, "forfeited": row.forfeited}
    return row.model_copy(update={name: known_by(stamp, last) for name, stamp in stamps.items()})


def known_by(stamp: int | None, last: int) -> int | None:
    """What settlement `last` knew of a stamp."""
    return stamp if stamp is not None and stamp <= last else None


def _fees(audits: Sequence[ToldAudit], last: int) -> list[Fee]:
    found = []
    for audit in audits:
        for one in audit.replays:
            if one.place is not None and one.counted is not None and one.counted <= last:
                where = {"round": audit.round, "shard": audit.shard, "auditor": one.auditor, "place": one.place}
                lost = known_by(one.forfeited, last)
                found.append(Fee.model_validate({**where, "fee": one.fee, "counted": one.counted, "forfeited": lost}))
    return sorted(found, key=lambda fee: (fee.auditor.lower(), fee.place))


def check(folder: Path, checks: Checks) -> Manifest:
    """Check the bundle of an adapter's folder, offline; returns its manifest.

    Raises TrainChainError naming what does not hold: `object.digest` for bytes that are not those of the manifest,
    `verify.rewards`, `verify.leaves`, `verify.root`, `settlement.mismatch` for a leaves file that is none,
    `job.invalid` for what cannot be read.
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
    _check_pay(inside, recipe, manifest, told.contributions, checks)
    return manifest


def _check_layout(folder: Path, recipe: ResolvedRecipe) -> None:
    """What stands beside the weights decides what is computed with them: scale, base, template."""
    wanted = beside_weights(recipe, *base_name(recipe))
    for name in (CONFIG_FILE, TEMPLATE_FILE):
        path = folder / name
        if (_read(path) if path.exists() else None) != wanted.get(name):
            raise TrainChainError("object.digest", f"{name} is not the one that follows from the recipe.")


def _check_pay(
    inside: Path, recipe: ResolvedRecipe, manifest: Manifest, rows: Sequence[Accepted], checks: Checks
) -> None:
    """Every signature, receipt and reward; and that each settlement through the adapter's round owes exactly what had
    vested of it, as does each that follows a job's end, and a later one of a job that went on no less."""
    for row in rows:
        if row.counted > manifest.round:
            where = f"round {row.which[0]}, shard {row.which[1]}"
            raise TrainChainError("job.invalid", f"{CONTRIBUTIONS}: {where} is not of this job's adapter.")
    earned, found = recount.earned(recipe, manifest.job, manifest.chain, rows, checks.recover)
    told = parse(Settlements, _read(inside / SETTLEMENTS), code="job.invalid", what=SETTLEMENTS).settlements
    files = {row.round: checks.leaves(_read(inside / row.leaves)) for row in told}
    fees = parse(Fees, _read(inside / FEES), code="job.invalid", what=FEES).fees
    earned += [
        Earned(
            fee.round,
            fee.shard,
            fee.auditor,
            fee.place,
            fee.fee,
            fee.counted,
            "replay",
            0,
            NEVER if fee.forfeited is None else fee.forfeited,
        )
        for fee in fees
    ]
    found += recount.leaves(manifest.job, earned, files, known=manifest.round)
    found += recount.roots((recount.OnChain(row.round, row.root, row.total) for row in told), files)
    if found:
        raise found[0].error()


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
