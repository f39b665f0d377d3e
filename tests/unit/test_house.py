"""The rules of the house that no linter knows."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from trainchain import __version__

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "trainchain"
SOURCES = [path for path in PACKAGE.rglob("*.py") if "node_modules" not in path.parts]
LONGEST = 400
BANNED = re.compile(
    r"(?i)\b(miners?|mining|validators?|submissions?|stak(?:e|ing)|slash(?:ed|ing)?|blockchain|crypto)\b"
)
OTHERS_WORDS = re.compile('"miner":|"submissions"|"crypto"')
"""A block's field as every chain's RPC names it; a folder of the owner's home; a keystore's field."""
UTILS = re.compile(r"(?i)(^|_)(utils?|helpers?|misc|common)$")


def tracked() -> list[Path]:
    """What a clone holds."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout")
    found = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=60)
    names = [name for name in found.stdout.decode().split("\0") if name]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_a_package_below_the_top_says_nothing_by_itself() -> None:
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent != PACKAGE:
            assert path.read_bytes() == b"", path


def test_no_file_is_named_after_nothing() -> None:
    assert [path for path in SOURCES if UTILS.search(path.stem)] == []


def test_every_file_says_what_it_is_for() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert not text.strip() or text.startswith('"""'), path


def test_the_words_are_the_glossary_s() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if BANNED.search(OTHERS_WORDS.sub("", line))
    ]

    assert found == []


def test_the_changelog_begins_with_this_version() -> None:
    path = ROOT / "CHANGELOG.md"
    headings = re.findall(r"^## \[?v?(\d+\.\d+\.\d+[^\]\s]*)", path.read_text(encoding="utf-8"), re.MULTILINE)

    assert headings[0] == __version__


def test_no_tracked_file_names_a_place_on_somebody_s_machine() -> None:
    """Nor a host to install from: what a clone needs, anybody can get."""
    # Written in parts, so that this file does not find itself.
    place = re.compile(
        "|".join([r"/wo" r"rk/(main|shared)", r"/ho" r"me/\w+/", r"/Us" r"ers/\w+/", r"[Cc]:\\Us" r"ers",
                  r"index-u" r"rl\s*=", r"jfr" r"og", r"artifac" r"tory"])
    )  # fmt: skip
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}"
            for number, line in enumerate(text.splitlines(), 1)
            if place.search(line)
        ]

    assert found == []


def test_a_clone_is_small() -> None:
    sizes = {path.relative_to(ROOT): path.stat().st_size for path in tracked()}

    assert {str(path): size for path, size in sizes.items() if size > 6_000_000} == {}
    assert sum(sizes.values()) < 30_000_000
