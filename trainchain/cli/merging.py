"""What `merge` does between its flags and its answer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainchain.cli.output import Output
from trainchain.core.errors import TrainChainError

if TYPE_CHECKING:
    from trainchain.core.merge.peft_folder import AdapterFolder

RESIDUAL = "residual"
"""A factor mean, and a base of its own that has what it lacks."""
CHANGED_BASE = "base"
"""That base's folder, beside the adapter."""
MUCH = 0.01
ROUNDING = 1e-7
"""What is written is fp32: smaller errors are not worth a figure."""


def merge(
    adapters: list[Path],
    output: Path,
    out: Output,
    *,
    method: str,
    weights: str | None,
    rank: int | None,
    density: float | None,
    base: Path | None,
    eval_: Path | None,
    rows: int,
) -> dict[str, Any]:
    """Merge, tell of every module, and measure where that was asked for."""
    from trainchain.core.merge.folders import merge_folders
    from trainchain.core.merge.methods import METHODS

    if method not in (names := [*METHODS, RESIDUAL]):
        raise TrainChainError("usage.flag", f"There is no method {method!r}.", hint=f"Take one of {', '.join(names)}.")
    if (eval_ is not None or method == RESIDUAL) and base is None:
        raise TrainChainError("usage.flag", f"{'--eval' if eval_ else 'residual'} needs the base.", hint="--base DIR")
    for path in (path for path in (base, eval_) if path is not None and not path.exists()):
        raise TrainChainError("usage.file", f"{path} is not there.", hint="Check the path.")

    def told(done: int, count: int, module: str, error: float) -> None:
        out.note(f"{done:>{len(str(count))}}/{count}  error {_share(error)}  {module}")

    residual = method == RESIDUAL
    losses = _losses(base, eval_, adapters, output, residual, out, rows) if base is not None and eval_ else iter(())
    measured: dict[str, float | None] = {}

    def ready() -> None:
        """What there is, is measured first: a base, rows or an adapter that do not fit are told of before the work."""
        measured.update(islice(losses, 1 + len(adapters)))

    document = merge_folders(
        adapters,
        output,
        method="factor-mean" if residual else method,
        weights=_numbers(weights),
        rank=rank,
        density=density,
        any_base=base is not None,
        ready=ready,
        on_module=told,
        beside=partial(_fold_residual, base, output / CHANGED_BASE, out) if residual and base is not None else None,
    )
    worst = max(document["errors"], key=document["errors"].__getitem__)
    out.note(
        f"merged   {len(adapters)} adapters by {method}, rank {document['rank']}; "
        f"largest error {_share(document['errors'][worst]).strip()}, in {worst}"
    )
    if method == "product-mean" and document["errors"][worst] > MUCH:
        out.hint("A higher --rank loses less, --method stacking nothing.")
    if residual:
        document |= {"method": method, "base": str(output / CHANGED_BASE)}
        out.note(f"base     {document['base']}  what the adapter lacks of the exact mean is folded into it: use both")
    if measured:
        document["losses"] = measured | dict(losses)
    return document


def _fold_residual(
    base: Path, changed: Path, out: Output, making: Path, adapters: Sequence[AdapterFolder], shares: list[float]
) -> None:
    from trainchain.cli.plan import hush

    hush()
    from trainchain.core.adapter import CONFIG_FILE, PREFIX
    from trainchain.core.merge.folders import residual_adapter
    from trainchain.core.models import FileRef, Lora
    from trainchain.core.train.fold import fold

    adapter, rank = residual_adapter(adapters, shares)
    targets = [module.removeprefix(PREFIX) for module in adapters[0].modules]
    none = FileRef(name="initial.safetensors", sha256="0" * 64, size=0)
    (making / CHANGED_BASE).mkdir()
    out.note(f"base     folding the residual, of rank {rank}, into {base}")
    fold(base, adapter, Lora(r=rank, alpha=rank, targets=targets, initial=none), making / CHANGED_BASE)
    # With the base that it was merged on it would be wrong, and nothing would say so.
    config = json.loads((making / CONFIG_FILE).read_bytes())
    config |= {"base_model_name_or_path": str(changed.absolute()), "revision": None}
    (making / CONFIG_FILE).write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n"
    )


def _losses(
    base: Path, rows_of: Path, adapters: list[Path], result: Path, residual: bool, out: Output, rows: int
) -> Iterator[tuple[str, float | None]]:
    """The held-out losses of the base, of what was merged, and of the result, each measured when it is asked for."""
    from trainchain.cli.plan import hush

    hush()  # before the libraries that it is for
    from trainchain.core.train.compare import held_out_losses

    def told(name: str, loss: float, more: str = "") -> tuple[str, float | None]:
        out.note(f"loss     {loss:.4f}  {name}{more}")
        return name, loss if math.isfinite(loss) else None  # JSON has no other word

    wanted = adapters if residual else [*adapters, result]
    for name, loss in zip(["base", *map(str, wanted)], held_out_losses(base, rows_of, wanted, limit=rows), strict=True):
        yield told(name, loss)
    if residual:
        own = list(held_out_losses(result / CHANGED_BASE, rows_of, [result], limit=rows))
        yield told(str(result), own[1], " on its own base")


def _share(error: float) -> str:
    if 0 < error < ROUNDING:
        return f" < {ROUNDING:.0e}"
    return f"{100 * error:6.2f} %" if error >= 5e-5 or error == 0 else f"{error:8.1e}"


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise TrainChainError(
            "usage.flag", f"--weights {text[:60]!r} is not a list of numbers.", hint="--weights 0.7,0.3"
        ) from None
