"""--group-by: the group of each image, refused rules, and splits that do not divide a group."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from made_sources import ingest_quietly, pixels, save, save_all, spot
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from s3_server import S3Server

from focus_ray.data.images import read_capture_time
from focus_ray.data.read import read_index
from focus_ray.errors import DataError
from focus_ray.storage.files import write_bytes

BY_NAME = r"name:^(p\d+)_"


def make_parts(root: Path, num_parts: int = 5, views: int = 2, bad: bool = False) -> Path:
    """Writes good/p0_v0.png .., and bad_scratch/p0_v9.png if `bad`."""
    good = {f"good/p{part}_v{view}.png": 10 * part + view for part in range(num_parts) for view in range(views)}
    return save_all(root, {**good, **({"bad_scratch/p0_v9.png": 500} if bad else {})})


def groups_of(root: Any, category: str = "bolt") -> dict[str, str]:
    """Returns the group of each row, by its id without the category."""
    index = read_index(root, category)
    names = (name.partition("/")[2] for name in index["id"].to_pylist())
    return dict(zip(names, index["group"].to_pylist(), strict=True))


def named_groups_of(root: Any) -> dict[str, str]:
    return {name: group for name, group in groups_of(root).items() if group}


def splits_of_groups(root: Any) -> dict[str, set[str]]:
    """Returns for each group the splits of its normal images."""
    index = read_index(root, "bolt")
    splits: dict[str, set[str]] = {}
    for group, split, label in zip(*(index[name].to_pylist() for name in ("group", "split", "label")), strict=True):
        if not label:
            splits.setdefault(group, set()).add(split)
    return splits


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_parts(tmp_path / "bolt")


FORMS = ["", "p", "name:", "name", "folder:", "folder:0", "folder:-1", "folder:x", "table:", "time:", "time:x"]
FORMS += ["time:0", "time:inf", "exif:3", "Name:x", "name:(p"]


@pytest.mark.parametrize("text", FORMS)
def test_a_malformed_rule_is_refused_with_its_value_and_the_forms(text: str, source: Path, out: Path) -> None:
    with pytest.raises(DataError) as raised:
        ingest_quietly(source, out, group_by=text)
    assert repr(text) in str(raised.value)
    assert "folder:LEVEL" in str(raised.value)


@pytest.mark.parametrize("text", ["name:^q", "folder:1", "time:3"])
def test_a_rule_that_gives_no_image_a_group_is_refused(text: str, source: Path, out: Path) -> None:
    with pytest.raises(DataError, match=rf"'{text.replace('^', '.')}' .* none of 10 images"):
        ingest_quietly(source, out, group_by=text)


# Names and folders


@pytest.mark.parametrize("pattern", [r"^(p\d+)_", r"^p\d+", r"(?P<part>p[0-9])_(v)"])
def test_a_pattern_on_the_file_name_gives_the_group(pattern: str, source: Path, out: Path) -> None:
    save(source / "good/other.png", pixels(900))
    report = ingest_quietly(source, out, group_by=f"name:{pattern}")
    assert named_groups_of(out) == {f"good/p{part}_v{view}": f"p{part}" for part in range(5) for view in range(2)}
    assert "bolt: 11 training images of 6 parts" in str(report)
    assert any("1 of 11 images" in note and "good/other.png" in note for note in report.notes)


def test_only_a_folder_rule_ingests_images_in_subfolders_of_good(tmp_path: Path, out: Path) -> None:
    files = {"good/a/0.png": 0, "good/a/1.png": 1, "good/b/0.png": 2, "good/flat.png": 3}
    source = save_all(tmp_path / "bolt", files)
    without_rule = ingest_quietly(source, tmp_path / "plain")
    assert (without_rule.num_rows, sum("skipped" in note for note in without_rule.notes)) == (1, 2)
    report = ingest_quietly(source, out, group_by="folder:1")
    assert groups_of(out) == {"good/a/0": "a", "good/a/1": "a", "good/b/0": "b", "good/flat": ""}
    assert report.rejects == ()


def test_a_folder_level_counts_from_the_file_and_the_group_includes_the_folders_above(
    tmp_path: Path, out: Path
) -> None:
    names = ["train/good/b1/p1/left/0", "train/good/b1/p1/right/0", "train/good/b2/p1/left/0"]
    names += ["test/good/b1/p1/left/9", "test/crack/b3/p7/left/9"]
    source = save_all(tmp_path / "bolt", {f"{name}.png": number for number, name in enumerate(names)})
    report = ingest_quietly(source, out, group_by="folder:2")
    assert groups_of(out) == dict(zip(names, ["b1/p1", "b1/p1", "b2/p1", "b1/p1", "b3/p7"], strict=True))
    assert any("1 part is in both" in note and "b1/p1" in note for note in report.notes)
    ingest_quietly(source, out, group_by="folder:3")
    assert set(groups_of(out).values()) == {"b1", "b2", "b3"}


@pytest.mark.parametrize(
    ("good", "bad", "masks"),
    [("train/good", "test/crack", "ground_truth/crack"), ("good", "bad_crack", "masks/bad_crack")],
)
def test_masks_of_images_in_subfolders_are_in_the_same_subfolders(
    good: str, bad: str, masks: str, tmp_path: Path, out: Path
) -> None:
    images = {**{f"{good}/p{number}/0.png": number for number in range(4)}, f"{bad}/x/0.png": 90, f"{bad}/y/0.png": 91}
    spots = {f"{masks}/x/0.png": spot((1, 1)), f"{masks}/flat.png": spot((1, 2)), f"{masks}/y/lone.png": spot((1, 3))}
    source = save_all(tmp_path / "bolt", {**images, f"{bad}/flat.png": 99, **spots})
    report = ingest_quietly(source, out, group_by="folder:1")
    assert report.categories[0].num_masks == 2
    assert [(item.path, item.reason) for item in report.rejects] == [(f"{masks}/y/lone.png", "mask_without_image")]


# Tables


def write_table(path: Path, *rows: str) -> Path:
    path.write_text("\ufeff" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("column", "delimiter"), [("file", ","), ("filename", ";"), ("image", "\t"), ("path", ","), ("name", ",")]
)
def test_a_csv_table_names_files_by_path_or_by_bare_name(
    column: str, delimiter: str, source: Path, out: Path, tmp_path: Path
) -> None:
    rows = [f"part,{column}", "one,good/p0_v0.png", "one,p3_v1.png", "2,good\\p1_v0.png", ",p1_v1.png"]
    table = write_table(tmp_path / "parts.csv", *(row.replace(",", delimiter) for row in rows))
    ingest_quietly(source, out, group_by=f"table:{table}:part")
    assert named_groups_of(out) == {"good/p0_v0": "one", "good/p3_v1": "one", "good/p1_v0": "2"}


@pytest.mark.parametrize(
    ("content", "column"),
    [
        ([{"file": "p0_v0.png", "part": 7}, {"file": "p0_v1.png", "part": None}], ":part"),
        ({"p0_v0.png": "7", "good/p0_v1.png": ""}, ""),
    ],
)
def test_a_json_table_is_a_list_of_rows_or_an_object(
    content: Any, column: str, source: Path, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "parts.json").write_text(json.dumps(content))
    ingest_quietly(source, out, group_by=f"table:{tmp_path / 'parts.json'}{column}")
    assert named_groups_of(out) == {"good/p0_v0": "7"}


@pytest.mark.parametrize(
    ("name", "content", "column", "expected"),
    [
        ("a.csv", "file,part\np0_v0.png,a", ":parts", "'parts'"),
        ("a.csv", "file,part\np0_v0.png,a", "", "FILE:COLUMN"),
        ("a.csv", "picture,part\np0_v0.png,a", ":part", "picture"),
        ("a.csv", "file,part\nelsewhere.png,a", ":part", "none of the image files"),
        ("a.csv", "file,part\np0_v0.png,a\np0_v0.png,b", ":part", "'b'"),
        ("a.json", '{"p0_v0.png": [1]}', "", r"\[1\]"),
        ("a.json", '{"p0_v0.png": "a"}', ":part", "a.json"),
        ("a.json", "{", ":part", "line 1 column 2"),
        ("a.json", "3", ":part", "a.json"),
        ("a.xls", "x", ":part", "csv or .json"),
        ("a.csv", None, ":part", "a.csv"),
    ],
)
def test_an_unusable_table_is_refused(
    name: str, content: str | None, column: str, expected: str, source: Path, out: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    text = f"table:{tmp_path / name}{column}"
    with pytest.raises(DataError, match=expected) as raised:
        ingest_quietly(source, out, group_by=text)
    assert repr(text) in str(raised.value)


def test_an_ambiguous_bare_name_is_refused_and_paths_are_accepted(source: Path, out: Path, tmp_path: Path) -> None:
    save(source / "bad/p0_v0.png", pixels(700))
    table = write_table(tmp_path / "parts.csv", "file,part", "p0_v0.png,a")
    with pytest.raises(DataError, match=r"'p0_v0\.png' .*bad/p0_v0\.png or good/p0_v0"):
        ingest_quietly(source, out, group_by=f"table:{table}:part")
    write_table(table, "file,part", "good/p0_v0.png,a", "bad/p0_v0.png,b")
    ingest_quietly(source, out, group_by=f"table:{table}:part")
    assert named_groups_of(out) == {"good/p0_v0": "a", "bad/p0_v0": "b"}


def test_a_changed_rule_or_table_is_a_changed_source(source: Path, out: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "parts.csv", "file,part", "p0_v0.png,a")
    rules = [None, None, BY_NAME, BY_NAME, r"name:^p\d", f"table:{table}:part", f"table:{table}:part", None]
    reports = [ingest_quietly(source, out, group_by=rule).categories[0] for rule in rules]
    expected = ["written", "unchanged", "written", "unchanged", "written", "written", "unchanged", "written"]
    assert [report.status for report in reports] == expected
    assert [report.num_train_groups for report in reports[2:4]] == [5, 5]
    assert named_groups_of(out) == {}
    ingest_quietly(source, out, group_by=f"table:{table}:part")
    write_table(table, "file,part", "p0_v0.png,b")
    assert ingest_quietly(source, out, group_by=f"table:{table}:part").categories[0].status == "written"


# Times


def save_timed(path: Path, seed: int, time: str | None, fraction: str | None = None, original: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x010F] = "camera"  # Pillow writes no block whose main directory is empty
    details = exif.get_ifd(0x8769)
    if time is not None:
        (details if original else exif)[0x9003 if original else 0x0132] = time
    if fraction is not None:
        details[0x9291 if original else 0x9290] = fraction
    if path.suffix == ".tiff":  # Pillow drops the inner directory of an Exif object there
        directory = ImageFileDirectory_v2()
        directory.update(exif)
        directory[0x8769] = dict(details)
        Image.fromarray(pixels(seed)).save(path, tiffinfo=directory)
    else:
        Image.fromarray(pixels(seed)).save(path, exif=exif)


def test_photographs_with_short_pauses_form_a_burst(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "bolt"
    for number, second in enumerate([0, 2, 4, 20, 22, 40]):
        time = datetime(2024, 5, 1, 12) + timedelta(seconds=second)
        suffix = ("png", "jpg", "webp")[number % 3]
        save_timed(source / f"good/{5 - number}.{suffix}", number, time.strftime("%Y:%m:%d %H:%M:%S"))
    save(source / "good/untimed.png", pixels(90))
    report = ingest_quietly(source, out, group_by="time:2.5")
    seconds = [groups_of(out)[f"good/{5 - number}"].removeprefix("2024-05-01T12:00:") for number in range(6)]
    assert seconds == ["00", "00", "00", "20", "20", "40"]
    assert report.categories[0].num_train_groups == 4
    assert any("1 of 7 images" in note and "untimed" in note for note in report.notes)
    assert ingest_quietly(source, out, group_by="time:2.5").categories[0].status == "unchanged"


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
def test_the_capture_time_is_read_from_every_format_with_exif(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    save_timed(path, 0, "2024:05:01 12:00:00", "25")
    assert read_capture_time(path) == read_capture_time(path.read_bytes()) == datetime(2024, 5, 1, 12, 0, 0, 250000)
    save_timed(path, 0, "2024:05:01 12:00:00", original=False)
    assert read_capture_time(path) == datetime(2024, 5, 1, 12)


@pytest.mark.parametrize("time", [None, "0000:00:00 00:00:00", "yesterday"])
def test_a_missing_or_invalid_time_is_none(time: str | None, tmp_path: Path) -> None:
    save_timed(tmp_path / "a.jpg", 0, time)
    assert read_capture_time(tmp_path / "a.jpg") is None
    assert read_capture_time(b"text") is None


def test_training_and_test_images_are_in_different_bursts(tmp_path: Path, out: Path) -> None:
    for number, folder in enumerate(["train/good", "train/good", "test/good", "train/good"]):
        save_timed(tmp_path / "bolt" / folder / f"{number}.jpg", number, f"2024:05:01 12:00:0{number}")
    ingest_quietly(tmp_path / "bolt", out, group_by="time:1")
    groups = groups_of(out)
    assert groups["train/good/0"] == groups["train/good/1"] != groups["train/good/3"]
    assert groups["test/good/2"] not in (groups["train/good/1"], groups["train/good/3"])


# Drawn splits, and sources that change


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", ["name", "time", "table"])
def test_drawn_test_images_are_complete_groups(form: str, seed: int, tmp_path: Path, out: Path) -> None:
    source, rule = tmp_path / "bolt", BY_NAME
    if form == "name":
        make_parts(source, bad=True)
    elif form == "time":
        rule = "time:5"
        save_timed(source / "bad/0.jpg", 50, "2024:05:01 12:00:02")
        for number in range(10):
            save_timed(source / f"good/{number}.jpg", number, f"2024:05:01 12:{number // 2:02}:0{number % 2}")
    else:
        rule = f"table:{source / 'image_anno.csv'}:part"
        lines = [f"images/{number}.png,normal,,p{number // 2}" for number in range(10)]
        save(source / "image_anno.csv", "\n".join(["image,label,mask,part", *lines]).encode())
        save_all(source, {f"images/{number}.png": number for number in range(10)})
    report = ingest_quietly(source, out, group_by=rule, seed=seed)
    assert sorted(map(sorted, splits_of_groups(out).values())) == [["test"]] + [["train"]] * 4
    assert (report.categories[0].num_test_normal, report.categories[0].num_train_groups) == (2, 4)


def test_without_a_rule_the_drawn_test_images_are_the_same_as_in_earlier_versions(tmp_path: Path, out: Path) -> None:
    ingest_quietly(make_parts(tmp_path / "bolt", bad=True), out)
    earlier_ids = ["bolt/bad_scratch/scratch/p0_v9", "bolt/good/p1_v0", "bolt/good/p1_v1"]
    assert read_index(out, "bolt", split="test")["id"].to_pylist() == earlier_ids


def test_appended_images_join_existing_groups_by_name(source: Path, out: Path) -> None:
    ingest_quietly(source, out, group_by=BY_NAME)
    save_all(source, {"good/p0_v7.png": 800, "good/p9_v0.png": 801})
    report = ingest_quietly(source, out, group_by=BY_NAME, append=True)
    assert report.categories[0].num_added == 2
    assert "bolt: 12 training images of 6 parts" in str(report)
    assert groups_of(out)["good/p0_v7"] == "p0"


def test_appended_images_of_a_part_get_the_split_of_the_part(tmp_path: Path, out: Path) -> None:
    ingest_quietly(make_parts(tmp_path / "first/bolt", num_parts=10, bad=True), out, group_by=BY_NAME)
    more = {**{f"good/p{part}_v5.png": 600 + part for part in range(10)}, "bad/x.png": 650}
    ingest_quietly(save_all(tmp_path / "second/bolt", more), out, group_by=BY_NAME, append=True)
    assert [len(splits) for splits in splits_of_groups(out).values()] == [1] * 10
    assert len(read_index(out, "bolt")) == 32


def test_an_append_with_other_groups_for_existing_images_adds_a_note(source: Path, out: Path) -> None:
    ingest_quietly(source, out)
    report = ingest_quietly(source, out, group_by=BY_NAME, append=True)
    assert report.categories[0].num_added == 0
    assert any("10 images" in note and "another group" in note for note in report.notes)
    assert named_groups_of(out) == {}


@pytest.mark.s3
def test_a_source_on_s3_gives_the_groups_of_the_same_source_on_a_disk(s3: S3Server, tmp_path: Path, out: Path) -> None:
    folder, uri, table = tmp_path / "bolt", f"{s3.new_uri()}/bolt", f"{s3.new_uri()}/parts.json"
    for number in range(8):
        name, time = f"good/part{number // 2}/{number}.jpg", f"2024:05:01 12:{number // 2:02}:0{number % 2}"
        save_timed(folder / name, number, time)
        save_timed(folder / f"good/{number + 10}.jpg", number + 10, time)
    for path in folder.rglob("*.jpg"):
        write_bytes(f"{uri}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    write_bytes(table, json.dumps({f"{number}.jpg": f"t{number % 3}" for number in range(10, 16)}).encode())
    for rule in ("folder:1", r"name:^(\d)", "time:3", f"table:{table}"):
        remote_out = s3.new_uri()
        local, remote = ingest_quietly(folder, out, group_by=rule), ingest_quietly(uri, remote_out, group_by=rule)
        assert str(remote) == str(local)
        assert groups_of(remote_out) == groups_of(out)
        assert named_groups_of(out)
