"""How good scores and anomaly maps are: image and pixel AUROC, average precision, F1-max, AUPRO. numpy in, float out.

A metric that needs both classes raises DataError when one is missing: whether such a set is skipped, reported as "none"
or fatal is the caller's decision, never a silent 0 or 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from focus_ray.errors import DataError
from focus_ray.evaluation.calibration import is_above
from focus_ray.evaluation.pixels import PixelBins, PixelCurve, Stack


def image_auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve of image scores; ties count half.

    Args:
        labels: (N,), 0 normal or 1 anomalous.  scores: (N,), higher is more anomalous, any finite range.

    Raises: DataError: lengths differ, a score is NaN or infinite, a label is not 0 or 1, or only one class is present.
    """
    from sklearn.metrics import roc_auc_score  # a second of imports, which a fit can do without

    return float(roc_auc_score(*_checked(labels, scores)))


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the precision-recall curve of image scores, without interpolation (scikit-learn's definition).

    Args and raises as for `image_auroc`.
    """
    from sklearn.metrics import average_precision_score  # a second of imports, which a fit can do without

    return float(average_precision_score(*_checked(labels, scores)))


def f1_max(labels: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """The best F1 over all thresholds and the threshold that gives it: an image counts as bad if score >= threshold.

    It looks at the labels of the set it is measured on, so it is an upper bound to report, never a threshold to deploy:
    that one comes from `focus_ray.evaluation.calibration`. Of several best thresholds the lowest is returned.

    Args and raises as for `image_auroc`.
    """
    from sklearn.metrics import precision_recall_curve  # a second of imports, which a fit can do without

    precision, recall, thresholds = precision_recall_curve(*_checked(labels, scores))
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)[:-1]
    best = int(np.argmax(f1))
    return float(f1[best]), float(thresholds[best])


def false_positive_rate(scores_of_normals: ArrayLike, threshold: float) -> float:
    """Share of normal images whose score > threshold: the rule by which `Calibration` calls an image bad.

    Raises: DataError: no scores, or one that is NaN or infinite, or a NaN threshold.
    """
    scores = _finite_vector(scores_of_normals, "scores_of_normals")
    if np.isnan(threshold):
        raise DataError("threshold is NaN; expected a number on the scale of the scores")
    return float(np.mean(is_above(scores, threshold)))


def pixel_auroc(masks: Stack, maps: Stack) -> float:
    """Area under the ROC curve over all pixels of all images together; ties count half.

    Args:
        masks: bool or integer, non-zero where anomalous; all-zero for a good image.
        maps: the anomaly maps, one per mask and of its size.

    Raises: DataError: counts or sizes differ, a value is NaN or infinite, a mask is not bool or integer, or all pixels
        are of one class.
    """
    return PixelCurve.of(masks, maps, regions=False).auroc()


def pixel_average_precision(masks: Stack, maps: Stack) -> float:
    """Average precision over all pixels of all images together. Args and raises as for `pixel_auroc`."""
    return PixelCurve.of(masks, maps, regions=False).average_precision()


def aupro(masks: Stack, maps: Stack, fpr_limit: float = 0.3) -> float:
    """Area under the per-region-overlap curve up to a false positive rate (Bergmann et al., MVTec AD, IJCV 2021).

    At a threshold, the overlap of a region is the share of its pixels at or above it; PRO is the mean over all regions
    of all images, and the false positive rate is taken over all normal pixels of all images. Every distinct score is a
    threshold, ties move together, the curve starts at (0, 0), is integrated by the trapezoid rule with linear
    interpolation at `fpr_limit`, and the area is divided by `fpr_limit`: 1 is perfect. Regions are 8-connected, as in
    MVTec's own evaluation code; tools that use 4-connectivity split diagonal scratches and give other figures.

    Args: as for `pixel_auroc`, and fpr_limit in (0, 1], a share of the normal pixels.

    Raises: DataError: as `pixel_auroc`, or fpr_limit is outside (0, 1].
    """
    _check_limit(fpr_limit)
    return PixelCurve.of(masks, maps, regions=True).aupro(fpr_limit)


def pixel_metrics(masks: Stack, maps: Stack, fpr_limits: Sequence[float] = (0.3, 0.05)) -> dict[str, float]:
    """All pixel metrics from one sort: `pixel_auroc`, `pixel_average_precision`, and `aupro_<limit>` per limit.

    Args and raises as for `aupro`.
    """
    for fpr_limit in fpr_limits:
        _check_limit(fpr_limit)
    curve = PixelCurve.of(masks, maps, regions=True)
    metrics = {"pixel_auroc": curve.auroc(), "pixel_average_precision": curve.average_precision()}
    for fpr_limit in fpr_limits:
        metrics[f"aupro_{fpr_limit:g}"] = curve.aupro(fpr_limit)
    return metrics


class NotKept(Sequence[Any]):
    """Stands for maps and masks of a set that was counted in bins: whoever asks for them is told, and not given nothing."""

    def __len__(self) -> int:
        raise DataError(NOT_KEPT)

    def __getitem__(self, place: Any) -> Any:
        raise DataError(NOT_KEPT)


NOT_KEPT = (
    "the set is too large for its maps to be kept: they are counted in bins; measure fewer images, or allow more "
    "(--exact-megapixels)"
)


@dataclass(frozen=True)
class Measured:
    """What a metric is taken over: some images of one category, scored.

    labels: (N,), 0 normal or 1 anomalous.  scores: (N,).  masks: N of (H, W) bool; None where an anomalous image has
    none: such an image counts in image metrics alone.  maps: N of (H, W), each of its mask's size.
    threshold: of the image score.  inside: N of (H, W) bool, pixels that count, those of a region of interest; None: all.
    bins: in place of masks and maps, which are `NotKept` then: pixels counted, by defect type, "" for good images.
    """

    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    masks: Sequence[NDArray[np.bool_] | None]
    maps: Sequence[NDArray[np.float32]]
    threshold: float
    inside: Sequence[NDArray[np.bool_] | None] | None = None
    bins: Mapping[str, PixelBins] | None = None

    @property
    def has_both(self) -> bool:
        """Whether there are normal and anomalous images."""
        return bool(0 < self.labels.sum() < len(self.labels))

    @property
    def num_masks(self) -> int:
        """Anomalous images whose mask is known."""
        if self.bins is not None:
            return sum(bins.num_images for kind, bins in self.bins.items() if kind)
        return sum(mask is not None for mask, label in zip(self.masks, self.labels, strict=True) if label)

    @cached_property
    def curve(self) -> PixelCurve | None:
        """Of all pixels whose truth is known, sorted once for all metrics; None where no anomalous pixel is known."""
        if self.bins is not None:
            return PixelBins.total(self.bins.values()).curve()
        known = [index for index, mask in enumerate(self.masks) if mask is not None]
        masks = [np.asarray(self.masks[index]) for index in known]
        inside = None if self.inside is None else [self.inside[index] for index in known]
        kept = masks if inside is None else [m if i is None else m & i for m, i in zip(masks, inside, strict=True)]
        if not any(mask.any() for mask in kept):
            return None
        return PixelCurve.of(kept, [self.maps[index] for index in known], regions=True, inside=inside)

    def only(self, chosen: NDArray[np.bool_], kinds: Sequence[str]) -> Measured:
        """The chosen (N,) images alone: all those of these defect types, "" for good images."""
        labels, scores = self.labels[chosen], self.scores[chosen]
        if self.bins is not None:
            bins = {kind: self.bins[kind] for kind in kinds if kind in self.bins}
            return Measured(labels, scores, self.masks, self.maps, self.threshold, bins=bins)
        places = np.flatnonzero(chosen).tolist()
        masks, maps = [self.masks[place] for place in places], [self.maps[place] for place in places]
        inside = None if self.inside is None else [self.inside[place] for place in places]
        return Measured(labels, scores, masks, maps, self.threshold, inside)


class Metric(NamedTuple):
    """A kind of metric; its name in `METRICS` is its key in reports and sweeps.

    title: for people.  value: None where the images cannot give it.  per_defect: whether it is told of each defect type
    too, image metrics against all normal images, pixel metrics on the type's own images.
    higher_is_better: whether a sweep may maximise it.  bound: how far the value of pixels that were counted in bins may be
    from the exact one; None for a metric that takes no pixels, or only maps that are kept.
    """

    title: str
    value: Callable[[Measured], float | None]
    per_defect: Literal["", "with_normals", "alone"] = ""
    higher_is_better: bool = True
    bound: Callable[[Measured], float | None] | None = None


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    values = _finite_vector(scores, "scores")
    truth = np.asarray(labels)
    if truth.shape != values.shape:
        raise DataError(f"labels {truth.shape} and scores {values.shape}; expected one label per score")
    if not np.isin(truth, (0, 1)).all():
        raise DataError(f"labels hold {sorted(set(truth.tolist()))[:5]}; expected 0 (normal) or 1 (anomalous) only")
    truth = truth.astype(np.int64)
    if truth.min() == truth.max():
        kind = "anomalous" if truth[0] else "normal"
        raise DataError(f"all {truth.size} images are {kind}; this metric needs both classes, so skip it for this set")
    return truth, values


def _finite_vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not vector.size:
        raise DataError(f"{name} has shape {vector.shape}; expected a non-empty vector, one number per image")
    bad = np.flatnonzero(~np.isfinite(vector))
    if bad.size:
        raise DataError(f"{name}[{bad[0]}] is {vector[bad[0]]}; expected finite numbers")
    return vector


def _check_limit(fpr_limit: float) -> None:
    if not 0.0 < fpr_limit <= 1.0:
        raise DataError(f"fpr_limit={fpr_limit}; expected a share in (0, 1], usually 0.3 or 0.05")


# ---- the table's entries; `focus_ray.kinds.METRICS` lists them


def _of_images(function: Callable[[NDArray[Any], NDArray[Any]], float]) -> Callable[[Measured], float | None]:
    return lambda measured: function(measured.labels, measured.scores) if measured.has_both else None


def _of_pixels(function: Callable[[PixelCurve], float]) -> Callable[[Measured], float | None]:
    return lambda measured: None if measured.curve is None else function(measured.curve)


def _pixel_metric(title: str, value: Callable[[PixelCurve], float], bound: Callable[[PixelCurve], float]) -> Metric:
    return Metric(title, _of_pixels(value), "alone", bound=_of_pixels(bound))


def _share_called_bad(label: int) -> Callable[[Measured], float | None]:
    def share(measured: Measured) -> float | None:
        scores = measured.scores[measured.labels == label]
        return float(is_above(scores, measured.threshold).mean()) if len(scores) else None

    return share


IMAGE_AUROC = Metric("image AUROC", _of_images(image_auroc), "with_normals")
IMAGE_AVERAGE_PRECISION = Metric("image AP", _of_images(average_precision))
IMAGE_F1_MAX = Metric("image F1-max", _of_images(lambda labels, scores: f1_max(labels, scores)[0]))
PIXEL_AUROC = _pixel_metric("pixel AUROC", PixelCurve.auroc, PixelCurve.auroc_bound)
PIXEL_AVERAGE_PRECISION = _pixel_metric("pixel AP", PixelCurve.average_precision, PixelCurve.average_precision_bound)
AUPRO_03 = _pixel_metric("AUPRO 0.3", lambda curve: curve.aupro(0.3), lambda curve: curve.aupro_bound(0.3))
AUPRO_005 = _pixel_metric("AUPRO 0.05", lambda curve: curve.aupro(0.05), lambda curve: curve.aupro_bound(0.05))
FALSE_POSITIVE_RATE = Metric("FPR at threshold", _share_called_bad(0), higher_is_better=False)
RECALL = Metric("recall at threshold", _share_called_bad(1), "alone")
