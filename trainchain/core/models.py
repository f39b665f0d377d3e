"""The facts that travel between owner, hub and worker, as frozen and strict models.

Everything here is data: what a stranger sends is parsed into one of these or refused. Imports pydantic and words.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, StringConstraints, ValidationError
from pydantic.functional_validators import AfterValidator, BeforeValidator

from trainchain.core.digests import canonical_json, sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.sharding import spare_shards

PROTOCOL = 7
MAX_INT = 2**63 - 1
MAX_TEMPLATE = 1 << 18
"""Characters of a chat template that a recipe may bring."""
MAX_ANSWER = 16384
"""Characters of an answer to a sample prompt that are kept."""


def _amount(value: object) -> object:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 40:
        return int(value)
    return value


def _inside(path: str) -> str:
    parts = path.split("/")
    if any(part in ("", ".", "..") or part != part.strip() for part in parts) or not path.isprintable():
        raise ValueError("is not the plain path of a file inside its source")
    return path


def _plain(address: str) -> str:
    if not address.isprintable() or address != address.strip():
        raise ValueError("is not one line that can be shown")
    return address


Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Hash32 = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-f]{64}$")]
Address = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-fA-F]{40}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")]
SourcePath = Annotated[str, StringConstraints(max_length=512, pattern=r"^[^\\\\:*?\"<>|]+$"), AfterValidator(_inside)]
"""Where a file lies in its source: names joined by slashes, none of them a way out."""
PinnedSource = Annotated[str, StringConstraints(pattern=r"^(hf|azureml)://.{1,1000}$"), AfterValidator(_plain)]
"""A source's address with its revision fixed: `hf://org/name@<commit>`, `azureml://...versions/3`; core/sources."""
JobName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$")]
Amount = Annotated[int, BeforeValidator(_amount), PlainSerializer(str, return_type=str), Field(ge=0, lt=2**128)]
Count = Annotated[int, Field(ge=0, le=MAX_INT)]
Positive = Annotated[int, Field(ge=1, le=MAX_INT)]


class Model(BaseModel):
    """Frozen; an unknown field is an error; numbers are finite, and are not read out of strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileRef(Model):
    """A file of the job: its plain name (never a path) and the bytes it must have.

    `path` is where it lies in its source; None for what the hub keeps under its digest.
    """

    name: FileName
    sha256: Digest
    size: Count
    path: SourcePath | None = None


class Base(Model):
    """The base model's files. `source` is where every worker fetches them; None where the hub has them from the owner.

    In a sealed job the owner's own files are not named here but in `Sealed`.
    """

    source: PinnedSource | None
    license: Annotated[str, Field(max_length=100)] | None
    """As its source names it."""
    files: list[FileRef]


DataFormat = Literal["chat_template", "prompt_completion", "text"]


class DataSet(Model):
    """One file, jsonl or parquet. `rows` counts its rows; `format` names the fields each has.

    `source` is where every worker fetches it; None where the hub has it from the owner. In a sealed job nobody is
    given the file: `file` is None, and the rows are in the blocks.
    """

    source: PinnedSource | None
    file: FileRef | None
    format: DataFormat
    rows: Positive


class Lora(Model):
    """The adapter. `targets` are full module names of the base; `initial` is round 0's start adapter."""

    r: Positive
    alpha: Positive
    targets: list[str]
    initial: FileRef


class Training(Model):
    """What binds every worker; see the design, section 6."""

    sequence_len: Positive
    batch_size: Positive
    """Packed sequences in one optimizer step."""
    micro_batch_size: Positive
    learning_rate: float
    """The schedule's highest; see `core/schedule.py`."""
    lr_scheduler: Literal["constant", "cosine"]
    warmup_steps: Count
    """At the beginning of the job."""
    shard_warmup_steps: Count
    """At the beginning of each shard, whose AdamW moments are new."""
    max_grad_norm: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    precision: Literal["fp32", "bf16", "fp16"]
    quantization: Literal["none", "nf4"]
    attention: Literal["sdpa", "eager", "varlen"]
    adapter_path: Literal["fused", "peft"]
    """Who computes W x + s B A x: our fused function, or PEFT's own modules."""
    segment_steps: Positive
    """Steps between two committed states; the last segment of a shard may be shorter."""
    seed: Count


class Counts(Model):
    """What one shard holds: documents, tokens that pass through the model, and tokens the loss is taken on."""

    rows: Count
    tokens: Count
    supervised: Count


class HeldOut(Model):
    """The first `rows` rows of the test data, each alone, cut at the sequence length."""

    dataset: DataSet
    rows: Positive
    tokens: Positive
    supervised: Positive


MergeMethod = Literal["product-mean", "factor-mean"]
MergeRule = Literal["none", "clip", "gate", "multi-krum", "coordinate-median", "trimmed-mean"]
Encoding = Literal["fp32", "bf16", "int8", "int4"]


class Access(Model):
    """Who may train the job, and who gives out the keys of its sealed files (None: it has none)."""

    workers: Literal["anyone", "owner"] | Annotated[list[Address], Field(min_length=1, max_length=10_000)]
    keys: Literal["owner", "hub"] | None

    def admits(self, wallet: str, owner: str) -> bool:
        """Whether `wallet` may train or audit the job of `owner`."""
        if isinstance(self.workers, str):
            return self.workers == "anyone" or wallet.lower() == owner.lower()
        return wallet.lower() in {address.lower() for address in self.workers}


class Sealed(Model):
    """What a private job is made of: ciphertexts (age), each under a key of its own, kept by the hub.

    `blocks[round - 1][shard]` are the rows of that shard in the order they are trained in (core/train/blocks.py), the
    spare shards last;
    `base` are the owner's model files under their names, empty where the base has a source.
    """

    blocks: list[list[FileRef]]
    held_out: FileRef | None
    base: list[FileRef]

    def files(self) -> list[FileRef]:
        return [*(ref for row in self.blocks for ref in row), *([self.held_out] if self.held_out else []), *self.base]


class Merge(Model):
    """How a round's deltas travel and become its adapter (core/merge/updates.py)."""

    method: MergeMethod
    rule: MergeRule
    encoding: Encoding
    moments: Literal["merged", "fresh"]
    """AdamW's, at the start of a shard: those that the round before ended with, merged, or zero."""
    outer_learning_rate: Annotated[float, Field(gt=0, le=10)]
    outer_momentum: Annotated[float, Field(ge=0, lt=1)]
    spares: Annotated[float, Field(ge=0, le=1)]
    """Spare shards of a round, as a share of its shards."""
    leave_one_out: Annotated[float, Field(ge=0, le=1)] | None
    """By which share of its start's held-out loss a round may raise it before it is taken apart; None: it never is."""

    @property
    def hands_on(self) -> bool:
        """Whether moments travel with a delta."""
        return self.moments == "merged"


class Check(Model):
    """How work is audited (core/draws.py); times in seconds. `auditors`: `any` who has earned it, beside those of the
    owner and the operator; `owner`, these two's alone; or `none`: nothing is audited."""

    auditors: Literal["any", "owner", "none"]
    answer: Positive
    """For which a worker may take to answer."""
    timeout: Positive
    """For which an answered audit waits for its auditors, in all."""
    before_merge: Count
    """For which a round that is full waits for the verdicts on it."""
    spend: Annotated[float, Field(ge=0, le=1)]
    """The most that audits cost, as a share of the shards' pay."""


class Pay(Model):
    """`per_million_tokens` and `budget` in the token's smallest unit; times in seconds."""

    token: str
    per_million_tokens: Amount
    budget: Amount
    deadline: Positive
    grace: Positive
    activation_delay: Count


class ResolvedRecipe(Model):
    """A recipe with everything pinned: what is published, hashed into the escrow, and trained from."""

    trainchain: Literal[1]
    name: JobName
    base_model: Base
    datasets: list[DataSet]
    held_out: HeldOut | None
    access: Access
    sealed: Sealed | None
    chat_template: Annotated[str, Field(max_length=MAX_TEMPLATE)] | None
    """The Jinja text that turns messages into text, in place of the base's own."""
    hub_model_id: Annotated[str, Field(max_length=300)] | None
    """Where the owner wants the merged adapter pushed: `hf://...` or `azureml:...`."""
    lora: Lora
    training: Training
    rounds: Positive
    shards: Positive
    steps: Positive
    round_deadline: Positive
    quorum: float
    merge: Merge
    check: Check
    pay: Pay
    samples: Annotated[list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(max_length=16)]
    """Prompts that each merged adapter answers, to show what it learned."""
    sample_tokens: Annotated[int, Field(ge=1, le=1024)]
    counts: list[list[Counts]]
    """`counts[round - 1][shard]`, the spare shards last; weights and pay come from here, never from a worker's word."""

    def canonical(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))

    @property
    def spec_hash(self) -> str:
        """sha256 of the canonical JSON: the 32 bytes that stand in escrow."""
        return sha256(self.canonical())

    @property
    def spares(self) -> int:
        """How many spare shards each round has beside its `shards`."""
        return spare_shards(self.merge.spares, self.shards)

    @property
    def all_shards(self) -> int:
        """A round's shards and spare shards: what bounds a shard's number."""
        return self.shards + self.spares

    def only_held_out(self, digest: str) -> bool:
        """Whether a file serves to judge the job and for nothing else in it."""
        judges = [self.held_out.dataset.file] if self.held_out else []
        judges += [self.sealed.held_out] if self.sealed else []
        if all(ref is None or ref.sha256 != digest for ref in judges):
            return False
        blocks = [*self.sealed.base, *(ref for row in self.sealed.blocks for ref in row)] if self.sealed else []
        others = [*self.base_model.files, *(data.file for data in self.datasets), *blocks]
        return all(ref is None or ref.sha256 != digest for ref in others)

    @property
    def audited(self) -> bool:
        """Whether draws are made: an owner who trains alone would only audit themselves."""
        return self.check.auditors != "none" and self.access.workers != "owner"

    @property
    def segments(self) -> int:
        """How many segments each shard has."""
        return -(-self.steps // self.training.segment_steps)

    @property
    def private(self) -> bool:
        """Whether the job's adapters and deltas are for its owner and its workers alone."""
        return self.access.keys is not None

    def files(self) -> list[FileRef]:
        """Every object of the job that its owner uploads to the hub, each once."""
        data = [*self.datasets, *([self.held_out.dataset] if self.held_out else [])]
        every = list(self.base_model.files) if self.base_model.source is None else []
        every += [entry.file for entry in data if entry.file is not None and entry.source is None]
        every += self.sealed.files() if self.sealed else []
        return list({ref.sha256: ref for ref in [*every, self.lora.initial]}.values())


M = TypeVar("M", bound=Model)


def parse(model: type[M], value: Any, *, code: str, what: str) -> M:
    """Validate untrusted JSON (bytes, or a parsed value) into `model`; raises TrainChainError(`code`)."""
    try:
        if isinstance(value, bytes | str):
            return model.model_validate_json(value, strict=True)
        return model.model_validate(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "document"
        raise TrainChainError(code, f"{what} is not valid: {place}: {first['msg']}.") from None
