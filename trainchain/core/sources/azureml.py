"""Models and data in Azure Machine Learning: registries, workspaces, datastores; and adapters pushed there.

Everything is asked of the vendor's clients (extra `azure`), imported when first used. Two calls are made by hand, for
azure-ai-ml does them only inside a whole download: the signed address of a registry's files, and which workspace has a
GUID. Bytes come from the blob client, file by file and by ranges. Keys and signed addresses stay in memory.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainchain.core.errors import TrainChainError
from trainchain.core.sources.address import Address, Asked, AzureAddress
from trainchain.core.sources.azureml_address import Asset, Registry, Workspace, read, shown
from trainchain.core.sources.azureml_errors import (
    WRITE_REGISTRY,
    WRITE_WORKSPACE,
    asking,
    check_room,
    status_of,
    writing,
)
from trainchain.core.sources.azureml_push import content_of, register, version_with
from trainchain.core.sources.azureml_session import Session, role_to_read, sdk
from trainchain.core.sources.found import (
    DATA_FILES,
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

_LARGESTINDEX = 64 << 20
_LONGEST_LICENSE = 100


@dataclass(frozen=True)
class _Place:
    """Where the files of an asset lie: every blob below `prefix`, or the one blob of that name."""

    container: Any
    prefix: str
    single: bool
    tags: Mapping[str, Any]

    def blob(self, path: str) -> Any:
        name = self.prefix if self.single else "/".join(part for part in (self.prefix, path) if part)
        return self.container.get_blob_client(name)


class AzureML:
    """The kind of source `azureml:`. A plain `AzureML()` asks the real Azure; tests hand in a session of their own."""

    def __init__(self, session: Session | None = None) -> None:
        self._session = session or Session()
        self._places: dict[Asset, _Place] = {}

    def find(self, address: Address, kind: Kind) -> Found:
        """Resolve labels to a version, list the files, keep what a model or data set is made of.

        Azure tells sizes and no sha256. Raises source.*, and `model.unreadable` for what is no model with safetensors.
        """
        asset = self._pin(_asset(address, kind))
        where = str(asset)
        place = self._place(asset)
        with asking(where, role_to_read(asset.scope)):
            files = self._list(place, where)
        if not files:
            raise TrainChainError(
                "source.not_found",
                f"{where} exists, but no files lie there.",
                hint="Look at it in Azure ML studio: its storage may have been cleared.",
            )
        check_names((file.path for file in files), where)
        files = self._model(asset, files, where) if kind == "model" else _rows(files, where)
        check_kept(files, where)
        self._complete(where, files)
        page = None
        if isinstance(asset.scope, Registry) and asset.what == "models":
            page = f"https://ml.azure.com/registries/{asset.scope.name}/models/{asset.name}/version/{asset.version}"
        return Found(where, _license(place.tags), sorted(files, key=lambda file: file.path), page)

    def fetch(self, source: str, path: str, partial: Path, *, size: int) -> None:
        """Bring one file to `partial`, from where an earlier call broke off; what came stays there after a failure.

        Raises `source.changed` where the blob has another size, and the other source.*, disk.full.
        """
        asset, what = _pinned(source), f"{shown(source)}: {path}"
        self._twice(asset, what, lambda place: _fetch(place.blob(path), what, partial, size))

    def head(self, source: str, path: str, count: int) -> bytes | None:
        asset, what = _pinned(source), f"{shown(source)}: {path}"

        def read_head(place: _Place) -> bytes:
            blob = place.blob(path)
            whole = int(blob.get_blob_properties().size)
            return bytes(blob.download_blob(offset=0, length=min(count, whole)).readall()) if whole and count else b""

        head: bytes = self._twice(asset, what, read_head)
        return head

    def push(self, folder: Path, target: Address, *, message: str, private: bool) -> Pushed:
        """Register the folder as the next version of a model, or tell which version holds the same files already.

        Azure knows no public models, so `private` changes nothing. Raises source.*, `push.conflict` where somebody
        else took the version meanwhile.
        """
        asset = _asset(target, "target")
        scope = self._fixed(asset)
        asset = Asset(scope, "models", asset.name)
        what = str(asset)
        role = WRITE_REGISTRY if isinstance(scope, Registry) else WRITE_WORKSPACE
        client = self._session.client(scope)
        with writing(folder, "read"):
            content = content_of(folder)
        with asking(what, role):
            version = version_with(client, asset.name, content)
            created = version is None
            if version is None:
                version = register(client, asset.name, folder, content, message)
        return Pushed(str(asset.at(scope, version)), version, created)

    def _fixed(self, asset: Asset) -> Registry | Workspace:
        if isinstance(asset.scope, Registry | Workspace):
            return asset.scope
        return self._session.context() if asset.scope is None else self._session.workspace_of(asset.scope)

    def _pin(self, asset: Asset) -> Asset:
        """Name the workspace, and of a label the version that it stands for now."""
        scope = self._fixed(asset)
        version = asset.version
        if asset.label is not None:
            client = self._session.client(scope)
            with asking(str(asset), role_to_read(asset.scope)):
                version = str(getattr(client, asset.what).get(asset.name, label=asset.label).version)
        return asset.at(scope, version)

    def _twice(self, asset: Asset, what: str, act: Callable[[_Place], Any]) -> Any:
        """Do something with the place of an asset; once more with a fresh signature where the kept one ran out."""
        with asking(what, role_to_read(asset.scope)):
            kept = asset in self._places
            try:
                return act(self._place(asset))
            except Exception as error:
                if not kept or status_of(error) not in (401, 403):
                    raise
                del self._places[asset]
                return act(self._place(asset))

    def _place(self, asset: Asset) -> _Place:
        if asset not in self._places:
            with asking(str(asset), role_to_read(asset.scope)):
                self._places[asset] = self._find_place(asset)
        return self._places[asset]

    def _find_place(self, asset: Asset) -> _Place:
        scope = asset.scope
        assert isinstance(scope, Registry | Workspace)
        tags: dict[str, Any] = {}
        if asset.what == "datastores":
            container, prefix = self._store(scope, asset.name), asset.path
        else:
            client = self._session.client(scope)
            entity = getattr(client, asset.what).get(asset.name, asset.version)
            tags = {**(entity.properties or {}), **(entity.tags or {})}
            uri = str(entity.path or "")
            if isinstance(scope, Registry):
                container = self._session.container(self._session.signed(asset, uri), None, None)
                prefix = urlsplit(uri).path.lstrip("/").partition("/")[2]
            else:
                inner = _inside(asset, uri)
                container = self._store(inner.scope or scope, inner.name)
                prefix = inner.path
            prefix = "/".join(part for part in (prefix.strip("/"), asset.path) if part)
        return _Place(container, prefix, _is_blob(container, prefix), tags)

    def _store(self, scope: Any, name: str) -> Any:
        """The container behind a datastore: with its key where this sign-in may see it, else as the sign-in itself."""
        stores = self._session.client(scope).datastores
        try:
            store = stores.get(name, include_secrets=True)
        except Exception as error:
            if status_of(error) != 403:
                raise
            store = stores.get(name)
        container = getattr(store, "container_name", None) or getattr(store, "filesystem", None)
        if not container:
            raise TrainChainError(
                "source.unsupported",
                f"The datastore {name} is of a kind that is not read: {store.type}.",
                hint="Use one of Azure Blob Storage or Data Lake Storage Gen2.",
            )
        secret = getattr(store.credentials, "account_key", None) or getattr(store.credentials, "sas_token", None)
        suffix = store.endpoint or self._session.cloud.storage
        address = f"https://{store.account_name}.blob.{suffix}"
        return self._session.container(address, container, secret or self._session.credential())

    def _list(self, place: _Place, where: str) -> list[FoundFile]:
        prefix = place.prefix
        files = []
        for seen, blob in enumerate(place.container.list_blobs(name_starts_with=prefix or None, include=["metadata"])):
            if seen >= MOST_LISTED:
                raise too_many(where, MOST_LISTED)
            if _is_folder(blob):
                continue
            if blob.name == prefix:
                files.append(FoundFile(prefix.rpartition("/")[2], int(blob.size), None, str(blob.etag)))
            elif not prefix or blob.name.startswith(f"{prefix}/"):
                name = blob.name[len(prefix) + 1 if prefix else 0 :]
                files.append(FoundFile(name, int(blob.size), None, str(blob.etag)))
        return files

    def _model(self, asset: Asset, files: list[FoundFile], where: str) -> list[FoundFile]:
        """The files of the model in the very folder that the address names; for many of the catalogue not the root."""
        here = [file for file in files if "/" not in file.path]
        if not any(file.path.endswith(".safetensors") for file in here):
            below = sorted({file.path.rpartition("/")[0] for file in files if file.path.endswith(".safetensors")})
            if below:
                base = str(asset) + ("/" if asset.path else "/paths/")
                raise TrainChainError(
                    "model.unreadable",
                    f"{where} has its weights in a folder of it: {', '.join(below[:5])}.",
                    hint=f"Name the folder: {base}{below[0]}",
                )
        return model_files(here, where)

    def _complete(self, where: str, files: list[FoundFile]) -> None:
        """Raise `source.incomplete` where the weights' index counts on files that are not there."""
        index = next((file for file in files if file.path == INDEX), None)
        if index is None:
            return
        if index.size > _LARGESTINDEX:
            raise TrainChainError("source.unsafe", f"{where}: {INDEX} has {index.size:,} bytes.")
        try:
            content = json.loads(self.head(where, INDEX, index.size) or b"")
        except (ValueError, RecursionError):
            content = None
        missing = missing_shards(content, (file.path for file in files))
        if missing:
            raise TrainChainError(
                "source.incomplete",
                f"{where} lacks {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}, which {INDEX} names.",
                hint="Register the model again with all of its files.",
            )


@functools.cache
def shared() -> AzureML:
    """The one that asks the real Azure: a sign-in is slow, and serves every file of a job."""
    return AzureML()


def _asset(address: Address, asked: Asked) -> Asset:
    assert isinstance(address, AzureAddress)
    return read(address.text, asked)


def _pinned(source: str) -> Asset:
    asset = read(source, "model")
    if not asset.pinned:
        raise TrainChainError("source.address", f"{shown(source)!r} names no fixed version.", hint="Resolve it first.")
    return asset


def _inside(asset: Asset, uri: str) -> Asset:
    """The datastore's path that a workspace's asset points to."""
    with contextlib.suppress(TrainChainError):
        inner = read(uri, "data")
        if inner.what == "datastores":
            return inner
    raise TrainChainError(
        "source.unsupported",
        f"{asset} does not lie in a datastore of its workspace, but at {shown(uri)!r}.",
        hint="Register its files from a datastore or from a folder, and name that version.",
    )


def _is_folder(blob: Any) -> bool:
    """Whether a blob only stands for a folder, as accounts with a hierarchy keep them."""
    return str((blob.metadata or {}).get("hdi_isfolder")).lower() == "true"


def _is_blob(container: Any, name: str) -> bool:
    """Whether the name is that of one file, and not of a folder."""
    if not name:
        return False
    try:
        return not _is_folder(container.get_blob_client(name).get_blob_properties())
    except Exception as error:
        if status_of(error) == 404:
            return False
        raise


def _rows(files: list[FoundFile], where: str) -> list[FoundFile]:
    kept = [
        file for file in files if file.path.endswith(DATA_FILES) and not file.path.rpartition("/")[2].startswith(".")
    ]
    if not kept:
        raise TrainChainError(
            "source.unsupported",
            f"{where} has no files of rows ({', '.join(DATA_FILES)}).",
            hint="Convert the rows to .jsonl or .parquet.",
        )
    return kept


def _license(tags: Mapping[str, Any]) -> str | None:
    text = str(tags.get("license") or "").strip()
    return text if text and text.isprintable() and len(text) <= _LONGEST_LICENSE else None


def _fetch(blob: Any, what: str, partial: Path, size: int) -> None:
    properties = blob.get_blob_properties()
    if properties.size != size:
        partial.unlink(missing_ok=True)
        raise TrainChainError(
            "source.changed",
            f"{what} has {properties.size:,} bytes, and {size:,} in the manifest.",
            hint="Somebody changed it in place. The job's owner has to publish again.",
        )
    with writing(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        have = partial.stat().st_size if partial.exists() else 0
        have = have if have <= size else 0
        check_room(partial, size - have)
        file = partial.open("r+b" if have else "wb")
    with file:
        file.seek(have)
        if have < size:
            # Only this state of the blob: one that is changed meanwhile is refused by Azure.
            unchanged = sdk("azure.core").MatchConditions.IfNotModified
            stream = blob.download_blob(
                offset=have, length=size - have, etag=properties.etag, match_condition=unchanged, max_concurrency=1
            )
            for chunk in stream.chunks():
                with writing(partial):
                    file.write(chunk)
        with writing(partial):
            file.flush()
    if (have := partial.stat().st_size) != size:
        raise TrainChainError(
            "source.unavailable", f"{what} broke off after {have:,} of {size:,} bytes.", hint="Try again: it goes on."
        )
