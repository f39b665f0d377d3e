"""A cache and a real hub: parts of objects, connections that break, processes that are killed or come together."""

import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_cache import Gate
from tests.fixtures_hub import Job, Person, Town
from trainchain.chain.signin import SignIn, sign_in
from trainchain.chain.wallet import Wallet
from trainchain.core.client import HubClient
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.worker.cache import Cache

SIZE = 3_000_000
HEADERS = 4096
"""More bytes than an answer has before its body."""
DATA = bytes(range(256)) * (SIZE // 256)
DIGEST = sha256(DATA)
KEY = secrets.token_bytes(32)


@pytest.fixture(scope="module")
def job(town: Town) -> Job:
    """A job whose base is large enough to break in the middle of."""
    return town.publish({"model.safetensors": DATA, "train-0.jsonl": b"{}"}, rounds=1, shards=4)


@pytest.fixture(scope="module")
def worker(town: Town, job: Job) -> Person:
    """Somebody who holds a lease of it, and may read its files."""
    person = town.person(Wallet(KEY))
    person.must_lease(job)
    return person


@pytest.fixture
def gate(town: Town) -> Iterator[Gate]:
    made = Gate(town.host)
    yield made
    made.close()


def through(gate: Gate, person: Person, *, attempts: int = 1) -> HubClient:
    """A client that sees the hub behind the gate; with one attempt, it goes on after no break."""
    return HubClient(
        gate.url,
        address=person.address,
        sign_in=lambda fields: sign_in(SignIn(**fields), person.wallet),
        attempts=attempts,
        sleep=lambda _: None,
        now=lambda: datetime.fromtimestamp(person.town.clock(), UTC),
    )


@pytest.mark.parametrize("start", [1, 1000, 65_536, len(DATA) - 1])
def test_the_hub_gives_an_object_from_a_byte_on(worker: Person, start: int) -> None:
    answer = worker.request("GET", f"/v1/objects/{DIGEST}", headers={"range": f"bytes={start}-"})

    assert (answer.status_code, answer.content) == (206, DATA[start:])
    assert answer.headers["content-range"] == f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"
    assert answer.headers["content-length"] == str(len(DATA) - start)


def test_from_the_first_byte_on_is_all_of_it(worker: Person) -> None:
    whole = worker.get(f"/v1/objects/{DIGEST}")
    ranged = worker.request("GET", f"/v1/objects/{DIGEST}", headers={"range": "bytes=0-"})

    assert (whole.status_code, ranged.status_code) == (200, 206)
    assert whole.content == ranged.content == DATA
    assert whole.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(
    "told",
    [f"bytes={len(DATA)}-", f"bytes={10**18}-", "bytes=" + "9" * 400 + "-", "bytes=-5", "bytes=5-4", "bytes=0-1,5-9",
     "bytes=x-", "bytes", "", "items=0-", "bytes=-", "bytes=+1-", "bytes= 1-", "bytes=1-2"],
)  # fmt: skip
def test_a_range_that_is_none_is_refused_with_the_object_s_size(worker: Person, told: str) -> None:
    answer = worker.request("GET", f"/v1/objects/{DIGEST}", headers={"range": told})

    assert (answer.status_code, answer.json()["code"]) == (416, "http.range")
    assert answer.headers["content-range"] == f"bytes */{len(DATA)}"
    assert len(answer.content) < 1000


def test_a_part_of_an_object_is_for_nobody_who_may_not_have_the_whole(town: Town, job: Job) -> None:
    for stranger in (town.person(), None):
        headers = {"range": "bytes=1-"}
        path = f"/v1/objects/{DIGEST}"
        answer = (
            stranger.request("GET", path, headers=headers)
            if stranger
            else town.http.get(town.url + path, headers=headers)
        )
        assert answer.status_code in (401, 404)
        assert DATA[1:50] not in answer.content


def test_an_object_that_the_hub_s_disk_lost_is_unknown(town: Town) -> None:
    job = town.publish(rounds=1, shards=1)
    person = town.person()
    person.must_lease(job)
    digest = sha256(job.files["model.safetensors"])
    (town.root / "objects" / digest[:2] / digest[2:]).unlink()

    answer = person.get(f"/v1/objects/{digest}")

    assert (answer.status_code, answer.json()["code"]) == (404, "object.unknown")


def test_a_connection_that_breaks_again_and_again_costs_no_byte_twice(
    gate: Gate, worker: Person, tmp_path: Path
) -> None:
    client = through(gate, worker, attempts=3)
    gate.cut = 700_000

    path = Cache(tmp_path).object(client, DIGEST, len(DATA))

    assert path.read_bytes() == DATA
    assert client.received < len(DATA) + HEADERS
    client.close()


def test_what_broke_off_in_one_process_goes_on_in_the_next(gate: Gate, worker: Person, tmp_path: Path) -> None:
    first, second = through(gate, worker), through(gate, worker)
    gate.cut = 1_000_000
    with pytest.raises(TrainChainError) as caught:
        Cache(tmp_path).object(first, DIGEST, len(DATA))
    assert caught.value.code == "hub.unreachable"
    (left,) = (tmp_path / "partial").iterdir()
    had = left.stat().st_size
    assert 900_000 < had < 1_100_000
    gate.cut = None

    assert Cache(tmp_path).object(second, DIGEST, len(DATA)).read_bytes() == DATA

    assert second.received < len(DATA) - had + HEADERS
    assert list((tmp_path / "partial").iterdir()) == []
    first.close()
    second.close()


def test_a_hub_that_sends_other_bytes_twice_is_named(town: Town, tmp_path: Path) -> None:
    job = town.publish(rounds=1, shards=1)
    person = town.person()
    person.must_lease(job)
    digest = sha256(job.files["model.safetensors"])
    stored = town.root / "objects" / digest[:2] / digest[2:]
    stored.chmod(0o600)
    stored.write_bytes(b"evil")
    events: list[dict[str, Any]] = []
    client = person.client()

    with pytest.raises(TrainChainError) as caught:
        Cache(tmp_path, on_event=events.append).object(client, digest, len(job.files["model.safetensors"]))
    client.close()

    assert (caught.value.code, caught.value.exit_code) == ("object.digest", 4)
    assert all(word in caught.value.message for word in (digest, sha256(b"evil")))
    assert [event["where"] for event in events if event["event"] == "damaged"] == [f"the hub {town.url}"] * 2
    assert not any(path.is_file() for path in (tmp_path / "objects").rglob("*"))
    assert list((tmp_path / "partial").iterdir()) == []


CHILD = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from trainchain.chain.signin import SignIn, sign_in
from trainchain.chain.wallet import Wallet
from trainchain.core.client import HubClient
from trainchain.core.worker.cache import Cache
url, folder, digest, size, at = sys.argv[1:]
wallet = Wallet(bytes.fromhex(sys.stdin.readline()))
client = HubClient(url, address=wallet.address, sign_in=lambda fields: sign_in(SignIn(**fields), wallet),
                   now=lambda: datetime.fromtimestamp(float(at), UTC), patience=60)
path = Cache(Path(folder)).object(client, digest, int(size))
print(path, client.received)
"""


class Fetcher:
    """A process that fetches the object through the gate into a cache."""

    def __init__(self, gate: Gate, person: Person, folder: Path) -> None:
        arguments = [gate.url, str(folder), DIGEST, str(len(DATA)), str(person.town.clock())]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments],
            cwd=Path(__file__).parents[3],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin
        self.process.stdin.write(KEY.hex() + "\n")
        self.process.stdin.flush()

    def end(self) -> tuple[Path, int]:
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, err
        path, received = out.rsplit(maxsplit=1)
        return Path(path), int(received)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=60)


def wait_for_bytes(path: Path, count: int) -> int:
    """How large a file is, as soon as it has grown to that."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if path.exists() and path.stat().st_size >= count:
            return path.stat().st_size
        time.sleep(0.01)
    raise AssertionError(f"{path} does not grow to {count} bytes")


def test_of_two_processes_one_fetches_and_both_have_it(gate: Gate, worker: Person, tmp_path: Path) -> None:
    both = [Fetcher(gate, worker, tmp_path) for _ in range(2)]

    (path, one), (other_path, other) = (fetcher.end() for fetcher in both)

    assert path == other_path
    assert path.read_bytes() == DATA
    assert one + other < len(DATA) + 2 * HEADERS, "the second had nothing to fetch"


def test_when_the_fetcher_is_killed_the_one_that_waits_goes_on_from_there(
    gate: Gate, worker: Person, tmp_path: Path
) -> None:
    gate.hold = 1_500_000
    first = Fetcher(gate, worker, tmp_path)
    assert gate.held.wait(60)
    gate.hold = None
    second = Fetcher(gate, worker, tmp_path)  # it waits for the first, or comes after it
    assert second.process.poll() is None

    came = wait_for_bytes(tmp_path / "partial" / DIGEST, 1_300_000)
    first.kill()
    path, received = second.end()

    assert path.read_bytes() == DATA
    assert received < len(DATA) - came + HEADERS
    assert list((tmp_path / "partial").iterdir()) == []
    notes = Cache(tmp_path).room.entries()
    assert [entry.in_use for entry in notes] == [False], "what the dead held is free"
