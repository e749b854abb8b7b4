"""What an export costs: its scores, maps and verdicts of real images beside those of PyTorch in float32."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from focus_ray.bundle.bundle import Bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.data.images import content_hash, decode_image
from focus_ray.data.split import short_hash
from focus_ray.errors import DataError, ExportError
from focus_ray.evaluation.calibration import Calibration
from focus_ray.evaluation.metrics import image_auroc
from focus_ray.export.examples import Example
from focus_ray.export.formats import Run

FEWEST = 4  # examples that the model was not trained on
_ROUNDING = 1e-6  # relative, of a score in float32
_P_ROUNDING = 1e-3  # relative, of a p-value in float32


class Tolerance(NamedTuple):
    """What an export may cost; None: not looked at.

    score: largest difference, as a share of the spread of the examples' scores.  anomaly_map: the same of pixels.
    auroc: image AUROC lost, where it is measured.
    """

    score: float
    anomaly_map: float | None
    auroc: float | None


TOLERANCE = {
    "fp32": Tolerance(1e-3, 1e-3, None),
    "fp16": Tolerance(0.02, 0.02, 0.002),
    "int8": Tolerance(0.1, None, 0.01),
}


@dataclass(frozen=True)
class Check:
    """How an export scores the examples beside PyTorch in float32, both of the same decoded pixels.

    num_images, num_good, num_bad: examples, and those of them that are told good or bad.
    score_spread: highest less lowest score.  map_spread: the same of all pixels of all maps.
    score_difference, score_difference_median: share of the spread.  map_difference: the largest of a pixel, share of its spread.
    p_value_difference: the largest.  verdict_changes: images that are called otherwise.
    verdict_errors: images whose verdict or p-value is not what the calibration says of the export's own score.
    auroc_torch, auroc_export: image AUROC; None without good and bad examples.
    ms_torch, ms_export: an image at a time, median, with torch's threads; of this machine. From decoded pixels of any size.
    """

    num_images: int
    num_good: int
    num_bad: int
    score_spread: float
    map_spread: float
    score_difference: float
    score_difference_median: float
    map_difference: float
    p_value_difference: float
    verdict_changes: int
    verdict_errors: int
    auroc_torch: float | None
    auroc_export: float | None
    ms_torch: float
    ms_export: float

    @property
    def auroc_lost(self) -> float | None:
        if self.auroc_torch is None or self.auroc_export is None:
            return None
        return self.auroc_torch - self.auroc_export

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "auroc_lost": self.auroc_lost}

    def failures(self, tolerance: Tolerance) -> list[str]:
        """What is beyond the tolerance, in words."""
        found = []
        if not self.score_difference <= tolerance.score:
            found.append(
                f"scores differ by up to {self.score_difference:.2g} of their spread, more than {tolerance.score:g}"
            )
        if tolerance.anomaly_map is not None and not self.map_difference <= tolerance.anomaly_map:
            found.append(
                f"maps differ by up to {self.map_difference:.2g} of their spread, more than {tolerance.anomaly_map:g}"
            )
        if self.verdict_errors:
            found.append(f"{self.verdict_errors} verdicts or p-values are not those of their scores")
        if tolerance.auroc is not None and self.auroc_lost is not None and not self.auroc_lost <= tolerance.auroc:
            found.append(
                f"image AUROC falls from {self.auroc_torch:.4f} to {self.auroc_export:.4f}, more than {tolerance.auroc:g}"
            )
        return found


@dataclass(frozen=True)
class Expected:
    """What PyTorch makes of the examples in float32. scores, p_values, verdicts: (N,).  maps: (N, H, W).  ms: an image."""

    pixels: list[NDArray[np.uint8]]
    labels: list[int | None]
    scores: NDArray[np.float64]
    p_values: NDArray[np.float64]
    verdicts: NDArray[np.bool_]
    maps: NDArray[np.float32]
    ms: float
    calibration: Calibration


def expected_of(bundle: Bundle, examples: Sequence[Example]) -> Expected:
    """Scores the examples that the model was not trained on. bundle: read with precision fp32.

    Raises: ExportError: too few are left.  DataError: one cannot be decoded or inspected; the message names it.
    """
    decoded = [(one, decode_example(one)) for one in examples]
    new = [(one, pixels) for one, pixels in decoded if short_hash(content_hash(pixels)) not in bundle.fit_hashes]
    if len(new) < FEWEST:
        raise ExportError(
            f"{len(new)} of {len(examples)} examples are not among the images that the model was trained on, and {FEWEST} are "
            "needed to check an export: give others of the category with --examples, best good and bad ones"
        )
    inspector, placed, times = Inspector(bundle, "cpu"), [], []
    for one, pixels in new:
        start = time.perf_counter()
        try:
            framed = bundle.frame.place_image(Image.fromarray(pixels), pixels.shape[1], pixels.shape[0])
        except DataError as error:
            raise DataError(f"{one.name}: {error}") from error
        scored = inspector.score(framed[None])
        times.append(time.perf_counter() - start)
        placed.append(scored)
    scores = np.array([score[0] for score, _ in placed], dtype=np.float64)
    return Expected(
        [pixels for _, pixels in new],
        [one.label for one, _ in new],
        scores,
        bundle.calibration.conformal_p_value(scores),
        bundle.calibration.is_anomalous(scores),
        np.stack([anomaly_map[0] for _, anomaly_map in placed]),
        1e3 * float(np.median(times)),
        bundle.calibration,
    )


def decode_example(example: Example) -> NDArray[np.uint8]:
    """(H, W, 3). Raises: DataError: it cannot be decoded; the message names it."""
    try:
        return decode_image(example.image, None)
    except DataError as error:
        raise DataError(f"{example.name}: {error}") from error


def check(run: Run, expected: Expected) -> Check:
    """Runs an export over the examples, one at a time. Raises: ExportError: all examples score alike."""
    spread, map_spread = float(np.ptp(expected.scores)), float(np.ptp(expected.maps))
    if not spread > 0:
        raise ExportError("all examples have the same score, so that no difference can be told: give others")
    run(expected.pixels[0][None])  # the first is slower
    found, times = [], []
    for pixels in expected.pixels:
        start = time.perf_counter()
        found.append(run(pixels[None]))
        times.append(time.perf_counter() - start)
    scores = np.array([float(one["score"][0]) for one in found])
    away = np.abs(scores - expected.scores) / spread
    maps = [np.abs(one["anomaly_map"][0] - theirs).max() for one, theirs in zip(found, expected.maps, strict=True)]
    p_values = np.array([float(one["p_value"][0]) for one in found])
    verdicts = np.array([bool(one["anomalous"][0]) for one in found])
    told = np.array([label is not None for label in expected.labels])
    labels = np.array([label or 0 for label in expected.labels])
    both = len(set(labels[told].tolist())) == 2 and bool(np.isfinite(scores).all())
    return Check(
        num_images=len(scores),
        num_good=int((told & (labels == 0)).sum()),
        num_bad=int((told & (labels == 1)).sum()),
        score_spread=spread,
        map_spread=map_spread,
        score_difference=float(away.max()),
        score_difference_median=float(np.median(away)),
        map_difference=float(np.max(maps)) / map_spread,
        p_value_difference=float(np.abs(p_values - expected.p_values).max()),
        verdict_changes=int((verdicts != expected.verdicts).sum()),
        verdict_errors=_verdict_errors(expected.calibration, scores, p_values, verdicts),
        auroc_torch=image_auroc(labels[told], expected.scores[told]) if both else None,
        auroc_export=image_auroc(labels[told], scores[told]) if both else None,
        ms_torch=expected.ms,
        ms_export=1e3 * float(np.median(times)),
    )


def _verdict_errors(
    calibration: Calibration,
    scores: NDArray[np.float64],
    p_values: NDArray[np.float64],
    verdicts: NDArray[np.bool_],
) -> int:
    """Images whose verdict or p-value is not what the calibration says of their score, to rounding; one without is anomalous."""
    known = np.isfinite(scores)
    lower, higher = (scores[known] * (1 + change) for change in (-_ROUNDING, _ROUNDING))
    p_value, verdict = p_values[known], verdicts[known]
    right = (verdict >= calibration.is_anomalous(lower)) & (verdict <= calibration.is_anomalous(higher))
    right &= p_value >= calibration.conformal_p_value(higher) * (1 - _P_ROUNDING)
    right &= p_value <= calibration.conformal_p_value(lower) * (1 + _P_ROUNDING)
    return int((~right).sum() + (~verdicts[~known]).sum())
