"""Whatever an RPC's URL hides, and whoever quotes it, no message ever shows it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainchain.chain.escrow import connect
from trainchain.chain.hexes import keccak, to_hex
from trainchain.core.errors import TrainChainError

# No part of any of our own words, of a loopback address, or of a number.
SECRETS = st.text("ZQXJK~!%&= é", min_size=4, max_size=24).filter(lambda text: text.strip() == text)


class Quoting(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        status, body = self.server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def quoting():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Quoting)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def revert(words: str) -> str:
    """What a contract that refuses with these words answers."""
    data = words.encode()
    padded = data + bytes(-len(data) % 32)
    return to_hex(keccak(b"Error(string)")[:4] + (32).to_bytes(32, "big") + len(data).to_bytes(32, "big") + padded)


@settings(deadline=None, max_examples=60)
@given(
    user=SECRETS,
    password=SECRETS,
    key=SECRETS,
    value=SECRETS,
    how=st.sampled_from(["message", "raw message", "data", "body", "status", "dead", "not a port"]),
)
def test_no_message_carries_a_part_of_the_url_that_may_be_a_key(quoting, user, password, key, value, how):
    secrets = (user, password, key, value)
    written = [quote(text, safe="") for text in secrets]
    port = {"dead": 9, "not a port": written[1]}.get(how, quoting.server_address[1])
    url = f"http://{written[0]}:{written[1]}@127.0.0.1:{port}/v3/{written[2]}?token={written[3]}"
    told = {
        "message": {"error": {"code": 3, "message": f"bad key in {url}", "data": None}},
        "raw message": {"error": {"code": -32000, "message": " ".join(secrets)}},
        "data": {"error": {"code": 3, "message": "execution reverted", "data": revert(f"no {key} {password}")}},
        "body": {"result": url},
        "status": {},
    }.get(how, {})
    quoting.answer = (503 if how == "status" else 200, json.dumps({"jsonrpc": "2.0", "id": 0, **told}).encode())
    with pytest.raises(TrainChainError) as caught:
        connect(url, timeout=5, retries=0, sleep=lambda _: None)
    shown = " ".join([str(caught.value), caught.value.hint, json.dumps(caught.value.facts)])
    for text in (*secrets, *written):
        assert text not in shown
