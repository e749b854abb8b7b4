"""Metrics agree with scikit-learn and with a slow AUPRO written from its definition; laws and edge cases."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from focus_ray.errors import DataError
from focus_ray.metrics import metrics
from focus_ray.metrics.pixels import PixelCurve


def slow_regions(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Finds 8-connected regions by flood fill."""
    unvisited = set(zip(*np.nonzero(mask), strict=True))
    regions = []
    while unvisited:
        queue, region = deque([unvisited.pop()]), []
        while queue:
            i, j = queue.popleft()
            region.append((i, j))
            for neighbour in [(i + di, j + dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)]:
                if neighbour in unvisited:
                    unvisited.remove(neighbour)
                    queue.append(neighbour)
        regions.append(region)
    return regions


def slow_aupro(masks: list[np.ndarray], maps: list[np.ndarray], fpr_limit: float) -> float:
    """Computes AUPRO from its definition: mean overlap and false positives at every distinct score."""
    regions = [
        np.array([scores[i, j] for i, j in region])
        for mask, scores in zip(masks, maps, strict=True)
        for region in slow_regions(mask)
    ]
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


def curve_of(masks: list[np.ndarray] | np.ndarray, maps: list[np.ndarray] | np.ndarray) -> PixelCurve:
    return PixelCurve.of(masks, maps, regions=True)


def pixel_metrics(masks: np.ndarray, maps: np.ndarray) -> list[float]:
    curve = curve_of(masks, maps)
    return [curve.auroc(), curve.average_precision(), curve.aupro(0.3), curve.aupro(0.05)]


def flatten(masks: list[np.ndarray], maps: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([m.ravel() for m in masks]), np.concatenate([m.ravel() for m in maps])


@pytest.mark.parametrize("levels", [None, 12, 2])
@pytest.mark.parametrize("fpr_limit", [0.01, 0.05, 0.3, 1.0])
def test_aupro_agrees_with_its_definition(levels, fpr_limit):
    for seed in range(3):
        masks, maps = random_set(seed, levels)
        assert curve_of(masks, maps).aupro(fpr_limit) == pytest.approx(slow_aupro(masks, maps, fpr_limit), abs=1e-9)


@pytest.mark.parametrize("levels", [None, 12, 2])
def test_pixel_metrics_agree_with_scikit_learn(levels):
    for seed in range(5):
        masks, maps = random_set(seed, levels)
        truth, scores = flatten(masks, maps)
        curve = curve_of(masks, maps)
        assert curve.auroc() == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
        assert curve.average_precision() == pytest.approx(average_precision_score(truth, scores), abs=1e-9)


def test_image_auroc_of_a_hand_counted_set():
    # pairs (normal, anomalous): 1<2, 1<3, 3>2, 3=3 -> 2 wins and a half of 4
    assert metrics.image_auroc([0, 0, 1, 1], [1.0, 3.0, 2.0, 3.0]) == pytest.approx(2.5 / 4)


def test_image_average_precision_of_a_hand_counted_set():
    # recall 1/2 at precision 1, then recall 1 at precision 2/3
    assert metrics.average_precision([1, 0, 1, 0], [4, 3, 2, 1]) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3)), min_size=2, max_size=30).filter(
        lambda rows: len({label for label, _ in rows}) == 2
    )
)
def test_f1_max_is_the_best_over_all_thresholds_and_its_threshold_gives_it(rows):
    labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    best, threshold = metrics.f1_max(labels, scores)
    assert best == pytest.approx(max(f1_score(labels, scores >= t, zero_division=0.0) for t in set(scores.tolist())))
    assert f1_score(labels, scores >= threshold, zero_division=0.0) == pytest.approx(best)


MAPS = hnp.arrays(np.int64, (2, 6, 5), elements=st.integers(-20, 20))
MASKS = hnp.arrays(np.bool_, (2, 6, 5)).filter(lambda masks: masks.any() and not masks.all())


@given(MASKS, MAPS)
def test_pixel_metrics_do_not_change_under_a_strictly_increasing_map_of_scores(masks, maps):
    assert pixel_metrics(masks, np.exp(maps / 3.0) - 7.0) == pixel_metrics(masks, maps)


@given(MASKS, MAPS)
def test_pixel_metrics_lie_in_the_unit_interval_and_perfect_maps_reach_one(masks, maps):
    assert all(0.0 <= value <= 1.0 for value in pixel_metrics(masks, maps))
    assert pixel_metrics(masks, maps + 100 * masks) == pytest.approx([1.0] * 4)


@given(MASKS, MAPS)
def test_reversed_scores_reverse_the_pixel_auroc(masks, maps):
    assert curve_of(masks, -maps).auroc() == pytest.approx(1.0 - curve_of(masks, maps).auroc())


@given(hnp.arrays(np.int64, 12, elements=st.integers(-20, 20)))
def test_image_auroc_does_not_change_under_a_strictly_increasing_map_of_scores(scores):
    labels = np.arange(12) % 2
    assert metrics.image_auroc(labels, scores) == pytest.approx(metrics.image_auroc(labels, scores**3 + 2.0 * scores))


def test_a_constant_map_has_auroc_one_half_and_the_diagonal_as_its_pro_curve():
    masks = np.zeros((1, 8, 8), dtype=bool)
    masks[0, 2:4, 2:4] = True
    curve = curve_of(masks, np.ones((1, 8, 8)))
    assert curve.auroc() == pytest.approx(0.5)
    assert curve.aupro(0.3) == pytest.approx(0.15)
    assert curve.aupro(1.0) == pytest.approx(0.5)


def test_aupro_weighs_a_small_region_like_a_large_one():
    masks = np.zeros((1, 20, 20), dtype=bool)
    masks[0, :10, :10] = True
    masks[0, 15, 15] = True
    maps = np.zeros((1, 20, 20))
    maps[0, :10, :10] = 1.0  # detects the large region, but not the single pixel
    assert curve_of(masks, maps).aupro(0.3) == pytest.approx(0.5 + 0.5 * 0.15)


def test_regions_that_touch_at_a_corner_are_one_region():
    masks = np.zeros((1, 9, 9), dtype=bool)
    masks[0, 0:3, 0:3] = True
    masks[0, 3, 3] = True
    maps = np.zeros((1, 9, 9))
    maps[0, 0:3, 0:3] = 1.0  # nine of the ten pixels of one region
    assert curve_of(masks, maps).aupro(1.0) == pytest.approx(0.9 + 0.1 * 0.5)


def test_masks_of_0_and_255_count_like_boolean_masks():
    masks, maps = random_set(1, None)
    grey = [mask.astype(np.uint8) * 255 for mask in masks]
    assert pixel_metrics(grey, maps) == pixel_metrics(masks, maps)


def test_maps_are_not_modified():
    masks, maps = random_set(2, None)
    before = [scores.copy() for scores in maps]
    pixel_metrics(masks, maps)
    assert all(np.array_equal(copy, scores) for copy, scores in zip(before, maps, strict=True))


@pytest.mark.parametrize("metric", [metrics.image_auroc, metrics.average_precision, metrics.f1_max])
def test_image_metrics_refuse_bad_input(metric):
    with pytest.raises(DataError, match="all 3 images are normal"):
        metric([0, 0, 0], [1, 2, 3])
    with pytest.raises(DataError, match="all 2 images are anomalous"):
        metric([1, 1], [1, 2])
    with pytest.raises(DataError, match=r"scores\[1\] is nan"):
        metric([0, 1], [1.0, np.nan])
    with pytest.raises(DataError, match=r"scores\[0\] is inf"):
        metric([0, 1], [np.inf, 1.0])
    with pytest.raises(DataError, match=r"labels \(3,\) and scores \(2,\)"):
        metric([0, 1, 1], [1.0, 2.0])
    with pytest.raises(DataError, match=r"labels hold \[0, 2\]"):
        metric([0, 2], [1.0, 2.0])
    with pytest.raises(DataError, match=r"\(0,\)"):
        metric([], [])


@pytest.mark.parametrize("regions", [False, True])
def test_pixel_curves_refuse_bad_input(regions):
    def metric(masks, maps):
        return PixelCurve.of(masks, maps, regions)

    mask, scores = np.eye(4, dtype=bool), np.zeros((4, 4))
    with pytest.raises(DataError, match="2 masks for 1 maps"):
        metric([mask, mask], [scores])
    with pytest.raises(DataError, match=r"image 0: mask \(4, 4\) and map \(3, 4\)"):
        metric([mask], [scores[:3]])
    with pytest.raises(DataError, match="image 1: the map has NaN"):
        metric([mask, mask], [scores, scores + np.nan])
    with pytest.raises(DataError, match="float64"):
        metric([mask * 0.5], [scores])
    with pytest.raises(DataError, match="no anomalous pixel"):
        metric([mask & False], [scores])
    with pytest.raises(DataError, match="no normal pixel"):
        metric([mask | True], [scores])
