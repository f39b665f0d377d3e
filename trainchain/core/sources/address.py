"""How the places of models and data are written, and nothing about what lies there. Standard library only."""

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote, unquote

from trainchain.core.errors import TrainChainError

Asked = Literal["model", "data", "target"]
"""What an address is read for: a base model, rows, or the place an adapter is pushed to."""

FORMS: dict[Asked, str] = {
    "model": "Write a folder, hf://org/name, hf://org/name@revision, or azureml:name:version.",
    "data": "Write a file, hf://datasets/org/name, hf://datasets/org/name/folder-or-*.jsonl, or azureml:name:version.",
    "target": "Write hf://you/name or azureml:name.",
}
_SPECIAL = re.compile(r"refs/pr/\d+|refs/convert/\w+", re.ASCII)
_REVISION = re.compile(rf"(?:{_SPECIAL.pattern}|[\w%][\w%.+-]*)(?=/|$)", re.ASCII)
_REVISION_TEXT = re.compile(r"[\w][\w./+-]{0,199}", re.ASCII)
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_PASSWORD = re.compile(r"(https?://)[^/@]+@|(?<=://)[^/@]*:[^/@]*@", re.IGNORECASE)
_LONGEST_NAME = 96
_PAGES = ("huggingface.co", "www.huggingface.co", "hf.co")
_WEIGHTS = (".safetensors", ".bin", ".gguf", "config.json")
_VIEWS = ("tree", "blob", "resolve", "raw", "commit")
_AZURE_PAGES = ("ml.azure.com", "ai.azure.com")


@dataclass(frozen=True)
class Local:
    """A path of this machine, as it was written."""

    text: str


@dataclass(frozen=True)
class HubAddress:
    """A repository of Hugging Face. `path` is a folder or file in it, for data also a pattern with `*`."""

    kind: Literal["model", "data"]
    repo: str
    revision: str | None = None
    path: str | None = None

    @property
    def text(self) -> str:
        """As it is written, the repository's kind where it is not a model."""
        where = ("datasets/" if self.kind == "data" else "") + self.repo
        plain = self.revision and _SPECIAL.fullmatch(self.revision)
        at = f"@{self.revision if plain else quote(self.revision, safe='')}" if self.revision else ""
        return f"hf://{where}{at}" + (f"/{self.path}" if self.path else "")

    def at(self, commit: str) -> str:
        """The pinned source: the whole repository at one commit."""
        return HubAddress(self.kind, self.repo, commit).text


@dataclass(frozen=True)
class AzureAddress:
    """Something in Azure ML; `azureml.py` reads the text."""

    text: str


Address = Local | HubAddress | AzureAddress


def is_address(text: str) -> bool:
    """Whether a text names a source elsewhere, not a path of this machine."""
    return "://" in text or text.lower().startswith(("azureml:", "/subscriptions/"))


def parse(text: str, asked: Asked) -> Address:
    """Read an address. A plain `you/name` is a path, but for a target a repository of Hugging Face.

    Raises `source.address` for what is written as none of the forms, `source.unsupported` for places of other kinds.
    """
    if not text.strip() or not text.isprintable() or text != text.strip():
        raise _wrong(text, asked, "is empty, or has spaces around it or characters that cannot be seen")
    scheme, mark, rest = text.partition("://")
    scheme = scheme.lower()
    if text.lower().startswith(("azureml:", "/subscriptions/")):
        if asked == "target":  # an adapter is pushed when it was paid for: too late to be told of a typo
            from trainchain.core.sources.azureml_address import read

            read(text, asked)
        return AzureAddress(text)
    if not mark:
        return _hub(text, text, asked) if asked == "target" else Local(text)
    if scheme == "hf":
        return _hub(text, rest, asked)
    if scheme in ("http", "https"):
        raise _page(text, rest, asked)
    raise TrainChainError(
        "source.unsupported", f"{shown(text)!r}: {scheme}:// is no kind of source.", hint=FORMS[asked]
    )


def _hub(text: str, rest: str, asked: Asked) -> HubAddress:
    kind: Literal["model", "data"] = "model"
    parts = rest.split("/")
    if parts[0].lower() in _PAGES:
        raise _page(text, rest, asked)
    if parts[0] in ("models", "datasets") and len(parts) > 1:
        kind = "data" if parts[0] == "datasets" else "model"
        parts = parts[1:]
    elif parts[0] in ("spaces", "buckets", "kernels") and len(parts) > 1:
        raise _wrong(text, asked, f"names one of the Hub's {parts[0]}, which hold no models or data sets")
    if ":" in parts[0]:
        raise _wrong(text, asked, "has a password or a port in it, and names no host")
    if (kind == "data") != (asked == "data"):
        raise _other_kind(text, "/".join(parts).split("?")[0], asked)
    # The revision stands behind the repository's name, which is one part (gpt2@main) or two (org/name@main).
    owner, at, tail = parts[0].partition("@")
    if at or len(parts) == 1:
        names, tail = [owner], "/".join([tail, *parts[1:]])
    else:
        name, at, tail = parts[1].partition("@")
        names, tail = [owner, name], "/".join([tail, *parts[2:]])
    if not all(_PART.fullmatch(name) and "--" not in name and ".." not in name for name in names):
        name, query, _ = "/".join(names).partition("?")
        raise _wrong(text, asked, f"does not name a repository: {name + query!r} is no name there")
    repo = "/".join(names)
    if len(repo) > _LONGEST_NAME or repo.endswith(".git"):
        raise _wrong(text, asked, f"does not name a repository: {repo!r} is too long, or ends in .git")
    revision, path = _revision_and_path(text, asked, tail, bool(at))
    if asked == "target" and (len(names) != 2 or revision or path):
        raise _wrong(text, asked, "has to be the owner's name and the repository's, and nothing more")
    return HubAddress(kind, repo, revision, path)


def _revision_and_path(text: str, asked: Asked, tail: str, named: bool) -> tuple[str | None, str | None]:
    """What follows the name: `revision/path` where a revision is named, else `/path`."""
    revision = None
    if named:
        found = _REVISION.match(tail)
        revision = unquote(found[0]) if found else ""
        if not _REVISION_TEXT.fullmatch(revision) or ".." in revision or "//" in revision or revision.endswith("/"):
            raise _wrong(text, asked, "has no branch, tag or commit after its @")
        tail = tail[len(found[0]) :] if found else ""
    path = tail.removeprefix("/").removesuffix("/")
    if not path:
        return revision, None
    if any(part in ("", ".", "..") or part != part.strip() for part in path.split("/")) or "\\" in path:
        raise _wrong(text, asked, f"has no plain path in it: {path!r}")
    if asked == "model" and any(mark in path for mark in "*?["):
        raise _wrong(text, asked, "has a pattern; a model is a whole folder")
    if asked == "model" and path.lower().endswith(_WEIGHTS):
        raise _wrong(text, asked, f"names the file {path!r}; a model is a whole folder")
    return revision, path


def _other_kind(text: str, rest: str, asked: Asked) -> TrainChainError:
    if asked == "data":
        return TrainChainError(
            "source.address",
            f"{shown(text)} is a model, and rows are asked for.",
            hint=f"A data set: hf://datasets/{rest}",
        )
    wanted = "a model is asked for" if asked == "model" else "an adapter is pushed to a model"
    return TrainChainError("source.address", f"{shown(text)} is a data set, and {wanted}.", hint=FORMS[asked])


def _page(text: str, rest: str, asked: Asked) -> TrainChainError:
    """A web page that somebody pasted: how the same place is written here, or why it is not what is asked for."""
    host, _, path = rest.split("?")[0].split("#")[0].partition("/")
    host = host.rpartition("@")[2]
    page = shown(text)
    if host.lower() in _AZURE_PAGES:
        return TrainChainError(
            "source.address",
            f"{page} is a page for people, not an address.",
            hint="Copy the asset's `Asset ID` from that page: it begins with azureml://.",
        )
    if host.lower() not in _PAGES or not path.strip("/"):
        return TrainChainError("source.unsupported", f"{page!r} is not a kind of source.", hint=FORMS[asked])
    parts = [part for part in path.split("/") if part]
    names = 3 if parts[0] in ("datasets", "models", "spaces") else 2
    if parts[names - 1 : names] and parts[names - 1] in _VIEWS:  # gpt2/tree/main
        names -= 1
    written = "hf://" + "/".join(parts[:names])
    view, *inside = parts[names:] or [""]
    if view in _VIEWS and asked != "target":
        of_file = asked == "model" and view != "tree"
        written += "".join(f"@{part}" for part in inside[:1])
        written += "".join(f"/{unquote(part)}" for part in (inside[1:-1] if of_file else inside[1:]))
    parse(written, asked)
    return TrainChainError("source.address", f"{page} is a page for people, not an address.", hint=f"Write {written}")


def _wrong(text: str, asked: Asked, why: str) -> TrainChainError:
    return TrainChainError("source.address", f"{shown(text)!r} {why}.", hint=FORMS[asked])


def shown(text: str) -> str:
    """As much of what was written as may be repeated: no query, which may be a signature, and nobody's password."""
    return _PASSWORD.sub(r"\g<1>***@", text.split("?")[0][:300])
