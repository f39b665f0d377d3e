"""Signing in: a wallet signs an EIP-4361 message over a fresh nonce and gets a bearer token for a day."""

from datetime import datetime
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field
from sqlalchemy import delete, insert

from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import one
from trainchain.core.models import Address, Model

NONCE_SECONDS = 300.0
SESSION_SECONDS = 24 * 3600.0

_Text = Annotated[str, Field(max_length=300)]


class SignInFields(Model):
    """The fields of an EIP-4361 message that vary; the rest of its text is fixed."""

    domain: _Text
    address: Address
    uri: _Text
    chain_id: Annotated[int, Field(ge=1, lt=2**63)]
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    issued_at: _Text
    expiration_time: _Text


class SignIn(Model):
    fields: SignInFields
    signature: Annotated[str, Field(max_length=200)]


def new_nonce(hub: Hub) -> str:
    """A nonce good for one sign-in within five minutes; sweeps the old ones."""
    nonce = hub.random_hex(16)
    with hub.store.write() as db:
        db.execute(delete(schema.nonces).where(schema.nonces.c.expires < hub.clock()))
        db.execute(insert(schema.nonces).values(nonce=nonce, expires=hub.clock() + NONCE_SECONDS))
    return nonce


def sign_in(hub: Hub, request: SignIn, host: str) -> tuple[str, str, float]:
    """Check the signed message; returns (token, address, expiry). Raises `session.refused`."""
    fields, now = request.fields, hub.clock()
    if fields.domain != host or _host(fields.uri) != host:
        raise _refused(f"the message is for {fields.domain}, and this is {host}")
    if fields.chain_id != hub.chain.chain_id:
        raise _refused(f"the message is for chain {fields.chain_id}, and this is {hub.chain.chain_id}")
    try:
        expires = datetime.fromisoformat(fields.expiration_time).timestamp()
    except ValueError:
        raise _refused("its expiration time is not a time") from None
    if expires < now:
        raise _refused("it has expired; compare the clocks")
    address = hub.chain.recover_sign_in(fields.model_dump(), request.signature)
    if address.lower() != fields.address.lower():
        raise _refused("it is signed by another wallet")
    with hub.store.write() as db:
        used = db.execute(
            delete(schema.nonces).where(schema.nonces.c.nonce == fields.nonce, schema.nonces.c.expires >= now)
        )
        if used.rowcount == 0:
            raise _refused("its nonce was used before, or is too old")
        db.execute(delete(schema.sessions).where(schema.sessions.c.expires < now))
        token, until = hub.random_hex(32), min(expires, now + SESSION_SECONDS)
        db.execute(insert(schema.sessions).values(token_hash=sha256(token.encode()), address=address, expires=until))
    return token, address, until


def wallet_of(hub: Hub, authorization: str | None) -> str:
    """The wallet behind an Authorization header. Raises `session.required`."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() == "bearer" and token:
        with hub.store.read() as db:
            row = one(db, schema.sessions, token_hash=sha256(token.encode()))
        if row is not None and row["expires"] >= hub.clock():
            return str(row["address"])
    raise TrainChainError("session.required", "Sign in with a wallet first: there is no session, or it is over.")


def wallet_if_any(hub: Hub, authorization: str | None) -> str | None:
    """The wallet behind an Authorization header, None where there is no session."""
    try:
        return wallet_of(hub, authorization)
    except TrainChainError:
        return None


def _host(uri: str) -> str:
    try:
        return urlsplit(uri).netloc
    except ValueError:
        return ""


def _refused(why: str) -> TrainChainError:
    return TrainChainError("session.refused", f"The sign-in message is refused: {why}.")
