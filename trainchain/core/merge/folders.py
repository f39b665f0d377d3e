"""Merging adapters that lie in PEFT folders, whoever trained them: module by module, whole or not at all. Needs numpy.

Only what a method can merge as it stands is taken; the rest is refused by name. Memory is that of one module's factors
from every adapter.
"""

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from trainchain.core.adapter import A_SUFFIX, B_SUFFIX, CONFIG_FILE, PREFIX, WEIGHTS_FILE, Adapter, tensor_header
from trainchain.core.digests import sha256, sha256_file
from trainchain.core.errors import TrainChainError
from trainchain.core.merge.lowrank import Factors
from trainchain.core.merge.methods import METHODS, Wanted, residual
from trainchain.core.merge.peft_folder import TOKENIZER_FILES, AdapterFolder, look

DENSITY = {"ties": 0.2, "dare": 0.5}
"""TIES's own; for DARE what leaves enough for a low rank to hold."""
OFF_BY = 1e-6
MAX_RANK = 65536
OnModule = Callable[[int, int, str, float], None]
"""(done, of how many, module, relative error)."""
Beside = Callable[[Path, Sequence[AdapterFolder], list[float]], None]


def merge_folders(
    folders: Sequence[Path],
    target: Path,
    *,
    method: str = "product-mean",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    any_base: bool = False,
    ready: Callable[[], None] = lambda: None,
    on_module: OnModule = lambda *_: None,
    beside: Beside | None = None,
) -> dict[str, Any]:
    """Write the merge of several adapters into the new folder `target`; the same whatever order they are named in.

    `weights` are shares, one for each folder (default: equal). `rank` is the result's where the method chooses one
    (default: the largest that goes in). `ready` comes when all is checked but the numbers. `beside` puts more into the
    folder before it is put in place. Raises TrainChainError: adapter.unreadable, merge.unmergeable, usage.flag,
    disk.full; then nothing is left of it.
    """
    if len(folders) < 2:
        raise TrainChainError("usage.flag", "One adapter is nothing to merge.", hint="Name two folders or more.")
    if density is not None and not 0 < density <= 1:
        raise TrainChainError(
            "usage.flag", f"--density {density:g} is not above 0 and at most 1.", hint="--density 0.5"
        )
    if density is not None and method in METHODS.keys() - DENSITY.keys():
        raise TrainChainError(
            "usage.flag", f"--density is of ties and dare: {method} takes all numbers.", hint="Leave --density out."
        )
    shares = _shares(weights, len(folders))
    adapters = [look(path) for path in folders]
    _check_alike(adapters, any_base=any_base)
    wanted = _wanted(adapters, method, rank)
    scale, alpha = _common_scale(adapters, method, wanted)
    errors: dict[str, float] = {}
    with _making(target) as making:
        ready()
        in_order = sorted(adapters, key=_beside_weights)
        config = _merged_config(in_order[0], wanted, alpha)
        (making / CONFIG_FILE).write_text(config, encoding="utf-8", newline="\n")
        _copy_tokenizer(in_order, making)
        merged = _merged(adapters, shares, method, wanted, density or DENSITY.get(method, 1.0), scale)
        _write(making / WEIGHTS_FILE, adapters[0], wanted, merged, errors, on_module)
        if beside is not None:
            beside(making, adapters, shares)
    return {
        "folder": str(target),
        "method": method,
        "rank": wanted,
        "alpha": alpha,
        "weights": shares,
        "errors": {module.removeprefix(PREFIX): error for module, error in errors.items()},
        "sha256": sha256_file(target / WEIGHTS_FILE),
    }


def residual_adapter(adapters: Sequence[AdapterFolder], shares: Sequence[float]) -> tuple[Adapter, int]:
    """What the exact mean of the products has more than their `factor-mean`, and its rank: FedEx-LoRA's residual."""
    found: Adapter = {}
    rank = 0
    with _opened(adapters) as files:
        for module in adapters[0].modules:
            each = _lies(adapters, files, shares, module)
            left = residual([one.share for one in each], [one.adapter.factors(one.raw, module) for one in each])
            rank = left.rank
            found[module + A_SUFFIX], found[module + B_SUFFIX] = left.a.astype(np.float32), left.b.astype(np.float32)
    return found, rank


def _merged(
    adapters: Sequence[AdapterFolder], shares: Sequence[float], method: str, rank: int, density: float, scale: float
) -> Iterator[tuple[str, Factors, float]]:
    """Every module's factors of the wanted rank, the result's scale taken out of B again."""
    # One room for the factors of every module: memory that is new each time costs as much as what is done with it.
    room = np.empty(max(sum(adapter.count(module) for adapter in adapters) for module in adapters[0].modules))
    with _opened(adapters) as files:
        for module in adapters[0].modules:
            each = _lies(adapters, files, shares, module)
            drops = [int(sha256(module.encode() + b"".join(one.raw))[:16], 16) for one in each if method == "dare"]
            rooms = np.split(room, np.cumsum([one.adapter.count(module) for one in each]))
            try:
                with np.errstate(over="ignore", invalid="ignore"):  # what does not fit float64 is told of by its result
                    factors = [one.adapter.factors(one.raw, module, own) for one, own in zip(each, rooms, strict=False)]
                    like = factors[0] if factors[0].rank == rank else None
                    wanted = Wanted(rank, like=like, density=density, seeds=drops)
                    found, error = METHODS[method]([one.share for one in each], factors, wanted)
            except np.linalg.LinAlgError:
                raise _too_large(module) from None
            yield module, _padded(Factors(found.b / scale, found.a), rank), error


class _Lying(NamedTuple):
    """One adapter's B and A of a module, as they lie in its file."""

    raw: tuple[bytes, bytes]
    scale: float
    share: float
    adapter: AdapterFolder


def _lies(
    adapters: Sequence[AdapterFolder], files: Sequence[BinaryIO], shares: Sequence[float], module: str
) -> list[_Lying]:
    """A module of every adapter, by its bytes: the order in which folders are named cannot matter."""
    found = [
        _Lying(adapter.raw(file, module), adapter.scales[module], share, adapter)
        for adapter, file, share in zip(adapters, files, shares, strict=True)
    ]
    return sorted(found, key=lambda one: one[:3])


def _write(
    path: Path,
    like: AdapterFolder,
    rank: int,
    merged: Iterator[tuple[str, Factors, float]],
    errors: dict[str, float],
    on_module: OnModule,
) -> None:
    """The safetensors file, tensor by tensor in the order of their names."""
    shapes = {}
    for module in like.modules:
        shapes[module + A_SUFFIX] = (rank, like.slots[module + A_SUFFIX].shape[1])
        shapes[module + B_SUFFIX] = (like.slots[module + B_SUFFIX].shape[0], rank)
    header = tensor_header({name: ("F32", shape, 4 * math.prod(shape)) for name, shape in shapes.items()})
    with path.open("wb") as file:
        file.write(header)
        for done, (module, factors, error) in enumerate(merged, 1):
            for values in (factors.a, factors.b):
                with np.errstate(over="ignore"):
                    narrow = values.astype("<f4")
                if not (np.isfinite(narrow).all() and math.isfinite(error)):
                    raise _too_large(module)
                file.write(narrow.tobytes())
            errors[module] = error
            on_module(done, len(like.modules), module.removeprefix(PREFIX), error)


def _too_large(module: str) -> TrainChainError:
    name = module.removeprefix(PREFIX)
    return TrainChainError("merge.unmergeable", f"Merged, {name} has numbers that fp32 does not hold.")


@contextmanager
def _opened(adapters: Sequence[AdapterFolder]) -> Iterator[list[BinaryIO]]:
    with ExitStack() as stack:
        yield [stack.enter_context((adapter.path / WEIGHTS_FILE).open("rb")) for adapter in adapters]


@contextmanager
def _making(target: Path) -> Iterator[Path]:
    """A folder that takes `target`'s name once all of it is there; after a failure nothing is left."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TrainChainError("usage.flag", f"{target} exists and is not empty.", hint="Name another folder with -o.")
    if target.is_symlink() or os.path.ismount(target) or (target.exists() and target.samefile(Path.cwd())):
        raise TrainChainError(
            "usage.flag",
            f"{target} is a link, a disk of its own or the folder that you are in, so it cannot be put in place whole.",
            hint=f"Name a new folder in it: -o {target / 'merged'}",
        )
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
        try:
            making.chmod(0o755)
            yield making
            if target.exists():
                target.rmdir()
            making.rename(target)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise TrainChainError("usage.file", f"{target} cannot be written: {error.strerror}.") from None
        raise TrainChainError(
            "disk.full", f"The disk of {target} is full: {error.strerror}.", hint="Free some, or name another with -o."
        ) from None


def _check_alike(adapters: Sequence[AdapterFolder], *, any_base: bool) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        both = f"{first.path} and {other.path}"
        if not any_base and first.base != other.base:
            raise TrainChainError(
                "merge.unmergeable",
                f"{both} name different bases: {first.base} and {other.base}.",
                hint="If they are the same base under two names, --base DIR names it.",
            )
        if (first.config.get("layer_replication") or None) != (other.config.get("layer_replication") or None):
            raise TrainChainError("merge.unmergeable", f"{both} build their base differently: see layer_replication.")
        if odd := sorted(first.scales.keys() ^ other.scales.keys()):
            name = odd[0].removeprefix(PREFIX)[:200]
            raise TrainChainError("merge.unmergeable", f"{both} have different target modules: {name} is in one only.")
        for module in first.modules:
            shapes = [
                (each.slots[module + B_SUFFIX].shape[0], each.slots[module + A_SUFFIX].shape[1])
                for each in (first, other)
            ]
            if shapes[0] != shapes[1]:
                name = module.removeprefix(PREFIX)
                raise TrainChainError(
                    "merge.unmergeable",
                    f"{both} are of different bases: {name} maps {shapes[0][1]} to {shapes[0][0]} numbers in one, "
                    f"{shapes[1][1]} to {shapes[1][0]} in the other.",
                )
        for name in sorted(first.vocabulary.keys() & other.vocabulary.keys()):
            if first.vocabulary[name] != other.vocabulary[name]:
                raise TrainChainError("merge.unmergeable", f"{both} have different tokenizers: their {name} differ.")
        if any(each.config.get("use_rslora") for each in (first, other)):
            for module in first.modules:
                if not math.isclose(first.scales[module], other.scales[module], rel_tol=1e-9):
                    raise TrainChainError(
                        "merge.unmergeable",
                        f"{both} scale differently, by {first.scales[module]:.4g} and {other.scales[module]:.4g}, "
                        "and one is an rsLoRA adapter.",
                        hint="Merge adapters that were trained with one lora_r and lora_alpha.",
                    )


def _beside_weights(adapter: AdapterFolder) -> tuple[str, list[str]]:
    """What an adapter's configuration and tokenizer are sorted by: whose the result gets must not hang on the order."""
    files = [adapter.path / name for name in TOKENIZER_FILES]
    return json.dumps(adapter.config, sort_keys=True), [sha256_file(file) if file.is_file() else "" for file in files]


def _copy_tokenizer(adapters: Sequence[AdapterFolder], making: Path) -> None:
    """That of the first folder that brings one: all that do bring the same."""
    for adapter in adapters:
        if adapter.vocabulary:
            for name in TOKENIZER_FILES:
                if (adapter.path / name).is_file():
                    shutil.copyfile(adapter.path / name, making / name)
            return


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0 / count] * count
    if len(weights) != count:
        raise TrainChainError("usage.flag", f"{count} adapters need {count} weights; --weights has {len(weights)}.")
    odd = [weight for weight in weights if not 0 <= weight < 2**64]
    if odd:
        raise TrainChainError("usage.flag", f"--weights has {odd[0]:g}; a weight is a share from 0 to 1.")
    total = math.fsum(weights)
    if not math.isclose(total, 1.0, abs_tol=OFF_BY):
        fair = ",".join(f"{weight / total:.9g}" for weight in weights) if total > 0 else ""
        raise TrainChainError(
            "usage.flag", f"--weights sum to {total:.9g}, not to 1.", hint=f"--weights {fair}" if fair else ""
        )
    return [weight / total for weight in weights]


def _wanted(adapters: Sequence[AdapterFolder], method: str, rank: int | None) -> int:
    """The rank of the result."""
    if method not in METHODS:
        raise TrainChainError(
            "usage.flag", f"There is no method {method!r}.", hint=f"Take one of {', '.join(METHODS)}."
        )
    ranks = [max(adapter.rank(module) for module in adapter.modules) for adapter in adapters]
    fixed = {"stacking": sum(ranks), "factor-mean": max(ranks)}.get(method)
    if fixed is not None and rank not in (None, fixed):
        raise TrainChainError("usage.flag", f"The rank of a {method} is {fixed}, not {rank}.", hint="Leave --rank out.")
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise TrainChainError("usage.flag", f"--rank {rank} is not between 1 and {MAX_RANK}.")
    return fixed or rank or max(ranks)


def _common_scale(adapters: Sequence[AdapterFolder], method: str, rank: int) -> tuple[float, int]:
    """The result's scale, and the lora_alpha that says it: that of all adapters if it is one, else 1."""
    scales = {scale for adapter in adapters for scale in adapter.scales.values()}
    if len(scales) == 1 and (alpha := scales.copy().pop() * rank).is_integer() and alpha > 0:
        return scales.pop(), int(alpha)
    for module in adapters[0].modules if method == "factor-mean" else []:
        found = sorted({adapter.scales[module] for adapter in adapters})
        if len(found) > 1:
            raise TrainChainError(
                "merge.unmergeable",
                f"factor-mean cannot mix scales ({found[0]:.4g} to {found[-1]:.4g}): the factors' sizes mean different "
                "things.",
                hint="--method product-mean merges adapters of any scale.",
            )
    return 1.0, rank


def _merged_config(like: AdapterFolder, rank: int, alpha: int) -> str:
    found = dict(like.config)
    found |= {"r": rank, "lora_alpha": alpha, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    found |= {"inference_mode": True, "init_lora_weights": True, "modules_to_save": None, "bias": "none"}
    found["target_modules"] = [module.removeprefix(PREFIX) for module in like.modules]
    return json.dumps(found, indent=2, sort_keys=True) + "\n"


def _padded(factors: Factors, rank: int) -> Factors:
    lacks = rank - factors.rank
    return Factors(np.pad(factors.b, ((0, 0), (0, lacks))), np.pad(factors.a, ((0, lacks), (0, 0))))
