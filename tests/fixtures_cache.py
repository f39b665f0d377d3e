"""What a cache fetches from in tests: a source in memory that lies on request, and a gate before a real hub."""

import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.fixtures_hub import ref
from trainchain.core.errors import TrainChainError
from trainchain.core.models import FileRef

SOURCE = "hf://org/name@" + "c0" * 20


class Source:
    """Fetches as `core/sources` do; `serve` what it sends for the next calls, `cut` after how many bytes it breaks."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.lies: list[bytes] = []
        self.cut: int | None = None
        self.fetched: list[tuple[str, int]] = []
        """Names, with the bytes that were sent."""

    def ref(self, name: str) -> FileRef:
        return ref(name, self.files[name]).model_copy(update={"path": name})

    def __call__(self, source: str, path: str, partial: Path, size: int) -> None:
        assert source == SOURCE
        data = self.lies.pop(0) if self.lies else self.files[path]
        with partial.open("ab") as file:
            left = data[file.tell() :]
            sent = left if self.cut is None else left[: self.cut]
            file.write(sent)
        self.fetched.append((path, len(sent)))
        if self.cut is not None and len(sent) < len(left):
            raise TrainChainError("source.unavailable", "The source broke off.")


class Gate:
    """A TCP port before another: counts what comes back, and ends or holds connections after so many bytes of it.

    `cut` ends the connection that has brought that many bytes, `hold` stops it without a word until `let_go`; each
    works on every connection until it is None again.
    """

    def __init__(self, behind: str) -> None:
        host, _, port = behind.rpartition(":")
        self._behind = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.came = 0
        self.cut: int | None = None
        self.hold: int | None = None
        self.held = threading.Event()
        self.let_go = threading.Event()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.let_go.set()
        for one in (self._server, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                front, _ = self._server.accept()
                back = socket.create_connection(self._behind)
                self._open += [front, back]
                threading.Thread(target=self._pump, args=(front, back), daemon=True).start()
                threading.Thread(target=self._pump_back, args=(back, front), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        self._end(source, target)

    def _pump_back(self, source: socket.socket, target: socket.socket) -> None:
        brought = 0
        with suppress(OSError):
            while data := source.recv(1 << 14):
                brought += len(data)
                if self.hold is not None and brought > self.hold:
                    self.held.set()
                    self.let_go.wait(60)
                    break
                self.came += len(data)
                target.sendall(data)
                if self.cut is not None and brought > self.cut:
                    break
        self._end(source, target)

    def _end(self, *ends: socket.socket) -> None:
        for one in ends:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def event_names(events: list[dict[str, Any]]) -> list[str]:
    return [str(event["event"]) for event in events]
