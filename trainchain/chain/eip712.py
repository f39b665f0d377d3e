"""Everything TrainChain signs as typed data (EIP-712), bound to one chain and contract. No web3."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from trainchain.chain.hexes import bytes32, checksum, from_hex, is_address, keccak, to_hex
from trainchain.core.errors import TrainChainError

NAME = "TrainChain"
VERSION = "1"

TYPES: dict[str, list[tuple[str, str]]] = {
    "Settlement": [
        ("bytes32", "jobId"),
        ("uint64", "round"),
        ("bytes32", "root"),
        ("uint128", "total"),
        ("bytes32", "dataHash"),
    ],
    "Voucher": [("bytes32", "jobId"), ("address", "account"), ("uint128", "cumulative")],
    "ClaimTo": [
        ("bytes32", "jobId"),
        ("address", "account"),
        ("address", "to"),
        ("uint128", "cumulative"),
        ("uint128", "tip"),
        ("uint48", "validUntil"),
    ],
    "CloseEarly": [("bytes32", "jobId")],
    "Contribution": [
        ("bytes32", "jobId"),
        ("uint64", "round"),
        ("uint64", "shard"),
        ("bytes32", "lease"),
        ("address", "worker"),
        ("bytes32", "startHash"),
        ("bytes32", "deltaHash"),
        ("bytes32", "stateRoot"),
        ("string", "encoding"),
        ("string", "numericClass"),
    ],
    "Receipt": [
        ("bytes32", "jobId"),
        ("uint64", "round"),
        ("uint64", "shard"),
        ("bytes32", "lease"),
        ("address", "worker"),
        ("bytes32", "deltaHash"),
        ("uint128", "amount"),
        ("uint64", "place"),
    ],
    # What draws a round's audits, fixed by its hash before anything is trained (core/draws.py).
    "RoundSecret": [("bytes32", "jobId"), ("uint64", "round"), ("bytes32", "secretHash")],
    "Replay": [
        ("bytes32", "jobId"),
        ("bytes32", "lease"),
        ("bytes32", "target"),
        ("uint64", "segment"),
        ("address", "auditor"),
        ("bytes32", "startLeaf"),
        ("bytes32", "endLeaf"),
        ("string", "numericClass"),
    ],
    # Who signs it can read what is wrapped for this X25519 key (core/seal.py).
    "ExchangeKey": [("address", "account"), ("bytes32", "publicKey")],
    # The token's own type (ERC-2612); its domain names the token instead of the escrow.
    "Permit": [
        ("address", "owner"),
        ("address", "spender"),
        ("uint256", "value"),
        ("uint256", "nonce"),
        ("uint256", "deadline"),
    ],
}
_DOMAIN_TYPE = "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
_HASH = re.compile(r"(?:0x)?[0-9a-fA-F]{64}")
_HALF_ORDER = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0


class Signer(Protocol):
    """What can sign a 32-byte digest; `wallet.Wallet` can."""

    def sign_digest(self, digest: bytes) -> str: ...


@dataclass(frozen=True)
class Domain:
    """Where a signature counts: one chain, one contract."""

    chain_id: int
    escrow: str

    def separator(self) -> bytes:
        head = (_DOMAIN_TYPE.encode(), NAME.encode(), VERSION.encode())
        words = [keccak(part) for part in head]
        words += [self.chain_id.to_bytes(32, "big"), bytes(12) + from_hex(self.escrow, 20)]
        return keccak(b"".join(words))


def encode_type(type_name: str) -> str:
    """The type as it is hashed, for example CloseEarly(bytes32 jobId)."""
    return f"{type_name}({','.join(f'{kind} {field}' for kind, field in TYPES[type_name])})"


_TYPE_HASHES = {name: keccak(encode_type(name).encode()) for name in TYPES}


def digest(domain: Domain, type_name: str, message: Mapping[str, Any]) -> bytes:
    """The 32 bytes that are signed. Raises ValueError where a field is missing, unknown, of another type."""
    fields = TYPES[type_name]
    names = {field for _, field in fields}
    if set(message) != names:
        raise ValueError(f"{type_name} has the fields {sorted(names)}, not {sorted(map(str, message))}")
    words = [_TYPE_HASHES[type_name]]
    words += [_word(kind, field, message[field]) for kind, field in fields]
    return keccak(b"\x19\x01" + domain.separator() + keccak(b"".join(words)))


def sign(domain: Domain, type_name: str, message: Mapping[str, Any], signer: "Signer | str | bytes") -> str:
    """Sign with a wallet, or a private key as bytes or hex. The answer is r, s, v: 0x and 130 digits."""
    hashed = digest(domain, type_name, message)
    if isinstance(signer, str | bytes):
        return sign_digest(signer, hashed)
    return signer.sign_digest(hashed)


def recover(domain: Domain, type_name: str, message: Mapping[str, Any], signature: str) -> str:
    """Who signed, checksummed. May be fed untrusted input: raises `contribution.bad_signature` for whatever
    is not a well-formed signature of a well-formed message, and never anything else."""
    try:
        return recover_digest(digest(domain, type_name, message), signature)
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise TrainChainError(
            "contribution.bad_signature", f"The signature of this {type_name} does not hold: {problem}."
        ) from None


def sign_digest(key: str | bytes, hashed: bytes) -> str:
    """Sign 32 bytes with a private key. Deterministic (RFC 6979), s always in the lower half."""
    from coincurve import PrivateKey

    secret = key if isinstance(key, bytes) else bytes32(key)
    made = PrivateKey(secret).sign_recoverable(hashed, hasher=None)
    return to_hex(made[:64] + bytes([27 + made[64]]))


def recover_digest(hashed: bytes, signature: str) -> str:
    """Who signed 32 bytes. Raises ValueError unless `signature` is canonical: 65 bytes, low s, v 27 or 28."""
    from coincurve import PublicKey

    raw = from_hex(signature, 65)
    s, v = int.from_bytes(raw[32:64], "big"), raw[64]
    if v not in (27, 28):
        raise ValueError("v is neither 27 nor 28")
    if s > _HALF_ORDER:
        raise ValueError("s is in the upper half of the curve's order")
    try:
        public = PublicKey.from_signature_and_message(raw[:64] + bytes([v - 27]), hashed, hasher=None)
    except ValueError:
        raise ValueError("no key fits it") from None
    return address_of(public.format(compressed=False))


def address_of(public_key: bytes) -> str:
    """The address of an uncompressed public key (65 bytes)."""
    return checksum(to_hex(keccak(public_key[1:])[12:]))


def _word(kind: str, field: str, value: Any) -> bytes:
    if kind == "string" and isinstance(value, str):
        return keccak(value.encode())
    if kind == "address" and is_address(value):
        return bytes(12) + from_hex(value, 20)
    if kind == "bytes32" and isinstance(value, str) and _HASH.fullmatch(value):
        return bytes32(value)
    if kind.startswith("uint") and type(value) is int and 0 <= value < 1 << int(kind[4:]):
        return value.to_bytes(32, "big")
    raise ValueError(f"{field} is not a {kind}")
