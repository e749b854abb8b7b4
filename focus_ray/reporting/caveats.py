"""What has to be known before figures are relied on, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from focus_ray.evaluation.calibration import is_above
from focus_ray.evaluation.metrics import ScoredImages
from focus_ray.evaluation.report import format_bound
from focus_ray.kinds import METRICS

FEW_IMAGES = 20  # of a kind: below, one image moves a rate by 5 % or more
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """`count` of `total` images, and between which shares (`low`, `high`) the true one lies, at 95 % (Clopper, Pearson)."""

    count: int
    total: int

    @property
    def share(self) -> float:
        return self.count / self.total

    @property
    def bounds(self) -> tuple[float, float]:
        from scipy.stats import binomtest  # a second of imports, which pages without shares can do without

        found = binomtest(self.count, self.total).proportion_ci(CONFIDENCE, method="exact")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        if not self.total:
            return "-"
        low, high = self.bounds
        return f"{self.count} of {self.total} ({100 * self.share:.0f} %; {100 * low:.0f} to {100 * high:.0f} %)"


def called_bad(measured: ScoredImages, label: int) -> Share:
    """How many of the images of a label lie above the threshold."""
    scores = measured.scores[measured.labels == label]
    return Share(int(np.sum(is_above(scores, measured.threshold))), len(scores))


def evaluation_caveats(
    calibration: Sequence[str], warnings: Sequence[str], result: Mapping[str, Any], good: Share, bad: Share
) -> list[str]:
    """Of one category.

    Args:
        calibration: its calibration's own.  warnings: of its training.  result: as `Inspector.evaluate` gives.
        good, bad: how many of the good and of the bad test images are called bad.
    """
    trained_on = (result.get("trained_on") or {}).get("notice")
    told = [*([trained_on] if trained_on else []), *calibration, *warnings]
    for share, kind, what in ((good, "good", "false alarm rate"), (bad, "bad", "share of defects found")):
        if not share.total:
            told.append(f"There is no {kind} test image: nothing is known of the {what}.")
        elif share.total < FEW_IMAGES:
            low, high = share.bounds
            told.append(
                f"Only {share.total} {kind} test images: the {what} may be anywhere from {100 * low:.0f} to {100 * high:.0f} %."
            )
    target = float(result["target_fpr"])
    if good.total and good.bounds[0] > target:
        told.append(
            f"{100 * good.share:.0f} % of the good test images are called bad, more than chance makes of the target of "
            f"{100 * target:.3g} %. Calibrate with more images like them."
        )
    for finding in ("shift", "repeats"):
        notice = (result.get(finding) or {}).get("notice")
        if notice:
            told.append(notice)
    without = int(result["num_anomalous"]) - int(result["num_masks"])
    if without:
        told.append(
            f"{without} of {result['num_anomalous']} bad test images have no mask: pixel metrics and AUPRO leave them out."
        )
    if result.get("reduced"):
        told.append(
            "Masks were compared at a reduced size, where a reduced pixel is defective if any that it stands for is: "
            "defects are up to a pixel wider there."
        )
    if result.get("bounds"):
        told.append(
            f"There are too many pixels to sort them all: they were counted in bins, which moves no pixel metric by more than "
            f"{format_bound(max(result['bounds'].values())).removeprefix('±')}."
        )
    return [*told, *(f"{_in_words(where)} is missing: {reason}" for where, reason in result.get("reasons", {}).items())]


def _in_words(where: str) -> str:
    """'crack: aupro_0.3' -> 'AUPRO 0.3 of crack'."""
    kind, _, key = where.rpartition(": ")
    title = METRICS[key].title if key in METRICS.import_paths else key
    return f"{title} of {kind}" if kind else title
