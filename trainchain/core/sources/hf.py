"""The Hugging Face Hub: models and data sets pinned to a commit, fetched with resume, adapters pushed.

The vendor's client signs in, follows redirects and speaks xet; the bytes are streamed here, because since version 2
it starts a broken download from the beginning. What it does not do, the caller does: check the hash of every file.
Uses the token of HF_TOKEN or `hf auth login` and the hub of HF_ENDPOINT, as both are when a call is made.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote, urlsplit

from trainchain.core.digests import CHUNK
from trainchain.core.errors import TrainChainError
from trainchain.core.sources.address import Address, HubAddress, parse
from trainchain.core.sources.found import (
    MOST_LISTED,
    Found,
    FoundFile,
    Kind,
    Pushed,
    check_kept,
    check_names,
    model_files,
    too_many,
)
from trainchain.core.sources.hf_answers import HOME, Asking, Broken, disk_error
from trainchain.core.sources.hf_listing import data_files, file_of, folder_of, license_of

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import CommitInfo, HfApi
    from huggingface_hub.utils._xet import XetFileData

ATTEMPTS = 5
CONNECT, PATIENCE = 10.0, 30.0
"""Seconds without a connection, and without a byte."""
_PIECE = 64 << 10
"""Bytes written at once, and lost at most when a download breaks off."""
LONGEST_PAGE = 32 << 20
"""Bytes of one page of a listing."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HuggingFace:
    """One hub seen with one token. The arguments are for tests; left out, the environment decides."""

    def __init__(
        self, *, endpoint: str | None = None, sleep: Callable[[float], None] = time.sleep, attempts: int = ATTEMPTS
    ) -> None:
        self._endpoint = endpoint
        self._sleep = sleep
        self._attempts = attempts

    # -- in ---------------------------------------------------------------------------------------------------------

    def find(self, address: Address, kind: Kind) -> Found:
        """Pin a repository to its commit and list what of it is the model or the data.

        Raises `model.unreadable` where the names alone tell that it is no model with safetensors weights.
        """
        assert isinstance(address, HubAddress)
        ask = self._asking()
        info = self._info(ask, address)
        commit = str(info.sha)
        if not _COMMIT.fullmatch(commit):
            raise ask.no_hub()
        named = HubAddress(address.kind, _repo(ask, info.id, address), commit, address.path)
        files = self._list(ask, named, kind)
        kept = model_files(files, address.text) if kind == "model" else data_files(files, address)
        kept = sorted(kept, key=lambda file: file.path)
        check_kept(kept, address.text)
        if info.gated is not False:  # the list of a gated repository is public, its files are not
            self._metadata(ask, named, kept[0].path)
        return Found(named.at(commit), license_of(info), kept, f"{ask.page(named)}/tree/{commit}")

    def fetch(self, source: str, path: str, partial: Path, *, size: int) -> None:
        """Bring a file to `partial`, going on after the bytes that lie there. Raises `source.changed` for another
        size; the caller checks the hash."""
        ask = self._asking()
        address = _pinned(source, path)
        partial.parent.mkdir(parents=True, exist_ok=True)
        have = partial.stat().st_size if partial.exists() else 0
        if have == size and partial.exists():
            return
        if have > size:
            partial.unlink()
            have = 0
        if shutil.disk_usage(partial.parent).free < size - have:
            raise TrainChainError(
                "disk.full",
                f"{path} needs {(size - have) / 1e9:,.2f} GB more than the disk of {partial.parent} has free.",
                hint="Free some (`trainchain cache ls`), then try again.",
            )
        told, xet = self._metadata(ask, address, path)
        if told is not None and told != size:
            partial.unlink(missing_ok=True)
            raise _changed(address, f"is {told:,} bytes there, and {size:,} in the manifest")
        try:
            if xet is not None:
                self._fetch_xet(ask, address, xet, partial, size)
            else:
                self._fetch_http(ask, address, partial, size)
        except TrainChainError as error:
            if error.code in ("source.changed", "disk.full"):
                partial.unlink(missing_ok=True)
            raise

    def head(self, source: str, path: str, count: int) -> bytes | None:
        """The first `count` bytes of a file of a pinned source, or all of a shorter one."""
        ask = self._asking()
        address = _pinned(source, path)
        if count <= 0:
            return b""

        def read() -> bytes:
            with self._open(ask, _url(ask, address, path), {"Range": f"bytes=0-{count - 1}"}) as answer:
                data = b""
                for chunk in answer.iter_bytes(CHUNK):
                    data += chunk
                    if len(data) >= count:
                        break
            return data[:count]

        return ask.patiently(address, read)

    # -- out --------------------------------------------------------------------------------------------------------

    def push(self, folder: Path, target: Address, *, message: str, private: bool) -> Pushed:
        """Commit the files of `folder` on top of what the repository has, in one commit that holds or does not.

        A new repository is made private if `private`. Nothing that lies there under other names is touched, and no
        repository's visibility is changed. Raises `push.conflict` where somebody else wrote meanwhile.
        """
        from huggingface_hub import CommitOperationAdd

        assert isinstance(target, HubAddress)
        ask = self._asking()
        if ask.token is None:
            raise TrainChainError(
                "source.token",
                f"Pushing to {target.repo} needs a token, and there is none.",
                hint="Run `hf auth login`, or set HF_TOKEN to a token that may write there.",
            )
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        check_names(files, str(folder))
        if not files:
            raise TrainChainError("usage.file", f"{folder} has no files to push.", hint="Name the adapter's folder.")
        api = self._api(ask)
        try:
            info = self._info(ask, target)
        except TrainChainError as error:
            if error.code != "source.not_found":
                raise
            ask.patiently(target, lambda: api.create_repo(target.repo, private=private, exist_ok=True))
            info = self._info(ask, target)
        if private and info.private is False:
            raise TrainChainError(
                "usage.flag",
                f"{target.repo} is there already and everybody can read it; this push is to be private.",
                hint="Push with --public, name another repository, or make that one private in its settings.",
            )
        parent = str(info.sha)

        def commit() -> CommitInfo:
            adds = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
            try:
                return api.create_commit(target.repo, adds, commit_message=message, parent_commit=parent)
            except RuntimeError as error:  # how its upload threads and hf_xet tell of what went wrong
                if isinstance(error.__cause__, Exception):
                    raise error.__cause__ from None
                raise Broken(ask.clean(str(error)), progress=False) from None

        done = ask.patiently(target, commit)
        return Pushed(url=ask.page(target), commit=done.oid, created=done.oid != parent)

    # -- the Hub's own words ----------------------------------------------------------------------------------------

    def _asking(self) -> Asking:
        from huggingface_hub import get_token
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():  # the client's bars and warnings are for a person who looks on
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
            disable_progress_bars()
        endpoint = (self._endpoint or os.environ.get("HF_ENDPOINT") or HOME).rstrip("/")
        ask = Asking(endpoint, None, self._sleep, self._attempts)
        if urlsplit(endpoint).scheme not in ("http", "https"):
            raise ask.no_hub()
        token = get_token()
        if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
            raise TrainChainError(
                "source.token",
                "What HF_TOKEN or the token file holds is no token.",
                hint="Run `hf auth login`, or copy the token into HF_TOKEN once more.",
            )
        ask.token = token
        return ask

    @staticmethod
    def _api(ask: Asking) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(endpoint=ask.endpoint, token=ask.token or False)

    def _info(self, ask: Asking, address: HubAddress) -> Any:
        """The repository at a revision: its commit, licence, and who may see it. Not its files: they may be many."""
        api = self._api(ask)
        ask_for = api.dataset_info if address.kind == "data" else api.model_info
        wanted: Any = ["cardData", "gated", "private", "sha", "tags"]
        return ask.patiently(
            address, lambda: ask_for(address.repo, revision=address.revision, timeout=PATIENCE, expand=wanted)
        )

    def _list(self, ask: Asking, address: HubAddress, kind: Kind) -> list[FoundFile]:
        """The files of the folder that is meant, and for data of all below it; at most `MOST_LISTED` entries are
        asked for."""
        folder = folder_of(address) if kind == "data" else (address.path or "")
        where = f"{'datasets' if kind == 'data' else 'models'}/{address.repo}/tree/{address.revision}"
        url: str | None = f"{ask.endpoint}/api/{where}" + (f"/{quote(folder, safe='')}" if folder else "")
        url = f"{url}?recursive={'true' if kind == 'data' else 'false'}&expand=false"
        files, seen = [], 0
        while url is not None:
            entries, url = self._page(ask, address, url)
            seen += len(entries)
            if seen > MOST_LISTED:
                raise too_many(address.text, MOST_LISTED)
            check_names((str(entry.get("path")) for entry in entries), address.text)
            try:
                files += [file_of(entry) for entry in entries if entry.get("type") == "file"]
            except ValueError:
                raise ask.no_hub() from None
        return files

    def _page(self, ask: Asking, address: HubAddress, url: str) -> tuple[list[dict[str, Any]], str | None]:
        import json

        from huggingface_hub.utils import fix_hf_endpoint_in_url

        def read() -> tuple[Any, str | None]:
            with self._open(ask, url, {}) as answer:
                data = b""
                for chunk in answer.iter_bytes(CHUNK):
                    data += chunk
                    if len(data) > LONGEST_PAGE:
                        raise too_many(address.text, MOST_LISTED)
                return json.loads(data), answer.links.get("next", {}).get("url")

        entries, after = ask.patiently(address, read)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ask.no_hub()
        if after is not None:
            after = fix_hf_endpoint_in_url(after, ask.endpoint)
            if urlsplit(after)[:2] != urlsplit(ask.endpoint)[:2] or not entries:  # the token is not for another host
                raise ask.no_hub()
        return entries, after

    def _metadata(self, ask: Asking, address: HubAddress, path: str) -> tuple[int | None, XetFileData | None]:
        """Ask for one file without its bytes: its size, and where xet keeps it if it does and is not switched off."""
        from huggingface_hub import get_hf_file_metadata
        from huggingface_hub.utils._runtime import is_xet_available

        url = _url(ask, address, path)
        told = ask.patiently(
            address,
            lambda: get_hf_file_metadata(url, token=ask.token or False, timeout=PATIENCE, endpoint=ask.endpoint),
        )
        return told.size, told.xet_file_data if is_xet_available() else None

    @contextmanager
    def _open(self, ask: Asking, url: str, headers: dict[str, str]) -> Iterator[httpx2.Response]:
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx

        every = {**build_hf_headers(token=ask.token or False), "Accept-Encoding": "identity", **headers}
        timeout = httpx.Timeout(PATIENCE, connect=CONNECT)
        with get_session().stream("GET", url, headers=every, timeout=timeout, follow_redirects=True) as answer:
            hf_raise_for_status(answer)
            yield answer

    def _fetch_http(self, ask: Asking, address: HubAddress, partial: Path, size: int) -> None:
        from huggingface_hub.utils import httpx

        url = _url(ask, address, address.path or "")

        def go_on(file: BinaryIO) -> None:
            have = file.seek(0, os.SEEK_END)
            with self._open(ask, url, {"Range": f"bytes={have}-"} if have else {}) as answer:
                if have and _start(answer) != have:
                    have = file.seek(0)
                    file.truncate()
                    if answer.status_code == 206:
                        raise Broken("it sent another part of the file than it was asked for", progress=False)
                before = have
                try:
                    for chunk in answer.iter_bytes(_PIECE):
                        if have + len(chunk) > size:
                            raise _changed(address, f"has more than the {size:,} bytes in the manifest")
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

    def _fetch_xet(self, ask: Asking, address: HubAddress, xet: XetFileData, partial: Path, size: int) -> None:
        from huggingface_hub.file_download import xet_get
        from huggingface_hub.utils import build_hf_headers

        def get() -> None:
            headers = build_hf_headers(token=ask.token or False)
            try:
                xet_get(incomplete_path=partial, xet_file_data=xet, headers=headers, expected_size=size)
            except (RuntimeError, PermissionError, ConnectionError, TimeoutError) as error:
                raise Broken(f"xet: {ask.clean(str(error))}", progress=False) from None

        try:
            ask.patiently(address, get)
        except TrainChainError as error:
            if error.code == "source.unavailable":
                error.hint += " Where only this hub's own host can be reached, set HF_HUB_DISABLE_XET=1."
            raise
        if (found := partial.stat().st_size) != size:
            raise _changed(address, f"came with {found:,} bytes, and has {size:,} in the manifest")


def _pinned(source: str, path: str) -> HubAddress:
    address = parse(source, "data" if source.startswith("hf://datasets/") else "model")
    if not isinstance(address, HubAddress) or not _COMMIT.fullmatch(address.revision or ""):
        raise TrainChainError("source.address", f"{source!r} names no commit.", hint="Resolve it first.")
    check_names([path], source)
    return HubAddress(address.kind, address.repo, address.revision, path)


def _url(ask: Asking, address: HubAddress, path: str) -> str:
    from huggingface_hub import hf_hub_url

    kind = "dataset" if address.kind == "data" else "model"
    return hf_hub_url(address.repo, path, repo_type=kind, revision=address.revision, endpoint=ask.endpoint)


def _repo(ask: Asking, name: object, address: HubAddress) -> str:
    """The repository's own name: another than was asked for where it was renamed."""
    prefix = "hf://datasets/" if address.kind == "data" else "hf://"
    try:
        read = parse(f"{prefix}{name}", address.kind)
    except TrainChainError:
        raise ask.no_hub() from None
    if not isinstance(read, HubAddress) or read.path or read.revision:
        raise ask.no_hub()
    return read.repo


def _start(answer: httpx2.Response) -> int:
    """Where in the file an answer begins."""
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", "")) if answer.status_code == 206 else None
    return int(found[1]) if found else 0


def _changed(address: HubAddress, how: str) -> TrainChainError:
    return TrainChainError(
        "source.changed",
        f"{address.path} of {address.at(address.revision or '')} {how}.",
        hint="It is fetched once more; if it stays so, do not trust this hub or the way to it.",
    )
