"""The hub's verbs over HTTP, for owners and workers: bounded retries, the hub's own words for errors."""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from trainchain.core.digests import CHUNK, sha256
from trainchain.core.errors import CODES, TrainChainError
from trainchain.core.models import PROTOCOL

ATTEMPTS = 6
PATIENCE = 30.0
"""Seconds for an answer; the longest long poll is 25."""
UPLOAD_PATIENCE = 600.0
"""Seconds for the answer to an upload: the hub writes and hashes all of it first."""
MAX_DOCUMENT = 1 << 28
"""Bytes of an answer that is not an object: a job of many thousand shards has some millions."""
_STANDARD = frozenset({"type", "title", "status", "detail", "code", "hint"})

Signer = Callable[[dict[str, Any]], str]
"""Signs the fields of an EIP-4361 message; returns the signature."""


class HubClient:
    """One hub, seen by one wallet (or by nobody, where only public things are asked for).

    Every request may be sent again: the hub's verbs are safe to repeat. Raises `hub.unreachable` after bounded
    retries, `hub.not_a_hub` for answers that are no hub's, and whatever problem the hub reports, by its code.
    """

    def __init__(
        self,
        url: str,
        *,
        address: str | None = None,
        sign_in: Signer | None = None,
        attempts: int = ATTEMPTS,
        patience: float = PATIENCE,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.url = url.rstrip("/")
        if not _is_address(self.url):
            raise TrainChainError("usage.flag", f"{url!r} is not the address of a hub.", hint="--hub https://...")
        self.address = address
        self.sent = 0
        self.received = 0
        """Bytes of request and answer bodies so far."""
        self._sign_in = sign_in
        self.attempts = attempts
        self._patience = patience
        self._sleep = sleep
        self._now = now
        self._token: str | None = None
        self._info: dict[str, Any] | None = None
        self._http = httpx.Client(timeout=httpx.Timeout(patience), headers={"trainchain-protocol": str(PROTOCOL)})

    def close(self) -> None:
        self._http.close()

    def info(self) -> dict[str, Any]:
        """What the hub says of itself and its chain; asked once."""
        if self._info is None:
            found = self.get("/v1/hub")
            if found.get("protocol") != PROTOCOL or not isinstance(found.get("chain"), dict):
                raise TrainChainError("hub.not_a_hub", f"{self.url} does not answer as a hub of protocol {PROTOCOL}.")
            self._info = found
        return self._info

    def get(self, path: str, *, signed: bool = False, **params: Any) -> dict[str, Any]:
        return self._document(self._request("GET", path, signed=signed, params=params))

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, signed: bool = True) -> dict[str, Any]:
        answer = self._request("POST", path, signed=signed, json=dict(body or {}))
        return {} if answer.status_code == 204 else self._document(answer)

    def delete(self, path: str) -> None:
        self._request("DELETE", path, signed=True)

    def raw(self, path: str) -> bytes:
        """The bytes of a small public answer."""
        return self._request("GET", path).content

    def upload(self, path: str, file: Path) -> dict[str, Any]:
        """PUT a file, streamed; started again from its beginning if the connection breaks."""
        size = file.stat().st_size

        def chunks() -> Iterator[bytes]:
            with file.open("rb") as source:
                while chunk := source.read(CHUNK):
                    self.sent += len(chunk)
                    yield chunk

        headers = {"content-length": str(size)}
        return self._document(self._request("PUT", path, signed=True, content=chunks, headers=headers))

    def download(self, digest: str, partial: Path, *, size: int) -> None:
        """Bring an object of at most `size` bytes into `partial`, on from the bytes that lie there already.

        A connection that breaks is opened again where it broke, as long as that gets anywhere. What came is not
        checked against the digest: that is the caller's to do. Raises `object.digest` where more than `size` come.
        """
        stuck = 0
        while (have := _size(partial)) < size:
            try:
                self._append(digest, partial, have, size)
                return
            except _BrokenOff:
                stuck = 0 if _size(partial) > have else stuck + 1
                if stuck + 1 >= self.attempts:
                    raise
                self._sleep(min(0.2 * 2**stuck, 5.0))

    def _append(self, digest: str, partial: Path, have: int, size: int) -> None:
        headers = {"accept-encoding": "identity"} | ({"range": f"bytes={have}-"} if have else {})
        signed = self._sign_in is not None
        try:
            answer = self._request("GET", f"/v1/objects/{digest}", signed=signed, stream=True, headers=headers)
        except TrainChainError as error:
            if error.code != "http.range":
                raise
            if error.facts.get("size") != have:
                partial.unlink()
                self._append(digest, partial, 0, size)
            return
        with _Streaming(answer) as chunks:
            goes_on = answer.status_code == 206
            if goes_on and not answer.headers.get("content-range", "").startswith(f"bytes {have}-"):
                raise TrainChainError("hub.not_a_hub", f"{self.url} sent another part of {digest} than was asked for.")
            received = have if goes_on else 0
            with partial.open("ab" if goes_on else "wb", buffering=0) as file:
                for chunk in chunks:
                    received += len(chunk)
                    self.received += len(chunk)
                    if received > size:
                        raise TrainChainError("object.digest", f"The hub sent more than the {size} bytes of {digest}.")
                    file.write(chunk)

    def object(self, digest: str, *, cap: int = 64 << 20) -> bytes:
        """A small public object, checked against its digest."""
        data = b""
        answer = self._request("GET", f"/v1/objects/{digest}", signed=self._sign_in is not None, stream=True)
        with _Streaming(answer) as chunks:
            for chunk in chunks:
                self.received += len(chunk)
                data += chunk
                if len(data) > cap:
                    break
        if len(data) > cap or sha256(data) != digest:
            raise TrainChainError("object.digest", f"The hub sent other bytes than {digest}, or more than {cap}.")
        return data

    def _document(self, answer: httpx.Response) -> dict[str, Any]:
        try:
            found = answer.json()
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise TrainChainError(
                "hub.not_a_hub",
                f"{answer.request.url} answered, but not as a TrainChain hub.",
                hint="Check the address after --hub.",
            )
        return found

    def _request(
        self,
        method: str,
        path: str,
        *,
        signed: bool = False,
        stream: bool = False,
        content: Callable[[], Iterable[bytes]] | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> httpx.Response:
        """Send until the hub answers, at most `attempts` times with growing pauses; sign in where needed."""
        failure = ""
        timeout = httpx.Timeout(UPLOAD_PATIENCE if content else self._patience, connect=self._patience)
        renewed = False
        attempt = 0
        while attempt < self.attempts:
            if attempt:
                self._sleep(min(0.2 * 2**attempt, 5.0) * (0.5 + random.random()))
            attempt += 1
            extra = dict(headers or {})
            if signed:
                extra["authorization"] = f"Bearer {self._session()}"
            try:
                payload = content() if content else None
                request = self._http.build_request(
                    method, self.url + path, headers=extra, content=payload, timeout=timeout, **options
                )
                answer = self._http.send(request, stream=True)
                self.sent += 0 if content else len(request.content)
                if not stream or answer.status_code >= 400:
                    answer = self._whole(answer)
            except (httpx.RequestError, OSError) as error:
                failure = str(error) or type(error).__name__
                if isinstance(error, httpx.TimeoutException):
                    attempt += 1  # it cost as much as several refusals
                continue
            if answer.status_code < 400:
                return answer
            problem = _problem(answer)
            if problem is not None and problem.code == "session.required" and signed and not renewed:
                self._token, renewed = None, True
                attempt -= 1
                continue
            if answer.status_code >= 500 and problem is None:
                failure = f"it answered {answer.status_code}"
                continue
            raise problem or TrainChainError(
                "hub.not_a_hub",
                f"{self.url}{path} answered {answer.status_code}, and not as a TrainChain hub.",
                hint="Check the address after --hub.",
            )
        raise TrainChainError(
            "hub.unreachable",
            f"The hub {self.url} did not answer after {self.attempts} tries: {failure}.",
            hint="Check the address and that `trainchain serve-hub` is running; then try again.",
        )

    def _whole(self, answer: httpx.Response) -> httpx.Response:
        """An answer that was begun, read to its end. Raises `hub.not_a_hub` for one beyond all measure."""
        data = bytearray()
        try:
            for chunk in answer.iter_bytes():
                self.received += len(chunk)
                data += chunk
                if len(data) > MAX_DOCUMENT:
                    raise TrainChainError("hub.not_a_hub", f"{self.url} answers with more than {MAX_DOCUMENT} bytes.")
        finally:
            answer.close()
        headers = {"content-type": answer.headers.get("content-type", "")}
        return httpx.Response(answer.status_code, headers=headers, content=bytes(data), request=answer.request)

    def _session(self) -> str:
        if self._token is None:
            if self._sign_in is None or self.address is None:
                raise TrainChainError("session.required", "This request needs a wallet.")
            now = self._now()
            host = self._http.build_request("GET", self.url).headers["host"]
            fields = {
                "domain": host,
                "address": self.address,
                "uri": f"{urlsplit(self.url).scheme}://{host}",
                "chain_id": self.info()["chain"]["chain_id"],
                "nonce": self.post("/v1/session/nonce", signed=False)["nonce"],
                "issued_at": now.isoformat(timespec="seconds").replace("+00:00", "Z"),
                "expiration_time": (now + timedelta(days=1)).isoformat(timespec="seconds").replace("+00:00", "Z"),
            }
            signed = {"fields": fields, "signature": self._sign_in(fields)}
            self._token = str(self.post("/v1/session", signed, signed=False)["token"])
        return self._token


class _BrokenOff(TrainChainError):
    """A connection that ended in the middle of an answer."""


class _Streaming:
    """The chunks of a streamed answer; a break in the middle is `hub.unreachable`."""

    def __init__(self, answer: httpx.Response) -> None:
        self._answer = answer

    def __enter__(self) -> Iterator[bytes]:
        return self._chunks()

    def _chunks(self) -> Iterator[bytes]:
        try:
            yield from self._answer.iter_bytes()  # in no larger pieces than they come in: none is lost in a break
        except (httpx.RequestError, OSError) as error:
            raise _BrokenOff("hub.unreachable", f"A download broke off: {error}.") from None

    def __exit__(self, *_: object) -> None:
        self._answer.close()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 80) > 0
    except ValueError:
        return False


def _problem(answer: httpx.Response) -> TrainChainError | None:
    """The hub's problem document as the error it stands for; None where it is none of ours."""
    try:
        document = answer.json()
    except (ValueError, RecursionError):
        return None
    code = document.get("code") if isinstance(document, dict) else None
    if not isinstance(code, str):
        return None
    facts = {key: value for key, value in document.items() if key not in _STANDARD}
    known = code if code in CODES else "hub.failed"
    return TrainChainError(known, str(document.get("detail", "")), hint=str(document.get("hint", "")), **facts)
