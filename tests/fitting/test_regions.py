"""Regions of interest: drawing and refusal, and pixels outside a region are not scored, calibrated or measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from small_set import fit_alone, make_bundle, small_config

from focus_ray.bundle.bundle import read_bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.update import update_bundle
from focus_ray.data.framing import InputFrame
from focus_ray.data.images import ImageError, decode_batch, decode_image, decode_mask, encode_png
from focus_ray.data.read import read_test_rows
from focus_ray.errors import ConfigError, DataError
from focus_ray.fitting.fit import DetectorFitter, FitResult
from focus_ray.fitting.leave_one_out import collect_leave_one_out_scores
from focus_ray.fitting.regions import check_regions, draw_polygon_mask, load_frame, read_region
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.fitting.shards import build_shard
from focus_ray.fitting.split import compute_split_plan
from focus_ray.metrics.pixels import PixelCurve
from focus_ray.sweep.settings import parse_sweep_config
from focus_ray.sweep.trial_inputs import check_trial_settings

LEFT = [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]


def make_region_config(parts: str, folder: Path, region: Any, **sections: Any) -> Config:
    return small_config(parts, folder, data={"regions": {"gear": region}}, **sections)


@pytest.fixture(scope="module")
def inspector(parts: str, tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    return Inspector.load(make_bundle(make_region_config(parts, tmp_path_factory.mktemp("runs"), LEFT)), "cpu")


def save_mask(path: Path, mask: NDArray[Any]) -> str:
    path.write_bytes(encode_png(mask))
    return str(path)


# Drawing


def test_a_polygon_is_drawn_in_shares_of_width_and_height() -> None:
    expected = np.zeros((40, 80), bool)
    expected[10:30, 20:40] = True
    box = ((0.25, 0.25), (0.5, 0.25), (0.5, 0.75), (0.25, 0.75))
    np.testing.assert_array_equal(draw_polygon_mask([box], 40, 80), expected)
    triangle = draw_polygon_mask([((0, 0), (1, 0), (0, 1))], 40, 40)
    assert triangle.mean() == pytest.approx(0.5, abs=0.02)
    assert triangle[2, 2]
    assert not triangle[37, 37]


def test_several_polygons_form_one_region() -> None:
    right = ((0.75, 0.0), (1.0, 0.0), (1.0, 1.0), (0.75, 1.0))
    region = draw_polygon_mask([tuple(map(tuple, LEFT)), right], 8, 8)  # type: ignore[list-item]
    assert region.all(axis=0).tolist() == [True] * 4 + [False] * 2 + [True] * 2


def test_a_single_polygon_needs_no_list_around_it(parts: str, tmp_path: Path) -> None:
    single, in_list = (make_region_config(parts, tmp_path, region) for region in (LEFT, [LEFT]))
    assert single.data.regions == in_list.data.regions
    assert parse_config(single.model_dump(mode="json")) == single


def test_the_white_area_of_a_mask_is_inspected(parts: str, tmp_path: Path) -> None:
    mask = np.zeros((100, 300), np.uint8)
    mask[:, :150] = 255
    mask[:, 150:] = 20  # like the noise of a JPEG
    config = make_region_config(parts, tmp_path, save_mask(tmp_path / "mask.png", mask))
    expected = np.zeros((64, 64), bool)
    expected[:, :32] = True
    np.testing.assert_array_equal(read_region(config, "gear"), expected)
    assert read_region(config, "board") is None


# Errors


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ([[0, 0], [1, 1]], r"data\.regions: gear: a polygon has 2 points: give 3 at least"),
        (
            [[0, 0], [1.5, 0], [1, 1]],
            r"gear: the point \[1\.5, 0\.0\] lies outside the image: points are \[x, y\], shares",
        ),
        ([], r"gear: it is empty: give polygons or the path of a mask, or leave the category out"),
        ("", r"gear: it is empty"),
    ],
)
def test_an_invalid_region_is_refused(region: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"data": {"uri": "images", "regions": {"gear": region}}})


TINY = [[0.5, 0.5], [0.51, 0.5], [0.5, 0.51]]


@pytest.mark.parametrize(
    ("category", "region", "message"),
    [
        ("gera", LEFT, r"data\.regions names 'gera'.*board, gear"),
        ("gear", TINY, r"polygons .* \d of the 64 x 64 pixels"),
        ("gear", "black.png", r"data\.regions\.gear: .*black\.png .* 0 of the 64 x 64 pixels"),
        ("gear", "nowhere.png", r"nowhere\.png: .*data\.regions"),
        ("gear", "words.png", r"words\.png: .*data\.regions"),
    ],
)
def test_an_unusable_region_is_refused(parts: str, tmp_path: Path, category: str, region: Any, message: str) -> None:
    save_mask(tmp_path / "black.png", np.zeros((64, 64), np.uint8))
    (tmp_path / "words.png").write_text("not an image")
    region = str(tmp_path / region) if isinstance(region, str) else region
    with pytest.raises(DataError, match=message):
        check_regions(small_config(parts, tmp_path, data={"regions": {category: region}}), ["board", "gear"])


@pytest.mark.parametrize(
    ("model", "regions", "setting"),
    [
        ({"resize": "pad"}, {}, r"model\.resize=pad"),
        ({"tiling": {"grid": [2, 2]}, "image_alignment": {"group": "none"}}, {}, r"model\.tiling"),
        ({}, {"gear": LEFT}, r"data\.regions"),
    ],
)
def test_a_sweep_refuses_settings_that_it_does_not_support(model: Any, regions: Any, setting: str) -> None:
    config = parse_config({"data": {"uri": "images", "regions": regions}, "model": model})
    with pytest.raises(ValueError, match=setting):
        check_trial_settings(config)


# Scoring


def test_pixels_outside_the_region_are_not_scored(inspector: Inspector, parts: str) -> None:
    image = next(iter(read_test_rows(parts, "gear")))["image"]
    pixels = decode_image(image, 64)
    changed = pixels.copy()
    changed[20:44, 50:60] = (255, 0, 255)
    plain, changed_outside = inspector.inspect([encode_png(pixels), encode_png(changed)])
    for inspection in (plain, changed_outside):
        assert (inspection.anomaly_map[:, 32:] == 0).all()
        assert inspection.anomaly_map[:, :32].min() > 0
    whole_image_detector = fit_alone(
        make_region_config(parts, Path("unused"), [[[0, 0], [1, 0], [1, 1], [0, 1]]])
    ).detector
    batch = torch.from_numpy(decode_batch([encode_png(pixels), encode_png(changed)], 64))
    scores = whole_image_detector(batch).score
    # a small difference remains: the receptive field of patches inside the region reaches the changed pixels
    assert abs(changed_outside.score - plain.score) < 0.5 * float(scores[1] - scores[0])


def test_a_region_of_the_whole_image_scores_like_no_region(parts: str, tmp_path: Path) -> None:
    scoring, density = {"image_score": "profile"}, {"reduction": "discriminant"}
    whole_image = [[0, 0], [1, 0], [1, 1], [0, 1]]

    def fit(regions: dict[str, Any]) -> FitResult:
        return fit_alone(small_config(parts, tmp_path, data={"regions": regions}, scoring=scoring, density=density))

    assert fit({"gear": whole_image}).calibration == fit({}).calibration


def test_the_region_moves_with_the_image_when_images_are_aligned(parts: str, tmp_path: Path) -> None:
    model = {"image_alignment": {"min_drop": 0.0}}
    config = make_region_config(parts, tmp_path, LEFT, model=model, scoring={"image_score": "profile"})
    result = fit_alone(config)
    assert result.notes.alignment is not None
    assert result.notes.alignment.enabled
    assert result.statistics.shown is not None
    assert not (
        result.statistics.shown == result.statistics.shown[0]
    ).all()  # each part is rotated by a different angle
    records = read_test_rows(parts, "gear")
    batch = decode_batch([record["image"] for record in records], load_frame(config, "gear"))
    maps = result.detector(torch.from_numpy(batch)).anomaly_map
    assert (maps[:, :, 32:] == 0).all()
    assert float((maps[:, 8:56, 8:24] > 0).float().mean()) > 0.9


def test_thresholds_are_computed_from_pixels_of_the_region_only(inspector: Inspector, parts: str) -> None:
    config = inspector.bundle.config
    shard = build_shard(config, "gear", compute_split_plan(config, "gear"), 0, 1)
    _, maps = inspector.score(torch.cat(list(shard.read_batches("holdout"))).numpy())
    above = float((maps[:, :, :32] > inspector.bundle.calibration.pixel_threshold).mean())
    assert above == pytest.approx(
        config.calibration.target_pixel_fpr, rel=0.2
    )  # it would be twice as large if all pixels counted


@pytest.mark.parametrize("reduction", ["discriminant", "semi_orthogonal"])
def test_leave_one_out_scores_count_only_pixels_of_the_region(parts: str, tmp_path: Path, reduction: str) -> None:
    sections: dict[str, Any] = {
        "calibration": {"method": "leave_one_out"},
        "density": {"reduction": reduction},
        "scoring": {"image_score": "profile"},
    }
    config = make_region_config(parts, tmp_path, LEFT, **sections)
    plan = compute_split_plan(config, "gear")
    run = DetectorFitter(config, build_shard(config, "gear", plan, 0, 1), len(plan.fit.rows), torch.device("cpu"))
    result = run.build_and_calibrate()
    builder = collect_leave_one_out_scores(result.detector, result.statistics, config, run.projection)
    assert [image.num_pixels for image in builder._images] == [64 * 32] * len(plan.fit.rows)


def test_only_pixels_of_the_region_are_measured(inspector: Inspector, parts: str) -> None:
    records = list(read_test_rows(parts, "gear"))
    results = inspector.evaluate(records)
    maps = np.stack(
        [inspection.anomaly_map for inspection in inspector.inspect([record["image"] for record in records])]
    )
    empty = np.zeros((64, 64), bool)
    masks = np.stack([empty if r["mask"] is None else decode_mask(r["mask"], 64, 64) for r in records])
    inside, scores = masks[:, :, :32], maps[:, :, :32]
    assert inside.any()
    assert inside.sum() < masks.sum()
    assert results["pixel_auroc"] == pytest.approx(roc_auc_score(inside.ravel(), scores.ravel()), abs=1e-4)
    assert results["aupro_0.3"] == pytest.approx(PixelCurve.from_maps(inside, scores).aupro(0.3), abs=1e-3)


# The bundle


def test_a_bundle_contains_its_region(parts: str, tmp_path: Path) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 8:40] = 255
    mask_path = save_mask(tmp_path / "mask.png", mask)
    bundle = make_bundle(make_region_config(parts, tmp_path, mask_path))
    Path(mask_path).unlink()
    np.testing.assert_array_equal(read_bundle(bundle).frame.region, mask > 0)
    update_bundle(bundle, tmp_path / "more", add=parts, calibrate=parts)
    np.testing.assert_array_equal(read_bundle(tmp_path / "more").frame.region, mask > 0)


def test_a_streamed_shard_equals_a_shard_in_memory(parts: str, tmp_path: Path) -> None:
    in_memory = make_region_config(parts, tmp_path, LEFT)
    streamed = in_memory.model_copy(update={"data": in_memory.data.model_copy(update={"memory_budget_mb": 0.0})})
    plan = compute_split_plan(in_memory, "gear")
    images, streamed_images = (
        torch.cat(list(build_shard(config, "gear", plan, 0, 1).read_batches("fit"))) for config in (in_memory, streamed)
    )
    assert images.shape[3] == 4
    assert torch.equal(images, streamed_images)


def test_an_image_that_covers_no_pixel_of_the_region_is_refused() -> None:
    region = np.zeros((64, 64), bool)
    region[:, :20] = True
    thin_image = encode_png(np.zeros((4000, 4, 3), np.uint8))  # one pixel wide after scaling to the height of the frame
    with pytest.raises(
        ImageError,
        match=r"4 x 4000 pixels becomes 1 x 64 px .*data\.regions",
    ):
        decode_image(thin_image, InputFrame(64, 64, "pad", region))


def test_recalibration_counts_only_pixels_of_the_region(inspector: Inspector) -> None:
    anomaly_map = np.zeros((64, 64), np.float32)
    anomaly_map[:, :32] = 1.0
    assert inspector.frame.select_scored_values(anomaly_map).shape == (1, 64 * 32)
    assert inspector.frame.select_scored_values(anomaly_map).min() == 1.0
    assert InputFrame(64, 64).select_scored_values(anomaly_map) is anomaly_map


@pytest.mark.parametrize("key", ["model.tiling.grid", "model.resize"])
def test_a_sweep_refuses_to_search_over_the_framing_of_images(key: str) -> None:
    tree = {"base": {"data": {"uri": "images"}}, "space": {key: ["pad"]}, "searcher": "grid"}
    with pytest.raises(ConfigError, match=rf"space: {key} cannot be searched"):
        parse_sweep_config(tree)
