"""The Python API without a cluster: fit, inspect, evaluate and save; and the conventions of scikit-learn."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms
from places import SHARED
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils import estimator_checks

import focus_ray
from focus_ray.bundle.bundle import read_manifest
from focus_ray.cli.main import main
from focus_ray.data.read import read_index
from focus_ray.errors import ConfigError, DataError

QUICK: dict[str, Any] = {
    "weights": "random",
    "image_size_px": 64,
    "model__image_alignment__group": "none",
    "density__num_channels": 16,
    "coreset": 64,
}


@pytest.fixture(scope="module", name="parts")
def gear_folder(parts: str) -> Path:
    """The folder of images from which the category gear of the data set `parts` was ingested."""
    return Path(parts).parent / "images/gear"


@pytest.fixture(scope="module")
def model(parts: Path) -> focus_ray.Model:
    return focus_ray.fit(parts, **QUICK)


def read_pixels(folder: Path) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())])


def test_a_folder_an_array_and_a_list_of_paths_make_the_same_model(parts: Path, model: focus_ray.Model) -> None:
    good = parts / "train/good"
    new = sorted((parts / "test/good").iterdir())[0]
    arrays, paths, plain = (focus_ray.fit(x, **QUICK) for x in (read_pixels(good), sorted(good.iterdir()), good))
    for other in (arrays, paths, plain):
        assert other.inspect(new).score == pytest.approx(model.inspect(new).score, rel=1e-5)
        assert other.threshold == pytest.approx(model.threshold, rel=1e-5)
    assert (plain.category, model.category) == ("good", "gear")


def test_fit_makes_the_same_model_as_the_commands(parts: Path, model: focus_ray.Model, tmp_path: Path) -> None:
    words = f"""data.uri={parts.parents[1]}/data data.categories=[gear] storage={tmp_path}/runs name=a model.weights=random
    model.image_size_px=64 model.image_alignment.group=none density.num_channels=16 density.coreset=64""".split()
    assert main(["train", "default", *words]) == 0
    commanded = read_manifest(tmp_path / "runs/a/bundles/gear")
    model.save(tmp_path / "saved")
    saved = read_manifest(tmp_path / "saved")
    for part in ("network", "density", "moments"):
        assert saved["files"][part]["sha256"] == commanded["files"][part]["sha256"]
    assert saved["calibration"] == commanded["calibration"]


def test_images_are_inspected_by_path_bytes_and_pixels_alike(parts: Path, model: focus_ray.Model) -> None:
    path = sorted((parts / "test/good").iterdir())[0]
    pixels = np.asarray(Image.open(path).convert("RGB"))
    inspections = [model.inspect(image) for image in (path, str(path), path.read_bytes(), pixels)]
    score = inspections[0].score
    assert {inspection.score for inspection in inspections} == {score}
    assert inspections[0].verdict in ("normal", "anomalous")
    assert model.inspect_all(np.stack([pixels, pixels]))[1].score == pytest.approx(score, rel=1e-5)
    assert len(model.inspect_all(parts / "test/good")) == 4
    assert any("The threshold comes from" in line for line in model.caveats)


def test_a_model_and_a_result_print_as_one_useful_line(parts: Path, model: focus_ray.Model) -> None:
    inspection = model.inspect(sorted((parts / "test/good").iterdir())[0])
    for line, words in (
        (str(model), [model.category, f"{model.threshold:.4g}"]),
        (str(inspection), [inspection.verdict]),
    ):
        assert "\n" not in line
        assert len(line) < 160
        assert all(word in line for word in words)


@pytest.fixture(scope="module")
def photograph(parts: Path) -> Image.Image:
    """An oblong image, so that a rotation changes its size."""
    return Image.open(sorted((parts / "test/good").iterdir())[0]).convert("RGB").crop((0, 0, 64, 48))


@pytest.mark.parametrize("shape", [(48, 64, 3), (48, 64), (48, 64, 1)])
def test_an_array_is_a_single_image(shape: tuple[int, ...], model: focus_ray.Model, photograph: Image.Image) -> None:
    colour = np.asarray(photograph)
    pixels = colour if shape[2:] == (3,) else np.asarray(photograph.convert("L")).reshape(shape)
    (inspection,) = model.inspect_all(pixels)
    assert inspection.score == model.inspect(pixels).score
    assert (inspection.width, inspection.height) == (64, 48)
    (tensor,) = model.inspect_all(torch.from_numpy(pixels.copy()))  # type: ignore[arg-type]
    assert tensor.score == inspection.score
    assert model.evaluate(pixels, [0])["num_normal"] == 1
    several = model.inspect_all(np.stack([pixels, pixels]))
    assert [single.score for single in several] == pytest.approx([inspection.score] * 2, rel=1e-5)


def test_the_estimator_gives_one_prediction_for_one_array(model: focus_ray.Model, photograph: Image.Image) -> None:
    detector = focus_ray.AnomalyDetector()
    detector.model_, detector.offset_ = model, -model.threshold
    for image in (np.asarray(photograph), photograph):
        results = detector.predict(image), detector.score_samples(image), detector.p_values(image)
        assert [result.shape for result in results] == [(1,)] * 3


@pytest.mark.parametrize(
    "shape", [(64, 64, 4), (64, 64, 2), (2, 3, 64, 64), (2, 64, 64, 4), (2, 2, 64, 64, 3), (64, 3), (64,)]
)
def test_an_array_of_another_shape_is_refused(shape: tuple[int, ...], model: focus_ray.Model) -> None:
    with pytest.raises(DataError, match=r"^image 0: .*uint8"):
        model.inspect_all(np.zeros(shape, np.uint8))
    with pytest.raises(DataError, match="expected uint8 of shape"):
        model.inspect_all(list(np.zeros((64, 48, 3), np.uint8)))  # rows of one image


def test_an_array_that_may_be_one_image_with_its_channels_first_gives_a_warning(model: focus_ray.Model) -> None:
    with pytest.warns(UserWarning, match="3 grey images"):
        assert len(model.inspect_all(np.zeros((3, 48, 64), np.uint8))) == 3


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "LA", "RGBA", "PA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I"])
@pytest.mark.parametrize("rotated", [False, True])
def test_a_pillow_image_scores_as_its_file(
    mode: str, rotated: bool, model: focus_ray.Model, photograph: Image.Image, tmp_path: Path
) -> None:
    deep = Image.fromarray(np.asarray(photograph.convert("L")).astype(np.uint16) * 257)
    if mode in ("I;16", "I"):
        image = deep if mode == "I;16" else Image.fromarray(np.asarray(deep).astype(np.int32))
    elif mode == "LAB":  # Pillow converts RGB to LAB by profiles alone
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(photograph, *profiles, outputMode="LAB")
    else:
        image = photograph.quantize(16) if mode == "P" else photograph.convert(mode)
    assert image.mode == mode
    # a file format without this mode holds the same colours in another mode
    saved = {"PA": "RGBA", "YCbCr": "RGB", "HSV": "RGB"}.get(mode)
    saved_image = deep if mode == "I" else image.convert(saved) if saved else image
    path = tmp_path / f"image.{'tif' if mode in ('CMYK', 'LAB') else 'png'}"
    exif = Image.Exif()
    if rotated:
        image.getexif()[0x0112] = exif[0x0112] = 6
    saved_image.save(path, exif=exif)
    from_file, inspection = model.inspect(path), model.inspect(image)
    size = (48, 64) if rotated else (64, 48)
    assert (inspection.width, inspection.height) == (from_file.width, from_file.height) == size
    assert inspection.score == from_file.score == model.inspect_all([image])[0].score
    opened = Image.open(path)
    if rotated and path.suffix == ".tif":
        with pytest.raises(DataError, match="Pillow misreads this kind of TIFF: give the path"):
            model.inspect(opened)
    else:
        assert model.inspect(opened).score == from_file.score


def test_a_pillow_image_without_a_fixed_range_of_values_is_refused(model: focus_ray.Model, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="image 1: a floating-point image has no set range"):
        model.inspect_all([np.zeros((64, 64), np.uint8), Image.new("F", (64, 64))])
    deep = np.full((64, 64), 1000, np.uint16)
    tifffile.imwrite(tmp_path / "inverted.tif", deep, photometric="miniswhite")
    with pytest.raises(DataError, match="TIFF"):
        model.inspect(Image.open(tmp_path / "inverted.tif"))
    damaged = tmp_path / "damaged.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:3000])
    with pytest.raises(DataError, match="truncated"):
        model.inspect(Image.open(damaged))


@pytest.mark.skipif(not (SHARED / "cases/api").is_dir(), reason="../shared/cases is not there")
def test_recorded_files_score_equally_as_files_and_as_pillow_images(model: focus_ray.Model) -> None:
    files = sorted((SHARED / "cases/api").iterdir())
    scores = [inspection.score for inspection in model.inspect_all(files)]
    assert [model.inspect(Image.open(path)).score for path in files] == pytest.approx(scores, rel=1e-5)


def test_a_corrupt_image_among_many_is_named(parts: Path, model: focus_ray.Model, tmp_path: Path) -> None:
    for path in sorted((parts / "train/good").iterdir())[:5]:
        shutil.copy(path, tmp_path)
    files = sorted(tmp_path.iterdir())
    files[3].write_bytes(files[3].read_bytes()[:200])
    for images in (tmp_path, files, [str(path) for path in files]):
        with pytest.raises(DataError, match=rf"^{files[3]}: .*truncated"):
            model.inspect_all(images)
    with pytest.raises(DataError, match=rf"^{files[3]}: .*truncated"):
        model.inspect(files[3])
    with pytest.raises(DataError, match=rf"^{files[3]}: .*truncated"):
        model.evaluate(files, [0, 0, 0, 0, 1])
    with pytest.raises(DataError, match=r"^image 3: .*truncated"):
        model.inspect_all([path.read_bytes() for path in files])


def test_a_loaded_model_scores_as_the_saved_model(parts: Path, model: focus_ray.Model, tmp_path: Path) -> None:
    place = model.save(tmp_path / "model")
    again = focus_ray.load(place)
    image = sorted((parts / "test/good").iterdir())[0]
    assert again.inspect(image).score == model.inspect(image).score
    assert model.save(place) == place


def test_a_model_is_evaluated_on_its_test_images_or_on_labelled_images(
    parts: Path, model: focus_ray.Model, tmp_path: Path
) -> None:
    result = model.evaluate()
    assert (result["num_normal"], result["image_auroc"] is not None) == (4, True)
    images = sorted((parts / "test").rglob("*.png"))
    labels = [int(path.parent.name != "good") for path in images]
    for auroc in (
        model.evaluate(parts)["image_auroc"],
        model.evaluate(images, labels)["image_auroc"],
        focus_ray.load(model.save(tmp_path / "saved")).evaluate(parts)["image_auroc"],
    ):
        assert auroc == pytest.approx(result["image_auroc"])
    with pytest.raises(DataError, match="2 images, but 1 labels"):
        model.evaluate(images[:2], [0])
    with pytest.raises(DataError, match="evaluate needs labels"):
        model.evaluate(images)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_size": 64}, "image_size_px"),
        ({"method": "split"}, "image_alignment__method"),
        ({"image_size_px": 63}, r"model\.image_size_px"),
    ],
)
def test_a_misspelt_or_ambiguous_setting_is_refused_by_name(parts: Path, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        focus_ray.fit(parts, **setting)


def test_invalid_images_are_refused(parts: Path, model: focus_ray.Model, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for images, message in (
        (np.zeros((4, 4, 5), np.uint8), r"shape \(4, 4, 5\).*expected uint8"),
        (np.zeros((4, 4, 3)), "type float64: expected uint8"),
        (tmp_path / "gone.png", "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            model.inspect(images)
    with pytest.raises(DataError, match="no image in this folder"):
        model.inspect_all(tmp_path / "empty")
    for source, message in (
        (tmp_path / "gone", "no such folder"),
        (read_pixels(parts / "train/good")[:2], "2 normal training images; at least 4"),
        (parts.parent, r"2 categories \(board, gear\)"),
    ):
        with pytest.raises(DataError, match=message):
            focus_ray.fit(source, **QUICK)


def test_the_estimator_keeps_scikit_learns_conventions(parts: Path) -> None:
    good, bad = read_pixels(parts / "train/good"), read_pixels(parts / "test/scratch")
    settings = {key: value for key, value in QUICK.items() if key not in ("weights", "image_size_px")}
    estimator = focus_ray.AnomalyDetector(64, "random", settings=settings)
    with pytest.raises(NotFittedError):
        estimator.predict(good)
    assert estimator.fit(good) is estimator
    images = np.concatenate([good[:3], bad])
    scores, decision = estimator.score_samples(images), estimator.decision_function(images)
    np.testing.assert_allclose(decision, scores - estimator.offset_)
    verdicts = estimator.predict(images)
    assert set(verdicts) <= {-1, 1}
    assert ((decision < -1e-4) == (verdicts == -1)).all()
    assert ((estimator.p_values(images) <= 0.05) == (verdicts == -1)).all()
    again = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(again.score_samples(images), scores)
    assert not hasattr(clone(estimator), "model_")


def test_scikit_learns_own_checks_that_need_no_table_pass() -> None:
    for check in (
        estimator_checks.check_parameters_default_constructible,
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_set_params,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_valid_tag_types,
        estimator_checks.check_mixin_order,
    ):
        check("AnomalyDetector", focus_ray.AnomalyDetector())


def read_groups(model: focus_ray.Model) -> list[str]:
    data = str(model.inspector.bundle.config.data.uri)
    return read_index(data, model.category)["group"].to_pylist()


def test_a_list_of_images_accepts_a_group_for_each_image(parts: Path) -> None:
    images = list(read_pixels(parts / "train/good")[:8])
    model = focus_ray.fit(images, groups=["a", "a", 2, np.int64(2), "b", None, "", "c"], **QUICK)
    assert read_groups(model) == ["a", "a", "2", "2", "b", "", "", "c"]


def test_a_folder_accepts_a_rule_for_its_groups(parts: Path) -> None:
    model = focus_ray.fit(parts / "train/good", group_by=r"name:(\d)\.png$", **QUICK)
    names = sorted(path.name for path in (parts / "train/good").iterdir())
    assert read_groups(model) == [name[-5] for name in names]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("pixels", {"groups": ["a", "b", "c"]}, "4 images, but 3 groups"),
        ("pixels", {"groups": ["a", "b", "c", 1.5]}, r"1\.5"),
        ("pixels", {"group_by": "name:x"}, "name:x"),
        ("folder", {"groups": ["a"]}, "group_by"),
        ("ingested", {"group_by": "name:x"}, "name:x"),
    ],
)
def test_groups_that_do_not_fit_the_images_are_refused(
    parts: Path, source: str, options: dict[str, Any], message: str
) -> None:
    images: Any = {"folder": parts, "ingested": parts.parents[1] / "data"}.get(source)
    with pytest.raises(DataError, match=message):
        focus_ray.fit(list(read_pixels(parts / "train/good")[:4]) if images is None else images, **options, **QUICK)


def test_training_images_are_left_out_of_an_evaluation(parts: Path, model: focus_ray.Model) -> None:
    trained_on, new = sorted((parts / "train/good").iterdir()), sorted((parts / "test").rglob("*.png"))
    labels = [int(path.parent.name != "good") for path in new]
    alone = model.evaluate(new, labels)
    result = model.evaluate([*trained_on, *new], [0] * len(trained_on) + labels)
    assert alone["trained_on"] == {"num_images": 0, "notice": None}
    assert result["trained_on"]["num_images"] == len(trained_on)
    assert {**result, "trained_on": None} == {**alone, "trained_on": None}
    with pytest.raises(DataError, match="the model was trained on"):
        model.evaluate(trained_on, [0] * len(trained_on))


@pytest.mark.parametrize("label", [0.6, 0.9, 2, -1, float("nan"), "good", None])
def test_a_label_that_is_neither_0_nor_1_is_refused_with_its_number(
    parts: Path, model: focus_ray.Model, label: Any
) -> None:
    image = next((parts / "train/good").iterdir())
    with pytest.raises(DataError, match=re.escape(f"label {label!r} of image 1: expected 0")):
        model.evaluate([image, image], [True, label])


def test_fit_trains_a_network_with_either_scope(parts: Path) -> None:
    images = sorted((parts / "train/good").iterdir())[:8]
    settings = {"image_size_px": 64, "weights": "random", "steps": 2, "image_alignment__group": "none"}
    for scope in ("category", "plant"):
        lines: list[str] = []
        model = focus_ray.fit(images, scope=scope, log=lines.append, **settings)
        assert any("step 2/2" in line for line in lines)
        assert np.isfinite(model.inspect(images[0]).score)
