"""What a lease starts from: the adapter, and the moments of the outer step that led to it.

Who has the adapter that the step was taken from needs no more than the step, which is encoded; the bytes that this
comes to are hashed like fetched ones.
"""

from pathlib import Path
from typing import NamedTuple

from trainchain.core.adapter import adapter_bytes, apply, read_adapter, tensor_specs
from trainchain.core.client import HubClient
from trainchain.core.digests import sha256
from trainchain.core.encodings import decode, encoded_size
from trainchain.core.messages import Lease
from trainchain.core.models import ResolvedRecipe
from trainchain.core.worker.cache import Cache

SLOT = "start"


class Start(NamedTuple):
    adapter: Path
    outer_step: Path | None

    def for_child(self) -> dict[str, str | None]:
        """The places as the training child's requests name them."""
        return {"start": str(self.adapter), "outer_step": None if self.outer_step is None else str(self.outer_step)}


def fetch_start(cache: Cache, client: HubClient, lease: Lease, recipe: ResolvedRecipe) -> Start:
    """The files a lease starts from, whichever way brings fewer bytes.

    Raises `object.digest` for other bytes than the lease names, and what `decode` raises for a step that is none.
    """
    size, step = recipe.lora.initial.size, lease.outer_step  # the same tensors in every round
    belongs = f"{recipe.name}, round {lease.round}"
    if step is None:
        return Start(cache.object(client, lease.start, size, belongs=f"adapter of {belongs}"), None)
    before = cache.read(lease.before) if lease.before and cache.read(lease.start) is None else None
    start = cache.object(client, lease.start, size, belongs=f"adapter of {belongs}") if before is None else None
    have = read_adapter(start) if start is not None else read_adapter(before or b"")
    encoding, moments, shapes = recipe.merge.encoding, recipe.merge.hands_on, tensor_specs(have)
    step_size = encoded_size(encoding, shapes, moments=moments)
    cache.hold(SLOT, {lease.start: size, step: step_size})
    path = cache.object(client, step, step_size, belongs=f"outer step of {belongs}")
    if start is None:
        made = adapter_bytes(apply(have, decode(path.read_bytes(), encoding, shapes, moments=moments).delta))
        if sha256(made) != lease.start:
            return fetch_start(cache, client, lease.model_copy(update={"before": None}), recipe)
        start = cache.keep(lease.start, made, belongs=f"adapter of {belongs}")
    return Start(start, path)
