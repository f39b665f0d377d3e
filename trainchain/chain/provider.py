"""From a chain's address to a web3 provider: `embedded:NAME` in process, `http(s)://` with bounded retries."""

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import requests
from web3.providers import JSONBaseProvider

from trainchain.chain.recursion import restore_limit
from trainchain.core.errors import TrainChainError

if TYPE_CHECKING:
    from trainchain.chain.devnet.node import Devnet

restore_limit()

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_AWAY = {429, 500, 502, 503, 504}


class EmbeddedProvider(JSONBaseProvider):  # type: ignore[misc]  # web3 is not type-checked here
    """A chain file of this machine, without a network in between."""

    def __init__(self, node: "Devnet") -> None:
        from trainchain.chain.devnet.rpc import Rpc

        super().__init__()
        self.node = node
        self._rpc = Rpc(node, public=False)

    def close(self) -> None:
        """Let go of the file."""
        self.node.close()

    def make_request(self, method: Any, params: Any) -> Any:
        # Through JSON and back, so that what works here works over HTTP too.
        request = json.loads(self.encode_rpc_request(method, params))
        return self._rpc.handle(request)


class HttpProvider(JSONBaseProvider):  # type: ignore[misc]  # web3 is not type-checked here
    """A chain behind a URL. Raises `chain.unreachable` after bounded retries, `chain.wrong` for what is no chain.

    To repeat a request is safe: reads change nothing, and a signed transaction enters a chain once.
    """

    def __init__(self, url: str, *, timeout: float, retries: int, sleep: Callable[[float], None] = time.sleep) -> None:
        super().__init__()
        self._url, self._timeout, self._retries, self._sleep = url, timeout, retries, sleep
        self._sessions = threading.local()

    def make_request(self, method: Any, params: Any) -> Any:
        body = self.encode_rpc_request(method, params)
        for attempt in range(self._retries + 1):
            if attempt:
                self._sleep(min(0.25 * 2 ** (attempt - 1), 4.0))
            try:
                answer = self._session().post(self._url, data=body, timeout=self._timeout)
            except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema):
                raise TrainChainError("chain.unknown", f"{mask(self._url)} is not a chain's URL.") from None
            except requests.exceptions.RequestException as problem:
                why = type(problem).__name__
                continue
            if answer.status_code not in _AWAY:
                return self._read(answer)
            why = f"HTTP status {answer.status_code}"
        raise TrainChainError(
            "chain.unreachable",
            f"The chain at {mask(self._url)} did not answer after {self._retries + 1} tries ({why}).",
            hint="Nothing was changed by this. Try again when it is back.",
        )

    def close(self) -> None:
        """Hang up this thread's connection."""
        self._session().close()

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._sessions, "session", None)
        if session is None:
            session = self._sessions.session = requests.Session()
            session.headers["Content-Type"] = "application/json"
        return session

    def _read(self, answer: requests.Response) -> Any:
        try:
            found = answer.json()
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or ("result" not in found and not isinstance(found.get("error"), dict)):
            raise TrainChainError(
                "chain.wrong",
                f"{mask(self._url)} answers (HTTP status {answer.status_code}), but not as a chain's RPC.",
            )
        return found


def open_provider(
    url: str, *, home: Path | None, timeout: float, retries: int, sleep: Callable[[float], None] = time.sleep
) -> EmbeddedProvider | HttpProvider:
    """Raises `chain.unknown` for an address that is neither `embedded:NAME` nor `http(s)://HOST...`."""
    kind, _, name = url.partition(":")
    if kind == "embedded" and _NAME.fullmatch(name) and home is not None:
        from trainchain.chain.devnet.node import Devnet

        return EmbeddedProvider(Devnet(home / "chain" / f"{name}.sqlite"))
    if kind in ("http", "https") and _host(url):
        return HttpProvider(url, timeout=timeout, retries=retries, sleep=sleep)
    raise TrainChainError(
        "chain.unknown",
        f"{mask(url)} is not the address of a chain.",
        hint="Write embedded:NAME, or the http:// or https:// URL of an RPC.",
    )


def mask(url: str) -> str:
    """The URL without what may be a key in it: user, path, query."""
    host = _host(url)
    if not host:
        return url.partition(":")[0][:20] + ":..." if ":" in url else repr(url[:40])
    parts = urlsplit(url)
    rest = "/..." if parts.path.strip("/") or parts.query else ""
    return f"{parts.scheme}://{host}{rest}"


def _host(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.hostname}{port}" if parts.hostname else ""
    except ValueError:
        return ""
