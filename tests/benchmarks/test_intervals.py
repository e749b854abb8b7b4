"""Bootstrap intervals of AUROC and means over data sets, against closed forms and simulated coverage."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from benchmarks.intervals import (
    average_over_sets,
    bootstrap_image_auroc,
    bootstrap_pixel_metrics,
    compute_percentile_interval,
    draw_resample_counts,
    format_interval,
    format_mean,
    group_categories_by_set,
)
from focus_ray.metrics.pixels import PixelCurve


def simulate_scores(
    rng: np.random.Generator, num_good: int, num_bad: int, shift: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Normal scores; the true AUROC is Phi(shift / sqrt(2))."""
    labels = np.repeat([0, 1], [num_good, num_bad])
    return labels, rng.normal(size=num_good + num_bad) + shift * labels


def delong_variance(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> float:
    """Variance of an AUROC (DeLong et al., Biometrics 1988), by a slow loop written from the definition."""
    good, bad = scores[labels == 0], scores[labels == 1]
    of_bad = [np.mean([(b > g) + 0.5 * (b == g) for g in good]) for b in bad]
    of_good = [np.mean([(b > g) + 0.5 * (b == g) for b in bad]) for g in good]
    return float(np.var(of_bad, ddof=1) / len(bad) + np.var(of_good, ddof=1) / len(good))


def test_bootstrap_has_the_mean_and_the_spread_of_delongs_formula() -> None:
    labels, scores = simulate_scores(np.random.default_rng(0), 60, 90, 1.5)
    draws = bootstrap_image_auroc(labels, scores, num_draws=20_000)
    assert draws.mean() == pytest.approx(roc_auc_score(labels, scores), abs=0.001)
    assert draws.std() == pytest.approx(math.sqrt(delong_variance(labels, scores)), rel=0.05)


def test_a_draw_is_the_auroc_of_resampled_images_with_ties() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    scores = np.array([1.0, 2.0, 2.0, 2.0, 3.0])
    expected = [
        roc_auc_score(np.repeat(labels, times), np.repeat(scores, times))
        for times in draw_resample_counts(labels, 20, 5)
    ]
    assert bootstrap_image_auroc(labels, scores, num_draws=20, seed=5) == pytest.approx(expected)


def test_the_interval_covers_the_true_auroc_as_often_as_its_level_says() -> None:
    rng = np.random.default_rng(1)
    true_auroc = 0.5 * (1 + math.erf(1.2 / 2))
    covered = 0
    for _ in range(400):
        low, high = compute_percentile_interval(
            bootstrap_image_auroc(*simulate_scores(rng, 50, 60, 1.2), num_draws=400)
        )
        covered += low <= true_auroc <= high
    assert 0.92 <= covered / 400 <= 0.97  # the standard error of the share is 0.011


def test_the_paired_interval_covers_the_true_difference_and_is_narrower_than_an_unpaired_one() -> None:
    rng = np.random.default_rng(2)
    covered, widths = 0, []
    for _ in range(200):
        labels, shared = simulate_scores(rng, 40, 40, 1.0)
        first, second = (shared + 0.3 * rng.normal(size=80) for _ in range(2))
        paired = bootstrap_image_auroc(labels, first, 400) - bootstrap_image_auroc(labels, second, 400)
        unpaired = bootstrap_image_auroc(labels, first, 400) - bootstrap_image_auroc(labels, second, 400, seed=1)
        low, high = compute_percentile_interval(paired)
        covered += low <= 0 <= high
        widths.append((high - low) / np.subtract(*compute_percentile_interval(unpaired)[::-1]))
    assert 0.91 <= covered / 200 <= 0.99
    assert np.mean(widths) < 0.7


def test_repetitions_on_the_same_images_are_averaged() -> None:
    rng = np.random.default_rng(3)
    labels, first = simulate_scores(rng, 20, 30, 1.0)
    second = first + rng.normal(size=50)
    both = bootstrap_image_auroc(labels, np.stack([first, second]), 100)
    assert both == pytest.approx(
        (bootstrap_image_auroc(labels, first, 100) + bootstrap_image_auroc(labels, second, 100)) / 2
    )


def test_a_pixel_draw_is_the_figure_of_resampled_images() -> None:
    rng = np.random.default_rng(4)
    labels = np.repeat([0, 1], [4, 5])
    masks = np.zeros((9, 32, 32), dtype=bool)
    masks[4:, 8:14, 8:20], masks[6:, 20:24, 2:5] = True, True
    maps = (rng.random((9, 32, 32)) + 0.6 * masks).astype(np.float32)
    draws = bootstrap_pixel_metrics(labels.tolist(), list(masks), list(maps), num_draws=10, seed=3)
    for number, times in enumerate(draw_resample_counts(labels, 10, 3)):
        chosen = np.repeat(np.arange(9), times)
        curve = PixelCurve.from_maps(masks[chosen], maps[chosen])
        assert draws["pixel_auroc"][number] == pytest.approx(curve.auroc(), abs=1e-3)
        assert draws["aupro_0.3"][number] == pytest.approx(curve.aupro(0.3), abs=1e-3)


def test_images_without_a_mask_are_left_out_of_pixel_draws() -> None:
    maps = [np.random.default_rng(0).random((8, 8)).astype(np.float32)] * 3
    good, bad = np.zeros((8, 8), dtype=bool), np.eye(8, dtype=bool)
    assert bootstrap_pixel_metrics([0, 1, 1], [good, bad, None], maps, 5) == bootstrap_pixel_metrics(
        [0, 1], [good, bad], maps[:2], 5
    )
    assert bootstrap_pixel_metrics([0, 1], [good, None], maps[:2]) == {}


def test_perfect_ranking_leaves_no_width() -> None:
    assert compute_percentile_interval(bootstrap_image_auroc([0, 0, 1], [1.0, 2.0, 3.0], 100)) == (1.0, 1.0)


@pytest.mark.parametrize(("labels", "scores"), [([0, 1], [1.0]), ([0, 0], [1.0, 2.0]), ([1, 1], [1.0, 2.0])])
def test_scores_without_both_classes_or_of_another_length_are_refused(labels: list[int], scores: list[float]) -> None:
    with pytest.raises(ValueError, match=f"{len(labels)}|0 good|0 defective"):
        bootstrap_image_auroc(labels, scores)


def test_categories_of_one_set_count_once() -> None:
    sets = group_categories_by_set(["a", "b1", "b2", "c"], [["b1", "b2"]])
    assert sets == {"a": "a", "b1": "b1+b2", "b2": "b1+b2", "c": "c"}
    estimate = average_over_sets({"a": 0.9, "b1": 0.6, "b2": 0.8, "c": 0.8}, sets)
    assert estimate == pytest.approx((0.8, 0.1 / math.sqrt(3), 3))  # sets: 0.9, 0.7, 0.8
    assert format_mean(estimate) == "0.8000 +- 0.0577"


def test_a_single_set_has_no_standard_error() -> None:
    estimate = average_over_sets({"a": 0.5}, {"a": "a"})
    assert estimate == (0.5, None, 1)
    assert format_mean(estimate, "+") == "+0.5000"


def test_a_category_that_is_not_there_or_is_listed_twice_is_named() -> None:
    with pytest.raises(ValueError, match="papr"):
        group_categories_by_set(["paper"], [["papr"]])
    with pytest.raises(ValueError, match="twice"):
        group_categories_by_set(["a", "b"], [["a", "b"], ["b"]])
    with pytest.raises(ValueError, match="no mean"):
        average_over_sets({}, {})


def test_intervals_are_shown_with_three_digits_and_a_sign_on_demand() -> None:
    interval = compute_percentile_interval(np.array([-0.01, 0.02]), level=1.0)
    assert format_interval(interval, "+") == "[-0.010, +0.020]"
