"""Removing rows and merging small part files: only affected files are written again, and readers keep their version."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ingested import append_quietly, commit_of, ingest_quietly, part_names, rows_of
from made_sources import make_mvtec, pixels, save

from focus_ray.cli.main import main
from focus_ray.data import store
from focus_ray.data.read import data_fingerprint, data_version, index_version, read_index
from focus_ray.errors import DataError
from focus_ray.ingestion.change import compact_part_files, remove_rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_mvtec(tmp_path / "bolt", num_train=17)


@pytest.fixture
def out(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of 20 rows in part files of 4 rows."""
    with monkeypatch.context() as patch:
        patch.setattr(store, "MAX_ROW_GROUP_ROWS", 4)
        patch.setattr(store, "FILE_BYTES", 4 * (source / "train/good/000.png").stat().st_size - 100)
        ingest_quietly(source, tmp_path / "out")
    assert [entry["row_group_rows"] for entry in commit_of(tmp_path / "out")["files"]] == [[4]] * 5
    return tmp_path / "out"


def test_removing_rows_writes_only_their_part_files_again(out: Path) -> None:
    before, version, parts = rows_of(out), data_version(out, "bolt"), part_names(out)
    removed_ids = ["bolt/test/crack/001", "bolt/test/good/000"]
    report = remove_rows(out, "bolt", ids=removed_ids)
    assert (report.num_removed, report.num_remaining, report.num_rewritten, report.num_parts) == (2, 18, 1, 5)
    assert [name for name in part_names(out) if name in parts] == parts[1:]
    assert rows_of(out) == [row for row in before if row["id"] not in removed_ids]
    counts = {"num_train": 17, "num_test_normal": 0, "num_test_anomalous": 1, "num_masks": 1}
    assert commit_of(out)["counts"] == counts
    assert rows_of(out, version=version) == before


@pytest.mark.parametrize("append", [True, False])
def test_an_append_or_an_ingestion_restores_removed_rows(out: Path, source: Path, append: bool) -> None:
    fingerprint = data_fingerprint(out, "bolt")
    remove_rows(out, "bolt", ids=["bolt/train/good/003", "bolt/test/crack/000"])
    assert data_fingerprint(out, "bolt") != fingerprint
    ingest_quietly(source, out, append=append)
    assert data_fingerprint(out, "bolt") == fingerprint
    assert commit_of(out)["counts"]["num_masks"] == 2


def test_rows_are_removed_by_content_hash_and_by_site(out: Path, tmp_path: Path) -> None:
    content = read_index(out, "bolt")["content_hash"][5].as_py()
    assert remove_rows(out, "bolt", content_hashes=[content]).num_removed == 1
    append_quietly(make_mvtec(tmp_path / "b/bolt", seed=700), out, site="b")
    report = remove_rows(out, "bolt", site="b")
    assert (report.num_removed, report.num_remaining, report.num_rewritten) == (6, 19, 1)
    assert set(read_index(out, "bolt")["site"].to_pylist()) == {"default"}


@pytest.mark.parametrize(
    ("category", "values", "message"),
    [
        ("bolt", {"ids": [*(f"none/{number}" for number in range(8)), "bolt/train/good/003"]}, "none/4 and 3 more"),
        ("bolt", {"content_hashes": ["x"]}, "content_hash x;"),
        ("bolt", {"site": "elsewhere"}, "site elsewhere;"),
        ("bolt", {"site": "default"}, "all of its 20 images"),
        ("bolt", {}, "ids, content hashes or a site"),
        ("nut", {"ids": ["x"]}, r"no category 'nut'.*: bolt"),
    ],
)
def test_a_removal_that_is_not_possible_names_the_values_and_removes_nothing(
    out: Path, category: str, values: dict[str, Any], message: str
) -> None:
    version = data_version(out, "bolt")
    with pytest.raises(DataError, match=message):
        remove_rows(out, category, **values)
    assert data_version(out, "bolt") == version


def test_compaction_merges_small_part_files_and_changes_no_row(out: Path, source: Path) -> None:
    for number in range(3):
        save(source / f"train/good/new{number}.png", pixels(900 + number))
        append_quietly(source, out)
    remove_rows(out, "bolt", ids=["bolt/train/good/004"])
    before, index = rows_of(out), read_index(out, "bolt")
    (report,) = compact_part_files(out)
    assert (report.num_before, report.num_after, report.num_stale) == (8, 1, 0)
    assert rows_of(out) == before == rows_of(out, version=index_version(index))
    assert read_index(out, "bolt").equals(index)
    version = data_version(out, "bolt")
    (again,) = compact_part_files(out, ["bolt"])
    assert (again.num_before, again.num_after, data_version(out, "bolt")) == (1, 1, version)
    (appended,) = append_quietly(source, out).categories
    assert (appended.num_added, appended.num_existing) == (1, 22)  # the removed image is new again


def test_compaction_leaves_full_part_files_unchanged(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = part_names(out)
    monkeypatch.setattr(store, "FILE_BYTES", min(entry["num_bytes"] for entry in commit_of(out)["files"]))
    (report,) = compact_part_files(out)
    assert (report.num_before, report.num_after, part_names(out)) == (5, 5, parts)


def test_compaction_deletes_stale_files_only(out: Path) -> None:
    old_file = save(out / "category=bolt/part-dead-00000.parquet", b"x")
    new_file = save(out / "category=bolt/part-live-00000.parquet", b"x")
    os.utime(old_file, (1, 1))
    (report,) = compact_part_files(out)
    assert (report.num_after, old_file.exists(), new_file.exists()) == (1, False, True)


# Commands


def test_the_commands_remove_and_compact_change_a_data_set(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("bolt/train/good/001\n\nbolt/train/good/002\n")
    assert main(["data", "remove", str(out), "--category", "bolt", "--ids", str(ids)]) == 0
    assert main(["data", "compact", str(out)]) == 0
    removed, compacted = capsys.readouterr().out.splitlines()
    assert removed.startswith("bolt: 2 images removed, 18 remain; 1 of 5 ")
    assert compacted.startswith("bolt: 5 part files, now 1; 0 ")


@pytest.mark.parametrize("arguments", [["--id", "bolt/nothing"], ["--ids", "nowhere.txt"]])
def test_the_command_remove_exits_with_1_and_names_the_value(
    out: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "remove", str(out), "--category", "bolt", *arguments]) == 1
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "many"])
def test_an_invalid_number_of_workers_is_refused(workers: str) -> None:
    with pytest.raises(SystemExit):
        main(["ingest", "x", "y", "--workers", workers])
