"""Sealing: a file is encrypted once with age; its key is wrapped with HPKE for whoever may open it.

age (age-encryption.org/v1) carries bytes of any size; HPKE (RFC 9180: X25519, HKDF-SHA256, ChaCha20-Poly1305) carries
the file's identity, bound to what it is for.
"""

import base64
import binascii
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyrage
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from trainchain.core.digests import canonical_json
from trainchain.core.errors import TrainChainError
from trainchain.core.settings import write_private

MAX_WRAPPED = 400
"""Characters of a wrapped identity; today's have 164."""
OVERHEAD = 1 << 12
"""An age file is this much larger than what it holds, and 16 bytes more for every 64 KiB."""
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


class ExchangeKey:
    """An X25519 key pair that identities are wrapped for. The secret shows in no repr and in no error."""

    __slots__ = ("__secret", "public")

    def __init__(self, secret: bytes) -> None:
        self.__secret = X25519PrivateKey.from_private_bytes(secret)
        self.public = self.__secret.public_key().public_bytes_raw().hex()
        """64 hex digits."""

    def __repr__(self) -> str:
        return f"ExchangeKey({self.public})"

    def __reduce__(self) -> Any:
        raise TypeError("an exchange key is not for pickling")

    @classmethod
    def load_or_create(cls, path: Path) -> "ExchangeKey":
        """The key in a file of mode 0600, made there at first use; two processes that start at once get the same."""
        if not path.exists():
            draft = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
            write_private(draft, os.urandom(32).hex().encode())
            try:
                os.link(draft, path)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
        try:
            secret = bytes.fromhex(path.read_text(encoding="ascii").strip())
            return cls(secret)
        except (OSError, ValueError):
            raise TrainChainError(
                "key.invalid",
                f"The exchange key in {path} cannot be read.",
                hint=f"Move {path} away; a new one is made.",
            ) from None

    def unwrap(self, wrapped: str, purpose: Mapping[str, Any]) -> str:
        """The identity that `wrap` put in. Raises `key.invalid` for another key, another purpose, or damage."""
        try:
            return _SUITE.decrypt(base64.b64decode(wrapped, validate=True), self.__secret, _info(purpose)).decode()
        except (ValueError, TypeError, InvalidTag, binascii.Error):
            raise TrainChainError(
                "key.invalid", "A wrapped key does not open: it is for another key or another purpose, or damaged."
            ) from None


def wrap(identity: str, public: str, purpose: Mapping[str, Any]) -> str:
    """An identity for the holder of the X25519 key `public` (64 hex digits), for one purpose; base64.

    Raises `key.invalid` for a public key that is none.
    """
    try:
        recipient = X25519PublicKey.from_public_bytes(bytes.fromhex(public))
        return base64.b64encode(_SUITE.encrypt(identity.encode(), recipient, _info(purpose))).decode()
    except ValueError:
        raise TrainChainError("key.invalid", "The exchange key is not an X25519 key.") from None


def for_hub(chain_id: int, job: str, digest: str, hub: str) -> dict[str, Any]:
    """The purpose of a key that an owner gives to a hub: one file of one job."""
    return {"to": "hub", "chain": chain_id, "job": job, "digest": digest, "account": hub.lower()}


def for_lease(
    chain_id: int, job: str, round_: int, shard: int | None, lease: str, digest: str, worker: str
) -> dict[str, Any]:
    """The purpose of a key that a hub gives to a worker: one file, for one lease."""
    return {
        "to": "worker",
        "chain": chain_id,
        "job": job,
        "round": round_,
        "shard": shard,
        "lease": lease,
        "digest": digest,
        "account": worker.lower(),
    }


def new_identity() -> str:
    """A throwaway age identity, for one file."""
    return str(pyrage.x25519.Identity.generate())


def seal(source: Path | bytes, target: Path, identity: str) -> None:
    """Encrypt a file (streamed) or some bytes into `target`, of mode 0600, whole or not at all. Raises OSError."""
    recipient = _identity(identity).to_public()
    draft = target.with_name(f".{target.name}.{os.urandom(4).hex()}")
    try:
        draft.touch(0o600)
        if isinstance(source, bytes):
            draft.write_bytes(pyrage.encrypt(source, [recipient]))
        else:
            with source.open("rb") as plain, draft.open("wb") as sealed:
                pyrage.encrypt_io(plain, sealed, [recipient])
        draft.replace(target)
    except pyrage.EncryptError as error:
        if number := re.search(r"\[Errno (\d+)\]", str(error)):  # the system's word, in age's
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(target)) from None
        raise
    finally:
        draft.unlink(missing_ok=True)


def unseal(path: Path, identity: str) -> bytes:
    """What a sealed file holds, in memory alone. Raises `seal.broken`."""
    try:
        return bytes(pyrage.decrypt(path.read_bytes(), [_identity(identity)]))
    except (pyrage.DecryptError, OSError):
        raise _broken(path) from None


def unseal_into(path: Path, identity: str, target: Path) -> None:
    """Decrypt a sealed file, streamed, into `target`, which appears whole or not at all. Raises `seal.broken`."""
    draft = target.with_name(f".{target.name}.{os.urandom(4).hex()}")
    try:
        with path.open("rb") as sealed, draft.open("xb") as plain:
            draft.chmod(0o600)
            pyrage.decrypt_io(sealed, plain, [_identity(identity)])
        draft.replace(target)
    except pyrage.DecryptError:
        raise _broken(path) from None
    except OSError as error:
        if error.errno is not None:  # the disk, not the bytes: age's own complaints carry no number
            raise
        raise _broken(path) from None
    finally:
        draft.unlink(missing_ok=True)


def _identity(text: str) -> Any:
    try:
        return pyrage.x25519.Identity.from_str(text)
    except Exception:  # the library's own class, which may show the text
        raise TrainChainError("key.invalid", "A file's key is not an age identity.") from None


def _info(purpose: Mapping[str, Any]) -> bytes:
    return b"trainchain wrapped key v1\n" + canonical_json(dict(purpose))


def _broken(path: Path) -> TrainChainError:
    return TrainChainError("seal.broken", f"The sealed file {path.name} does not open with its key.")
