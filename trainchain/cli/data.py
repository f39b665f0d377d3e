"""data inspect: what a data file becomes under a recipe, before anything is paid for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainchain.cli.options import Home, Json
from trainchain.cli.output import Output

if TYPE_CHECKING:
    from trainchain.cli.bring import Bringer
    from trainchain.core.models import DataFormat
    from trainchain.core.recipe import Recipe
    from trainchain.core.settings import Settings
    from trainchain.core.train.show import Report

app = typer.Typer(help="Look at training data as the model will see it.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Look at training data as the model will see it."""


@app.command("inspect")
def inspect(
    recipe: Annotated[
        Path, typer.Option("--recipe", "-r", metavar="RECIPE", help="The recipe whose model and lengths count.")
    ],
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="A .jsonl or .parquet file. Default: the recipe's first.")
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, metavar="N", help="Read only the first N rows.")] = None,
    home: Home = None,
    json_: Json = False,
) -> None:
    """Show rows, lengths, packing, which tokens carry loss, and what is cut or left out.

    \b
    Examples:
      trainchain data inspect --recipe recipe.yaml
      trainchain data inspect held_out.jsonl --recipe recipe.yaml --rows 500
      trainchain data inspect train.parquet --recipe recipe.yaml --json
    """
    from trainchain.cli.data_report import draw
    from trainchain.core.recipe import load_recipe
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    asked = load_recipe(recipe)
    path, form, bringer = _data(asked, file, Settings.load(home), out)
    report = _examine(asked, path, form, rows, bringer, out)
    out.result("" if json_ else draw(report, asked.name), report.document())


def _data(
    recipe: Recipe, text: str | None, settings: Settings, out: Output
) -> tuple[Path, DataFormat | None, Callable[[], Bringer]]:
    """The file that is asked for, the format that the recipe gives it, and what brings things from elsewhere."""
    from trainchain.core.entries import DataEntry
    from trainchain.core.sources.address import is_address

    @cache
    def bringer() -> Bringer:
        from trainchain.cli.plan import bringer_of

        return bringer_of(settings, out)

    entries: list[DataEntry] = [*recipe.datasets, *recipe.test_datasets]
    entry = entries[0]
    if text is not None:
        path = text if is_address(text) else str(Path(text).expanduser().absolute())
        entry = next((known for known in entries if known.path == path), DataEntry(path=path))
    if not is_address(entry.path):
        return Path(entry.path), entry.type, bringer
    files = bringer().data(entry.path, "data", entry.split, usual=("train",))
    if len(files) > 1:
        out.note(f"reading  {files[0].ref.path}, the first of {len(files)} files")
    return files[0].path, entry.type, bringer


def _examine(
    recipe: Recipe, path: Path, form: DataFormat | None, rows: int | None, bringer: Callable[[], Bringer], out: Output
) -> Report:
    from trainchain.cli.plan import hush, template_of
    from trainchain.core.sources.address import is_address

    hush()
    from trainchain.core.train.data import vocabulary
    from trainchain.core.train.model import load_config, load_tokenizer
    from trainchain.core.train.show import Job, examine

    # a folder is taken as it is: to pin it would be to read all its weights
    base = recipe.base_model
    folder = bringer().model(base, weights=False)[0] if is_address(base) else Path(base)
    batch_size = recipe.micro_batch_size * recipe.gradient_accumulation_steps
    job = Job(
        sequence_len=recipe.sequence_len,
        batch_size=batch_size,
        seed=recipe.seed,
        sequences=recipe.rounds * recipe.shards * recipe.steps * batch_size,
        files=len(recipe.datasets),
    )
    return examine(
        path,
        form,
        load_tokenizer(folder, template_of(recipe)),
        job,
        limit=rows,
        vocab_size=vocabulary(load_config(folder)),
        tell=lambda count: out.note(f"reading  {count:,} rows"),
    )
