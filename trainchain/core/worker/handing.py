"""What a worker signs and hands in: of a shard it trained, and of a segment it replayed for an audit."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainchain.core.client import HubClient
from trainchain.core.digests import sha256_file
from trainchain.core.errors import TrainChainError
from trainchain.core.messages import Lease
from trainchain.core.models import ResolvedRecipe
from trainchain.core.rewards import replay_fee
from trainchain.core.segments import state_size
from trainchain.core.worker.room import full_disk

SignTyped = Callable[[str, Mapping[str, Any]], str]
"""(the typed message's kind, its fields): this wallet's signature."""
MARGIN = 4096
"""Bytes that a state's file may have beyond its numbers and its plain header."""
LONGEST_CLASS = 200


class Asked(NamedTuple):
    """What a replay lease asks for."""

    target: str
    segment: int
    micro_tokens: int

    @classmethod
    def of(cls, lease: Lease, recipe: ResolvedRecipe) -> "Asked":
        """Raises `hub.not_a_hub` where the lease does not say, or says what its job has not."""
        if lease.target is None or lease.segment is None or lease.micro_tokens is None or lease.shard is None:
            raise TrainChainError("hub.not_a_hub", "The hub's replay lease does not say what to replay.")
        if not 1 <= lease.round <= recipe.rounds or lease.shard >= recipe.all_shards:
            raise TrainChainError("hub.not_a_hub", f"The job has no shard {lease.shard} in a round {lease.round}.")
        if lease.segment >= recipe.segments or (lease.state is None) != (lease.segment == 0):
            raise TrainChainError(
                "hub.not_a_hub", f"The hub's replay lease is of a segment {lease.segment} without start."
            )
        return cls(lease.target, lease.segment, lease.micro_tokens)

    def worth(self, lease: Lease, recipe: ResolvedRecipe) -> dict[str, Any]:
        """The segment's part in its shard's pinned tokens, and the most that it pays."""
        steps, shard = recipe.training.segment_steps, lease.shard or 0
        part = min(steps, recipe.steps - self.segment * steps)
        tokens = recipe.counts[lease.round - 1][shard].tokens * part // recipe.steps
        return {"tokens": tokens, "fee": str(replay_fee(recipe, lease.round, shard, self.segment))}


def contribution(
    lease: Lease, recipe: ResolvedRecipe, worker: str, result: Mapping[str, Any], sign: SignTyped
) -> dict[str, Any]:
    """What the trainer answered, signed."""
    message = {
        "jobId": lease.job,
        "round": lease.round,
        "shard": lease.shard,
        "lease": lease.lease,
        "worker": worker,
        "startHash": "0x" + lease.start,
        "deltaHash": "0x" + sha256_file(Path(result["delta"])),
        "stateRoot": result["state_root"],
        "encoding": recipe.merge.encoding,
        "numericClass": result["numeric_class"],
    }
    return {
        "contribution": message,
        "signature": sign("Contribution", message),
        "losses": result["losses"],
        "seconds": round(float(result["seconds"]), 3),
        "micro_tokens": result["micro_tokens"],
    }


def receipt_in(error: TrainChainError) -> dict[str, Any]:
    """What the hub answered when it took this contribution in before; raises the error where it is another one."""
    kept = error.facts.get("receipt") if error.code == "contribution.repeat" else None
    if not isinstance(kept, dict):
        raise error
    return kept


def replay(lease: Lease, asked: Asked, auditor: str, result: Mapping[str, Any], sign: SignTyped) -> dict[str, Any]:
    """What the trainer got, signed. Split otherwise than asked it is of another class: no equality is claimed then."""
    used = int(result["micro_tokens"])
    mark = "" if used == asked.micro_tokens else f"/split{used}"
    message = {
        "jobId": lease.job,
        "lease": lease.lease,
        "target": asked.target,
        "segment": asked.segment,
        "auditor": auditor,
        "startLeaf": result["start_leaf"],
        "endLeaf": result["end_leaf"],
        "numericClass": str(result["numeric_class"])[: LONGEST_CLASS - len(mark)] + mark,
    }
    return {"replay": message, "signature": sign("Replay", message)}


def fetch_state(client: HubClient, digest: str, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> Path:
    """The state that a segment starts in. Raises `object.digest` for other bytes, or for too many."""
    path = folder / "start.safetensors"
    with full_disk(folder, "the state to replay from was fetched"):
        client.download(digest, path, size=state_size(shapes) + MARGIN)
    if sha256_file(path) != digest:
        raise TrainChainError("object.digest", f"The hub sent other bytes than {digest}.")
    return path


def insist_on_secret(
    lease: Lease, recipe: ResolvedRecipe, signed: Callable[[str, Mapping[str, Any], str], bool]
) -> None:
    """Raises `draw.invalid` where work is audited, and the hub has not signed what will draw its audits: it could
    then draw as it likes."""
    if not recipe.audited:
        return
    message = {"jobId": lease.job, "round": lease.round, "secretHash": lease.secret_hash}
    if lease.secret_hash is None or not signed("RoundSecret", message, lease.secret_signature or ""):
        raise TrainChainError(
            "draw.invalid",
            f"The hub has not signed the secret that draws the audits of round {lease.round} of job {lease.job[:12]}.",
            hint="Stop working for this hub: it could choose whom it audits.",
        )
