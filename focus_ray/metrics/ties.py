"""Compares scores with thresholds, so that rounding errors decide nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Scores with a smaller relative difference count as equal, because the last digits of a score depend on the batches.
TIE = 1e-5


def certain_part(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the lowest values that the scores can have without rounding errors (`TIE`)."""
    return scores - TIE * np.abs(scores)


def is_above(scores: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """Returns whether scores exceed a threshold by more than `TIE`, so that the result does not depend on the batches."""
    return np.asarray(certain_part(scores) > threshold)
