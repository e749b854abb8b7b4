"""Versions of a category: a reader keeps the one that it began with for a day, whatever is published meanwhile."""

from __future__ import annotations

import json
import os
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from made_sources import make_mvtec, pixels, save

from focus_ray.data import store
from focus_ray.data.commits import referenced_files
from focus_ray.data.ingest import ingest
from focus_ray.data.read import data_version, decode_rows, index_version, iter_test_records, read_index, read_rows
from focus_ray.errors import DataError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_mvtec(tmp_path / "bolt", num_train=9)


def publish(source: Path, out: Path, change: int | None = None) -> str:
    """Ingests, with one more image if told. Returns: the version."""
    if change is not None:
        save(source / f"train/good/change-{change}.png", pixels(900 + change))
    ingest(source, out, progress=False)
    return data_version(out, "bolt")


def age(out: Path, hours: float) -> None:
    """Makes everything in the category that much older."""
    folder = out / "category=bolt"
    for path in [*folder.glob("_commit.json"), *folder.glob("_commits/*.json")]:
        commit = json.loads(path.read_text())
        for item in commit["dropped"]:
            item["at"] = (datetime.fromisoformat(item["at"]) - timedelta(hours=hours)).isoformat()
        stat = path.stat()
        path.write_text(json.dumps(commit))
        set_time(path, stat.st_mtime)
    for path in folder.rglob("*"):
        if path.is_file():
            set_time(path, path.stat().st_mtime - 3600 * hours)


def set_time(path: Path, when: float) -> None:
    os.utime(path, (when, when))


def ids(rows: object) -> list[str]:
    return [row["id"] for row in rows]  # type: ignore[attr-defined]


def test_the_index_tells_its_version_and_rows_are_read_of_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
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
    (others,) = decode_rows(str(out), "bolt", [int(rows[0])], 8)
    assert not np.array_equal(images, others)


def test_a_reader_in_mid_pass_goes_on_while_others_publish(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(store, "MAX_ROW_GROUP_ROWS", 2)
    monkeypatch.setattr(store, "FILE_BYTES", 1)
    publish(source, out)
    index = read_index(out, "bolt")
    passing = read_rows(out, "bolt", index["row"].to_numpy(), ["id"])
    records = iter(iter_test_records(str(out), "bolt"))
    seen = [next(passing)["id"]]
    first_record = next(records)["id"]
    for number in range(3):
        publish(source, out, number)
    assert [*seen, *ids(passing)] == index["id"].to_pylist()
    assert [first_record, *ids(records)] == read_index(out, "bolt", "test")["id"].to_pylist()


def test_a_replaced_version_goes_with_its_files_a_day_after_it_was_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = publish(source, out)
    age(out, 100)  # however old it is itself
    second = publish(source, out, 0)
    age(out, 23)
    third = publish(source, out, 1)
    for version, count in ((first, 12), (second, 13), (third, 14)):
        index = read_index(out, "bolt", version=version)
        assert len(list(read_rows(out, "bolt", index["row"].to_numpy(), ["id"], version))) == count
    age(out, 2)
    fourth = publish(source, out, 2)
    with pytest.raises(DataError, match=rf"no version '{first}': it is now {fourth}.*24 hours.*start over"):
        read_rows(out, "bolt", [0], version=first)
    with pytest.raises(DataError, match="no version"):
        read_index(out, "bolt", version=first)
    assert [read_index(out, "bolt", version=name).num_rows for name in (second, third, fourth)] == [13, 14, 15]
    names = {"_commit.json"}
    for version in (second, third, fourth):
        commit = store.open_store(out).require_commit("bolt", version)
        names |= referenced_files(commit)
    assert {path.name for path in (out / "category=bolt").iterdir() if path.is_file()} == names


def test_a_set_that_kept_no_versions_is_read_and_keeps_its_last_one(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = publish(source, out)
    folder = out / "category=bolt"
    commit = json.loads((folder / "_commit.json").read_text())
    del commit["dropped"]
    (folder / "_commit.json").write_text(json.dumps(commit))
    for path in (folder / "_commits").iterdir():
        path.unlink()
    index = read_index(out, "bolt")
    assert (index_version(index), data_version(out, "bolt")) == (first, first)
    assert read_index(out, "bolt", version=first).equals(index)
    publish(source, out, 0)
    assert read_index(out, "bolt", version=first).equals(index)


@pytest.mark.parametrize("version", ["../x", "", "a/b"])
def test_what_is_no_versions_name_is_refused(source: Path, tmp_path: Path, version: str) -> None:
    publish(source, tmp_path / "out")
    with pytest.raises(DataError, match="expected one that `data_version` gave"):
        read_index(tmp_path / "out", "bolt", version=version)
