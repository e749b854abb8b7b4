"""What each threshold would cost: good parts called bad against defects let through."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from focus_ray.errors import DataError


@dataclass(frozen=True)
class TradeOff:
    """Of every threshold that parts the images otherwise, ascending: a part is called bad above it.

    thresholds, false_alarms, misses: (T,); shares of the good images above, and of the bad ones not above.
    num_good, num_bad: images.
    """

    thresholds: NDArray[np.float64]
    false_alarms: NDArray[np.float64]
    misses: NDArray[np.float64]
    num_good: int
    num_bad: int

    def cost(self, false_alarm: float, miss: float, defect_rate: float) -> NDArray[np.float64]:
        """(T,), a part's expected cost.

        Args:
            false_alarm, miss: what one of each costs, in one unit.  defect_rate: share of parts that are defective.

        Raises: DataError: a cost is negative, or the rate no share.
        """
        if false_alarm < 0 or miss < 0:
            raise DataError(
                f"costs of a false alarm and of a miss are {false_alarm:g} and {miss:g}; expected 0 or more"
            )
        if not 0 <= defect_rate <= 1:
            raise DataError(f"defect rate {defect_rate:g}; expected a share from 0 to 1")
        return (1 - defect_rate) * false_alarm * self.false_alarms + defect_rate * miss * self.misses

    def at(self, threshold: float) -> tuple[float, float]:
        """Shares of false alarms and of misses at a threshold."""
        place = int(np.searchsorted(self.thresholds, threshold, side="right")) - 1
        return float(self.false_alarms[max(place, 0)]), float(self.misses[max(place, 0)])

    def to_csv(self) -> bytes:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["threshold", "false_alarm_rate", "miss_rate"])
        writer.writerows(zip(self.thresholds.tolist(), self.false_alarms.tolist(), self.misses.tolist(), strict=True))
        return buffer.getvalue().encode()


def trade_off(good: NDArray[np.float64], bad: NDArray[np.float64]) -> TradeOff:
    """good: (N,) scores of good images.  bad: (M,) of bad ones. Raises: DataError: one of them is empty."""
    if not good.size or not bad.size:
        raise DataError(f"a trade-off needs good and bad images, got {good.size} and {bad.size}")
    thresholds = np.unique(np.concatenate([[0.0], good, bad]))
    false_alarms = 1 - np.searchsorted(np.sort(good), thresholds, side="right") / good.size
    misses = np.searchsorted(np.sort(bad), thresholds, side="right") / bad.size
    return TradeOff(thresholds, false_alarms, misses, good.size, bad.size)
