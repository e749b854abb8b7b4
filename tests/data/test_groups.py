"""The group column: in older data sets without it, in splits and folds, and after appends, removals and compactions."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from made_sources import make_mvtec, pixels, save
from small_set import small_config

from focus_ray.data.images import encode_png
from focus_ray.data.read import data_fingerprint, read_index, read_rows
from focus_ray.data.schema import INDEX_COLUMNS, SCHEMA
from focus_ray.data.store import CommitDraft, open_store
from focus_ray.errors import DataError
from focus_ray.fitting.split import plan_category, split_category, split_key
from focus_ray.ingestion.change import compact, remove_rows
from focus_ray.ingestion.ingest import ingest


def drop_group_column(path: Path) -> None:
    table = pq.ParquetFile(path).read().drop(["group"])
    pq.write_table(table, path, compression="none")


def make_old_set(root: Path, source: Path, has_index: bool = True) -> Path:
    """Ingests a source as an older program would: without the group column in the part files and in the index."""
    ingest(source, root, progress=False)
    folder = root / "category=bolt"
    for part in folder.glob("part-*.parquet"):
        drop_group_column(part)
    (index,) = folder.glob("_index-*.parquet")
    drop_group_column(index)
    commit_paths = [folder / "_commit.json", *folder.glob("_commits/*.json")]
    for path in commit_paths:
        commit = json.loads(path.read_text())
        for entry in commit["files"]:
            entry["num_bytes"] = (folder / entry["name"]).stat().st_size
        commit["index"]["sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
        if not has_index:
            del commit["index"]
        path.write_text(json.dumps(commit))
    return root


def rows_of(root: Path) -> list[dict[str, object]]:
    index = read_index(root, "bolt")
    return list(read_rows(root, "bolt", index["row"].to_numpy(), SCHEMA.names))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_mvtec(tmp_path / "bolt", num_train=6)


@pytest.fixture(params=[True, False], ids=["with index", "without index"])
def old_root(request: pytest.FixtureRequest, tmp_path: Path, source: Path) -> Path:
    return make_old_set(tmp_path / "old", source, request.param)


def test_index_and_rows_of_an_older_data_set_have_empty_groups(old_root: Path) -> None:
    index = read_index(old_root, "bolt")
    assert index.column_names == [*INDEX_COLUMNS, "row"]
    assert set(index["group"].to_pylist()) == {""}
    assert {row["group"] for row in rows_of(old_root)} == {""}
    assert list(read_rows(old_root, "bolt", [1], ["group"])) == [{"group": ""}]


def test_an_older_data_set_is_unchanged_when_its_source_is_ingested_again(old_root: Path, source: Path) -> None:
    assert ingest(source, old_root, progress=False).categories[0].status == "unchanged"


def test_images_are_appended_to_and_removed_from_an_older_data_set(old_root: Path, source: Path) -> None:
    before = rows_of(old_root)
    save(source / "train/good/900.png", pixels(900))
    report = ingest(source, old_root, append=True, progress=False)
    assert report.categories[0].num_added == 1
    assert rows_of(old_root)[: len(before)] == before
    assert rows_of(old_root)[-1]["id"] == "bolt/train/good/900"
    remove_rows(old_root, "bolt", ids=["bolt/train/good/001"])
    assert rows_of(old_root)[:-1] == [row for row in before if row["id"] != "bolt/train/good/001"]
    assert set(read_index(old_root, "bolt")["group"].to_pylist()) == {""}


def test_an_older_data_set_is_compacted(old_root: Path, source: Path) -> None:
    save(source / "train/good/900.png", pixels(900))
    ingest(source, old_root, append=True, progress=False)
    before = rows_of(old_root)
    assert compact(old_root)[0].num_after == 1
    assert rows_of(old_root) == before
    (entry,) = open_store(old_root).require_commit("bolt")["files"]
    assert "group" in pq.ParquetFile(old_root / "category=bolt" / entry["name"]).schema_arrow.names


def test_an_older_data_set_has_the_same_split_as_a_new_one(old_root: Path, source: Path, tmp_path: Path) -> None:
    ingest(source, tmp_path / "new", progress=False)
    assert data_fingerprint(old_root, "bolt") == data_fingerprint(tmp_path / "new", "bolt")
    plans = [plan_category(small_config(str(root), "unused"), "bolt") for root in (old_root, tmp_path / "new")]
    for name in ("fit_rows", "folds", "holdout_rows", "fit_hashes", "fit_groups", "fit_order"):
        assert getattr(plans[0], name).tolist() == getattr(plans[1], name).tolist(), name


# Splits


def write_set(root: Path, groups: list[str], names: list[str] | None = None) -> str:
    """Writes a category `bolt` with one normal training image per group name. Returns its root."""
    store = open_store(root)
    names = names or [f"{number:04}" for number in range(len(groups))]
    image = encode_png(pixels(0))
    rows = [
        {
            "id": f"bolt/good/{name}",
            "category": "bolt",
            "split": "train",
            "label": 0,
            "defect_type": "good",
            "image": image,
            "mask": None,
            "width": 16,
            "height": 12,
            "site": "default",
            "content_hash": hashlib.sha256(name.encode()).hexdigest(),
            "group": group,
        }
        for name, group in zip(names, groups, strict=True)
    ]
    files, index = store.write_parts("bolt", rows)
    counts = {"num_train": len(rows), "num_test_normal": 0, "num_test_anomalous": 0, "num_masks": 0}
    store.publish("bolt", lambda previous: CommitDraft(files, index, None, "made", counts))
    return str(root)


SETTINGS = [
    {"calibration": {"method": "split"}},
    {"calibration": {"method": "cross"}},
    {"calibration": {"method": "split"}, "selection": {"enabled": True, "fraction": 0.3}},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_all_images_of_a_group_are_in_the_same_part_and_fold(tmp_path: Path, settings: dict, seed: int) -> None:
    groups = [f"p{number % 9}" for number in range(40)] + ["", "", "", ""] + ["large"] * 13
    uri = write_set(tmp_path / "set", groups)
    config = small_config(uri, "unused", train={"seed": seed}, **settings)
    plan, split = plan_category(config, "bolt"), split_category(config, "bolt")
    index = read_index(uri, "bolt")
    hashes = index["content_hash"].to_pylist()
    parts_of_group: dict[str, set[tuple[str, int]]] = defaultdict(set)
    parts = {"fit": plan.fit_rows, "validation": plan.validation_rows, "holdout": plan.holdout_rows}
    folds = dict(zip(plan.fit_rows.tolist(), plan.folds.tolist(), strict=True))
    for part, rows in parts.items():
        for row in rows.tolist():
            assert split.part_of(hashes[row], groups[row]) == part
            if groups[row]:
                parts_of_group[groups[row]].add((part, folds.get(row, 0)))
    assert sorted(row for rows in parts.values() for row in rows) == list(range(len(groups)))
    assert all(len(group_parts) == 1 for group_parts in parts_of_group.values())
    assert [split.num_fit, split.num_validation, split.num_holdout] == [len(rows) for rows in parts.values()]
    if settings["calibration"]["method"] == "split":
        assert len(set(plan.holdout_groups)) == round(0.2 * 14)
    if "selection" in settings:
        assert len(set(plan.validation_groups)) == round(0.3 * 14)


def test_group_numbers_are_equal_if_and_only_if_the_groups_are_equal(tmp_path: Path) -> None:
    groups = ["b", "a", "", "b", "", "a", "c", "d", "d", "", "e"]
    plan = plan_category(small_config(write_set(tmp_path / "set", groups), "unused"), "bolt")
    numbers = dict(zip(plan.fit_rows.tolist(), plan.fit_groups.tolist(), strict=True))
    numbers |= dict(zip(plan.holdout_rows.tolist(), plan.holdout_groups.tolist(), strict=True))
    assert [numbers[row] for row in range(len(groups))] == [0, 1, 2, 0, 3, 1, 4, 5, 5, 6, 7]


def test_a_group_larger_than_the_maximum_is_held_out_completely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("focus_ray.fitting.split.MAX_CALIBRATION_IMAGES", 10)
    groups = [f"p{number // 30}" for number in range(120)]
    config = small_config(write_set(tmp_path / "set", groups), "unused")
    split = split_category(config, "bolt")
    assert (split.num_fit, split.num_holdout) == (90, 30)


def test_the_maximum_of_calibration_images_counts_images_and_not_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("focus_ray.fitting.split.MAX_CALIBRATION_IMAGES", 10)
    groups = [f"p{number // 4}" for number in range(200)]
    config = small_config(write_set(tmp_path / "set", groups), "unused")
    assert split_category(config, "bolt").num_holdout == 8


def test_photographs_of_three_parts_are_too_few(tmp_path: Path) -> None:
    uri = write_set(tmp_path / "set", [f"p{number % 3}" for number in range(60)])
    with pytest.raises(DataError, match="60 normal training images of 3 parts"):
        split_category(small_config(uri, "unused"), "bolt")


def test_rows_are_ranked_in_natural_order_of_their_names(tmp_path: Path) -> None:
    names = ["img_10", "img_2", "img_02", "img_1b", "img_1", "a99999999999999999999999", "a7"]
    uri = write_set(tmp_path / "set", [""] * len(names), names)
    plan = plan_category(small_config(uri, "unused"), "bolt")
    ranks = dict(zip(plan.fit_rows.tolist(), plan.fit_order.tolist(), strict=True))
    ranks |= dict(zip(plan.holdout_rows.tolist(), plan.holdout_order.tolist(), strict=True))
    ordered = [names[row] for row in sorted(ranks, key=ranks.__getitem__)]
    assert ordered == ["a7", "a99999999999999999999999", "img_1", "img_1b", "img_02", "img_2", "img_10"]


def test_groups_change_the_fingerprint_but_empty_groups_do_not(tmp_path: Path) -> None:
    roots = [["a", "a", "", ""], ["a", "b", "", ""], [""] * 4]
    fingerprints = [data_fingerprint(write_set(tmp_path / str(n), groups), "bolt") for n, groups in enumerate(roots)]
    assert len(set(fingerprints)) == 3
    index = read_index(tmp_path / "2", "bolt")
    lines = sorted(f"{content} 0 train" for content in index["content_hash"].to_pylist())
    assert fingerprints[2] == hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_the_split_key_of_a_group_depends_on_seed_and_group_alone() -> None:
    assert split_key(0, "a" * 64, "part") == hashlib.sha256(b"0:group:part").hexdigest()
    assert split_key(0, "a" * 64, "part") == split_key(0, "b" * 64, "part") != split_key(1, "a" * 64, "part")


def test_groups_survive_a_removal_and_a_compaction(tmp_path: Path) -> None:
    uri = write_set(tmp_path / "set", ["a", "b", "", "a", "c"])
    remove_rows(uri, "bolt", ids=["bolt/good/0001"])
    compact(uri)
    assert read_index(uri, "bolt")["group"].to_pylist() == ["a", "", "a", "c"]
    assert [row["group"] for row in rows_of(Path(uri))] == ["a", "", "a", "c"]
