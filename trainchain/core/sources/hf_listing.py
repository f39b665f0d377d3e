"""What the Hub's listings and cards say, read without asking it anything more."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from trainchain.core.digests import is_digest
from trainchain.core.errors import TrainChainError
from trainchain.core.sources.address import HubAddress
from trainchain.core.sources.found import DATA_FILES, FoundFile

_ABOUT_ROWS = frozenset({"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"})
"""What the datasets library writes beside rows."""


def file_of(entry: dict[str, Any]) -> FoundFile:
    """An entry of a listing. Raises ValueError for what is none."""
    lfs = entry.get("lfs")
    known = lfs if isinstance(lfs, dict) else {}
    size = known.get("size", entry.get("size"))
    digest = known.get("oid")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**63:
        raise ValueError("a file without a size")
    return FoundFile(entry["path"], size, digest if isinstance(digest, str) and is_digest(digest) else None)


def folder_of(address: HubAddress) -> str:
    """The folder below which everything lies that a data set's path can mean."""
    parts = (address.path or "").split("/")
    for index, part in enumerate(parts):
        if any(mark in part for mark in "*?["):
            return "/".join(parts[:index])
    return "/".join(parts[:-1]) if parts[-1].endswith(DATA_FILES) else "/".join(parts)


def data_files(files: list[FoundFile], address: HubAddress) -> list[FoundFile]:
    """The files of rows that the address means. Raises `data.empty`, `source.not_found`."""
    rows = [file for file in files if _may_be_rows(file.path.rpartition("/")[2])]
    if not rows:
        copy = HubAddress("data", address.repo, "refs/convert/parquet")
        raise TrainChainError(
            "data.empty",
            f"{address.text} has no files of rows: no {', '.join(DATA_FILES)}.",
            hint=f"The Hub keeps a copy of many as parquet: {copy.text}",
        )
    if address.path is None:
        return rows
    wanted = address.path.split("/")
    kept = [file for file in rows if _matches(file.path.split("/"), wanted) or file.path.startswith(f"{address.path}/")]
    if not kept:
        raise TrainChainError(
            "source.not_found",
            f"The data set {address.repo} has no {address.path!r}; it has {', '.join(file.path for file in rows[:3])}"
            f"{' ...' if len(rows) > 3 else ''}.",
            hint="Name one of its files, a folder, or a pattern with *.",
        )
    return kept


def _may_be_rows(name: str) -> bool:
    return name.endswith(DATA_FILES) and not name.startswith(".") and name not in _ABOUT_ROWS


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a path is meant by a pattern, `*` within a name and `**` over folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[index:], pattern[1:]) for index in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def license_of(info: Any) -> str | None:
    """As the repository's card names it, else as its tags do."""
    card = info.card_data.to_dict() if info.card_data is not None and hasattr(info.card_data, "to_dict") else {}
    tags = [tag for tag in info.tags or [] if isinstance(tag, str) and tag.startswith("license:")]
    return license_in(card) or license_in({"license": tags[0].partition(":")[2] if tags else None})


def license_in(card: Mapping[str, Any]) -> str | None:
    """As the front matter of a card names it; one that is not among the Hub's own with the name that it gives:
    `other (name)`."""
    found = card.get("license")
    if found == "other" and isinstance(card.get("license_name"), str):
        found = f"other ({card['license_name']})"
    if isinstance(found, list):
        found = ", ".join(one for one in found if isinstance(one, str))
    text = "".join(mark for mark in found if mark.isprintable())[:100] if isinstance(found, str) else ""
    return text or None
