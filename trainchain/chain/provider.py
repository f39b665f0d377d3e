"""From a chain's address to a web3 provider: `embedded:NAME` in process, `http(s)://` with bounded retries."""

import json
import re
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

import requests
import urllib3
from web3.providers import JSONBaseProvider

from trainchain.chain.answers import checked
from trainchain.chain.recursion import restore_limit
from trainchain.core.errors import TrainChainError

if TYPE_CHECKING:
    from trainchain.chain.devnet.node import Devnet

restore_limit()

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_AWAY = {429, 500, 502, 503, 504}
MOST_BYTES = 32 << 20
_TRICKLE = 6
"""An answer that comes in drops may take this many time-outs in all."""
_LEAST_SECRET = 4
"""Shorter parts of a URL, as `v3` or `rpc`, are words and no keys."""


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


class _Straight(requests.Session):
    """Follows nobody elsewhere: all of a redirect's body would be read, and anything asked that this machine can."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        return None


class HttpProvider(JSONBaseProvider):  # type: ignore[misc]  # web3 is not type-checked here
    """A chain behind a URL. Raises `chain.unreachable` after bounded retries, `chain.wrong` for what is no chain.

    To repeat a request is safe: reads change nothing, and a signed transaction enters a chain once.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        retries: int,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._url, self._timeout, self._retries, self._sleep, self._clock = url, timeout, retries, sleep, clock
        self._secrets = _secrets(url)
        self._sessions = threading.local()

    def make_request(self, method: Any, params: Any) -> Any:
        body = self.encode_rpc_request(method, params)
        for attempt in range(self._retries + 1):
            if attempt:
                self._sleep(min(0.25 * 2 ** (attempt - 1), 4.0))
            try:
                with self._session().post(self._url, data=body, timeout=self._timeout, stream=True) as answer:
                    status = answer.status_code
                    if status not in _AWAY:
                        return self._read(method, params, status, self._bytes_of(answer))
            except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, UnicodeError):
                raise TrainChainError("chain.unknown", f"{mask(self._url)} is not a chain's URL.") from None
            except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as problem:
                why = type(problem).__name__
                continue
            why = f"HTTP status {status}"
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
            session = self._sessions.session = _Straight()
            session.headers["Content-Type"] = "application/json"
        return session

    def _bytes_of(self, answer: requests.Response) -> bytes:
        """The body, and no more of it than an honest chain sends."""
        body, until = bytearray(), self._clock() + _TRICKLE * self._timeout
        while part := answer.raw.read1(1 << 16, decode_content=True):
            body += part
            if len(body) > MOST_BYTES:
                raise self._wrong(f"its answer has more than {MOST_BYTES} bytes")
            if self._clock() > until:
                raise TimeoutError
        return bytes(body)

    def _read(self, method: str, params: Any, status: int, body: bytes) -> Any:
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or ("result" not in found and not isinstance(found.get("error"), dict)):
            raise self._wrong(f"its answer (HTTP status {status}) is not that of a chain's RPC")
        if isinstance(found.get("error"), dict):
            return {"jsonrpc": "2.0", "id": found.get("id"), "error": self._without_secrets(found["error"])}
        try:
            return {"jsonrpc": "2.0", "id": found.get("id"), "result": checked(method, params, found["result"])}
        except ValueError as problem:
            raise self._wrong(f"its answer to {method} makes no sense: {problem}") from None

    def _without_secrets(self, error: dict[str, Any]) -> dict[str, Any]:
        """A node's error without what its URL hides: some quote the key that they were asked with."""
        code, data, words = error.get("code"), error.get("data"), str(error.get("message") or "no reason given")
        for secret in self._secrets:
            words = re.sub(re.escape(secret), "***", words, flags=re.IGNORECASE)
        kept: dict[str, Any] = {"code": code if isinstance(code, int) else -32000, "message": words}
        if isinstance(data, str) and not any(
            mark in data.lower() for secret in self._secrets for mark in (secret.lower(), secret.encode().hex())
        ):
            kept["data"] = data
        return kept

    def _wrong(self, why: str) -> TrainChainError:
        return TrainChainError(
            "chain.wrong",
            f"{mask(self._url)} answers, but not as a chain should: {why}.",
            hint="Check the chain's URL; nothing that it says can be relied on.",
        )


def open_provider(
    url: str, *, home: Path | None, timeout: float, retries: int, sleep: Callable[[float], None] = time.sleep
) -> EmbeddedProvider | HttpProvider:
    """Raises `chain.unknown` for an address that is neither `embedded:NAME` nor `http(s)://HOST...`."""
    kind, _, name = url.partition(":")
    if kind == "embedded" and _NAME.fullmatch(name) and home is not None:
        return EmbeddedProvider(open_devnet(name, home))
    if kind in ("http", "https") and _host(url):
        return HttpProvider(url, timeout=timeout, retries=retries, sleep=sleep)
    raise TrainChainError(
        "chain.unknown",
        f"{mask(url)} is not the address of a chain.",
        hint="Write embedded:NAME, or the http:// or https:// URL of an RPC.",
    )


def open_devnet(name: str, home: Path) -> "Devnet":
    """The embedded chain of that name. Raises `chain.unknown` for a name that is none, `chain.wrong` for a file that
    holds no chain."""
    from trainchain.chain.devnet.node import Devnet

    if not _NAME.fullmatch(name):
        raise TrainChainError(
            "chain.unknown",
            f"{name[:64]!r} is not the name of an embedded chain.",
            hint="Letters, digits, - and _ make one, 64 of them at most.",
        )
    path = home / "chain" / f"{name}.sqlite"
    try:
        return Devnet(path)
    except sqlite3.DatabaseError as problem:
        raise TrainChainError(
            "chain.wrong", f"{path} cannot be opened as a chain: {problem}.", hint="Check that path."
        ) from None


def mask(url: str) -> str:
    """The URL without what may be a key in it: user, path, query."""
    host = _host(url)
    if not host:
        return url.partition(":")[0][:20] + ":..." if ":" in url else repr(url[:40])
    parts = urlsplit(url)
    rest = "/..." if parts.path.strip("/") or parts.query else ""
    return f"{parts.scheme}://{host}{rest}"


def _secrets(url: str) -> list[str]:
    """Every part of the URL that `mask` leaves out, as it is written and as it is meant; the longest first."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return []
    found = {parts.username or "", parts.password or "", parts.fragment, parts.query, *parts.path.split("/")}
    found |= {word for pair in parse_qsl(parts.query, keep_blank_values=True) for word in pair}
    found |= {unquote(word) for word in found}
    return sorted((word for word in found if len(word) >= _LEAST_SECRET), key=len, reverse=True)


def _host(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.hostname}{port}" if parts.hostname else ""
    except ValueError:
        return ""
