"""The Parquet data set: importers, the handling of unusual files, atomic publication and readers.

The file is long because its tests share fixtures that take seconds.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_sources import SIZE, make_folder, make_mvtec, pixels, save, spot
from PIL import Image
from places import REPOSITORY, SHARED
from pyarrow import fs
from small_set import small_config

from focus_ray.data import store
from focus_ray.data.images import decode_image, decode_mask, encode_png
from focus_ray.data.read import data_fingerprint, list_categories, read_index, read_rows
from focus_ray.data.schema import INDEX_COLUMNS, SCHEMA
from focus_ray.errors import DataError
from focus_ray.fitting.split import plan_category, split_category
from focus_ray.ingestion import ingest as ingest_module
from focus_ray.ingestion.ingest import ingest
from focus_ray.ingestion.report import IngestReport
from focus_ray.training.streams import ray_dataset

IMAGES = SHARED / "data"


def rows_of(root: Path, category: str) -> list[dict[str, Any]]:
    index = read_index(root, category)
    return list(read_rows(root, category, index["row"].to_numpy(), SCHEMA.names))


def rows_by_id(root: Path, category: str) -> dict[str, dict[str, Any]]:
    return {row["id"].removeprefix(f"{category}/"): row for row in rows_of(root, category)}


def ingest_quietly(source: Path, destination: Path, **options: Any) -> IngestReport:
    return ingest(source, destination, progress=False, **options)


def reject_reasons(report: IngestReport) -> dict[str, str]:
    return {item.path: item.reason for item in report.rejects}


# Importers


def test_rows_of_mvtec_ad_have_all_columns(tmp_path: Path) -> None:
    source = make_mvtec(tmp_path / "bolt")
    report = ingest_quietly(source, tmp_path / "out", site="plant-7")
    rows = rows_by_id(tmp_path / "out", "bolt")
    assert sorted(rows) == [
        "test/crack/000",
        "test/crack/001",
        "test/good/000",
        "train/good/000",
        "train/good/001",
        "train/good/002",
    ]
    row = rows["test/crack/001"]
    assert row.pop("image") == (source / "test/crack/001.png").read_bytes()
    assert np.array_equal(decode_mask(row.pop("mask"), *SIZE), spot((1, 1)))
    assert row.pop("content_hash") == hashlib.sha256(b"12x16:" + pixels(201).tobytes()).hexdigest()
    assert row == {
        "id": "bolt/test/crack/001",
        "category": "bolt",
        "split": "test",
        "label": 1,
        "defect_type": "crack",
        "width": 16,
        "height": 12,
        "site": "plant-7",
        "group": "",
    }
    assert (report.format, report.exit_status, report.num_rows) == ("mvtec", 0, 6)


def test_a_part_file_has_the_schema_version_and_uncompressed_images(tmp_path: Path) -> None:
    ingest_quietly(make_mvtec(tmp_path / "bolt"), tmp_path / "out")
    (part,) = (tmp_path / "out/category=bolt").glob("part-*.parquet")
    file = pq.ParquetFile(part)
    assert file.schema_arrow.metadata[b"focus_ray.schema_version"] == b"1"
    assert file.metadata.row_group(0).column(SCHEMA.names.index("image")).compression == "UNCOMPRESSED"


def test_pyarrow_reads_the_root_with_partitioning_none(tmp_path: Path) -> None:
    for name in ("bolt", "nut"):
        make_mvtec(tmp_path / "source" / name, seed=ord(name[0]))
    ingest_quietly(tmp_path / "source", tmp_path / "out")
    table = pq.read_table(tmp_path / "out", partitioning=None)
    assert sorted(set(table["category"].to_pylist())) == ["bolt", "nut"]
    assert table.num_rows == 12


def test_mvtec_ad_2_is_ingested_without_its_private_images(tmp_path: Path) -> None:
    root = tmp_path / "can"
    save(root / "train/good/000_regular.png", pixels(0))
    save(root / "validation/good/000_regular.png", pixels(1))
    save(root / "test_public/good/000_regular.png", pixels(2))
    save(root / "test_public/bad/000_regular.png", pixels(3))
    save(root / "test_public/ground_truth/bad/000_regular_mask.png", spot((2, 2)))
    save(root / "test_private/000_regular.png", pixels(4))
    report = ingest_quietly(root, tmp_path / "out")
    rows = rows_by_id(tmp_path / "out", "can")
    assert {name: (row["split"], row["label"]) for name, row in rows.items()} == {
        "train/good/000_regular": ("train", 0),
        "validation/good/000_regular": ("train", 0),
        "test_public/good/000_regular": ("test", 0),
        "test_public/bad/000_regular": ("test", 1),
    }
    assert rows["test_public/bad/000_regular"]["mask"] is not None
    assert (report.rejects, [note for note in report.notes if "test_private" in note and "not public" in note]) == (
        (),
        list(report.notes),
    )


def test_the_loco_masks_of_one_image_are_combined(tmp_path: Path) -> None:
    root = tmp_path / "breakfast_box"
    save(root / "train/good/000.png", pixels(0))
    save(root / "validation/good/000.png", pixels(1))
    save(root / "test/logical_anomalies/000.png", pixels(2))
    save(root / "ground_truth/logical_anomalies/000/000.png", spot((1, 1)))
    save(root / "ground_truth/logical_anomalies/000/001.png", spot((3, 4)))
    report = ingest_quietly(root, tmp_path / "out")
    row = rows_by_id(tmp_path / "out", "breakfast_box")["test/logical_anomalies/000"]
    assert np.array_equal(decode_mask(row["mask"], *SIZE), spot((1, 1), (3, 4)))
    assert report.rejects == ()


def test_btad_is_ingested(tmp_path: Path) -> None:
    for name, suffix in (("01", "png"), ("03", "bmp")):
        root, seed = tmp_path / "btad" / name, int(name)
        save(root / "train/ok/0000.bmp", pixels(seed))
        save(root / "test/ok/0000.bmp", pixels(seed + 10))
        save(root / "test/ko/0000.bmp", pixels(seed + 20))
        save(root / f"ground_truth/ko/0000.{suffix}", spot((2, 3)))
    report = ingest_quietly(tmp_path / "btad", tmp_path / "out")
    assert (report.format, [item.name for item in report.categories], report.rejects) == ("btad", ["01", "03"], ())
    row = rows_by_id(tmp_path / "out", "03")["test/ko/0000"]
    assert (row["label"], row["defect_type"], decode_mask(row["mask"], *SIZE).sum()) == (1, "ko", 1)


def make_visa(root: Path) -> Path:
    for number in range(4):
        save(root / f"candle/Data/Images/Normal/{number:04}.png", pixels(number))
    save(root / "candle/Data/Images/Anomaly/000.png", pixels(50))
    save(root / "candle/Data/Masks/Anomaly/000.png", spot((0, 1)))
    return root


VISA_TABLE = """object,split,label,image,mask
candle,train,normal,candle/Data/Images/Normal/0000.png,
candle,train,normal,candle/Data/Images/Normal/0001.png,
candle,train,normal,candle/Data/Images/Normal/0002.png,
candle,test,normal,candle/Data/Images/Normal/0003.png,
candle,test,anomaly,candle/Data/Images/Anomaly/000.png,candle/Data/Masks/Anomaly/000.png
"""


def test_visa_is_ingested_with_its_split_table(tmp_path: Path) -> None:
    root = make_visa(tmp_path / "visa")
    save(root / "split_csv/1cls.csv", VISA_TABLE.encode())
    report = ingest_quietly(root, tmp_path / "out")
    (candle,) = report.categories
    assert (report.format, candle.num_train, candle.num_test_normal, candle.num_test_anomalous, candle.num_masks) == (
        *("visa", 3, 1, 1),
        1,
    )
    assert rows_by_id(tmp_path / "out", "candle")["test/anomaly/000"]["label"] == 1


def test_visa_without_a_split_draws_normal_test_images_by_seed(tmp_path: Path) -> None:
    root = make_visa(tmp_path / "visa")
    lines = [f"candle/Data/Images/Normal/{number:04}.png,normal," for number in range(4)]
    lines.append('candle/Data/Images/Anomaly/000.png,"burnt,bent",candle/Data/Masks/Anomaly/000.png')
    save(root / "candle/image_anno.csv", "\n".join(["image,label,mask", *lines]).encode())
    (candle,) = ingest_quietly(root, tmp_path / "out", test_share=0.25).categories
    assert (candle.num_train, candle.num_test_normal, candle.num_masks) == (3, 1, 1)
    assert rows_by_id(tmp_path / "out", "candle")["test/burnt_bent/000"]["defect_type"] == "burnt_bent"


def test_a_visa_entry_without_its_file_is_rejected(tmp_path: Path) -> None:
    root = make_visa(tmp_path / "visa")
    save(root / "split_csv/1cls.csv", VISA_TABLE.encode())
    (root / "candle/Data/Images/Normal/0001.png").unlink()
    assert reject_reasons(ingest_quietly(root, tmp_path / "out")) == {
        "candle/Data/Images/Normal/0001.png": "missing_file"
    }


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("object,split,image\n", "no column label"),
        (VISA_TABLE + "candle,dev,normal,a.png,\n", "line 7: .*split='dev'"),
        (VISA_TABLE + "candle,train,anomaly,a.png,\n", "line 7: an anomalous image .* in train"),
        (VISA_TABLE + "candle,test,normal,../../etc/a.png,\n", "\\.\\./\\.\\./etc/a.png"),
    ],
)
def test_an_unusable_visa_table_is_refused_with_the_reason(tmp_path: Path, table: str, message: str) -> None:
    root = make_visa(tmp_path / "visa")
    save(root / "split_csv/1cls.csv", table.encode())
    with pytest.raises(DataError, match=message):
        ingest_quietly(root, tmp_path / "out")


def test_the_layout_folder_splits_good_images_by_seed(tmp_path: Path) -> None:
    report = ingest_quietly(make_folder(tmp_path / "clip"), tmp_path / "out")
    (clip,) = report.categories
    assert (report.format, report.rejects) == ("folder", ())
    assert (clip.num_train, clip.num_test_normal, clip.num_test_anomalous, clip.num_masks) == (8, 2, 2, 2)
    rows = rows_by_id(tmp_path / "out", "clip")
    assert rows["bad_scratch/scratch/001"]["defect_type"] == "scratch"
    assert rows["bad/000"]["defect_type"] == "bad"
    test_names = {name for name, row in rows.items() if row["split"] == "test" and not row["label"]}
    ingest_quietly(tmp_path / "clip", tmp_path / "other", seed=1)
    other_rows = rows_by_id(tmp_path / "other", "clip")
    assert test_names != {name for name, row in other_rows.items() if row["split"] == "test" and not row["label"]}


def test_the_layout_folder_without_bad_images_has_only_training_images(tmp_path: Path) -> None:
    for number in range(5):
        save(tmp_path / f"parts/clip/good/{number}.png", pixels(number))
    (clip,) = ingest_quietly(tmp_path / "parts", tmp_path / "out").categories
    assert (clip.name, clip.num_train, clip.num_rows) == ("clip", 5, 5)


def test_a_mask_that_fits_two_images_rejects_both(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "clip")
    save(root / "bad_scratch/000.png", pixels(60))
    assert reject_reasons(ingest_quietly(root, tmp_path / "out")) == {
        "bad/000.png": "mask_ambiguous",
        "bad_scratch/000.png": "mask_ambiguous",
    }


def test_only_the_requested_categories_are_ingested(tmp_path: Path) -> None:
    for name in ("bolt", "nut"):
        make_mvtec(tmp_path / "source" / name)
    ingest_quietly(tmp_path / "source", tmp_path / "out", categories=["nut"])
    assert list_categories(tmp_path / "out") == ["nut"]


def test_images_with_equal_stems_have_unique_ids(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    save(root / "train/good/000.bmp", pixels(77))
    ingest_quietly(root, tmp_path / "out")
    names = set(rows_by_id(tmp_path / "out", "bolt"))
    assert {"train/good/000.png", "train/good/000.bmp", "train/good/001"} <= names


def test_hidden_files_and_text_files_are_ignored(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    for name in ("license.txt", "readme.md", ".DS_Store", "Thumbs.db"):
        save(root / "train/good" / name, b"text")
    assert ingest_quietly(root, tmp_path / "out").rejects == ()


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


# Sources that cannot be imported


def test_a_source_with_an_unknown_layout_is_refused_with_the_expected_layouts(tmp_path: Path) -> None:
    save(tmp_path / "source/pictures/a.png", pixels(0))
    with pytest.raises(DataError, match=r"no category found.*train/good.*train/ok.*bad.*Found: pictures"):
        ingest_quietly(tmp_path / "source", tmp_path / "out")


def test_a_source_with_two_layouts_needs_a_format(tmp_path: Path) -> None:
    make_mvtec(tmp_path / "source/bolt")
    make_folder(tmp_path / "source/clip")
    with pytest.raises(DataError, match=r"bolt.*clip.*format="):
        ingest_quietly(tmp_path / "source", tmp_path / "out")
    report = ingest_quietly(tmp_path / "source", tmp_path / "out", format="folder")
    assert [item.name for item in report.categories] == ["clip"]
    assert any("bolt: skipped" in note for note in report.notes)


@pytest.mark.parametrize("name", ["my bolt", "_bolt", "bolt=1", "schräubchen"])
def test_invalid_category_names_are_refused(tmp_path: Path, name: str) -> None:
    make_mvtec(tmp_path / "source" / name)
    with pytest.raises(DataError, match=rf"{name!r} .* category"):
        ingest_quietly(tmp_path / "source", tmp_path / "out")


def test_anomalous_images_in_train_are_refused(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    save(root / "train/crack/000.png", pixels(9))
    with pytest.raises(DataError, match=r"did not expect the folder crack here"):
        ingest_quietly(root, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "coco"}, "format='coco'"),
        ({"categories": ["nut"]}, "no category nut.*: bolt"),
        ({"site": " "}, "site=' '"),
        ({"test_share": 1.0}, "test_share=1.0"),
    ],
)
def test_invalid_arguments_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ingest_quietly(make_mvtec(tmp_path / "bolt"), tmp_path / "out", **options)


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: "):
        ingest_quietly(tmp_path / "nowhere", tmp_path / "out")


def test_a_destination_with_another_scheme_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ftp://host/data"):
        ingest(make_mvtec(tmp_path / "bolt"), "ftp://host/data", progress=False)


# Unusual files: the cases of the table in docs/use/data.md


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.png", b"", "empty"),
        ("x.png", encode_png(pixels(9))[:-200], "truncated"),
        ("x.jpg", b"<html>not found</html>", "not_an_image"),
        ("x.png", encode(Image.new("P", (4, 4)), "GIF"), "unsupported"),
        ("x.gif", encode(Image.new("P", (4, 4)), "GIF"), "unsupported"),
        ("x.xyz", b"what is this", "unsupported"),
    ],
)
def test_files_that_are_not_images_are_rejected(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    root = make_mvtec(tmp_path / "bolt")
    save(root / "train/good" / name, content)
    report = ingest_quietly(root, tmp_path / "out")
    assert reject_reasons(report) == {f"train/good/{name}": reason}
    assert (report.exit_status, report.num_rows) == (3, 6)
    assert f"rejected ({reason}): train/good/{name}" in str(report)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cmyk.tiff", encode(Image.new("CMYK", (16, 12), (0, 255, 255, 0)), "TIFF")),
        ("deep.png", encode(Image.fromarray(np.full(SIZE, 40_000, np.uint16)), "PNG")),
        ("grey.png", encode_png(pixels(9)[:, :, 0])),
        ("alpha.png", encode(Image.new("RGBA", (16, 12), (9, 8, 7, 100)), "PNG")),
        ("palette.png", encode(Image.fromarray(pixels(9)).convert("P"), "PNG")),
        ("loud.PNG", encode_png(pixels(9))),
    ],
)
def test_images_in_other_modes_are_stored_unchanged(tmp_path: Path, name: str, content: bytes) -> None:
    root = make_mvtec(tmp_path / "bolt")
    save(root / "train/good" / name, content)
    assert ingest_quietly(root, tmp_path / "out").rejects == ()
    row = rows_by_id(tmp_path / "out", "bolt")[f"train/good/{Path(name).stem}"]
    assert row["image"] == content
    assert decode_image(row["image"], 8).shape == (8, 8, 3)


def test_a_rotated_image_has_its_upright_size(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / "test/crack/009.jpg", encode(Image.fromarray(pixels(9)), "JPEG", exif=exif))
    save(root / "ground_truth/crack/009_mask.png", spot((0, 0), size=(16, 12)))
    assert ingest_quietly(root, tmp_path / "out").rejects == ()
    row = rows_by_id(tmp_path / "out", "bolt")["test/crack/009"]
    assert (row["height"], row["width"]) == (16, 12)


def test_a_mask_with_another_size_rejects_its_image(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    save(root / "ground_truth/crack/000_mask.png", spot((0, 0), size=(16, 12)))
    report = ingest_quietly(root, tmp_path / "out")
    assert reject_reasons(report) == {"test/crack/000.png": "mask_size"}
    assert "12 x 16 pixels, the image 16 x 12" in str(report)


def test_an_unreadable_mask_rejects_its_image(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    save(root / "ground_truth/crack/000_mask.png", b"")
    assert reject_reasons(ingest_quietly(root, tmp_path / "out")) == {"test/crack/000.png": "mask_unreadable"}


def test_an_anomalous_image_without_a_mask_is_ingested(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    (root / "ground_truth/crack/000_mask.png").unlink()
    assert ingest_quietly(root, tmp_path / "out").rejects == ()
    assert rows_by_id(tmp_path / "out", "bolt")["test/crack/000"]["mask"] is None


def test_an_empty_mask_of_an_anomalous_image_is_dropped_with_a_note(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    save(root / "ground_truth/crack/000_mask.png", spot())
    report = ingest_quietly(root, tmp_path / "out")
    assert rows_by_id(tmp_path / "out", "bolt")["test/crack/000"]["mask"] is None
    assert any("test/crack/000.png: its mask" in note for note in report.notes)


def test_a_nonempty_mask_of_a_good_image_rejects_the_image(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    save(root / "ground_truth/good/000_mask.png", spot((1, 1)))
    assert reject_reasons(ingest_quietly(root, tmp_path / "out")) == {"test/good/000.png": "mask_on_good"}


def test_an_empty_mask_of_a_good_image_is_dropped(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    save(root / "ground_truth/good/000_mask.png", spot())
    assert ingest_quietly(root, tmp_path / "out").rejects == ()
    assert rows_by_id(tmp_path / "out", "bolt")["test/good/000"]["mask"] is None


def test_a_mask_without_an_image_is_rejected(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    save(root / "ground_truth/crack/099_mask.png", spot((1, 1)))
    assert reject_reasons(ingest_quietly(root, tmp_path / "out")) == {
        "ground_truth/crack/099_mask.png": "mask_without_image"
    }


def test_a_training_image_with_the_pixels_of_a_test_image_is_rejected_even_in_another_encoding(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    save(root / "train/good/leak.bmp", pixels(100))
    report = ingest_quietly(root, tmp_path / "out")
    assert reject_reasons(report) == {"train/good/leak.bmp": "duplicate_across_splits"}
    assert "test/good/000" in rows_by_id(tmp_path / "out", "bolt")


def test_duplicates_among_training_images_are_rejected(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    save(root / "train/good/900.png", pixels(0))
    assert reject_reasons(ingest_quietly(root, tmp_path / "out")) == {"train/good/900.png": "duplicate_in_train"}


def test_duplicates_among_test_images_are_kept(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    save(root / "test/good/900.png", pixels(100))
    assert ingest_quietly(root, tmp_path / "out").rejects == ()


@pytest.mark.parametrize("twin", ["train/good/000.png", "test/good/000.png"])
def test_two_images_with_the_same_pixels_and_different_labels_are_both_rejected(tmp_path: Path, twin: str) -> None:
    root = make_mvtec(tmp_path / "bolt")
    save(root / "test/crack/900.png", decode_image((root / twin).read_bytes(), None))
    assert reject_reasons(ingest_quietly(root, tmp_path / "out")) == dict.fromkeys(
        [twin, "test/crack/900.png"], "contradictory_label"
    )


def test_rejects_are_stored_beside_the_data_until_the_source_is_corrected(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    broken = save(root / "train/good/x.png", b"")
    report = ingest_quietly(root, tmp_path / "out")
    rejects_file = tmp_path / "out/_rejects/category=bolt.parquet"
    (row,) = pq.read_table(rejects_file, partitioning=None).to_pylist()
    assert row == {
        "path": "train/good/x.png",
        "category": "bolt",
        "reason": "empty",
        "detail": report.rejects[0].detail,
    }
    broken.unlink()
    assert ingest_quietly(root, tmp_path / "out").exit_status == 0
    assert not rejects_file.exists()


def test_a_category_without_usable_images_is_an_error_after_all_others_are_published(tmp_path: Path) -> None:
    make_mvtec(tmp_path / "source/nut")
    save(tmp_path / "source/bolt/train/good/000.png", b"")
    with pytest.raises(DataError, match=r"bolt \(1 rejected: .*0 bytes.*Published: nut"):
        ingest_quietly(tmp_path / "source", tmp_path / "out")
    assert list_categories(tmp_path / "out") == ["nut"]


# Publication


def test_an_unchanged_source_changes_no_file(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    save(root / "train/good/x.png", b"")
    first = ingest_quietly(root, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    second = ingest_quietly(root, tmp_path / "out")
    assert [item.status for item in second.categories] == ["unchanged"]
    assert (second.exit_status, second.rejects) == (3, first.rejects)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("change", ["image", "mask", "name", "site"])
def test_every_change_of_the_source_is_published(tmp_path: Path, change: str) -> None:
    root = make_mvtec(tmp_path / "bolt")
    ingest_quietly(root, tmp_path / "out")
    if change == "image":
        save(root / "train/good/000.png", pixels(999))
    elif change == "mask":
        save(root / "ground_truth/crack/000_mask.png", spot((5, 5)))
    elif change == "name":
        (root / "train/good/000.png").rename(root / "train/good/zzz.png")
    report = ingest_quietly(root, tmp_path / "out", site="other" if change == "site" else "default")
    assert [item.status for item in report.categories] == ["written"]


def test_ingesting_again_restores_a_missing_part_file(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    ingest_quietly(root, tmp_path / "out")
    next((tmp_path / "out/category=bolt").glob("part-*")).unlink()
    with pytest.raises(DataError, match=r"part-.*cannot read a part file"):
        rows_of(tmp_path / "out", "bolt")
    assert ingest_quietly(root, tmp_path / "out").categories[0].status == "written"
    assert read_index(tmp_path / "out", "bolt").num_rows == 6


@pytest.mark.parametrize("moment", ["_row_groups", "index", "write_rejects", "commit"])
def test_a_run_that_is_killed_while_publishing_leaves_the_old_data(tmp_path: Path, moment: str) -> None:
    root, out = make_mvtec(tmp_path / "bolt"), tmp_path / "out"
    ingest_quietly(root, out)
    old = rows_of(out, "bolt")
    save(root / "train/good/new.png", pixels(999))
    program = f"""
import os, sys
from focus_ray.data import store
from focus_ray.ingestion import ingest
def die(*args, **kwargs):
    os._exit(9)
store.Store.check_writable = lambda self: None
if {moment!r} == "write_rejects":
    store.Store.write_rejects = die
elif {moment!r} in ("index", "commit"):
    write = store.write_file
    def write_until(filesystem, path, data):
        if "/_" + {moment!r} in path:
            die()
        write(filesystem, path, data)
    store.write_file = write_until
else:
    original = store._row_groups
    def one_then_die(rows):
        yield next(original(rows))
        die()
    store._row_groups = one_then_die
ingest.ingest(sys.argv[1], sys.argv[2], progress=False)
"""
    package_root = str(REPOSITORY)
    environment = {**os.environ, "PYTHONPATH": package_root}
    killed = subprocess.run([sys.executable, "-c", program, str(root), str(out)], env=environment, check=False)
    assert killed.returncode == 9
    assert len(list((out / "category=bolt").glob("part-*"))) == 2
    assert len(list((out / "category=bolt").glob("_index-*"))) == 1 + (moment in ("write_rejects", "commit"))
    assert rows_of(out, "bolt") == old
    assert ingest_quietly(root, out).categories[0].status == "written"
    assert read_index(out, "bolt").num_rows == 7


@pytest.mark.parametrize("name", ["part-{}-00000.parquet", "_index-{}.parquet"])
def test_leftover_files_are_deleted_after_a_day_and_not_before(tmp_path: Path, name: str) -> None:
    root, folder = make_mvtec(tmp_path / "bolt"), tmp_path / "out/category=bolt"
    old_file, new_file = save(folder / name.format("dead"), b"x"), save(folder / name.format("live"), b"x")
    os.utime(old_file, (1, 1))
    ingest_quietly(root, tmp_path / "out")
    assert (old_file.exists(), new_file.exists()) == (False, True)
    assert read_index(tmp_path / "out", "bolt").num_rows == 6  # a file that no commit names adds no rows


def test_a_source_that_changes_during_the_ingestion_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_mvtec(tmp_path / "bolt")
    original = ingest_module.remove_duplicates

    def change_then_continue(*args: Any) -> Any:
        save(root / "train/good/001.png", pixels(999))
        return original(*args)

    monkeypatch.setattr(ingest_module, "remove_duplicates", change_then_continue)
    with pytest.raises(DataError, match=r"001.png: .*changed during"):
        ingest_quietly(root, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("part-*"))


def test_a_destination_that_is_not_writable_is_reported_before_decoding(tmp_path: Path) -> None:
    blocked = save(tmp_path / "file", b"")
    with pytest.raises(DataError, match=r"cannot (write|list|read).*"):
        ingest_quietly(make_mvtec(tmp_path / "bolt"), blocked / "out")


# Readers


def commit_of(root: Path, category: str) -> dict[str, Any]:
    return dict(json.loads((root / f"category={category}/_commit.json").read_text()))


def remove_index(root: Path, category: str) -> None:
    """Turns the category into one of an old program, whose commit names no index."""
    commit = commit_of(root, category)
    folder = root / f"category={category}"
    (folder / commit.pop("index")["name"]).unlink()
    (folder / "_commit.json").write_text(json.dumps(commit))


@pytest.fixture
def small_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of 40 rows, in row groups of 7 rows and part files of 2 row groups."""
    monkeypatch.setattr(store, "MAX_ROW_GROUP_ROWS", 7)
    monkeypatch.setattr(store, "FILE_BYTES", 12 * SIZE[0] * SIZE[1] * 3)
    ingest_quietly(make_mvtec(tmp_path / "bolt", num_train=37), tmp_path / "out")
    return tmp_path / "out"


def test_rows_are_numbered_across_files(small_groups: Path) -> None:
    assert len(list((small_groups / "category=bolt").glob("part-*"))) == 3
    index = read_index(small_groups, "bolt")
    assert index["row"].to_pylist() == list(range(40))
    assert [row["id"] for row in rows_of(small_groups, "bolt")] == index["id"].to_pylist()
    assert index["id"].to_pylist() == sorted(index["id"].to_pylist())


def test_any_ascending_row_numbers_are_read(small_groups: Path) -> None:
    names = read_index(small_groups, "bolt")["id"].to_pylist()

    @settings(max_examples=25, deadline=None)
    @given(st.sets(st.integers(0, 39)))
    def check(numbers: set[int]) -> None:
        rows = read_rows(small_groups, "bolt", sorted(numbers), ["id"])
        assert [row["id"] for row in rows] == [names[number] for number in sorted(numbers)]

    check()


def test_only_the_row_groups_of_the_requested_rows_are_read(
    small_groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_groups: list[int] = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, i, **options: read_groups.append(i) or original(self, i, **options),
    )
    assert len(list(read_rows(small_groups, "bolt", [0, 3, 15]))) == 3
    assert read_groups == [0, 0]  # the first row group of file 0 and of file 1


def test_the_index_of_one_split_has_only_its_rows(small_groups: Path) -> None:
    index = read_index(small_groups, "bolt", "test")
    assert set(index["split"].to_pylist()) == {"test"}
    rows = read_rows(small_groups, "bolt", index["row"].to_numpy(), ["id"])
    assert [row["id"] for row in rows] == index["id"].to_pylist()


@pytest.mark.parametrize(
    ("numbers", "columns", "message"),
    [
        ([3, 1], ["id"], "strictly ascending"),
        ([1, 1], ["id"], "strictly ascending"),
        ([-1], ["id"], "has 40 rows"),
        ([40], ["id"], "has 40 rows"),
        ([1], ["pixels"], "no column pixels.*: id, "),
    ],
)
def test_unreadable_rows_are_refused_at_the_call(
    small_groups: Path, numbers: list[int], columns: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(small_groups, "bolt", numbers, columns)


def test_a_missing_category_is_refused_with_the_available_ones(small_groups: Path) -> None:
    with pytest.raises(DataError, match=r"no category 'nut'.*: bolt"):
        read_index(small_groups, "nut")
    with pytest.raises(DataError, match="split='val'"):
        read_index(small_groups, "bolt", "val")


def test_a_missing_data_set_is_reported(tmp_path: Path) -> None:
    for read in (list_categories, lambda uri: read_index(uri, "bolt"), lambda uri: data_fingerprint(uri, "bolt")):
        with pytest.raises(DataError, match="no data set here"):
            read(tmp_path / "nowhere")


def test_another_schema_version_is_refused(small_groups: Path) -> None:
    path = small_groups / "category=bolt/_commit.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))
    with pytest.raises(DataError, match="schema version 2, this program reads 1"):
        read_index(small_groups, "bolt")


def test_a_damaged_commit_is_refused(small_groups: Path) -> None:
    (small_groups / "category=bolt/_commit.json").write_text('{"schema_version": 1}')
    with pytest.raises(DataError, match="not a commit file"):
        read_index(small_groups, "bolt")


def test_a_damaged_part_file_is_refused(small_groups: Path) -> None:
    index = read_index(small_groups, "bolt")
    remove_index(small_groups, "bolt")
    for part in (small_groups / "category=bolt").glob("part-*"):
        part.write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    for read in (read_index, lambda *at: list(read_rows(*at, index["row"].to_numpy()))):
        with pytest.raises(DataError, match=r"part file .* is damaged|cannot read a part file"):
            read(small_groups, "bolt")


def test_the_fingerprint_depends_on_the_content_but_not_on_names_or_encoding(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    ingest_quietly(root, tmp_path / "a")
    (root / "train/good/000.png").unlink()
    save(root / "train/good/other.bmp", pixels(0))
    ingest_quietly(root, tmp_path / "b")
    assert data_fingerprint(tmp_path / "a", "bolt") == data_fingerprint(tmp_path / "b", "bolt")
    save(root / "train/good/extra.png", pixels(999))
    ingest_quietly(root, tmp_path / "c")
    assert data_fingerprint(tmp_path / "a", "bolt") != data_fingerprint(tmp_path / "c", "bolt")


# The index


class RecordingFilesystem:
    """A filesystem that records the calls that are requests on S3: a lookup of a file, its opening, and each read."""

    def __init__(self) -> None:
        self.local, self.requests = fs.LocalFileSystem(), list[str]()

    def get_file_info(self, path: str) -> fs.FileInfo:
        self.requests.append(f"look {path}")
        return self.local.get_file_info(path)

    def open_input_file(self, path: str) -> RecordingFile:
        self.requests.append(f"open {path}")
        return RecordingFile(self.local.open_input_file(path), path, self.requests)


class RecordingFile:
    def __init__(self, file: Any, path: str, requests: list[str]) -> None:
        self.file, self.path, self.requests = file, path, requests
        self.size, self.close = file.size, file.close

    def read_at(self, count: int, position: int) -> bytes:
        self.requests.append(f"read {self.path}")
        return bytes(self.file.read_at(count, position))


def requests_of(action: Callable[[], object]) -> list[str]:
    """Returns the requests that an action sends to the storage."""
    filesystem = RecordingFilesystem()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "open_filesystem", lambda uri: (filesystem, str(uri)))
        action()
    return filesystem.requests


def test_the_index_equals_the_columns_of_the_part_files(small_groups: Path, tmp_path: Path) -> None:
    make_mvtec(tmp_path / "nut", num_train=9, seed=500)
    make_folder(tmp_path / "clip")
    ingest_quietly(tmp_path / "nut", small_groups, site="plant-7")
    ingest_quietly(tmp_path / "clip", small_groups)
    save(tmp_path / "bolt/train/good/0000.png", pixels(999))
    ingest_quietly(tmp_path / "bolt", small_groups, site="plant-8")
    for category, num_rows, site in (("bolt", 41, "plant-8"), ("nut", 12, "plant-7"), ("clip", 12, "default")):
        location = (small_groups, category)
        tables = [read_index(*location, split) for split in (None, "train", "test")]
        fingerprint = data_fingerprint(*location)
        assert tables[0].column_names == [*INDEX_COLUMNS, "row"]
        assert (tables[0].num_rows, set(tables[0]["site"].to_pylist())) == (num_rows, {site})
        remove_index(*location)
        for table, split in zip(tables, (None, "train", "test"), strict=True):
            parts = read_index(*location, split)
            assert parts.schema.equals(table.schema, check_metadata=True)
            assert parts.equals(table)
        assert data_fingerprint(*location) == fingerprint


def test_a_category_without_an_index_is_complete_and_its_next_version_has_an_index(
    small_groups: Path, tmp_path: Path
) -> None:
    remove_index(small_groups, "bolt")
    assert ingest_quietly(tmp_path / "bolt", small_groups).categories[0].status == "unchanged"
    assert len(rows_of(small_groups, "bolt")) == 40
    save(tmp_path / "bolt/train/good/new.png", pixels(999))
    ingest_quietly(tmp_path / "bolt", small_groups)
    index = small_groups / "category=bolt" / commit_of(small_groups, "bolt")["index"]["name"]
    assert pq.read_table(index).column_names == list(INDEX_COLUMNS)
    assert read_index(small_groups, "bolt").num_rows == 41


def test_the_number_of_requests_for_an_index_does_not_depend_on_the_number_of_part_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_mvtec(tmp_path / "bolt", num_train=37)
    monkeypatch.setattr(store, "MAX_ROW_GROUP_ROWS", 4)
    counts = {}
    for file_bytes in (1, 1 << 30):
        out = tmp_path / f"out-{file_bytes}"
        monkeypatch.setattr(store, "FILE_BYTES", file_bytes)
        ingest_quietly(tmp_path / "bolt", out)
        requests = requests_of(lambda out=out: read_index(out, "bolt"))
        assert not [request for request in requests if "part-" in request]
        num_parts = len(commit_of(out, "bolt")["files"])
        remove_index(out, "bolt")
        counts[num_parts] = (len(requests), len(requests_of(lambda out=out: read_index(out, "bolt"))))
    assert sorted(counts) == [1, 10]
    assert counts[1][0] == counts[10][0] <= 4  # an opening and a read each for commit and index
    assert counts[10][1] - counts[1][1] >= 9 * 2  # without an index every part file is opened and read


def test_a_plan_reads_the_index_once(tmp_path: Path) -> None:
    ingest_quietly(make_mvtec(tmp_path / "bolt", num_train=37), tmp_path / "out")
    config = small_config(str(tmp_path / "out"), tmp_path)
    requests = requests_of(lambda: plan_category(config, "bolt"))
    assert len([request for request in requests if request.startswith("open")]) == 2  # the commit and the index
    plan, split = plan_category(config, "bolt"), split_category(config, "bolt")
    assert plan.fingerprint == data_fingerprint(tmp_path / "out", "bolt")
    remove_index(tmp_path / "out", "bolt")
    assert split_category(config, "bolt") == split


def test_part_files_are_read_in_parallel_and_keep_their_order(
    small_groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_index(small_groups, "bolt")
    remove_index(small_groups, "bolt")
    original, barrier = pq.ParquetFile.read, threading.Barrier(3, timeout=30)

    def wait_for_other_readers(self: pq.ParquetFile, **options: Any) -> Any:
        barrier.wait()
        return original(self, **options)

    monkeypatch.setattr(pq.ParquetFile, "read", wait_for_other_readers)
    assert read_index(small_groups, "bolt").equals(expected)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "text"])
def test_a_damaged_index_is_reported_and_restored_by_ingesting_again(
    small_groups: Path, tmp_path: Path, damage: str
) -> None:
    expected = read_index(small_groups, "bolt")
    path = small_groups / "category=bolt" / commit_of(small_groups, "bolt")["index"]["name"]
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        flipped = data[:100] + bytes([data[100] ^ 1]) + data[101:]
        path.write_bytes({"cut": data[:-1], "flipped": flipped, "text": b"text"}[damage])
    for read in (read_index, data_fingerprint):
        with pytest.raises(DataError, match=rf"index .*{path.name} is missing or damaged"):
            read(small_groups, "bolt")
    assert ingest_quietly(tmp_path / "bolt", small_groups).categories[0].status == "written"
    assert read_index(small_groups, "bolt").equals(expected)


def test_a_commit_with_an_incomplete_index_entry_is_refused(small_groups: Path) -> None:
    path = small_groups / "category=bolt/_commit.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "index": {"name": "_index-x.parquet"}}))
    with pytest.raises(DataError, match=r"not a commit file .*sha256"):
        read_index(small_groups, "bolt")


def test_an_index_that_cannot_be_written_leaves_the_old_data_and_no_files(
    small_groups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, before = rows_of(small_groups, "bolt"), sorted(small_groups.rglob("*"))
    save(tmp_path / "bolt/train/good/new.png", pixels(999))

    def full(filesystem: fs.FileSystem, path: str, data: bytes) -> None:
        if "/_index-" in path:
            raise OSError("no space left")

    monkeypatch.setattr(store, "write_file", full)
    monkeypatch.setattr(store.Store, "check_writable", lambda self: None)
    with pytest.raises(DataError, match=r"_index-.*no space left"):
        ingest_quietly(tmp_path / "bolt", small_groups)
    assert sorted(small_groups.rglob("*")) == before
    assert rows_of(small_groups, "bolt") == old


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    import ray

    starts_ray = not ray.is_initialized()
    if starts_ray:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    if starts_ray:
        ray.shutdown()


@pytest.mark.ray
def test_ray_reads_exactly_the_committed_rows(small_groups: Path, local_ray: None) -> None:
    save(small_groups / "category=bolt/part-stray-00000.parquet", b"not even Parquet")
    expected = rows_of(small_groups, "bolt")
    ray_rows = ray_dataset(small_groups, "bolt").take_all()
    assert sorted(ray_rows, key=lambda row: row["id"]) == expected


@pytest.mark.ray
def test_ray_reads_one_split_and_the_requested_columns(small_groups: Path, local_ray: None) -> None:
    ray_rows = ray_dataset(small_groups, "bolt", "test", ["id", "label"]).take_all()
    expected = [{"id": r["id"], "label": r["label"]} for r in rows_of(small_groups, "bolt") if r["split"] == "test"]
    assert sorted(ray_rows, key=lambda row: row["id"]) == expected
