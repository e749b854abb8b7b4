"""Metrics agree with scikit-learn and with a slow AUPRO written from its definition; laws and edge cases."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import maximum_filter
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from focus_ray.errors import DataError
from focus_ray.metrics import metrics
from focus_ray.metrics.pixels import PixelBins, PixelCurve


def slow_regions(mask: np.ndarray) -> np.ndarray:
    """Numbers 8-connected regions: every pixel takes the largest number of its neighbours, until all have the same."""
    numbers = mask * np.arange(1, mask.size + 1).reshape(mask.shape)
    for _ in range(mask.size):
        numbers = mask * maximum_filter(numbers, 3)
    return numbers


def slow_aupro(masks: list[np.ndarray], maps: list[np.ndarray], fpr_limit: float) -> float:
    """Computes AUPRO from its definition: mean overlap and false positives at every distinct score."""
    regions = []
    for mask, scores in zip(masks, maps, strict=True):
        numbers = slow_regions(mask)
        regions += [scores[numbers == number] for number in np.unique(numbers[mask])]
    normal = np.concatenate([scores[~mask] for mask, scores in zip(masks, maps, strict=True)])
    curve = [(0.0, 0.0)]
    for threshold in sorted({float(value) for scores in maps for value in scores.ravel()}, reverse=True):
        overlap = np.mean([np.mean(region >= threshold) for region in regions])
        curve.append((float(np.mean(normal >= threshold)), float(overlap)))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 >= fpr_limit:
            break
        if x1 > fpr_limit:
            y1 = y0 + (y1 - y0) * (fpr_limit - x0) / (x1 - x0)
            x1 = fpr_limit
        area += (x1 - x0) * (y0 + y1) / 2
    return area / fpr_limit


def random_set(seed: int, levels: int | None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Makes masks and maps of six images of different sizes with regions of different sizes; few levels make many ties."""
    rng = np.random.default_rng(seed)
    masks, maps = [], []
    for index in range(6):
        height, width = rng.integers(5, 20, size=2)
        mask = np.zeros((height, width), dtype=bool)
        for _ in range(0 if index == 0 else rng.integers(1, 4)):
            top, left = rng.integers(0, height - 3), rng.integers(0, width - 3)
            mask[top : top + rng.integers(1, 5), left : left + rng.integers(1, 5)] = True
        scores = rng.normal(size=(height, width)) + 0.8 * mask
        masks.append(mask)
        maps.append(scores if levels is None else np.round(scores * levels / 4))
    return masks, maps


def pixel_metrics(masks: np.ndarray | list[np.ndarray], maps: np.ndarray | list[np.ndarray]) -> list[float]:
    curve = PixelCurve.from_maps(masks, maps)
    return [curve.auroc(), curve.average_precision(), curve.aupro(0.3), curve.aupro(0.05)]


@pytest.mark.parametrize("levels", [None, 12, 2])
@pytest.mark.parametrize("fpr_limit", [0.01, 0.05, 0.3, 1.0])
def test_aupro_agrees_with_its_definition(levels, fpr_limit):
    for seed in range(3):
        masks, maps = random_set(seed, levels)
        aupro = PixelCurve.from_maps(masks, maps).aupro(fpr_limit)
        assert aupro == pytest.approx(slow_aupro(masks, maps, fpr_limit), abs=1e-9)


@pytest.mark.parametrize("levels", [None, 12, 2])
def test_pixel_metrics_agree_with_scikit_learn(levels):
    for seed in range(5):
        masks, maps = random_set(seed, levels)
        truth, scores = (np.concatenate([image.ravel() for image in images]) for images in (masks, maps))
        expected = [roc_auc_score(truth, scores), average_precision_score(truth, scores)]
        assert pixel_metrics(masks, maps)[:2] == pytest.approx(expected, abs=1e-9)


def test_image_metrics_of_hand_counted_sets():
    # pairs (normal, anomalous): 1<2, 1<3, 3>2, 3=3 -> 2 wins and a half of 4
    assert metrics.image_auroc([0, 0, 1, 1], [1.0, 3.0, 2.0, 3.0]) == pytest.approx(2.5 / 4)
    # recall 1/2 at precision 1, then recall 1 at precision 2/3
    assert metrics.average_precision([1, 0, 1, 0], [4, 3, 2, 1]) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3)), max_size=30))
def test_f1_max_is_the_best_over_all_thresholds(rows):
    labels, scores = (np.array(column) for column in zip((0, 0), (1, 1), *rows, strict=True))
    expected = max(f1_score(labels, scores >= threshold, zero_division=0.0) for threshold in set(scores.tolist()))
    assert metrics.f1_max(labels, scores) == pytest.approx(expected)


MAPS = hnp.arrays(np.int64, (2, 6, 5), elements=st.integers(-20, 20))
MASKS = hnp.arrays(np.bool_, (2, 6, 5)).filter(lambda masks: masks.any() and not masks.all())


@given(MASKS, MAPS)
def test_pixel_metrics_depend_on_the_order_of_the_scores_alone(masks, maps):
    assert pixel_metrics(masks, np.exp(maps / 3.0) - 7.0) == pixel_metrics(masks, maps)
    assert all(0.0 <= value <= 1.0 for value in pixel_metrics(masks, maps))
    assert pixel_metrics(masks, maps + 100 * masks) == pytest.approx([1.0] * 4)
    assert pixel_metrics(masks, -maps)[0] == pytest.approx(1.0 - pixel_metrics(masks, maps)[0])


@given(hnp.arrays(np.int64, 12, elements=st.integers(-20, 20)))
def test_image_auroc_does_not_change_under_a_strictly_increasing_map_of_scores(scores):
    labels = np.arange(12) % 2
    assert metrics.image_auroc(labels, scores) == pytest.approx(metrics.image_auroc(labels, scores**3 + 2.0 * scores))


def square_mask(size: int, *areas: tuple[slice, slice]) -> np.ndarray:
    mask = np.zeros((1, size, size), dtype=bool)
    for area in areas:
        mask[(0, *area)] = True
    return mask


SQUARE, CORNER, PIXEL = (slice(0, 3), slice(0, 3)), (slice(3, 4), slice(3, 4)), (slice(7, 8), slice(7, 8))


@pytest.mark.parametrize(
    ("areas", "found", "expected"),
    [
        ([SQUARE], [], 0.5),  # a constant map has the diagonal as its curve
        ([SQUARE, PIXEL], [SQUARE], 0.5 + 0.5 * 0.5),  # a small region weighs as much as a large one
        ([SQUARE, CORNER], [SQUARE], 0.9 + 0.1 * 0.5),  # regions that touch at a corner are one region of ten pixels
    ],
)
def test_aupro_of_hand_counted_regions(areas, found, expected):
    curve = PixelCurve.from_maps(square_mask(9, *areas), square_mask(9, *found).astype(float))
    assert curve.aupro(1.0) == pytest.approx(expected)


def test_masks_of_0_and_255_count_like_boolean_masks_and_maps_are_not_modified():
    masks, maps = random_set(1, None)
    before = [scores.copy() for scores in maps]
    assert pixel_metrics([mask.astype(np.uint8) * 255 for mask in masks], maps) == pixel_metrics(masks, maps)
    assert all(np.array_equal(copy, scores) for copy, scores in zip(before, maps, strict=True))


@pytest.mark.parametrize("metric", [metrics.image_auroc, metrics.average_precision, metrics.f1_max])
@pytest.mark.parametrize(
    ("labels", "scores", "named"),
    [
        ([0, 0, 0], [1, 2, 3], r"\[0\]"),
        ([1, 1], [1, 2], r"\[1\]"),
        ([0, 2], [1.0, 2.0], r"\[0, 2\]"),
        ([0, 1], [1.0, np.nan], "nan"),
        ([0, 1], [np.inf, 1.0], "inf"),
        ([0, 1, 1], [1.0, 2.0], r"\(3,\)"),
    ],
)
def test_image_metrics_refuse_bad_input(metric, labels, scores, named):
    with pytest.raises(DataError, match=named):
        metric(labels, scores)


def curve_of(mask: np.ndarray, scores: np.ndarray) -> PixelCurve | None:
    return PixelCurve.from_maps([mask], [scores])


def curve_of_bins(mask: np.ndarray, scores: np.ndarray) -> PixelCurve | None:
    return PixelBins.from_image(mask, scores).compute_curve()


@pytest.mark.parametrize("curve", [curve_of, curve_of_bins])
@pytest.mark.parametrize(
    ("mask", "scores", "named"),
    [
        (np.eye(4) > 0, np.zeros((3, 4)), r"mask \(4, 4\) and map \(3, 4\)"),
        (np.eye(4) > 0, np.full((4, 4), np.nan), "NaN"),
    ],
)
def test_pixels_of_another_size_or_without_a_number_are_refused(curve, mask, scores, named):
    with pytest.raises(DataError, match=named):
        curve(mask, scores)


@pytest.mark.parametrize("curve", [curve_of, curve_of_bins])
def test_pixel_curves_need_pixels_of_both_classes(curve):
    assert curve(np.zeros((4, 4), bool), np.ones((4, 4))) is None
    with pytest.raises(DataError, match="no normal pixel"):
        curve(np.ones((4, 4), bool), np.ones((4, 4)))
