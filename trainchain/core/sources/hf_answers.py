"""Asking the Hugging Face Hub with patience, and what its refusals mean to a person.

The Hub answers 404 for a private repository as for a typo, 401 for the same without a token, and lets everybody see
the list of a gated one; what is told here says so. No token, and no query of an address, is ever in a message.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from trainchain.core.errors import TrainChainError
from trainchain.core.sources.address import HubAddress

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")

HOME = "https://huggingface.co"
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT = 60.0
"""Seconds that are waited at most before one more try, whatever the Hub asks for."""
LOG_IN = "run `hf auth login`, or set HF_TOKEN"


class Broken(Exception):
    """An answer broke off. `progress`: enough of it came that trying has not been in vain."""

    def __init__(self, why: str, *, progress: bool) -> None:
        super().__init__(why)
        self.progress = progress


class Asking:
    """One hub and one token. `sleep` waits that many seconds; `attempts` bounds tries that brought nothing."""

    def __init__(self, endpoint: str, token: str | None, sleep: Callable[[float], None], attempts: int) -> None:
        self.endpoint = endpoint
        self.shown = _shown(endpoint)
        """The endpoint without what may be a password in it; empty where it is no address."""
        self.token = token
        self._sleep = sleep
        self._attempts = attempts

    def patiently(self, address: HubAddress, do: Callable[[], T]) -> T:
        """Do it until it is answered. Every failure that is not a bug is raised as one TrainChainError."""
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
        from huggingface_hub.utils import httpx

        tries = 0
        while True:
            wait = None
            try:
                return do()
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status not in AGAIN:
                    raise self._refused(error, address) from None
                why, wait = f"it answered {status}", _wanted(error)
            except OfflineModeIsEnabled:
                raise TrainChainError(
                    "source.unavailable",
                    f"{address.text} was not asked for: HF_HUB_OFFLINE is set on this machine.",
                    hint="Unset HF_HUB_OFFLINE, or use files that are already here.",
                ) from None
            except Broken as error:
                tries = 0 if error.progress else tries
                why = str(error)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects):
                raise self.no_hub() from None
            except httpx.TransportError as error:
                why = self.clean(str(error)) or type(error).__name__
            except OSError as error:
                raise disk_error(error, address) from None
            except HFValidationError as error:
                raise TrainChainError("source.address", self.clean(str(error)), hint="Write hf://org/name.") from None
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise self.no_hub() from None
            tries += 1
            if tries >= self._attempts:
                raise self._given_up(address, why, wait)
            self._sleep(min(LONGEST_WAIT, wait if wait is not None else min(2.0**tries, 16.0) * random.uniform(0.5, 1)))

    def no_hub(self) -> TrainChainError:
        """What answers is not a hub, or cannot be one."""
        return TrainChainError(
            "source.unavailable",
            f"{self.host} does not answer as a Hugging Face hub.",
            hint="Check HF_ENDPOINT, and that no proxy or login page answers in its place.",
        )

    @property
    def host(self) -> str:
        """The hub as a person knows it."""
        return "Hugging Face" if self.endpoint == HOME else self.shown or "HF_ENDPOINT"

    def page(self, address: HubAddress) -> str:
        """The repository's page for people."""
        return f"{self.shown}/{'datasets/' if address.kind == 'data' else ''}{address.repo}"

    def clean(self, text: str) -> str:
        """A stranger's text, fit to be shown: one line, short, and without the token."""
        if self.token:
            text = text.replace(self.token, "***")
        return "".join(mark if mark.isprintable() else " " for mark in text.strip())[:200]

    def unavailable_xet(self, address: HubAddress, error: Exception) -> TrainChainError:
        """hf_xet gave up; it has tried for minutes by then."""
        return TrainChainError(
            "source.unavailable",
            f"The storage of {self.host} did not give or take {address.text}: {self.clean(str(error))}.",
            hint="Try again. Where only the hub's own host can be reached, set HF_HUB_DISABLE_XET=1.",
        )

    def _given_up(self, address: HubAddress, why: str, wait: float | None) -> TrainChainError:
        asked = f", and asks to wait {wait:.0f} seconds" if wait is not None and wait > LONGEST_WAIT else ""
        hint = "Check the connection; then try again: what has come is kept."
        if "429" in why:
            hint = "Try again later." if self.token else f"Try again later, or {LOG_IN}: who is signed in may ask more."
        return TrainChainError(
            "source.unavailable",
            f"{self.host} did not give or take {address.text} after {self._attempts} tries: {why}{asked}.",
            hint=hint,
        )

    def _refused(self, error: HfHubHTTPError, address: HubAddress) -> TrainChainError:
        answer = error.response
        status, code = answer.status_code, answer.headers.get("X-Error-Code", "")
        said = self.clean(answer.headers.get("X-Error-Message", ""))
        thing = "data set" if address.kind == "data" else "model"
        if status == 401 and (said.startswith("Invalid credentials") or (self.token and not code)):
            return TrainChainError(
                "source.token",
                f"{self.host} does not accept the token that was sent: it is wrong, revoked or expired.",
                hint=f"R{LOG_IN[1:]} to a token of {self.shown}/settings/tokens; unset it to read what is public.",
            )
        if code == "GatedRepo":
            signed = "" if self.token else f" On this machine, {LOG_IN}."
            return TrainChainError(
                "source.gated",
                f"The {thing} {address.repo} is gated: its terms have to be accepted before its files are given out.",
                hint=f"Open {self.page(address)} signed in and accept them; then try again.{signed}",
            )
        if code == "RevisionNotFound":
            return TrainChainError(
                "source.not_found",
                f"The {thing} {address.repo} has no revision {address.revision!r}.",
                hint=f"See its branches, tags and commits at {self.page(address)}/commits/main.",
            )
        if code == "EntryNotFound":
            return TrainChainError(
                "source.not_found",
                f"The {thing} {address.repo} has no {address.path!r}.",
                hint=f"See what it has at {self.page(address)}/tree/{address.revision or 'main'}.",
            )
        if status in (401, 404):
            sent = "the token that was sent does not open it" if self.token else "no token was sent"
            return TrainChainError(
                "source.not_found",
                f"{self.host} shows no {thing} {address.repo}: the name may be wrong, or it is private and {sent}.",
                hint=f"Check the name. If it is private, {LOG_IN} of an account that may read it.",
            )
        if status == 412:
            return TrainChainError(
                "push.conflict",
                f"Somebody else changed {address.repo} while the adapter was pushed; nothing of it was overwritten.",
                hint="Look at what changed, then push again.",
            )
        if status == 416:
            return TrainChainError(
                "source.changed",
                f"{address.text} is shorter there than its manifest says.",
                hint="It is fetched once more; if it stays so, do not trust this hub or the way to it.",
            )
        told = f": {said}" if said else ""
        return TrainChainError(
            "source.forbidden",
            f"{self.host} refused {address.text} with status {status}{told}.",
            hint="See what the token may do at " + f"{self.shown}/settings/tokens, and {self.page(address)}.",
        )


def _shown(endpoint: str) -> str:
    try:
        parts = urlsplit(endpoint)
        host = f"{parts.hostname or ''}" + (f":{parts.port}" if parts.port else "")
    except ValueError:
        return ""
    return f"{parts.scheme}://{host}{parts.path}" if parts.scheme in ("http", "https") and parts.hostname else ""


def _wanted(error: HfHubHTTPError) -> float | None:
    """Seconds the Hub asks to wait, by either of the headers it uses."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    if error.response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    after = headers.get("Retry-After", "").strip()
    return float(after) if after.isascii() and after.isdigit() and len(after) < 10 else None


def disk_error(error: OSError, address: HubAddress) -> TrainChainError:
    """A failure to write here."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TrainChainError(
            "disk.full",
            f"The disk has no room left for {address.text}.",
            hint="Free some (`trainchain cache ls`), then try again.",
        )
    return TrainChainError(
        "usage.file",
        f"{address.text} cannot be kept here: {error.strerror or type(error).__name__}.",
        hint="Check that the folder can be written to.",
    )
