import os
from pathlib import Path

import numpy as np
import pytest

from trainchain.core.train.arrays import META, STALE_SECONDS, ArrayWriter, open_arrays

KINDS = {"numbers": np.int32, "marks": np.bool_}


def publish(folder: Path, numbers: list[int]) -> None:
    with ArrayWriter(folder, KINDS) as writer:
        for number in numbers:
            writer.write("numbers", np.array([number], np.int32))
        writer.publish({"rows": [len(numbers)]})


def numbers(folder: Path) -> list[int] | None:
    found = open_arrays(folder, KINDS)
    return None if found is None else found[1]["numbers"].tolist()


def test_what_is_published_is_mapped_and_cannot_be_written_to(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "it"
    publish(folder, [3, 1, 2])

    found = open_arrays(folder, KINDS)

    assert found is not None
    facts, arrays = found
    assert facts == {"rows": [3]}
    assert arrays["numbers"].tolist() == [3, 1, 2]
    assert arrays["marks"].dtype == np.bool_
    assert len(arrays["marks"]) == 0
    with pytest.raises(ValueError, match="read-only"):
        arrays["numbers"][0] = 7
    assert [path.name for path in folder.parent.iterdir()] == ["it"]


def shorten(folder: Path) -> None:
    os.truncate(folder / "numbers", 8)


def lengthen(folder: Path) -> None:
    with (folder / "numbers").open("ab") as file:
        file.write(b"\0\0\0\0")


def alter(folder: Path) -> None:
    data = bytearray((folder / "numbers").read_bytes())
    data[5] ^= 1
    (folder / "numbers").write_bytes(data)


def lose_a_file(folder: Path) -> None:
    (folder / "marks").unlink()


def lose_meta(folder: Path) -> None:
    (folder / META).unlink()


def tear_meta(folder: Path) -> None:
    os.truncate(folder / META, 20)


def meta_of_another_kind(folder: Path) -> None:
    (folder / META).write_text("[]")


def meta_of_another_layout(folder: Path) -> None:
    meta = folder / META
    meta.write_text(meta.read_text().replace('"layout": 1', '"layout": 0'))


@pytest.mark.parametrize(
    "spoil",
    [
        shorten,
        lengthen,
        alter,
        lose_a_file,
        lose_meta,
        tear_meta,
        meta_of_another_kind,
        meta_of_another_layout,
    ],
)
def test_a_damaged_folder_is_not_opened_and_is_replaced(tmp_path: Path, spoil: object) -> None:
    publish(tmp_path / "it", [3, 1, 2])
    assert callable(spoil)
    spoil(tmp_path / "it")

    assert numbers(tmp_path / "it") is None
    publish(tmp_path / "it", [4])
    assert numbers(tmp_path / "it") == [4]
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_of_two_writers_the_faster_one_stays_mapped(tmp_path: Path) -> None:
    with ArrayWriter(tmp_path / "it", KINDS) as slow:
        slow.write("numbers", np.arange(5, dtype=np.int32))
        publish(tmp_path / "it", [1, 2])
        mapped = open_arrays(tmp_path / "it", KINDS)
        slow.publish({})

    assert numbers(tmp_path / "it") == [1, 2]
    assert mapped is not None
    assert mapped[1]["numbers"].tolist() == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with ArrayWriter(tmp_path / "it", KINDS) as writer:
            writer.write("numbers", np.arange(5, dtype=np.int32))
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_swept_a_day_later(tmp_path: Path) -> None:
    old, new = tmp_path / ".it-old", tmp_path / ".it-new"
    for left in (old, new):
        left.mkdir()
        (left / "numbers").write_bytes(b"half")
    then = old.stat().st_mtime - STALE_SECONDS - 60
    for path in (old / "numbers", old, new):
        os.utime(path, (then, then))

    publish(tmp_path / "it", [1])

    assert sorted(path.name for path in tmp_path.iterdir()) == [".it-new", "it"]
