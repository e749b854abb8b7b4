"""Keys of processed images, pending files, and the lines and tables of a journal after a crash."""

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
from focus_ray.watching.folder import ListedFile, PendingFiles, list_images
from focus_ray.watching.journal import VerdictJournal, format_image_key
from focus_ray.watching.processed_keys import ProcessedKeySet, compute_content_key, compute_stamp_key


def make_journal_line(number: int, error: str = "none\nat all") -> dict[str, Any]:
    """Returns the journal line of image `number`, an image with an error."""
    file = make_listed_file(number)
    key = format_image_key(compute_stamp_key(file), compute_content_key(file.image, "0" * 64))
    return {"key": key, "image": file.image, "time": "t", "category": "gear", "error": error}


def make_listed_file(number: int) -> ListedFile:
    return ListedFile(f'part {number}, "ä".png', number, 5)


def list_image_names(count: int) -> list[str]:
    return [make_listed_file(number).image for number in range(count)]


def read_journal_lines(folder: Path) -> list[dict[str, Any]]:
    """Returns all lines in an output folder, in the order of their days."""
    return [json.loads(text) for day in sorted(folder.glob("*.jsonl")) for text in day.read_text().splitlines()]


def read_table_rows(folder: Path) -> list[dict[str, str]]:
    """Returns all rows of the CSV tables in an output folder."""
    rows: list[dict[str, str]] = []
    for day in sorted(folder.glob("*.csv")):
        with day.open(newline="", encoding="utf-8") as stream:
            rows += csv.DictReader(stream)
    return rows


KEYS = st.lists(st.integers(0, 2**64 - 1))


@given(KEYS, KEYS, KEYS)
def test_processed_keys_contain_the_initial_keys_and_the_added_keys(
    initial: list[int], added: list[int], others: list[int]
) -> None:
    processed = ProcessedKeySet(initial)
    processed.add(*added)
    queries = others + initial + added
    assert processed.contains_each(queries) == [key in {*initial, *added} for key in queries]


def test_processed_keys_remain_a_set_when_they_are_merged() -> None:
    processed = ProcessedKeySet([1])
    for start in range(0, 200_000, 50_000):
        processed.add(*range(start, start + 50_000))
    assert processed.contains_each([0, 1, 199_999, 200_000]) == [True, True, True, False]


def test_only_visible_images_outside_the_output_folder_are_listed(tmp_path: Path) -> None:
    visible = ["a.png", "h/out/i.png", "inner/b.JPG"]
    for name in (*visible, "c.png.tmp", "d.part", ".e.png", ".hidden/f.png", "out/overlays/g.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "inner" / "round").symlink_to(tmp_path)
    assert sorted(file.image for file in list_images(tmp_path, tmp_path / "out", pytest.fail)) == visible


def test_a_changed_file_must_settle_again_and_a_deleted_file_is_dropped() -> None:
    pending, unchanged = PendingFiles(), ListedFile("b.png", 1, 1)
    pending.update_from_listing([ListedFile("a.png", 1, 1), unchanged], now=0)
    pending.update_from_listing([ListedFile("a.png", 1, 1), unchanged], now=1.9)
    assert pending.list_ready_files(2, now=1.9) == []
    pending.update_from_listing([ListedFile("a.png", 2, 2), unchanged], now=2)
    assert [item.file for item in pending.list_ready_files(2, now=2)] == [unchanged]
    pending.update_from_listing([ListedFile("a.png", 2, 2)], now=4)
    assert [item.file.image for item in pending.list_ready_files(2, now=4)] == list(pending) == ["a.png"]


@pytest.mark.parametrize("from_end", [*range(1, 200, 13), 100_000])
def test_a_line_that_is_cut_off_at_any_byte_is_removed_and_the_table_is_rebuilt(tmp_path: Path, from_end: int) -> None:
    with VerdictJournal(tmp_path, table=True) as journal:
        journal.write_lines([make_journal_line(0), make_journal_line(1), make_journal_line(2, error="long" * 40_000)])
    (path,) = tmp_path.glob("*.jsonl")
    os.truncate(path, path.stat().st_size - from_end)
    messages: list[str] = []
    with VerdictJournal(tmp_path, table=True, log=messages.append) as journal:
        assert [entry["image"] for entry in read_journal_lines(tmp_path)] == list_image_names(2)
        is_processed = [compute_stamp_key(make_listed_file(number)) in journal.processed_keys for number in range(3)]
        assert is_processed == [True, True, False]
        journal.write_lines([make_journal_line(2)])
    assert len(messages) == 1
    assert [(row["image"], row["error"]) for row in read_table_rows(tmp_path)] == [
        (name, "none\nat all") for name in list_image_names(3)
    ]


@pytest.mark.parametrize("num_cut_bytes", [1, 40, None])
def test_a_table_that_lacks_rows_or_does_not_exist_is_rebuilt(tmp_path: Path, num_cut_bytes: int | None) -> None:
    with VerdictJournal(tmp_path, table=True) as journal:
        journal.write_lines([make_journal_line(0), make_journal_line(1)])
    (table,) = tmp_path.glob("*.csv")
    complete = table.read_bytes()
    if num_cut_bytes is None:
        table.unlink()
    else:
        os.truncate(table, len(complete) - num_cut_bytes)
    VerdictJournal(tmp_path, table=True).close()
    assert table.read_bytes() == complete


def test_the_table_of_an_earlier_day_is_rebuilt_if_lines_were_added_without_it(tmp_path: Path) -> None:
    earlier, newest = tmp_path / "verdicts-2026-01-30.jsonl", tmp_path / "verdicts-2026-01-31.jsonl"
    earlier.write_text(json.dumps(make_journal_line(0)) + "\n")
    VerdictJournal(tmp_path, table=True).close()
    with earlier.open("a") as stream:
        stream.write(json.dumps(make_journal_line(1)) + "\n")
    newest.write_text(json.dumps(make_journal_line(2)) + "\n")
    for age, path in enumerate((newest, earlier, earlier.with_suffix(".csv"))):
        os.utime(path, (1e9 - age, 1e9 - age))
    VerdictJournal(tmp_path, table=True).close()
    assert [row["image"] for row in read_table_rows(tmp_path)] == list_image_names(3)


def test_a_line_without_a_key_is_reported_and_kept(tmp_path: Path) -> None:
    day = tmp_path / "verdicts-2026-01-31.jsonl"
    day.write_text("by hand\n" + json.dumps(make_journal_line(1)) + "\n")
    messages: list[str] = []
    with VerdictJournal(tmp_path, table=True, log=messages.append) as journal:
        assert journal.num_lines_at_start == 1
    assert [message.startswith(f"{day}: 1 lines") for message in messages] == [True]
    assert day.read_text().startswith("by hand\n")


def test_a_second_process_is_refused_and_the_first_process_is_named(tmp_path: Path) -> None:
    code = "import sys\nfrom focus_ray.watching.journal import VerdictJournal\njournal = VerdictJournal(sys.argv[1])\n"
    code += "print(1, flush=True)\ninput()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "1\n"
        with pytest.raises(DataError, match=f"process {first.pid} on "):
            VerdictJournal(tmp_path)
    finally:
        first.kill()
        first.communicate()
    VerdictJournal(tmp_path).close()


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="File exists"):
        VerdictJournal(tmp_path / "file")


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    with VerdictJournal(tmp_path) as journal:
        journal.write_lines([make_journal_line(0)])
        (path,) = tmp_path.glob("*.jsonl")
        path.unlink()
        path.symlink_to("/dev/full")
        with pytest.raises(DataError, match="No space left on device"):
            journal.write_lines([make_journal_line(1)])
