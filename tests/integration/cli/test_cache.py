"""trainchain cache ls | rm | verify, as people and pipes use them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_cache import SOURCE, Source
from trainchain.core.worker.cache import Cache

JOB = "0x" + "ab" * 32
TOKENS = "f0" * 32
FILES = {"a.json": b"a" * 1000, "b.json": b"b" * 2000, "c.json": b"c" * 3000}


class Desk:
    """A home with a cache that three files lie in, one of them a private job's."""

    def __init__(self, root: Path) -> None:
        self.home = root / "home"
        source = Source(FILES)
        cache = Cache(self.home / "cache", fetch=source, free=lambda _: 10**15)
        private = cache.private(JOB)
        places = {"a.json": cache, "b.json": cache, "c.json": private}
        self.paths = {name: place.file(SOURCE, source.ref(name)) for name, place in places.items()}
        self.digests = {name: source.ref(name).sha256 for name in FILES}
        (cache.folder / "tokens" / TOKENS).mkdir()
        (cache.folder / "tokens" / TOKENS / "ids").write_bytes(b"12345678")

    def run(self, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "trainchain", "cache", *words],
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TRAINCHAIN_HOME": str(self.home), **environment},
        )

    def json(self, *words: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run(*words, "--json").stdout)
        return found

    def left(self) -> set[str]:
        return {name for name, path in self.paths.items() if path.exists()}


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_ls_shows_what_lies_there_and_what_it_belongs_to(desk: Desk) -> None:
    done = desk.run("ls")

    rows = {line[:12]: line for line in done.stdout.splitlines()}
    assert set(rows) == {*(digest[:12] for digest in desk.digests.values()), TOKENS[:12]}
    assert "1.0 kB" in rows[desk.digests["a.json"][:12]]
    assert f"a.json of {SOURCE}" in rows[desk.digests["a.json"][:12]]
    assert "(private 0xabababab" in rows[desk.digests["c.json"][:12]]
    assert done.stderr == f"6.0 kB of 100.0 GB in {desk.home / 'cache'}\n"
    document = desk.json("ls")
    assert (document["ok"], document["bytes"], document["cap"]) == (True, 6008, 100 * 10**9)
    assert {entry["digest"] for entry in document["entries"]} == {*desk.digests.values(), TOKENS}
    assert {entry["job"] for entry in document["entries"]} == {None, JOB}


def test_the_first_word_of_each_line_of_ls_is_one_that_rm_takes(desk: Desk) -> None:
    names = [line.split()[0] for line in desk.run("ls").stdout.splitlines()]

    done = desk.run("rm", *names)

    assert done.stdout == "6008 bytes freed\n"
    assert desk.left() == set()


def test_verify_prints_what_is_damaged_for_rm_to_take(desk: Desk) -> None:
    assert (desk.run("verify").stdout, desk.run("verify").returncode) == ("", 0)
    for name in ("a.json", "c.json"):
        desk.paths[name].write_bytes(b"x")

    done = desk.run("verify")

    assert (done.returncode, set(done.stdout.split())) == (4, {desk.digests["a.json"], desk.digests["c.json"]})
    assert "error[cache.damaged] 2 of 3" in done.stderr
    assert "xargs trainchain cache rm" in done.stderr
    assert desk.run("rm", *done.stdout.split()).returncode == 0
    assert desk.left() == {"b.json"}
    assert desk.run("verify").returncode == 0


def test_verify_in_json_is_one_document(desk: Desk) -> None:
    assert desk.json("verify") == {"ok": True, "checked": 3, "damaged": []}
    desk.paths["a.json"].write_bytes(b"x")

    done = desk.run("verify", "--json")

    (line,) = done.stdout.splitlines()
    document = json.loads(line)
    assert (document["ok"], document["error"]["code"], done.returncode) == (False, "cache.damaged", 4)
    assert [entry["digest"] for entry in document["damaged"]] == [desk.digests["a.json"]]


def test_rm_all_asks_nobody_where_nobody_can_answer(desk: Desk) -> None:
    done = desk.run("rm", "--all")

    assert (done.returncode, done.stdout, done.stderr) == (0, "6008 bytes freed\n", "")
    assert desk.left() == set()
    assert not any(JOB in str(path) for path in desk.home.rglob("*")), "nothing of the private job is left"
    assert desk.run("ls").stdout == ""


def test_what_somebody_else_keeps_in_folders_of_these_names_is_neither_listed_nor_removed(desk: Desk) -> None:
    """TRAINCHAIN_CACHE may name a disk that has a folder `models` of its own."""
    kept = [
        desk.home / "cache" / name for name in ("models/my-llama/model.safetensors", "objects/a/b", "tokens/hf.txt")
    ]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")

    assert {entry["digest"] for entry in desk.json("ls")["entries"]} == {TOKENS, *desk.digests.values()}
    assert desk.json("rm", "--all")["freed"] == 6008
    assert [path.read_bytes() for path in kept] == [b"mine"] * 3


def test_rm_tokens_leaves_the_rest(desk: Desk) -> None:
    assert desk.json("rm", "--tokens") == {"ok": True, "freed": 8, "removed": [TOKENS], "in_use": []}
    assert desk.left() == set(FILES)


def test_rm_of_nothing_is_nothing(desk: Desk) -> None:
    """As GNU's xargs calls it where verify found nothing."""
    done = desk.run("rm")

    assert (done.returncode, done.stdout) == (0, "0 bytes freed\n")
    assert "--all" in done.stderr
    assert desk.left() == set(FILES)


@pytest.mark.parametrize("name", ["nothing", "", "../..", "0" * 64, "\x1b[31m", "e"])
def test_rm_of_what_is_not_there_removes_nothing(desk: Desk, name: str) -> None:
    done = desk.run("rm", desk.digests["a.json"], name)

    assert (done.returncode, done.stdout) == (2, "")
    assert "error[usage.flag]" in done.stderr
    assert "\x1b" not in done.stderr
    assert desk.left() == set(FILES)


def test_digests_beside_all_are_a_usage_error(desk: Desk) -> None:
    assert desk.run("rm", "--all", desk.digests["a.json"]).returncode == 2
    assert desk.left() == set(FILES)


def test_what_a_running_process_uses_stays(desk: Desk) -> None:
    user = Cache(desk.home / "cache")
    user.hold("job", {desk.digests["a.json"]: 1000})

    named = desk.run("rm", desk.digests["b.json"], desk.digests["a.json"])
    assert (named.returncode, desk.left()) == (1, set(FILES))
    assert "error[cache.in_use]" in named.stderr
    assert "(in use)" in desk.run("ls").stdout
    everything = desk.json("rm", "--all")
    assert everything["in_use"] == [desk.digests["a.json"]]
    assert desk.left() == {"a.json"}

    user.let_go()
    assert desk.run("rm", "--all").returncode == 0
    assert desk.left() == set()


@pytest.mark.parametrize("words", [["ls"], ["verify"], ["rm", "--all"], ["ls", "--json"]])
def test_where_there_is_no_cache_none_is_made(tmp_path: Path, words: list[str]) -> None:
    environment = {**os.environ, "TRAINCHAIN_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "trainchain", "cache", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)

    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert not (tmp_path / "home").exists()


def test_another_folder_and_another_cap_can_be_named(desk: Desk, tmp_path: Path) -> None:
    (desk.home / "cache").rename(tmp_path / "big")

    done = desk.run("ls", TRAINCHAIN_CACHE=str(tmp_path / "big"), TRAINCHAIN_CACHE_CAP="64MiB")

    assert done.stderr == f"6.0 kB of 67.1 MB in {tmp_path / 'big'}\n"
    wrong = desk.run("ls", TRAINCHAIN_CACHE_CAP="plenty")
    assert (wrong.returncode, "TRAINCHAIN_CACHE_CAP" in wrong.stderr, "80GB" in wrong.stderr) == (2, True, True)


def test_names_and_times_from_a_tampered_folder_do_no_harm(desk: Desk) -> None:
    about = desk.home / "cache" / "about" / desk.digests["a.json"]
    about.write_text(json.dumps({"belongs": "evil\x1b[2J\n" * 100}), encoding="utf-8")
    (desk.home / "cache" / "about" / desk.digests["b.json"]).write_bytes(b"\xff{")
    os.utime(desk.paths["a.json"], (10**11, 10**11))
    (desk.home / "cache" / "objects" / "zz").mkdir()
    (desk.home / "cache" / "objects" / "zz" / "a\x1bb\nc").write_bytes(b"")

    done = desk.run("ls")

    assert (done.returncode, "\x1b" in done.stdout) == (0, False)
    assert len(done.stdout.splitlines()) == 4, "what is named otherwise is not the cache's"
    assert desk.run("verify").returncode == 0
    assert desk.run("rm", "--all").returncode == 0
    assert desk.left() == set()
