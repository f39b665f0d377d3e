"""`--help` and usage errors answer at once: a fresh interpreter, and nothing heavy in it."""

import json
import subprocess
import sys
from typing import Any

import pytest

HEAVY = {
    "torch", "transformers", "peft", "accelerate", "web3", "eth_account", "eth", "pydantic", "sqlalchemy", "numpy",
    "httpx", "fastapi", "uvicorn", "safetensors", "obstore", "yaml", "rich", "requests", "coincurve",
}  # fmt: skip
LOOK = """
import contextlib, io, json, sys
from trainchain.cli.main import app, run_command

import typer

def paths(command, path=()):
    yield path
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from paths(inner, (*path, name))

said = {}
for path in ARGV or [[*path, "--help"] for path in paths(typer.main.get_command(app))]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(list(path))
    said[" ".join(path)] = [code, out.getvalue(), err.getvalue()]
print(json.dumps({"said": said, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def look(arguments: list[list[str]]) -> dict[str, Any]:
    """Run these in one fresh interpreter: what each said, and what was imported by the end."""
    program = LOOK.replace("ARGV", repr(arguments))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def helped() -> dict[str, Any]:
    """`--help` of every command there is."""
    return look([])


def test_no_help_loads_anything_heavy(helped: dict[str, Any]) -> None:
    assert HEAVY & set(helped["modules"]) == set()


def test_every_help_is_an_answer(helped: dict[str, Any]) -> None:
    assert {"--help", "run --help", "submit --help", "jobs show --help", "serve-gpu --help"} <= set(helped["said"])
    for code, out, err in helped["said"].values():
        assert (code, err) == (0, "")
        assert out.startswith("Usage: ")


def test_every_command_shows_how_it_is_used(helped: dict[str, Any]) -> None:
    groups = {"--help", "cache --help", "data --help", "jobs --help", "wallet --help", "chain --help"}
    for command, (_, out, _) in helped["said"].items():
        if command in groups:
            continue
        examples = out.partition("Examples:\n")[2]
        mine = f"trainchain {command.removesuffix(' --help')}"
        assert any(line.strip().startswith(mine) or f" {mine}" in line for line in examples.splitlines()), command


def test_every_line_of_help_fits_a_terminal(helped: dict[str, Any]) -> None:
    for command, (_, out, _) in helped["said"].items():
        assert [line for line in out.splitlines() if len(line) > 80] == [], command


def test_a_usage_error_loads_nothing_heavy_either() -> None:
    found = look([["nothing"], ["run"], ["jobs", "show"], ["pull", "x", "--round", "y"], ["--version"], ["run", "--x"]])

    assert HEAVY & set(found["modules"]) == set()
    assert [code for code, _, _ in found["said"].values()] == [2, 2, 2, 2, 0, 2]
