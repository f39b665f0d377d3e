"""The documentation says what the code does: codes, states, commands, links."""

import re
import tomllib
from pathlib import Path

import pytest

from trainchain.core.errors import CODES
from trainchain.core.states import MOVES

ROOT = Path(__file__).parents[2]
PAGES = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), ROOT / "recipes" / "quickstart" / "README.md"]


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_reason_code_is_documented_as_it_is() -> None:
    row = re.compile(r"^\| `([a-z_.0-9]+)` \| (\d+) \| (\d+) \| (.*) \|$", re.MULTILINE)

    documented = {
        code: (int(status), int(leave), text) for code, status, leave, text in row.findall(_read("docs/errors.md"))
    }

    assert documented == {code: (reason.status, reason.exit_code, reason.meaning) for code, reason in CODES.items()}


def test_every_move_of_a_state_is_drawn() -> None:
    drawn = set(re.findall(r"^\s+(\w+) --> (\w+)$", _read("docs/states.md"), re.MULTILINE))

    legal = {
        (str(before), str(after)) for moves in MOVES.values() for before, afters in moves.items() for after in afters
    }

    assert drawn == legal


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_leads_nowhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))

    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]

    assert missing == []


def test_every_dependency_earns_its_place_in_a_line() -> None:
    project = tomllib.loads(_read("pyproject.toml"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[<>=\[ ]", line, maxsplit=1)[0] for line in wanted}

    table = " ".join(line for line in _read("docs/decisions.md").splitlines() if line.startswith("|"))

    assert {name for name in names if not re.search(rf"\b{re.escape(name)}\b", table)} == set()


def test_every_command_is_in_the_documentation() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "trainchain" / "cli").glob("*.py"))
    top = re.findall(r'app\.command\("([a-z-]+)"\)\(', source)
    assert {"run", "submit", "serve-hub", "serve-gpu", "pull", "claim"} <= set(top)

    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)

    assert [command for command in top if f"trainchain {command}" not in text] == []
