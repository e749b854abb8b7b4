"""Unusual sources: folder names in many languages, links, invalid file names, wrong masks. Every skipped file is reported."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from focus_ray.data.images import decode_mask, encode_png, resize_mask
from focus_ray.data.importers.vocabulary import is_bad_name, is_good_name, is_unclear_name
from focus_ray.data.read import read_index
from focus_ray.errors import DataError
from focus_ray.ingestion.ingest import ingest
from focus_ray.ingestion.report import IngestReport

SIZE = (24, 32)


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def save(path: Path, content: bytes | np.ndarray | int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = pixels(content) if isinstance(content, int) else content
    path.write_bytes(content if isinstance(content, bytes) else encode_png(content))
    return path


def make_source(root: Path, train: str = "good", tests: tuple[str, ...] = ("good", "crack")) -> Path:
    for number in range(3):
        save(root / "train" / train / f"{number}.png", number)
    for number, name in enumerate(tests):
        save(root / "test" / name / "0.png", 100 + number)
    return root


def ingest_quietly(source: Path) -> IngestReport:
    return ingest(source, source.parent / "out", progress=False)


def labels(source: Path) -> dict[str, int]:
    """Returns the label of each folder of test images."""
    index = read_index(str(source.parent / "out"), source.name, split="test")
    return {
        str(name).split("/")[2]: label
        for name, label in zip(index["id"].to_pylist(), index["label"].to_pylist(), strict=True)
    }


# Names

GOOD = ["good", "Good", "GOOD", "ok", "OK", "Ok", "normal", "Normals", "goods", "okay", "pass", "Passed", "no_defect"]
GOOD += ["No Defects", "defect-free", "gut", "Gutteile", "iO", "i.O.", "in_Ordnung", "fehlerfrei", "ohne Fehler", "bon"]
GOOD += [
    "bueno",
    "buoni",
    "conforme",
    "良品",
    "正常",
    "good_parts",
    "OK images",
    "Gut-Bilder",
    "unbeschädigt",
    "non-defective",
]


@pytest.mark.parametrize("name", GOOD)
def test_common_words_for_good_parts_are_recognised(name: str) -> None:
    assert is_good_name(name)
    assert not is_bad_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "crack",
        "not_good",
        "notok",
        "nok",
        "NG",
        "bad",
        "goodyear_logo",
        "broken",
        "abnormal",
        "kaputt",
        "scratch",
        "ungut",
    ],
)
def test_other_words_do_not_mean_good_parts(name: str) -> None:
    assert not is_good_name(name)


def test_ambiguous_names_are_unclear() -> None:
    assert all(map(is_unclear_name, ["0", "negative", "other", "Unknown"]))
    assert not any(map(is_unclear_name, ["good", "crack"]))


@pytest.mark.parametrize("train", ["good", "Good", "OK", "normal", "Gutteile"])
@pytest.mark.parametrize("test", ["Good", "OK", "ok", "normal", "iO", "GOOD"])
def test_every_name_for_good_parts_gives_normal_images(tmp_path: Path, train: str, test: str) -> None:
    source = make_source(tmp_path / "bolt", train, (test, "Kratzer"))
    report = ingest_quietly(source)
    assert labels(source) == {"good": 0, "Kratzer": 1}
    text = str(report)
    assert f"train/{train}: 3 images, normal, for training" in text
    assert f"test/{test}: 1 images, normal, for the test" in text
    assert "test/Kratzer: 1 images, anomalous, 'Kratzer', for the test" in text


def test_the_layout_folder_accepts_the_names_ok_and_ng(tmp_path: Path) -> None:
    for number in range(5):
        save(tmp_path / "clip" / "OK" / f"{number}.png", number)
    save(tmp_path / "clip" / "NG" / "0.png", 50)
    report = ingest_quietly(tmp_path / "clip")
    (clip,) = report.categories
    assert (report.format, clip.num_train, clip.num_test_normal, clip.num_test_anomalous) == ("folder", 4, 1, 1)


def test_missing_good_test_images_and_unclear_folder_names_are_noted(tmp_path: Path) -> None:
    text = str(ingest_quietly(make_source(tmp_path / "bolt", tests=("0", "crack"))))
    assert "bolt: no good test image" in text
    assert "test/0: interpreted as a defect named '0'" in text


@pytest.mark.parametrize(
    ("label", "expected"), [("False", 0), ("True", 1), ("0", 0), ("OK", 0), ("Normal", 0), ("crack", 1)]
)
def test_a_visa_table_may_state_whether_a_part_is_anomalous(tmp_path: Path, label: str, expected: int) -> None:
    source = tmp_path / "visa"
    lines = ["object,split,label,image,mask"]
    for number in range(3):
        save(source / f"candle/{number}.png", number)
        lines.append(f"candle,train,False,candle/{number}.png,")
    save(source / "candle/t.png", 9)
    lines.append(f"candle,test,{label},candle/t.png,")
    save(source / "split_csv/1cls.csv", "\n".join(lines).encode())
    ingest(source, tmp_path / "out", progress=False)
    assert read_index(str(tmp_path / "out"), "candle", split="test")["label"].to_pylist() == [expected]


# Files that are listed but not ingested


def test_broken_links_are_rejected(tmp_path: Path) -> None:
    source = make_source(tmp_path / "bolt")
    os.symlink("../../.git/annex/objects/x", source / "train/good/9.png")
    os.symlink("nowhere.png", source / "test/crack/9.png")
    report = ingest_quietly(source)
    assert {item.path: item.reason for item in report.rejects} == {
        "train/good/9.png": "unreadable",
        "test/crack/9.png": "unreadable",
    }
    assert "git annex get, dvc pull" in str(report)
    assert report.exit_status == 3


def test_a_mask_that_is_a_broken_link_rejects_its_image(tmp_path: Path) -> None:
    source = make_source(tmp_path / "bolt")
    (source / "ground_truth/crack").mkdir(parents=True)
    os.symlink("nowhere.png", source / "ground_truth/crack/0_mask.png")
    (reject,) = ingest_quietly(source).rejects
    assert (reject.path, reject.reason) == ("test/crack/0.png", "mask_unreadable")
    assert "a link to 'nowhere.png'" in reject.detail


def test_pipes_other_files_and_unknown_folders_are_reported(tmp_path: Path) -> None:
    source = make_source(tmp_path / "bolt")
    os.mkfifo(source / "train/good/pipe.png")
    save(source / "train/good/notes.txt", b"text")
    save(source / "train/good/.DS_Store", b"text")
    save(source / "raw/0.png", 7)
    save(source / "loose.png", 8)
    report = ingest_quietly(source)
    assert [(item.path, item.reason) for item in report.rejects] == [("train/good/pipe.png", "unsupported")]
    text = str(report)
    assert "train/good: skipped 1 .txt, 1 hidden" in text
    assert "raw: skipped" in text
    assert "1 images beside the folders are skipped" in text


def test_only_the_file_with_an_invalid_name_is_rejected(tmp_path: Path) -> None:
    source = make_source(tmp_path / "bolt")
    invalid_path = os.fsencode(source / "train/good") + b"/Schl\xfcssel.png"
    Path(os.fsdecode(invalid_path)).write_bytes(encode_png(pixels(9)))
    report = ingest_quietly(source)
    (reject,) = report.rejects
    assert (reject.path, reject.reason) == ("train/good/Schl\\xfcssel.png", "file_name")
    str(report).encode()
    assert report.categories[0].num_train == 3


def test_a_defect_folder_with_an_invalid_name_is_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "bolt")
    os.rename(source / "test/crack", os.fsencode(source / "test") + b"/Br\xfcche")
    with pytest.raises(DataError, match=r"Br\\xfcche: .*not valid UTF-8"):
        ingest_quietly(source)


# Images and masks that are probably wrong


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0], "single colour"), ([0, 255], "two or three pixel values"), ([0, 7, 255], "two or three pixel values")],
)
def test_images_with_at_most_three_pixel_values_are_noted(tmp_path: Path, values: list[int], expected: str) -> None:
    source = tmp_path / "bolt"
    for number in range(4):
        image = np.zeros((*SIZE, 3), np.uint8)
        if len(values) > 1:
            for row, value in enumerate(values):
                image[row + number * 3 : row + 4 + number * 3] = value
        else:
            image = image[: SIZE[0] - number]  # with different sizes, or they would be duplicates
        save(source / "good" / f"{number}.png", np.ascontiguousarray(image))
    assert expected in str(ingest_quietly(source))


def test_a_completely_transparent_image_is_noted(tmp_path: Path) -> None:
    source = make_source(tmp_path / "bolt")
    sink = io.BytesIO()
    Image.fromarray(np.dstack([pixels(5), np.zeros(SIZE, np.uint8)]), "RGBA").save(sink, "PNG")
    save(source / "test/good/clear.png", sink.getvalue())
    assert "test/good/clear.png: its alpha channel is 0 everywhere" in str(ingest_quietly(source))


def test_masks_with_many_values_and_inverted_masks_are_noted(tmp_path: Path) -> None:
    source = make_source(tmp_path / "bolt", tests=("good", "soft", "inverted"))
    ramp = np.tile(np.linspace(0, 90, SIZE[1]).astype(np.uint8), (SIZE[0], 1))
    ramp[:16] = 0
    save(source / "ground_truth/soft/0_mask.png", ramp)
    inverted = np.ones(SIZE, bool)
    inverted[3:6, 3:6] = False
    save(source / "ground_truth/inverted/0_mask.png", inverted)
    text = str(ingest_quietly(source))
    assert "1 masks have many values above 0" in text
    assert "1 masks mark more than half of their image" in text


def test_the_reject_of_a_completely_marked_good_image_asks_about_inversion(tmp_path: Path) -> None:
    source = make_source(tmp_path / "bolt")
    save(source / "ground_truth/good/0_mask.png", np.ones(SIZE, bool))
    (reject,) = ingest_quietly(source).rejects
    assert "inverted" in reject.detail


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (100, 33), (511, 400), (512, 512), (700, 1000)])
def test_no_defect_vanishes_in_a_smaller_mask(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = np.zeros((512, 512), bool)
        y, x = rng.integers(0, 512, 2)
        mask[y, x] = True  # one pixel
        small = decode_mask(encode_png(mask), *size)
        assert small.shape == size
        marked_pixels = np.argwhere(small)
        if size[0] <= 512 and size[1] <= 512:
            assert len(marked_pixels) == 1
            assert tuple(marked_pixels[0]) == (y * size[0] // 512, x * size[1] // 512) or size != (512, 512)
        else:
            assert len(marked_pixels) >= 1
    assert resize_mask(np.zeros((9, 9), bool), 4, 4).sum() == 0
    assert resize_mask(np.ones((9, 9), bool), 4, 4).all()
