"""A model of the highest scores of few normal images: what lies beyond the highest of them [ours].

Of n scores the k highest, from `start` on, are taken for exponential above it (a generalised Pareto tail of shape 0). Their
scale is not known but from k - 1 excesses. With the scale's prior 1/scale, the predictive distribution of one more score is
again a generalised Pareto (Lomax) tail, of shape 1/(k - 1): the fewer scores, the heavier. Where tails are exponential its
rates are exact for any k, the draw of the n images counted in.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FEWEST = 4  # scores, below which nothing is said of a tail
_SHARE = 0.5  # of the scores that make the tail
_SMALLEST_SCALE = 1e-3  # of the start: scores that hardly differ say nothing of how the next will


class Tail(NamedTuple):
    """P(score > s) = share (1 + shape (s - start) / scale) ^ (-1/shape) for s >= start."""

    start: float
    share: float
    scale: float
    shape: float

    def share_above(self, scores: ArrayLike) -> NDArray[np.float64]:
        """For scores of any shape; `share` below the start."""
        excess = np.maximum(np.asarray(scores, dtype=np.float64) - self.start, 0.0)
        return np.asarray(self.share * (1 + self.shape * excess / self.scale) ** (-1 / self.shape))

    def score_at(self, share: float) -> float:
        """The score that a share of normal images exceeds, at most `self.share`; undoes `share_above`."""
        return self.start + self.scale / self.shape * ((share / self.share) ** -self.shape - 1)


def fit_tail(scores: NDArray[np.float64]) -> Tail | None:
    """scores: (n,), ascending. Returns: None of fewer than `FEWEST`."""
    n = scores.size
    if n < FEWEST:
        return None
    k = max(FEWEST - 1, math.ceil(_SHARE * n))
    start = float(scores[n - k])
    excesses = scores[n - k + 1 :] - start
    scale = max(float(excesses.mean()), _SMALLEST_SCALE * abs(start), 1e-12)
    return Tail(start, k / (n + 1), scale, 1 / (k - 1))
