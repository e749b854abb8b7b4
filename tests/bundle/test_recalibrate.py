"""New thresholds without training, from good images or by hand; their cost; training images are reported and left out."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_set import draw_parts

from focus_ray.bundle.bundle import read_bundle, read_manifest
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.recalibrate import calibrate_bundle, set_thresholds
from focus_ray.bundle.registry import Registry
from focus_ray.cli.main import main
from focus_ray.errors import DataError
from focus_ray.metrics.trade_off import compute_trade_off
from focus_ray.samples.write import write_samples

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bundle(part_bundles: dict[str, str]) -> str:
    return part_bundles["gear"]


@pytest.fixture(scope="module")
def train_images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The good images of the bundle's data set: the images that it was trained on, and its holdout images."""
    return sorted((draw_parts(tmp_path_factory.mktemp("parts")) / "gear/train/good").iterdir())


@pytest.fixture(scope="module")
def new_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of gears that no model has seen."""
    folder = tmp_path_factory.mktemp("new")
    write_samples(folder, seed=7, size_px=64, num_train=24, num_test_good=1, num_bad_per_type=3)
    return folder / "gear"


@pytest.fixture(scope="module")
def good(new_images: Path) -> list[Path]:
    return sorted((new_images / "train/good").iterdir())


@pytest.fixture(scope="module")
def bad(new_images: Path) -> list[Path]:
    return sorted(path for path in (new_images / "test").rglob("*.png") if path.parent.name != "good")


def test_the_threshold_is_a_quantile_of_the_new_good_scores(bundle: str, good: list[Path], tmp_path: Path) -> None:
    before = read_manifest(bundle)
    calibration = calibrate_bundle(bundle, tmp_path / "new", good, target_fpr=0.2).calibration
    scores = sorted(inspection.score for inspection in Inspector.load(bundle).inspect(good))
    assert calibration.image_scores == pytest.approx(scores, rel=1e-5)
    assert calibration.image_threshold == calibration.image_scores[24 - 5]  # m = floor(0.2 * 25) = 5
    assert calibration.image_guaranteed
    after = read_manifest(tmp_path / "new")
    assert after["files"] == before["files"]
    (change,) = after["data"]["calibrations"]
    assert change["version"] == before["sha256"] != after["sha256"]
    assert change["image_threshold"] == before["calibration"]["image_threshold"]
    assert read_manifest(bundle) == before
    assert read_bundle(tmp_path / "new").calibration == calibration


def test_a_shift_from_the_previous_calibration_images_is_reported(
    bundle: str, good: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    dark, new = tmp_path / "dark", str(tmp_path / "new")
    dark.mkdir()
    for path in good:
        Image.fromarray(np.asarray(Image.open(path)) // 2).save(dark / path.name)
    count = read_bundle(bundle).calibration.num_images
    for folder, is_reported in ((good[0].parent, False), (dark, True)):
        assert main(["calibrate", bundle, new, "--good", str(folder)]) == 0
        notice = f"The 24 good images score higher than the {count} images that set the threshold"
        assert (notice in capsys.readouterr().err) is is_reported
    shift = calibrate_bundle(new, tmp_path / "newer", good).shift  # the original images against the dark ones
    assert shift is not None
    assert shift.direction == "lower"


def test_training_images_are_reported_and_do_not_set_thresholds(
    bundle: str, train_images: list[Path], good: list[Path], tmp_path: Path
) -> None:
    inspections = Inspector.load(bundle).inspect([*train_images, *good])
    trained_on = [path for path, result in zip([*train_images, *good], inspections, strict=True) if result.trained_on]
    assert len(trained_on) == read_manifest(bundle)["moments"]["count"]
    assert set(trained_on) <= set(train_images)
    recalibration = calibrate_bundle(bundle, tmp_path / "new", [*train_images, *good])
    assert recalibration.num_trained_on == len(trained_on)
    assert recalibration.calibration.num_images == len(train_images) + len(good) - len(trained_on)
    with pytest.raises(DataError, match=f"all {len(trained_on)} good images"):
        calibrate_bundle(bundle, tmp_path / "none", trained_on)
    assert not (tmp_path / "none").exists()


def test_bad_images_show_the_cost_of_a_threshold_and_do_not_set_it(
    bundle: str, good: list[Path], bad: list[Path], tmp_path: Path
) -> None:
    without, recalibration = (calibrate_bundle(bundle, tmp_path / "new", good, images) for images in ([], bad))
    assert recalibration.calibration == without.calibration
    assert without.curve is None
    assert recalibration.curve is not None
    assert (recalibration.curve.num_good, recalibration.curve.num_bad) == (24, len(bad))


def test_a_trade_off_counts_the_scores_above_each_threshold() -> None:
    rng = np.random.default_rng(0)
    good, bad = rng.integers(0, 9, 30).astype(float), rng.integers(3, 12, 20).astype(float)
    curve = compute_trade_off(good, bad)
    for threshold, alarms, misses in zip(curve.thresholds, curve.false_alarms, curve.misses, strict=True):
        assert alarms == pytest.approx((good > threshold).mean())
        assert misses == pytest.approx((bad <= threshold).mean())
    assert curve.compute_cost(1.0, 10.0, 0.1) == pytest.approx(0.9 * curve.false_alarms + 1.0 * curve.misses)
    assert curve.get_rates_at(4.5) == (pytest.approx((good > 4.5).mean()), pytest.approx((bad <= 4.5).mean()))
    with pytest.raises(DataError, match="got 30 and 0"):
        compute_trade_off(good, bad[:0])
    for costs in ((-1.0, 1.0, 0.1), (1.0, 1.0, 2.0)):
        with pytest.raises(DataError, match="expected"):
            curve.compute_cost(*costs)


def test_thresholds_set_by_hand_are_stored_with_the_name_of_the_person(bundle: str, tmp_path: Path) -> None:
    scores = read_bundle(bundle).calibration.image_scores
    middle = float(np.mean(scores[1:3]))
    manifest = set_thresholds(bundle, tmp_path / "new", image_threshold=middle, by="ann")
    calibration = read_bundle(tmp_path / "new").calibration
    assert (calibration.image_threshold, calibration.by_hand, calibration.image_guaranteed) == (middle, True, False)
    assert manifest["data"]["calibrations"][-1]["by"] == "ann"
    values = np.linspace(0.0, 2 * max(scores), 500)
    assert (
        calibration.is_anomalous(values) == (calibration.compute_conformal_p_values(values) <= calibration.target_fpr)
    ).all()
    assert any("set by hand" in line for line in calibration.describe_limits())
    for thresholds in ({}, {"pixel_threshold": float("nan")}):
        with pytest.raises(DataError, match="threshold"):
            set_thresholds(bundle, tmp_path / "none", **thresholds)


def test_a_registry_publishes_thresholds_as_its_next_version(bundle: str, tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry"))
    first = registry.publish(bundle, "press", aliases=["production"])
    second = registry.set_thresholds(first, 3.5, None, "token ab")
    assert (second.name, registry.list_aliases("press", "gear")) == (
        "v0002",
        {"latest": "v0002", "production": "v0001"},
    )
    assert read_bundle(second.uri).calibration.image_threshold == 3.5


def test_the_command_reports_the_change_and_refuses_invalid_arguments(
    bundle: str, good: list[Path], bad: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    new, folder, curve = str(tmp_path / "new"), str(good[0].parent), str(tmp_path / "curve.csv")
    arguments = ["calibrate", bundle, new, "--good", folder, "--trade-off", curve, "--bad", *map(str, bad)]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert ("cheapest" in captured.out, "image threshold" in captured.err) == (True, True)
    assert Path(curve).read_text().startswith("threshold,false_alarm_rate,miss_rate\n")
    for options, message in (
        ([], "give one of --good"),
        (["--good", folder, "--trade-off", curve], "--trade-off needs --bad"),
        (["--good", str(tmp_path / "gone")], "no such file or folder"),
    ):
        assert main(["calibrate", new, new, *options]) == 1
        assert message in capsys.readouterr().err


def test_inspect_reports_training_images_and_the_quality_of_the_threshold(
    bundle: str, train_images: list[Path], good: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    table = tmp_path / "table.csv"
    assert main(["inspect", bundle, str(train_images[0].parent), str(good[0]), "--csv", str(table)]) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    with table.open(newline="", encoding="utf-8") as stream:
        rows = {row["image"]: row["trained_on"] for row in csv.DictReader(stream)}
    assert rows == {line["image"]: "true" if line.get("trained_on") else "false" for line in lines}
    assert (rows[str(good[0])], set(rows.values())) == ("false", {"true", "false"})
    assert "images are among those that the model was trained on" in captured.err
    assert "The threshold comes from 5 good photographs" in captured.err


def test_copies_of_an_image_count_once_and_are_named(
    bundle: str, good: list[Path], bad: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    copy, packed_otherwise, alone = (str(tmp_path / name) for name in ("copy.png", "packed.bmp", "alone"))
    shutil.copy(good[0], copy)
    Image.open(good[0]).save(packed_otherwise)
    arguments = ["calibrate", bundle, alone, "--good", *map(str, good)]
    assert main(arguments) == 0
    assert "copies" not in capsys.readouterr().err
    arguments[2] = str(tmp_path / "new")
    assert main([*arguments, copy, packed_otherwise, str(good[0]), "--bad", *map(str, [*bad, bad[0]])]) == 0
    assert f"{good[0]} counts once; left out as copies" in (errors := capsys.readouterr().err)
    assert f"{copy}, {packed_otherwise}\n" in errors
    assert read_bundle(tmp_path / "new").calibration == read_bundle(alone).calibration
    (change,) = read_manifest(tmp_path / "new")["data"]["calibrations"]
    assert (change["num_good"], change["num_bad"]) == (len(good), len(bad))


def test_an_image_that_is_both_good_and_bad_is_refused_by_name(
    bundle: str, good: list[Path], bad: list[Path], tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.bmp"
    Image.open(good[3]).save(wrong)
    with pytest.raises(DataError, match=f"both as good and as bad .*{good[3]} and {wrong}"):
        calibrate_bundle(bundle, tmp_path / "new", good, [*bad, wrong])
    assert not (tmp_path / "new").exists()


def test_overlays_never_replace_other_pictures(bundle: str, good: list[Path], tmp_path: Path, capsys: Capture) -> None:
    image, folder = tmp_path / "a.png", tmp_path / "overlays"
    folder.mkdir()
    shutil.copy(good[0], image)
    shutil.copy(good[1], folder / "a.png")
    assert main(["inspect", bundle, str(image), "--overlays", str(folder)]) == 1
    assert f"would replace {folder / 'a.png'}, which is not an overlay" in capsys.readouterr().err
    assert (folder / "a.png").read_bytes() == good[1].read_bytes()
