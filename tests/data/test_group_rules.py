"""--group-by: the group of each image, refused rules, and splits that do not divide a group."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from made_sources import pixels, save, spot
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from s3_server import S3Server

from focus_ray.data.images import read_capture_time
from focus_ray.data.importers.groups import parse_group_rule
from focus_ray.data.read import read_index
from focus_ray.errors import DataError
from focus_ray.ingestion.ingest import ingest
from focus_ray.ingestion.report import IngestReport
from focus_ray.storage.files import write_bytes


def make_parts(root: Path, num_parts: int = 5, views: int = 2, bad: bool = False) -> Path:
    """Writes good/p0_v0.png .., and bad_scratch/p0_v9.png if `bad`."""
    for part in range(num_parts):
        for view in range(views):
            save(root / f"good/p{part}_v{view}.png", pixels(10 * part + view))
    if bad:
        save(root / "bad_scratch/p0_v9.png", pixels(500))
    return root


def ingest_quietly(source: Any, out: Any, **options: Any) -> IngestReport:
    return ingest(source, out, progress=False, **options)


def groups_of(root: Any, category: str = "bolt") -> dict[str, str]:
    """Returns the group of each row, by its id without the category."""
    index = read_index(root, category)
    names = (name.partition("/")[2] for name in index["id"].to_pylist())
    return dict(zip(names, index["group"].to_pylist(), strict=True))


def splits_by_group(root: Any, category: str = "bolt") -> dict[str, set[str]]:
    """Returns for each group the splits of its normal images."""
    index = read_index(root, category)
    splits: dict[str, set[str]] = {}
    for group, split, label in zip(*(index[name].to_pylist() for name in ("group", "split", "label")), strict=True):
        if not label:
            splits.setdefault(group, set()).add(split)
    return splits


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_parts(tmp_path / "bolt")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "p",
        "name:",
        "name",
        "folder:",
        "folder:0",
        "folder:-1",
        "folder:x",
        "table:",
        "time:",
        "time:x",
        "time:0",
        "time:inf",
        "exif:3",
        "Name:x",
    ],
)
def test_a_malformed_rule_is_refused_with_its_value_and_the_forms(text: str, source: Path, out: Path) -> None:
    with pytest.raises(DataError) as raised:
        ingest_quietly(source, out, group_by=text)
    assert repr(text) in str(raised.value)
    assert "folder:LEVEL" in str(raised.value)


# Names


@pytest.mark.parametrize("pattern", [r"^(p\d+)_", r"^p\d+", r"(?P<part>p[0-9])_(v)"])
def test_a_pattern_on_the_file_name_gives_the_group(pattern: str, source: Path, out: Path) -> None:
    report = ingest_quietly(source, out, group_by=f"name:{pattern}")
    assert groups_of(out) == {f"good/p{part}_v{view}": f"p{part}" for part in range(5) for view in range(2)}
    assert "bolt: 10 training images of 5 parts" in str(report)


def test_images_that_do_not_match_the_pattern_have_no_group_and_are_counted(source: Path, out: Path) -> None:
    save(source / "good/other.png", pixels(900))
    report = ingest_quietly(source, out, group_by=r"name:^(p\d+)_")
    assert groups_of(out)["good/other"] == ""
    assert report.categories[0].num_train_groups == 6
    assert any("1 of 11 images" in note and "good/other.png" in note for note in report.notes)


def test_a_pattern_that_does_not_compile_or_matches_no_file_is_refused(source: Path, out: Path) -> None:
    with pytest.raises(DataError, match="regular expression") as raised:
        ingest_quietly(source, out, group_by="name:(p")
    assert "'(p'" in str(raised.value)
    with pytest.raises(DataError, match="none of 10 images") as raised:
        ingest_quietly(source, out, group_by="name:^q")
    assert "'name:^q'" in str(raised.value)


# Folders


def test_only_a_folder_rule_ingests_images_in_subfolders_of_good(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "bolt"
    for part in ("a", "b"):
        for view in range(2):
            save(source / f"good/{part}/{view}.png", pixels(ord(part) * 10 + view))
    save(source / "good/flat.png", pixels(1))
    without_rule = ingest_quietly(source, tmp_path / "plain")
    assert without_rule.num_rows == 1
    assert sum("skipped" in note for note in without_rule.notes) == 2
    report = ingest_quietly(source, out, group_by="folder:1")
    expected = {"good/a/0": "a", "good/a/1": "a", "good/b/0": "b", "good/b/1": "b", "good/flat": ""}
    assert groups_of(out) == expected
    assert not report.rejects
    assert any("1 of 5 images" in note for note in report.notes)


def test_a_folder_level_counts_from_the_file_and_the_group_includes_the_folders_above(
    tmp_path: Path, out: Path
) -> None:
    source = tmp_path / "bolt"
    for number, subfolder in enumerate(["b1/p1/left", "b1/p1/right", "b2/p1/left"]):
        save(source / f"train/good/{subfolder}/0.png", pixels(number))
    save(source / "test/good/b1/p1/left/9.png", pixels(9))
    save(source / "test/crack/b3/p7/left/9.png", pixels(10))
    report = ingest_quietly(source, out, group_by="folder:2")
    assert groups_of(out) == {
        "train/good/b1/p1/left/0": "b1/p1",
        "train/good/b1/p1/right/0": "b1/p1",
        "train/good/b2/p1/left/0": "b2/p1",
        "test/good/b1/p1/left/9": "b1/p1",
        "test/crack/b3/p7/left/9": "b3/p7",
    }
    assert any("1 part is in both" in note and "b1/p1" in note for note in report.notes)
    ingest_quietly(source, out, group_by="folder:3")
    assert set(groups_of(out).values()) == {"b1", "b2", "b3"}


def test_a_folder_level_without_any_image_is_refused(source: Path, out: Path) -> None:
    with pytest.raises(DataError, match="'folder:1'"):
        ingest_quietly(source, out, group_by="folder:1")


@pytest.mark.parametrize("layout", ["mvtec", "folder"])
def test_masks_of_images_in_subfolders_are_in_the_same_subfolders(layout: str, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "bolt"
    good, bad, masks = {
        "mvtec": ("train/good", "test/crack", "ground_truth/crack"),
        "folder": ("good", "bad_crack", "masks/bad_crack"),
    }[layout]
    for number in range(4):
        save(source / f"{good}/p{number}/0.png", pixels(number))
    for part in ("x", "y"):
        save(source / f"{bad}/{part}/0.png", pixels(ord(part)))
    save(source / f"{bad}/flat.png", pixels(99))
    save(source / f"{masks}/x/0.png", spot((1, 1)))
    save(source / f"{masks}/flat.png", spot((1, 2)))
    save(source / f"{masks}/y/lone.png", spot((1, 3)))
    report = ingest_quietly(source, out, group_by="folder:1")
    assert report.categories[0].num_masks == 2
    assert [(item.path, item.reason) for item in report.rejects] == [(f"{masks}/y/lone.png", "mask_without_image")]


# Tables


def write_table(path: Path, rows: list[tuple[str, ...]], delimiter: str = ",") -> Path:
    path.write_text("\ufeff" + "\n".join(delimiter.join(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("column", ["file", "filename", "image", "path", "name"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_table_names_files_by_path_or_by_bare_name(
    column: str, delimiter: str, source: Path, out: Path, tmp_path: Path
) -> None:
    rows = [
        ("part", column),
        ("one", "good/p0_v0.png"),
        ("one", "p3_v1.png"),
        ("2", "good\\p1_v0.png"),
        ("", "p1_v1.png"),
    ]
    table = write_table(tmp_path / "parts.csv", rows, delimiter)
    report = ingest_quietly(source, out, group_by=f"table:{table}:part")
    groups = {name: group for name, group in groups_of(out).items() if group}
    assert groups == {"good/p0_v0": "one", "good/p3_v1": "one", "good/p1_v0": "2"}
    assert any("7 of 10 images" in note for note in report.notes)


def test_a_json_table_is_a_list_of_rows_or_an_object(source: Path, out: Path, tmp_path: Path) -> None:
    table = tmp_path / "parts.json"
    table.write_text(json.dumps([{"file": "p0_v0.png", "part": 7}, {"file": "p0_v1.png", "part": None}]))
    ingest_quietly(source, out, group_by=f"table:{table}:part")
    assert groups_of(out)["good/p0_v0"] == "7"
    assert groups_of(out)["good/p0_v1"] == ""
    table.write_text(json.dumps({"p0_v0.png": "a", "good/p0_v1.png": "a"}))
    ingest_quietly(source, out, group_by=f"table:{table}")
    assert {name for name, group in groups_of(out).items() if group == "a"} == {"good/p0_v0", "good/p0_v1"}


@pytest.mark.parametrize(
    ("rows", "column", "expected"),
    [
        ([("file", "part"), ("p0_v0.png", "a")], "parts", "'parts'"),
        ([("file", "part"), ("p0_v0.png", "a")], "", "FILE:COLUMN"),
        ([("picture", "part"), ("p0_v0.png", "a")], "part", "picture"),
        ([("file", "part"), ("elsewhere.png", "a")], "part", "none of the image files"),
        ([("file", "part"), ("p0_v0.png", "a"), ("p0_v0.png", "b")], "part", "'b'"),
    ],
)
def test_a_table_with_wrong_columns_or_files_is_refused(
    rows: list[tuple[str, ...]], column: str, expected: str, source: Path, out: Path, tmp_path: Path
) -> None:
    text = f"table:{write_table(tmp_path / 'parts.csv', rows)}" + (f":{column}" if column else "")
    with pytest.raises(DataError) as raised:
        ingest_quietly(source, out, group_by=text)
    assert expected in str(raised.value)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize(("name", "content"), [("a.csv", None), ("a.json", "{"), ("a.json", "3"), ("a.xls", "x")])
def test_an_unreadable_table_is_refused(
    name: str, content: str | None, source: Path, out: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name):
        ingest_quietly(source, out, group_by=f"table:{tmp_path / name}:part")


def test_an_ambiguous_bare_name_is_refused_and_paths_are_accepted(source: Path, out: Path, tmp_path: Path) -> None:
    save(source / "bad/p0_v0.png", pixels(700))
    table = write_table(tmp_path / "parts.csv", [("file", "part"), ("p0_v0.png", "a")])
    with pytest.raises(DataError, match=r"'p0_v0\.png' could be bad/p0_v0\.png or good/p0_v0"):
        ingest_quietly(source, out, group_by=f"table:{table}:part")
    write_table(table, [("file", "part"), ("good/p0_v0.png", "a"), ("bad/p0_v0.png", "b")])
    ingest_quietly(source, out, group_by=f"table:{table}:part")
    assert groups_of(out)["good/p0_v0"] == "a"
    assert groups_of(out)["bad/p0_v0"] == "b"


def test_a_changed_table_counts_as_a_changed_source(source: Path, out: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "parts.csv", [("file", "part"), ("p0_v0.png", "a")])
    statuses = []
    for group in ("a", "a", "b"):
        write_table(table, [("file", "part"), ("p0_v0.png", group)])
        statuses.append(ingest_quietly(source, out, group_by=f"table:{table}:part").categories[0].status)
    assert statuses == ["written", "unchanged", "written"]


# Times


def save_timed(path: Path, seed: int, time: str | None, fraction: str | None = None, original: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x010F] = "camera"  # Pillow writes no block whose main directory is empty
    details = exif.get_ifd(0x8769)
    if time is not None and original:
        details[0x9003] = time
    elif time is not None:
        exif[0x0132] = time
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
    seconds = [0, 2, 4, 20, 22, 40]
    for number, second in enumerate(seconds):
        time = datetime(2024, 5, 1, 12) + timedelta(seconds=second)
        suffix = ("png", "jpg", "webp")[number % 3]
        save_timed(source / f"good/{5 - number}.{suffix}", number, time.strftime("%Y:%m:%d %H:%M:%S"))
    save(source / "good/untimed.png", pixels(90))
    report = ingest_quietly(source, out, group_by="time:2.5")
    groups = groups_of(out)
    group_names = [groups[f"good/{5 - number}"] for number in range(6)]
    first, second, third = "2024-05-01T12:00:00", "2024-05-01T12:00:20", "2024-05-01T12:00:40"
    assert group_names == [first, first, first, second, second, third]
    assert report.categories[0].num_train_groups == 4
    assert any("1 of 7 images" in note and "untimed" in note for note in report.notes)
    assert ingest_quietly(source, out, group_by="time:2.5").categories[0].status == "unchanged"


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
def test_the_capture_time_is_read_from_every_format_with_exif(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    save_timed(path, 0, "2024:05:01 12:00:00", "25")
    expected = datetime(2024, 5, 1, 12, 0, 0, 250000)
    assert read_capture_time(path) == read_capture_time(path.read_bytes()) == expected
    save_timed(path, 0, "2024:05:01 12:00:00", original=False)
    assert read_capture_time(path) == datetime(2024, 5, 1, 12)


@pytest.mark.parametrize("time", [None, "0000:00:00 00:00:00", "yesterday"])
def test_a_missing_or_invalid_time_is_none(time: str | None, tmp_path: Path) -> None:
    save_timed(tmp_path / "a.jpg", 0, time)
    assert read_capture_time(tmp_path / "a.jpg") is None
    assert read_capture_time(b"text") is None


def test_images_without_any_time_are_refused(source: Path, out: Path) -> None:
    with pytest.raises(DataError, match=r"'time:3' .* none of 10 images"):
        ingest_quietly(source, out, group_by="time:3")


def test_training_and_test_images_are_in_different_bursts(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "bolt"
    for number, folder in enumerate(["train/good", "train/good", "test/good", "train/good"]):
        save_timed(source / folder / f"{number}.jpg", number, f"2024:05:01 12:00:0{number}")
    ingest_quietly(source, out, group_by="time:1")
    groups = groups_of(out)
    assert groups["train/good/0"] == groups["train/good/1"] != groups["train/good/3"]
    assert groups["test/good/2"] not in (groups["train/good/1"], groups["train/good/3"])


# Drawn splits, and sources that change


@pytest.mark.parametrize("seed", range(5))
def test_drawn_test_images_are_complete_groups(seed: int, tmp_path: Path, out: Path) -> None:
    source = make_parts(tmp_path / "bolt", num_parts=10, views=3, bad=True)
    report = ingest_quietly(source, out, group_by=r"name:^(p\d+)_", seed=seed)
    assert all(len(splits) == 1 for splits in splits_by_group(out).values())
    assert report.categories[0].num_test_normal == 6
    assert report.categories[0].num_train_groups == 8


@pytest.mark.parametrize("seed", range(5))
def test_drawn_test_images_are_complete_bursts(seed: int, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "bolt"
    for number in range(12):
        save_timed(source / f"good/{number}.jpg", number, f"2024:05:01 12:{number // 2:02}:0{number % 2}")
    save_timed(source / "bad/0.jpg", 50, "2024:05:01 12:00:02")
    ingest_quietly(source, out, group_by="time:5", seed=seed)
    group_splits = splits_by_group(out)
    assert len(group_splits) == 6
    assert all(len(splits) == 1 for splits in group_splits.values())


def test_a_visa_table_without_splits_draws_complete_groups_as_test_images(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "bolt"
    lines = ["image,label,mask,part"]
    for number in range(20):
        save(source / f"images/{number}.png", pixels(number))
        lines.append(f"images/{number}.png,normal,,p{number // 4}")
    save(source / "image_anno.csv", "\n".join(lines).encode())
    ingest_quietly(source, out, group_by=f"table:{source / 'image_anno.csv'}:part")
    group_splits = splits_by_group(out)
    assert sorted(map(sorted, group_splits.values())) == [["test"]] + [["train"]] * 4


def test_without_a_rule_the_drawn_test_images_are_the_same_as_in_earlier_versions(tmp_path: Path, out: Path) -> None:
    """The expected ids were recorded before groups existed."""
    source = make_parts(tmp_path / "bolt", bad=True)
    ingest_quietly(source, out)
    index = read_index(out, "bolt", split="test")
    assert index["id"].to_pylist() == EARLIER_TEST_IDS


EARLIER_TEST_IDS = ["bolt/bad_scratch/scratch/p0_v9", "bolt/good/p1_v0", "bolt/good/p1_v1"]


def test_a_changed_rule_is_never_reported_as_unchanged(source: Path, out: Path) -> None:
    rules = [None, None, r"name:^(p\d)", r"name:^(p\d)", r"name:^p\d", None]
    statuses = [ingest_quietly(source, out, group_by=rule).categories[0].status for rule in rules]
    assert statuses == ["written", "unchanged", "written", "unchanged", "written", "written"]
    assert set(groups_of(out).values()) == {""}


def test_the_report_of_an_unchanged_category_has_its_number_of_parts(source: Path, out: Path) -> None:
    reports = [ingest_quietly(source, out, group_by=r"name:^p\d").categories[0] for _ in range(2)]
    assert [(item.status, item.num_train_groups) for item in reports] == [("written", 5), ("unchanged", 5)]


def test_appended_images_join_existing_groups_by_name(source: Path, out: Path) -> None:
    ingest_quietly(source, out, group_by=r"name:^(p\d+)_")
    save(source / "good/p0_v7.png", pixels(800))
    save(source / "good/p9_v0.png", pixels(801))
    report = ingest_quietly(source, out, group_by=r"name:^(p\d+)_", append=True)
    assert report.categories[0].num_added == 2
    assert "bolt: 12 training images of 6 parts" in str(report)
    assert groups_of(out)["good/p0_v7"] == "p0"


def test_appended_images_of_a_part_get_the_split_of_the_part(tmp_path: Path, out: Path) -> None:
    first = make_parts(tmp_path / "first/bolt", num_parts=10, bad=True)
    ingest_quietly(first, out, group_by=r"name:^(p\d+)_")
    second = tmp_path / "second/bolt"
    for part in range(10):
        save(second / f"good/p{part}_v5.png", pixels(600 + part))
    save(second / "bad/x.png", pixels(650))
    ingest_quietly(second, out, group_by=r"name:^(p\d+)_", append=True)
    group_splits = splits_by_group(out)
    assert len(group_splits) == 10
    assert all(len(splits) == 1 for splits in group_splits.values())
    assert len(read_index(out, "bolt")) == 32


def test_an_append_with_other_groups_for_existing_images_adds_a_note(source: Path, out: Path) -> None:
    ingest_quietly(source, out)
    report = ingest_quietly(source, out, group_by=r"name:^(p\d+)_", append=True)
    assert report.categories[0].num_added == 0
    assert any("10 images" in note and "another group" in note for note in report.notes)
    assert set(groups_of(out).values()) == {""}


def test_a_part_in_training_and_good_test_images_is_noted(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "bolt"
    for number in range(4):
        save(source / f"train/good/p{number}_a.png", pixels(number))
    save(source / "test/good/p2_b.png", pixels(20))
    report = ingest_quietly(source, out, group_by=r"name:^(p\d)_")
    assert any("1 part is in both" in note and "'p2'" in note for note in report.notes)


@pytest.mark.s3
def test_a_source_on_s3_gives_the_groups_of_the_same_source_on_a_disk(s3: S3Server, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "bolt"
    for number in range(8):
        time = f"2024:05:01 12:{number // 2:02}:0{number % 2}"
        save_timed(folder / f"good/part{number // 2}/{number}.jpg", number, time)
    uri = f"{s3.new_uri()}/bolt"
    for path in sorted(folder.rglob("*.jpg")):
        write_bytes(f"{uri}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    table = f"{s3.new_uri()}/parts.json"
    write_bytes(table, json.dumps({f"{number}.jpg": f"t{number % 3}" for number in range(6)}).encode())
    for rule in ("folder:1", r"name:^(\d)", "time:3", f"table:{table}"):
        with pytest.MonkeyPatch.context() as patch:
            if not rule.startswith("folder"):  # only a folder rule ingests subfolders
                patch.setattr(type(parse_group_rule(rule, folder)), "takes_subfolders", True)
            remote_out = s3.new_uri()
            local, remote = ingest_quietly(folder, out, group_by=rule), ingest_quietly(uri, remote_out, group_by=rule)
        assert str(remote) == str(local)
        assert groups_of(remote_out) == groups_of(out)
        assert any(groups_of(out).values())
