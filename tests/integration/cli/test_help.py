"""Help is fast and useful: nothing heavy is loaded for it, and every command shows how it is used."""

import json
import subprocess
import sys

import pytest

HEAVY = {
    "torch", "transformers", "peft", "accelerate", "web3", "eth", "eth_account", "coincurve", "pydantic", "sqlalchemy",
    "fastapi", "uvicorn", "numpy", "httpx", "rich",
}  # fmt: skip
COMMANDS = [
    [],
    ["run"],
    ["submit"],
    ["pull"],
    ["serve-gpu"],
    ["claim"],
    ["serve-hub"],
    ["devnet"],
    ["jobs"],
    ["jobs", "ls"],
    ["jobs", "show"],
    ["jobs", "cancel"],
    ["jobs", "reclaim"],
    ["wallet"],
    ["wallet", "new"],
    ["wallet", "show"],
    ["chain"],
    ["chain", "deploy"],
]
LOOK = """
import contextlib, io, json, sys
from trainchain.cli.main import run_command
text = io.StringIO()
with contextlib.redirect_stdout(text):
    code = run_command(sys.argv[1:])
roots = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"code": code, "text": text.getvalue(), "modules": roots}))
"""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "trainchain")
def test_help_loads_nothing_heavy_and_shows_an_example(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *command, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    found = json.loads(done.stdout)

    assert found["code"] == 0
    assert HEAVY.isdisjoint(found["modules"])
    if command and command not in (["jobs"], ["wallet"], ["chain"]):
        assert "Examples:" in found["text"]
        assert f"trainchain {' '.join(command)}" in found["text"]


@pytest.mark.parametrize("arguments", [["no-such-command"], ["run"], ["jobs", "show"], ["claim", "--no-such-flag"]])
def test_a_usage_mistake_is_one_line_and_a_hint_and_loads_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    found = json.loads(done.stdout)

    assert found["code"] == 2
    assert HEAVY.isdisjoint(found["modules"])
    assert done.stderr.startswith("error[usage.flag] ")
    assert "hint: trainchain" in done.stderr
    assert "Traceback" not in done.stderr
