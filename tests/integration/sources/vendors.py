"""A session of somebody who uses transformers, peft and datasets with a hub, as its own process: they read where the
hub is when they are imported. `python -m tests.integration.sources.vendors FOLDER` prints what came of it as JSON.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any


def models(folder: Path) -> dict[str, Any]:
    """Save and load a model and an adapter on it by way of the hub."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = AutoModelForCausalLM.from_pretrained(folder / "model")
    local.push_to_hub("me/tiny", private=True)
    AutoTokenizer.from_pretrained(folder / "model").push_to_hub("me/tiny")
    loaded = AutoModelForCausalLM.from_pretrained("me/tiny")
    tokenizer = AutoTokenizer.from_pretrained("me/tiny")
    torch.manual_seed(1)
    adapted = get_peft_model(loaded, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.push_to_hub("me/adapter", private=True)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/tiny"), "me/adapter")
    ids = tokenizer("Where do fish live?", return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained("me/tiny").state_dict()
    return {
        "weights": all(torch.equal(value, plain[name]) for name, value in local.state_dict().items()),
        "template": tokenizer.chat_template is not None,
        "adapter": torch.equal(adapted(**ids).logits, again(**ids).logits),
    }


def rows(folder: Path) -> dict[str, Any]:
    """Push rows as parquet and load them, and rows that lie there as jsonl."""
    from datasets import Dataset, load_dataset

    Dataset.from_list([{"text": f"row {at}"} for at in range(5)]).push_to_hub("me/rows", private=True)
    parquet = load_dataset("me/rows", split="train", cache_dir=str(folder / "datasets"))
    lines = load_dataset("org/lines", split="train", cache_dir=str(folder / "datasets"))
    return {"parquet": parquet["text"][:], "jsonl": lines["text"][:]}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    place = Path(sys.argv[1])
    print(json.dumps({**models(place), **rows(place)}))  # noqa: T201
