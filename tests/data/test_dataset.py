"""The Parquet data set: atomic publication, readers and the index."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_sources import ingest_quietly, make_mvtec, pixels, rows_of, save, spot
from places import REPOSITORY
from small_set import small_config

from focus_ray.data import store
from focus_ray.data.read import data_fingerprint, list_categories, read_index, read_rows
from focus_ray.data.schema import INDEX_COLUMNS, SCHEMA
from focus_ray.errors import DataError
from focus_ray.fitting.split import compute_split_plan, compute_split_rule
from focus_ray.training.streams import read_ray_dataset


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_mvtec(tmp_path / "bolt")


# Publication


def test_pyarrow_reads_the_root_whose_part_files_have_the_schema_version_and_uncompressed_images(
    tmp_path: Path, out: Path
) -> None:
    for name in ("bolt", "nut"):
        make_mvtec(tmp_path / "source" / name, seed=ord(name[0]))
    ingest_quietly(tmp_path / "source", out)
    assert sorted(pq.read_table(out, partitioning=None)["category"].to_pylist()) == ["bolt"] * 6 + ["nut"] * 6
    (part,) = (out / "category=bolt").glob("part-*.parquet")
    file = pq.ParquetFile(part)
    assert file.schema_arrow.metadata[b"focus_ray.schema_version"] == b"1"
    assert file.metadata.row_group(0).column(SCHEMA.names.index("image")).compression == "UNCOMPRESSED"


def test_an_unchanged_source_changes_no_file(source: Path, out: Path) -> None:
    save(source / "train/good/x.png", b"")
    first = ingest_quietly(source, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    second = ingest_quietly(source, out)
    assert [item.status for item in second.categories] == ["unchanged"]
    assert (second.exit_status, second.rejects) == (3, first.rejects)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda source: save(source / "train/good/000.png", pixels(999)),
        lambda source: save(source / "ground_truth/crack/000_mask.png", spot((5, 5))),
        lambda source: (source / "train/good/000.png").rename(source / "train/good/zzz.png"),
        None,
    ],
    ids=["image", "mask", "name", "site"],
)
def test_every_change_of_the_source_is_published(source: Path, out: Path, change: Any) -> None:
    ingest_quietly(source, out)
    if change:
        change(source)
    report = ingest_quietly(source, out, site="default" if change else "other")
    assert [item.status for item in report.categories] == ["written"]


KILLED_RUNS = """
import os, sys
from focus_ray.data import store
from focus_ray.ingestion import ingest
source, out = sys.argv[1:]
def die(*args):
    os._exit(9)
def kill_run_at(moment):
    write, collect = store.write_file, store._collect_row_groups
    def write_until(filesystem, path, data):
        die() if f"/_{moment}" in path else write(filesystem, path, data)
    def collect_one_and_die(rows):
        yield next(collect(rows))
        die()
    if moment == "rejects":
        store.DataSetStore.write_reject_list = die
    elif moment == "part":
        store._collect_row_groups = collect_one_and_die
    else:
        store.write_file = write_until
    ingest.ingest(source, f"{out}/{moment}", progress=False)
store.DataSetStore.check_writable = lambda self: None
for moment in ("part", "index", "rejects", "commit"):
    if not os.fork():
        kill_run_at(moment)
    print(moment, os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_run_that_is_killed_while_publishing_leaves_the_old_data(source: Path, out: Path) -> None:
    moments = ("part", "index", "rejects", "commit")
    for moment in moments:
        ingest_quietly(source, out / moment)
    old = rows_of(out / "part")
    save(source / "train/good/new.png", pixels(999))
    command, environment = (
        [sys.executable, "-c", KILLED_RUNS, source, out],
        {**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert output.split("\n")[:-1] == [f"{moment} 9" for moment in moments]
    for moment in moments:
        folder = out / moment / "category=bolt"
        assert len(list(folder.glob("part-*"))) == 2
        assert len(list(folder.glob("_index-*"))) == 1 + (moment in ("rejects", "commit"))
        assert rows_of(out / moment) == old
        assert ingest_quietly(source, out / moment).categories[0].status == "written"
        assert read_index(out / moment, "bolt").num_rows == 7


@pytest.mark.parametrize("name", ["part-{}-00000.parquet", "_index-{}.parquet"])
def test_leftover_files_are_deleted_after_a_day_and_not_before(source: Path, out: Path, name: str) -> None:
    old_file, new_file = (save(out / "category=bolt" / name.format(token), b"x") for token in ("dead", "live"))
    os.utime(old_file, (1, 1))
    ingest_quietly(source, out)
    assert (old_file.exists(), new_file.exists()) == (False, True)
    assert read_index(out, "bolt").num_rows == 6  # a file that no commit names adds no rows


def test_a_destination_that_is_not_writable_is_reported(source: Path, tmp_path: Path) -> None:
    blocked = save(tmp_path / "file", b"")
    with pytest.raises(DataError, match=str(blocked)):
        ingest_quietly(source, blocked / "out")


# Readers


def edit_commit(root: Path, **changes: Any) -> dict[str, Any]:
    """Changes entries of the commit of the category, removes those with the value None, and returns the old commit."""
    path = root / "category=bolt/_commit.json"
    commit = json.loads(path.read_text())
    changed = {name: value for name, value in {**commit, **changes}.items() if value is not None}
    path.write_text(json.dumps(changed))
    return dict(commit)


def remove_index(root: Path) -> None:
    """Turns the category into one of an old program, whose commit names no index."""
    (root / "category=bolt" / edit_commit(root, index=None)["index"]["name"]).unlink()


@pytest.fixture
def small_groups(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of 40 rows, in row groups of 7 rows and part files of 2 row groups."""
    monkeypatch.setattr(store, "MAX_ROW_GROUP_ROWS", 7)
    source = make_mvtec(tmp_path / "bolt", num_train=37)
    monkeypatch.setattr(store, "FILE_BYTES", 13.5 * (source / "train/good/000.png").stat().st_size)
    ingest_quietly(source, out)
    return out


def test_any_ascending_row_numbers_are_read_across_files(small_groups: Path) -> None:
    assert len(list((small_groups / "category=bolt").glob("part-*"))) == 3
    index = read_index(small_groups, "bolt")
    names = index["id"].to_pylist()
    assert index["row"].to_pylist() == list(range(40))
    assert names == sorted(names)

    @settings(max_examples=25, deadline=None)
    @given(st.sets(st.integers(0, 39)))
    def check(numbers: set[int]) -> None:
        rows = read_rows(small_groups, "bolt", sorted(numbers), ["id"])
        assert [row["id"] for row in rows] == [names[number] for number in sorted(numbers)]

    check()


def test_only_the_row_groups_of_the_requested_rows_are_read(
    small_groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *at, **how: groups.append(at[1]) or read(*at, **how))
    assert len(list(read_rows(small_groups, "bolt", [0, 3, 15]))) == 3
    assert groups == [0, 0]  # the first row group of file 0 and of file 1


@pytest.mark.parametrize("numbers", [[3, 1], [1, 1], [-1], [40]])
def test_unreadable_rows_are_refused_at_the_call(small_groups: Path, numbers: list[int]) -> None:
    with pytest.raises(DataError, match=r"ascending" if len(numbers) == 2 else r"40 rows"):
        read_rows(small_groups, "bolt", numbers, ["id"])
    with pytest.raises(DataError, match=r"pixels.*: id, "):
        read_rows(small_groups, "bolt", [1], ["pixels"])


def test_a_missing_category_or_data_set_is_named_with_the_available_ones(source: Path, out: Path) -> None:
    for read in (list_categories, lambda uri: read_index(uri, "bolt"), lambda uri: data_fingerprint(uri, "bolt")):
        with pytest.raises(DataError, match=f"{out}: no data set"):
            read(out)
    ingest_quietly(source, out)
    with pytest.raises(DataError, match=r"'nut'.*: bolt"):
        read_index(out, "nut")
    with pytest.raises(DataError, match="split='val'"):
        read_index(out, "bolt", "val")


@pytest.mark.parametrize("changes", [{"schema_version": 2}, {"files": None}, {"index": {"name": "_index-x.parquet"}}])
def test_a_damaged_commit_or_another_schema_version_is_refused(
    source: Path, out: Path, changes: dict[str, Any]
) -> None:
    ingest_quietly(source, out)
    edit_commit(out, **changes)
    with pytest.raises(DataError, match=r"schema version 2, this program reads 1|'files'|'sha256'"):
        read_index(out, "bolt")


def test_the_fingerprint_depends_on_the_content_but_not_on_names_or_encoding(source: Path, tmp_path: Path) -> None:
    ingest_quietly(source, tmp_path / "a")
    (source / "train/good/000.png").unlink()
    save(source / "train/good/other.bmp", pixels(0))
    ingest_quietly(source, tmp_path / "b")
    save(source / "train/good/extra.png", pixels(999))
    ingest_quietly(source, tmp_path / "c")
    first, same, other = (data_fingerprint(tmp_path / name, "bolt") for name in "abc")
    assert first == same != other


# The index


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_the_index_equals_the_columns_of_the_part_files(small_groups: Path, split: str | None) -> None:
    table, fingerprint = read_index(small_groups, "bolt", split), data_fingerprint(small_groups, "bolt")
    rows = list(read_rows(small_groups, "bolt", table["row"].to_numpy(), INDEX_COLUMNS))
    assert table.column_names == [*INDEX_COLUMNS, "row"]
    assert table.select(INDEX_COLUMNS).to_pylist() == rows
    assert {row["split"] for row in rows} == ({split} if split else {"train", "test"})
    remove_index(small_groups)
    parts = read_index(small_groups, "bolt", split)
    assert parts.schema.equals(table.schema, check_metadata=True)
    assert parts.equals(table)
    assert data_fingerprint(small_groups, "bolt") == fingerprint


def test_a_plan_reads_the_commit_and_the_index_once_and_no_part_file(
    small_groups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(str(small_groups), tmp_path)
    split, opened = compute_split_rule(config, "bolt"), []
    read, open_file_for_reading = store.read_file, store.open_file_for_reading
    monkeypatch.setattr(store, "read_file", lambda *at: opened.append(at[1]) or read(*at))
    monkeypatch.setattr(store, "open_file_for_reading", lambda *at: opened.append(at[1]) or open_file_for_reading(*at))
    plan = compute_split_plan(config, "bolt")
    assert [name[:6] for name in map(os.path.basename, opened)] == ["_commi", "_index"]
    assert plan.fingerprint == split.fingerprint == data_fingerprint(small_groups, "bolt")
    remove_index(small_groups)
    assert compute_split_rule(config, "bolt") == split


def test_part_files_are_read_in_parallel_and_keep_their_order(
    small_groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_index(small_groups, "bolt")
    remove_index(small_groups)
    read, barrier = pq.ParquetFile.read, threading.Barrier(3, timeout=60)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *at, **how: barrier.wait() >= 0 and read(*at, **how))
    assert read_index(small_groups, "bolt").equals(expected)


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("_index-*", None),
        ("_index-*", lambda data: data[:-1]),
        ("_index-*", lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:]),
        ("part-*", None),
        ("part-*", lambda data: data[:-1]),
    ],
)
def test_a_damaged_file_is_named_and_restored_by_ingesting_again(
    source: Path, out: Path, pattern: str, damage: Any
) -> None:
    ingest_quietly(source, out)
    expected = rows_of(out)
    (path,) = (out / "category=bolt").glob(pattern)
    data = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(data))
    with pytest.raises(DataError, match=path.name):
        rows_of(out)
    assert ingest_quietly(source, out).categories[0].status == "written"
    assert rows_of(out) == expected


def test_an_index_that_cannot_be_written_leaves_the_old_data_and_no_files(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest_quietly(source, out)
    old, before = rows_of(out), sorted(out.rglob("*"))
    save(source / "train/good/new.png", pixels(999))

    def full(filesystem: object, path: str, data: bytes) -> None:
        if "/_index-" in path:
            raise OSError("no space left")

    monkeypatch.setattr(store, "write_file", full)
    monkeypatch.setattr(store.DataSetStore, "check_writable", lambda self: None)
    with pytest.raises(DataError, match=r"_index-.*no space left"):
        ingest_quietly(source, out)
    assert sorted(out.rglob("*")) == before
    assert rows_of(out) == old


@pytest.mark.ray
def test_ray_reads_exactly_the_committed_rows(small_groups: Path, ray_cluster: None) -> None:
    save(small_groups / "category=bolt/part-stray-00000.parquet", b"not even Parquet")
    expected = rows_of(small_groups)
    assert sorted(read_ray_dataset(small_groups, "bolt").take_all(), key=lambda row: row["id"]) == expected
    test_rows = read_ray_dataset(small_groups, "bolt", "test", ["id", "label"]).take_all()
    expected = [{"id": row["id"], "label": row["label"]} for row in expected if row["split"] == "test"]
    assert sorted(test_rows, key=lambda row: row["id"]) == expected
