"""The facts that travel between owner, hub and worker, as frozen and strict models.

Everything here is data: what a stranger sends is parsed into one of these or refused. Imports pydantic and words.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, StringConstraints, ValidationError
from pydantic.functional_validators import BeforeValidator

from trainchain.core.digests import canonical_json, sha256
from trainchain.core.errors import TrainChainError

PROTOCOL = 2
MAX_INT = 2**63 - 1
MAX_ANSWER = 16384
"""Characters of an answer to a sample prompt that are kept."""


def _amount(value: object) -> object:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 40:
        return int(value)
    return value


Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Hash32 = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-f]{64}$")]
Address = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-fA-F]{40}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")]
JobName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$")]
Amount = Annotated[int, BeforeValidator(_amount), PlainSerializer(str, return_type=str), Field(ge=0, lt=2**128)]
Count = Annotated[int, Field(ge=0, le=MAX_INT)]
Positive = Annotated[int, Field(ge=1, le=MAX_INT)]


class Model(BaseModel):
    """Frozen; an unknown field is an error; numbers are finite, and are not read out of strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileRef(Model):
    """A file of the job: its plain name (never a path) and the bytes it must have."""

    name: FileName
    sha256: Digest
    size: Count


DataFormat = Literal["chat_template", "prompt_completion", "text"]


class DataSet(Model):
    """One jsonl file. `rows` counts its lines; `format` names the fields each line has."""

    file: FileRef
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


class Merge(Model):
    method: Literal["product-mean", "factor-mean"]
    encoding: Literal["fp32"]


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
    base_model: list[FileRef]
    datasets: list[DataSet]
    held_out: HeldOut | None
    lora: Lora
    training: Training
    rounds: Positive
    shards: Positive
    steps: Positive
    round_deadline: Positive
    quorum: float
    merge: Merge
    pay: Pay
    samples: Annotated[list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(max_length=16)]
    """Prompts that each merged adapter answers, to show what it learned."""
    sample_tokens: Annotated[int, Field(ge=1, le=1024)]
    counts: list[list[Counts]]
    """`counts[round - 1][shard]`; weights and pay come from here, never from a worker's word."""

    def canonical(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))

    @property
    def spec_hash(self) -> str:
        """sha256 of the canonical JSON: the 32 bytes that stand in escrow."""
        return sha256(self.canonical())

    def only_held_out(self, digest: str) -> bool:
        """Whether a file serves to judge the job and for nothing else in it."""
        if self.held_out is None or digest != self.held_out.dataset.file.sha256:
            return False
        return all(digest != ref.sha256 for ref in [*self.base_model, *(data.file for data in self.datasets)])

    def files(self) -> list[FileRef]:
        """Every object the job needs, each once."""
        held_out = [self.held_out.dataset.file] if self.held_out else []
        every = [*self.base_model, *(d.file for d in self.datasets), *held_out, self.lora.initial]
        return list({ref.sha256: ref for ref in every}.values())


class Lease(Model):
    """A hub's offer: what to train or to measure, from which start adapter. Everything in it becomes part of a path
    or of what is signed, so nothing in it is taken unparsed."""

    lease: Hash32
    kind: Literal["train", "evaluate"]
    job: Hash32
    name: JobName
    spec_hash: Digest
    round: Count
    shard: Count | None
    start: Digest
    expires_in: float


class Contribution(Model):
    """What one worker hands in for one leased shard: the EIP-712 fields, in their signed order.

    `startHash` and `deltaHash` are sha256 digests of safetensors bytes; `stateRoot` is the Merkle root of the
    shard's state leaves (`core/segments.py`).
    """

    jobId: Hash32
    round: Positive
    shard: Count
    lease: Hash32
    worker: Address
    startHash: Hash32
    deltaHash: Hash32
    stateRoot: Hash32
    encoding: Annotated[str, Field(max_length=16)]
    numericClass: Annotated[str, Field(max_length=200)]


class SignedContribution(Model):
    contribution: Contribution
    signature: Annotated[str, Field(max_length=200)]
    losses: Annotated[list[float], Field(max_length=64)] = []
    """Training loss at the shard's first and last steps: shown, never trusted."""
    seconds: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    micro_tokens: Annotated[list[Positive], Field(max_length=100_000)] = []
    """Per segment, how many tokens went through the model at once."""


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
