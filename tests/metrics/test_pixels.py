"""Bins of pixels add up over any split, and the error of every metric is within its bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from focus_ray.errors import DataError
from focus_ray.metrics.evaluate import EvaluationCollector, compute_metrics
from focus_ray.metrics.metrics import ScoredTestImages
from focus_ray.metrics.pixels import PixelBins, compute_bin_numbers
from focus_ray.metrics.registry import METRICS
from focus_ray.reporting.tables import format_error_bound

METRIC_KEYS_OF_PIXELS = ("pixel_auroc", "pixel_average_precision", "aupro_0.3", "aupro_0.05")
SHAPE = (4, 6, 5)
MASKS = hnp.arrays(np.bool_, SHAPE, elements=st.sampled_from([False, False, True]))
MAPS = st.one_of(
    hnp.arrays(np.float32, SHAPE, elements=st.floats(0, 50, width=32)),
    # many different scores in one bin, with ties
    hnp.arrays(np.float32, SHAPE, elements=st.integers(0, 40).map(lambda step: float(np.float32(1 + 2e-5 * step)))),
    hnp.arrays(np.float32, SHAPE, elements=st.integers(-3, 3).map(float)),
)
INSIDE = hnp.arrays(np.bool_, SHAPE, elements=st.sampled_from([True, True, False]))


def bins_of(masks: np.ndarray, maps: np.ndarray, inside: np.ndarray) -> PixelBins:
    return PixelBins.merge(PixelBins.from_image(*image) for image in zip(masks, maps, inside, strict=True))


def scored_images(masks: np.ndarray, maps: np.ndarray, inside: np.ndarray, exact_pixels: int) -> ScoredTestImages:
    """Collects images of two defect types. An image is anomalous if its mask has a pixel."""
    collector = EvaluationCollector(exact_pixels)
    for number, (mask, scores, counted_pixels) in enumerate(zip(masks, maps, inside, strict=True)):
        collector.add(int(mask.any()), f"kind {number % 2}", float(scores.max()), scores, mask, counted_pixels)
    return collector.select_unseen_images(1.0).measured


@given(MASKS, MAPS, INSIDE, st.integers(0, 4))
def test_bins_add_over_any_split(masks: np.ndarray, maps: np.ndarray, inside: np.ndarray, cut: int) -> None:
    whole = bins_of(masks, maps, inside)
    parts = bins_of(masks[cut:], maps[cut:], inside[cut:]) + bins_of(masks[:cut], maps[:cut], inside[:cut])
    for name in ("keys", "normal", "anomalous", "num_regions", "num_images"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    np.testing.assert_allclose(parts.overlap, whole.overlap, rtol=1e-12)
    assert whole.normal.sum() + whole.anomalous.sum() == inside.sum()
    assert whole.overlap.sum() == pytest.approx(whole.num_regions)


@given(MASKS, MAPS, INSIDE)
def test_the_error_of_every_metric_is_within_its_bound(masks: np.ndarray, maps: np.ndarray, inside: np.ndarray) -> None:
    exact, binned = (scored_images(masks, maps, inside, pixels) for pixels in (maps.size, 0))
    types = ["kind 0", "kind 1"] * 2
    exact_metrics, binned_metrics = compute_metrics(exact, types, 0.05), compute_metrics(binned, types, 0.05)
    assert (exact_metrics["binned"], binned_metrics["binned"]) == (False, True)
    exact_by_type = exact_metrics["defect_types"]
    by_type = [(exact_by_type[kind], values) for kind, values in binned_metrics["defect_types"].items()]
    for exact_values, binned_values in ((exact_metrics, binned_metrics), *by_type):
        for key in METRIC_KEYS_OF_PIXELS:
            assert (exact_values[key] is None) == (binned_values[key] is None)
            if exact_values[key] is not None:
                assert abs(exact_values[key] - binned_values[key]) <= binned_values["bounds"][key] + 1e-9
    for key in set(exact_metrics) - {"binned", "bounds", "defect_types", *METRIC_KEYS_OF_PIXELS}:
        assert exact_metrics[key] == binned_metrics[key]


@given(hnp.arrays(np.float32, 40, elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_a_higher_score_never_has_a_lower_bin(scores: np.ndarray) -> None:
    rising = np.sort(scores)
    assert (np.diff(compute_bin_numbers(rising).astype(np.int64)) >= 0).all()
    assert compute_bin_numbers(np.float32([-0.0])) == compute_bin_numbers(np.float32([0.0]))


def test_a_bin_is_less_than_an_8000th_of_its_score_wide() -> None:
    for score in (1e-3, 1.0, 1.999, 37.0):
        assert compute_bin_numbers(np.float32([score])) != compute_bin_numbers(np.float32([score * (1 + 1 / 8000)]))


def blurred_set(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes twelve images whose scores are a little higher inside rectangles."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((12, 96, 96), bool)
    for mask in masks[4:]:
        top, left = rng.integers(0, 70, 2)
        mask[top : top + rng.integers(4, 25), left : left + rng.integers(4, 25)] = True
    maps = np.exp(rng.normal(0.6 * masks, 0.4)).astype(np.float32)
    return masks, maps, np.ones_like(masks)


def test_binning_changes_metrics_of_realistic_maps_by_less_than_a_ten_thousandth() -> None:
    masks, maps, inside = blurred_set(0)
    exact, binned = (scored_images(masks, maps, inside, pixels) for pixels in (maps.size, 0))
    for key in METRIC_KEYS_OF_PIXELS:
        exact_value, binned_value = METRICS[key].value(exact), METRICS[key].value(binned)
        bound = METRICS[key].bound(binned)  # type: ignore[misc]
        print(f"{key}: {exact_value:.6f}, binned {binned_value:.6f}, bound {bound:.1e}")
        assert abs(exact_value - binned_value) < 1e-4  # type: ignore[operator]


@pytest.mark.parametrize("limit", [5, 40])
def test_a_set_that_exceeds_the_pixel_limit_equals_a_set_that_was_binned_from_the_start(limit: int) -> None:
    masks, maps, inside = (np.repeat(images, 5, axis=0) for images in blurred_set(1))
    exceeding, binned = (scored_images(masks, maps, inside, pixels) for pixels in (limit * maps[0].size, 0))
    assert [METRICS[key].value(exceeding) for key in METRICS] == [METRICS[key].value(binned) for key in METRICS]


@pytest.mark.parametrize("exact_pixels", [0, 10**9])
def test_images_of_the_training_set_and_images_without_a_mask_count_in_no_pixel_metric(exact_pixels: int) -> None:
    masks, maps, _ = blurred_set(2)
    collector = EvaluationCollector(exact_pixels)
    for number, mask in enumerate(masks):
        known_mask = None if number == 6 else mask
        collector.add(int(mask.any()), "cut", float(number), maps[number], known_mask, None, trained_on=number < 2)
    labelled = collector.select_unseen_images(1.0)
    others = [2, 3, 4, 5, 7, 8, 9, 10, 11]
    expected = scored_images(masks[others], maps[others], np.ones_like(masks[others]), exact_pixels)
    assert (labelled.numbers.tolist(), labelled.num_trained_on) == (list(range(2, 12)), 2)
    assert labelled.measured.scores.tolist() == list(range(2, 12))
    assert METRICS["aupro_0.3"].value(labelled.measured) == pytest.approx(METRICS["aupro_0.3"].value(expected))


def test_access_to_maps_of_a_binned_set_is_refused() -> None:
    binned = scored_images(*blurred_set(3), 0)
    for access in (lambda: len(binned.maps), lambda: binned.masks[0]):
        with pytest.raises(DataError, match="--exact-megapixels"):
            access()


@given(st.floats(1e-12, 1.0))
def test_a_bound_is_shown_rounded_up_to_one_digit(bound: float) -> None:
    shown = float(format_error_bound(bound).removeprefix("±"))
    assert bound * (1 - 1e-6) <= shown <= 2.001 * bound
    assert format_error_bound(0.0) == "±0"
