"""The command line: exit statuses, standard output and standard error, and the files that commands write."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from PIL import Image
from small_set import make_bundle, small_config

from focus_ray.bundle.bundle import compute_manifest_hash, read_manifest
from focus_ray.bundle.inspector import Inspector
from focus_ray.cli.main import build_parser, main, parse_command_line
from focus_ray.detect.calibration import Calibration
from focus_ray.ingestion.ingest import ingest
from focus_ray.samples.write import draw_sample, write_samples


@pytest.fixture(scope="module")
def images(parts: str) -> Path:
    return Path(parts).parent / "images"


@pytest.fixture(scope="module")
def run(part_bundles: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the folder of a run with a bundle of the category gear."""
    root = tmp_path_factory.mktemp("runs") / "small"
    shutil.copytree(part_bundles["gear"], root / "bundles/gear")
    return root


@pytest.fixture
def bundle(part_bundles: dict[str, str]) -> str:
    return part_bundles["gear"]


@pytest.fixture
def pictures(images: Path, tmp_path: Path) -> Path:
    """A folder with an image of a good gear, and an oblong image of a bad gear in a subfolder."""
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    shutil.copy(images / "gear/test/good/000.png", folder / "a.png")
    Image.open(images / "gear/test/scratch/000.png").resize((90, 60)).save(folder / "inner" / "b.jpg")
    return folder


def run_with_ascii_output(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "focus_ray.cli", *map(str, words)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )


def parse_json_lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


# ingest


def test_ingest_reports_and_exits_with_0(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ingest", str(images), str(tmp_path / "data"), "--category", "gear"]) == 0
    assert "gear: written, 24 train, 4 normal and 4 anomalous test images, 4 masks" in capsys.readouterr().out


# mistakes


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("ingest {here}/nowhere {here}/data", "{here}/nowhere: expected a local folder"),
        ("train {here}/run.yaml", "train.step: unknown key; did you mean 'steps'"),
        ("train default train.steps=many", "train.steps: "),
        ("evaluate {here}", "{here}: no bundle here"),
        ("inspect {here}/nothing {here}/a.png", "{here}/nothing: no such file or folder"),
        ("inspect {bundle} {here}/missing.png", "missing.png: no such file or folder"),
        ("inspect {bundle} {here}/empty", "empty: no image in this folder"),
        ("inspect {bundle} {here}/a.png --csv {here}", "{here}: a folder"),
        ("inspect {bundle} {here}/a.png --overlays {here}/a.png", "{here}/a.png: cannot make a folder"),
        ("inspect {bundle} {here}/a.png --overlays {here}", "a.png would replace the image"),
        ("samples {here}", "{here}: not empty"),
    ],
)
def test_a_mistake_exits_with_1_and_names_the_cause_on_standard_error(
    bundle: str, images: Path, tmp_path: Path, words: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run.yaml").write_text("data: {uri: images}\ntrain: {step: 3}\n")
    content = (images / "gear/test/good/000.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content)
    assert main(words.format(here=tmp_path, bundle=bundle).split()) == 1
    captured = capsys.readouterr()
    assert named.format(here=tmp_path) in captured.err.splitlines()[-1]
    assert captured.out == ""
    assert (tmp_path / "a.png").read_bytes() == content


# train


def test_a_users_error_is_a_single_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "focus_ray.cli", "train", str(tmp_path / "run.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"focus-ray: {tmp_path}/run.yaml: cannot read the configuration: ")
    assert len(ended.stderr.splitlines()) == 1


# evaluate


def test_evaluate_writes_its_report_next_to_the_bundles(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run)]) == 0
    table = capsys.readouterr().out
    report = json.loads((run / "report/report.json").read_text())
    gear = report["categories"]["gear"]
    assert (gear["num_normal"], gear["num_anomalous"], gear["num_masks"]) == (4, 4, 4)
    assert gear["version"] == Inspector.load(run / "bundles/gear", "cpu").bundle.version
    assert report["mean"]["image_auroc"] == gear["image_auroc"]
    text = (run / "report/report.md").read_text()
    assert text.strip() == table.strip()
    assert f"| gear | 4 | 4 | {gear['image_auroc']:.4f} |" in text
    assert "| gear | scratch | 1 |" in text
    page = (run / "report/report.html").read_text()
    assert "of 4 good parts would be called bad" in page
    assert "of 4 defective parts are found" in page


def test_evaluate_accepts_a_single_bundle_other_data_and_another_folder(
    parts: str, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", bundle, "--data", parts, "--output", str(tmp_path / "out"), "--max-side-px", "32"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["categories"]["gear"]["data"] == parts
    assert main(["evaluate", bundle, "--data", str(tmp_path), "--output", str(tmp_path / "failed")]) == 1
    assert "no data set here" in capsys.readouterr().err


def test_evaluate_with_binned_pixels_reports_bounds_of_its_metrics(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "out")
    assert main(["evaluate", bundle, "--output", place, "--exact-megapixels", "0.01"]) == 0
    captured = capsys.readouterr()
    assert "gear: too many pixels for the memory: pixel metrics come from counts in bins" in captured.err
    assert "note: There are too many pixels to sort them all" in captured.err
    assert "±" in captured.out
    assert "the exact value lies within the ±" in captured.out
    assert len(list((tmp_path / "out/images/category=gear").iterdir())) == 1
    assert main(["evaluate", bundle, "--output", place, "--exact-megapixels", "0.01", "--resume"]) == 0
    captured_again = capsys.readouterr()
    assert "gear: measured already" in captured_again.err
    assert captured_again.out == captured.out


def test_evaluate_skips_a_defect_type_or_category_that_cannot_be_measured(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A defect type has masks of the complete image, and a category has no test images; each gets its own reason."""
    for category in ("gear", "board"):
        shutil.copytree(images / category, tmp_path / "images" / category)
    for mask in (tmp_path / "images/gear/ground_truth/scratch").glob("*.png"):
        size = Image.open(mask).size
        Image.new("L", size, 255).save(mask)
    ingest(tmp_path / "images", tmp_path / "data", progress=False)
    config = small_config(str(tmp_path / "data"), tmp_path)
    for category in ("gear", "board"):
        make_bundle(config, category)
    shutil.rmtree(tmp_path / "images/board/test")
    shutil.rmtree(tmp_path / "images/board/ground_truth")
    ingest(tmp_path / "images", tmp_path / "data", progress=False)
    assert main(["evaluate", str(tmp_path / "small")]) == 3
    captured = capsys.readouterr()
    report = json.loads((tmp_path / "small/report/report.json").read_text())["categories"]
    assert "there is no test image to evaluate" in report["board"]["error"]
    gear = report["gear"]
    assert gear["image_auroc"] is not None
    other_types = [kind for kind in gear["defect_types"] if kind != "scratch"]
    assert other_types
    assert all(gear["defect_types"][kind]["aupro_0.3"] is not None for kind in other_types)
    assert any(where.startswith("scratch: ") for where in gear["reasons"]), gear["reasons"]
    text = (tmp_path / "small/report/report.md").read_text()
    assert "| board | - | - |" in text
    assert "- board: not measured: there is no test image to evaluate" in text
    assert captured.out.strip() == text.strip()
    page = (tmp_path / "small/report/report.html").read_text()
    assert "Not measured: there is no test image to evaluate" in page
    assert page.index("1 could not be measured") < page.index('id="category-1"')


# inspect


def test_inspect_prints_a_json_line_for_each_image_and_writes_overlays_with_a_strip(
    bundle: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", bundle, str(pictures), "--overlays", str(tmp_path / "overlays"), "--device", "cpu"]) == 0
    lines = parse_json_lines(capsys.readouterr().out)
    assert [Path(str(line["image"])).name for line in lines] == ["a.png", "b.jpg"]
    assert [(line["width"], line["height"], line["category"]) for line in lines] == [(64, 64, "gear"), (90, 60, "gear")]
    alone = Inspector.load(bundle, "cpu").inspect([(pictures / "a.png").read_bytes()])[0]
    assert lines[0]["score"] == pytest.approx(alone.score, rel=1e-4)
    sizes = [Image.open(str(line["overlay"])).size for line in lines]
    assert [width for width, _ in sizes] == [5 * 64, 4 * 90]  # an integer scale that makes room for the text
    assert all(height > factor * side for (_, height), factor, side in zip(sizes, (5, 4), (64, 60), strict=True))


def test_inspect_writes_a_table_with_a_row_for_each_image_also_for_an_unreadable_one(
    bundle: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "cut.png").write_bytes((pictures / "a.png").read_bytes()[:100])
    (pictures / "folder.png").mkdir()
    (pictures / "link.png").symlink_to(pictures / "gone.png")
    table = tmp_path / "new" / "table.csv"
    assert main(["inspect", bundle, str(pictures), "--csv", str(table), "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    lines = parse_json_lines(captured.out)
    assert [Path(str(line["image"])).name for line in lines] == ["a.png", "cut.png", "b.jpg", "link.png"]
    assert [("score" in line, "error" in line) for line in lines] == [(True, False), (False, True)] * 2
    assert "cannot read" in str(lines[3]["error"])
    assert "Traceback" not in captured.err
    with table.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["image"], row["category"]) for row in rows] == [(line["image"], "gear") for line in lines]
    for row, line in zip(rows, lines, strict=True):
        if "error" in line:
            assert (row["error"], row["verdict"], row["score"]) == (line["error"], "", "")
            continue
        for key in ("score", "threshold", "p_value"):
            assert float(row[key]) == line[key]
        assert row["verdict"] == ("anomalous" if line["anomalous"] else "normal")
        regions = cast(list[dict[str, float]], line["regions"])
        assert int(row["num_regions"]) == len(regions)
        largest = max(regions, key=lambda region: region["area"], default={})
        for key in ("x", "y", "width", "height"):
            assert row[f"largest_{key}"] == str(largest.get(key, ""))
    assert [path.name for path in table.parent.iterdir()] == ["table.csv"]


def test_overlays_of_images_with_equal_or_the_longest_names_do_not_replace_each_other(
    bundle: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longest = [f"{letter * (249 // len(letter.encode()))}{end}.png" for letter in "nü部" for end in "ab"]
    for place in ("inner/a.png", "one/inner/a.png", "two/one/inner/a.png", *longest):
        (pictures / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / "a.png", pictures / place)
    Image.open(pictures / "a.png").save(pictures / "a.jpg")
    assert main(["inspect", bundle, str(pictures), "--overlays", str(tmp_path / "overlays"), "--device", "cpu"]) == 0
    overlays = {str(line["overlay"]) for line in parse_json_lines(capsys.readouterr().out)}
    assert len(overlays) == 12
    assert all(Path(overlay).is_file() for overlay in overlays)
    assert str(tmp_path / "overlays" / "b.png") in overlays


def test_a_failed_overlay_keeps_the_verdicts_and_the_table(
    bundle: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heat, table = tmp_path / "heat", tmp_path / "table.csv"
    (heat / "a.png").mkdir(parents=True)
    assert main(["inspect", bundle, str(pictures), "--overlays", str(heat), "--csv", str(table)]) == 1
    captured = capsys.readouterr()
    first, second = parse_json_lines(captured.out)
    assert "Is a directory" in str(first["overlay_error"])
    assert "overlay" not in first
    assert Path(str(second["overlay"])).is_file()
    assert len(table.read_text().splitlines()) == 3
    assert "1 overlays are missing, the first: " in captured.err
    assert "could not be read" not in captured.err
    assert sorted(path.name for path in heat.iterdir()) == ["a.png", "b.png"]


def test_a_full_disk_leaves_no_partial_overlay(
    bundle: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        words = ["inspect", bundle, str(pictures), "--overlays", str(tmp_path / "heat")]
        assert main([*words, "--csv", str(tmp_path / "table.csv")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines = parse_json_lines(capsys.readouterr().out)
    assert ["File too large" in str(line["overlay_error"]) and "score" in line for line in lines] == [True, True]
    assert list((tmp_path / "heat").iterdir()) == []
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 3


def test_json_prints_any_name_in_any_encoding_of_standard_output(bundle: str, pictures: Path, tmp_path: Path) -> None:
    names = ["Gehäuse.png", "部品.png", "\U0001f600.png"]
    (tmp_path / "images").mkdir()
    for name in names:
        shutil.copy(pictures / "a.png", tmp_path / "images" / name)
    ended = run_with_ascii_output("inspect", bundle, tmp_path / "images", "--csv", tmp_path / "table.csv")
    assert ended.returncode == 0, ended.stderr
    assert sorted(Path(str(line["image"])).name for line in parse_json_lines(ended.stdout)) == sorted(names)
    assert len((tmp_path / "table.csv").read_text(encoding="utf-8").splitlines()) == 4


def test_ingest_exits_with_3_and_names_a_rejected_file_that_standard_output_cannot_encode(
    images: Path, tmp_path: Path
) -> None:
    shutil.copytree(images / "gear", tmp_path / "gear")
    (tmp_path / "gear/train/good/größe.png").write_bytes(b"no image")
    ended = run_with_ascii_output("ingest", tmp_path / "gear", tmp_path / "data")
    assert ended.returncode == 3, ended.stderr
    assert "rejected (not_an_image): train/good/gr\\u00f6\\u00dfe.png" in ended.stdout


def test_every_path_of_a_command_line_may_begin_with_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/plant")
    for line in (
        "inspect ~/b ~/new --overlays=~/heat --csv=~/table.csv --examples ~/new",
        "watch ~/b ~/new --output=~/verdicts",
        "fit ~/new ~/model",
        "calibrate ~/b ~/c --good ~/g --bad ~/x --trade-off=~/t",
        "export ~/b --to onnx --output=~/e --examples ~/g",
        "evaluate ~/b --output=~/r --data=~/d",
        "update ~/b ~/c --add=~/d --join ~/e",
        "data remove ~/d --category gear --ids=~/ids",
        "metric ~/b --output=~/m",
        "samples ~/s",
    ):
        arguments = vars(parse_command_line(build_parser(), line.split()))
        assert "~" not in str({key: value for key, value in arguments.items() if key != "run"}), line
    assert parse_command_line(build_parser(), ["submit", "inspect", "~/b"]).words == ["inspect", "~/b"]


@pytest.mark.parametrize("command", ["train default", "sweep sweep"])
def test_settings_may_follow_an_option(command: str) -> None:
    arguments = parse_command_line(build_parser(), [*command.split(), "name=a", "--resume", "seed=1"])
    assert (arguments.override, arguments.resume) == (["name=a", "seed=1"], True)


# samples


def test_samples_draws_both_parts_with_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(write_samples, size_px=64, num_train=2, num_test_good=1, num_bad_per_type=1)
    monkeypatch.setattr("focus_ray.samples.write.write_samples", small)
    assert main(["samples", str(tmp_path / "images"), "--seed", "3"]) == 0
    assert sorted(os.listdir(tmp_path / "images")) == ["board", "gear"]
    drawn = np.asarray(Image.open(tmp_path / "images/gear/train/good/001.png"))
    np.testing.assert_array_equal(drawn, draw_sample("gear", 3, "train", 1, 64)[0])


def test_commands_for_one_bundle_take_the_folder_of_a_run(
    bundle: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(bundle, run / "bundles/gear")
    assert main(["inspect", str(run), str(images / "gear/test/good")]) == 0
    assert "anomalous" in capsys.readouterr().err
    thresholds = ["--image-threshold", "2", "--pixel-threshold", "3"]
    assert main(["calibrate", str(run), str(tmp_path / "calibrated"), *thresholds]) == 0
    shutil.copytree(bundle, run / "bundles/gear2")
    manifest = json.loads((run / "bundles/gear2/manifest.json").read_text())
    manifest["category"] = "wheel"
    (run / "bundles/gear2/manifest.json").write_text(
        json.dumps({**manifest, "sha256": compute_manifest_hash(manifest)})
    )
    assert main(["inspect", str(run), str(images / "gear/test/good")]) == 1
    assert "has bundles of gear, wheel: give a single bundle" in capsys.readouterr().err


def test_a_fit_that_fails_leaves_no_folder_and_checks_the_weights_first(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, output = images / "gear/train/good", tmp_path / "model"
    assert main(["fit", str(good), str(output), f"model.weights={tmp_path}/absent.pth"]) == 1
    assert "absent.pth" in capsys.readouterr().err
    assert not output.exists()
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(good.iterdir())[:2]:
        shutil.copy(path, few)
    assert main(["fit", str(few), str(output), "model.weights=random"]) == 1
    assert not output.exists()  # the same command works when there are more images


def test_calibrate_changes_the_rate_without_images(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", bundle, str(tmp_path / "strict"), "--target-fpr", "0.01"]) == 0
    assert re.search(r"threshold: \S+ for a rate of 0\.05 before, \S+ for 0\.01 now", capsys.readouterr().err)
    thresholds = [
        Calibration.from_dict(read_manifest(place)["calibration"]).image_threshold
        for place in (bundle, tmp_path / "strict")
    ]
    assert thresholds[1] > thresholds[0]
