"""One hub process put together: state, chain, steward, HTTP, and the evaluating child."""

from __future__ import annotations

import logging
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

from trainchain.cli import parent
from trainchain.cli.bridge import open_hub_chain
from trainchain.cli.output import Output
from trainchain.cli.wiring import short
from trainchain.core.errors import TrainChainError
from trainchain.core.worker.devices import one_device

if TYPE_CHECKING:
    from pathlib import Path

    import uvicorn

    from trainchain.core.hub.service import Hub
    from trainchain.core.settings import Settings

log = logging.getLogger(__name__)


def serve(
    settings: Settings,
    out: Output,
    *,
    listen: str,
    chain_url: str,
    escrow: str | None,
    token: str | None,
    public_chain: str | None,
    relays: bool,
    evaluator_threads: int,
    with_parent: bool,
) -> None:
    """Serve until stopped. `evaluator_threads` 0 means no evaluating child: rounds then show no held-out loss, and
    nobody of the operator's replays for audits."""
    import uvicorn

    from trainchain.chain import wallet
    from trainchain.chain.provider import mask
    from trainchain.core.hub.api import create_app
    from trainchain.core.hub.service import Hub
    from trainchain.core.hub.steward import Steward
    from trainchain.core.hub.store import Store
    from trainchain.core.objects import ObjectStore
    from trainchain.core.seal import ExchangeKey
    from trainchain.core.settings import private_folder

    if with_parent:
        parent.end_with_parent()
    bound = _bind(listen)
    url = _url(bound)
    home = private_folder(settings.home)
    keys = wallet.load_or_create(home / "hub-wallet.json", settings.password() or "")
    chain = open_hub_chain(chain_url, escrow, token, public_chain, home, keys, relays=relays)
    evaluator_home = home / "evaluator"
    evaluators: frozenset[str] = frozenset()
    if evaluator_threads:
        evaluators = frozenset({wallet.load_or_create(evaluator_home / "wallet.json").address})
    hub = Hub(
        Store(home / "hub.sqlite"),
        ObjectStore(home / "objects"),
        chain,
        evaluators=evaluators,
        exchange=ExchangeKey.load_or_create(home / "exchange-key"),
    )
    steward = Steward(hub)
    steward.start()
    evaluator = _Evaluator(url, evaluator_home, evaluator_threads) if evaluator_threads else None
    config = uvicorn.Config(
        create_app(hub),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=64 << 10,
    )
    shown = chain_url if chain_url.startswith("embedded:") else mask(chain_url)
    document = {"event": "ready", "url": url, "escrow": chain.escrow, "chain_id": chain.chain_id, "hub": chain.address}
    place = f"chain    {shown}  id {chain.chain_id}  escrow {short(chain.escrow)}"
    out.event(document, f"hub      {url}  wallet {chain.address}\n{place}")
    if not out.json_mode:
        out.result(url, document)
    try:
        server = uvicorn.Server(config)
        _answer_waiters_on_exit(server, hub)
        server.run(sockets=[bound])
    finally:
        if evaluator is not None:
            evaluator.stop()
        steward.stop()
        hub.store.close()


def _answer_waiters_on_exit(server: uvicorn.Server, hub: Hub) -> None:
    """Long polls end with an answer when the server is told to stop, not with a broken connection."""
    handle = server.handle_exit

    def exit_handler(number: int, frame: Any) -> None:
        hub.bell.close()
        handle(number, frame)

    server.handle_exit = exit_handler  # type: ignore[assignment]


def _bind(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise TrainChainError("usage.flag", f"--listen {listen} is not HOST:PORT.", hint="--listen 127.0.0.1:7070")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, so that asyncio turns Nagle's algorithm off: without, every answer waits 40 ms for an ACK.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host.strip("[]"), int(port)))
        found.listen(1024)
    except OSError as error:
        found.close()
        raise TrainChainError(
            "hub.address_in_use",
            f"{listen} cannot be listened on: {error.strerror}.",
            hint="Choose another port with --listen 127.0.0.1:0",
        ) from None
    return found


def _url(bound: socket.socket) -> str:
    """How this machine reaches the socket; one that listens everywhere is reached over loopback."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Evaluator:
    """The hub's own worker, which measures, and replays as the operator's auditor: a child process, started again
    whenever it ends."""

    def __init__(self, url: str, home: Path, threads: int) -> None:
        self._arguments = ["serve-gpu", "--hub", url, "--home", str(home), "--threads", str(threads)]
        self._arguments += ["--json", "--until-stdin-closes", *one_device(0)]
        self._log = home / "evaluator.log"
        self._stopping = threading.Event()
        self._process = self._start()
        self._thread = threading.Thread(target=self._watch, name="evaluator", daemon=True)
        self._thread.start()

    def _start(self) -> subprocess.Popen[str]:
        # Its wallet has no password, whatever the hub's has: it holds no money and signs no money.
        return parent.start(self._arguments, self._log, {"TRAINCHAIN_PASSWORD_FILE": ""})

    def _watch(self) -> None:
        while not self._stopping.is_set():
            process = self._process
            assert process.stdout is not None
            began = time.monotonic()
            for _ in process.stdout:
                pass
            code = process.wait()
            if self._stopping.is_set():
                return
            log.warning("the evaluating child ended with %s; its log is %s", code, self._log)
            self._stopping.wait(max(0.0, 5.0 - (time.monotonic() - began)))
            if not self._stopping.is_set():
                self._process = self._start()

    def stop(self) -> None:
        self._stopping.set()
        parent.stop(self._process)
