"""What is remembered of images, what waits, and lines and tables that a crash cut off."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from focus_ray.errors import DataError
from focus_ray.watching.folder import File, Waiting, list_images
from focus_ray.watching.journal import Journal, key_text
from focus_ray.watching.seen import Seen, content_key, stamp_key


def line(number: int, **more: Any) -> dict[str, Any]:
    image = f'part {number}, "ä".png'
    key = key_text(stamp_key(image, number, 5), content_key(image, "0" * 64))
    return {"key": key, "image": image, "time": "t", "category": "gear", "error": "none\nat all", **more}


def lines_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for day in sorted(folder.glob("*.jsonl")) for text in day.read_text().splitlines()]


def rows_in(folder: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for day in sorted(folder.glob("*.csv")):
        with day.open(newline="", encoding="utf-8") as stream:
            rows += csv.DictReader(stream)
    return rows


@given(st.lists(st.integers(0, 2**64 - 1)), st.lists(st.integers(0, 2**64 - 1)), st.lists(st.integers(0, 2**64 - 1)))
def test_seen_is_a_set_of_what_it_began_with_and_what_was_added(
    old: list[int], new: list[int], asked: list[int]
) -> None:
    seen = Seen(old)
    seen.add(*new)
    asked = asked + old + new
    assert seen.known(asked) == [key in {*old, *new} for key in asked]


def test_seen_stays_a_set_when_it_grows_large() -> None:
    seen = Seen([1])
    for start in range(0, 200_000, 50_000):
        seen.add(*range(start, start + 50_000))
    assert len(seen) == 200_000
    assert seen.known([0, 1, 199_999, 200_000]) == [True, True, True, False]


def test_only_images_that_are_not_hidden_count(tmp_path: Path) -> None:
    for name in (
        "a.png",
        "inner/b.JPG",
        "c.png.tmp",
        "d.part",
        ".e.png",
        ".hidden/f.png",
        "out/overlays/g.png",
        "h/out/i.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "inner" / "round").symlink_to(tmp_path)
    found = list_images(tmp_path, tmp_path / "out", pytest.fail)
    assert sorted(file.image for file in found) == ["a.png", "h/out/i.png", "inner/b.JPG"]


def test_a_file_that_changes_has_to_rest_again_and_one_that_is_gone_is_forgotten() -> None:
    waiting = Waiting(settle_s=2)
    other = File("b.png", 1, 1)
    waiting.look([File("a.png", 1, 1), other], now=0)
    waiting.look([File("a.png", 1, 1), other], now=1.9)
    assert waiting.ready(now=1.9) == []
    waiting.look([File("a.png", 2, 2), other], now=2)
    assert [one.file for one in waiting.ready(now=2)] == [other]
    waiting.look([File("a.png", 2, 2)], now=4)
    assert [one.file.image for one in waiting.ready(now=4)] == ["a.png"]
    assert list(waiting.files) == ["a.png"]


@pytest.mark.parametrize("from_end", [*range(1, 200, 13), 100_000])
def test_wherever_the_last_line_was_cut_off_the_others_stay_and_the_table_follows(
    tmp_path: Path, from_end: int
) -> None:
    with Journal(tmp_path, table=True) as journal:
        journal.write([line(0), line(1), line(2, error="long" * 40_000)])
    (path,) = tmp_path.glob("*.jsonl")
    os.truncate(path, path.stat().st_size - from_end)
    told: list[str] = []
    with Journal(tmp_path, table=True, log=told.append) as journal:
        assert [one["image"] for one in lines_in(tmp_path)] == [line(0)["image"], line(1)["image"]]
        known = [stamp_key(str(line(number)["image"]), number, 5) in journal.seen for number in range(3)]
        assert known == [True, True, False]
        journal.write([line(2)])
    assert len(told) == 1
    assert "was cut off" in told[0]
    assert [(row["image"], row["error"]) for row in rows_in(tmp_path)] == [
        (line(number)["image"], line(number)["error"]) for number in range(3)
    ]


@pytest.mark.parametrize("cut", [1, 40, None])
def test_a_table_that_lacks_rows_or_is_not_there_is_made_again(tmp_path: Path, cut: int | None) -> None:
    with Journal(tmp_path, table=True) as journal:
        journal.write([line(0), line(1)])
    (table,) = tmp_path.glob("*.csv")
    whole = table.read_bytes()
    if cut is None:
        table.unlink()
    else:
        os.truncate(table, len(whole) - cut)
    Journal(tmp_path, table=True).close()
    assert table.read_bytes() == whole


def test_a_table_that_was_not_asked_for_on_the_rest_of_its_day_is_made_again(tmp_path: Path) -> None:
    former, newest = tmp_path / "verdicts-2026-01-30.jsonl", tmp_path / "verdicts-2026-01-31.jsonl"
    former.write_text(json.dumps(line(0)) + "\n")
    Journal(tmp_path, table=True).close()
    with former.open("a") as stream:
        stream.write(json.dumps(line(1)) + "\n")
    newest.write_text(json.dumps(line(2)) + "\n")
    for age, path in enumerate((newest, former, former.with_suffix(".csv"))):
        os.utime(path, (1e9 - age, 1e9 - age))
    Journal(tmp_path, table=True).close()
    assert [row["image"] for row in rows_in(tmp_path)] == [line(number)["image"] for number in range(3)]


def test_a_line_that_is_none_of_the_watchers_is_told_and_left(tmp_path: Path) -> None:
    (tmp_path / "verdicts-2026-01-31.jsonl").write_text("by hand\n" + json.dumps(line(1)) + "\n")
    told: list[str] = []
    with Journal(tmp_path, log=told.append) as journal:
        assert journal.num_known == 1
    assert told == [
        f"{tmp_path}/verdicts-2026-01-31.jsonl: 1 lines begin otherwise than the watcher's, and count for no image"
    ]


def test_a_second_process_is_refused_and_told_which_is_the_first(tmp_path: Path) -> None:
    code = "import sys\nfrom focus_ray.watching.journal import Journal\nheld = Journal(sys.argv[1])\nprint(1, flush=True)\n"
    code += "input()"
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "1\n"
        with pytest.raises(
            DataError, match=f"process {first.pid} on .* writes its verdicts here: give another --output"
        ):
            Journal(tmp_path)
    finally:
        first.kill()
        first.communicate()
    Journal(tmp_path).close()


def test_an_output_that_cannot_be_one_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: cannot be used for verdicts: File exists"):
        Journal(tmp_path / "file")


def test_a_full_disk_is_told_with_what_becomes_of_the_images(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.write([line(0)])
    (path,) = tmp_path.glob("*.jsonl")
    with Journal(tmp_path) as journal:
        path.unlink()
        path.symlink_to("/dev/full")
        with pytest.raises(
            DataError, match="No space left on device; what has no line yet is inspected at the next start"
        ):
            journal.write([line(1)])
