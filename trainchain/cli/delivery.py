"""What comes back to the owner: the merged adapter as a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainchain.core.errors import TrainChainError

if TYPE_CHECKING:
    from trainchain.core.client import HubClient


def fetch(client: HubClient, job_id: str, target: Path | None, *, round_: int | None = None) -> dict[str, Any]:
    """Write the merged adapter of a round (default: the last merged one) as a standard PEFT folder."""
    from trainchain.core.adapter import read_adapter, write_peft_folder
    from trainchain.core.models import ResolvedRecipe, parse

    view = client.get(f"/v1/jobs/{job_id}")
    merged = [row for row in view["rounds_done"] if row["adapter"] and round_ in (None, row["round"])]
    if not merged:
        what = "no round is merged yet" if round_ is None else f"round {round_} is not merged"
        raise TrainChainError(
            "job.not_ready", f"Job {job_id[:12]} has no adapter to pull: {what}.", hint=f"trainchain jobs show {job_id}"
        )
    last = merged[-1]
    recipe = parse(ResolvedRecipe, client.object(view["spec_hash"]), code="job.invalid", what=f"The recipe of {job_id}")
    target = target or Path(f"{recipe.name}-lora")
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not (target / "trainchain.json").exists():
        raise TrainChainError("usage.flag", f"{target} exists and is not empty.", hint="Name another folder with -o.")
    adapter = read_adapter(client.object(last["adapter"], cap=1 << 34))
    write_peft_folder(target, adapter, recipe, recipe.name)
    facts = {
        "job": job_id,
        "name": recipe.name,
        "spec_hash": recipe.spec_hash,
        "round": last["round"],
        "adapter": last["adapter"],
        "loss": last["loss"],
        "samples": [
            {"prompt": prompt, "answer": answer}
            for prompt, answer in zip(recipe.samples, last["samples"] or [], strict=False)
        ],
        "base_model": [ref.model_dump() for ref in recipe.base_model.files],
    }
    (target / "trainchain.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8", newline="\n")
    return {"folder": str(target), **facts}
