"""The job that a training child has open: whether this wallet may train it, its files, its keys, its base in memory."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainchain.core.client import HubClient
from trainchain.core.errors import TrainChainError
from trainchain.core.messages import Lease
from trainchain.core.models import FileRef, ResolvedRecipe
from trainchain.core.worker.cache import Cache
from trainchain.core.worker.files import Clear, JobFiles, job_files, sealed_files
from trainchain.core.worker.keys import Exchange, identities
from trainchain.core.worker.splits import at_most, usual_tokens
from trainchain.core.worker.volatile import Volatile

Ask = Callable[[Mapping[str, Any]], Iterator[Mapping[str, Any]]]


class OpenedJob:
    """At most one job is open at a time; opening another, or `close`, ends it.

    Files are fetched and hashed when a job opens, not for every lease of it.
    """

    def __init__(
        self,
        client: HubClient,
        cache: Cache,
        volatile: Volatile,
        exchange: Exchange,
        ask: Ask,
        *,
        checkpointing: bool,
    ) -> None:
        self._client = client
        self._cache = cache
        self._volatile = volatile
        self._exchange = exchange
        self._ask = ask
        self._checkpointing = checkpointing
        self._open: tuple[str, str, bool, int | None, JobFiles] | None = None
        """Its id, its recipe's digest, whether with held-out data, how it is split, its files."""

    def close(self) -> None:
        """The child is gone, or opens it anew."""
        self._open = None

    def prepare(self, lease: Lease, owner: str, micro_tokens: int | None) -> tuple[JobFiles, dict[str, Any]]:
        """The files of the lease's job, opened in the child, and what its request needs beside: of a sealed job the
        block of the shard, or the held-out rows, with the key. Of how much goes through the model at once depend the
        last bits of training, and none of measuring.

        Raises `access.denied` before anything but the recipe is fetched, where the job does not admit this wallet.
        """
        judges = lease.kind == "evaluate"
        keys: dict[str, str] = {}

        def key(digest: str) -> str:
            if not keys:
                keys.update(identities(self._client, self._exchange, lease))
            if digest not in keys:
                raise TrainChainError("key.invalid", f"The hub gave no key of the sealed file {digest}.")
            return keys[digest]

        files = self._files_of(lease, judges, micro_tokens)
        if files is None:
            self._open = None
            files = self._opened(lease, owner, judges, micro_tokens, key)
            self._open = (lease.job, lease.spec_hash, judges, at_most(files.recipe, micro_tokens), files)
        if files.recipe.sealed is None:
            return files, {}
        paths = sealed_files(
            self._cache, self._client, lease.job, files.recipe, lease.round, lease.shard, held_out=judges
        )
        found = next(iter(paths.items()), None)  # a job without held-out data has samples to measure, and no rows
        return files, {"block": {"path": str(found[1]), "identity": key(found[0])}} if found else {}

    def _files_of(self, lease: Lease, judges: bool, micro_tokens: int | None) -> JobFiles | None:
        if self._open is None:
            return None
        job, spec_hash, may_judge, split, files = self._open
        usual = usual_tokens(files.recipe)
        fits = may_judge if judges else (split or usual) == (at_most(files.recipe, micro_tokens) or usual)
        return files if fits and (job, spec_hash) == (lease.job, lease.spec_hash) else None

    def _opened(
        self, lease: Lease, owner: str, judges: bool, micro_tokens: int | None, key: Callable[[str], str]
    ) -> JobFiles:
        parts: list[dict[str, str]] = []

        def admit(recipe: ResolvedRecipe) -> None:
            # Who measures is the hub's own child, and the hub holds the keys.
            wallet = str(self._client.address)
            if not judges and not recipe.access.admits(wallet, owner):
                raise TrainChainError("access.denied", f"Job {lease.job} does not admit this wallet, {wallet}.")

        def later(ref: FileRef, sealed: Path, _: Path) -> None:
            parts.append({"path": str(sealed), "name": ref.name, "identity": key(ref.sha256)})

        clear = Clear(self._volatile.folder, later)
        files = job_files(
            self._cache, self._client, lease.job, lease.spec_hash, held_out=judges, clear=clear, admit=admit
        )
        tokens = None if files.recipe.private else self._cache.tokens
        request = {
            "op": "open",
            **files.for_child(),
            "cache": None if tokens is None else str(tokens),
            "checkpointing": self._checkpointing,
            "micro_tokens": at_most(files.recipe, micro_tokens),
        }
        if parts:  # the child decrypts them, loads them, and removes them at once
            request["unseal"] = {"folder": str(files.model_dir), "files": parts}
        try:
            for _ in self._ask(request):
                pass
        finally:
            if parts:
                shutil.rmtree(files.model_dir, ignore_errors=True)
        return files
