"""Loads an adapter folder with plain transformers and PEFT, generates, and prints the held-out loss. No trainchain."""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORE = -100


def main(base: str, adapter: str, rows_file: str, rows: int, sequence_len: int) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    total, targets = 0.0, 0
    for line in Path(rows_file).read_text(encoding="utf-8").splitlines()[:rows]:
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor([encoded["input_ids"][:sequence_len]])
        mask = torch.tensor([encoded["assistant_masks"][:sequence_len]]).bool()
        labels = ids.masked_fill(~mask, IGNORE)[:, 1:].flatten()
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").item()
        targets += int((labels != IGNORE).sum())
    prompt = tokenizer("hello", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert "trainchain" not in sys.modules
    new = made.shape[1] - prompt["input_ids"].shape[1]
    sys.stdout.write(json.dumps({"loss": total / targets, "targets": targets, "new": new}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
