"""The table of reason codes is the code's: every one used is in it, every one in it is used, each has its place."""

import re
from pathlib import Path

import pytest

from trainchain.core.errors import CODES, TrainChainError

SOURCE = Path(__file__).parents[2] / "trainchain"
RAISED = re.compile(r'TrainChainError\(\s*"([^"]+)"')
CODE = re.compile(r'"([a-z]+\.[a-z_0-9]+)"')
EXIT_CODES = {1, 2, 3, 4, 5, 6, 7, 8}


def sources() -> dict[Path, str]:
    files = [path for path in SOURCE.rglob("*.py") if "node_modules" not in path.parts]
    return {path: path.read_text(encoding="utf-8") for path in files if path != SOURCE / "core" / "errors.py"}


def test_every_code_that_is_raised_stands_in_the_table() -> None:
    unknown = {(path.name, code) for path, text in sources().items() for code in RAISED.findall(text)}

    assert {(name, code) for name, code in unknown if code not in CODES} == set()


def test_every_code_in_the_table_is_used_somewhere() -> None:
    used = {code for text in sources().values() for code in CODE.findall(text)}

    assert set(CODES) - used == set()


@pytest.mark.parametrize("code", CODES)
def test_a_code_has_a_status_an_exit_code_and_a_meaning(code: str) -> None:
    reason = CODES[code]

    assert re.fullmatch(r"[a-z]+\.[a-z0-9_]+", code)
    assert 400 <= reason.status < 600
    assert reason.exit_code in EXIT_CODES
    assert reason.meaning.endswith(".")
    assert reason.meaning[0].isupper()


@pytest.mark.parametrize(
    ("prefix", "exit_code"),
    [("usage.", 2), ("recipe.", 2), ("wallet.", 7), ("session.", 7)],
)
def test_what_is_of_one_kind_ends_alike(prefix: str, exit_code: int) -> None:
    assert {reason.exit_code for code, reason in CODES.items() if code.startswith(prefix)} == {exit_code}


@pytest.mark.parametrize("code", ["hub.unreachable", "chain.unreachable", "chain.timeout", "hub.failed"])
def test_what_may_be_tried_again_says_so(code: str) -> None:
    assert CODES[code].exit_code == 3


def test_every_reason_to_refuse_a_contribution_is_the_sender_s_fault() -> None:
    for code, reason in CODES.items():
        if code.startswith(("contribution.", "delta.", "lease.", "round.", "shard.", "session.", "http.")):
            assert 400 <= reason.status < 500, code


def test_an_error_carries_its_facts_and_no_other_code_can_be_made() -> None:
    error = TrainChainError("contribution.repeat", "Seen.", hint="Go on.", receipt={"a": 1})

    assert (error.status, error.exit_code, str(error)) == (409, 1, "Seen.")
    assert (error.hint, error.facts) == ("Go on.", {"receipt": {"a": 1}})
    with pytest.raises(KeyError):
        TrainChainError("made.up", "No.")
