"""How long a round takes with audits on and off, and with an auditor that is slow, dead or missing.

Real processes on loopback: a hub, one worker, and where there is one the owner's auditor, over the
quickstart's base and rows.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import Figure, at_most, document, failure

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart"
COMMAND = [sys.executable, "-m", "trainchain"]
CASES = ("off", "on", "slow", "dead", "missing")
LIMIT_SECONDS = 240.0
PERIOD, AWAKE = 1.0, 0.1
"""Of each second the slow auditor runs a tenth."""


class TookTooLongError(Exception):
    """The message says what did not come."""


@dataclass
class Person:
    """Who runs commands in a home of their own; what they start is a process group."""

    home: Path
    environment: Mapping[str, str]

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        log = (self.home.parent / f"{self.home.name}.log").open("ab")
        return subprocess.Popen(
            [*COMMAND, *arguments, "--home", str(self.home), "--json"],
            stdout=subprocess.PIPE,
            stderr=log,
            env=dict(self.environment),
            text=True,
            start_new_session=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    given = parser.parse_args()
    figures: list[Figure] = []
    medians: dict[str, float] = {}
    for case in given.cases:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = play(Path(folder), case, given.rounds)
            except (TookTooLongError, OSError, ValueError) as error:
                figures.append(failure(case, str(error)))
                continue
        medians[case] = found["round_seconds"]
        figures.append(Figure(f"{case}: a round", round(found["round_seconds"], 3), "s, median"))
        for name in ("drawn", "passed", "pending", "failed", "unaudited"):
            figures.append(Figure(f"{case}: audits {name}", found[name], "when the last round was merged"))
        if found["verdict_seconds"] is not None:
            figures.append(Figure(f"{case}: from draw to verdict", round(found["verdict_seconds"], 3), "s, median"))
        if case != "off" and "off" in medians:
            figures.append(
                at_most(f"{case}: a round, of one without audits", medians[case] / medians["off"], "x", 1.15)
            )
    settings = {"rounds": given.rounds, "shards": 2, "workers": 1, "threads": 1}
    sys.stdout.write(json.dumps(document("audited", ["trainchain", "torch"], settings, figures), indent=1) + "\n")


def play(folder: Path, case: str, rounds: int) -> dict[str, Any]:
    """One job to its last merge; what its hub shows then."""
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    hub_home, worker, owner = (Person(folder / name, environment) for name in ("hub", "worker", "owner"))
    processes: list[subprocess.Popen[str]] = []
    ending = threading.Event()
    try:
        hub = hub_home.start("serve-hub", "--listen", "127.0.0.1:0", "--no-evaluate")
        processes.append(hub)
        url = next_event(hub, "ready")["url"]
        arguments = ["submit", str(recipe(folder, case, rounds)), "--yes", "--hub", url]
        submitted = owner.start(*arguments).communicate(timeout=120)[0]
        job = json.loads(submitted)["job"]
        if case in ("on", "slow", "dead"):
            auditor = owner.start("serve-gpu", "--hub", url, "--threads", "1", "--audit-only")
            processes.append(auditor)
            next_event(auditor, "serving")
            if case == "dead":
                threading.Thread(target=die_at_work, args=(auditor,), daemon=True).start()
            else:
                threading.Thread(target=drain, args=(auditor,), daemon=True).start()
            if case == "slow":
                threading.Thread(target=doze, args=(auditor, ending), daemon=True).start()
        trainer = worker.start("serve-gpu", "--hub", url, "--threads", "1")
        processes.append(trainer)
        threading.Thread(target=drain, args=(trainer,), daemon=True).start()
        view = until(lambda: look(url, job), lambda view: all_merged(view, rounds), "the last merge")
        audits = [shard["audit"] for row in view["rounds_done"] for shard in row["shards"] if shard.get("audit")]
        told = json.loads(get(f"{url}/v1/jobs/{job}/audits"))["audits"]
        waits = [row["decided"] - row["drawn"] for row in told if row["decided"] is not None]
        states = [audit["state"] for audit in audits]
        return {
            "round_seconds": statistics.median(row["merged"] - row["opened"] for row in view["rounds_done"][1:]),
            "verdict_seconds": statistics.median(waits) if waits else None,
            "drawn": len(states),
            "pending": sum(state in ("drawn", "answered") for state in states),
            **{state: states.count(state) for state in ("passed", "failed", "unaudited")},
        }
    finally:
        ending.set()
        for process in reversed(processes):
            end(process)


def recipe(folder: Path, case: str, rounds: int) -> Path:
    """The quickstart's job without what has to be measured, so that audits are all that differs."""
    for name in ("base", "train.jsonl"):
        source = QUICKSTART / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    path = folder / "recipe.yaml"
    content = {
        "name": "audited",
        "base_model": "./base",
        "datasets": [{"path": "./train.jsonl", "type": "chat_template"}],
        "sequence_len": 256,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5.0e-3,
        "rounds": rounds,
        "shards": 2,
        "steps": 16,
        "round_deadline": "10m",
        "check": {"auditors": "none" if case == "off" else "any"},
        "pay": {"per_million_tokens": "2.50", "budget": "5", "deadline": "48h"},
    }
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return path


def all_merged(view: Mapping[str, Any], rounds: int) -> bool:
    return len(view["rounds_done"]) == rounds and all(row["state"] == "merged" for row in view["rounds_done"])


def look(url: str, job: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(get(f"{url}/v1/jobs/{job}"))
    return found


def get(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as answer:
        found: bytes = answer.read()
    return found


def until(look: Callable[[], dict[str, Any]], there: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
    over = time.monotonic() + LIMIT_SECONDS
    while not there(found := look()):
        if time.monotonic() > over:
            raise TookTooLongError(f"{what} did not come in {LIMIT_SECONDS:.0f} s")
        time.sleep(0.2)
    return found


def next_event(process: "subprocess.Popen[str]", name: str) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if event.get("event") == name:
            return event
    raise TookTooLongError(f"the event {name} did not come: the process ended with {process.wait()}")


def drain(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    for _ in process.stdout:
        pass


def die_at_work(process: "subprocess.Popen[str]") -> None:
    """Kill an auditor as soon as it has something to replay."""
    next_event(process, "leased")
    os.killpg(process.pid, signal.SIGKILL)


def doze(process: "subprocess.Popen[str]", ending: threading.Event) -> None:
    while not ending.wait(AWAKE) and process.poll() is None:
        os.killpg(process.pid, signal.SIGSTOP)
        ending.wait(PERIOD - AWAKE)
        os.killpg(process.pid, signal.SIGCONT)


def end(process: "subprocess.Popen[str]") -> None:
    """The process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


if __name__ == "__main__":
    main()
