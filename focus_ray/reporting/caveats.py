"""Writes the caveats of an evaluation: sentences that a reader must know before trusting the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from focus_ray.metrics.metrics import ScoredTestImages
from focus_ray.metrics.registry import METRICS
from focus_ray.metrics.ties import exceeds_threshold
from focus_ray.reporting.tables import collect_notices, format_error_bound

FEW_IMAGES = 20  # below this number, a single image changes a rate by 5 % or more
CONFIDENCE = 0.95


@dataclass(frozen=True)
class ImageShare:
    """A share of images, `count` of `total`, with an exact 95 % confidence interval (Clopper-Pearson).

    `share` and `confidence_interval` are defined only if `total` is above 0.
    """

    count: int
    total: int

    @property
    def share(self) -> float:
        """`count` divided by `total`, in 0..1."""
        return self.count / self.total

    @property
    def confidence_interval(self) -> tuple[float, float]:
        """Lower and upper bound of the confidence interval, in 0..1."""
        from scipy.stats import binomtest  # this import takes a second, so only pages with shares do it

        interval = binomtest(self.count, self.total).proportion_ci(CONFIDENCE, method="exact")
        return float(interval.low), float(interval.high)

    def __str__(self) -> str:
        if not self.total:
            return "-"
        low, high = self.confidence_interval
        return f"{self.count} of {self.total} ({100 * self.share:.0f} %; {100 * low:.0f} to {100 * high:.0f} %)"


def compute_share_called_bad(measured: ScoredTestImages, label: int) -> ImageShare:
    """Returns the share of images with a score above the threshold, among the images with a label (0 good, 1 bad)."""
    scores = measured.scores[measured.labels == label]
    return ImageShare(int(np.sum(exceeds_threshold(scores, measured.threshold))), len(scores))


def list_evaluation_caveats(
    calibration: Sequence[str], warnings: Sequence[str], result: Mapping[str, Any], good: ImageShare, bad: ImageShare
) -> list[str]:
    """Returns the caveats of the evaluation of a category, one sentence each.

    Args:
        calibration: sentences of `Calibration.caveats`, which come before the caveats of the evaluation.
        warnings: sentences of the training, which come next.
        result: metrics and notices of `Inspector.evaluate`.
        good, bad: share of the good and of the bad test images whose score is above the threshold.
    """
    caveats = [*collect_notices(result, "trained_on"), *calibration, *warnings]
    for share, kind, rate in ((good, "good", "false alarm rate"), (bad, "bad", "share of defects found")):
        if not share.total:
            caveats.append(f"There is no {kind} test image: nothing is known of the {rate}.")
        elif share.total < FEW_IMAGES:
            low, high = share.confidence_interval
            caveats.append(
                f"Only {share.total} {kind} test images: the {rate} may be anywhere from {100 * low:.0f} to {100 * high:.0f} %."
            )
    target = float(result["target_fpr"])
    if good.total and good.confidence_interval[0] > target:
        caveats.append(
            f"{100 * good.share:.0f} % of the good test images are called bad, more than chance makes of the target of "
            f"{100 * target:.3g} %. Calibrate with more images like them."
        )
    caveats += collect_notices(result, "shift", "repeats")
    num_unmasked = int(result["num_anomalous"]) - int(result["num_masks"])
    if num_unmasked:
        caveats.append(
            f"{num_unmasked} of {result['num_anomalous']} bad test images have no mask: pixel metrics and AUPRO leave them out."
        )
    if result.get("reduced"):
        caveats.append(
            "Masks were compared at a reduced size: a reduced pixel is defective if any of its original pixels is defective, so "
            "defects are up to one pixel wider."
        )
    if result.get("bounds"):
        caveats.append(
            f"There are too many pixels to sort them all: they were counted in bins, which moves no pixel metric by more than "
            f"{format_error_bound(max(result['bounds'].values())).removeprefix('±')}."
        )
    return [
        *caveats,
        *(f"{_format_metric_title(key)} is missing: {reason}" for key, reason in result.get("reasons", {}).items()),
    ]


def _format_metric_title(metric: str) -> str:
    """Returns the title of a metric for people, such as 'AUPRO 0.3 of crack' for the key 'crack: aupro_0.3'."""
    defect_type, _, key = metric.rpartition(": ")
    title = METRICS[key].title if key in METRICS.import_paths else key
    return f"{title} of {defect_type}" if defect_type else title
