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

NUM_DRAWS = 2000


class Interval(NamedTuple):
    """A percentile interval."""

    low: float
    high: float


class MeanOverSets(NamedTuple):
    """mean: over data sets, each with the same weight.  standard_error: of the mean, None for a single set."""

    mean: float
    standard_error: float | None
    num_sets: int


def bootstrap_auroc(
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
    rng = np.random.default_rng(seed)
    times_good = rng.multinomial(num_good, np.full(num_good, 1 / num_good), size=num_draws)
    times_bad = rng.multinomial(num_bad, np.full(num_bad, 1 / num_bad), size=num_draws)
    found: NDArray[np.float64] = ((times_bad @ wins_BG) * times_good).sum(axis=1) / (num_good * num_bad)
    return found


def percentile_interval(draws: NDArray[np.float64], level: float = 0.95) -> Interval:
    """The interval that holds the middle `level` of the draws."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def group_sets(categories: Sequence[str], same_set: Sequence[Sequence[str]] = ()) -> dict[str, str]:
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


def mean_over_sets(values: Mapping[str, float], sets: Mapping[str, str]) -> MeanOverSets:
    """Mean over data sets and its standard error; a set of several categories counts once, with its mean.

    For a difference of two methods, give the differences of each category.

    Args:
        values: a figure of each category.
        sets: as `group_sets` returns.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no category has this figure: there is no mean")
    names = dict.fromkeys(sets[category] for category in values)
    means = [statistics.mean(value for key, value in values.items() if sets[key] == name) for name in names]
    error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
    return MeanOverSets(statistics.mean(means), error, len(means))


def show_interval(interval: Interval, sign: str = "") -> str:
    """Text such as [0.981, 0.997]. sign: '+' also shows the sign of positive numbers."""
    return f"[{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def show_mean(estimate: MeanOverSets, sign: str = "") -> str:
    """Text such as 0.9836 +- 0.0121."""
    error: Any = estimate.standard_error
    return f"{estimate.mean:{sign}.4f}" + ("" if error is None else f" +- {error:.4f}")
