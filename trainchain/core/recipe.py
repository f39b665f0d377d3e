"""The YAML an owner writes: parsed strictly, every mistake named with its line. Imports pydantic, yaml and words.

Names are axolotl's where axolotl has one. Nothing is resolved here: paths are only made absolute.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator
from pydantic.functional_validators import BeforeValidator

from trainchain.core.entries import (
    ADDRESS,
    AccessEntry,
    CheckEntry,
    DataEntry,
    HeldOutEntry,
    MergeEntry,
    PayEntry,
    Place,
    Prompt,
    Seconds,
    Small,
    Strict,
    no_dropout,
)
from trainchain.core.errors import TrainChainError

MAX_BYTES = 1 << 20
MAX_STEPS = 100_000
"""In a shard; a hub sums the learning rate over them."""
LONGEST_SHOWN = 120
"""Characters of a wrong value in a message."""

OTHER_TOOLS = {  # how LLaMA-Factory, TRL and PEFT call what is known here by another name
    "model_name_or_path": "base_model",
    "model": "base_model",
    "dataset": "datasets",
    "data": "datasets",
    "train": "datasets",
    "eval_dataset": "test_datasets",
    "cutoff_len": "sequence_len",
    "max_length": "sequence_len",
    "max_seq_length": "sequence_len",
    "per_device_train_batch_size": "micro_batch_size",
    "batch_size": "micro_batch_size",
    "lora_rank": "lora_r",
    "rank": "lora_r",
    "r": "lora_r",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "finetuning_type": "adapter",
    "lr": "learning_rate",
    "max_steps": "steps",
    "reward": "pay",
    "eval_samples": "samples",
    "max_new_tokens": "sample_tokens",
}
INSTEAD = {  # known words that mean something else here: why, and what to write
    "flash_attention": ("the kernel is chosen by one key", "Write `attention: varlen` instead."),
    "flash_attn": ("the kernel is chosen by one key", "Write `attention: varlen` instead."),
    "sdp_attention": ("the kernel is chosen by one key", "Write `attention: sdpa` instead."),
    "eager_attention": ("the kernel is chosen by one key", "Write `attention: eager` instead."),
    "load_in_4bit": ("how the base is quantised follows from the adapter", "Write `adapter: qlora` instead."),
    "load_in_8bit": ("bases are quantised to 4 bits, or not at all", "Write `adapter: qlora` instead."),
    "gradient_checkpointing": (
        "trading time for memory changes no result, so it is each worker's own choice",
        "Remove it; a worker says `serve-gpu --checkpointing`.",
    ),
}
LATER = {  # known words that this version does not honour: refused, since money depends on the recipe's meaning
    "gate": "gates",
    "num_epochs": "counting in epochs (write rounds, shards and steps)",
    "val_set_size": "splitting a held-out set off (name a file under test_datasets)",
    "lora_modules_to_save": "whole modules beside the adapter",
}


class Recipe(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$")]
    base_model: Place
    datasets: Annotated[list[DataEntry], Field(min_length=1, max_length=64)]
    test_datasets: Annotated[list[HeldOutEntry], Field(max_length=1, default_factory=list)]
    adapter: Literal["lora", "qlora"] = "lora"
    """`qlora` keeps the base in NF4."""
    chat_template: Place | None = None
    """A file: the Jinja text that is used in place of the base's own."""
    lora_r: Annotated[int, Field(ge=1, le=1024)] = 8
    lora_alpha: Small = 16
    lora_dropout: Annotated[Literal[0], BeforeValidator(no_dropout)] = 0
    lora_target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    sequence_len: Annotated[int, Field(ge=8, le=1 << 20)] = 512
    micro_batch_size: Annotated[int, Field(ge=1, le=65536)] = 2
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65536)] = 4
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """At the beginning of the job."""
    shard_warmup_steps: Annotated[int, Field(ge=0, lt=2**63)] = 5
    """At the beginning of each shard."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    bf16: Literal["auto"] | bool = "auto"
    fp16: bool = False
    attention: Literal["sdpa", "eager", "varlen"] | None = None
    """Left out: sdpa, or eager for a model that needs it."""
    adapter_path: Literal["fused", "peft"] = "fused"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    shards: Annotated[int, Field(ge=1, le=100_000)]
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    segment_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    """An eighth of `steps`, rounded up, when left out."""
    round_deadline: Seconds = 30 * 60
    quorum: Annotated[float, Field(gt=0, le=1)] = 0.75
    merge: Annotated[MergeEntry, Field(validate_default=True)] = MergeEntry()
    check: CheckEntry = CheckEntry()
    access: AccessEntry = AccessEntry()
    hub_model_id: Annotated[str, Field(min_length=1, max_length=300)] | None = None
    """Where the merged adapter is pushed: `me/name` or `hf://me/name` on Hugging Face, or `azureml:name`."""
    samples: Annotated[list[Prompt], Field(max_length=16, default_factory=list)]
    sample_tokens: Annotated[int, Field(ge=1, le=1024)] = 64
    pay: PayEntry

    @field_validator("merge")
    @classmethod
    def _can_be(cls, value: MergeEntry, info: ValidationInfo) -> MergeEntry:
        if value.leave_one_out is not None and not info.data.get("test_datasets"):
            raise ValueError("`leave_one_out` needs `test_datasets`: it goes by the held-out loss")
        if value.moments == "merged" and info.data.get("adam_beta1", 0.0) ** 2 >= info.data.get("adam_beta2", 1.0):
            raise ValueError("`moments: merged` needs an `adam_beta2` above `adam_beta1` squared: no step has a bound")
        return value

    @field_validator("fp16")
    @classmethod
    def _one_precision(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("bf16") is True:
            raise ValueError("`bf16: true` and `fp16: true` exclude each other")
        return value


PARENTS: dict[str, type[BaseModel]] = {
    **{"pay": PayEntry, "merge": MergeEntry, "check": CheckEntry, "access": AccessEntry},
    **{"datasets": DataEntry, "test_datasets": HeldOutEntry},
}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people mean it: `1e-4` is a number, an address is none, and a key given twice is a mistake."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
# Before the integers: the first that fits is taken.
_Loader.yaml_implicit_resolvers["0"].insert(0, ("tag:yaml.org,2002:str", ADDRESS))


def load_recipe(path: Path) -> Recipe:
    """Read and validate a recipe; relative paths in it are taken from its own folder.

    Raises `usage.file`, `recipe.not_yaml`, `recipe.unknown_key`, `recipe.unsupported`, `recipe.invalid`.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TrainChainError("recipe.not_yaml", f"{path} is over {MAX_BYTES} bytes: not a recipe.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise TrainChainError(
            "usage.file", f"The recipe {path} cannot be read: {reason}.", hint="Check the path."
        ) from None
    return parse_recipe(text, str(path), path.resolve().parent)


def parse_recipe(text: str, where: str, folder: Path) -> Recipe:
    try:
        _no_aliases(text)
        node = yaml.compose(text, Loader=_Loader)
        lines = _lines(node) if node else {}
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it nests too deeply, or is not YAML"
        raise TrainChainError(
            "recipe.not_yaml",
            f"{where}{line}: {problem}.",
            hint="Check indentation, colons and quotes there.",
        ) from None
    if not isinstance(value, dict):
        raise TrainChainError(
            "recipe.not_yaml",
            f"{where} is not a mapping of keys to values.",
            hint="Write lines such as `name: support-bot`.",
        )
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        raise _explain(error, where, lines, value) from None
    return recipe.model_copy(
        update={
            "base_model": _absolute(recipe.base_model, folder),
            "chat_template": recipe.chat_template and str(folder / Path(recipe.chat_template).expanduser()),
            "datasets": [d.model_copy(update={"path": _absolute(d.path, folder)}) for d in recipe.datasets],
            "test_datasets": [d.model_copy(update={"path": _absolute(d.path, folder)}) for d in recipe.test_datasets],
        }
    )


def _absolute(text: str, folder: Path) -> str:
    address = "://" in text or text.lower().startswith(("azureml:", "/subscriptions/"))  # as `sources.address` has it
    return text if address else str(folder / Path(text).expanduser())


def _no_aliases(text: str) -> None:
    """A page of aliases to aliases unfolds to more than fits in memory, and a recipe has no use for one."""
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not read in a recipe")


def _lines(node: yaml.Node, path: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], int]:
    """Where each key of the document stands; raises a YAML error for a key given twice."""
    found: dict[tuple[str | int, ...], int] = {path: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            here = (*path, str(key.value))
            if here in found:
                raise yaml.MarkedYAMLError(problem=f"the key `{key.value}` stands twice", problem_mark=key.start_mark)
            found |= _lines(child, here)
            found[here] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            found |= _lines(child, (*path, index))
    return found


def _explain(
    error: ValidationError, where: str, lines: dict[tuple[str | int, ...], int], value: object
) -> TrainChainError:
    """The first mistake as one clear message: where it is, what it is, what to write instead."""
    # A key that is missing is told last: it may stand there, misspelled.
    first = min(error.errors(include_url=False), key=lambda e: (e["type"] == "missing", lines[_known(e["loc"], lines)]))
    place = _known(first["loc"], lines)
    line = f"{where}:{lines[place]}" if place else where
    keys = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        return _unknown_key(line, keys)
    name = ".".join(str(part) for part in place) or keys[0]
    if first["type"] == "missing":
        return TrainChainError(
            "recipe.invalid",
            f"{where}: `{'.'.join(keys)}` is missing.",
            hint=f"Add `{keys[-1]}:` to the recipe.",
        )
    given = repr(_at(value, place))
    given = given if len(given) <= LONGEST_SHOWN else f"{given[:LONGEST_SHOWN]}.."
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return TrainChainError(
        "recipe.invalid",
        f"{line}: `{name}` is {given}: {message}.",
        hint=f"Correct `{name}` and try again.",
    )


def _at(value: Any, place: tuple[str | int, ...]) -> Any:
    """The value at a place of the document, as far as the place leads."""
    for part in place:
        fits = isinstance(value, list) if isinstance(part, int) else isinstance(value, dict) and part in value
        value = value[part] if fits else value
    return value


def _known(loc: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int]) -> tuple[str | int, ...]:
    """The longest beginning of `loc` that is a place in the document (unions add parts of their own)."""
    for end in range(len(loc), 0, -1):
        if loc[:end] in lines:
            return loc[:end]
    return ()


def _unknown_key(line: str, keys: list[str]) -> TrainChainError:
    key = keys[-1]
    if len(keys) == 1 and key in LATER:
        return TrainChainError(
            "recipe.unsupported",
            f"{line}: `{key}`: this version does not have {LATER[key]}.",
            hint=f"Remove `{key}` from the recipe.",
        )
    if len(keys) == 1 and key in INSTEAD:
        reason, hint = INSTEAD[key]
        return TrainChainError("recipe.unsupported", f"{line}: `{key}`: {reason}.", hint=hint)
    owner = PARENTS.get(keys[0], Recipe) if len(keys) > 1 else Recipe
    near = OTHER_TOOLS.get(key) if len(keys) == 1 else None
    near = near or next(iter(difflib.get_close_matches(key, owner.model_fields, n=1, cutoff=0.5)), None)
    known = ", ".join(owner.model_fields)
    hint = f"Write `{near}` instead." if near else f"Known keys here: {known}."
    return TrainChainError("recipe.unknown_key", f"{line}: `{'.'.join(keys)}` is not a key of a recipe.", hint=hint)
