"""The model card of an adapter, or of a base with it folded in: a pure function of the recipe and the job's history.

Everything in it is true of the job and stays so: no time of pushing, nothing that was not measured. Names come from
strangers, so the front matter is written by the YAML library and the text holds them in code spans only.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import yaml

from trainchain.core import story
from trainchain.core.history import Chain, History, shares
from trainchain.core.markdown import bullets, code, count, python
from trainchain.core.models import DataSet, FileRef, ResolvedRecipe

CARD_FILE = "README.md"
NAMED = 12
"""So many files are listed by name; the recipe has all of them."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM's --max-lora-rank takes."""
_REPO = r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?"
_HUB_MODEL = re.compile(rf"hf://(?P<id>{_REPO})@(?P<commit>[0-9a-f]{{40}})", re.ASCII)
_HUB_DATA = re.compile(rf"hf://datasets/(?P<id>{_REPO})@(?P<commit>[0-9a-f]{{40}})", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}", re.ASCII)
_OWN_LICENSE = re.compile(rf"other \(({_LICENSE.pattern})\)", re.ASCII)
_FREE = frozenset({"apache-2.0", "mit"})
"""Identifiers that mean the same wherever a source names them; others only as Hugging Face's own."""


@dataclass(frozen=True)
class HubBase:
    """A base on Hugging Face: repository, commit, and the folder in it ("" for its root)."""

    id: str
    commit: str
    folder: str


def hub_base(recipe: ResolvedRecipe) -> HubBase | None:
    """The recipe's base where it lies on Hugging Face."""
    found = _HUB_MODEL.fullmatch(recipe.base_model.source or "")
    if found is None:
        return None
    paths = [ref.path or ref.name for ref in recipe.base_model.files]
    return HubBase(found["id"], found["commit"], paths[0].rpartition("/")[0] if paths else "")


def base_name(recipe: ResolvedRecipe) -> tuple[str, str | None]:
    """What the adapter's configuration calls its base: a repository and its commit, else the recipe's name."""
    found = hub_base(recipe)
    return (found.id, found.commit) if found else (recipe.name, None)


def card(
    recipe: ResolvedRecipe,
    history: History,
    chain: Chain,
    round_: int,
    *,
    where: str | None = None,
    folded: str | None = None,
) -> str:
    """The README.md beside the adapter that was merged in `round_`.

    `folded` is the dtype of the weights where it stands beside the base with the adapter folded in. `where` is the
    repository it is read in (`org/name`), for the lines that show how to use it.
    """
    parts = [
        f"# {recipe.name}",
        _summary(recipe, history, round_, folded),
        *_use(recipe, history, where, folded),
        *_base(recipe),
        *_data(recipe),
        *story.training(recipe, history, round_),
        *story.losses(recipe, history, round_),
        *story.workers(recipe, history, round_),
        *story.checks(recipe, history, round_, evidence=folded is None),
        *story.pay(recipe, history, chain, round_),
        *(story.folding(recipe, history, round_, folded) if folded else story.recheck(recipe, history, round_)),
        *_license(recipe),
    ]
    return front_matter(recipe, folded=folded) + "\n" + "\n\n".join(parts) + "\n"


def front_matter(recipe: ResolvedRecipe, *, folded: str | None = None) -> str:
    """The YAML that Hugging Face reads, between its two lines of dashes."""
    base = hub_base(recipe)
    relation = "finetune" if folded else "adapter"
    found: dict[str, str | list[str]] = {}
    if base is not None:
        found |= {"base_model": base.id, "base_model_relation": relation}
    found |= {"library_name": "transformers" if folded else "peft", "pipeline_tag": "text-generation"}
    found |= _known_license(recipe)
    if data := _hub_data(recipe):
        found["datasets"] = data
    tags = [f"base_model:{relation}:{base.id}"] if base is not None else []
    found["tags"] = [*tags, *([] if folded else ["lora"]), "transformers", "trainchain"]
    text: str = yaml.safe_dump(found, sort_keys=False, default_flow_style=False, width=1000)
    return f"---\n{text}---\n"


def _known_license(recipe: ResolvedRecipe) -> dict[str, str]:
    """The base's licence as Hugging Face takes it, which refuses a card with an identifier that is not its own."""
    name = (recipe.base_model.license or "").strip()
    on_hub = hub_base(recipe) is not None
    if on_hub and (own := _OWN_LICENSE.fullmatch(name)):
        return {"license": "other", "license_name": own[1]}
    return {"license": name} if name in _FREE or (on_hub and _LICENSE.fullmatch(name)) else {}


def _hub_data(recipe: ResolvedRecipe) -> list[str]:
    """Repositories of the training data, each once. A private job names none."""
    if recipe.sealed is not None:
        return []
    found = [_HUB_DATA.fullmatch(entry.source or "") for entry in recipe.datasets]
    return list(dict.fromkeys(match["id"] for match in found if match))


def _summary(recipe: ResolvedRecipe, history: History, round_: int, folded: str | None) -> str:
    base = hub_base(recipe)
    name = f"[{base.id}](https://huggingface.co/{base.id})" if base else "a base model"
    brought = shares(recipe, history, round_)
    tokens = sum(share.tokens for share in brought)
    who = "1 worker" if len(brought) == 1 else f"{len(brought)} workers"
    what = (
        f"{name} with a LoRA adapter folded into its weights. The adapter was"
        if folded
        else f"A LoRA adapter for {name},"
    )
    lines = [
        f"{what} trained by {who} with TrainChain on {tokens:,} tokens, in {count(round_, 'round')} of "
        f"{count(recipe.shards, 'shard')} of {count(recipe.steps, 'step')}."
    ]
    before, after = history.loss(0), history.loss(round_)
    if before is not None and after is not None:
        lines.append(f"Held-out loss: {before:.4f} before, {after:.4f} after.")
    if history.state in ("expired", "cancelled"):
        lines.append(f"The job was to have {count(recipe.rounds, 'round')}; it is {history.state}.")
    elif round_ < recipe.rounds:
        lines.append(f"The job has {count(recipe.rounds, 'round')}; this is the adapter of round {round_}.")
    return " ".join(lines)


def _use(recipe: ResolvedRecipe, history: History, where: str | None, folded: str | None) -> Iterator[str]:
    base = hub_base(recipe)
    here = f'"{where or "DIR"}"'
    note = [] if where else ["# DIR is this folder."]
    yield "## How to use it"
    if folded:
        yield python(
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            *note,
            f"tokenizer = AutoTokenizer.from_pretrained({here})",
            f"model = AutoModelForCausalLM.from_pretrained({here})",
        )
        yield f"vLLM: `vllm serve {where or 'DIR'}`"
        return
    told = '"BASE"'
    if base:
        told = f'"{base.id}", revision="{base.commit}"'
        told += f", subfolder={json.dumps(base.folder)}" if base.folder else ""
    yield python(
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        *([] if base else ["# BASE is the folder of the base model, which is named below."]),
        *note,
        f"tokenizer = AutoTokenizer.from_pretrained({told})",
        f"model = AutoModelForCausalLM.from_pretrained({told})",
        f"model = PeftModel.from_pretrained(model, {here})",
    )
    if recipe.chat_template is not None:
        yield (
            "Conversations were laid out by `chat_template.jinja` beside this card, not by the base's own template: "
            'set `tokenizer.chat_template = open("chat_template.jinja").read()`.'
        )
    rank = next((rank for rank in RANKS if rank >= recipe.lora.r), None)
    if rank is not None:
        served = f"{base.id} --revision {base.commit}" if base and not base.folder else "BASE"
        line = f"vllm serve {served} --enable-lora --max-lora-rank {rank} --lora-modules {recipe.name}={where or 'DIR'}"
        yield f"vLLM: `{line}`"
    yield (
        "For programs that take no adapters (llama.cpp and Ollama from a GGUF file, among others), "
        f"`trainchain pull {history.job[:12]} --merged` writes the base with the adapter folded in."
    )


def _base(recipe: ResolvedRecipe) -> Iterator[str]:
    base, manifest = hub_base(recipe), recipe.base_model
    yield "## Base model"
    if base:
        where = f"`{base.id}` on Hugging Face at commit `{base.commit}`"
        yield where + (f", folder {code(base.folder)}." if base.folder else ".")
    elif manifest.source is not None:
        yield f"{code(manifest.source, 1100)}"
    elif recipe.sealed is not None:
        yield "A private model of the job's owner; it is not named."
        return
    else:
        yield "A model that the job's owner published with the job as files."
    yield "Every worker checked each file's sha256 before it trained:"
    yield _files(manifest.files)
    how = {"none": "", "nf4": ", quantised to 4 bits (NF4) while it was trained on"}[recipe.training.quantization]
    yield f"Its weights were held in {recipe.training.precision}{how}, and did not change."


def _data(recipe: ResolvedRecipe) -> Iterator[str]:
    yield "## Training data"
    private = recipe.sealed is not None
    if private:
        yield "Private and not named here. Each worker got the rows of the shards it trained, encrypted on their way."
    yield bullets([_data_set(entry, private) for entry in recipe.datasets])
    if recipe.held_out is not None:
        held = recipe.held_out
        what = "" if private else f" of {_data_set(held.dataset, private)}"
        yield (
            f"Held out to measure by: the first {count(held.rows, 'row')}{what}; {held.tokens:,} tokens, "
            f"{held.supervised:,} of them with loss."
        )


def _data_set(entry: DataSet, private: bool) -> str:
    kind = {"chat_template": "chats", "prompt_completion": "prompts with completions", "text": "text"}[entry.format]
    told = f"{count(entry.rows, 'row')} of {kind}"
    if private or entry.file is None:
        return told
    found = _HUB_DATA.fullmatch(entry.source or "")
    if found:
        told += f", `{found['id']}` on Hugging Face at commit `{found['commit']}`"
    elif entry.source is not None:
        told += f", {code(entry.source, 1100)}"
    return f"{told}, file {code(entry.file.path or entry.file.name, 600)}, sha256 `{entry.file.sha256}`"


def _license(recipe: ResolvedRecipe) -> Iterator[str]:
    yield "## Licence"
    if recipe.base_model.license:
        yield f"The base's: {code(recipe.base_model.license)}, as its source names it."
    else:
        yield "The base's licence applies; it is not named by its source."


def _files(files: Sequence[FileRef]) -> str:
    """The weights first, as they are what matters most."""
    ordered = sorted(files, key=lambda ref: (not ref.name.endswith(".safetensors"), ref.name))
    lines = [f"`{ref.name}` `{ref.sha256}`" for ref in ordered[:NAMED]]
    if len(ordered) > NAMED:
        lines.append(f"and {count(len(ordered) - NAMED, 'more file')}, named in the recipe")
    return bullets(lines)
