"""The Hugging Face Hub: models and data sets pinned to a commit, their files fetched, adapters pushed.

Uses the token of HF_TOKEN or `hf auth login` and the hub of HF_ENDPOINT, as both are when a call is made. What the
Hub's client does not do the caller does: check the hash of every file.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from trainchain.core.digests import CHUNK
from trainchain.core.errors import TrainChainError
from trainchain.core.sources.address import Address, HubAddress, parse
from trainchain.core.sources.found import (
    INDEX,
    MOST_LISTED,
    Found,
    FoundFile,
    Kind,
    Pushed,
    check_kept,
    check_names,
    missing_shards,
    model_files,
    too_many,
)
from trainchain.core.sources.hf_answers import HOME, Asking, disk_error
from trainchain.core.sources.hf_download import PATIENCE, XET_ERRORS, by_http, by_xet, changed, metadata, opened, url_of
from trainchain.core.sources.hf_listing import data_files, file_of, folder_of, license_of

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

ATTEMPTS = 5
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
            metadata(ask, named, kept[0].path)
        if kind == "model":
            self._check_shards(named, [file.path for file in kept], address.text)
        return Found(named.at(commit), license_of(info), kept, f"{ask.page(named)}/tree/{commit}")

    def _check_shards(self, address: HubAddress, paths: list[str], where: str) -> None:
        """Raise `source.incomplete` for shards that the index counts on and the repository has not."""
        import json

        names = {path.rpartition("/")[2]: path for path in paths}
        if INDEX not in names:
            return
        data = self.head(address.at(address.revision or ""), names[INDEX], LONGEST_PAGE) or b""
        try:
            missing = missing_shards(json.loads(data), names)
        except (ValueError, RecursionError):
            missing = [f"a readable {INDEX}"]
        if missing:
            raise TrainChainError(
                "source.incomplete",
                f"{where} lacks {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}, which its index names.",
                hint="Name a revision that is complete, or wait until the upload has ended.",
            )

    def fetch(self, source: str, path: str, partial: Path, *, size: int) -> None:
        """Bring a file to `partial`, going on after the bytes that lie there. Raises `source.changed` for another
        size; the caller checks the hash."""
        ask = self._asking()
        address = _pinned(source, path)
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            self._fetch(ask, address, partial, size)
        except OSError as error:
            raise disk_error(error, address) from None
        except TrainChainError as error:
            if error.code in ("source.changed", "disk.full"):
                partial.unlink(missing_ok=True)
            raise

    @staticmethod
    def _fetch(ask: Asking, address: HubAddress, partial: Path, size: int) -> None:
        have = partial.stat().st_size if partial.exists() else -1
        if have == size:
            return
        if have > size:
            partial.unlink()
        missing = size - max(have, 0) if have <= size else size
        if shutil.disk_usage(partial.parent).free < missing:
            raise TrainChainError(
                "disk.full",
                f"{address.path} needs {missing / 1e9:,.2f} GB, and the disk of {partial.parent} has less free.",
                hint="Free some (`trainchain cache ls`), then try again.",
            )
        told, xet = metadata(ask, address, address.path or "")
        if told is not None and told != size:
            raise changed(address, f"is {told:,} bytes there, and {size:,} in the manifest")
        if xet is not None:
            ask.patiently(address, lambda: by_xet(ask, address, xet, partial, size))
        else:
            by_http(ask, address, partial, size)

    def head(self, source: str, path: str, count: int) -> bytes | None:
        """The first `count` bytes of a file of a pinned source, or all of a shorter one."""
        ask = self._asking()
        address = _pinned(source, path)
        if count <= 0:
            return b""

        def read() -> bytes:
            with opened(ask, url_of(ask, address, path), {"Range": f"bytes=0-{count - 1}"}) as answer:
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

        A new repository is made private if `private`; no repository's visibility is changed. Nothing that lies there
        under other names is touched, but for what an earlier push left in the folders of this one. Raises
        `push.conflict` where somebody else wrote meanwhile.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.errors import HfHubHTTPError

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
        bundled = {name.partition("/")[0] for name in files if "/" in name}
        there = ask.patiently(target, lambda: api.list_repo_files(target.repo, revision=parent)) if bundled else []
        stale = [name for name in there if "/" in name and name.partition("/")[0] in bundled and name not in files]

        def commit() -> CommitInfo:
            adds = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
            steps: list[CommitOperationAdd | CommitOperationDelete] = [*adds, *map(CommitOperationDelete, stale)]
            try:
                return api.create_commit(target.repo, steps, commit_message=message, parent_commit=parent)
            except ValueError as error:  # how the client tells what the Hub finds wrong with a card
                if not str(error).startswith("Invalid metadata"):
                    raise
                raise TrainChainError(
                    "source.unsupported",
                    f"{ask.host} does not take README.md: {ask.clean(str(error))}.",
                    hint="Nothing was pushed. Please report this, with the licence that the base's page names.",
                ) from None
            except XET_ERRORS as error:
                if isinstance(error, HfHubHTTPError):
                    raise
                if isinstance(error.__cause__, Exception):  # out of a thread that uploads
                    raise error.__cause__ from None
                raise ask.unavailable_xet(target, error) from None

        done = ask.patiently(target, commit)
        return Pushed(url=ask.page(target), commit=done.oid, created=done.oid != parent)

    # -- the Hub's own words ----------------------------------------------------------------------------------------

    def _asking(self) -> Asking:
        from huggingface_hub import get_token
        from huggingface_hub.utils import disable_progress_bars

        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs the signed addresses of files
        if not sys.stderr.isatty():  # the client's bars and warnings are for a person who looks on
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
            disable_progress_bars()
        endpoint = (self._endpoint or os.environ.get("HF_ENDPOINT") or HOME).rstrip("/")
        ask = Asking(endpoint, None, self._sleep, self._attempts)
        if not ask.shown:
            raise ask.no_hub()
        try:
            token = get_token()
        except (OSError, ValueError, RuntimeError):  # an unreadable token file; a sign-in that failed
            token = ""
        if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
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

        return HfApi(endpoint=ask.endpoint, token=ask.token or False, library_name="trainchain")

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
            with opened(ask, url, {}) as answer:
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


def _pinned(source: str, path: str) -> HubAddress:
    address = parse(source, "data" if source.startswith("hf://datasets/") else "model")
    if not isinstance(address, HubAddress) or not _COMMIT.fullmatch(address.revision or ""):
        raise TrainChainError("source.address", f"{source!r} names no commit.", hint="Resolve it first.")
    check_names([path], source)
    return HubAddress(address.kind, address.repo, address.revision, path)


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
