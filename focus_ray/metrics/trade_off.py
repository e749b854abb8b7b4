"""Trade-off of each image threshold: good parts called bad against missed defects."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from focus_ray.errors import DataError


@dataclass(frozen=True)
class TradeOff:
    """Rates of false alarms and misses at every threshold that changes a verdict. A part is called bad above a threshold.

    Attributes:
        thresholds: (T,), ascending.
        false_alarms: (T,), share of good images above each threshold.
        misses: (T,), share of bad images at or below each threshold.
        num_good, num_bad: number of images.
    """

    thresholds: NDArray[np.float64]
    false_alarms: NDArray[np.float64]
    misses: NDArray[np.float64]
    num_good: int
    num_bad: int

    def cost(self, false_alarm: float, miss: float, defect_rate: float) -> NDArray[np.float64]:
        """Computes the expected cost (T,) of a part at each threshold.

        Args:
            false_alarm, miss: cost of one false alarm and of one miss, in the same unit.
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

    def at(self, threshold: float) -> tuple[float, float]:
        """Returns the share of false alarms and the share of misses at a threshold."""
        index = int(np.searchsorted(self.thresholds, threshold, side="right")) - 1
        return float(self.false_alarms[max(index, 0)]), float(self.misses[max(index, 0)])

    def to_csv(self) -> bytes:
        """Returns thresholds and rates as a CSV file."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["threshold", "false_alarm_rate", "miss_rate"])
        writer.writerows(zip(self.thresholds.tolist(), self.false_alarms.tolist(), self.misses.tolist(), strict=True))
        return buffer.getvalue().encode()


def trade_off(good: NDArray[np.float64], bad: NDArray[np.float64]) -> TradeOff:
    """Computes the trade-off of all thresholds.

    Args:
        good: (N,), scores of good images.
        bad: (M,), scores of bad images.

    Raises: DataError: there is no good image, or no bad image.
    """
    if not good.size or not bad.size:
        raise DataError(f"a trade-off needs good and bad images, got {good.size} and {bad.size}")
    thresholds = np.unique(np.concatenate([[0.0], good, bad]))
    false_alarms = 1 - np.searchsorted(np.sort(good), thresholds, side="right") / good.size
    misses = np.searchsorted(np.sort(bad), thresholds, side="right") / bad.size
    return TradeOff(thresholds, false_alarms, misses, good.size, bad.size)
