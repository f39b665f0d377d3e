"""The compiled contracts that ship in the package, and their errors in words. Standard library and hexes only."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from trainchain.chain.hexes import from_hex, keccak, to_hex


@dataclass(frozen=True)
class Artifact:
    """One contract as compiled. Immutables are places that a constructor fills in, so code compares without them."""

    name: str
    abi: list[dict[str, Any]]
    bytecode: str
    deployed: bytes
    immutables: tuple[tuple[int, int], ...]

    def code_hash(self) -> str:
        return to_hex(keccak(self._masked(self.deployed)))

    def fits(self, code: bytes) -> bool:
        """Whether code on a chain is this contract's."""
        return len(code) == len(self.deployed) and self._masked(code) == self._masked(self.deployed)

    def _masked(self, code: bytes) -> bytes:
        masked = bytearray(code)
        for start, length in self.immutables:
            masked[start : start + length] = bytes(length)
        return bytes(masked)


@cache
def load(name: str) -> Artifact:
    """`TrainEscrow` or `TrainToken`."""
    path = files("trainchain.chain") / "contracts" / "artifacts" / f"{name}.json"
    made = json.loads(path.read_text(encoding="utf-8"))
    places = tuple((place["start"], place["length"]) for place in made["immutableReferences"])
    return Artifact(name, made["abi"], made["bytecode"], from_hex(made["deployedBytecode"]), places)


def explain(data: str) -> str:
    """A revert's data in words: TrainEscrow refused: NotHub(caller=0x.., hub=0x..)."""
    try:
        raw = from_hex(data)
    except ValueError:
        raw = b""
    if raw[:4] == keccak(b"Error(string)")[:4]:
        return f"The contract refused: {_decode(['string'], raw[4:])[0]}"
    name, entry = _errors().get(raw[:4], ("", {}))
    if not name:
        return f"The contract refused with {to_hex(raw[:4])}" if raw else "The contract refused without a reason"
    inputs = entry["inputs"]
    values = _decode([one["type"] for one in inputs], raw[4:])
    shown = ", ".join(f"{one['name']}={_shown(value)}" for one, value in zip(inputs, values, strict=True))
    return f"{name} refused: {entry['name']}({shown})"


@cache
def _errors() -> dict[bytes, tuple[str, dict[str, Any]]]:
    found: dict[bytes, tuple[str, dict[str, Any]]] = {}
    for name in ("TrainToken", "TrainEscrow"):
        for entry in load(name).abi:
            if entry["type"] == "error":
                kinds = ",".join(one["type"] for one in entry["inputs"])
                found[keccak(f"{entry['name']}({kinds})".encode())[:4]] = (name, entry)
    return found


def _decode(kinds: list[str], data: bytes) -> tuple[Any, ...]:
    from eth_abi.abi import decode
    from eth_abi.exceptions import DecodingError

    try:
        values: tuple[Any, ...] = decode(kinds, data)
    except (DecodingError, OverflowError):
        return ("?",) * len(kinds)
    return values


def _shown(value: Any) -> str:
    return to_hex(value) if isinstance(value, bytes) else str(value)
