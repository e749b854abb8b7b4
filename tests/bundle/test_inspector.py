"""The inspector: batches, verdicts and regions; the test computes every metric of an evaluation again from arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from focus_ray.bundle.inspector import Inspector
from focus_ray.data.images import decode_batch, decode_mask
from focus_ray.data.read import read_index, read_rows, read_test_rows
from focus_ray.detect.inspection import find_regions, resize_anomaly_map
from focus_ray.detect.pictures import draw_inspection_overlay
from focus_ray.drawing.png import encode_png
from focus_ray.errors import BundleError, DataError
from focus_ray.metrics import metrics
from focus_ray.metrics.evaluate import compute_evaluation_size, compute_metrics
from focus_ray.metrics.pixels import PixelCurve

Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def inspector(aligned_bundle: str) -> Inspector:
    return Inspector.load(aligned_bundle, "cpu", batch_size=3)


@pytest.fixture(scope="module")
def records(parts: str) -> Records:
    """The labelled test images: 4 good, 4 with a defect and its mask."""
    return list(read_test_rows(parts, "gear"))


# Scores


def test_a_batch_and_a_stream_score_as_single_images(inspector: Inspector, records: Records) -> None:
    images = [record["image"] for record in records]
    batch = decode_batch(images, 64)
    scores, maps = inspector.score(batch)
    tolerance = 1e-4 * float(maps.max())
    for number, inspection in enumerate(inspector.inspect(images)):
        score, anomaly_map = inspector.score(batch[number : number + 1])
        assert scores[number] == pytest.approx(score[0], rel=1e-4) == pytest.approx(inspection.score, rel=1e-4)
        np.testing.assert_allclose(maps[number], anomaly_map[0], rtol=1e-4, atol=tolerance)
        np.testing.assert_allclose(maps[number], inspection.anomaly_map, rtol=1e-4, atol=tolerance)
    assert inspector.inspect([]) == []


def test_an_image_that_cannot_be_decoded_is_named_by_its_number(inspector: Inspector, records: Records) -> None:
    with pytest.raises(DataError, match=r"^image 4: 12 bytes"):
        inspector.inspect([records[0]["image"]] * 4 + [b"not an image"])


def test_verdicts_follow_the_calibration_of_the_bundle(inspector: Inspector, records: Records) -> None:
    calibration = inspector.bundle.calibration
    for inspection in inspector.inspect([record["image"] for record in records]):
        assert inspection.anomalous == (inspection.score > calibration.image_threshold)
        assert inspection.p_value == float(calibration.compute_conformal_p_values(inspection.score))
        assert (inspection.width, inspection.height) == (64, 64)
        assert inspection.regions == find_regions(inspection.anomaly_map, calibration.pixel_threshold, 64, 64)
        assert set(inspection.to_dict()) == set(vars(inspection)) - {"anomaly_map", "trained_on"}


def test_an_oblong_image_has_its_regions_and_overlay_in_its_own_pixels(inspector: Inspector, records: Records) -> None:
    square = Image.fromarray(decode_batch([records[0]["image"]], 64)[0])
    oblong = np.asarray(square.resize((150, 70)))
    (inspection,) = inspector.inspect([encode_png(oblong)])
    assert (inspection.width, inspection.height, inspection.anomaly_map.shape) == (150, 70, (64, 64))
    (everywhere,) = find_regions(np.ones((64, 64), np.float32), 0.5, 150, 70)
    assert everywhere.to_dict() == {"x": 0, "y": 0, "width": 150, "height": 70, "area": 150 * 70, "peak": 1.0}
    assert draw_inspection_overlay(oblong, inspection).shape == (70, 150, 3)


def test_a_missing_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nothing: .*no manifest\.json"):
        Inspector.load(tmp_path / "nothing")


# Maps and regions


def test_regions_are_joined_through_corners_and_ordered_by_their_peaks() -> None:
    anomaly_map = np.zeros((12, 16), np.float32)
    anomaly_map[1, 2], anomaly_map[2, 3] = 3.0, 2.0  # touch at a corner
    anomaly_map[6:9, 8:13] = 1.5
    anomaly_map[7, 9] = 5.0
    anomaly_map[10, 0] = 1.0  # not above the threshold
    assert [region.to_dict() for region in find_regions(anomaly_map, 1.0, width=16, height=12)] == [
        {"x": 8, "y": 6, "width": 5, "height": 3, "area": 15, "peak": 5.0},
        {"x": 2, "y": 1, "width": 2, "height": 2, "area": 2, "peak": 3.0},
    ]


def test_a_region_is_in_pixels_of_the_original_image() -> None:
    anomaly_map = np.zeros((32, 32), np.float32)
    anomaly_map[8:16, 4:12] = 1.0  # rows 8..15 of 32 are 16..31 of 64, columns 4..11 are 16..47 of 128
    (region,) = find_regions(anomaly_map, 0.5, width=128, height=64)
    assert (region.x, region.y, region.width, region.height) == (16, 16, 32, 16)


def bilinear(values: NDArray[np.float32], height: int, width: int) -> NDArray[np.float64]:
    """Slow bilinear resizing from the definition: pixel centres are at half integers, and edge values continue outside."""
    out = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            y = min(max((row + 0.5) * values.shape[0] / height - 0.5, 0), values.shape[0] - 1)
            x = min(max((column + 0.5) * values.shape[1] / width - 0.5, 0), values.shape[1] - 1)
            top, start = int(y), int(x)
            below, end = min(top + 1, values.shape[0] - 1), min(start + 1, values.shape[1] - 1)
            upper = values[top, start] * (start + 1 - x) + values[top, end] * (x - start)
            lower = values[below, start] * (start + 1 - x) + values[below, end] * (x - start)
            out[row, column] = upper * (top + 1 - y) + lower * (y - top)
    return out


@pytest.mark.parametrize(("height", "width"), [(8, 8), (13, 21), (5, 3), (16, 8)])
def test_a_map_is_resized_bilinearly_about_pixel_centres(height: int, width: int) -> None:
    values = np.random.default_rng(0).random((8, 8), dtype=np.float32)
    np.testing.assert_allclose(resize_anomaly_map(values, height, width), bilinear(values, height, width), atol=1e-5)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 600))
def test_maps_are_compared_at_the_image_size_up_to_a_limit(height: int, width: int, limit: int) -> None:
    size = compute_evaluation_size(height, width, limit)
    longest = max(height, width)
    assert max(size) == min(longest, limit)
    for side, original in zip(size, (height, width), strict=True):
        assert side == original if longest <= limit else abs(side - original * limit / longest) <= 1


# Evaluation


def arrays_of(inspector: Inspector, records: Records, side: int) -> tuple[Any, ...]:
    """Returns labels, scores, maps and masks of records."""
    scores, maps = inspector.score(decode_batch([record["image"] for record in records], 64))
    masks = [
        np.zeros((side, side), bool) if record["mask"] is None else decode_mask(record["mask"], side, side)
        for record in records
    ]
    labels = np.array([record["label"] for record in records])
    return (
        labels,
        scores.astype(float),
        np.stack([resize_anomaly_map(anomaly_map, side, side) for anomaly_map in maps]),
        np.stack(masks),
    )


@pytest.mark.parametrize("side", [64, 48])
def test_an_evaluation_gives_the_metrics_of_its_arrays(inspector: Inspector, records: Records, side: int) -> None:
    result = inspector.evaluate(records, max_side_px=side)
    labels, scores, maps, masks = arrays_of(inspector, records, side)
    pixels, threshold = (masks.ravel(), maps.ravel()), inspector.bundle.calibration.image_threshold
    curve = PixelCurve.from_maps(masks, maps)
    # batches of another size round differently, which may swap the order of nearly equal pixels
    for key, expected, tolerance in (
        ("image_auroc", roc_auc_score(labels, scores), 1e-12),
        ("image_average_precision", average_precision_score(labels, scores), 1e-12),
        ("image_f1_max", metrics.f1_max(labels, scores), 1e-12),
        ("pixel_auroc", roc_auc_score(*pixels), 1e-4),
        ("pixel_average_precision", average_precision_score(*pixels), 1e-4),
        ("aupro_0.3", curve.aupro(0.3), 1e-3),
        ("aupro_0.05", curve.aupro(0.05), 1e-3),
        ("threshold", threshold, 0),
        ("false_positive_rate", float((scores[labels == 0] > threshold).mean()), 0),
        ("recall", float((scores[labels == 1] > threshold).mean()), 0),
    ):
        assert result[key] == pytest.approx(expected, abs=tolerance), key
    assert (result["num_normal"], result["num_anomalous"], result["num_masks"]) == (4, 4, 4)


def test_only_masks_are_said_to_be_compared_at_a_reduced_size(inspector: Inspector, records: Records) -> None:
    without_masks = [{**record, "mask": None} for record in records]
    assert inspector.evaluate(records, max_side_px=48)["reduced"]
    assert not inspector.evaluate(without_masks, max_side_px=48)["reduced"]


def test_each_defect_type_is_measured_against_all_good_images(inspector: Inspector, records: Records) -> None:
    types = inspector.evaluate(records, 64)["defect_types"]
    labels, scores, _, _ = arrays_of(inspector, records, 64)
    assert sorted(types) == ["broken_tooth", "contamination", "missing_hole", "scratch"]
    for kind, part in types.items():
        use = [not record["label"] or record["defect_type"] == kind for record in records]
        assert part["num_images"] == 1
        assert part["image_auroc"] == pytest.approx(roc_auc_score(labels[use], scores[use]))


def test_an_anomalous_image_without_a_mask_counts_only_in_image_metrics(inspector: Inspector, records: Records) -> None:
    at = next(number for number, record in enumerate(records) if record["label"])
    unmasked = [*records[:at], {**records[at], "mask": None}, *records[at + 1 :]]
    without = [*records[:at], *records[at + 1 :]]
    result, complete, remaining = (inspector.evaluate(images, 64) for images in (unmasked, records, without))
    assert (result["num_anomalous"], result["num_masks"]) == (4, 3)
    for key in ("image_auroc", "image_average_precision", "recall"):
        assert result[key] == complete[key]
    for key in ("pixel_auroc", "pixel_average_precision", "aupro_0.3"):
        assert result[key] == pytest.approx(remaining[key], abs=1e-3)
    assert result["defect_types"][records[at]["defect_type"]]["pixel_auroc"] is None


def test_good_images_alone_give_a_false_positive_rate_and_no_auroc(inspector: Inspector, records: Records) -> None:
    result = inspector.evaluate([record for record in records if not record["label"]], 64)
    assert result["false_positive_rate"] is not None
    assert [result[key] for key in ("image_auroc", "pixel_auroc", "recall")] == [None, None, None]
    assert result["defect_types"] == {}
    with pytest.raises(DataError, match="no test image"):
        inspector.evaluate([])


def test_the_verdict_at_the_threshold_itself_is_normal() -> None:
    masks: list[Any] = [None, None]
    empty = np.zeros((2, 2), np.float32)
    measured = metrics.ScoredTestImages(np.array([0, 1]), np.ones(2), masks, [empty, empty], threshold=1.0)
    result = compute_metrics(measured, ["good", "crack"], target_fpr=0.05)
    assert (result["false_positive_rate"], result["recall"]) == (0.0, 0.0)


def test_training_images_score_below_defective_ones(inspector: Inspector, records: Records, parts: str) -> None:

    rows = read_index(parts, "gear", split="train")["row"].to_numpy()
    train = inspector.inspect([record["image"] for record in read_rows(parts, "gear", rows, columns=("image",))])
    bad = inspector.inspect([record["image"] for record in records if record["label"]])
    assert np.mean([result.score for result in train]) < np.mean([result.score for result in bad])
