"""New thresholds without training, from good images or by hand; their cost; training images are reported and left out."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_set import draw_parts, ingest_parts, small_config

from focus_ray.bundle.bundle import read_bundle, read_manifest
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.recalibrate import calibrate_bundle, set_thresholds
from focus_ray.bundle.registry import Registry
from focus_ray.cli.main import main
from focus_ray.errors import DataError
from focus_ray.metrics.trade_off import trade_off
from focus_ray.samples.write import write_samples
from focus_ray.training.training import train


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/, the data set data/ of them, runs/small/bundles/gear, and new/ with images that no model has seen."""
    folder = tmp_path_factory.mktemp("recalibrate")
    write_samples(folder / "new", seed=7, size_px=64, num_train=24, num_test_good=1, num_bad_per_type=3)
    config = small_config(ingest_parts(folder), folder / "runs", cluster={"local": True})
    train(config)
    return folder


def bundle_of(work: Path) -> str:
    return str(work / "runs/small/bundles/gear")


def good_images(work: Path) -> list[Path]:
    return sorted((work / "new/gear/train/good").iterdir())


def bad_images(work: Path) -> list[Path]:
    return sorted(path for path in (work / "new/gear/test").rglob("*.png") if path.parent.name != "good")


def test_the_threshold_is_a_quantile_of_the_new_good_scores(work: Path, tmp_path: Path) -> None:
    before = read_manifest(bundle_of(work))
    recalibration = calibrate_bundle(bundle_of(work), tmp_path / "new", good_images(work), target_fpr=0.2)
    scores = sorted(inspection.score for inspection in Inspector.load(bundle_of(work)).inspect(good_images(work)))
    assert recalibration.calibration.image_scores == pytest.approx(scores, rel=1e-5)
    assert (
        recalibration.calibration.image_threshold == recalibration.calibration.image_scores[24 - 5]
    )  # m = floor(0.2 * 25) = 5
    assert recalibration.calibration.image_guaranteed
    after = read_manifest(tmp_path / "new")
    assert after["files"] == before["files"]
    assert after["sha256"] != before["sha256"]
    (change,) = after["data"]["calibrations"]
    assert change["version"] == before["sha256"]
    assert change["image_threshold"] == before["calibration"]["image_threshold"]
    assert read_manifest(bundle_of(work)) == before
    assert read_bundle(tmp_path / "new").calibration == recalibration.calibration


def test_a_shift_from_the_previous_calibration_images_is_reported(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dark").mkdir()
    for path in good_images(work):
        Image.fromarray(np.asarray(Image.open(path)) // 2).save(tmp_path / "dark" / path.name)
    usual, dark = work / "new/gear/train/good", tmp_path / "dark"
    num_former = read_bundle(bundle_of(work)).calibration.num_images
    notice = f"The 24 good images score higher than the {num_former} images that set the threshold"
    for folder, is_told in ((usual, False), (dark, True)):
        assert main(["calibrate", bundle_of(work), str(tmp_path / "new"), "--good", str(folder)]) == 0
        assert (notice in capsys.readouterr().err) is is_told
    # compared with the new calibration the same images are no shift, and the original good images score lower
    recalibration = calibrate_bundle(tmp_path / "new", tmp_path / "newer", sorted(usual.iterdir()))
    assert recalibration.shift is not None
    assert recalibration.shift.direction == "lower"


def test_training_images_are_reported_and_do_not_set_thresholds(work: Path, tmp_path: Path) -> None:
    trained_on = sorted((work / "images/gear/train/good").iterdir())
    inspections = Inspector.load(bundle_of(work)).inspect([*trained_on, *good_images(work)])
    manifest = read_manifest(bundle_of(work))
    assert sum(inspection.trained_on for inspection in inspections) == manifest["moments"]["count"]
    assert not any(inspection.trained_on for inspection in inspections[len(trained_on) :])
    assert any("trained_on" in inspection.to_dict() for inspection in inspections)
    recalibration = calibrate_bundle(bundle_of(work), tmp_path / "new", [*trained_on, *good_images(work)])
    assert recalibration.num_trained_on == manifest["moments"]["count"]
    assert (
        recalibration.calibration.num_images == len(trained_on) + len(good_images(work)) - recalibration.num_trained_on
    )
    trained_on_images = [
        path for path, inspection in zip(trained_on, inspections, strict=False) if inspection.trained_on
    ]
    with pytest.raises(DataError, match=r"all \d+ good images"):
        calibrate_bundle(bundle_of(work), tmp_path / "none", trained_on_images)
    assert not (tmp_path / "none").exists()


def test_bad_images_show_the_cost_of_a_threshold_and_do_not_set_it(work: Path, tmp_path: Path) -> None:
    without = calibrate_bundle(bundle_of(work), tmp_path / "a", good_images(work))
    recalibration = calibrate_bundle(bundle_of(work), tmp_path / "b", good_images(work), bad_images(work))
    assert recalibration.calibration == without.calibration
    assert without.curve is None
    assert recalibration.curve is not None
    assert (recalibration.curve.num_good, recalibration.curve.num_bad) == (24, len(bad_images(work)))
    assert recalibration.curve.to_csv().decode().splitlines()[0] == "threshold,false_alarm_rate,miss_rate"


def test_a_trade_off_counts_the_scores_above_each_threshold() -> None:
    rng = np.random.default_rng(0)
    good, bad = rng.integers(0, 9, 30).astype(float), rng.integers(3, 12, 20).astype(float)
    curve = trade_off(good, bad)
    for threshold, alarms, misses in zip(curve.thresholds, curve.false_alarms, curve.misses, strict=True):
        assert alarms == pytest.approx((good > threshold).mean())
        assert misses == pytest.approx((bad <= threshold).mean())
    cost = curve.cost(1.0, 10.0, 0.1)
    assert cost == pytest.approx(0.9 * curve.false_alarms + 1.0 * curve.misses)
    assert curve.at(4.5) == (pytest.approx((good > 4.5).mean()), pytest.approx((bad <= 4.5).mean()))
    with pytest.raises(DataError, match="a trade-off needs good and bad images, got 30 and 0"):
        trade_off(good, bad[:0])
    with pytest.raises(DataError, match="expected 0 or more"):
        curve.cost(-1.0, 1.0, 0.1)
    with pytest.raises(DataError, match="defect rate 2; expected a share"):
        curve.cost(1.0, 1.0, 2.0)


def test_thresholds_set_by_hand_are_stored_with_the_name_of_the_person(work: Path, tmp_path: Path) -> None:
    scores = read_bundle(bundle_of(work)).calibration.image_scores
    middle = float(np.mean(scores[1:3]))
    manifest = set_thresholds(bundle_of(work), tmp_path / "new", image_threshold=middle, by="ann")
    calibration = read_bundle(tmp_path / "new").calibration
    assert calibration.image_threshold == middle
    assert calibration.by_hand
    assert not calibration.image_guaranteed
    assert manifest["data"]["calibrations"][-1]["by"] == "ann"
    values = np.linspace(0.0, 2 * max(scores), 500)
    assert (calibration.is_anomalous(values) == (calibration.conformal_p_value(values) <= calibration.target_fpr)).all()
    assert any("set by hand" in line for line in calibration.caveats())
    with pytest.raises(DataError, match="no threshold to set"):
        set_thresholds(bundle_of(work), tmp_path / "none")
    with pytest.raises(DataError, match="expected finite numbers above 0"):
        set_thresholds(bundle_of(work), tmp_path / "none", pixel_threshold=float("nan"))


def test_a_registry_publishes_thresholds_as_its_next_version(work: Path, tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry"))
    first = registry.publish(bundle_of(work), "press", aliases=["production"])
    second = registry.set_thresholds(first, 3.5, None, "token ab")
    assert (second.name, registry.aliases("press", "gear")) == ("v0002", {"latest": "v0002", "production": "v0001"})
    assert read_bundle(second.uri).calibration.image_threshold == 3.5


def test_the_command_reports_the_change_and_refuses_invalid_arguments(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, good = str(tmp_path / "new"), str(work / "new/gear/train/good")
    bad = [str(path) for path in bad_images(work)]
    curve = str(tmp_path / "curve.csv")
    assert main(["calibrate", bundle_of(work), new, "--good", good, "--bad", *bad, "--trade-off", curve]) == 0
    captured = capsys.readouterr()
    assert "cheapest" in captured.out
    assert "image threshold" in captured.err
    assert Path(curve).read_text().startswith("threshold,")
    assert main(["calibrate", new, new]) == 1
    assert "give one of --good" in capsys.readouterr().err
    assert main(["calibrate", new, new, "--good", good, "--trade-off", curve]) == 1
    assert "--trade-off needs --bad" in capsys.readouterr().err
    assert main(["calibrate", new, new, "--good", str(tmp_path / "gone")]) == 1
    assert "no such file or folder" in capsys.readouterr().err


def test_inspect_reports_training_images_and_the_quality_of_the_threshold(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_parts(work / "again")
    table, new = tmp_path / "table.csv", good_images(work)[0]
    assert main(["inspect", bundle_of(work), str(work / "again/gear/train/good"), str(new), "--csv", str(table)]) == 0
    captured = capsys.readouterr()
    stderr, lines = captured.err, [json.loads(line) for line in captured.out.splitlines()]
    with table.open(newline="", encoding="utf-8") as stream:
        rows = {row["image"]: row["trained_on"] for row in csv.DictReader(stream)}
    assert rows == {line["image"]: "true" if line.get("trained_on") else "false" for line in lines}
    assert (rows[str(new)], set(rows.values())) == ("false", {"true", "false"})
    assert "images are among those that the model was trained on" in stderr
    assert "good images are too few" in stderr


def test_copies_of_an_image_count_once_and_are_named(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, alone = good_images(work), tmp_path / "alone"
    first = Image.open(good[0])
    first.save(tmp_path / "packed_otherwise.bmp")
    (tmp_path / "copy.png").write_bytes(good[0].read_bytes())
    copies = [str(tmp_path / "copy.png"), str(tmp_path / "packed_otherwise.bmp"), str(good[0])]
    words = ["--good", *map(str, good)]
    assert main(["calibrate", bundle_of(work), str(alone), *words]) == 0
    assert "copies" not in capsys.readouterr().err
    bad = [*map(str, bad_images(work)), str(bad_images(work)[0])]
    assert main(["calibrate", bundle_of(work), str(tmp_path / "new"), *words, *copies, "--bad", *bad]) == 0
    stderr = capsys.readouterr().err
    assert f"{good[0]} counts once; left out as copies with the same pixels: {', '.join(copies[:2])}\n" in stderr
    assert read_bundle(tmp_path / "new").calibration == read_bundle(alone).calibration
    (change,) = read_manifest(tmp_path / "new")["data"]["calibrations"]
    assert (change["num_good"], change["num_bad"]) == (len(good), len(bad_images(work)))


def test_an_image_that_is_both_good_and_bad_is_refused_by_name(work: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.bmp"
    Image.open(good_images(work)[3]).save(wrong)
    with pytest.raises(DataError, match="both as good and as bad") as error:
        calibrate_bundle(bundle_of(work), tmp_path / "new", good_images(work), [*bad_images(work), wrong])
    assert f"{good_images(work)[3]} and {wrong}" in str(error.value)
    assert not (tmp_path / "new").exists()


def test_hidden_images_set_no_threshold(work: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    shutil.copytree(work / "new/gear/train/good", good)
    for hidden in (".trash", "@eaDir"):
        (good / hidden).mkdir()
        for path in bad_images(work):
            shutil.copy(path, good / hidden / f"{path.parent.name}-{path.name}")
    assert main(["calibrate", bundle_of(work), str(tmp_path / "new"), "--good", str(good)]) == 0
    assert read_bundle(tmp_path / "new").calibration.num_images == len(good_images(work))


def test_inspect_ignores_its_own_overlays(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, heat = tmp_path / "new", tmp_path / "new/heat"
    new.mkdir()
    for path in good_images(work)[:2]:
        shutil.copy(path, new)
    for _ in range(3):
        assert main(["inspect", bundle_of(work), str(new), "--overlays", str(heat)]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2
    heat.rename(tmp_path / "moved")
    assert main(["calibrate", bundle_of(work), str(tmp_path / "made"), "--good", str(tmp_path / "moved")]) == 1
    assert "2 pictures that focus_ray drew" in capsys.readouterr().err
    overlay = next((tmp_path / "moved").iterdir())
    assert main(["inspect", bundle_of(work), str(overlay)]) == 1
    assert "that focus_ray drew, not a photograph" in capsys.readouterr().out


def test_overlays_never_replace_the_images(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "a.png"
    shutil.copy(good_images(work)[0], image)
    before = image.read_bytes()
    assert main(["inspect", bundle_of(work), str(image), "--overlays", str(tmp_path)]) == 1
    assert f"the overlay of {image} would replace the image {image}" in capsys.readouterr().err
    other = tmp_path / "other/a.png"
    other.parent.mkdir()
    shutil.copy(good_images(work)[1], other)
    assert main(["inspect", bundle_of(work), str(other), "--overlays", str(tmp_path)]) == 1
    assert f"would replace {image}, which is not an overlay" in capsys.readouterr().err
    assert image.read_bytes() == before
