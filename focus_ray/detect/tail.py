"""Module for a model of the highest scores of few normal images: it estimates how rare even higher scores are [ours].

The upper half of n scores is the tail: k scores. The lowest score of the tail is `start`. The model assumes that the tail is
exponential above the start (a generalised Pareto tail of shape 0). An excess is a score of the tail minus the start. The scale
of
the exponential is uncertain: it is estimated from k - 1 excesses. A prior adds the experience from other categories: the ratio
scale/start follows an inverse-gamma distribution, as if the tail had more excesses than the images show (`TailPrior`). The ratio
has no unit, so it is comparable between categories and between kinds of score.

The distribution of one more score is then a Lomax tail (a generalised Pareto tail of positive shape): the fewer scores, the
heavier the tail. Its rates are exact, on average over samples and categories, if tails are exponential and the prior is true.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv, gammainc

MIN_SCORES = 4  # fewer scores say nothing about a tail
_TAIL_SHARE = 0.5  # of the scores make the tail
_MIN_RELATIVE_SCALE = 1e-3  # scores that hardly differ say nothing about the next score
_NUM_NODES = 400  # of the integral over the share above the start; the error is below 0.001


class TailPrior(NamedTuple):
    """Inverse-gamma prior of the ratio scale/start: it acts like `degrees` additional excesses with the sum `total` * start."""

    degrees: float
    total: float


NO_PRIOR = TailPrior(0.0, 0.0)
# About half the weight that the marginal likelihood of ten categories prefers (`benchmarks.tails`). The full weight would raise
# the false alarm rate of a category with an unusually long tail.
SHIPPED_PRIOR = TailPrior(5.0, 0.6)


class ScoreTail(NamedTuple):
    """Distribution of high scores: P(score > s) = share (1 + shape (s - start) / scale) ^ (-1/shape) for s >= start.

    start: lowest score of the tail.
    share: probability that a score is above the start.
    scale: scale of the excesses (score minus start), in the unit of the score.
    shape: above 0; the larger, the heavier the tail.
    """

    start: float
    share: float
    scale: float
    shape: float

    def compute_share_above(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Returns the share of normal images that score above each given score; `share` for scores below the start.

        Args: scores: any shape; the result has the same shape.
        """
        excess = np.maximum(np.asarray(scores, dtype=np.float64) - self.start, 0.0)
        return np.asarray(self.share * (1 + self.shape * excess / self.scale) ** (-1 / self.shape))

    def compute_score_at_share(self, share: float) -> float:
        """Returns the score that the given share of normal images exceeds; the inverse of `compute_share_above`.

        Args: share: above 0. A share above `self.share` gives a score below the start, where the model does not hold.
        """
        return self.start + self.scale / self.shape * ((share / self.share) ** -self.shape - 1)

    def compute_probability_fpr_exceeds(self, rate: float, threshold: float, num_groups: int) -> float:
        """Returns the probability that the long-run rate of normal scores above a threshold exceeds `rate`.

        The long-run rate is U exp(-(threshold - start) / theta). U is the true share of scores above the start. It follows
        Beta(k, n + 1 - k), because the start is the k-th highest of n scores. theta is the true scale. It has an inverse-gamma
        posterior: 1/theta follows a Gamma distribution with shape parameter 1/shape and rate parameter scale/shape.

        Args:
            rate: above 0.
            threshold: at or above the start.
            num_groups: n, number of independent observations from which the tail was fitted.
        """
        true_shares = _compute_true_share_quantiles(round(self.share * (num_groups + 1)), num_groups)
        relative_excess = (threshold - self.start) * self.shape / self.scale
        if relative_excess <= 0:
            return float(np.mean(true_shares > rate))
        # U exp(-relative_excess G) > rate, G ~ Gamma(1/shape, 1)
        limits = np.maximum(np.log(true_shares / rate), 0.0) / relative_excess
        return float(np.mean(gammainc(1 / self.shape, limits)))


@lru_cache(maxsize=64)  # an interval asks for the same ones at every step
def _compute_true_share_quantiles(k: int, num_groups: int) -> NDArray[np.float64]:
    """Returns `_NUM_NODES` equally likely values of the true share of scores above the k-th highest of `num_groups` scores."""
    middles = (np.arange(_NUM_NODES) + 0.5) / _NUM_NODES
    return np.asarray(betaincinv(k, num_groups + 1 - k, middles))


def fit_tail(
    scores: NDArray[np.float64], num_groups: int | None = None, prior: TailPrior = SHIPPED_PRIOR
) -> ScoreTail | None:
    """Fits the tail of normal scores, or returns None for fewer than `MIN_SCORES` independent scores.

    Args:
        scores: (N,), ascending.
        num_groups: number of independent groups among the N images; None: N. The scores of one group together count as one
            observation: all scores are used, and the degrees of freedom come from the groups (design effect N / num_groups).
        prior: experience from other categories; `NO_PRIOR` for none.
    """
    groups = scores.size if num_groups is None else num_groups
    if groups < MIN_SCORES:
        return None
    k = max(MIN_SCORES - 1, math.ceil(_TAIL_SHARE * groups))
    images_per_group = scores.size / groups
    start = float(scores[scores.size - round(k * images_per_group)])
    excess_sum = float(np.maximum(scores - start, 0.0).sum()) / images_per_group
    degrees = k - 1 + prior.degrees
    scale = (excess_sum + prior.total * abs(start)) / degrees
    return ScoreTail(start, k / (groups + 1), max(scale, _MIN_RELATIVE_SCALE * abs(start), 1e-12), 1 / degrees)
