"""Unusual files: the cases of the table in docs/use/data.md. Every file that is not ingested is reported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_sources import SIZE, encode, ingest_quietly, make_folder, make_mvtec, pixels, rows_by_id, save, save_all, spot
from PIL import Image

from focus_ray.data.images import encode_png
from focus_ray.data.read import list_categories
from focus_ray.errors import DataError

GIF = encode(Image.new("P", (4, 4)), "GIF")
MASK, NO_MASK = "ground_truth/crack/000_mask.png", "ground_truth/good/000_mask.png"
NOT_UTF8 = os.fsdecode(b"train/good/Schl\xfcssel.png")
TURNED, DEFECT = spot((0, 0), size=(16, 12)), "test/crack/900.png"
# case -> (path of a file that is added to those of `make_mvtec`, its content, and reason why the file is rejected)
CASES: dict[str, tuple[str, Any, str | None]] = {
    "zero bytes": ("train/good/x.png", b"", "empty"),
    "truncated": ("train/good/x.png", encode_png(pixels(9))[:-200], "truncated"),
    "text": ("train/good/x.jpg", b"<html>not found</html>", "not_an_image"),
    "a GIF with a wrong name": ("train/good/x.png", GIF, "unsupported"),
    "a GIF": ("train/good/x.gif", GIF, "unsupported"),
    "an unknown suffix": ("train/good/x.xyz", b"what is this", "unsupported"),
    "a good image with a mask of zeros": (NO_MASK, spot(), None),
    "a mask without an image": ("ground_truth/crack/099_mask.png", spot((1, 1)), "mask_without_image"),
    "the pixels of a test image": ("train/good/leak.bmp", 100, "duplicate_across_splits"),
    "a training image twice": ("train/good/900.png", 0, "duplicate_in_train"),
    "a test image twice": ("test/good/900.png", 100, None),
    "CMYK": ("train/good/x.tiff", encode(Image.new("CMYK", (16, 12), (0, 255, 255, 0)), "TIFF"), None),
    "16 bits": ("train/good/x.png", encode(Image.fromarray(np.full(SIZE, 40_000, np.uint16))), None),
    "alpha": ("train/good/x.png", encode(Image.new("RGBA", (16, 12), (9, 8, 7, 100))), None),
    "palette": ("train/good/x.png", encode(Image.fromarray(pixels(9)).convert("P")), None),
    "a suffix in upper case": ("train/good/x.PNG", encode_png(pixels(9)), None),
    **{name: (f"train/good/{name}", b"x", None) for name in ("license.txt", "readme.md", ".DS_Store", "Thumbs.db")},
}
# case -> (path and content of a file that is added to those of `make_mvtec`, reason, paths of the rejected files)
OTHER_CASES: dict[str, tuple[str, Any, str, list[str]]] = {
    "a name that is not UTF-8": (NOT_UTF8, 9, "file_name", ["train/good/Schl\\xfcssel.png"]),
    "a mask of another size": (MASK, TURNED, "mask_size", ["test/crack/000.png"]),
    "an unreadable mask": (MASK, b"", "mask_unreadable", ["test/crack/000.png"]),
    "a good image with a mask": (NO_MASK, spot((1, 1)), "mask_on_good", ["test/good/000.png"]),
    "a defect that is also a training image": (DEFECT, 0, "contradictory_label", ["train/good/000.png", DEFECT]),
    "a defect that is also a good test image": (DEFECT, 100, "contradictory_label", ["test/good/000.png", DEFECT]),
}


@pytest.mark.parametrize("case", [*CASES, *OTHER_CASES])
def test_exactly_the_unusable_files_are_rejected_with_their_reasons(case: str, tmp_path: Path, out: Path) -> None:
    path, content, reason, *rejected = {**CASES, **OTHER_CASES}[case]
    report = ingest_quietly(save_all(make_mvtec(tmp_path / "bolt"), {path: content}), out)
    expected = dict.fromkeys(rejected[0] if rejected else [path], reason) if reason else {}
    assert {item.path: item.reason for item in report.rejects} == expected
    assert report.exit_status == (3 if expected and not reason.startswith("duplicate_") else 0)
    rows = rows_by_id(out)
    if "train/good/x" in rows:  # an image in another mode is stored unchanged
        assert rows["train/good/x"]["image"] == content
    for name in expected:
        assert f"rejected ({reason}): {name}" in str(report)
    str(report).encode()


def test_a_mask_that_fits_two_images_rejects_both(tmp_path: Path, out: Path) -> None:
    root = save_all(make_folder(tmp_path / "clip"), {"bad_scratch/000.png": 60})
    reasons = {item.path: item.reason for item in ingest_quietly(root, out).rejects}
    assert reasons == dict.fromkeys(["bad/000.png", "bad_scratch/000.png"], "mask_ambiguous")


def test_a_visa_entry_without_its_file_is_rejected(tmp_path: Path, out: Path) -> None:
    table = b"object,split,label,image,mask\ncandle,train,normal,0.png,\ncandle,train,normal,lost.png,\n"
    root = save_all(tmp_path / "visa", {"0.png": 0, "split_csv/1cls.csv": table})
    assert [(item.path, item.reason) for item in ingest_quietly(root, out).rejects] == [("lost.png", "missing_file")]


def test_links_to_missing_files_and_pipes_are_rejected(tmp_path: Path, out: Path) -> None:
    source = make_mvtec(tmp_path / "bolt")
    (source / MASK).unlink()
    os.symlink("nowhere.png", source / MASK)
    os.symlink("../../.git/annex/objects/x", source / "train/good/9.png")
    os.mkfifo(source / "train/good/pipe.png")
    report = ingest_quietly(source, out)
    assert {item.path: item.reason for item in report.rejects} == {
        **{"train/good/9.png": "unreadable", "train/good/pipe.png": "unsupported"},
        "test/crack/000.png": "mask_unreadable",
    }
    assert "git annex get" in str(report)
    assert "'nowhere.png'" in str(report)


def test_a_rotated_image_has_its_upright_size(tmp_path: Path, out: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = encode(Image.fromarray(pixels(9)), "JPEG", exif=exif)
    files = {"test/crack/009.jpg": rotated, "ground_truth/crack/009_mask.png": TURNED}
    assert ingest_quietly(save_all(make_mvtec(tmp_path / "bolt"), files), out).rejects == ()
    row = rows_by_id(out)["test/crack/009"]
    assert (row["height"], row["width"]) == (16, 12)


@pytest.mark.parametrize("has_mask_of_zeros", [False, True])
def test_an_anomalous_image_without_a_usable_mask_is_ingested(
    tmp_path: Path, has_mask_of_zeros: bool, out: Path
) -> None:
    root = make_mvtec(tmp_path / "bolt")
    (root / MASK).unlink()
    save_all(root, {MASK: spot()} if has_mask_of_zeros else {})
    report = ingest_quietly(root, out)
    assert rows_by_id(out)["test/crack/000"]["mask"] is None
    assert any("test/crack/000.png: its mask" in note for note in report.notes) == has_mask_of_zeros


def flat_images(*values: int) -> dict[str, Any]:
    """Good images of few grey levels, which differ in their size."""
    images = {}
    for number in range(4):
        image = np.zeros((24, 32 + number, 3), np.uint8)
        for row, value in enumerate(values):
            image[row] = value
        images[f"train/good/{number}.png"] = image
    return images


RAMP = np.concatenate([np.arange(32), np.zeros(160)]).astype(np.uint8).reshape(SIZE)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (flat_images(0), "single colour"),
        (flat_images(0, 7, 255), "two or three pixel values"),
        ({"train/good/0.png": 0, "test/crack/0.png": 1}, "no good test image"),
        ({"train/good/0.png": 0, "raw/0.png": 1}, "raw: skipped"),
        ({"train/good/0.png": 0, "loose.png": 1}, "1 images beside the folders are skipped"),
        (
            {"train/good/0.png": 0, "train/good/a.txt": b"x", "train/good/.a": b"x"},
            "train/good: skipped 1 .txt, 1 hidden",
        ),
        ({"train/good/0.png": 0, "test/soft/0.png": 1, "ground_truth/soft/0.png": RAMP}, "1 masks have many values"),
        (
            {"train/good/0.png": 0, "test/dark/0.png": 1, "ground_truth/dark/0.png": ~spot((1, 1))},
            "1 masks mark more than half",
        ),
        ({"train/good/0.png": 0, "test/good/0.png": 1, "ground_truth/good/0.png": ~spot()}, "inverted"),
        (
            {"train/good/0.png": 0, "test/good/0.png": encode(Image.new("RGBA", (16, 12), (9, 8, 7, 0)))},
            "test/good/0.png: its alpha channel is 0 everywhere",
        ),
    ],
)
def test_the_report_mentions_what_is_probably_wrong(
    tmp_path: Path, files: dict[str, Any], expected: str, out: Path
) -> None:
    assert expected in str(ingest_quietly(save_all(tmp_path / "bolt", files), out))


def test_rejects_are_stored_beside_the_data_until_the_source_is_corrected(tmp_path: Path, out: Path) -> None:
    root = make_mvtec(tmp_path / "bolt")
    broken = save(root / "train/good/x.png", b"")
    report = ingest_quietly(root, out)
    rejects_file = tmp_path / "out/_rejects/category=bolt.parquet"
    (row,) = pq.read_table(rejects_file, partitioning=None).to_pylist()
    detail = report.rejects[0].detail
    assert row == {"path": "train/good/x.png", "category": "bolt", "reason": "empty", "detail": detail}
    broken.unlink()
    assert ingest_quietly(root, out).exit_status == 0
    assert not rejects_file.exists()


def test_a_category_without_usable_images_is_an_error_after_all_others_are_published(tmp_path: Path, out: Path) -> None:
    make_mvtec(tmp_path / "source/nut")
    save(tmp_path / "source/bolt/train/good/000.png", b"")
    with pytest.raises(DataError, match=r"bolt \(1 rejected: .*nut"):
        ingest_quietly(tmp_path / "source", out)
    assert list_categories(out) == ["nut"]
