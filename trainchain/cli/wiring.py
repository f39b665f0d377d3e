"""The composition root: the one place where settings, wallets, hub and chain are put together.

Engines never import each other; what crosses between core and chain is a plain function made here.
Everything heavy is imported inside the functions.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from typing import TYPE_CHECKING, Any

from trainchain.cli.hubs import place_of
from trainchain.cli.output import Output
from trainchain.core.errors import TrainChainError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from trainchain.chain.escrow import ChainClient
    from trainchain.chain.records import JobOnChain
    from trainchain.chain.wallet import Wallet
    from trainchain.core.client import HubClient
    from trainchain.core.seal import ExchangeKey
    from trainchain.core.settings import Settings
    from trainchain.core.worker.dues import Closes, Look
    from trainchain.core.worker.handing import SignTyped
    from trainchain.core.worker.paybook import Paybook, Signed


def open_wallet(settings: Settings, out: Output) -> Wallet:
    """This home's wallet, made without a question where there is none; then it is said where it lies.

    The password comes from TRAINCHAIN_PASSWORD_FILE, else from the keyring where that is wanted, else is empty, else
    is asked for where somebody can answer.
    """
    from trainchain.chain.wallet import Wallet
    from trainchain.cli import passwords

    path = settings.wallet_path
    if not path.exists():
        try:
            made, source = passwords.save(Wallet(secrets.token_bytes(32)), path, settings, ask=False)
        except TrainChainError as error:
            if error.code != "wallet.exists":  # another process was faster
                raise
        else:
            kept = ", no password" if source == "none" else ""
            out.note(f"wallet   {short(made.address)} made in {friendly(path.parent)}{kept}")
            out.note(f"back up  {passwords.how_to_back_up(settings)}")
            return made
    return passwords.open_file(path, settings.password())[0]


def address_in(path: Path) -> str | None:
    """The address that a wallet file names, in lower case, read without its password; None where there is none."""
    try:
        address = json.loads(path.read_bytes())["address"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return "0x" + str(address).lower().removeprefix("0x")


def signed_client(settings: Settings, out: Output) -> tuple[HubClient, Wallet]:
    """The hub as this home's wallet sees it. The hub is asked first: where there is none, no wallet is made."""
    hub_client(settings).info()
    wallet = open_wallet(settings, out)
    return hub_client(settings, wallet), wallet


def short(address: str) -> str:
    """An address or hash as people recognise it."""
    return f"{address[:6]}..{address[-4:]}"


def friendly(path: Path) -> str:
    """A path as short as a person would write it: from here, or from the home directory."""
    from pathlib import Path

    for root, sign in ((Path.cwd(), "."), (Path.home(), "~")):
        if path.is_relative_to(root):
            return f"{sign}/{path.relative_to(root).as_posix()}"
    return str(path)


def hub_client(settings: Settings, wallet: Wallet | None = None, *, attempts: int | None = None) -> HubClient:
    """The hub of these settings, signed in as `wallet` when a request asks for it."""
    from trainchain.chain.signin import SignIn, sign_in
    from trainchain.core.client import ATTEMPTS, HubClient

    if wallet is None:
        return HubClient(settings.hub, attempts=attempts or ATTEMPTS)

    def sign(fields: dict[str, Any]) -> str:
        return sign_in(SignIn(**fields), wallet)

    return HubClient(settings.hub, address=wallet.address, sign_in=sign, attempts=attempts or ATTEMPTS)


def chain_of(client: HubClient, rpc: str | None = None) -> ChainClient:
    """The chain a hub names, its id and the escrow's code checked before anything is believed or sent. With `rpc` it
    is asked there, and not where the hub says.

    Raises `chain.wrong` where they are not what TrainChain ships.
    """
    place = place_of(client)
    return chain_at(rpc or place.rpc, place.chain_id, place.escrow)


def chain_at(rpc: str, chain_id: int, escrow: str) -> ChainClient:
    """The chain behind an RPC, where it is the one that it should be; see `chain_of`."""
    from trainchain.chain import escrow as contract

    chain = contract.connect(rpc, escrow=escrow)
    if chain.chain_id != chain_id:
        raise TrainChainError(
            "chain.wrong",
            f"The hub names chain {chain_id}, and its RPC answers for chain {chain.chain_id}.",
            hint="Do not send anything; tell the hub's operator.",
        )
    chain.check_code()
    return chain


def escrow_job(chain: ChainClient, job_id: str) -> JobOnChain | None:
    """A job as the escrow holds it; None where it is not there."""
    try:
        return chain.job(job_id)
    except TrainChainError as error:
        if error.code == "chain.reverted":
            return None
        raise


def work_signer(wallet: Wallet, chain: ChainClient) -> SignTyped:
    """Signs contributions and replays for this chain's escrow."""
    from trainchain.chain import eip712

    domain = eip712.Domain(chain.chain_id, chain.escrow)

    def sign(kind: str, message: Mapping[str, Any]) -> str:
        return eip712.sign(domain, kind, message, wallet)

    return sign


def exchange_of(settings: Settings, wallet: Wallet, chain: ChainClient) -> tuple[ExchangeKey, str]:
    """This home's exchange key, made at first use, and the wallet's signature that binds it to the wallet."""
    from trainchain.chain import eip712
    from trainchain.core.seal import ExchangeKey

    key = ExchangeKey.load_or_create(settings.home / "exchange-key")
    message = {"account": wallet.address, "publicKey": "0x" + key.public}
    return key, eip712.sign(chain.domain, "ExchangeKey", message, wallet)


def promise_checker(chain: ChainClient, hub: str) -> Signed:
    """A function that tells whether a receipt or voucher is signed by the hub that the escrow pays through."""
    from trainchain.chain import eip712

    def check(kind: str, fields: Mapping[str, Any], signature: str) -> bool:
        try:
            return eip712.recover(chain.domain, kind, fields, signature).lower() == hub.lower()
        except TrainChainError:
            return False

    return check


def paybook_of(settings: Settings, wallet: Wallet, chain: ChainClient, hub: str) -> Paybook:
    """Where this home's wallet keeps what a hub signs for it."""
    from trainchain.core.worker.paybook import Paybook, Ties

    ties = Ties(chain.chain_id, chain.escrow, hub)
    return Paybook(settings.home, wallet.address, ties, promise_checker(chain, hub))


def onlooker(settings: Settings, wallet: Wallet, chain: ChainClient, client: HubClient) -> Look:
    """A function that tells how this wallet stands in a job; on its way it copies new settlements onto this disk."""
    from trainchain.chain.collecting import Mirror
    from trainchain.core.worker.dues import Standing

    mirror = Mirror(settings.home / "leaves")

    def look(job: str, *, fresh: bool) -> Standing:
        if not fresh:
            return Standing(mirror.leaf(job, wallet.address), 0)
        mirror.update(chain, job, wallet.address, client.object)
        return Standing(mirror.leaf(job, wallet.address), chain.claimed_of(job, wallet.address))

    return look


def window_of(wallet: Wallet, chain: ChainClient) -> Closes:
    """A function that tells how long a job's vouchers are taken, by the chain and no hub."""
    from trainchain.core.worker.dues import Closing

    def closes(job: str) -> Closing:
        found = chain.job(job)
        paid = chain.claimed_of(job, wallet.address)
        return Closing(paid, found.deadline + found.grace / 2, found.closes_after)

    return closes


def job_checker(chain: ChainClient, told: Mapping[str, Any], now: Callable[[], float] = time.time) -> Any:
    """A function that insists, before every lease, that the escrow holds money under the recipe's hash, to be settled
    by this hub in this token, and returns the job's owner. `told` is what the hub says of its chain."""

    def check(job_id: str, spec_hash: str) -> str:
        job = escrow_job(chain, job_id)
        if job is None or job.free == 0:
            raise TrainChainError("job.unfunded", f"The escrow {chain.escrow} holds nothing more for job {job_id}.")
        wrong = None
        if job.spec_hash.removeprefix("0x") != spec_hash:
            wrong = "it stands in escrow under another recipe"
        elif (job.hub.lower(), job.token.lower()) != (told["hub"].lower(), told["token"].lower()):
            wrong = f"its escrow is settled by {job.hub} in the token {job.token}, not as the hub says"
        elif job.halted or job.deadline <= now():
            wrong = "its owner has halted it, or its deadline has passed"
        elif int(job.next_hub, 16) and job.next_hub != job.hub:
            wrong = f"its owner has named another hub, {job.next_hub}, which owes nothing for work done here"
        if wrong:
            raise TrainChainError("job.invalid", f"Job {job_id} is not worth working for: {wrong}.")
        return job.owner

    return check


def job_id_of(client: HubClient, settings: Settings, name: str) -> str:
    """The full id behind an id, a prefix, a name, or @last (the last job submitted from this home)."""
    if name == "@last":
        last = settings.home / "last_job"
        if not last.exists():
            raise TrainChainError("job.unknown", "No job was submitted from this home yet.", hint="trainchain jobs ls")
        name = last.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):  # in an address it would name another place
        raise TrainChainError("job.unknown", f"No job can be called {name[:80]!r}.", hint="trainchain jobs ls")
    return str(client.get(f"/v1/jobs/{name}")["job"])
