"""Ingestion in chunks and appends: the data do not depend on the chunks, and no file is decoded twice."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingested import append_quietly, commit_of, ids_of, ingest_quietly, part_names, rows_of
from made_sources import make_folder, make_mvtec, pixels, save, spot

from focus_ray.data import store
from focus_ray.data.commits import list_referenced_files
from focus_ray.data.read import data_fingerprint, data_version, read_index
from focus_ray.data.store import DataSetStore, open_data_set
from focus_ray.errors import DataError
from focus_ray.ingestion import chunks
from focus_ray.ingestion.chunks import map_in_process


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A source of 12 images."""
    return make_mvtec(tmp_path / "bolt", num_train=9)


@pytest.fixture
def out(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of the source, in part files of about two images."""
    monkeypatch.setattr(store, "MAX_ROW_GROUP_ROWS", 2)
    monkeypatch.setattr(store, "FILE_BYTES", 1000)
    ingest_quietly(root, tmp_path / "out")
    return tmp_path / "out"


def make_other_source(tmp_path: Path, number: int = 1, **options: Any) -> Path:
    """Makes another source of the same category, with 6 other images and the same file names."""
    return make_mvtec(tmp_path / f"more{number}/bolt", seed=1000 * number, **options)


def record_first_arguments(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Returns the first argument of each later call of a function of `chunks`."""
    arguments: list[Any] = []
    original = getattr(chunks, name)

    def record(first: Any, *others: Any) -> Any:
        arguments.append(first)
        return original(first, *others)

    monkeypatch.setattr(chunks, name, record)
    return arguments


# Random folders of a few images: duplicates, broken files, masks, and equal stems

File = tuple[str, str, str, int]  # folder, stem, suffix, seed of the pixels; -1 for a broken file

ANY_FILES = st.lists(
    st.tuples(
        st.sampled_from(["train/good", "test/good", "test/crack"]),
        st.sampled_from(["a", "b", "b-", "c"]),
        st.sampled_from([".png", ".bmp"]),
        st.integers(-1, 5),
    ),
    max_size=12,
)


def write_image_files(root: Path, files: Sequence[File]) -> Path:
    save(root / "train/good/always.png", pixels(1000))
    for folder, stem, suffix, seed in files:
        save(root / folder / f"{stem}{suffix}", pixels(seed) if seed >= 0 else b"\x89PNG nothing")
        if folder == "test/crack" and seed % 2:
            save(root / f"ground_truth/crack/{stem}_mask.png", spot((1, 1)))
    return root


@settings(max_examples=15)
@given(files=ANY_FILES, file_bytes=st.sampled_from([1, 1000]))
def test_rows_ids_and_rejects_do_not_depend_on_the_chunks(files: list[File], file_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        root = write_image_files(Path(folder) / "bolt", files)
        whole, chunked = Path(folder) / "whole", Path(folder) / "chunked"
        expected = ingest_quietly(root, whole)
        patch.setattr(store, "FILE_BYTES", file_bytes)
        assert ingest_quietly(root, chunked, run=map_in_process) == expected
        assert rows_of(chunked) == rows_of(whole)
        assert len(set(ids_of(chunked))) == expected.num_rows
        assert commit_of(whole)["source_fingerprint"] == commit_of(chunked)["source_fingerprint"]
        for run in (None, map_in_process):
            assert ingest_quietly(root, chunked, run=run).categories[0].status == "unchanged"
        assert [row["id"] for row in rows_of(chunked)] == read_index(chunked, "bolt")["id"].to_pylist()
        assert open_data_set(chunked).has_all_files("bolt", commit_of(chunked))


def test_only_part_files_with_a_duplicate_are_written_again(
    root: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(root / "train/good/004.png", root / "train/good/copy.png")
    rewrites = record_first_arguments(monkeypatch, "rewrite_part_file")
    ids = ids_of(out)
    ingest_quietly(root, out)
    assert len(rewrites) == 1
    assert ids_of(out) == ids == sorted(ids)
    assert len(part_names(out)) > 4


def test_a_source_with_unchanged_stamps_is_not_read_again(
    root: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", None)
        assert ingest_quietly(root, out, run=map_in_process).categories[0].status == "unchanged"
    save(root / "test/crack/001.png", pixels(77))
    assert ingest_quietly(root, out, run=map_in_process).categories[0].status == "written"


# Appends

# A test image has only one name, or a single ingestion would count it twice. The same pixels are always good or always cracked.
TRAIN = st.tuples(st.sampled_from(["train/good"]), st.sampled_from("ab"), st.integers(0, 6))
TEST = st.tuples(st.sampled_from(["test/good"]), st.just("t"), st.integers(0, 6))
CRACK = st.tuples(st.sampled_from(["test/crack"]), st.just("t"), st.integers(20, 23))
CONSISTENT_FILES = st.lists(
    st.one_of(TRAIN, TEST, CRACK).map(lambda item: (item[0], f"{item[2]}{item[1]}", ".png", item[2])), max_size=8
)


@settings(max_examples=15)
@given(first=CONSISTENT_FILES, second=CONSISTENT_FILES)
def test_an_append_gives_the_data_of_one_ingestion_of_both_folders(first: list[File], second: list[File]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ingest_quietly(write_image_files(root / "a/bolt", first), root / "added")
        (added,) = append_quietly(write_image_files(root / "b/bolt", second), root / "added").categories
        (once,) = ingest_quietly(write_image_files(root / "union/bolt", [*first, *second]), root / "once").categories
        assert data_fingerprint(root / "added", "bolt") == data_fingerprint(root / "once", "bolt")
        assert added.num_rows == once.num_rows == len(set(ids_of(root / "added")))
        assert (added.num_masks, added.num_train) == (once.num_masks, once.num_train)
        (again,) = append_quietly(root / "b/bolt", root / "added").categories
        assert (again.status, again.num_added) == ("unchanged", 0)


def test_an_append_rewrites_no_part_file_and_decodes_only_new_images(
    root: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = record_first_arguments(monkeypatch, "check_sample")
    before = commit_of(out)["files"]
    path = save(root / "train/good/new.png", pixels(999))
    (report,) = append_quietly(root, out).categories
    assert (report.status, report.num_added, report.num_existing, report.num_rows) == ("appended", 1, 12, 13)
    assert commit_of(out)["files"][:-1] == before
    assert ids_of(out)[-1] == "train/good/new"
    assert rows_of(out)[-1]["image"] == path.read_bytes()
    version = data_version(out, "bolt")
    (again,) = append_quietly(root, out).categories
    assert (again.status, again.num_existing, data_version(out, "bolt")) == ("unchanged", 13, version)
    assert [sample.path for sample in decoded] == [path]


def test_files_with_the_same_names_from_two_sites_have_different_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrites = record_first_arguments(monkeypatch, "rewrite_part_file")
    reports = [append_quietly(make_other_source(tmp_path, n), tmp_path / "out", site=f"site{n}") for n in (1, 2)]
    assert [report.categories[0].status for report in reports] == ["written", "appended"]
    index = read_index(tmp_path / "out", "bolt")
    assert index["site"].to_pylist() == ["site1"] * 6 + ["site2"] * 6
    names, hashes = ids_of(tmp_path / "out"), index["content_hash"].to_pylist()
    assert names[6:] == [f"{name}~{content[:12]}" for name, content in zip(names[:6], hashes[6:], strict=True)]
    assert rewrites == []


def test_a_new_test_image_removes_its_copy_from_the_training_data(tmp_path: Path, root: Path, out: Path) -> None:
    before = part_names(out)
    other = make_mvtec(tmp_path / "more/bolt", num_train=1)  # images that exist already
    shutil.copy(root / "train/good/004.png", other / "test/good/004.png")
    (report,) = append_quietly(other, out).categories
    assert (report.num_added, report.num_train, report.num_test_normal, report.num_rows) == (1, 8, 2, 12)
    assert "train/good/004" not in ids_of(out)
    assert "test/good/004" in ids_of(out)
    assert len(set(before) - set(part_names(out))) == 1
    assert len(rows_of(out)) == 12


def test_images_that_contradict_existing_rows_or_leak_into_them_are_rejected(
    tmp_path: Path, root: Path, out: Path
) -> None:
    before = rows_of(out)
    other = make_other_source(tmp_path)
    shutil.copy(root / "train/good/000.png", other / "test/crack/contra.png")
    shutil.copy(root / "test/good/000.png", other / "train/good/leak.png")
    report = append_quietly(other, out)
    rejects = {item.path: item for item in report.rejects}
    assert {path: item.reason for path, item in rejects.items()} == {
        "test/crack/contra.png": "contradictory_label",
        "train/good/leak.png": "duplicate_across_splits",
    }
    assert "row bolt/train/good/000" in rejects["test/crack/contra.png"].detail
    assert "row bolt/test/good/000" in rejects["train/good/leak.png"].detail
    assert rows_of(out)[: len(before)] == before
    assert report.exit_status == 3
    assert open_data_set(out).read_reject_list("bolt") == list(report.rejects)


def test_a_drawn_split_does_not_change_when_the_folder_grows(tmp_path: Path) -> None:
    root, out = make_folder(tmp_path / "bolt"), tmp_path / "out"
    ingest_quietly(root, out)
    split = {row["content_hash"]: row["split"] for row in rows_of(out)}
    for number in range(20):
        save(root / f"good/more{number}.png", pixels(300 + number))
    report = append_quietly(root, out)
    assert (report.categories[0].num_added, report.rejects) == (20, ())
    assert split.items() <= {row["content_hash"]: row["split"] for row in rows_of(out)}.items()


def test_an_append_without_usable_images_is_an_error(tmp_path: Path, out: Path) -> None:
    version = data_version(out, "bolt")
    save(tmp_path / "more/bolt/train/good/0.png", b"")
    with pytest.raises(DataError, match=r"bolt \(1 rejected: train/good/0.png"):
        append_quietly(tmp_path / "more/bolt", out)
    assert data_version(out, "bolt") == version


def test_an_append_to_an_old_data_set_without_source_manifest_and_index(root: Path, out: Path) -> None:
    path = out / "category=bolt/_commit.json"
    commit = json.loads(path.read_text())
    for name in ("index", "sources", "dropped"):
        del commit[name]
    path.write_text(json.dumps(commit))
    save(root / "train/good/new.png", pixels(999))
    (report,) = append_quietly(root, out).categories
    assert (report.num_added, report.num_existing, len(rows_of(out))) == (1, 12, 13)


def test_ingesting_the_source_again_removes_appended_images(tmp_path: Path, root: Path, out: Path) -> None:
    fingerprint = data_fingerprint(out, "bolt")
    append_quietly(make_other_source(tmp_path), out)
    assert ingest_quietly(root, out).categories[0].status == "written"
    assert data_fingerprint(out, "bolt") == fingerprint


# Concurrent publishers, and publishers that die


def run_concurrently(monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], object]) -> None:
    """Runs each action in a thread. The first publication in each thread waits until all have read the same version."""
    barrier, state, original = (
        threading.Barrier(len(actions), timeout=60),
        threading.local(),
        DataSetStore._write_version_files,
    )

    def prepare(self: DataSetStore, *arguments: Any) -> Any:
        if not getattr(state, "has_waited", False):
            state.has_waited = True
            barrier.wait()
        return original(self, *arguments)

    monkeypatch.setattr(DataSetStore, "_write_version_files", prepare)
    with ThreadPoolExecutor(len(actions)) as pool:
        for future in [pool.submit(action) for action in actions]:
            future.result()


def test_concurrent_appends_are_all_published(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [make_other_source(tmp_path, number) for number in (1, 2, 3)]
    run_concurrently(monkeypatch, *(partial(append_quietly, source, out) for source in sources))
    assert len(rows_of(out)) == len(set(ids_of(out))) == 30
    names = list_referenced_files(commit_of(out)) | {entry["name"] for entry in commit_of(out)["dropped"]}
    assert {path.name for path in (out / "category=bolt").iterdir() if path.is_file()} == {"_commit.json", *names}
    versions = [path.stem for path in (out / "category=bolt/_commits").iterdir()]
    assert sorted(len(rows_of(out, version=name)) for name in versions) == [12, 18, 24, 30]


def test_a_concurrent_replacement_and_append_give_the_result_of_one_order(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added, new = make_other_source(tmp_path), make_other_source(tmp_path, 2, num_train=5)
    run_concurrently(monkeypatch, partial(append_quietly, added, out), partial(ingest_quietly, new, out))
    assert len(rows_of(out)) in (8, 14)  # the append first and then the replacement, or the other way round


def test_a_claimed_version_of_a_dead_publisher_is_made_current(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: DataSetStore, commit: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DataSetStore, "_set_current_version", die)
        with pytest.raises(KeyboardInterrupt):
            append_quietly(make_other_source(tmp_path), out)
    assert len(rows_of(out)) == 12
    append_quietly(make_other_source(tmp_path, 2), out)
    assert len(rows_of(out)) == 24


def test_a_data_set_works_on_a_disk_without_hard_links(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    append_quietly(make_other_source(tmp_path), out)
    assert len(rows_of(out)) == 18


def test_a_run_that_dies_between_chunks_leaves_the_old_data_and_can_be_repeated(root: Path, out: Path) -> None:
    old, folder = rows_of(out), out / "category=bolt"
    save(root / "train/good/new.png", pixels(999))

    def die_after_three(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        yield from map_in_process(function, items[:3])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest_quietly(root, out, run=die_after_three)
    assert rows_of(out) == old
    leftovers = {path.name for path in folder.glob("part-*")} - list_referenced_files(commit_of(out))
    assert len(leftovers) == 3
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert ingest_quietly(root, out).categories[0].status == "written"
    assert len(rows_of(out)) == len(set(ids_of(out))) == 13
    assert leftovers.isdisjoint(path.name for path in folder.iterdir())


def test_no_version_with_a_missing_part_file_is_published(root: Path, out: Path) -> None:
    version, folder = data_version(out, "bolt"), out / "category=bolt"
    (missing, *others) = sorted(path.name for path in folder.glob("part-*"))
    (folder / missing).unlink()
    save(root / "train/good/new.png", pixels(999))
    with pytest.raises(DataError, match=missing):
        append_quietly(root, out)
    assert data_version(out, "bolt") == version
    assert sorted(path.name for path in folder.glob("part-*")) == others
    ingest_quietly(root, out)
    assert len(rows_of(out)) == 13
