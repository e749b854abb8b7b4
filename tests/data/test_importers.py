"""Importers: the rows of each layout, folder names in many languages, and sources that are refused."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_sources import SIZE, ingest_quietly, make_folder, make_mvtec, pixels, rows_by_id, save, save_all, spot
from places import SHARED

from focus_ray.data.images import decode_mask
from focus_ray.data.importers.vocabulary import is_ambiguous_name, means_defective_parts, means_good_parts
from focus_ray.data.read import list_categories, read_index
from focus_ray.errors import DataError

IMAGES = SHARED / "data"
VISA_LINES = [
    "candle,train,normal,candle/good/0.png,",
    "candle,train,False,candle/good/1.png,",
    "candle,test,normal,candle/good/2.png,",
    'candle,test,"burnt,bent",candle/bad/0.png,candle/masks/0.png',
    "candle,test,True,candle/bad/1.png,",
]
VISA_FILES: dict[str, Any] = {
    **{f"candle/good/{number}.png": number for number in range(4)},
    **{"candle/bad/0.png": 50, "candle/bad/1.png": 51, "candle/masks/0.png": spot((0, 1))},
}


def visa_table(*more_lines: str, header: str = "object,split,label,image,mask") -> bytes:
    return "\n".join([header, *VISA_LINES, *more_lines]).encode()


# layout -> (paths of images, path of each mask -> marked pixels, id, split and number of marked pixels of each row)
LAYOUTS: dict[str, tuple[list[str], dict[str, list[tuple[int, int]]], list[str]]] = {
    "MVTec AD 2, whose private images are skipped": (
        ["train/good/0", "validation/good/0", "test_public/good/0", "test_public/bad/0", "test_private/0"],
        {"test_public/ground_truth/bad/0_mask.png": [(2, 2)]},
        ["test_public/bad/0 test 1", "test_public/good/0 test 0", "train/good/0 train 0", "validation/good/0 train 0"],
    ),
    "MVTec LOCO, whose masks are joined": (
        ["train/good/0", "validation/good/0", "test/logical/0"],
        {"ground_truth/logical/0/0.png": [(1, 1)], "ground_truth/logical/0/1.png": [(3, 4), (5, 5)]},
        ["test/logical/0 test 3", "train/good/0 train 0", "validation/good/0 train 0"],
    ),
    "BTAD": (
        ["train/ok/0", "test/ok/0", "test/ko/0", "test/ko/1"],
        {"ground_truth/ko/0.png": [(2, 3)], "ground_truth/ko/1.bmp": [(2, 3), (4, 4)]},
        ["test/good/0 test 0", "test/ko/0 test 1", "test/ko/1 test 2", "train/good/0 train 0"],
    ),
    "folder without bad images": (["good/0", "good/1"], {}, ["good/0 train 0", "good/1 train 0"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_its_rows(layout: str, tmp_path: Path) -> None:
    images, masks, expected = LAYOUTS[layout]
    source = save_all(tmp_path / "bolt", {f"{name}.png": number for number, name in enumerate(images)})
    save_all(source, {name: spot(*positions) for name, positions in masks.items()})
    report = ingest_quietly(source, tmp_path / "out")
    rows = rows_by_id(tmp_path / "out")
    num_marked = {name: decode_mask(row["mask"], *SIZE).sum() if row["mask"] else 0 for name, row in rows.items()}
    assert [f"{name} {row['split']} {num_marked[name]}" for name, row in sorted(rows.items())] == expected
    assert all(row["label"] == ("good" not in row["id"]) == (row["defect_type"] != "good") for row in rows.values())
    assert report.rejects == ()
    assert sum("test_private: " in note for note in report.notes) == ("test_private/0" in images)


def test_rows_of_mvtec_ad_have_all_columns(tmp_path: Path) -> None:
    source = make_mvtec(tmp_path / "bolt")
    report = ingest_quietly(source, tmp_path / "out", site="plant-7")
    rows = rows_by_id(tmp_path / "out")
    names = [*(f"test/crack/00{n}" for n in range(2)), "test/good/000", *(f"train/good/00{n}" for n in range(3))]
    assert list(rows) == names
    row = rows["test/crack/001"]
    assert row.pop("image") == (source / "test/crack/001.png").read_bytes()
    assert np.array_equal(decode_mask(row.pop("mask"), *SIZE), spot((1, 1)))
    assert row.pop("content_hash") == hashlib.sha256(b"12x16:" + pixels(201).tobytes()).hexdigest()
    assert row == {
        **{"id": "bolt/test/crack/001", "category": "bolt", "split": "test", "label": 1, "defect_type": "crack"},
        **{"width": 16, "height": 12, "site": "plant-7", "group": ""},
    }
    assert (report.format, report.exit_status, report.num_rows) == ("mvtec", 0, 6)


def test_visa_is_ingested_with_its_split_table(tmp_path: Path) -> None:
    source = save_all(tmp_path / "visa", {**VISA_FILES, "split_csv/1cls.csv": visa_table()})
    report = ingest_quietly(source, tmp_path / "out")
    rows = rows_by_id(tmp_path / "out", "candle")
    assert report.format == "visa"
    assert {name: (row["split"], row["label"], bool(row["mask"])) for name, row in rows.items()} == {
        **{"train/good/0": ("train", 0, False), "train/good/1": ("train", 0, False), "test/good/2": ("test", 0, False)},
        **{"test/burnt_bent/0": ("test", 1, True), "test/anomaly/1": ("test", 1, False)},
    }


ANNOTATIONS = "\n".join(
    ["image,label,mask", *(f"OK/{number}.png,normal," for number in range(5)), "NG/0.png,NG,masks/0.png"]
)


@pytest.mark.parametrize("table", [{}, {"image_anno.csv": ANNOTATIONS.encode()}], ids=["folder", "visa"])
def test_without_a_split_the_seed_draws_a_share_of_the_good_images_as_test_images(tmp_path: Path, table: Any) -> None:
    images = {**{f"OK/{number}.png": number for number in range(5)}, "NG/0.png": 50, "masks/0.png": spot((1, 1))}
    source = save_all(tmp_path / "candle", {**images, **table})
    draws = set()
    for seed in range(8):
        (candle,) = ingest_quietly(source, tmp_path / str(seed), seed=seed, test_share=0.4).categories
        assert (candle.num_train, candle.num_test_normal, candle.num_test_anomalous, candle.num_masks) == (3, 2, 1, 1)
        index = read_index(tmp_path / str(seed), "candle", "test")
        draws.add(tuple(index["content_hash"].to_pylist()))
    assert len(draws) > 1


def test_a_mask_in_the_layout_folder_lies_beside_the_folder_of_its_image_or_directly_in_masks(tmp_path: Path) -> None:
    report = ingest_quietly(make_folder(tmp_path / "clip"), tmp_path / "out")
    (clip,) = report.categories
    assert (report.format, report.rejects) == ("folder", ())
    assert (clip.num_train, clip.num_test_normal, clip.num_test_anomalous, clip.num_masks) == (8, 2, 2, 2)
    rows = rows_by_id(tmp_path / "out", "clip")
    assert {rows[name]["defect_type"] for name in ("bad_scratch/scratch/001", "bad/000")} == {"scratch", "bad"}


def test_only_the_requested_categories_are_ingested(tmp_path: Path) -> None:
    for name in ("bolt", "nut"):
        make_mvtec(tmp_path / "source" / name)
    ingest_quietly(tmp_path / "source", tmp_path / "out", categories=["nut"])
    assert list_categories(tmp_path / "out") == ["nut"]


def test_images_with_equal_stems_have_unique_ids(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    save(root / "train/good/000.bmp", pixels(77))
    ingest_quietly(root, tmp_path / "out")
    assert {"train/good/000.png", "train/good/000.bmp", "train/good/001"} <= {*rows_by_id(tmp_path / "out")}


@pytest.mark.skipif(not IMAGES.is_dir(), reason=f"no real images at {IMAGES}")
def test_real_categories_have_their_published_counts(tmp_path: Path) -> None:
    reports = [ingest_quietly(IMAGES / name, tmp_path / "out") for name in ("mvtec", "hazelnut_toy")]
    assert [report.rejects for report in reports] == [(), ()]
    counts = {
        item.name: (item.num_train, item.num_test_normal + item.num_test_anomalous, item.num_masks)
        for report in reports
        for item in report.categories
    }
    assert counts == {"bottle": (209, 83, 63), "screw": (320, 160, 119), "hazelnut_toy": (28, 23, 17)}


# Names of folders

GOOD = (
    "good|Good|OK|normal|Normals|Passed|no_defect|defect-free|Gutteile|i.O.|in_Ordnung|ohne Fehler|bueno|buoni|conforme"
)
GOOD += "|良品|OK images|Gut-Bilder|unbeschädigt|non-defective"
NOT_GOOD = ["crack", "not_good", "notok", "nok", "NG", "bad", "goodyear_logo", "broken", "abnormal", "kaputt", "ungut"]


@pytest.mark.parametrize("name", [*GOOD.split("|"), *NOT_GOOD])
def test_common_words_for_good_parts_are_recognised(name: str) -> None:
    assert means_good_parts(name) == (name not in NOT_GOOD)
    assert not (means_good_parts(name) and means_defective_parts(name))


def test_ambiguous_names_are_unclear() -> None:
    assert all(map(is_ambiguous_name, ["0", "negative", "other", "Unknown"]))
    assert not any(map(is_ambiguous_name, ["good", "crack"]))


@pytest.mark.parametrize(("train", "test"), [("good", "Good"), ("OK", "ok"), ("normal", "iO"), ("Gutteile", "GOOD")])
def test_every_name_for_good_parts_gives_normal_images_and_the_report_says_so(
    tmp_path: Path, train: str, test: str
) -> None:
    files = {f"train/{train}/0.png": 0, f"test/{test}/0.png": 1, "test/Kratzer/0.png": 2, "test/0/0.png": 3}
    text = str(ingest_quietly(save_all(tmp_path / "bolt", files), tmp_path / "out"))
    labels = {name: row["label"] for name, row in rows_by_id(tmp_path / "out").items()}
    assert labels == {"train/good/0": 0, "test/good/0": 0, "test/Kratzer/0": 1, "test/0/0": 1}
    for line in (f"train/{train}: 1 images, normal, for tr", f"test/{test}: 1 images, normal, for the", "test/0: in"):
        assert line in text


# Sources that are refused


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"object,split,image\n", "no column label"),
        (visa_table("candle,dev,normal,a.png,"), "line 7: .*split='dev'"),
        (visa_table("candle,train,anomaly,a.png,"), "line 7: .*'anomaly'.* in train"),
        (visa_table("candle,test,normal,../../etc/a.png,"), r"\.\./\.\./etc/a.png"),
    ],
)
def test_an_unusable_visa_table_is_refused_with_the_reason(tmp_path: Path, table: bytes, message: str) -> None:
    source = save_all(tmp_path / "visa", {**VISA_FILES, "split_csv/1cls.csv": table})
    with pytest.raises(DataError, match=message):
        ingest_quietly(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"source/pictures/a.png": 0}, r"train/good.*train/ok.*bad.*pictures"),
        ({"source/bolt/train/good/0.png": 0, "source/clip/good/0.png": 1}, r"bolt.*clip.*format="),
        ({"source/bolt/train/good/0.png": 0, "source/bolt/train/crack/0.png": 1}, "crack"),
        ({"source/bolt/train/good/0.png": 0, os.fsdecode(b"source/bolt/test/Br\xfcche/0.png"): 1}, r"Br\\xfcche"),
        ({}, "source: "),
    ],
)
def test_a_source_that_cannot_be_interpreted_is_refused(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    save_all(tmp_path, files)
    with pytest.raises(DataError, match=message):
        ingest_quietly(tmp_path / "source", tmp_path / "out")


def test_a_format_chooses_among_several_layouts(tmp_path: Path) -> None:
    make_mvtec(tmp_path / "source/bolt")
    make_folder(tmp_path / "source/clip")
    report = ingest_quietly(tmp_path / "source", tmp_path / "out", format="folder")
    assert [item.name for item in report.categories] == ["clip"]
    assert any("bolt: skipped" in note for note in report.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "coco"}, "'coco'"),
        ({"categories": ["nut"]}, "nut.*bolt"),
        ({"site": " "}, "site=' '"),
        ({"test_share": 1.0}, "test_share=1.0"),
        ({"out": "ftp://host/data"}, "ftp://host/data"),
    ],
)
def test_invalid_arguments_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ingest_quietly(make_mvtec(tmp_path / "bolt"), **{"out": tmp_path / "out", **options})
