"""The hub's client against servers that are away, are no hub, fail, forget a session, or lie."""

import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from trainchain.core.client import ATTEMPTS, HubClient
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.models import PROTOCOL

ADDRESS = "0x" + "11" * 20
Answer = tuple[int, bytes, dict[str, str]]


class Server:
    """Answers what a test tells it to; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.answers: dict[str, Callable[[], Answer] | list[Answer]] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                server.asked.append((self.command, self.path, dict(self.headers.items()), body))
                told = server.answers.get(self.path, server.answers.get("*", []))
                status, data, headers = told.pop(0) if isinstance(told, list) and told else told()  # type: ignore[operator]
                self.send_response(status)
                for name, value in {"content-length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_DELETE = do

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(10)

    def paths(self) -> list[str]:
        return [path for _, path, _, _ in self.asked]


def answer(value: Any, status: int = 200) -> Answer:
    return status, json.dumps(value).encode(), {"content-type": "application/json"}


def problem(code: str, status: int, **facts: Any) -> Answer:
    return answer({"code": code, "detail": "No.", "hint": "Do so.", "status": status, **facts}, status)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def slept() -> list[float]:
    return []


@pytest.fixture
def client(server: Server, slept: list[float]) -> Iterator[HubClient]:
    made = HubClient(
        server.url,
        address=ADDRESS,
        sign_in=lambda fields: "signed",
        sleep=slept.append,
        now=lambda: datetime(2030, 1, 1, tzinfo=UTC),
    )
    yield made
    made.close()


def lets_in(server: Server) -> None:
    server.answers["/v1/hub"] = lambda: answer({"protocol": PROTOCOL, "chain": {"chain_id": 5}})
    server.answers["/v1/session/nonce"] = lambda: answer({"nonce": "ab" * 16})
    tokens = iter(range(1, 100))
    server.answers["/v1/session"] = lambda: answer({"token": f"token-{next(tokens)}"})


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def failure(call: Callable[..., Any], *arguments: Any, **options: Any) -> TrainChainError:
    with pytest.raises(TrainChainError) as caught:
        call(*arguments, **options)
    return caught.value


def test_a_hub_that_is_away_is_asked_a_few_times_with_growing_pauses(slept: list[float]) -> None:
    client = HubClient(f"http://127.0.0.1:{closed_port()}", sleep=slept.append)

    error = failure(client.get, "/v1/jobs")
    client.close()

    assert (error.code, error.exit_code) == ("hub.unreachable", 3)
    assert f"after {ATTEMPTS} tries" in error.message
    assert "serve-hub" in error.hint
    assert len(slept) == ATTEMPTS - 1
    assert all(0 < pause <= 7.5 for pause in slept)
    assert slept[-1] > slept[0]


def test_a_hub_that_never_answers_is_given_up(slept: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        client = HubClient(f"http://127.0.0.1:{silent.getsockname()[1]}", patience=0.05, sleep=slept.append)

        error = failure(client.info)

        client.close()
    assert (error.code, error.exit_code) == ("hub.unreachable", 3)
    assert len(slept) < ATTEMPTS - 1


def test_a_hub_that_comes_back_is_not_missed(server: Server, client: HubClient, slept: list[float]) -> None:
    server.answers["*"] = [(500, b"oops", {}), (503, b"", {}), answer({"jobs": []})]

    assert client.get("/v1/jobs") == {"jobs": []}
    assert len(slept) == 2


@pytest.mark.parametrize("status", [500, 502, 503, 504, 200])
def test_a_server_that_only_fails_is_given_up(server: Server, client: HubClient, status: int) -> None:
    headers = {"content-encoding": "gzip"} if status == 200 else {}  # and what comes is not gzip
    server.answers["*"] = lambda: (status, b"<html>down</html>", headers)

    error = failure(client.get, "/v1/jobs")

    assert (error.code, error.exit_code, len(server.asked)) == ("hub.unreachable", 3, ATTEMPTS)
    assert status == 200 or str(status) in error.message


@pytest.mark.parametrize(
    "told",
    [
        (200, b"<html>hello</html>", {"content-type": "text/html"}),
        (200, b"[]", {}),
        (200, b"", {}),
        (200, b"\xff\xfe", {}),
        (200, b"[" * 100_000, {}),
        (301, b"", {"location": "http://elsewhere.example/"}),
        (404, b"<html>nothing here</html>", {}),
        (403, b'{"message": "forbidden"}', {}),
        (404, b'{"code": 7}', {}),
        answer({"protocol": PROTOCOL + 1, "chain": {}}),
        answer({"protocol": PROTOCOL, "chain": "none"}),
    ],
)
def test_an_address_that_is_no_hub_says_so_at_once(
    server: Server, client: HubClient, slept: list[float], told: Answer
) -> None:
    server.answers["*"] = lambda: told

    error = failure(client.info)

    assert (error.code, error.exit_code) == ("hub.not_a_hub", 1)
    assert slept == []


@pytest.mark.parametrize("url", ["", "hub", "127.0.0.1:7070", "ftp://hub", "http://", "http://[::1", "http://h:port"])
def test_what_is_no_address_is_a_usage_error(url: str) -> None:
    error = failure(lambda: HubClient(url, sleep=lambda _: None).get("/v1/hub"))

    assert (error.code, error.exit_code) == ("usage.flag", 2)
    assert "--hub" in error.hint


def test_the_hub_s_own_words_come_through(server: Server, client: HubClient, slept: list[float]) -> None:
    server.answers["*"] = lambda: problem("contribution.repeat", 409, receipt={"amount": "1"})

    error = failure(client.get, "/v1/jobs")

    assert (error.code, error.message, error.hint) == ("contribution.repeat", "No.", "Do so.")
    assert error.facts == {"receipt": {"amount": "1"}}
    assert slept == []


def test_a_code_of_a_newer_hub_is_still_a_failure_of_the_hub(server: Server, client: HubClient) -> None:
    server.answers["*"] = lambda: problem("brand.new", 418)

    assert failure(client.get, "/v1/jobs").code == "hub.failed"


def test_every_request_says_which_protocol_it_speaks(server: Server, client: HubClient) -> None:
    server.answers["*"] = lambda: answer({})

    client.get("/v1/jobs", after=3)

    _, path, headers, _ = server.asked[0]
    assert path == "/v1/jobs?after=3"
    assert {name.lower(): value for name, value in headers.items()}["trainchain-protocol"] == str(PROTOCOL)


def test_it_signs_in_once_and_only_where_it_must(server: Server, client: HubClient) -> None:
    lets_in(server)
    server.answers["*"] = lambda: answer({})

    client.get("/v1/jobs")
    assert "/v1/session" not in server.paths()
    client.post("/v1/leases")
    client.post("/v1/leases")

    assert server.paths().count("/v1/session") == 1
    signed = json.loads(next(body for _, path, _, body in server.asked if path == "/v1/session"))
    assert signed["signature"] == "signed"
    assert signed["fields"]["expiration_time"] == "2030-01-02T00:00:00Z"
    assert signed["fields"]["domain"] == server.url.removeprefix("http://")


def test_a_session_that_ended_is_renewed_once(server: Server, client: HubClient, slept: list[float]) -> None:
    lets_in(server)
    server.answers["/v1/leases"] = [answer({}), problem("session.required", 401), answer({"lease": "x"})]

    client.post("/v1/leases")
    assert client.post("/v1/leases") == {"lease": "x"}

    used = [headers.get("authorization") for _, path, headers, _ in server.asked if path == "/v1/leases"]
    assert used == ["Bearer token-1", "Bearer token-1", "Bearer token-2"]
    assert slept == []


def test_a_hub_that_takes_no_session_is_not_asked_for_ever(server: Server, client: HubClient) -> None:
    lets_in(server)
    server.answers["/v1/leases"] = lambda: problem("session.required", 401)

    assert failure(client.post, "/v1/leases").code == "session.required"
    assert server.paths().count("/v1/leases") == 2


def test_without_a_wallet_nothing_is_signed(server: Server) -> None:
    client = HubClient(server.url)

    assert failure(client.post, "/v1/leases").code == "session.required"
    client.close()
    assert server.asked == []


def test_an_upload_starts_again_from_its_beginning(server: Server, client: HubClient, tmp_path: Path) -> None:
    lets_in(server)
    data = b"0123456789" * 1000
    (tmp_path / "file").write_bytes(data)
    server.answers["/put"] = [(500, b"", {}), answer({"size": len(data)})]

    assert client.upload("/put", tmp_path / "file") == {"size": len(data)}

    assert [body for _, path, _, body in server.asked if path == "/put"] == [data, data]
    assert {headers["content-length"] for _, path, headers, _ in server.asked if path == "/put"} == {str(len(data))}


def ranges(server: Server) -> list[str | None]:
    """Which parts of an object were asked for."""
    asked = [headers for _, path, headers, _ in server.asked if path.startswith("/v1/objects/")]
    return [{name.lower(): value for name, value in headers.items()}.get("range") for headers in asked]


def broken(data: bytes, size: int) -> Answer:
    return 200, data, {"content-length": str(size), "connection": "close"}


def part(data: bytes, start: int, size: int, *, length: int | None = None) -> Answer:
    left = str(size - start if length is None else length)
    return (
        206,
        data,
        {"content-range": f"bytes {start}-{size - 1}/{size}", "content-length": left, "connection": "close"},
    )


def test_a_download_arrives_whole_and_is_counted(server: Server, client: HubClient, tmp_path: Path) -> None:
    lets_in(server)
    data = b"a" * 3_000_000
    server.answers[f"/v1/objects/{sha256(data)}"] = lambda: (200, data, {})

    before = client.received
    client.download(sha256(data), tmp_path / "object", size=len(data))

    assert (tmp_path / "object").read_bytes() == data
    assert client.received - before >= len(data)


def test_a_download_goes_on_where_it_broke(
    server: Server, client: HubClient, tmp_path: Path, slept: list[float]
) -> None:
    lets_in(server)
    digest = sha256(b"0123456789")
    server.answers[f"/v1/objects/{digest}"] = [broken(b"0123", 10), part(b"456", 4, 10), part(b"789", 7, 10)]

    client.download(digest, tmp_path / "object", size=10)

    assert (tmp_path / "object").read_bytes() == b"0123456789"
    assert ranges(server) == [None, "bytes=4-", "bytes=7-"]
    assert len(slept) == 2


def test_a_download_that_gets_nowhere_is_given_up_and_leaves_what_came(
    server: Server, client: HubClient, tmp_path: Path
) -> None:
    lets_in(server)
    digest = sha256(b"good")
    server.answers[f"/v1/objects/{digest}"] = lambda: broken(b"go", 4)  # as a hub that knows no ranges

    error = failure(client.download, digest, tmp_path / "object", size=4)

    assert (error.code, error.exit_code) == ("hub.unreachable", 3)
    assert (tmp_path / "object").read_bytes() == b"go"
    assert len(ranges(server)) == ATTEMPTS


def test_what_a_process_left_is_gone_on_from(server: Server, client: HubClient, tmp_path: Path) -> None:
    lets_in(server)
    digest = sha256(b"0123456789")
    (tmp_path / "object").write_bytes(b"01234567")
    server.answers[f"/v1/objects/{digest}"] = [part(b"89", 8, 10)]

    client.download(digest, tmp_path / "object", size=10)
    client.download(digest, tmp_path / "object", size=10)  # nothing is left to ask for

    assert (tmp_path / "object").read_bytes() == b"0123456789"
    assert ranges(server) == ["bytes=8-"]


@pytest.mark.parametrize(("size", "end"), [(6, b"012345"), (4, b"0123")], ids=["whole already", "too long"])
def test_what_lies_beyond_the_end_of_an_object_is_no_riddle(
    server: Server, client: HubClient, tmp_path: Path, size: int, end: bytes
) -> None:
    lets_in(server)
    (tmp_path / "object").write_bytes(b"012345")
    server.answers[f"/v1/objects/{sha256(end)}"] = [problem("http.range", 416, size=size), (200, end, {})]

    client.download(sha256(end), tmp_path / "object", size=10)

    assert (tmp_path / "object").read_bytes() == end


def test_a_part_that_was_not_asked_for_is_not_taken(server: Server, client: HubClient, tmp_path: Path) -> None:
    lets_in(server)
    (tmp_path / "object").write_bytes(b"0123")
    server.answers[f"/v1/objects/{sha256(b'x')}"] = [part(b"0123456789", 0, 10)]

    assert failure(client.download, sha256(b"x"), tmp_path / "object", size=10).code == "hub.not_a_hub"
    assert (tmp_path / "object").read_bytes() == b"0123"


def test_no_more_is_taken_than_an_object_may_have(server: Server, client: HubClient, tmp_path: Path) -> None:
    lets_in(server)
    digest = sha256(b"good")
    server.answers[f"/v1/objects/{digest}"] = lambda: (200, b"good and more", {})

    error = failure(client.download, digest, tmp_path / "object", size=4)

    assert (error.code, error.exit_code) == ("object.digest", 4)
    assert (tmp_path / "object").stat().st_size <= 4


def test_a_small_object_is_checked_too(server: Server, client: HubClient) -> None:
    lets_in(server)
    digest = sha256(b"good")
    server.answers[f"/v1/objects/{digest}"] = [(200, b"good", {}), (200, b"evil", {}), (200, b"good", {})]

    assert client.object(digest) == b"good"
    assert failure(client.object, digest).code == "object.digest"
    assert failure(client.object, digest, cap=3).code == "object.digest"


def test_an_answer_beyond_all_measure_is_not_read_to_its_end(
    server: Server, client: HubClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a small one that unpacks to one."""
    monkeypatch.setattr("trainchain.core.client.MAX_DOCUMENT", 1000)
    packed = gzip.compress(b" " * 10**6)
    server.answers["/v1/jobs"] = [
        (200, b" " * 1001, {}),
        (200, packed, {"content-encoding": "gzip"}),
        (500, packed, {"content-encoding": "gzip"}),
        (200, b" " * 998 + b"{}", {}),
    ]

    for _ in range(3):
        assert failure(client.get, "/v1/jobs").code == "hub.not_a_hub"
    assert client.get("/v1/jobs") == {}
    assert len(packed) < 2000
