"""A chain's RPC on loopback that can be made to lie, to stumble, or to die at any word."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

from trainchain.chain.devnet.node import Devnet
from trainchain.chain.devnet.server import make_server

Trick = Callable[[dict[str, Any], Callable[[], Any]], Any]
"""Gets the request, and a function that really asks; returns a result, bytes, or None to hang up."""


class Refusal(Exception):
    """A trick's way to answer with an error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    proxy: "Proxy"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.proxy.asked.append(request["method"])

        def really() -> Any:
            answer = self.proxy.upstream.post(self.proxy.url_behind, json=request, timeout=20).json()
            if "error" in answer:
                raise Refusal(answer["error"]["message"], answer["error"].get("data"))
            return answer["result"]

        trick = self.proxy.tricks.get(request["method"], self.proxy.tricks.get("*"))
        try:
            result = trick(request, really) if trick else really()
        except Refusal as refused:
            error = {"code": 3 if refused.args[1:] and refused.args[1] else -32000, "message": refused.args[0]}
            if refused.args[1:] and refused.args[1]:
                error["data"] = refused.args[1]
            result = json.dumps({"jsonrpc": "2.0", "id": request["id"], "error": error}).encode()
        if result is HANG_UP:
            self.close_connection = True
            return
        if not isinstance(result, bytes):
            result = json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(result)))
        self.end_headers()
        self.wfile.write(result)

    def log_message(self, format: str, *args: Any) -> None:
        pass


HANG_UP = object()


class Proxy:
    """Stands before a real chain. `tricks` are by method; "*" is for all that have none of their own."""

    def __init__(self, url_behind: str) -> None:
        self.url_behind = url_behind
        self.upstream = requests.Session()
        self.tricks: dict[str, Trick] = {}
        self.asked: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def die(self) -> None:
        """Hang up on everybody, from here on."""
        self.tricks["*"] = lambda request, really: HANG_UP

    def dies_with(self, method: str, *, forwarded: bool) -> None:
        """Hang up on this method, whether or not it was passed on, and on everybody after."""

        def trick(request: dict[str, Any], really: Callable[[], Any]) -> Any:
            if forwarded:
                really()
            self.tricks.clear()
            self.die()
            return HANG_UP

        self.tricks[method] = trick

    def heal(self) -> None:
        self.tricks.clear()


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def before(url: str) -> Iterator[Proxy]:
    """A proxy before a chain's RPC."""
    proxy = Proxy(url)
    with serving(proxy.server):
        yield proxy
    proxy.upstream.close()


@contextmanager
def devnet_over_http(node: Devnet) -> Iterator[str]:
    server = make_server(node)
    with serving(server):
        yield f"http://127.0.0.1:{server.server_address[1]}"
