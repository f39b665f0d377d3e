"""The cache's files: what is wrong is named and fetched again once, what broke off goes on, nothing wrong stays."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.fixtures_cache import SOURCE, Source, event_names
from trainchain.core.digests import sha256
from trainchain.core.errors import TrainChainError
from trainchain.core.worker.cache import Cache, verify
from trainchain.core.worker.files import model_folder

JOB = "0x" + "ab" * 32
TOKENS = "f0" * 32
OTHER_JOB = "0x" + "cd" * 32


class Disk:
    """A cache, its source, and everything it tells of. Time goes forward by a second a use."""

    def __init__(self, folder: Path, files: dict[str, bytes], **options: Any) -> None:
        self.folder = folder
        self.source = Source(files)
        self.events: list[dict[str, Any]] = []
        self.at = 1_800_000_000.0
        self.options = {"free": lambda _: 10**15, **options}
        self.cache = self.again()

    def again(self, **options: Any) -> Cache:
        """The same folder for another process, as it were."""
        return Cache(
            self.folder,
            on_event=self.events.append,
            fetch=self.source,
            now=self.tick,
            **{**self.options, **options},
        )

    def tick(self) -> float:
        self.at += 1
        return self.at

    def get(self, name: str, cache: Cache | None = None) -> Path:
        return (cache or self.cache).file(SOURCE, self.source.ref(name))

    def told(self, event: str) -> list[dict[str, Any]]:
        return [one for one in self.events if one["event"] == event]

    def files(self) -> set[str]:
        """Every file with content: no locks and notes."""
        found = (path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())
        return {path.as_posix() for path in found if not {"locks", "in-use", "about"} & set(path.parts)}


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "cache", {"a.json": b"a" * 1000, "b.json": b"b" * 1000, "c.json": b"c" * 1000})


def failure(call: Callable[..., Any], *arguments: Any, **options: Any) -> TrainChainError:
    with pytest.raises(TrainChainError) as caught:
        call(*arguments, **options)
    return caught.value


def test_a_file_is_fetched_once_and_hashed_at_every_use(disk: Disk) -> None:
    first = disk.get("a.json")

    assert first.read_bytes() == b"a" * 1000
    assert disk.get("a.json") == first
    assert disk.source.fetched == [("a.json", 1000)]
    assert disk.files() == {f"objects/{first.parent.name}/{first.name}"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"x" * 1000),
        lambda path: path.write_bytes(b"a" * 400),
        lambda path: path.write_bytes(b"a" * 1001),
        lambda path: path.write_bytes(b""),
        lambda path: (path.unlink(), path.mkdir(), (path / "inside").write_bytes(b"a")),
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        lambda path: (path.unlink(), path.symlink_to("nowhere")),
        lambda path: (path.unlink(), os.mkfifo(path)),
    ],
    ids=["tampered", "truncated", "longer", "empty", "a folder", "a device", "a dead link", "a pipe"],
)
def test_a_damaged_file_is_named_and_fetched_again(disk: Disk, spoil: Callable[[Path], Any]) -> None:
    path = disk.get("a.json")
    spoil(path)

    assert disk.get("a.json").read_bytes() == b"a" * 1000

    (told,) = disk.told("damaged")
    assert (told["name"], told["digest"], told["where"]) == (f"a.json of {SOURCE}", sha256(b"a" * 1000), "this cache")
    assert told["found"] != told["digest"]
    assert disk.source.fetched == [("a.json", 1000)] * 2
    assert disk.get("a.json") == path
    assert len(disk.told("damaged")) == 1


def test_two_files_that_were_swapped_are_both_found(disk: Disk) -> None:
    a, b = disk.get("a.json"), disk.get("b.json")
    a.rename(a.with_name("x"))
    b.rename(a)
    a.with_name("x").rename(b)

    assert (disk.get("a.json").read_bytes(), disk.get("b.json").read_bytes()) == (b"a" * 1000, b"b" * 1000)
    assert [told["found"] for told in disk.told("damaged")] == [sha256(b"b" * 1000), sha256(b"a" * 1000)]


def test_a_change_between_two_uses_is_never_missed(disk: Disk) -> None:
    path = disk.get("a.json")
    before = path.stat()
    path.write_bytes(b"x" * 1000)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert disk.get("a.json").read_bytes() == b"a" * 1000


def test_a_source_that_lies_once_is_asked_again(disk: Disk) -> None:
    disk.source.lies = [b"evil" * 250]

    assert disk.get("a.json").read_bytes() == b"a" * 1000
    assert [told["where"] for told in disk.told("damaged")] == [SOURCE]


@pytest.mark.parametrize("lie", [b"evil" * 250, b"a" * 999, b"a" * 1001, b""], ids=["other", "short", "long", "empty"])
def test_a_source_that_lies_twice_is_refused_and_nothing_of_it_stays(disk: Disk, lie: bytes) -> None:
    disk.source.lies = [lie, lie]

    error = failure(disk.get, "a.json")

    assert (error.code, error.exit_code) == ("source.changed", 4)
    assert all(word in error.message for word in ("a.json", SOURCE, sha256(b"a" * 1000), sha256(lie)))
    assert len(disk.source.fetched) == 2
    assert disk.files() == set()


def test_a_damaged_file_whose_source_changed_too_is_refused_at_once(disk: Disk) -> None:
    disk.get("a.json").write_bytes(b"x")
    disk.source.files["a.json"] = b"e" * 1000
    wanted = disk.source.ref("a.json").model_copy(update={"sha256": sha256(b"a" * 1000)})

    error = failure(disk.cache.file, SOURCE, wanted)

    assert error.code == "source.changed"
    assert len(disk.source.fetched) == 2
    assert disk.files() == set()


def test_a_download_that_broke_off_goes_on_where_it_was(disk: Disk) -> None:
    disk.source.cut = 300
    assert failure(disk.get, "a.json").code == "source.unavailable"
    assert failure(disk.get, "a.json", disk.again()).code == "source.unavailable"
    disk.source.cut = None

    assert disk.get("a.json").read_bytes() == b"a" * 1000

    assert disk.source.fetched == [("a.json", 300), ("a.json", 300), ("a.json", 400)]
    assert [told["resumed"] for told in disk.told("fetched")] == [600]
    assert disk.told("damaged") == []


@pytest.mark.parametrize("left", [b"x" * 300, b"x" * 1000, b"a" * 1001], ids=["wrong part", "wrong whole", "too long"])
def test_a_wrong_part_is_thrown_away_and_all_fetched_from_the_start(disk: Disk, left: bytes) -> None:
    digest = disk.source.ref("a.json").sha256
    (disk.folder / "partial").mkdir()
    (disk.folder / "partial" / digest).write_bytes(left)

    assert disk.get("a.json").read_bytes() == b"a" * 1000
    assert disk.source.fetched[-1] == ("a.json", 1000)
    assert disk.files() == {f"objects/{digest[:2]}/{digest[2:]}"}


def test_beside_a_damaged_file_no_part_is_trusted_either(disk: Disk) -> None:
    path = disk.get("a.json")
    path.write_bytes(b"x")
    (disk.folder / "partial" / disk.source.ref("a.json").sha256).write_bytes(b"x" * 300)

    assert disk.get("a.json").read_bytes() == b"a" * 1000


def test_a_part_that_leads_elsewhere_is_not_followed(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"precious")
    (disk.folder / "partial").mkdir()
    (disk.folder / "partial" / disk.source.ref("a.json").sha256).symlink_to(tmp_path / "mine")

    disk.get("a.json")

    assert (tmp_path / "mine").read_bytes() == b"precious"


def test_an_empty_file_is_a_file(tmp_path: Path) -> None:
    disk = Disk(tmp_path, {"empty.txt": b""})

    assert disk.get("empty.txt").read_bytes() == b""


def test_a_name_that_is_no_digest_touches_nothing(disk: Disk) -> None:
    for name in ("../../x", "AB" * 32, "", "ab"):
        assert failure(disk.cache.keep, name, b"x").code == "object.unknown"
    assert disk.files() == set()


def test_a_file_whose_source_tells_no_digest_is_pinned_by_fetching_it(disk: Disk) -> None:
    partial = disk.folder / "partial"
    digest, path = disk.cache.pin(SOURCE, "a.json", 1000)

    assert (digest, path.read_bytes()) == (sha256(b"a" * 1000), b"a" * 1000)
    assert disk.cache.pin(SOURCE, "a.json", 1000) == (digest, path)
    assert disk.source.fetched == [("a.json", 1000)]
    path.write_bytes(b"x" * 1000)
    assert disk.cache.pin(SOURCE, "a.json", 1000) == (digest, path), "what lies here is not taken for what is there"
    assert path.read_bytes() == b"a" * 1000
    assert list(partial.iterdir()) == []


def test_a_pinned_file_never_begins_with_what_an_earlier_try_left(disk: Disk) -> None:
    disk.source.cut = 300
    assert failure(disk.cache.pin, SOURCE, "a.json", 1000).code == "source.unavailable"
    for path in (disk.folder / "partial").iterdir():
        path.write_bytes(b"x" * 300)
    disk.source.cut = None

    assert disk.cache.pin(SOURCE, "a.json", 1000)[0] == sha256(b"a" * 1000)
    disk.source.files["b.json"] = b"b" * 999
    assert failure(disk.cache.pin, SOURCE, "b.json", 1000).code == "source.incomplete"


# -- the cap ----------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    disk = Disk(tmp_path, {name: name.encode() * 1000 for name in "abcd"}, cap=3000)
    paths = {name: disk.get(name) for name in "abc"}
    disk.get("a")

    disk.get("d")

    assert [told["name"] for told in disk.told("evicted")] == [sha256(b"b" * 1000)]
    assert [name for name, path in paths.items() if path.exists()] == ["a", "c"]


def test_what_cannot_fit_is_refused_before_anything_is_fetched_or_removed(tmp_path: Path) -> None:
    disk = Disk(tmp_path, {"old": b"o" * 900, "big": b"b" * 2_000_001}, cap=2_000_000)
    old = disk.get("old")

    error = failure(disk.get, "big")

    assert (error.code, error.exit_code) == ("cache.full", 1)
    assert (error.facts["needed"], error.facts["cap"]) == (2_000_001, 2_000_000)
    assert "2.0 MB" in error.message
    assert "--cache-cap 3MB" in error.hint
    assert "TRAINCHAIN_CACHE_CAP" in error.hint
    assert old.exists()
    assert disk.source.fetched == [("old", 900)]


def test_what_a_job_needs_is_counted_together(tmp_path: Path) -> None:
    disk = Disk(tmp_path, {name: name.encode() * 1000 for name in "abc"}, cap=2999)

    error = failure(disk.cache.hold, "job", {disk.source.ref(name).sha256: 1000 for name in "abc"})

    assert error.code == "cache.full"
    assert error.facts["needed"] == 3000


def test_what_another_user_holds_is_never_evicted(tmp_path: Path) -> None:
    disk = Disk(tmp_path, {name: name.encode() * 1000 for name in "abc"}, cap=2000)
    other = disk.again()
    a, b = disk.get("a", other), disk.get("b")

    disk.get("c")
    assert (a.exists(), b.exists()) == (True, False)
    error = failure(disk.cache.hold, "job", {disk.source.ref(name).sha256: 1000 for name in "bc"})
    assert error.code == "cache.full"
    assert "running processes use 1.0 kB" in error.message

    del other
    disk.cache.hold("job", {disk.source.ref(name).sha256: 1000 for name in "bc"})
    assert not a.exists()


def test_room_that_another_one_is_about_to_fill_is_not_given_twice(tmp_path: Path) -> None:
    disk = Disk(tmp_path, {name: name.encode() * 1000 for name in "ab"}, cap=1500)
    other = disk.again()
    other.hold("job", {disk.source.ref("a").sha256: 1000})

    assert failure(disk.get, "b").code == "cache.full"


def test_an_object_of_unknown_size_makes_its_room_when_it_is_there(tmp_path: Path) -> None:
    class Client:
        url = "http://hub"

        def download(self, digest: str, partial: Path, *, size: int) -> None:
            partial.write_bytes(b"n" * 1000)

    disk = Disk(tmp_path, {"a": b"a" * 1000}, cap=1500)
    a = disk.get("a")

    found = disk.cache.object(Client(), sha256(b"n" * 1000))  # type: ignore[arg-type]

    assert (found.exists(), a.exists()) == (True, False)


def test_a_disk_without_room_is_told_before_anything_is_fetched(tmp_path: Path) -> None:
    disk = Disk(tmp_path, {"old": b"o" * 100, "a": b"a" * 1000}, free=lambda _: 700)
    old = disk.get("old")

    error = failure(disk.get, "a")

    assert (error.code, error.exit_code) == ("disk.full", 1)
    assert str(tmp_path) in error.message
    assert "TRAINCHAIN_CACHE" in error.hint
    assert old.exists(), "what would not help is not removed"
    assert [name for name, _ in disk.source.fetched] == ["old"]


def test_old_things_make_way_where_the_disk_is_short(tmp_path: Path) -> None:
    disk = Disk(tmp_path, {"old": b"o" * 600, "a": b"a" * 1000}, free=lambda _: 700)
    old = disk.get("old")

    assert disk.get("a").exists()
    assert not old.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_in_the_middle_is_told_and_left_as_it_was(tmp_path: Path, number: int) -> None:
    disk = Disk(tmp_path, {"a": b"a" * 1000})

    def full(source: str, path: str, partial: Path, size: int) -> None:
        partial.write_bytes(b"a" * 500)
        raise OSError(number, os.strerror(number))

    error = failure(disk.get, "a", disk_with(disk, full))

    assert error.code == "disk.full"
    assert os.strerror(number) in error.message
    assert disk.files() == set()
    assert disk.get("a").exists()


def disk_with(disk: Disk, fetch: Any) -> Cache:
    return Cache(disk.folder, fetch=fetch, free=lambda _: 10**15)


CHILD = """
import sys
from pathlib import Path
from tests.fixtures_cache import SOURCE, Source
from trainchain.core.errors import TrainChainError
from trainchain.core.worker.cache import Cache
source = Source({"a": b"a" * 2_000_000})
cache = Cache(Path(sys.argv[1]), fetch=source, free=lambda _: 10**15)
try:
    cache.file(SOURCE, source.ref("a"))
except TrainChainError as error:
    print(error.code, error.message)
print(sorted(path.name for path in (cache.folder / "partial").iterdir()))
"""


def run_child(*command: str, cwd: Path, **options: Any) -> str:
    done = subprocess.run(
        [*command, sys.executable, "-c", CHILD, str(cwd / "full" / "cache")],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        **options,
    )
    return done.stdout


def test_a_disk_that_is_really_full_is_told(tmp_path: Path) -> None:
    """A file system of one megabyte, in a name space of its own; the cache is lied to about what is free."""
    (tmp_path / "full").mkdir()
    mount = f'mount -t tmpfs -o size=1m none {tmp_path / "full"} && exec "$@"'
    try:
        probe = subprocess.run(["unshare", "-rm", "sh", "-c", mount, "sh", "true"], capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if probe.returncode:
        pytest.skip(f"no file system of one's own can be mounted here: {probe.stderr.decode()[:200]}")

    said = run_child("unshare", "-rm", "sh", "-c", mount, "sh", cwd=tmp_path)

    assert said.startswith(f"disk.full The disk that {tmp_path}/full/cache is on has no room: No space left on device")
    assert said.endswith("[]\n")


def test_a_file_that_may_grow_no_further_is_a_full_disk_too(tmp_path: Path) -> None:
    limit = (1_000_000, 1_000_000)

    said = run_child(cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))

    assert said.startswith("disk.full")
    assert said.endswith("[]\n")


NAMES = "abcdef"
SIZES = dict(zip(NAMES, (100, 300, 500, 700, 900, 1600), strict=True))
USES = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["get", "hold", "let go", "break", "spoil"]), st.sampled_from(NAMES)),
    max_size=25,
)


@given(USES)
@example([(0, "get", "b"), (2, "hold", "e"), (2, "get", "e"), (2, "hold", "c")])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_cache_is_within_its_cap_whatever_is_done_with_it(
    tmp_path_factory: pytest.TempPathFactory, uses: list[tuple[int, str, str]]
) -> None:
    """Three users of one folder; what each was given last is still there, and nothing else is where it does not fit."""
    disk = Disk(tmp_path_factory.mktemp("cache"), {name: name.encode() * SIZES[name] for name in NAMES}, cap=1500)
    users = [disk.cache, disk.again(), disk.again().private(JOB)]
    given: dict[int, Path] = {}
    of: dict[int, str] = {}
    held: dict[int, str] = {}
    raised: set[str] = set()
    for user, verb, name in uses:
        cache, digest = users[user], disk.source.ref(name).sha256
        disk.source.cut = 50 if verb == "break" else None
        try:
            match verb:
                case "get" | "break":
                    given.pop(user, None)
                    given[user] = disk.get(name, cache)
                    of[user] = name
                case "hold":
                    before = held.get(user)
                    cache.hold("job", {digest: SIZES[name]})
                    held[user] = name
                    if before is not None and before != name and of.get(user) == before:
                        given.pop(user, None)  # it was there for the job that this one takes the place of
                case "let go":
                    given.pop(user, None)
                    held.pop(user, None)
                    cache.let_go()
                case "spoil":
                    path = cache.folder / "objects" / digest[:2] / digest[2:]
                    if path.exists():
                        path.write_bytes(b"")
        except TrainChainError as error:
            raised.add(error.code)
        entries = disk.cache.room.entries()
        assert sum(entry.size for entry in entries) <= 1500 or all(entry.in_use for entry in entries)
        assert all(path.exists() for path in given.values())
    assert raised <= {"cache.full", "source.unavailable"}


# -- private jobs -----------------------------------------------------------------------------------------------------


def test_a_private_job_shares_no_file_with_anybody(disk: Disk) -> None:
    shared = disk.get("a.json")
    private, other = disk.cache.private(JOB), disk.cache.private(OTHER_JOB)

    paths = [disk.get("a.json", private), disk.get("a.json", other)]

    assert len({path.stat().st_ino for path in [shared, *paths]}) == 3
    assert paths[0].is_relative_to(disk.folder / "private" / JOB)
    assert disk.source.fetched == [("a.json", 1000)] * 3, "a private job's files come from where they lie"
    assert private.tokens is None
    assert disk.cache.private_jobs() == [JOB, OTHER_JOB]


def test_what_is_forgotten_is_gone_and_nothing_else(disk: Disk) -> None:
    shared, kept = disk.get("a.json"), disk.get("a.json", disk.cache.private(OTHER_JOB))
    private = disk.cache.private(JOB)
    disk.get("a.json", private)
    disk.source.cut = 100
    failure(disk.get, "b.json", private)

    disk.cache.forget(JOB)
    disk.cache.forget(JOB)  # once more does no harm

    assert [path.name for path in (disk.folder / "private").iterdir()] == [OTHER_JOB]
    assert (shared.exists(), kept.exists()) == (True, True)
    assert disk.cache.private_jobs() == [OTHER_JOB]
    assert not any(JOB in text.read_text(encoding="utf-8") for text in (disk.folder / "in-use").glob("*.json"))


@pytest.mark.parametrize("name", ["", "..", "0xab", "0x" + "AB" * 32, "/etc", "0x" + "ab" * 32 + "/.."])
def test_a_private_cache_is_named_by_a_job_s_whole_id(disk: Disk, name: str) -> None:
    assert failure(disk.cache.private, name).code == "job.unknown"
    assert failure(disk.cache.forget, name).code == "job.unknown"


# -- looking ----------------------------------------------------------------------------------------------------------


def test_what_lies_there_is_listed_with_what_it_belongs_to(disk: Disk) -> None:
    disk.get("a.json", disk.cache.private(JOB))
    disk.get("b.json")
    disk.source.cut = 100
    failure(disk.get, "c.json")
    (disk.folder / "tokens" / TOKENS).mkdir()
    (disk.folder / "tokens" / TOKENS / "ids").write_bytes(b"12345678")
    found = {entry.belongs or entry.kind: entry for entry in disk.cache.room.entries()}

    private, shared = found.pop(f"a.json of {SOURCE}"), found.pop(f"b.json of {SOURCE}")
    part, tokens = found.pop("object"), found.pop("tokenised data")
    assert found == {}
    assert (private.job, shared.job, private.size, shared.size) == (JOB, None, 1000, 1000)
    assert (part.partial, part.size, part.in_use) == (True, 100, True)
    assert (tokens.kind, tokens.size, tokens.in_use) == ("tokens", 8, False)
    assert private.used < shared.used


def test_what_is_removed_takes_along_what_links_to_it_and_what_tells_of_it(disk: Disk) -> None:
    a = disk.get("a.json")
    folder = model_folder(disk.cache, [disk.source.ref("a.json")], belongs="model")
    disk.cache.let_go()
    (key,) = [entry.key for entry in disk.cache.room.entries() if entry.kind == "object"]

    assert disk.cache.room.remove([key]) == 1000

    assert (a.exists(), folder.exists(), disk.cache.room.entries()) == (False, False, [])
    assert not (disk.folder / "about" / sha256(b"a" * 1000)).exists()


def test_verify_finds_what_is_not_what_its_name_says(disk: Disk) -> None:
    a, b = disk.get("a.json"), disk.get("b.json", disk.cache.private(JOB))
    assert list(verify(disk.cache)) == []
    a.write_bytes(b"x")
    b.write_bytes(b"y")

    found = {entry.name: told for entry, told in verify(disk.cache)}

    assert found == {sha256(b"a" * 1000): sha256(b"x"), sha256(b"b" * 1000): sha256(b"y")}
    assert event_names(disk.events).count("damaged") == 0
