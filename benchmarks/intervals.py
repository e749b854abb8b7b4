"""Confidence intervals of benchmarks: bootstrap over test images, paired differences, and means over data sets.

Two kinds of uncertainty are kept apart. The bootstrap says how far a category's AUROC depends on its test images. The
standard error over data sets says how far a mean depends on the choice of the data sets.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from focus_ray.metrics.pixels import PixelBins

NUM_DRAWS = 2000
NUM_PIXEL_DRAWS = 500  # these are stored with every sample
NUM_THRESHOLDS = 1000  # of the curves of pixels


class Interval(NamedTuple):
    """A percentile interval."""

    low: float
    high: float


class DataSetMean(NamedTuple):
    """mean: over data sets, each with the same weight.  standard_error: of the mean, None for a single set."""

    mean: float
    standard_error: float | None
    num_sets: int


def bootstrap_image_auroc(
    labels: ArrayLike, scores: ArrayLike, num_draws: int = NUM_DRAWS, seed: int = 0
) -> NDArray[np.float64]:
    """Image AUROC of resampled test images; good and defective images are resampled apart, so that their numbers stay.

    The resampled images depend on the labels and the seed alone. So draws of two methods on the same test images are
    paired: the differences of the draws are a paired bootstrap.

    Args:
        labels: (N,), 0 normal or 1 anomalous.
        scores: (N,), or (R, N) for R repetitions on the same test images, for instance training seeds. The AUROC of a
            draw is then the mean over the repetitions.

    Returns:
        (num_draws,). All draws are 1 if every defective image scores higher than every good image: the bootstrap cannot
        show an uncertainty there.

    Raises:
        ValueError: the lengths differ, or there are no good images or no defective images.
    """
    labels_N, scores_RN = np.asarray(labels), np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if labels_N.shape != scores_RN.shape[1:]:
        raise ValueError(f"{labels_N.shape} labels and {scores_RN.shape[1:]} scores: expected as many of both")
    good_RG, bad_RB = scores_RN[:, labels_N == 0], scores_RN[:, labels_N == 1]
    num_good, num_bad = good_RG.shape[1], bad_RB.shape[1]
    if not num_good or not num_bad:
        raise ValueError(f"{num_good} good and {num_bad} defective test images: an AUROC needs both")
    # the share of repetitions in which a defective image scores higher than a good image; a tie counts half
    wins_BG = np.zeros((num_bad, num_good))
    for good_G, bad_B in zip(good_RG, bad_RB, strict=True):
        wins_BG += (bad_B[:, None] > good_G) + 0.5 * (bad_B[:, None] == good_G)
    wins_BG /= len(scores_RN)
    times_DN = draw_resample_counts(labels_N, num_draws, seed)
    wins_DG = times_DN[:, labels_N == 1] @ wins_BG
    found: NDArray[np.float64] = (wins_DG * times_DN[:, labels_N == 0]).sum(axis=1) / (num_good * num_bad)
    return found


def draw_resample_counts(labels_N: NDArray[Any], num_draws: int, seed: int) -> NDArray[np.int64]:
    """How often each image is in a draw, (num_draws, N); the number of images of each label stays."""
    rng = np.random.default_rng(seed)
    times_DN = np.zeros((num_draws, len(labels_N)), dtype=np.int64)
    for label in (0, 1):
        (places,) = np.nonzero(labels_N == label)
        if len(places):
            times_DN[:, places] = rng.multinomial(len(places), np.full(len(places), 1 / len(places)), size=num_draws)
    return times_DN


def bootstrap_pixel_metrics(
    labels: Sequence[int],
    masks: Sequence[NDArray[np.bool_] | None],
    maps: Sequence[NDArray[np.float32]],
    num_draws: int = NUM_PIXEL_DRAWS,
    fpr_limit: float = 0.3,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Pixel AUROC and AUPRO of resampled test images, paired between methods as `bootstrap_image_auroc`.

    Whole images are resampled, because the pixels of an image depend on each other. The curves have NUM_THRESHOLDS steps,
    which changes a figure by less than 0.001.

    Args:
        labels: N of 0 or 1.
        masks: N of (H, W), all False for a good image; None where a mask is missing: such an image is left out.
        maps: N anomaly maps, each of the size of its mask.

    Returns:
        'pixel_auroc' and 'aupro_<limit>' -> num_draws figures; nothing if no mask has an anomalous pixel.
    """
    places = [number for number, mask in enumerate(masks) if mask is not None]
    bins = [PixelBins.from_image(np.asarray(masks[number]), maps[number]) for number in places]
    total = PixelBins.merge(bins)
    if not total.anomalous.any() or not total.normal.any():
        return {}
    # as many thresholds at quantiles of the normal as of the anomalous pixels, so that both axes have fine steps
    shares = np.linspace(0, 1, NUM_THRESHOLDS // 2)
    curves = [np.cumsum(counts) / counts.sum() for counts in (total.normal, total.anomalous)]
    edges = np.unique(np.concatenate([total.keys[np.searchsorted(curve, shares - 1e-9)] for curve in curves]))
    normal_NK, anomalous_NK, overlap_NK = (np.zeros((len(bins), len(edges) + 1)) for _ in range(3))
    for number, part in enumerate(bins):
        column = np.searchsorted(edges, part.keys)
        np.add.at(normal_NK[number], column, part.normal)
        np.add.at(anomalous_NK[number], column, part.anomalous)
        np.add.at(overlap_NK[number], column, part.overlap)
    times_DN = draw_resample_counts(np.asarray(labels)[places], num_draws, seed).astype(np.float64)
    fpr, tpr, pro = (_compute_shares_above(times_DN @ counts_NK) for counts_NK in (normal_NK, anomalous_NK, overlap_NK))
    found: dict[str, list[float]] = {"pixel_auroc": [], f"aupro_{fpr_limit:g}": []}
    for x, y, overlap in zip(fpr, tpr, pro, strict=True):
        found["pixel_auroc"].append(float(np.trapezoid(y, x)))
        inside = np.append(x[x < fpr_limit], fpr_limit)
        area = np.trapezoid(np.interp(inside, x, overlap), inside)
        found[f"aupro_{fpr_limit:g}"].append(float(area) / fpr_limit)
    return found


def _compute_shares_above(counts_DK: NDArray[np.float64]) -> NDArray[np.float64]:
    """(D, K) counts in rising bins -> (D, K + 1), shares at or above each threshold, from the highest threshold, 0 to 1."""
    above = np.cumsum(counts_DK[:, ::-1], axis=1)
    return np.pad(above / above[:, -1:], ((0, 0), (1, 0)))


def compute_percentile_interval(draws: NDArray[np.float64], level: float = 0.95) -> Interval:
    """The interval that holds the middle `level` of the draws."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def group_categories_by_set(categories: Sequence[str], same_set: Sequence[Sequence[str]] = ()) -> dict[str, str]:
    """The data set of each category: a category is a set of its own, unless `same_set` joins it with others.

    Returns:
        category -> name of its set, which is the category itself or the joined names with a plus sign.

    Raises:
        ValueError: `same_set` lists a category twice, or a category that is not there.
    """
    listed = [category for group in same_set for category in group]
    unknown, twice = sorted(set(listed) - set(categories)), sorted({name for name in listed if listed.count(name) > 1})
    if unknown or twice:
        problem = f"unknown categories {unknown}" if unknown else f"categories listed twice {twice}"
        raise ValueError(f"same set: {problem}; the categories are {sorted(set(categories))}")
    sets = {category: category for category in categories}
    sets.update({category: "+".join(group) for group in same_set for category in group})
    return sets


def average_over_sets(values: Mapping[str, float], sets: Mapping[str, str]) -> DataSetMean:
    """Mean over data sets and its standard error; a set of several categories counts once, with its mean.

    For a difference of two methods, give the differences of each category.

    Args:
        values: a figure of each category.
        sets: as `group_categories_by_set` returns.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no category has this figure: there is no mean")
    names = dict.fromkeys(sets[category] for category in values)
    means = [statistics.mean(value for key, value in values.items() if sets[key] == name) for name in names]
    error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
    return DataSetMean(statistics.mean(means), error, len(means))


def format_interval(interval: Interval, sign: str = "") -> str:
    """Text such as [0.981, 0.997]. sign: '+' also shows the sign of positive numbers."""
    return f"[{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def format_mean(estimate: DataSetMean, sign: str = "") -> str:
    """Text such as 0.9836 +- 0.0121."""
    error: Any = estimate.standard_error
    return f"{estimate.mean:{sign}.4f}" + ("" if error is None else f" +- {error:.4f}")
