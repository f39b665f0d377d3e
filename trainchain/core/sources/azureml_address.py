"""How things in Azure ML are named: every form that people paste, read into one value and written in one form.

Standard library only. The forms stand in docs/azure.md. `paths/FOLDER` behind a model or data set is an addition of
ours, written as Azure writes it behind a datastore: many models of the catalogue keep their weights in a folder.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from trainchain.core.errors import TrainChainError
from trainchain.core.sources.address import Asked

What = Literal["models", "data", "datastores"]

FORMS = (
    "Write azureml:name:version or azureml:name@latest, azureml://registries/R/models/M/versions/V,"
    " azureml://subscriptions/S/resourcegroups/G/workspaces/W/models/M/versions/V, the asset's ARM id, or"
    " azureml://datastores/D/paths/P."
)
TARGETS = "Write azureml:name, or a long form that ends with models/name: Azure gives the version."
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_PLACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,254}")
_STORE = re.compile(r"[A-Za-z0-9_-]{1,254}")
_GROUP = re.compile(r"[\w.()-]{0,89}[\w()-]")
_GUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_REGION = re.compile(r"[A-Za-z0-9]{1,40}")
_NOT_IN_A_PATH = re.compile(r"[\\?*]")
_PROVIDER = "microsoft.machinelearningservices"


@dataclass(frozen=True)
class Registry:
    name: str

    def __str__(self) -> str:
        return f"registries/{self.name}"


@dataclass(frozen=True)
class Workspace:
    """A workspace by its full name; `subscription` is a GUID in lower case."""

    subscription: str
    group: str
    name: str

    def __str__(self) -> str:
        return f"subscriptions/{self.subscription}/resourcegroups/{self.group}/workspaces/{self.name}"


@dataclass(frozen=True)
class NumberedWorkspace:
    """A workspace as asset ids name it: by region and GUID, which says nothing of its subscription."""

    region: str
    guid: str

    def __str__(self) -> str:
        return f"locations/{self.region}/workspaces/{self.guid}"


Scope = Registry | Workspace | NumberedWorkspace | None


@dataclass(frozen=True)
class Asset:
    """What an address names. `scope` None: in the workspace that the environment or config.json names.

    `version` and `label` are None for a datastore, and both of them for a target to push to. `path` is a folder or
    file in it, for a datastore never empty.
    """

    scope: Scope
    what: What
    name: str
    version: str | None = None
    label: str | None = None
    path: str = ""

    def __str__(self) -> str:
        """The canonical form, which reads as this value again."""
        text = "azureml://" + (f"{self.scope}/" if self.scope else "") + f"{self.what}/{self.name}"
        if self.version is not None:
            text += f"/versions/{self.version}"
        elif self.label is not None:
            text += f"/labels/{self.label}"
        return text + (f"/paths/{self.path}" if self.path else "")

    @property
    def pinned(self) -> bool:
        """Whether it names one place and, of an asset, one version."""
        fixed = isinstance(self.scope, Registry | Workspace)
        return fixed and (self.what == "datastores" or self.version is not None)

    def at(self, scope: Registry | Workspace, version: str | None) -> "Asset":
        return replace(self, scope=scope, version=version, label=None)


def read(text: str, asked: Asked) -> Asset:
    """Read an address: keywords in any case, with `/` at the end or without. `asked` decides what a short form means.

    Raises `source.address` for what is none of the forms, and for forms that name no place of files.
    """
    try:
        return _read(text, asked)
    except TrainChainError as error:
        if asked != "target":
            raise
        raise TrainChainError(error.code, error.message, hint=TARGETS) from None


def _read(text: str, asked: Asked) -> Asset:
    if not text.isprintable():
        raise _wrong(text, "has characters that cannot be seen")
    lower = text.lower()
    if lower.startswith("azureml://"):
        return _Reader(text, text[len("azureml://") :], asked).asset()
    if lower.startswith(("azureml:/subscriptions/", "/subscriptions/")):
        return _Reader(text, text.partition("/")[2], asked).asset()
    if lower.startswith("azureml:"):
        return _short(text, text[len("azureml:") :], asked)
    raise _wrong(text, "does not begin with azureml: or /subscriptions/")


def _short(text: str, rest: str, asked: Asked) -> Asset:
    what: What = "data" if asked == "data" else "models"
    if asked == "target":
        return Asset(None, what, _match(text, _NAME, rest, "name of a model without a version, which Azure gives"))
    if not rest:
        raise _wrong(text, "names nothing")
    for mark in "@:":
        name, found, tail = rest.partition(mark)
        if found:
            _match(text, _NAME, name, "name")
            if mark == "@":
                return Asset(None, what, name, label=_match(text, _NAME, tail, "label"))
            if tail.lower() == "latest":
                raise _wrong(text, "names a version `latest`", f"Write azureml:{name}@latest")
            return Asset(None, what, name, version=_match(text, _NAME, tail, "version"))
    _match(text, _NAME, rest, "name")
    raise _wrong(text, "names no version", f"Write {shown(text)}:1, say, or {shown(text)}@latest")


class _Reader:
    """Goes through the parts of a long form, from left to right."""

    def __init__(self, text: str, rest: str, asked: Asked) -> None:
        self.text = text
        self.asked = asked
        self.parts = rest.removesuffix("/").split("/")

    def asset(self) -> Asset:
        scope = self._scope()
        what = self._keyword("models", "data", "datastores")
        if what is None:
            raise self._no_place()
        if what == "datastores":
            if isinstance(scope, Registry):
                raise _wrong(self.text, "names a datastore in a registry, and registries have none")
            name = self._value(_STORE, "datastore")
            path = self._path()
            if not path or self.asked == "target":
                raise _wrong(self.text, "has to name a path of the datastore, and no datastore to push to")
            return Asset(scope, "datastores", name, path=path)
        kind: What = "models" if what == "models" else "data"
        name = self._value(_NAME, "name")
        if self.asked == "target":
            if self.parts or kind == "data":
                raise _wrong(self.text, "has to end with models/NAME: Azure gives the version")
            return Asset(scope, kind, name)
        by = self._keyword("versions", "labels")
        if by is None:
            raise _wrong(self.text, "names no version", "Add /versions/1, say, or /labels/latest")
        value = self._value(_NAME, "version" if by == "versions" else "label")
        path = self._path()
        return Asset(scope, kind, name, path=path, **{"version" if by == "versions" else "label": value})

    def _scope(self) -> Scope:
        if self._keyword("registries"):
            return Registry(self._value(_PLACE, "registry"))
        if self._keyword("locations"):
            region = self._value(_REGION, "region")
            self._need("workspaces")
            return NumberedWorkspace(region.lower(), self._value(_GUID, "GUID of a workspace").lower())
        if not self._keyword("subscriptions"):
            return None
        subscription = self._value(_GUID, "GUID of a subscription").lower()
        self._need("resourcegroups")
        group = self._value(_GROUP, "resource group")
        if self._keyword("providers"):
            provider = self.parts.pop(0) if self.parts else ""
            if provider.lower() == "microsoft.cognitiveservices":
                raise _wrong(
                    self.text,
                    "lies in a new Foundry project, which TrainChain does not read yet",
                    "Models of the catalogue lie in a registry as well: azureml://registries/azureml/models/...",
                )
            if provider.lower() != _PROVIDER:
                raise _wrong(self.text, f"names {provider!r}, which is not Microsoft.MachineLearningServices")
            if self._keyword("registries"):
                return Registry(self._value(_PLACE, "registry"))
        self._need("workspaces")
        return Workspace(subscription, group, self._value(_PLACE, "workspace"))

    def _keyword(self, *known: str) -> str | None:
        """Take the next part if it is one of these words, in whatever case."""
        if self.parts and self.parts[0].lower() in known:
            return self.parts.pop(0).lower()
        return None

    def _need(self, word: str) -> None:
        if not self._keyword(word):
            raise _wrong(self.text, f"lacks {word}/ after the part before it")

    def _value(self, pattern: re.Pattern[str], of: str) -> str:
        return _match(self.text, pattern, self.parts.pop(0) if self.parts else "", of)

    def _path(self) -> str:
        if not self.parts:
            return ""
        if not self._keyword("paths"):
            raise _wrong(self.text, f"goes on with {shown(self.parts[0])!r}, where paths/ or its end is expected")
        path = "/".join(self.parts)
        if any(part in ("", ".", "..") for part in self.parts) or _NOT_IN_A_PATH.search(path):
            raise _wrong(self.text, "has no plain path after paths/: no pattern, query, backslash, or empty part")
        return path

    def _no_place(self) -> TrainChainError:
        word = shown(self.parts[0]) if self.parts else ""
        if word.lower() == "jobs":
            return _wrong(
                self.text, "is the output of a job", "Register it as a model or data set, and name that version."
            )
        return _wrong(self.text, f"has {word!r} where models/, data/ or datastores/ is expected")


def shown(text: str) -> str:
    """As much of an address as may be shown: what follows a `?` may be a signature."""
    plain, query, _ = text.partition("?")
    return plain[:300] + ("?..." if query else "")


def _match(text: str, pattern: re.Pattern[str], value: str, of: str) -> str:
    if not pattern.fullmatch(value):
        raise _wrong(text, f"has {shown(value)!r}, which is no {of}")
    return value


def _wrong(text: str, why: str, hint: str = FORMS) -> TrainChainError:
    return TrainChainError("source.address", f"{shown(text)!r} {why}.", hint=hint)
