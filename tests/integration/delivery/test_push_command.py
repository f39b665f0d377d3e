"""`push` and `pull --merged` as they are typed: what is on stdout, what is on stderr, how it ends."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_hf import Hub
from tests.fixtures_hub import Job, Town
from trainchain.cli.main import run_command


@pytest.fixture(scope="module")
def job(town: Town) -> Job:
    made, worker = town.publish(rounds=1, shards=1, name="bot", samples=["Who?"]), town.person()
    worker.work(made)
    town.tick()
    return made


class Typed:
    """Runs commands in a home of its own."""

    def __init__(self, town: Town, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.ends = ["--hub", town.url, "--home", str(home)]
        self.capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = run_command([*arguments, *self.ends])
        said = self.capsys.readouterr()
        return code, said.out, said.err

    def document(self, *arguments: str) -> dict[str, Any]:
        out = self(*arguments, "--json")[1]
        found: dict[str, Any] = json.loads(out)
        return found


@pytest.fixture
def typed(town: Town, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Typed:
    monkeypatch.chdir(tmp_path)
    return Typed(town, tmp_path / "home", capsys)


def test_push_prints_the_address_and_says_what_goes_there(typed: Typed, job: Job, hub: Hub) -> None:
    code, out, err = typed("push", "bot", "hf://me/bot")
    again = typed("push", "bot", "me/bot")

    assert code == 0
    assert out == f"{hub.url}/me/bot\n"
    assert "pushing  round 1 of bot to hf://me/bot" in err
    assert "the whole recipe, with its sample prompts" in err
    assert "already there" not in err
    assert (again[0], again[1]) == (0, out)
    assert "already there: nothing was written" in again[2]


def test_push_answers_with_one_document(typed: Typed, job: Job, hub: Hub) -> None:
    found = typed.document("push", job.id[:14], "me/json")

    assert found["ok"]
    assert {"url", "commit", "created", "files", "target", "job", "round"} < set(found)
    assert (found["commit"], found["job"], found["created"]) == (hub.head("me/json"), job.id, True)
    assert [file["path"] for file in found["files"]][:3] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "leaves"),
    [
        (("push", "bot"), "usage.flag", 2),
        (("push", "bot", "hf://me"), "source.address", 2),
        (("push", "nobody", "me/x"), "job.unknown", 1),
        (("push", "", "me/x"), "job.unknown", 1),
        (("push", ".", "me/x"), "job.unknown", 1),
        (("pull", "bot/contributions"), "job.unknown", 1),
        (("pull", "bot\x1b[2J"), "job.unknown", 1),
        (("push", "bot", "me/x", "--round", "2"), "job.not_ready", 8),
        (("push", "bot", "you/x"), "source.forbidden", 1),
        (("pull", "bot", "--base", "."), "usage.flag", 2),
        (("pull", "bot", "--merged"), "session.required", 7),
        (("pull", "bot", "--merged", "--base", "."), "source.changed", 4),
    ],
)
def test_what_cannot_be_done_ends_with_its_code(
    arguments: tuple[str, ...], code: str, leaves: int, typed: Typed, job: Job, hub: Hub, tmp_path: Path
) -> None:
    assert typed(*arguments)[0] == leaves

    found = typed.document(*arguments)

    assert found["error"]["code"] == code
    assert found["error"]["hint"]
    assert found["error"]["message"].isprintable()
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}
    assert not any(repo == "me/x" for _, repo in hub.repos)


def test_a_model_hub_that_takes_no_commit_is_said_not_to(typed: Typed, job: Job, hub: Hub) -> None:
    hub.fail("/commit/", status=503, times=99, headers={"Retry-After": "0"})

    code, out, err = typed("push", "bot", "me/away")

    assert (code, out) == (3, "")
    assert "did not give or take hf://me/away after 5 tries: it answered 503" in err
    hub.heal()
    assert typed("push", "bot", "me/away")[0] == 0


@pytest.mark.long
def test_no_token_stands_in_anything_that_is_said(typed: Typed, job: Job, hub: Hub) -> None:
    token = hub.token("me")
    for status in (401, 403, 500):
        hub.fail("/", status=status, times=99)
        _, out, err = typed("push", "bot", "me/bot")
        assert token not in out + err
        assert "error[source." in err
        hub.heal()


def test_only_the_wallet_of_a_private_job_s_owner_opens_it(typed: Typed, town: Town, tmp_path: Path) -> None:
    private, worker = town.publish_sealed(rounds=1, shards=1, name="secret"), town.person()
    worker.work(private)
    town.tick()

    code, _, err = typed("pull", "secret")

    assert code == 7
    assert "no wallet in this home" in err
    assert not (tmp_path / "secret-lora").exists()
