"""Removing rows and merging small part files: only affected files are written again, and readers keep their version."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from made_sources import make_mvtec, pixels, save

from focus_ray.cli.main import main
from focus_ray.data import store
from focus_ray.data.read import data_fingerprint, data_version, index_version, read_index, read_rows
from focus_ray.data.schema import SCHEMA
from focus_ray.data.store import open_store
from focus_ray.errors import DataError
from focus_ray.ingestion.change import compact, remove_rows
from focus_ray.ingestion.ingest import ingest


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_mvtec(tmp_path / "bolt", num_train=17)


@pytest.fixture
def out(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of 20 rows in part files of 4 rows."""
    with monkeypatch.context() as patch:
        patch.setattr(store, "MAX_ROW_GROUP_ROWS", 4)
        patch.setattr(store, "FILE_BYTES", 1)
        ingest(source, tmp_path / "out", progress=False)
    assert len(open_store(tmp_path / "out").require_commit("bolt")["files"]) == 5
    return tmp_path / "out"


def rows_of(root: Path, **options: Any) -> list[dict[str, Any]]:
    index = read_index(root, "bolt", **options)
    return list(read_rows(root, "bolt", index["row"].to_numpy(), SCHEMA.names, **options))


def part_names(root: Path) -> list[str]:
    return [entry["name"] for entry in open_store(root).require_commit("bolt")["files"]]


def test_removing_rows_writes_only_their_part_files_again(out: Path, source: Path) -> None:
    before, index = rows_of(out), read_index(out, "bolt")
    parts = part_names(out)
    removed_ids = ["bolt/test/crack/001", "bolt/test/good/000"]
    report = remove_rows(out, "bolt", ids=removed_ids)
    assert (report.num_removed, report.num_remaining, report.num_rewritten, report.num_parts) == (2, 18, 1, 5)
    assert [name for name in part_names(out) if name in parts] == parts[1:]
    assert rows_of(out) == [row for row in before if row["id"] not in removed_ids]
    counts = open_store(out).require_commit("bolt")["counts"]
    assert counts == {"num_train": 17, "num_test_normal": 0, "num_test_anomalous": 1, "num_masks": 1}
    assert rows_of(out, version=index_version(index)) == before


def test_an_append_or_an_ingestion_restores_removed_rows(out: Path, source: Path) -> None:
    fingerprint = data_fingerprint(out, "bolt")
    for append in (True, False):
        remove_rows(out, "bolt", ids=["bolt/train/good/003", "bolt/test/crack/000"])
        assert data_fingerprint(out, "bolt") != fingerprint
        ingest(source, out, progress=False, append=append)
        assert data_fingerprint(out, "bolt") == fingerprint
        assert open_store(out).require_commit("bolt")["counts"]["num_masks"] == 2


def test_rows_are_removed_by_content_hash_and_by_site(out: Path, source: Path, tmp_path: Path) -> None:
    content = read_index(out, "bolt")["content_hash"][5].as_py()
    assert remove_rows(out, "bolt", content_hashes=[content]).num_removed == 1
    ingest(make_mvtec(tmp_path / "b/bolt", seed=700), out, progress=False, append=True, site="b")
    report = remove_rows(out, "bolt", site="b")
    assert (report.num_removed, report.num_remaining, report.num_rewritten) == (6, 19, 1)
    assert set(read_index(out, "bolt")["site"].to_pylist()) == {"default"}


def test_values_without_a_row_are_listed_and_nothing_is_removed(out: Path) -> None:
    version = data_version(out, "bolt")
    unknown_ids = [f"bolt/none/{number}" for number in range(8)]
    with pytest.raises(DataError, match=r"ids bolt/none/0, .*bolt/none/4 and 3 more"):
        remove_rows(out, "bolt", ids=[*unknown_ids, "bolt/train/good/003"])
    with pytest.raises(DataError, match="content hashes x;"):
        remove_rows(out, "bolt", content_hashes=["x"])
    with pytest.raises(DataError, match="site elsewhere;"):
        remove_rows(out, "bolt", site="elsewhere")
    with pytest.raises(DataError, match="all of its 20 images"):
        remove_rows(out, "bolt", site="default")
    with pytest.raises(DataError, match="ids, content hashes or a site"):
        remove_rows(out, "bolt")
    with pytest.raises(DataError, match=r"no category 'nut'.*: bolt"):
        remove_rows(out, "nut", ids=["x"])
    assert data_version(out, "bolt") == version


def test_compaction_merges_small_part_files_and_changes_no_row(out: Path, source: Path) -> None:
    for number in range(3):
        save(source / f"train/good/new{number}.png", pixels(900 + number))
        ingest(source, out, progress=False, append=True)
    remove_rows(out, "bolt", ids=["bolt/train/good/004"])
    before, index = rows_of(out), read_index(out, "bolt")
    (report,) = compact(out)
    assert (report.num_before, report.num_after, report.num_stale) == (8, 1, 0)
    assert rows_of(out) == before
    assert read_index(out, "bolt").equals(index)
    assert rows_of(out, version=index_version(index)) == before
    version = data_version(out, "bolt")
    (again,) = compact(out, ["bolt"])
    assert (again.num_before, again.num_after, data_version(out, "bolt")) == (1, 1, version)
    (appended,) = ingest(source, out, progress=False, append=True).categories
    assert (appended.num_added, appended.num_existing) == (1, 22)  # the removed image is new again


def test_compaction_leaves_full_part_files_unchanged(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [entry["num_bytes"] for entry in open_store(out).require_commit("bolt")["files"]]
    monkeypatch.setattr(store, "FILE_BYTES", min(sizes))
    parts = part_names(out)
    (report,) = compact(out)
    assert (report.num_before, report.num_after) == (5, 5)
    assert part_names(out) == parts


def test_compaction_deletes_stale_files_only(out: Path) -> None:
    compact(out)
    old_file = save(out / "category=bolt/part-dead-00000.parquet", b"x")
    new_file = save(out / "category=bolt/part-live-00000.parquet", b"x")
    os.utime(old_file, (1, 1))
    (report,) = compact(out)
    assert (report.num_stale, old_file.exists(), new_file.exists()) == (1, False, True)


# Commands


def test_the_commands_remove_and_compact_change_a_data_set(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("bolt/train/good/001\n\nbolt/train/good/002\n")
    assert main(["data", "remove", str(out), "--category", "bolt", "--ids", str(ids)]) == 0
    assert capsys.readouterr().out == "bolt: 2 images removed, 18 remain; 1 of 5 part files written again\n"
    assert main(["data", "compact", str(out)]) == 0
    assert capsys.readouterr().out == "bolt: 5 part files, now 1; 0 stale files removed\n"


def test_the_command_ingest_has_the_option_append(out: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(source / "train/good/new.png", pixels(900))
    assert main(["ingest", str(source), str(out), "--append"]) == 0
    output = capsys.readouterr().out
    assert "bolt: appended, 18 train" in output
    assert "1 images are new, 20 existed already" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--id", "bolt/nothing"], "ids bolt/nothing"),
        (["--ids", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_the_command_remove_exits_with_1_if_rows_cannot_be_removed(
    out: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "remove", str(out), "--category", "bolt", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "remove", "x", "--category", "bolt"],
        ["data", "remove", "x", "--category", "bolt", "--id", "a", "--site", "b"],
        ["ingest", "x", "y", "--workers", "0"],
        ["ingest", "x", "y", "--workers", "many"],
    ],
)
def test_invalid_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
