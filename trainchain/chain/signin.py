"""Signing in with a wallet (EIP-4361): the text that is signed, and who signed it. No web3."""

import re
from dataclasses import dataclass
from datetime import datetime

from trainchain.chain.eip712 import Signer, recover_digest
from trainchain.chain.hexes import checksum, is_address, keccak
from trainchain.core.errors import TrainChainError

STATEMENT = "Sign in to this TrainChain hub."
_NONCE = re.compile(r"[A-Za-z0-9]{8,128}")
_LINE = re.compile(r"[\x21-\x7e]{1,512}")


@dataclass(frozen=True)
class SignIn:
    """The fields of a sign-in. Times are RFC 3339 texts with an offset, exactly as they are signed."""

    domain: str
    address: str
    uri: str
    chain_id: int
    nonce: str
    issued_at: str
    expiration_time: str

    def text(self) -> str:
        """The message. Raises `session.refused` for a field that could break out of its line."""
        for name in ("domain", "uri", "issued_at", "expiration_time"):
            if not isinstance(getattr(self, name), str) or _LINE.fullmatch(getattr(self, name)) is None:
                raise _refused(f"its {name} is not plain text without spaces")
        if not is_address(self.address):
            raise _refused("its address is not an address")
        if not isinstance(self.nonce, str) or _NONCE.fullmatch(self.nonce) is None:
            raise _refused("its nonce is not 8 or more letters and digits")
        if type(self.chain_id) is not int or self.chain_id < 1:
            raise _refused("its chain id is not a positive number")
        return (
            f"{self.domain} wants you to sign in with your Ethereum account:\n{checksum(self.address)}\n\n"
            f"{STATEMENT}\n\nURI: {self.uri}\nVersion: 1\nChain ID: {self.chain_id}\nNonce: {self.nonce}\n"
            f"Issued At: {self.issued_at}\nExpiration Time: {self.expiration_time}"
        )


def sign_in(fields: SignIn, wallet: Signer) -> str:
    """Sign as a wallet's `personal_sign` would."""
    return wallet.sign_digest(text_digest(fields.text()))


def recover_sign_in(fields: SignIn, signature: str, *, now: datetime | None = None) -> str:
    """The address that signed in. Raises `session.refused` unless it is the one in the fields and, where
    `now` is given, the message is of its time. Nonce and domain are the hub's to check."""
    try:
        signer = recover_digest(text_digest(fields.text()), signature)
    except (ValueError, TypeError) as problem:
        raise _refused(f"its signature does not hold: {problem}") from None
    if signer != checksum(fields.address):
        raise _refused("it is signed by another wallet than it names")
    if now is not None:
        issued, expires = _time(fields.issued_at), _time(fields.expiration_time)
        if not issued <= now < expires:
            raise _refused(f"it holds from {fields.issued_at} to {fields.expiration_time}")
    return signer


def text_digest(text: str) -> bytes:
    """The EIP-191 digest of a text."""
    data = text.encode()
    return keccak(b"\x19Ethereum Signed Message:\n" + str(len(data)).encode() + data)


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise _refused(f"{text} is not a time") from None
    if time.tzinfo is None:
        raise _refused(f"{text} has no time zone")
    return time


def _refused(why: str) -> TrainChainError:
    return TrainChainError("session.refused", f"The sign-in does not hold: {why}.")
