"""One file of the Hub brought here: by HTTP, going on where it broke off, or by xet where the Hub keeps it so.

The vendor's client signs in, follows redirects and speaks xet; over HTTP the bytes are streamed here, because since
version 2 it begins a broken download anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from trainchain.core.digests import CHUNK
from trainchain.core.errors import TrainChainError
from trainchain.core.sources.address import HubAddress
from trainchain.core.sources.hf_answers import Asking, Broken, disk_error

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub.utils._xet import XetFileData

CONNECT, PATIENCE = 10.0, 30.0
"""Seconds without a connection, and without a byte."""
_PIECE = 64 << 10
"""Bytes written at once, and lost at most when a download breaks off."""
XET_ERRORS = (RuntimeError, PermissionError, ConnectionError, TimeoutError)
"""What hf_xet raises for whatever happens to its storage."""


def metadata(ask: Asking, address: HubAddress, path: str) -> tuple[int | None, XetFileData | None]:
    """Ask for one file without its bytes: its size, and where xet keeps it if it does and is not switched off."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.utils._runtime import is_xet_available

    url = url_of(ask, address, path)
    told = ask.patiently(
        address,
        lambda: get_hf_file_metadata(url, token=ask.token or False, timeout=PATIENCE, endpoint=ask.endpoint),
    )
    return told.size, told.xet_file_data if is_xet_available() else None


@contextmanager
def opened(ask: Asking, url: str, headers: dict[str, str]) -> Iterator[httpx2.Response]:
    """GET, the answer's body still to be read. Raises the client's own errors: `Asking.patiently` knows them."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx

    every = {
        **build_hf_headers(token=ask.token or False, library_name="trainchain"),
        "Accept-Encoding": "identity",
        **headers,
    }
    timeout = httpx.Timeout(PATIENCE, connect=CONNECT)
    with get_session().stream("GET", url, headers=every, timeout=timeout, follow_redirects=True) as answer:
        hf_raise_for_status(answer)
        yield answer


def by_http(ask: Asking, address: HubAddress, partial: Path, size: int) -> None:
    """Stream what is missing to the end of `partial`, again and again while it brings something."""
    from huggingface_hub.utils import httpx

    url = url_of(ask, address, address.path or "")

    def go_on(file: BinaryIO) -> None:
        have = file.seek(0, os.SEEK_END)
        with opened(ask, url, {"Range": f"bytes={have}-"} if have else {}) as answer:
            total = _total(answer)
            if total is not None and total != size:
                raise changed(address, f"is {total:,} bytes there, and {size:,} in the manifest")
            if have and _start(answer) != have:
                have = file.seek(0)
                file.truncate()
                if answer.status_code == 206:
                    raise Broken("it sent another part of the file than it was asked for", progress=False)
            before = have
            try:
                for chunk in answer.iter_bytes(_PIECE):
                    if have + len(chunk) > size:
                        raise changed(address, f"has more than the {size:,} bytes in the manifest")
                    file.write(chunk)
                    have += len(chunk)
            except httpx.TransportError as error:
                why = ask.clean(str(error)) or type(error).__name__
                raise Broken(why, progress=have - before >= CHUNK) from None
            except OSError as error:
                raise disk_error(error, address) from None
            if have < size:
                raise Broken(f"it ended after {have:,} of {size:,} bytes", progress=have - before >= CHUNK)

    with partial.open("ab") as file:
        ask.patiently(address, lambda: go_on(file))


def by_xet(ask: Asking, address: HubAddress, xet: XetFileData, partial: Path, size: int) -> None:
    """Have hf_xet write the file anew; it keeps the chunks of a broken download by itself."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import xet_get
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(token=ask.token or False, library_name="trainchain")
    try:
        xet_get(incomplete_path=partial, xet_file_data=xet, headers=headers, expected_size=size)
    except XET_ERRORS as error:
        if isinstance(error, HfHubHTTPError):
            raise
        raise ask.unavailable_xet(address, error) from None
    if (found := partial.stat().st_size) != size:
        raise changed(address, f"came with {found:,} bytes, and has {size:,} in the manifest")


def url_of(ask: Asking, address: HubAddress, path: str) -> str:
    """Where the hub gives out a file."""
    from huggingface_hub import hf_hub_url

    kind = "dataset" if address.kind == "data" else "model"
    return hf_hub_url(address.repo, path, repo_type=kind, revision=address.revision, endpoint=ask.endpoint)


def _start(answer: httpx2.Response) -> int:
    """Where in the file an answer begins."""
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", "")) if answer.status_code == 206 else None
    return int(found[1]) if found else 0


def _total(answer: httpx2.Response) -> int | None:
    """The length of the whole file, as an answer tells it."""
    if answer.status_code == 206:
        told = answer.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        told = "" if "Content-Encoding" in answer.headers else answer.headers.get("Content-Length", "")
    return int(told) if told.isascii() and told.isdigit() and len(told) < 20 else None


def changed(address: HubAddress, how: str) -> TrainChainError:
    """The file is not the one of the manifest, in `how` it is told from it."""
    return TrainChainError(
        "source.changed",
        f"{address.path} of {address.at(address.revision or '')} {how}.",
        hint="It is fetched once more; if it stays so, do not trust this hub or the way to it.",
    )
