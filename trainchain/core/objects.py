"""Bytes by their sha256 in an object store. The names are digests only, so no sender's path ever touches the disk."""

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import obstore
from obstore.store import LocalStore

from trainchain.core.digests import CHUNK, is_digest
from trainchain.core.errors import TrainChainError

_IN_MEMORY = 8 << 20


class Spool:
    """What is being received: hashed as it comes, refused at its cap, forgotten unless it is kept."""

    def __init__(self, cap: int, *, too_large: str = "http.too_large") -> None:
        self.cap = cap
        self.size = 0
        self._too_large = too_large
        self._hash = hashlib.sha256()
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115

    def write(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self.size > self.cap:
            raise TrainChainError(self._too_large, f"More than the {self.cap} bytes allowed here were sent.")
        self._hash.update(chunk)
        self._file.write(chunk)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def rewound(self) -> IO[bytes]:
        self._file.seek(0)
        return self._file

    def close(self) -> None:
        self._file.close()


class ObjectStore:
    """A folder of objects, each under `ab/cdef...`; a write shows whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._store = LocalStore(prefix=folder, mkdir=True)

    def keep(self, spool: Spool) -> str:
        """Store what was received and return its digest; storing the same bytes twice is harmless."""
        digest = spool.digest
        if self.size(digest) is None:
            obstore.put(self._store, _key(digest), spool.rewound())
        return digest

    def put(self, data: bytes) -> str:
        spool = Spool(len(data))
        spool.write(data)
        try:
            return self.keep(spool)
        finally:
            spool.close()

    def size(self, digest: str) -> int | None:
        """Bytes of the object, or None where the store does not hold it."""
        try:
            return int(obstore.head(self._store, _key(digest))["size"])
        except FileNotFoundError:
            return None

    def get(self, digest: str) -> bytes:
        """The object, its digest checked again: a store is not trusted to keep bytes."""
        data = b"".join(self.stream(digest))
        if hashlib.sha256(data).hexdigest() != digest:
            raise TrainChainError("object.digest", f"The stored bytes of {digest} no longer have that digest.")
        return data

    def stream(self, digest: str, start: int = 0) -> Iterator[bytes]:
        """The object's bytes from the byte `start`, which must be one it has, to its end."""
        try:
            found = obstore.get(self._store, _key(digest), options={"range": {"offset": start}} if start else None)
        except FileNotFoundError:
            raise TrainChainError("object.unknown", f"There is no object {digest}.") from None
        for chunk in found.stream(min_chunk_size=CHUNK):
            yield bytes(chunk)

    def delete(self, digest: str) -> None:
        if self.size(digest) is not None:
            obstore.delete(self._store, _key(digest))


def _key(digest: str) -> str:
    if not is_digest(digest):
        raise TrainChainError("object.unknown", "An object is named by 64 lower-case hex digits.")
    return f"{digest[:2]}/{digest[2:]}"
