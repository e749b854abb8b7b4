"""Computes for each image threshold the share of good parts called bad (false alarms) and the share of missed defects."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from focus_ray.errors import DataError


@dataclass(frozen=True)
class ThresholdTradeOff:
    """The shares of false alarms and of missed defects at every threshold that changes a decision (bad above it).

    Attributes:
        thresholds: (T,), ascending: 0 and each score.
        false_alarms: (T,), share of good images above each threshold.
        misses: (T,), share of bad images at or below each threshold.
        num_good, num_bad: number of images.
    """

    thresholds: NDArray[np.float64]
    false_alarms: NDArray[np.float64]
    misses: NDArray[np.float64]
    num_good: int
    num_bad: int

    def compute_cost(self, false_alarm: float, miss: float, defect_rate: float) -> NDArray[np.float64]:
        """Computes the expected cost of a part at each threshold, (T,).

        Args:
            false_alarm, miss: cost of one false alarm and of one missed defect, in the same unit.
            defect_rate: share of parts that are defective.

        Raises: DataError: a cost is negative, or the rate is outside [0, 1].
        """
        if false_alarm < 0 or miss < 0:
            raise DataError(
                f"costs of a false alarm and of a miss are {false_alarm:g} and {miss:g}; expected 0 or more"
            )
        if not 0 <= defect_rate <= 1:
            raise DataError(f"defect rate {defect_rate:g}; expected a share from 0 to 1")
        return (1 - defect_rate) * false_alarm * self.false_alarms + defect_rate * miss * self.misses

    def get_rates_at(self, threshold: float) -> tuple[float, float]:
        """Returns the share of false alarms and the share of missed defects at a threshold.

        For a threshold below all entries of `thresholds`, returns the shares at the lowest entry.
        """
        index = int(np.searchsorted(self.thresholds, threshold, side="right")) - 1
        return float(self.false_alarms[max(index, 0)]), float(self.misses[max(index, 0)])

    def to_csv(self) -> bytes:
        """Returns a CSV file as bytes: one row per threshold, with the shares of false alarms and of missed defects."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["threshold", "false_alarm_rate", "miss_rate"])
        writer.writerows(zip(self.thresholds.tolist(), self.false_alarms.tolist(), self.misses.tolist(), strict=True))
        return buffer.getvalue().encode()


def compute_trade_off(good: NDArray[np.float64], bad: NDArray[np.float64]) -> ThresholdTradeOff:
    """Computes the shares of false alarms and of missed defects at all thresholds, from the scores of good and bad images.

    Args:
        good: (N,), scores of the N good images.
        bad: (M,), scores of the M bad images.

    Raises: DataError: there is no good image, or no bad image.
    """
    if not good.size or not bad.size:
        raise DataError(f"a trade-off needs good and bad images, got {good.size} and {bad.size}")
    thresholds = np.unique(np.concatenate([[0.0], good, bad]))
    false_alarms = 1 - np.searchsorted(np.sort(good), thresholds, side="right") / good.size
    misses = np.searchsorted(np.sort(bad), thresholds, side="right") / bad.size
    return ThresholdTradeOff(thresholds, false_alarms, misses, good.size, bad.size)
