"""What `jobs show` and `pull` tell of a job's samples: a line each on a terminal, all of it in the file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_hub import Person, Town
from trainchain.cli import delivery
from trainchain.cli.jobs import WIDTH, describe

PROMPTS = ["Who wrote this?", "Where do " + "fish " * 30 + "live?"]


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    made = Town(tmp_path_factory.mktemp("town"))
    yield made
    made.close()


def answer(town: Town, job_id: str, samples: list[str]) -> None:
    evaluator = town.person(town.evaluator_keys)
    lease = next(lease for lease in iter(evaluator.lease, None) if lease["job"] == job_id)
    evaluator.post(f"/v1/leases/{lease['lease']}/evaluation", {"loss": None, "samples": samples}).raise_for_status()


def test_samples_are_shown_one_line_each_and_pulled_whole(town: Town, tmp_path: Path) -> None:
    job, worker = town.publish(rounds=1, shards=1, samples=PROMPTS), town.person()
    assert "samples" not in describe(job.view())
    answer(town, job.id, ["hm", ""])
    before = describe(job.view())
    worker.work(job)
    town.tick()
    answers = ["\x1b[31mNobody\n wrote\tthis.", "in the " + "deep " * 40]
    answer(town, job.id, answers)

    lines = describe(job.view()).splitlines()
    client = worker.client()
    pulled = delivery.fetch(client, job.id, tmp_path / "adapter")
    client.close()

    assert "samples of the base\n  > Who wrote this?\n    hm\n" in before
    shown = lines[lines.index("samples after round 1") + 1 :]
    assert shown[:2] == ["  > Who wrote this?", "     [31mNobody wrote this."]
    assert [line[:14] for line in shown[2:]] == ["  > Where do f", "    in the dee"]
    assert all(line.isprintable() and len(line) <= WIDTH for line in shown)
    assert not any(line.startswith("held-out loss") for line in lines)
    told: dict[str, Any] = json.loads((tmp_path / "adapter" / "trainchain.json").read_text(encoding="utf-8"))
    assert told["samples"] == pulled["samples"]
    assert told["samples"] == [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, answers, strict=True)]


@pytest.fixture
def anna(town: Town) -> Person:
    return town.person()


def test_a_job_without_prompts_shows_none(town: Town, anna: Person, tmp_path: Path) -> None:
    job = town.publish(rounds=1, shards=1)
    anna.work(job)
    town.tick()
    client = anna.client()

    assert "samples" not in describe(job.view())
    assert delivery.fetch(client, job.id, tmp_path / "adapter")["samples"] == []
    client.close()
