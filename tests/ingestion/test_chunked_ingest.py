"""Ingestion in chunks and appends: the data do not depend on the chunks, and no file is decoded twice."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_sources import make_folder, make_mvtec, pixels, save, spot

from focus_ray.data import store
from focus_ray.data.commits import referenced_files
from focus_ray.data.read import data_fingerprint, data_version, read_index, read_rows
from focus_ray.data.schema import SCHEMA
from focus_ray.data.store import Store, open_store
from focus_ray.errors import DataError
from focus_ray.ingestion import chunks
from focus_ray.ingestion.chunks import map_in_process
from focus_ray.ingestion.ingest import ingest
from focus_ray.ingestion.report import IngestReport


def ingest_quietly(source: Path, out: Path, **options: Any) -> IngestReport:
    return ingest(source, out, progress=False, **options)


def append_quietly(source: Path, out: Path, **options: Any) -> IngestReport:
    return ingest_quietly(source, out, append=True, **options)


def rows_of(root: Path, category: str = "bolt", version: str | None = None) -> list[dict[str, Any]]:
    numbers = read_index(root, category, version=version)["row"].to_numpy()
    return list(read_rows(root, category, numbers, SCHEMA.names, version))


def ids_of(root: Path) -> list[str]:
    return [name.removeprefix("bolt/") for name in read_index(root, "bolt")["id"].to_pylist()]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Part files of about two images."""
    monkeypatch.setattr(store, "MAX_ROW_GROUP_ROWS", 2)
    monkeypatch.setattr(store, "FILE_BYTES", 1000)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that are decoded, filled during the test."""
    names: list[str] = []
    original = chunks.check_sample

    def record_and_check(sample: Any, *arguments: Any) -> Any:
        names.append(sample.path.name)
        return original(sample, *arguments)

    monkeypatch.setattr(chunks, "check_sample", record_and_check)
    return names


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


def write_files(root: Path, files: Sequence[File], masks: bool = True) -> Path:
    save(root / "train/good/always.png", pixels(1000))
    for folder, stem, suffix, seed in files:
        save(root / folder / f"{stem}{suffix}", pixels(seed) if seed >= 0 else b"\x89PNG nothing")
        if masks and folder == "test/crack" and seed % 2:
            save(root / f"ground_truth/crack/{stem}_mask.png", spot((1, 1)))
    return root


@settings(max_examples=40)
@given(files=ANY_FILES, file_bytes=st.sampled_from([1, 1000, 1 << 20]))
def test_rows_ids_and_rejects_do_not_depend_on_the_chunks(files: list[File], file_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        root = write_files(Path(folder) / "bolt", files)
        whole, chunked = Path(folder) / "whole", Path(folder) / "chunked"
        expected = ingest_quietly(root, whole)
        patch.setattr(store, "FILE_BYTES", file_bytes)
        assert ingest_quietly(root, chunked, run=map_in_process) == expected
        assert sorted(rows_of(chunked), key=lambda row: row["id"]) == rows_of(whole)
        commits = [open_store(out).require_commit("bolt") for out in (whole, chunked)]
        assert commits[0]["source_fingerprint"] == commits[1]["source_fingerprint"]
        assert ingest_quietly(root, chunked).categories[0].status == "unchanged"
        assert ingest_quietly(root, whole, run=map_in_process).categories[0].status == "unchanged"
        index = read_index(chunked, "bolt")
        assert [row["id"] for row in rows_of(chunked)] == index["id"].to_pylist()
        assert store.open_store(chunked).is_complete("bolt", commits[1])


def test_only_part_files_with_a_duplicate_are_written_again(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_mvtec(tmp_path / "bolt", num_train=9)
    shutil.copy(root / "train/good/004.png", root / "train/good/copy.png")
    rewritten: list[str] = []
    original = chunks.rewrite_part

    def record_and_rewrite(rewrite: chunks.PartRewrite) -> Any:
        rewritten.append(rewrite.entry["name"])
        return original(rewrite)

    monkeypatch.setattr(chunks, "rewrite_part", record_and_rewrite)
    ingest_quietly(root, tmp_path / "out", run=map_in_process)
    assert len(rewritten) == 1
    assert ids_of(tmp_path / "out") == sorted(ids_of(tmp_path / "out"))
    assert len(open_store(tmp_path / "out").require_commit("bolt")["files"]) > 4


# Appends

# A test image has only one name, or a single ingestion would count it twice. The same pixels are always good or always cracked.
TRAIN = st.tuples(st.sampled_from(["train/good"]), st.sampled_from("ab"), st.integers(0, 6))
TEST = st.tuples(st.sampled_from(["test/good"]), st.just("t"), st.integers(0, 6))
CRACK = st.tuples(st.sampled_from(["test/crack"]), st.just("t"), st.integers(20, 23))
CONSISTENT_FILES = st.lists(
    st.one_of(TRAIN, TEST, CRACK).map(lambda item: (item[0], f"{item[2]}{item[1]}", ".png", item[2])), max_size=8
)


@settings(max_examples=40)
@given(first=CONSISTENT_FILES, second=CONSISTENT_FILES)
def test_an_append_gives_the_data_of_one_ingestion_of_both_folders(first: list[File], second: list[File]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        a, b, union = root / "a/bolt", root / "b/bolt", root / "union/bolt"
        ingest_quietly(write_files(a, first), root / "added")
        added = append_quietly(write_files(b, second), root / "added")
        write_files(write_files(union, first).parent / "bolt", second)
        report = ingest_quietly(union, root / "once")
        assert data_fingerprint(root / "added", "bolt") == data_fingerprint(root / "once", "bolt")
        (category,), (expected,) = added.categories, report.categories
        assert category.num_rows == expected.num_rows == len(rows_of(root / "added"))
        assert (category.num_masks, category.num_train) == (expected.num_masks, expected.num_train)
        assert len(set(ids_of(root / "added"))) == category.num_rows
        (again,) = append_quietly(b, root / "added").categories
        assert (again.status, again.num_added) == ("unchanged", 0)


def test_an_append_rewrites_no_part_file_and_decodes_only_new_images(
    tmp_path: Path, small_parts: None, decoded: list[str]
) -> None:
    root, out = make_mvtec(tmp_path / "bolt", num_train=9), tmp_path / "out"
    ingest_quietly(root, out)
    before = open_store(out).require_commit("bolt")
    save(root / "train/good/new.png", pixels(999))
    (report,) = append_quietly(root, out).categories
    after = open_store(out).require_commit("bolt")
    assert (report.status, report.num_added, report.num_existing, report.num_rows) == ("appended", 1, 12, 13)
    assert decoded == ["new.png"]
    assert after["files"][: len(before["files"])] == before["files"]
    assert len(after["files"]) == len(before["files"]) + 1
    assert ids_of(out)[-1] == "train/good/new"
    assert rows_of(out)[-1]["image"] == (root / "train/good/new.png").read_bytes()
    version = data_version(out, "bolt")
    (again,) = append_quietly(root, out).categories
    assert (again.status, again.num_existing, data_version(out, "bolt"), decoded) == (
        "unchanged",
        13,
        version,
        ["new.png"],
    )
    assert "0 images are new, 13 existed already" in str(append_quietly(root, out))


def test_an_append_to_an_empty_data_set_is_an_ingestion(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    assert append_quietly(root, tmp_path / "out").categories[0].status == "written"
    ingest_quietly(root, tmp_path / "other")
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "other")


def test_files_with_the_same_names_from_two_sites_have_different_ids(tmp_path: Path) -> None:
    for site, seed in (("a", 0), ("b", 500)):
        append_quietly(make_mvtec(tmp_path / site / "bolt", seed=seed), tmp_path / "out", site=site)
    index = read_index(tmp_path / "out", "bolt")
    assert index["site"].to_pylist() == ["a"] * 6 + ["b"] * 6
    names = ids_of(tmp_path / "out")
    hashes = index["content_hash"].to_pylist()
    assert names[6:] == [f"{name}~{content[:12]}" for name, content in zip(names[:6], hashes[6:], strict=True)]
    assert append_quietly(tmp_path / "b/bolt", tmp_path / "out").categories[0].status == "unchanged"


def test_a_new_test_image_removes_its_copy_from_the_training_data(tmp_path: Path, small_parts: None) -> None:
    root, out = make_mvtec(tmp_path / "bolt", num_train=9), tmp_path / "out"
    ingest_quietly(root, out)
    before = open_store(out).require_commit("bolt")
    other = make_mvtec(tmp_path / "more/bolt", num_train=1)
    shutil.copy(root / "train/good/004.png", other / "test/good/004.png")
    (report,) = append_quietly(other, out).categories
    after = open_store(out).require_commit("bolt")
    assert (report.num_added, report.num_train, report.num_test_normal, report.num_rows) == (1, 8, 2, 12)
    assert "train/good/004" not in ids_of(out)
    assert "test/good/004" in ids_of(out)
    unchanged = [entry for entry in before["files"] if entry in after["files"]]
    assert len(unchanged) == len(before["files"]) - 1
    assert len(rows_of(out)) == 12


def test_images_that_contradict_existing_rows_or_leak_into_them_are_rejected(tmp_path: Path) -> None:
    root, out = make_mvtec(tmp_path / "bolt"), tmp_path / "out"
    ingest_quietly(root, out)
    before = rows_of(out)
    other = make_mvtec(tmp_path / "more/bolt", seed=500)
    shutil.copy(root / "train/good/000.png", other / "test/crack/contra.png")
    shutil.copy(root / "test/good/000.png", other / "train/good/leak.png")
    report = append_quietly(other, out)
    rejects = {item.path: (item.reason, item.detail) for item in report.rejects}
    assert rejects["test/crack/contra.png"][0] == "contradictory_label"
    assert "row bolt/train/good/000" in rejects["test/crack/contra.png"][1]
    assert rejects["train/good/leak.png"][0] == "duplicate_across_splits"
    assert "row bolt/test/good/000" in rejects["train/good/leak.png"][1]
    assert rows_of(out)[: len(before)] == before
    assert report.exit_status == 3
    assert {item.path for item in open_store(out).read_rejects("bolt")} == set(rejects)


def test_a_drawn_split_does_not_change_when_the_folder_grows(tmp_path: Path) -> None:
    root, out = make_folder(tmp_path / "bolt"), tmp_path / "out"
    ingest_quietly(root, out)
    split = {row["content_hash"]: row["split"] for row in rows_of(out)}
    for number in range(20):
        save(root / f"good/more{number}.png", pixels(300 + number))
    report = append_quietly(root, out)
    assert (report.categories[0].num_added, report.rejects) == (20, ())
    now = {row["content_hash"]: row["split"] for row in rows_of(out)}
    assert {content: now[content] for content in split} == split


def test_an_append_without_usable_images_is_an_error(tmp_path: Path) -> None:
    root, out = make_mvtec(tmp_path / "bolt"), tmp_path / "out"
    ingest_quietly(root, out)
    version = data_version(out, "bolt")
    save(tmp_path / "more/bolt/train/good/0.png", b"")
    with pytest.raises(DataError, match=r"bolt \(1 rejected: train/good/0.png"):
        append_quietly(tmp_path / "more/bolt", out)
    assert data_version(out, "bolt") == version


def test_an_append_to_an_old_data_set_without_source_manifest_and_index(tmp_path: Path) -> None:
    root, out = make_mvtec(tmp_path / "bolt"), tmp_path / "out"
    ingest_quietly(root, out)
    path = out / "category=bolt/_commit.json"
    commit = json.loads(path.read_text())
    for name in ("index", "sources", "dropped"):
        del commit[name]
    path.write_text(json.dumps(commit))
    save(root / "train/good/new.png", pixels(999))
    (report,) = append_quietly(root, out).categories
    assert (report.num_added, report.num_existing) == (1, 6)
    assert len(rows_of(out)) == 7


def test_ingesting_the_source_again_removes_appended_images(tmp_path: Path) -> None:
    root, out = make_mvtec(tmp_path / "bolt"), tmp_path / "out"
    ingest_quietly(root, out)
    fingerprint = data_fingerprint(out, "bolt")
    append_quietly(make_mvtec(tmp_path / "more/bolt", seed=500), out)
    assert ingest_quietly(root, out).categories[0].status == "written"
    assert data_fingerprint(out, "bolt") == fingerprint


# Concurrent publishers, and publishers that die


def synchronize_publishers(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Makes the first publication in each of `count` threads wait until all threads have read the same version."""
    barrier = threading.Barrier(count, timeout=60)
    state = threading.local()
    original = Store._prepare

    def prepare(self: Store, *arguments: Any) -> Any:
        if not getattr(state, "has_waited", False):
            state.has_waited = True
            barrier.wait()
        return original(self, *arguments)

    monkeypatch.setattr(Store, "_prepare", prepare)


def run_in_threads(actions: Sequence[Callable[[], object]]) -> list[BaseException]:
    """Runs each action in a thread, and returns the errors."""
    errors: list[BaseException] = []

    def collect_error(action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=collect_error, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_concurrent_appends_are_all_published(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    ingest_quietly(make_mvtec(tmp_path / "bolt"), out)
    sources = [make_mvtec(tmp_path / f"{n}/bolt", seed=1000 * n) for n in (1, 2, 3)]
    synchronize_publishers(monkeypatch, 3)
    assert run_in_threads([lambda source=source: append_quietly(source, out) for source in sources]) == []
    assert len(rows_of(out)) == len(set(ids_of(out))) == 24
    commit = open_store(out).require_commit("bolt")
    names = referenced_files(commit) | {entry["name"] for entry in commit["dropped"]}
    assert {path.name for path in (out / "category=bolt").iterdir() if path.is_file()} == {"_commit.json", *names}
    versions = [path.stem for path in (out / "category=bolt/_commits").iterdir()]
    assert sorted(len(rows_of(out, version=name)) for name in versions) == [6, 12, 18, 24]


def test_a_concurrent_replacement_and_append_give_the_result_of_one_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", make_mvtec(tmp_path / "1/bolt", seed=1000)
    ingest_quietly(make_mvtec(tmp_path / "bolt"), out)
    new = make_mvtec(tmp_path / "2/bolt", seed=2000, num_train=5)
    synchronize_publishers(monkeypatch, 2)
    assert run_in_threads([lambda: append_quietly(other, out), lambda: ingest_quietly(new, out)]) == []
    assert len(rows_of(out)) in (8, 14)  # the append first and then the replacement, or the other way round


def test_a_claimed_version_of_a_dead_publisher_is_made_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    ingest_quietly(make_mvtec(tmp_path / "bolt"), out)

    def die(self: Store, commit: object) -> None:
        raise KeyboardInterrupt

    source = make_mvtec(tmp_path / "1/bolt", seed=1000)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_make_current", die)
        with pytest.raises(KeyboardInterrupt):
            append_quietly(source, out)
    assert len(rows_of(out)) == 6
    append_quietly(make_mvtec(tmp_path / "2/bolt", seed=2000), out)
    assert len(rows_of(out)) == 18


def test_a_data_set_works_on_a_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    root, out = make_mvtec(tmp_path / "bolt"), tmp_path / "out"
    ingest_quietly(root, out)
    append_quietly(make_mvtec(tmp_path / "1/bolt", seed=1000), out)
    assert len(rows_of(out)) == 12


def test_a_run_that_dies_between_chunks_leaves_the_old_data_and_can_be_repeated(
    tmp_path: Path, small_parts: None
) -> None:
    root, out = make_mvtec(tmp_path / "bolt", num_train=9), tmp_path / "out"
    ingest_quietly(root, out)
    old = rows_of(out)
    save(root / "train/good/new.png", pixels(999))

    def die_after_three(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for number, item in enumerate(items):
            yield number, function(item)
            if number == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest_quietly(root, out, run=die_after_three)
    assert rows_of(out) == old
    folder = out / "category=bolt"
    part_names = {path.name for path in folder.glob("part-*")}
    leftovers = part_names - referenced_files(open_store(out).require_commit("bolt"))
    assert len(leftovers) == 3
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert ingest_quietly(root, out, run=map_in_process).categories[0].status == "written"
    assert len(rows_of(out)) == len(set(ids_of(out))) == 13
    assert leftovers.isdisjoint(path.name for path in folder.iterdir())


def test_no_version_with_a_missing_part_file_is_published(tmp_path: Path) -> None:
    root, out = make_mvtec(tmp_path / "bolt"), tmp_path / "out"
    ingest_quietly(root, out)
    version = data_version(out, "bolt")
    next((out / "category=bolt").glob("part-*")).unlink()
    save(root / "train/good/new.png", pixels(999))
    with pytest.raises(DataError, match=r"1 part files of category 'bolt' .*part-"):
        append_quietly(root, out)
    assert data_version(out, "bolt") == version
    assert not list((out / "category=bolt").glob("part-*"))
    ingest_quietly(root, out)
    assert len(rows_of(out)) == 7


def test_a_source_with_unchanged_stamps_is_not_read_again(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = make_mvtec(tmp_path / "bolt"), tmp_path / "out"
    ingest_quietly(root, out, run=map_in_process)
    assert len(decoded) == 6
    monkeypatch.setattr(Path, "read_bytes", None)
    assert ingest_quietly(root, out, run=map_in_process).categories[0].status == "unchanged"
    monkeypatch.undo()
    save(root / "test/crack/001.png", pixels(77))
    assert ingest_quietly(root, out, run=map_in_process).categories[0].status == "written"
    assert np.array_equal([row["id"] for row in rows_of(out)], read_index(out, "bolt")["id"].to_pylist())
