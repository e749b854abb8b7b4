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
from small_set import ingest_parts, make_bundle, small_config

from focus_ray.bundle.inspector import Inspector
from focus_ray.data.images import decode_batch, decode_mask, encode_png
from focus_ray.data.read import iter_test_records, read_index, read_rows
from focus_ray.detect.inspection import find_regions, resize_map
from focus_ray.errors import BundleError, DataError
from focus_ray.evaluation.report import overlay
from focus_ray.metrics import metrics
from focus_ray.metrics.evaluate import compute_metrics, evaluation_size
from focus_ray.metrics.pixels import PixelCurve


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def bundle(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    model = {"image_alignment": {"min_drop": 0.0}}
    return make_bundle(small_config(data, tmp_path_factory.mktemp("runs"), model=model))


@pytest.fixture(scope="module")
def inspector(bundle: str) -> Inspector:
    return Inspector.load(bundle, "cpu", batch_size=3)


@pytest.fixture(scope="module")
def records(data: str) -> list[dict[str, Any]]:
    """The labelled test images: 4 good, 4 with a defect and its mask."""
    return list(iter_test_records(data, "gear"))


# Scores


def test_a_batch_scores_as_its_single_images(inspector: Inspector, records: list[dict[str, Any]]) -> None:
    batch = decode_batch([record["image"] for record in records], 64)
    scores, maps = inspector.score(batch)
    for number in range(len(batch)):
        score, anomaly_map = inspector.score(batch[number : number + 1])
        assert scores[number] == pytest.approx(score[0], rel=1e-4)
        np.testing.assert_allclose(maps[number], anomaly_map[0], rtol=1e-4, atol=1e-4 * float(maps.max()))


def test_a_stream_of_images_scores_as_a_single_batch(inspector: Inspector, records: list[dict[str, Any]]) -> None:
    images = [record["image"] for record in records]
    batches = list(inspector.score_batches(iter(images)))
    assert [len(scores) for scores, _ in batches] == [3, 3, 2]
    whole, maps = inspector.score(decode_batch(images, 64))
    np.testing.assert_allclose(np.concatenate([scores for scores, _ in batches]), whole, rtol=1e-4)
    np.testing.assert_allclose(np.concatenate([part for _, part in batches]), maps, atol=1e-4 * float(maps.max()))


def test_no_images_give_no_scores(inspector: Inspector) -> None:
    assert list(inspector.score_batches([])) == []
    assert inspector.inspect([]) == []


def test_an_image_that_cannot_be_decoded_is_named_by_its_number(
    inspector: Inspector, records: list[dict[str, Any]]
) -> None:
    images = [records[0]["image"]] * 4 + [b"not an image"]
    with pytest.raises(DataError, match=r"^image 4: 12 bytes that start with"):
        list(inspector.score_batches(images))


def test_verdicts_follow_the_calibration_of_the_bundle(inspector: Inspector, records: list[dict[str, Any]]) -> None:
    calibration = inspector.bundle.calibration
    for inspection in inspector.inspect([record["image"] for record in records]):
        assert inspection.anomalous == (inspection.score > calibration.image_threshold)
        assert inspection.p_value == float(calibration.conformal_p_value(inspection.score))
        assert (inspection.width, inspection.height) == (64, 64)
        assert inspection.regions == find_regions(inspection.anomaly_map, calibration.pixel_threshold, 64, 64)
        keys = set(vars(inspection)) - {"anomaly_map"}
        assert set(inspection.to_dict()) == (keys if inspection.trained_on else keys - {"trained_on"})


def test_an_oblong_image_has_its_regions_and_overlay_in_its_own_pixels(
    inspector: Inspector, records: list[dict[str, Any]]
) -> None:
    square = Image.fromarray(decode_batch([records[0]["image"]], 64)[0])
    oblong = np.asarray(square.resize((150, 70)))
    (inspection,) = inspector.inspect([encode_png(oblong)])
    assert (inspection.width, inspection.height, inspection.anomaly_map.shape) == (150, 70, (64, 64))
    everywhere = find_regions(np.ones((64, 64), np.float32), 0.5, 150, 70)
    assert [(r.x, r.y, r.width, r.height, r.area) for r in everywhere] == [(0, 0, 150, 70, 150 * 70)]
    assert overlay(oblong, inspection).shape == (70, 150, 3)


# Maps and regions


def test_regions_are_joined_through_corners_and_ordered_by_their_peaks() -> None:
    anomaly_map = np.zeros((12, 16), np.float32)
    anomaly_map[1, 2], anomaly_map[2, 3] = 3.0, 2.0  # touch at a corner
    anomaly_map[6:9, 8:13] = 1.5
    anomaly_map[7, 9] = 5.0
    anomaly_map[10, 0] = 1.0  # not above the threshold
    found = find_regions(anomaly_map, 1.0, width=16, height=12)
    assert [region.to_dict() for region in found] == [
        {"x": 8, "y": 6, "width": 5, "height": 3, "area": 15, "peak": 5.0},
        {"x": 2, "y": 1, "width": 2, "height": 2, "area": 2, "peak": 3.0},
    ]


def test_a_map_without_a_value_above_the_threshold_has_no_region() -> None:
    assert find_regions(np.ones((8, 8), np.float32), 1.0, 8, 8) == ()


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
            top, left_column = int(y), int(x)
            below, right_column = min(top + 1, values.shape[0] - 1), min(left_column + 1, values.shape[1] - 1)
            upper = values[top, left_column] * (left_column + 1 - x) + values[top, right_column] * (x - left_column)
            lower = values[below, left_column] * (left_column + 1 - x) + values[below, right_column] * (x - left_column)
            out[row, column] = upper * (top + 1 - y) + lower * (y - top)
    return out


@pytest.mark.parametrize(("height", "width"), [(8, 8), (13, 21), (5, 3), (16, 8)])
def test_a_map_is_resized_bilinearly_about_pixel_centres(height: int, width: int) -> None:
    values = np.random.default_rng(0).random((8, 8), dtype=np.float32)
    np.testing.assert_allclose(resize_map(values, height, width), bilinear(values, height, width), atol=1e-5)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 600))
def test_maps_are_compared_at_the_image_size_up_to_a_limit(height: int, width: int, limit: int) -> None:
    size = evaluation_size(height, width, limit)
    if max(height, width) <= limit:
        assert size == (height, width)
    else:
        assert max(size) == limit
        assert abs(size[0] - height * limit / max(height, width)) <= 1
        assert abs(size[1] - width * limit / max(height, width)) <= 1


# Evaluation


def arrays_of(
    inspector: Inspector, records: list[dict[str, Any]], side: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], list[NDArray[np.float32]], list[NDArray[np.bool_]]]:
    labels = np.array([record["label"] for record in records])
    scores, maps = inspector.score(decode_batch([record["image"] for record in records], 64))
    resized = [resize_map(anomaly_map, side, side) for anomaly_map in maps]
    masks = [
        np.zeros((side, side), bool) if record["mask"] is None else decode_mask(record["mask"], side, side)
        for record in records
    ]
    return labels, scores.astype(float), resized, masks


@pytest.mark.parametrize("side", [64, 48])
def test_an_evaluation_gives_the_metrics_of_its_arrays(
    inspector: Inspector, records: list[dict[str, Any]], side: int
) -> None:
    result = inspector.evaluate(records, max_side_px=side)
    labels, scores, maps, masks = arrays_of(inspector, records, side)
    assert (result["num_normal"], result["num_anomalous"], result["num_masks"]) == (4, 4, 4)
    assert result["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert result["image_average_precision"] == pytest.approx(average_precision_score(labels, scores))
    assert result["image_f1_max"] == pytest.approx(metrics.f1_max(labels, scores))
    flat_masks, flat_maps = np.stack(masks).ravel(), np.stack(maps).ravel()
    # batches of another size round differently, which may swap the order of nearly equal pixels
    assert result["pixel_auroc"] == pytest.approx(roc_auc_score(flat_masks, flat_maps), abs=1e-4)
    assert result["pixel_average_precision"] == pytest.approx(average_precision_score(flat_masks, flat_maps), abs=1e-4)
    curve = PixelCurve.of(masks, maps)
    assert result["aupro_0.3"] == pytest.approx(curve.aupro(0.3), abs=1e-3)
    assert result["aupro_0.05"] == pytest.approx(curve.aupro(0.05), abs=1e-3)
    threshold = inspector.bundle.calibration.image_threshold
    assert result["threshold"] == threshold
    assert result["false_positive_rate"] == float((scores[labels == 0] > threshold).mean())
    assert result["recall"] == float((scores[labels == 1] > threshold).mean())


def test_each_defect_type_is_measured_against_all_good_images(
    inspector: Inspector, records: list[dict[str, Any]]
) -> None:
    types = inspector.evaluate(records, 64)["defect_types"]
    labels, scores, _, _ = arrays_of(inspector, records, 64)
    assert sorted(types) == ["broken_tooth", "contamination", "missing_hole", "scratch"]
    for kind, part in types.items():
        use = [not record["label"] or record["defect_type"] == kind for record in records]
        assert part["num_images"] == 1
        assert part["image_auroc"] == pytest.approx(roc_auc_score(labels[use], scores[use]))


def test_an_anomalous_image_without_a_mask_counts_only_in_image_metrics(
    inspector: Inspector, records: list[dict[str, Any]]
) -> None:
    at = next(number for number, record in enumerate(records) if record["label"])
    unmasked = [{**record, "mask": None} if number == at else record for number, record in enumerate(records)]
    result, complete = inspector.evaluate(unmasked, 64), inspector.evaluate(records, 64)
    remaining_result = inspector.evaluate(records[:at] + records[at + 1 :], 64)
    assert (result["num_anomalous"], result["num_masks"]) == (4, 3)
    for key in ("image_auroc", "image_average_precision", "recall"):
        assert result[key] == complete[key]
    for key in ("pixel_auroc", "pixel_average_precision", "aupro_0.3"):
        assert result[key] == pytest.approx(remaining_result[key], abs=1e-3)
    assert result["defect_types"][records[at]["defect_type"]]["pixel_auroc"] is None


def test_good_images_alone_give_a_false_positive_rate_and_no_auroc(
    inspector: Inspector, records: list[dict[str, Any]]
) -> None:
    result = inspector.evaluate([record for record in records if not record["label"]], 64)
    assert result["false_positive_rate"] is not None
    assert [result[key] for key in ("image_auroc", "pixel_auroc", "recall")] == [None, None, None]
    assert result["defect_types"] == {}


def test_a_set_without_test_images_is_refused(inspector: Inspector) -> None:
    with pytest.raises(DataError, match="no test image"):
        inspector.evaluate([])


def test_the_verdict_at_the_threshold_itself_is_normal() -> None:
    masks: list[Any] = [None, None]
    empty = np.zeros((2, 2), np.float32)
    measured = metrics.MeasuredImages(np.array([0, 1]), np.ones(2), masks, [empty, empty], threshold=1.0)
    result = compute_metrics(measured, ["good", "crack"], target_fpr=0.05)
    assert (result["false_positive_rate"], result["recall"]) == (0.0, 0.0)


def test_training_images_score_below_defective_ones(inspector: Inspector, data: str) -> None:
    index = read_index(data, "gear")
    rows = index["row"].to_numpy()
    anomalous = index["label"].to_numpy() == 1
    train = np.array(index["split"].to_pylist()) == "train"

    def mean_score(chosen: NDArray[np.bool_]) -> float:
        images = [record["image"] for record in read_rows(data, "gear", rows[chosen], columns=("image",))]
        return float(inspector.score(decode_batch(images, 64))[0].mean())

    assert mean_score(train) < mean_score(anomalous)


def test_a_missing_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nothing: .*no manifest\.json"):
        Inspector.load(tmp_path / "nothing")
