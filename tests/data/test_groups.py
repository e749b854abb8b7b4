"""The group column: in older data sets without it, in splits and folds, and after appends, removals and compactions."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_sources import ingest_quietly, make_mvtec, pixels, rows_of, save
from small_set import small_config

from focus_ray.data.images import encode_png
from focus_ray.data.read import data_fingerprint, read_index, read_rows
from focus_ray.data.schema import INDEX_COLUMNS
from focus_ray.data.store import CommitDraft, open_data_set
from focus_ray.errors import DataError
from focus_ray.fitting.split import SplitPlan, compute_split_key, compute_split_plan, compute_split_rule
from focus_ray.ingestion.change import compact_part_files, remove_rows

PARTS = ("fit", "validation", "holdout")


def make_old_set(root: Path, source: Path, has_index: bool = True) -> Path:
    """Ingests a source as an older program would: without the group column in the part files and in the index."""
    ingest_quietly(source, root)
    folder = root / "category=bolt"
    (index,) = folder.glob("_index-*.parquet")
    for path in (*folder.glob("part-*.parquet"), index):
        pq.write_table(pq.ParquetFile(path).read().drop(["group"]), path, compression="none")
    for path in (folder / "_commit.json", *folder.glob("_commits/*.json")):
        commit = json.loads(path.read_text())
        for entry in commit["files"]:
            entry["num_bytes"] = (folder / entry["name"]).stat().st_size
        commit["index"]["sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
        if not has_index:
            del commit["index"]
        path.write_text(json.dumps(commit))
    return root


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_mvtec(tmp_path / "bolt", num_train=6)


@pytest.fixture(params=[True, False], ids=["with index", "without index"])
def old_root(request: pytest.FixtureRequest, tmp_path: Path, source: Path) -> Path:
    return make_old_set(tmp_path / "old", source, request.param)


def test_index_and_rows_of_an_older_data_set_have_empty_groups(old_root: Path, source: Path) -> None:
    index = read_index(old_root, "bolt")
    assert index.column_names == [*INDEX_COLUMNS, "row"]
    assert {*index["group"].to_pylist(), *(row["group"] for row in rows_of(old_root))} == {""}
    assert list(read_rows(old_root, "bolt", [1], ["group"])) == [{"group": ""}]
    assert ingest_quietly(source, old_root).categories[0].status == "unchanged"


def test_images_are_appended_to_and_removed_from_an_older_data_set(old_root: Path, source: Path) -> None:
    before = rows_of(old_root)
    save(source / "train/good/900.png", pixels(900))
    assert ingest_quietly(source, old_root, append=True).categories[0].num_added == 1
    assert open_data_set(old_root).require_commit("bolt")["index"]  # also if the earlier version had none
    assert rows_of(old_root)[: len(before)] == before
    remove_rows(old_root, "bolt", ids=["bolt/train/good/001"])
    remaining = [row["id"] for row in before if row["id"] != "bolt/train/good/001"]
    assert [row["id"] for row in rows_of(old_root)] == [*remaining, "bolt/train/good/900"]
    after = rows_of(old_root)
    assert compact_part_files(old_root)[0].num_after == 1
    assert rows_of(old_root) == after
    (entry,) = open_data_set(old_root).require_commit("bolt")["files"]
    assert "group" in pq.ParquetFile(old_root / "category=bolt" / entry["name"]).schema_arrow.names


def test_an_older_data_set_has_the_same_split_as_a_new_one(old_root: Path, source: Path, tmp_path: Path) -> None:
    ingest_quietly(source, tmp_path / "new")
    assert data_fingerprint(old_root, "bolt") == data_fingerprint(tmp_path / "new", "bolt")
    old, new = (compute_split_plan(small_config(str(root), "unused"), "bolt") for root in (old_root, tmp_path / "new"))
    for part in PARTS:
        for name in ("rows", "groups", "order"):
            assert getattr(getattr(old, part), name).tolist() == getattr(getattr(new, part), name).tolist()
    assert (old.folds.tolist(), old.fit_hashes.tolist()) == (new.folds.tolist(), new.fit_hashes.tolist())


# Splits


def write_set(root: Path, groups: list[str], names: list[str] | None = None) -> str:
    """Writes a category `bolt` with one normal training image per group name. Returns its root."""
    store = open_data_set(root)
    common = {"category": "bolt", "split": "train", "label": 0, "defect_type": "good", "image": encode_png(pixels(0))}
    common |= {"mask": None, "width": 16, "height": 12, "site": "default"}
    names = names or [f"{number:04}" for number in range(len(groups))]
    hashes = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    columns = zip(names, hashes, groups, strict=True)
    rows = [
        {**common, "id": f"bolt/good/{n}", "content_hash": content, "group": group} for n, content, group in columns
    ]
    files, index = store.write_part_files("bolt", rows)
    counts = {"num_train": len(rows), "num_test_normal": 0, "num_test_anomalous": 0, "num_masks": 0}
    store.publish_version("bolt", lambda previous: CommitDraft(files, index, None, "made", counts))
    return str(root)


def by_row(plan: SplitPlan, name: str) -> list[int]:
    """Returns the group number or rank of each row, in the order of the rows."""
    parts = [getattr(plan, part) for part in PARTS]
    rows, values = (np.concatenate([getattr(part, column) for part in parts]) for column in ("rows", name))
    assert sorted(rows) == list(range(len(rows)))
    return [int(value) for value in values[np.argsort(rows)]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("method", "selection"), [("split", {}), ("cross", {}), ("split", {"fraction": 0.3})])
def test_all_images_of_a_group_are_in_the_same_part_and_fold(
    tmp_path: Path, method: str, selection: dict[str, Any], seed: int
) -> None:
    groups = [f"p{number % 9}" for number in range(40)] + ["", "", "", ""] + ["large"] * 13
    uri = write_set(tmp_path / "set", groups)
    config = small_config(uri, "unused", train={"seed": seed}, calibration={"method": method}, selection=selection)
    plan, split = compute_split_plan(config, "bolt"), compute_split_rule(config, "bolt")
    hashes = read_index(uri, "bolt")["content_hash"].to_pylist()
    parts_of_group: dict[str, set[tuple[str, int]]] = defaultdict(set)
    folds = dict(zip(plan.fit.rows.tolist(), plan.folds.tolist(), strict=True))
    for part in PARTS:
        for row in getattr(plan, part).rows.tolist():
            assert split.find_subset(hashes[row], groups[row]) == part
            parts_of_group[groups[row] or f"row {row}"].add((part, folds.get(row, 0)))
    assert all(len(group_parts) == 1 for group_parts in parts_of_group.values())
    assert [split.num_fit, split.num_validation, split.num_holdout] == [len(getattr(plan, part)) for part in PARTS]
    assert len({*plan.holdout.groups}) == (round(0.2 * 14) if method == "split" else 0)
    assert len({*plan.validation.groups}) == (round(0.3 * 14) if selection else 0)


def test_group_numbers_are_equal_if_and_only_if_the_groups_are_equal(tmp_path: Path) -> None:
    groups = ["b", "a", "", "b", "", "a", "c", "d", "d", "", "e"]
    plan = compute_split_plan(small_config(write_set(tmp_path / "set", groups), "unused"), "bolt")
    assert by_row(plan, "groups") == [0, 1, 2, 0, 3, 1, 4, 5, 5, 6, 7]


@pytest.mark.parametrize(("group_size", "num_images", "num_holdout"), [(30, 120, 30), (4, 200, 8)])
def test_the_maximum_of_calibration_images_counts_images_but_never_divides_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_size: int, num_images: int, num_holdout: int
) -> None:
    monkeypatch.setattr("focus_ray.fitting.split.MAX_CALIBRATION_IMAGES", 10)
    uri = write_set(tmp_path / "set", [f"p{number // group_size}" for number in range(num_images)])
    split = compute_split_rule(small_config(uri, "unused"), "bolt")
    assert (split.num_fit, split.num_holdout) == (num_images - num_holdout, num_holdout)


def test_photographs_of_three_parts_are_too_few(tmp_path: Path) -> None:
    uri = write_set(tmp_path / "set", [f"p{number % 3}" for number in range(60)])
    with pytest.raises(DataError, match="60 normal training images of 3 parts"):
        compute_split_rule(small_config(uri, "unused"), "bolt")


def test_rows_are_ranked_in_natural_order_of_their_names(tmp_path: Path) -> None:
    names = ["img_10", "img_2", "img_02", "img_1b", "img_1", "a99999999999999999999999", "a7"]
    plan = compute_split_plan(small_config(write_set(tmp_path / "set", [""] * 7, names), "unused"), "bolt")
    ordered = ["a7", "a99999999999999999999999", "img_1", "img_1b", "img_02", "img_2", "img_10"]
    assert by_row(plan, "order") == [ordered.index(name) for name in names]


def test_groups_change_the_fingerprint_but_empty_groups_do_not(tmp_path: Path) -> None:
    roots = [["a", "a", "", ""], ["a", "b", "", ""], [""] * 4]
    fingerprints = [data_fingerprint(write_set(tmp_path / str(n), groups), "bolt") for n, groups in enumerate(roots)]
    assert len(set(fingerprints)) == 3
    index = read_index(tmp_path / "2", "bolt")
    lines = sorted(f"{content} 0 train" for content in index["content_hash"].to_pylist())
    assert fingerprints[2] == hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_the_split_key_of_a_group_depends_on_seed_and_group_alone() -> None:
    assert compute_split_key(0, "a" * 64, "part") == hashlib.sha256(b"0:group:part").hexdigest()
    assert (
        compute_split_key(0, "a" * 64, "part")
        == compute_split_key(0, "b" * 64, "part")
        != compute_split_key(1, "a" * 64, "part")
    )


def test_groups_survive_a_removal_and_a_compaction(tmp_path: Path) -> None:
    uri = write_set(tmp_path / "set", ["a", "b", "", "a", "c"])
    remove_rows(uri, "bolt", ids=["bolt/good/0001"])
    compact_part_files(uri)
    assert read_index(uri, "bolt")["group"].to_pylist() == ["a", "", "a", "c"]
    assert [row["group"] for row in rows_of(uri)] == ["a", "", "a", "c"]
