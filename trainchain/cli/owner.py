"""The owner's journey behind submit and run: publish, upload, fund."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trainchain.cli import wiring
from trainchain.cli.output import Output
from trainchain.core import money

if TYPE_CHECKING:
    from pathlib import Path

    from trainchain.chain.escrow import ChainClient
    from trainchain.chain.wallet import Wallet
    from trainchain.cli.plan import Plan
    from trainchain.cli.sealing import Holder
    from trainchain.core.client import HubClient
    from trainchain.core.models import ResolvedRecipe
    from trainchain.core.settings import Settings


def publish(
    plan: Plan, settings: Settings, out: Output, confirm: Callable[[int], None], *, own_hub: str | None = None
) -> dict[str, Any]:
    """Publish and fund a plan, sealed first where its keys are kept. Interrupted anywhere, the same call goes on where
    it stopped: nothing is paid twice, nothing sealed twice.

    `own_hub` is the address of a hub that the owner says is theirs. Raises `access.not_your_hub` before anything
    leaves this machine.
    """
    from trainchain.cli import sealing
    from trainchain.core.worker.room import full_disk

    client, wallet = wiring.signed_client(settings, out)
    chain = wiring.chain_of(client)
    holder = sealing.key_holder(plan, client, chain, settings, own_hub) if plan.keys else None
    confirm(plan.resolved.pay.budget)
    hint = "Free some, or name a home on another disk with --home."
    with _alone(settings, out), full_disk(settings.home, "the job was made ready", hint=hint):
        return _publish(plan, settings, out, client, chain, wallet, holder)


@contextmanager
def _alone(settings: Settings, out: Output) -> Iterator[None]:
    """One `submit` of this home at a time: two of one recipe would write the same files, and share a salt."""
    from filelock import FileLock, Timeout

    from trainchain.core.settings import private_folder

    lock = FileLock(private_folder(settings.home / "submissions") / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        out.note("waiting  another submit from this home goes first")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _publish(
    plan: Plan,
    settings: Settings,
    out: Output,
    client: HubClient,
    chain: ChainClient,
    wallet: Wallet,
    holder: Holder | None,
) -> dict[str, Any]:
    from trainchain.cli import sealing
    from trainchain.core.settings import write_private

    plan = sealing.sealed(plan, settings, out) if plan.keys else plan
    recipe = plan.resolved

    intent_path = settings.home / "submissions" / f"{recipe.spec_hash}-{chain.escrow[2:10].lower()}.json"
    salt = _salt(intent_path)
    write_private(intent_path, json.dumps({"salt": salt}).encode())
    job_id = chain.job_id(wallet.address, salt)
    document = {"recipe": recipe.model_dump(mode="json"), "salt": salt}
    if holder is not None:
        document["keys"] = sealing.wrapped(plan, holder, chain, job_id)
    missing = _missing(client.post("/v1/jobs", document), job_id, recipe)
    _upload(client, plan, job_id, missing, settings, out)
    tx = _fund(client, chain, wallet, plan, job_id, salt, out)
    state = client.post(f"/v1/jobs/{job_id}/fund", signed=False)["state"]
    write_private(settings.home / "last_job", job_id.encode())
    intent_path.unlink()
    sealing.forget(plan, settings)
    return {
        "job": job_id,
        "name": recipe.name,
        "state": state,
        "spec_hash": recipe.spec_hash,
        "budget": str(recipe.pay.budget),
        "price": str(plan.price),
        "tokens": sum(counts.tokens for row in recipe.counts for counts in row[: recipe.shards]),
        "escrow": chain.escrow,
        "tx": tx,
        "hub": settings.hub,
    }


def _salt(intent_path: Path) -> str:
    """The salt of an interrupted submit of this very recipe, else a fresh one."""
    try:
        return str(json.loads(intent_path.read_bytes())["salt"])
    except (OSError, ValueError, KeyError):
        return "0x" + secrets.token_hex(32)


def _missing(answer: dict[str, Any], job_id: str, recipe: ResolvedRecipe) -> list[str]:
    """What the hub wants brought of a job. It may ask for nothing else of what lies on this machine."""
    from trainchain.core.errors import TrainChainError

    missing, named = answer.get("missing"), {ref.sha256 for ref in recipe.files()}
    if answer.get("job") != job_id or not isinstance(missing, list) or not named.issuperset(map(str, missing)):
        raise TrainChainError(
            "hub.not_a_hub",
            f"The hub took job {job_id} for another one, or asks for files that it does not have.",
            hint="Do not send it anything; tell its operator.",
        )
    return list(map(str, missing))


def _upload(client: HubClient, plan: Plan, job_id: str, missing: list[str], settings: Settings, out: Output) -> None:
    from trainchain.core.settings import private_folder

    initial = private_folder(settings.home / "submissions") / f"{plan.resolved.lora.initial.sha256}.safetensors"
    initial.write_bytes(plan.initial)
    files = {**plan.files, plan.resolved.lora.initial.sha256: initial}
    refs = {ref.sha256: ref for ref in plan.resolved.files()}
    try:
        if missing:
            size = sum(refs[digest].size for digest in missing)
            out.note(f"upload   {len(missing)} files, {size / 1e6:.1f} MB")
        for digest in missing:
            client.upload(f"/v1/jobs/{job_id}/objects/{digest}", files[digest])
    finally:
        initial.unlink()


def _fund(
    client: HubClient, chain: ChainClient, wallet: Wallet, plan: Plan, job_id: str, salt: str, out: Output
) -> str | None:
    """Create and fund the job in escrow unless it stands there already; returns the transaction."""
    from trainchain.chain.records import JobParams
    from trainchain.core.rewards import round_cap

    earlier = wiring.escrow_job(chain, job_id)
    if earlier is not None and earlier.funded > 0:
        return None
    told, pay = client.info()["chain"], plan.resolved.pay
    if told["embedded"] and (
        chain.token_balance(told["token"], wallet.address) < pay.budget or chain.gas_balance(wallet.address) == 0
    ):
        client.post("/v1/faucet", {"tokens": True})
        out.note("faucet   the hub's own chain gave this wallet tokens to try TrainChain with")
    created = chain.create_job(
        wallet,
        JobParams(
            token=told["token"],
            hub=told["hub"],
            deadline=int(time.time()) + pay.deadline,
            grace=pay.grace,
            activation_delay=pay.activation_delay,
            round_cap=round_cap(plan.resolved),
            spec_hash="0x" + plan.resolved.spec_hash,
            salt=salt,
        ),
        pay.budget,
    )
    out.note(f"escrow   {money.show(pay.budget)} TRAIN  tx {wiring.short(created.tx)}")
    return str(created.tx)
