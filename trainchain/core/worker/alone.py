"""One shard trained on this machine, without hub and lease: the adapter, the delta, and what a worker would sign.

Interrupted and called again with the same folder, it goes on from the last segment.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainchain.core.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    adapter_bytes,
    read_adapter,
    tensor_specs,
    write_peft_folder,
)
from trainchain.core.digests import sha256, sha256_file
from trainchain.core.errors import TrainChainError
from trainchain.core.models import ResolvedRecipe
from trainchain.core.worker.bench import remove
from trainchain.core.worker.child import Child
from trainchain.core.worker.files import JobFiles

NO_LEASE = "0x" + "00" * 32
"""What stands in the leaves of a shard that nobody leased."""
DELTA_FILE = "delta.safetensors"
COMMITMENTS_FILE = "commitments.json"
RECIPE_FILE = "recipe.json"
STATES = "states"
NOTE_FILE = "shard.json"

OnStep = Callable[[Mapping[str, Any]], None]


def start_of(folder: Path, recipe: ResolvedRecipe, initial: bytes) -> Adapter:
    """The adapter in a PEFT folder, to start a shard of `recipe` from.

    Raises TrainChainError: usage.file, adapter.unfit where it does not have exactly the recipe's tensors or scale.
    """

    def unfit(why: str) -> TrainChainError:
        return TrainChainError(
            "adapter.unfit", f"{folder} does not fit the recipe: {why}.", hint="Name the adapter of an earlier round."
        )

    try:
        found = read_adapter(folder / WEIGHTS_FILE)
    except TrainChainError as error:
        if error.code == "usage.file":
            raise
        raise unfit(error.message.rstrip(".")) from None
    have, wanted = tensor_specs(found), tensor_specs(read_adapter(initial))
    if odd := sorted(have.keys() ^ wanted.keys()):
        raise unfit(f"it {'lacks' if odd[0] in wanted else 'has'} the tensor {odd[0]!r}")
    if wrong := [name for name in wanted if have[name] != wanted[name]]:
        raise unfit(f"{wrong[0]} is {have[wrong[0]]}, not {wanted[wrong[0]]}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
        scale = (config["r"], config["lora_alpha"], bool(config.get("use_rslora")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise unfit(f"its {CONFIG_FILE} cannot be read") from None
    if scale != (recipe.lora.r, recipe.lora.alpha, False):
        raise unfit("its rank or its scale is another one")
    return found


def train(
    child: Child,
    files: JobFiles,
    start: Adapter,
    round: int,
    shard: int,
    folder: Path,
    options: Mapping[str, Any],
    on_step: OnStep,
) -> dict[str, Any]:
    """Train one shard into `folder`; returns the commitments written there.

    `options` are those of the child's `open`. Raises `usage.flag` for a folder that something else lies in.
    """
    recipe, data = files.recipe, adapter_bytes(start)
    belongs = {"spec_hash": recipe.spec_hash, "round": round, "shard": shard, "start": sha256(data)}
    _claim(folder, belongs)
    states, out = folder / STATES, folder / STATES / "out"
    out.mkdir(exist_ok=True)
    _publish(files.recipe_path, recipe.canonical())
    start_path = states / "start.safetensors"
    _publish(start_path, data)
    child.answer({"op": "open", **files.for_child(), **options})
    result: dict[str, Any] = {}
    request = {"op": "train", "start": str(start_path), "round": round, "shard": shard, "lease": NO_LEASE}
    for event in child.ask({**request, "out": str(out), "states": str(states)}):
        if event["event"] == "step":
            on_step(event)
        result = event
    end = Path(result["end"])
    commitments = {
        **belongs,
        "lease": NO_LEASE,
        "delta": sha256_file(Path(result["delta"])),
        "end": sha256_file(end),
        "state_root": result["state_root"],
        "leaves": result["leaves"],
        "segment_steps": recipe.training.segment_steps,
        **{name: result[name] for name in ("micro_tokens", "rows", "tokens", "supervised", "losses")},
        **{name: result[name] for name in ("resumed", "seconds", "numeric_class")},
    }
    write_peft_folder(folder, read_adapter(end), recipe, str(files.model_dir))
    Path(result["delta"]).replace(folder / DELTA_FILE)
    _publish(folder / COMMITMENTS_FILE, (json.dumps(commitments, indent=1) + "\n").encode())
    remove(out)
    return commitments


def _claim(folder: Path, belongs: Mapping[str, Any]) -> None:
    """Make the folder this shard's, or insist that it is."""
    note = folder / STATES / NOTE_FILE
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        note.parent.mkdir(parents=True)
        _publish(note, json.dumps(belongs).encode())
        return
    try:
        found = json.loads(note.read_bytes())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise TrainChainError("usage.flag", f"{folder} exists and is not empty.", hint="Name another folder with -o.")
    if odd := [name for name in belongs if found.get(name) != belongs[name]]:
        raise TrainChainError(
            "usage.flag",
            f"{folder} holds shard {found.get('shard')} of round {found.get('round')}; its {odd[0]} is another one.",
            hint="Name another folder with -o.",
        )


def _publish(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(data)
    partial.replace(path)
