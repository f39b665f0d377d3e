import gzip
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trainchain.chain.escrow import connect
from trainchain.chain.provider import HttpProvider, mask
from trainchain.cli.devnet import devnet
from trainchain.core.errors import TrainChainError

SECRET = "a1b2c3-secret-key"


class Answers(BaseHTTPRequestHandler):
    """Says what it is told to, in order; the last one for ever."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        answers = self.server.answers
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.server.asked += 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    made.asked = 0
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def url(server):
    return f"http://user:{SECRET}@127.0.0.1:{server.server_address[1]}/v3/{SECRET}?key={SECRET}"


def problem_of(address, **changes):
    naps = []
    with pytest.raises(TrainChainError) as caught:
        connect(address, sleep=naps.append, **{"home": None, "timeout": 2, "retries": 3, **changes})
    assert SECRET not in caught.value.message + caught.value.hint
    return caught.value, naps


@pytest.mark.parametrize(
    "address",
    ["", "embedded:", "embedded:../x", "embedded:a/b", "embedded:x.y", "ftp://h", "http://", "https:///x",
     "x", "http://h:port/", "http://[::1", f"wss://h/{SECRET}", f"{SECRET}", "file:///etc/passwd"],
)  # fmt: skip
def test_an_address_of_no_known_kind(address, tmp_path):
    with pytest.raises(TrainChainError) as caught:
        connect(address, home=tmp_path, timeout=1, retries=0)
    assert (caught.value.code, caught.value.exit_code) == ("chain.unknown", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_holds_no_chain_is_left_as_it_is(tmp_path):
    path = tmp_path / "chain" / "x.sqlite"
    path.parent.mkdir()
    path.write_bytes(b"no chain at all " * 100)
    problem, _ = problem_of("embedded:x", home=tmp_path)
    assert (problem.code, str(path) in problem.message) == ("chain.wrong", True)
    assert path.read_bytes() == b"no chain at all " * 100


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x.y", "a" * 65])
def test_the_devnet_command_takes_no_other_names_than_a_hub_does(name, tmp_path):
    with pytest.raises(TrainChainError) as caught:
        devnet(name=name, port=0, home=tmp_path, json_=False)
    assert caught.value.code == "chain.unknown"
    assert list(tmp_path.iterdir()) == []


def test_an_embedded_chain_needs_a_home():
    assert problem_of("embedded:x")[0].code == "chain.unknown"


def test_a_chain_that_is_down_is_tried_a_few_times():
    problem, naps = problem_of(f"http://127.0.0.1:9/{SECRET}", retries=4)
    assert (problem.code, problem.exit_code) == ("chain.unreachable", 3)
    assert naps == [0.25, 0.5, 1.0, 2.0]
    assert "127.0.0.1:9" in problem.message


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_chain_that_is_busy_is_tried_again(server, status):
    server.answers = [(status, b"busy")]
    problem, naps = problem_of(url(server))
    assert problem.code == "chain.unreachable"
    assert (server.asked, len(naps)) == (4, 3)


def test_a_chain_that_comes_back_is_used(server):
    good = json.dumps({"jsonrpc": "2.0", "id": 0, "result": "0x4d"}).encode()
    server.answers = [(503, b""), (502, b"<html>"), (200, good)]
    client = connect(url(server), timeout=2, retries=3, sleep=lambda seconds: None)
    assert client.chain_id == 77
    client.close()


@pytest.mark.parametrize(
    "answer",
    [
        (200, b""),
        (200, b"<html>hello</html>"),
        (200, b"[]"),
        (200, b"5"),
        (200, b'{"ok": true}'),
        (200, b'{"error": "no"}'),
        (404, b"not here"),
        (401, b'{"detail": "who are you"}'),
        (200, b"\xff\xfe"),
        (200, b"[" * 100_000),
    ],
)
def test_what_answers_but_is_no_chain(server, answer):
    server.answers = [answer]
    problem, naps = problem_of(url(server))
    assert (problem.code, problem.exit_code) == ("chain.wrong", 1)
    assert naps == []


@pytest.mark.parametrize("result", ['"hello"', "null", "[]", '"0x"'])
def test_a_chain_that_answers_nonsense(server, result):
    server.answers = [(200, f'{{"jsonrpc": "2.0", "id": 0, "result": {result}}}'.encode())]
    assert problem_of(url(server))[0].code == "chain.wrong"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://rpc.example/v3/KEY", "https://rpc.example/..."),
        ("https://me:KEY@rpc.example:8545", "https://rpc.example:8545"),
        ("http://rpc.example/?key=KEY", "http://rpc.example/..."),
        ("http://h:KEY/", "http:..."),
        ("embedded:x", "embedded:..."),
    ],
)
def test_a_url_is_shown_without_its_keys(address, shown):
    assert mask(address) == shown


class Endless(BaseHTTPRequestHandler):
    """Sends piece after piece, as long as anybody listens."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for piece in self.server.pieces():
                self.wfile.write(piece)
        except (BrokenPipeError, ConnectionResetError):
            self.server.hung_up.set()

    def log_message(self, format, *args):
        pass


@pytest.fixture
def endless():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    made.status, made.headers, made.hung_up, made.daemon_threads = 200, {}, threading.Event(), True
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_an_answer_without_end_is_not_read_to_the_end(endless):
    endless.pieces = lambda: iter(lambda: b" " * (1 << 20), None)
    problem, naps = problem_of(url(endless))
    assert (problem.code, naps) == ("chain.wrong", [])
    assert "more than 33554432 bytes" in problem.message
    assert endless.hung_up.wait(20)


@pytest.mark.parametrize("status", [301, 307])
def test_nobody_is_followed_elsewhere(endless, server, status):
    server.answers = [(200, b'{"jsonrpc": "2.0", "id": 0, "result": "0x1"}')]
    endless.status, endless.headers = status, {"Location": f"http://127.0.0.1:{server.server_address[1]}/"}
    endless.pieces = lambda: iter(lambda: b" " * (1 << 20), None)
    problem, naps = problem_of(url(endless))
    assert (problem.code, naps, server.asked) == ("chain.wrong", [], 0)
    assert endless.hung_up.wait(20)


def test_nor_is_one_that_is_small_until_it_is_unpacked(endless):
    packed = gzip.compress(b" " * (64 << 20))
    endless.headers = {"Content-Encoding": "gzip", "Content-Length": str(len(packed))}
    endless.pieces = lambda: [packed]
    assert len(packed) < 100_000
    problem, _ = problem_of(url(endless))
    assert (problem.code, "more than" in problem.message) == ("chain.wrong", True)


def test_an_answer_in_drops_is_given_up(endless):
    endless.pieces = lambda: iter(lambda: b" ", None)
    ticks = iter(range(0, 10**6, 4))
    provider = HttpProvider(url(endless), timeout=2, retries=1, sleep=lambda _: None, clock=lambda: next(ticks))
    with pytest.raises(TrainChainError) as caught:
        provider.make_request("eth_chainId", [])
    assert (caught.value.code, caught.value.exit_code) == ("chain.unreachable", 3)
    assert "TimeoutError" in caught.value.message
    provider.close()


def test_a_chain_that_says_nothing_is_not_waited_for_for_ever():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        problem, _ = problem_of(f"http://127.0.0.1:{silent.getsockname()[1]}/{SECRET}", timeout=0.05, retries=1)
    assert (problem.code, "ReadTimeout" in problem.message) == ("chain.unreachable", True)


def test_a_node_that_quotes_its_key_is_not_quoted(server):
    quoted = url(server)
    bare = {"code": -32000, "message": f"no: {quoted} and {SECRET.upper()}", "data": "0x" + SECRET.encode().hex()}
    server.answers = [(200, json.dumps({"jsonrpc": "2.0", "id": 0, "error": bare}).encode())]
    problem, _ = problem_of(quoted)
    assert SECRET not in problem.message.lower()
    assert "***" in problem.message
