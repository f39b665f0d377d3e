"""What stands under a key of the recipe's YAML, and how its values are read. Imports pydantic and words."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.functional_validators import AfterValidator, BeforeValidator

from trainchain.core import money
from trainchain.core.errors import TrainChainError
from trainchain.core.models import Address, DataFormat, Encoding, MergeMethod, MergeRule

ADDRESS = re.compile(r"^0x[0-9a-fA-F]{40}$")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _duration(value: object) -> object:
    """Seconds out of "90s", "30m", "48h", "2d"."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d{1,9})\s*([smhd])", value.strip())):
        return int(match.group(1)) * UNITS[match.group(2)]
    raise ValueError("write a time as digits and one of s, m, h, d, for example 30m")


def no_dropout(value: object) -> object:
    if isinstance(value, bool) or value != 0:
        raise ValueError("only 0 is taken: with dropout a replay of the training could not be exact")
    return 0


def _tokens(value: object) -> object:
    """Token units out of "2.50", 2.5 or 2."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError('write an amount of tokens, for example "2.50"')
    try:
        return money.parse(str(value))
    except TrainChainError as error:
        raise ValueError(error.message.rstrip(".")) from None


def _who(value: object) -> object:
    if value in ("anyone", "owner"):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("should be anyone, owner, or a list of wallets' addresses")
    for entry in value:
        if not isinstance(entry, str) or not ADDRESS.fullmatch(entry):
            raise ValueError(f"{str(entry)[:60]!r} is no wallet's address, which has 0x and 40 hex digits")
    return value


def _place(text: str) -> str:
    """A path or an address that this machine can look for."""
    if "\0" in text:
        raise ValueError("no path has a NUL in it")
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise ValueError("there is no home folder of that name here") from None
    return text


Place = Annotated[str, AfterValidator(_place)]
Seconds = Annotated[int, BeforeValidator(_duration), Field(ge=0, le=10 * 365 * 86400)]
Tokens = Annotated[int, BeforeValidator(_tokens), Field(ge=0, lt=2**128)]
Small = Annotated[int, Field(ge=1, le=1_000_000)]
Prompt = Annotated[str, Field(min_length=1, max_length=4096)]


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataEntry(Strict):
    path: Place
    type: DataFormat | None = None
    """Found from the first row when left out."""
    split: Annotated[str, Field(max_length=64)] | None = None
    """Of a data set on a model hub; left out: train for training, test or validation for what is held out."""


class HeldOutEntry(DataEntry):
    rows: Small = 200


class MergeEntry(Strict):
    method: MergeMethod = "product-mean"
    rule: MergeRule = "gate"
    encoding: Encoding = "int4"
    moments: Literal["merged", "fresh"] = "merged"
    outer_learning_rate: Annotated[float, Field(gt=0, le=10)] = 1.0
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    spares: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Of `shards`, rounded down: so many more shards a round has for its tail."""
    leave_one_out: Annotated[float, Field(ge=0, le=1)] | None = None


class PayEntry(Strict):
    token: Literal["TRAIN"] = "TRAIN"
    per_million_tokens: Tokens
    budget: Tokens
    deadline: Seconds = 48 * 3600
    grace: Seconds = 24 * 3600
    activation_delay: Seconds = 0


class CheckEntry(Strict):
    auditors: Literal["any", "owner", "none"] = "any"
    """Who replays: whoever has earned it and the owner and the hub's operator; these two alone; nobody."""
    answer: Seconds = 3600
    """For which a worker may take to answer a draw."""
    timeout: Seconds = 30 * 60
    """For which an answered draw waits for its auditors."""
    before_merge: Seconds = 0
    """For which a round that is full waits for the verdicts on it."""
    spend: Annotated[float, Field(ge=0, le=1)] | None = None
    """The most that audits cost, as a share of the shards' pay. Left out: what auditing every shard once costs, and a
    fifth more."""

    def share(self, segments: int) -> float:
        """`spend`, of a job whose shards have so many segments."""
        return min(1.0, round(1.2 / segments, 6)) if self.spend is None else self.spend


class AccessEntry(Strict):
    workers: Annotated[
        Literal["anyone", "owner"] | Annotated[list[Address], Field(min_length=1, max_length=10_000)],
        BeforeValidator(_who),
    ] = "anyone"
    keys: Literal["owner", "hub"] | None = None
    """Who keeps the keys of the sealed data: a hub of the owner's own, or the hub that the job is published at. Left
    out: owner where not anyone may work, else nothing is sealed."""

    @property
    def holder(self) -> Literal["owner", "hub"] | None:
        return self.keys or (None if self.workers == "anyone" else "owner")
