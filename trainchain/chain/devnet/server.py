"""The embedded chain's JSON-RPC over HTTP on loopback, for other processes, wallets and JavaScript."""

import json
import logging
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trainchain.chain.devnet.node import Devnet
from trainchain.chain.devnet.rpc import MAX_BODY, Rpc

log = logging.getLogger(__name__)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    # Head and body leave in one packet; else each answer waits 40 ms for an acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    rpc: Rpc

    def do_POST(self) -> None:
        # A web page can post plain text to loopback without asking, but not JSON.
        if self.headers.get_content_type() != "application/json":
            self._reply(415, {"error": "send application/json"})
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._reply(411, {"error": "send a content length"})
            return
        if int(length) > MAX_BODY:
            self._reply(413, {"error": f"send at most {MAX_BODY} bytes"})
            return
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            failure = {"code": -32700, "message": "not JSON"}
            self._reply(200, {"jsonrpc": "2.0", "id": None, "error": failure})
            return
        self._reply(200, self.rpc.handle(request))

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def _reply(self, status: int, answer: Any) -> None:
        body = json.dumps(answer).encode()
        if status != 200:
            self.close_connection = True  # the body was not read
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def make_server(node: Devnet, *, port: int = 0) -> ThreadingHTTPServer:
    """A server on loopback; port 0 takes a free one (`server_address`). The caller runs `serve_forever`."""
    handler = type("Handler", (_Handler,), {"rpc": Rpc(node, public=True)})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    return server
