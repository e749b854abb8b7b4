"""Compares scores with thresholds with a small tolerance, so that rounding errors do not decide."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Scores with a smaller relative difference count as equal, because the last digits of a score depend on the batches.
TIE = 1e-5


def subtract_rounding_error(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Subtracts the possible rounding error (`TIE`) from scores. Returns the lowest values that the exact scores can have."""
    return scores - TIE * np.abs(scores)


def exceeds_threshold(scores: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """Returns for each score whether it exceeds the threshold by more than the possible rounding error (`TIE`).

    So the result does not depend on the batches in which images were scored.
    """
    return np.asarray(subtract_rounding_error(scores) > threshold)
