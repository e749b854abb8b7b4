"""Versions of a category: a reader keeps its version for a day, even if new versions are published."""

from __future__ import annotations

import json
import os
import shutil
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from made_sources import ingest_quietly, make_mvtec, pixels, save

from focus_ray.data import store
from focus_ray.data.commits import list_referenced_files
from focus_ray.data.read import data_version, decode_rows, index_version, read_index, read_rows, read_test_rows
from focus_ray.errors import DataError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_mvtec(tmp_path / "bolt", num_train=9)


def publish(source: Path, out: Path, change: int | None = None) -> str:
    """Ingests the source, and returns the new version. change: number of an image that is added first."""
    if change is not None:
        save(source / f"train/good/change-{change}.png", pixels(900 + change))
    ingest_quietly(source, out)
    return data_version(out, "bolt")


def age(out: Path, hours: float) -> None:
    """Makes all files of the category older by a number of hours."""
    folder = out / "category=bolt"
    for path in [*folder.glob("_commit.json"), *folder.glob("_commits/*.json")]:
        commit = json.loads(path.read_text())
        for entry in commit["dropped"]:
            entry["at"] = (datetime.fromisoformat(entry["at"]) - timedelta(hours=hours)).isoformat()
        status = path.stat()
        path.write_text(json.dumps(commit))
        os.utime(path, (status.st_atime, status.st_mtime))
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (0, path.stat().st_mtime - 3600 * hours))


def ids(rows: object) -> list[str]:
    return [row["id"] for row in rows]  # type: ignore[attr-defined]


def test_the_index_has_a_version_and_rows_are_read_from_this_version(source: Path, out: Path) -> None:
    first = publish(source, out)
    index = read_index(out, "bolt", split="train")
    assert index_version(index) == first
    (source / "train/good/000.png").unlink()
    second = publish(source, out, 0)
    assert second == index_version(read_index(out, "bolt")) != first
    rows = index["row"].to_numpy()
    assert ids(read_rows(out, "bolt", rows, ["id"], version=first)) == index["id"].to_pylist()
    assert read_index(out, "bolt", "train", version=first).equals(index)
    assert ids(read_rows(out, "bolt", rows, ["id"])) != index["id"].to_pylist()
    (images,) = decode_rows(str(out), "bolt", [int(rows[0])], 8, version=first)
    (current_images,) = decode_rows(str(out), "bolt", [int(rows[0])], 8)
    assert not np.array_equal(images, current_images)


def test_a_reader_continues_while_new_versions_are_published(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_ROW_GROUP_ROWS", 2)
    monkeypatch.setattr(store, "FILE_BYTES", 1)
    publish(source, out)
    index = read_index(out, "bolt")
    rows = read_rows(out, "bolt", index["row"].to_numpy(), ["id"])
    records = iter(read_test_rows(str(out), "bolt"))
    read_ids = [next(rows)["id"]]
    first_record = next(records)["id"]
    for number in range(3):
        publish(source, out, number)
    assert [*read_ids, *ids(rows)] == index["id"].to_pylist()
    assert [first_record, *ids(records)] == read_index(out, "bolt", "test")["id"].to_pylist()


def test_a_replaced_version_is_deleted_a_day_after_its_replacement(source: Path, out: Path) -> None:
    first = publish(source, out)
    age(out, 100)  # the age of the version itself does not count
    second = publish(source, out, 0)
    age(out, 23)
    third = publish(source, out, 1)
    for version, count in ((first, 12), (second, 13), (third, 14)):
        index = read_index(out, "bolt", version=version)
        assert len(list(read_rows(out, "bolt", index["row"].to_numpy(), ["id"], version))) == count
    age(out, 2)
    fourth = publish(source, out, 2)
    for read in (lambda: read_rows(out, "bolt", [0], version=first), lambda: read_index(out, "bolt", version=first)):
        with pytest.raises(DataError, match=rf"no version '{first}': .*{fourth}.*24 hours"):
            read()
    assert [read_index(out, "bolt", version=name).num_rows for name in (second, third, fourth)] == [13, 14, 15]
    commits = [store.open_data_set(out).require_commit("bolt", version) for version in (second, third, fourth)]
    names = {path.name for path in (out / "category=bolt").iterdir() if path.is_file()}
    assert names == set().union(*map(list_referenced_files, commits)) | {"_commit.json"}


def test_an_old_data_set_without_versions_is_readable_and_its_last_version_is_kept(source: Path, out: Path) -> None:
    first = publish(source, out)
    path = out / "category=bolt/_commit.json"
    commit = json.loads(path.read_text())
    del commit["dropped"]
    path.write_text(json.dumps(commit))
    shutil.rmtree(out / "category=bolt/_commits")
    index = read_index(out, "bolt")
    assert (index_version(index), data_version(out, "bolt")) == (first, first)
    assert read_index(out, "bolt", version=first).equals(index)
    publish(source, out, 0)
    assert read_index(out, "bolt", version=first).equals(index)


@pytest.mark.parametrize("version", ["../x", "", "a/b"])
def test_an_invalid_version_name_is_refused(source: Path, out: Path, version: str) -> None:
    publish(source, out)
    with pytest.raises(DataError, match="data_version"):
        read_index(out, "bolt", version=version)
