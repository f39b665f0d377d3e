"""What a command says: the answer on stdout, talk on stderr, one JSON document and nothing else."""

import io
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from trainchain.cli import main as cli
from trainchain.cli.output import Output, may_ask
from trainchain.core.errors import TrainChainError


@pytest.fixture(autouse=True)
def no_signal_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    out, err = capsys.readouterr()
    return out, err


def test_people_and_pipes_get_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(json_mode=False)

    out.note("working")
    out.result("0xjob", {"job": "0xjob"})
    out.hint("look")
    out.hint("")

    assert said(capsys) == ("0xjob\n", "working\nhint: look\n")


def test_programs_get_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(json_mode=True)

    out.note("working")
    out.result("0xjob", {"job": "0xjob"})

    text, talk = said(capsys)
    assert json.loads(text) == {"ok": True, "job": "0xjob"}
    assert text.count("\n") == 1
    assert talk == "working\n"


def test_a_stranger_s_words_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """What a hub says is wrong is repeated."""
    told = TrainChainError("job.closed", "two\nlines \x1b]0;title\x07\x1b[2J", hint="run \x1b[8mthis\r\u202e")

    Output(json_mode=True).error(told)

    text, talk = said(capsys)
    assert talk == "error[job.closed] two\nlines \\x1b]0;title\\x07\\x1b[2J\nhint: run \\x1b[8mthis\\r\\u202e\n"
    assert json.loads(text)["error"]["message"] == told.message


def test_events_are_lines_for_programs_and_talk_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json_mode=True).event({"event": "leased"}, "leased a shard")
    Output(json_mode=False).event({"event": "leased"}, "leased a shard")
    Output(json_mode=False).event({"event": "step"}, None)

    assert said(capsys) == ('{"event": "leased"}\n', "leased a shard\n")


def test_an_answer_can_come_piece_by_piece_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json_mode=True).line("one")
    Output(json_mode=False).line("two \x1b[2J")

    assert said(capsys) == ("two \\x1b[2J\n", "")


def test_what_was_found_before_a_failure_stands_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json_mode=True).error(TrainChainError("verify.root", "No."), steps=[1])

    told = {"code": "verify.root", "message": "No.", "hint": ""}
    assert json.loads(said(capsys)[0]) == {"ok": False, "error": told, "steps": [1]}


def test_a_failure_is_a_document_too(capsys: pytest.CaptureFixture[str]) -> None:
    error = TrainChainError("job.unknown", "No such job.", hint="trainchain jobs ls")

    Output(json_mode=True).error(error)

    text, talk = said(capsys)
    told = {"code": "job.unknown", "message": "No such job.", "hint": "trainchain jobs ls"}
    assert json.loads(text) == {"ok": False, "error": told}
    assert talk == "error[job.unknown] No such job.\nhint: trainchain jobs ls\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_no_name_can_crash_a_command(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    name = "Zoë 模型 \ud800 \U0001f600"

    Output(json_mode=False).result(name, {})
    Output(json_mode=True).result("", {"name": name})
    Output(json_mode=False).note(name)

    stdout.seek(0)
    first, document = stdout.read().splitlines()
    assert first.startswith("Zo")
    assert json.loads(document)["name"] == name
    stderr.seek(0)
    assert stderr.read().startswith("Zo")
    stdout.close()
    stderr.close()


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["nothing"], 2),
        (["jobs", "shwo"], 2),
        (["--nothing"], 2),
        (["run"], 2),
        (["run", "recipe.yaml", "--workers", "0"], 2),
        (["run", "recipe.yaml", "--workers", "many"], 2),
        (["pull", "job", "--round", "x"], 2),
        (["serve-gpu", "--threads", "0"], 2),
        (["claim", "--nothing"], 2),
        (["wallet", "show", "--home", "there-is-no-such-home"], 7),
        (["submit", "there-is-no-such-recipe.yaml"], 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("json_mode", [False, True])
def test_a_failure_is_one_message_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], argv: list[str], code: int, json_mode: bool
) -> None:
    assert cli.run_command([*argv, *(["--json"] if json_mode else [])]) == code

    text, talk = said(capsys)
    assert talk.count("error[") == 1
    assert "Traceback" not in talk
    assert len(talk.splitlines()) <= 3
    if json_mode:
        document = json.loads(text)
        assert document["ok"] is False
        assert set(document["error"]) == {"code", "message", "hint"}
        assert document["error"]["message"].endswith((".", "?"))
    else:
        assert text == ""


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", broken)

    with pytest.raises(ZeroDivisionError):
        cli.run_command(["jobs", "ls"])


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt(), 130), (cli._Terminated(), 143), (BrokenPipeError(), 0)]
)
def test_being_stopped_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: BaseException, code: int
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(cli, "app", stopped)

    assert cli.run_command(["jobs", "ls"]) == code
    assert "Traceback" not in said(capsys)[1]


def test_a_terminal_that_is_closed_stops_a_command_as_sigterm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that was started so as to outlive it, by nohup."""
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("no such signal here")
    for before, wanted in ((signal.SIG_DFL, {"SIGTERM", "SIGHUP"}), (signal.SIG_IGN, {"SIGTERM"})):
        caught: set[str] = set()
        monkeypatch.setattr(cli.signal, "getsignal", lambda _, before=before: before)
        monkeypatch.setattr(cli.signal, "signal", lambda number, _, caught=caught: caught.add(number.name))
        cli.run_command(["--version"])
        assert caught == wanted


def test_without_stdout_or_stderr_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    Output(json_mode=True).result("text", {})
    Output(json_mode=False).note("talk")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_answer_that_a_full_disk_does_not_take_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.FileIO("/dev/full", "w"), encoding="utf-8"))

    full()
    with pytest.raises(TrainChainError) as caught:
        Output(json_mode=False).result("text", {})
    full()
    Output(json_mode=True).error(caught.value)

    assert caught.value.code == "disk.full"
    assert said(capsys)[1].startswith("error[disk.full] The answer")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from trainchain import __version__

    assert cli.run_command(["--version"]) == 0
    assert said(capsys) == (f"{__version__}\n", "")


def test_nobody_is_asked_where_nobody_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    assert not may_ask()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["cache"], "trainchain cache --help"),
        (["data"], "trainchain data --help"),
        (["data", "inspect", "--rows", "0"], "trainchain data inspect --help"),
        (["pull"], "trainchain pull --help"),
        (["nothing"], "trainchain --help"),
    ],
)
def test_a_command_that_lacks_something_says_so_in_one_sentence(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_command([*words, "--json"] if len(words) > 1 else words) == 2

    talk = said(capsys)[1]
    error = next(line for line in talk.splitlines() if line.startswith("error["))
    assert error.endswith((".", "?"))
    assert "Usage" not in error
    assert talk.splitlines()[-1] == f"hint: {hint}"
