"""Ingestion in pieces and appends: the same data as in one go, whatever the pieces, and no file decoded twice."""

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
from focus_ray.data.ingest import ingest
from focus_ray.data.ingestion import chunks
from focus_ray.data.ingestion.chunks import map_in_process
from focus_ray.data.ingestion.report import IngestReport
from focus_ray.data.read import data_fingerprint, data_version, read_index, read_rows
from focus_ray.data.schema import SCHEMA
from focus_ray.data.store import Store, open_store
from focus_ray.errors import DataError


def take(source: Path, out: Path, **options: Any) -> IngestReport:
    return ingest(source, out, progress=False, **options)


def append(source: Path, out: Path, **options: Any) -> IngestReport:
    return take(source, out, append=True, **options)


def rows_of(root: Path, category: str = "bolt", version: str | None = None) -> list[dict[str, Any]]:
    numbers = read_index(root, category, version=version)["row"].to_numpy()
    return list(read_rows(root, category, numbers, SCHEMA.names, version))


def ids_of(root: Path) -> list[str]:
    return [name.removeprefix("bolt/") for name in read_index(root, "bolt")["id"].to_pylist()]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """About two images a part file."""
    monkeypatch.setattr(store, "MAX_ROW_GROUP_ROWS", 2)
    monkeypatch.setattr(store, "FILE_BYTES", 1000)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that were decoded."""
    names: list[str] = []
    original = chunks.check

    def noting(sample: Any, *rest: Any) -> Any:
        names.append(sample.path.name)
        return original(sample, *rest)

    monkeypatch.setattr(chunks, "check", noting)
    return names


# folders of a few pictures, some of them twice, broken, with masks, or with stems that clash

File = tuple[str, str, str, int]  # folder, stem, suffix, seed of the pixels; -1 for a broken one

ANY_FILES = st.lists(
    st.tuples(
        st.sampled_from(["train/good", "test/good", "test/crack"]),
        st.sampled_from(["a", "b", "b-", "c"]),
        st.sampled_from([".png", ".bmp"]),
        st.integers(-1, 5),
    ),
    max_size=12,
)


def write(root: Path, files: Sequence[File], masks: bool = True) -> Path:
    save(root / "train/good/always.png", pixels(1000))
    for folder, stem, suffix, seed in files:
        save(root / folder / f"{stem}{suffix}", pixels(seed) if seed >= 0 else b"\x89PNG nothing")
        if masks and folder == "test/crack" and seed % 2:
            save(root / f"ground_truth/crack/{stem}_mask.png", spot((1, 1)))
    return root


@settings(max_examples=40)
@given(files=ANY_FILES, file_bytes=st.sampled_from([1, 1000, 1 << 20]))
def test_in_pieces_rows_ids_and_rejects_are_those_of_one_go(files: list[File], file_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        root = write(Path(folder) / "bolt", files)
        whole, pieces = Path(folder) / "whole", Path(folder) / "pieces"
        expected = take(root, whole)
        patch.setattr(store, "FILE_BYTES", file_bytes)
        assert take(root, pieces, run=map_in_process) == expected
        assert sorted(rows_of(pieces), key=lambda row: row["id"]) == rows_of(whole)
        commits = [open_store(place).require_commit("bolt") for place in (whole, pieces)]
        assert commits[0]["source_fingerprint"] == commits[1]["source_fingerprint"]
        assert take(root, pieces).categories[0].status == "unchanged"
        assert take(root, whole, run=map_in_process).categories[0].status == "unchanged"
        index = read_index(pieces, "bolt")
        assert [row["id"] for row in rows_of(pieces)] == index["id"].to_pylist()
        assert store.open_store(pieces).is_complete("bolt", commits[1])


def test_pieces_that_hold_nothing_to_settle_are_taken_as_they_were_written(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_mvtec(tmp_path / "bolt", num_train=9)
    shutil.copy(root / "train/good/004.png", root / "train/good/copy.png")
    rewritten: list[str] = []
    original = chunks.rewrite_part

    def noting(job: chunks.PartRewrite) -> Any:
        rewritten.append(job.entry["name"])
        return original(job)

    monkeypatch.setattr(chunks, "rewrite_part", noting)
    take(root, tmp_path / "out", run=map_in_process)
    assert len(rewritten) == 1
    assert ids_of(tmp_path / "out") == sorted(ids_of(tmp_path / "out"))
    assert len(open_store(tmp_path / "out").require_commit("bolt")["files"]) > 4


# append

# a test picture has one name, or one go would count it twice; a picture is always fine or always cracked
FINE = st.tuples(st.sampled_from(["train/good"]), st.sampled_from("ab"), st.integers(0, 6))
TEST = st.tuples(st.sampled_from(["test/good"]), st.just("t"), st.integers(0, 6))
CRACK = st.tuples(st.sampled_from(["test/crack"]), st.just("t"), st.integers(20, 23))
SOUND = st.lists(
    st.one_of(FINE, TEST, CRACK).map(lambda item: (item[0], f"{item[2]}{item[1]}", ".png", item[2])), max_size=8
)


@settings(max_examples=40)
@given(first=SOUND, second=SOUND)
def test_an_append_gives_the_data_of_both_in_one_go(first: list[File], second: list[File]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        a, b, both = place / "a/bolt", place / "b/bolt", place / "both/bolt"
        take(write(a, first), place / "added")
        added = append(write(b, second), place / "added")
        write(write(both, first).parent / "bolt", second)
        report = take(both, place / "once")
        assert data_fingerprint(place / "added", "bolt") == data_fingerprint(place / "once", "bolt")
        (category,), (expected,) = added.categories, report.categories
        assert category.num_rows == expected.num_rows == len(rows_of(place / "added"))
        assert (category.num_masks, category.num_train) == (expected.num_masks, expected.num_train)
        assert len(set(ids_of(place / "added"))) == category.num_rows
        (again,) = append(b, place / "added").categories
        assert (again.status, again.num_added) == ("unchanged", 0)


def test_an_append_rewrites_no_part_and_decodes_only_what_is_new(
    tmp_path: Path, small_parts: None, decoded: list[str]
) -> None:
    root, out = make_mvtec(tmp_path / "bolt", num_train=9), tmp_path / "out"
    take(root, out)
    before = open_store(out).require_commit("bolt")
    save(root / "train/good/new.png", pixels(999))
    (report,) = append(root, out).categories
    after = open_store(out).require_commit("bolt")
    assert (report.status, report.num_added, report.num_there, report.num_rows) == ("appended", 1, 12, 13)
    assert decoded == ["new.png"]
    assert after["files"][: len(before["files"])] == before["files"]
    assert len(after["files"]) == len(before["files"]) + 1
    assert ids_of(out)[-1] == "train/good/new"
    assert rows_of(out)[-1]["image"] == (root / "train/good/new.png").read_bytes()
    version = data_version(out, "bolt")
    (again,) = append(root, out).categories
    assert (again.status, again.num_there, data_version(out, "bolt"), decoded) == (
        "unchanged",
        13,
        version,
        ["new.png"],
    )
    assert "0 images are new, 13 were there already" in str(append(root, out))


def test_an_append_to_nothing_is_an_ingestion(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    assert append(root, tmp_path / "out").categories[0].status == "written"
    take(root, tmp_path / "other")
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "other")


def test_files_of_one_name_from_two_sites_keep_apart(tmp_path: Path) -> None:
    for site, seed in (("a", 0), ("b", 500)):
        append(make_mvtec(tmp_path / site / "bolt", seed=seed), tmp_path / "out", site=site)
    index = read_index(tmp_path / "out", "bolt")
    assert index["site"].to_pylist() == ["a"] * 6 + ["b"] * 6
    names = ids_of(tmp_path / "out")
    hashes = index["content_hash"].to_pylist()
    assert names[6:] == [f"{name}~{content[:12]}" for name, content in zip(names[:6], hashes[6:], strict=True)]
    assert append(tmp_path / "b/bolt", tmp_path / "out").categories[0].status == "unchanged"


def test_a_test_image_takes_its_copy_out_of_the_training_data(tmp_path: Path, small_parts: None) -> None:
    root, out = make_mvtec(tmp_path / "bolt", num_train=9), tmp_path / "out"
    take(root, out)
    before = open_store(out).require_commit("bolt")
    other = make_mvtec(tmp_path / "more/bolt", num_train=1)
    shutil.copy(root / "train/good/004.png", other / "test/good/004.png")
    (report,) = append(other, out).categories
    after = open_store(out).require_commit("bolt")
    assert (report.num_added, report.num_train, report.num_test_normal, report.num_rows) == (1, 8, 2, 12)
    assert "train/good/004" not in ids_of(out)
    assert "test/good/004" in ids_of(out)
    same = [entry for entry in before["files"] if entry in after["files"]]
    assert len(same) == len(before["files"]) - 1
    assert len(rows_of(out)) == 12


def test_what_contradicts_or_leaks_into_what_is_there_is_rejected(tmp_path: Path) -> None:
    root, out = make_mvtec(tmp_path / "bolt"), tmp_path / "out"
    take(root, out)
    before = rows_of(out)
    other = make_mvtec(tmp_path / "more/bolt", seed=500)
    shutil.copy(root / "train/good/000.png", other / "test/crack/contra.png")
    shutil.copy(root / "test/good/000.png", other / "train/good/leak.png")
    report = append(other, out)
    told = {item.path: (item.reason, item.detail) for item in report.rejects}
    assert told["test/crack/contra.png"][0] == "contradictory_label"
    assert "normal in the row bolt/train/good/000, which is kept" in told["test/crack/contra.png"][1]
    assert told["train/good/leak.png"][0] == "duplicate_across_splits"
    assert "test data in the row bolt/test/good/000, which is kept" in told["train/good/leak.png"][1]
    assert rows_of(out)[: len(before)] == before
    assert report.exit_status == 3
    assert {item.path for item in open_store(out).read_rejects("bolt")} == set(told)


def test_a_split_that_was_drawn_stays_as_the_folder_grows(tmp_path: Path) -> None:
    root, out = make_folder(tmp_path / "bolt"), tmp_path / "out"
    take(root, out)
    split = {row["content_hash"]: row["split"] for row in rows_of(out)}
    for number in range(20):
        save(root / f"good/more{number}.png", pixels(300 + number))
    report = append(root, out)
    assert (report.categories[0].num_added, report.rejects) == (20, ())
    now = {row["content_hash"]: row["split"] for row in rows_of(out)}
    assert {content: now[content] for content in split} == split


def test_an_append_of_nothing_usable_is_told(tmp_path: Path) -> None:
    root, out = make_mvtec(tmp_path / "bolt"), tmp_path / "out"
    take(root, out)
    version = data_version(out, "bolt")
    save(tmp_path / "more/bolt/train/good/0.png", b"")
    with pytest.raises(DataError, match=r"nothing usable in bolt \(1 rejected: train/good/0.png"):
        append(tmp_path / "more/bolt", out)
    assert data_version(out, "bolt") == version


def test_an_append_to_a_set_that_knows_no_sources_and_has_no_index(tmp_path: Path) -> None:
    root, out = make_mvtec(tmp_path / "bolt"), tmp_path / "out"
    take(root, out)
    path = out / "category=bolt/_commit.json"
    commit = json.loads(path.read_text())
    for name in ("index", "sources", "dropped"):
        del commit[name]
    path.write_text(json.dumps(commit))
    save(root / "train/good/new.png", pixels(999))
    (report,) = append(root, out).categories
    assert (report.num_added, report.num_there) == (1, 6)
    assert len(rows_of(out)) == 7


def test_ingesting_the_source_again_puts_it_in_place_of_what_was_added(tmp_path: Path) -> None:
    root, out = make_mvtec(tmp_path / "bolt"), tmp_path / "out"
    take(root, out)
    fingerprint = data_fingerprint(out, "bolt")
    append(make_mvtec(tmp_path / "more/bolt", seed=500), out)
    assert take(root, out).categories[0].status == "written"
    assert data_fingerprint(out, "bolt") == fingerprint


# several at once, and those that die


def together(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The first publication of each of so many threads waits until all have read the same version."""
    waiting = threading.Barrier(count, timeout=60)
    seen = threading.local()
    original = Store._prepare

    def prepare(self: Store, *rest: Any) -> Any:
        if not getattr(seen, "done", False):
            seen.done = True
            waiting.wait()
        return original(self, *rest)

    monkeypatch.setattr(Store, "_prepare", prepare)


def at_once(actions: Sequence[Callable[[], object]]) -> list[BaseException]:
    errors: list[BaseException] = []

    def guarded(action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_appends_at_the_same_moment_are_all_there(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    take(make_mvtec(tmp_path / "bolt"), out)
    sources = [make_mvtec(tmp_path / f"{n}/bolt", seed=1000 * n) for n in (1, 2, 3)]
    together(monkeypatch, 3)
    assert at_once([lambda source=source: append(source, out) for source in sources]) == []
    assert len(rows_of(out)) == len(set(ids_of(out))) == 24
    commit = open_store(out).require_commit("bolt")
    kept = referenced_files(commit) | {item["name"] for item in commit["dropped"]}
    assert {path.name for path in (out / "category=bolt").iterdir() if path.is_file()} == {"_commit.json", *kept}
    versions = [path.stem for path in (out / "category=bolt/_commits").iterdir()]
    assert sorted(len(rows_of(out, version=name)) for name in versions) == [6, 12, 18, 24]


def test_of_a_replacement_and_an_append_at_the_same_moment_none_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", make_mvtec(tmp_path / "1/bolt", seed=1000)
    take(make_mvtec(tmp_path / "bolt"), out)
    new = make_mvtec(tmp_path / "2/bolt", seed=2000, num_train=5)
    together(monkeypatch, 2)
    assert at_once([lambda: append(other, out), lambda: take(new, out)]) == []
    assert len(rows_of(out)) in (8, 14)  # the append first, then replaced; or the other way round


def test_a_publisher_that_died_before_its_version_was_current_is_helped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    take(make_mvtec(tmp_path / "bolt"), out)

    def die(self: Store, commit: object) -> None:
        raise KeyboardInterrupt

    source = make_mvtec(tmp_path / "1/bolt", seed=1000)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_make_current", die)
        with pytest.raises(KeyboardInterrupt):
            append(source, out)
    assert len(rows_of(out)) == 6
    append(make_mvtec(tmp_path / "2/bolt", seed=2000), out)
    assert len(rows_of(out)) == 18


def test_a_disk_without_hard_links_holds_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    root, out = make_mvtec(tmp_path / "bolt"), tmp_path / "out"
    take(root, out)
    append(make_mvtec(tmp_path / "1/bolt", seed=1000), out)
    assert len(rows_of(out)) == 12


def test_a_run_that_dies_among_the_pieces_leaves_the_old_data_and_is_done_again(
    tmp_path: Path, small_parts: None
) -> None:
    root, out = make_mvtec(tmp_path / "bolt", num_train=9), tmp_path / "out"
    take(root, out)
    old = rows_of(out)
    save(root / "train/good/new.png", pixels(999))

    def dies(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for number, item in enumerate(items):
            yield number, function(item)
            if number == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(root, out, run=dies)
    assert rows_of(out) == old
    folder = out / "category=bolt"
    left = {path.name for path in folder.glob("part-*")} - referenced_files(open_store(out).require_commit("bolt"))
    assert len(left) == 3
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert take(root, out, run=map_in_process).categories[0].status == "written"
    assert len(rows_of(out)) == len(set(ids_of(out))) == 13
    assert left.isdisjoint(path.name for path in folder.iterdir())


def test_no_version_is_made_of_a_part_file_that_is_not_there(tmp_path: Path) -> None:
    root, out = make_mvtec(tmp_path / "bolt"), tmp_path / "out"
    take(root, out)
    version = data_version(out, "bolt")
    next((out / "category=bolt").glob("part-*")).unlink()
    save(root / "train/good/new.png", pixels(999))
    with pytest.raises(DataError, match=r"1 part files of category 'bolt' are not there, part-.*without appending"):
        append(root, out)
    assert data_version(out, "bolt") == version
    assert not list((out / "category=bolt").glob("part-*"))
    take(root, out)
    assert len(rows_of(out)) == 7


def test_a_source_that_is_seen_by_stamp_is_not_read_again(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = make_mvtec(tmp_path / "bolt"), tmp_path / "out"
    take(root, out, run=map_in_process)
    assert len(decoded) == 6
    monkeypatch.setattr(Path, "read_bytes", None)
    assert take(root, out, run=map_in_process).categories[0].status == "unchanged"
    monkeypatch.undo()
    save(root / "test/crack/001.png", pixels(77))
    assert take(root, out, run=map_in_process).categories[0].status == "written"
    assert np.array_equal([row["id"] for row in rows_of(out)], read_index(out, "bolt")["id"].to_pylist())
