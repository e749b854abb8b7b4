"""How good scores and anomaly maps are: image and pixel AUROC, average precision, F1-max, AUPRO. numpy in, float out.

A metric that needs both classes raises DataError when one is missing: whether such a set is skipped, reported as "none"
or fatal is the caller's decision, never a silent 0 or 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from focus_ray.errors import DataError
from focus_ray.evaluation.calibration import is_above

Stack = NDArray[Any] | Sequence[NDArray[Any]]
"""(N, H, W), or N arrays of (H, W) that may differ in size."""

_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


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
    return _PixelCurve.of(masks, maps, regions=False).auroc()


def pixel_average_precision(masks: Stack, maps: Stack) -> float:
    """Average precision over all pixels of all images together. Args and raises as for `pixel_auroc`."""
    return _PixelCurve.of(masks, maps, regions=False).average_precision()


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
    return _PixelCurve.of(masks, maps, regions=True).aupro(fpr_limit)


def pixel_metrics(masks: Stack, maps: Stack, fpr_limits: Sequence[float] = (0.3, 0.05)) -> dict[str, float]:
    """All pixel metrics from one sort: `pixel_auroc`, `pixel_average_precision`, and `aupro_<limit>` per limit.

    Args and raises as for `aupro`.
    """
    for fpr_limit in fpr_limits:
        _check_limit(fpr_limit)
    curve = _PixelCurve.of(masks, maps, regions=True)
    metrics = {"pixel_auroc": curve.auroc(), "pixel_average_precision": curve.average_precision()}
    for fpr_limit in fpr_limits:
        metrics[f"aupro_{fpr_limit:g}"] = curve.aupro(fpr_limit)
    return metrics


@dataclass(frozen=True)
class Measured:
    """What a metric is taken over: some images of one category, scored.

    labels: (N,), 0 normal or 1 anomalous.  scores: (N,).  masks: N of (H, W) bool; None where an anomalous image has
    none: such an image counts in image metrics alone.  maps: N of (H, W), each of its mask's size.
    threshold: of the image score.  inside: N of (H, W) bool, pixels that count, those of a region of interest; None: all.
    """

    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    masks: Sequence[NDArray[np.bool_] | None]
    maps: Sequence[NDArray[np.float32]]
    threshold: float
    inside: Sequence[NDArray[np.bool_] | None] | None = None

    @property
    def has_both(self) -> bool:
        """Whether there are normal and anomalous images."""
        return bool(0 < self.labels.sum() < len(self.labels))

    @cached_property
    def curve(self) -> _PixelCurve | None:
        """Of all pixels whose truth is known, sorted once for all metrics; None where no anomalous pixel is known."""
        known = [index for index, mask in enumerate(self.masks) if mask is not None]
        masks = [np.asarray(self.masks[index]) for index in known]
        inside = None if self.inside is None else [self.inside[index] for index in known]
        kept = masks if inside is None else [m if i is None else m & i for m, i in zip(masks, inside, strict=True)]
        if not any(mask.any() for mask in kept):
            return None
        return _PixelCurve.of(kept, [self.maps[index] for index in known], regions=True, inside=inside)

    def only(self, chosen: NDArray[np.bool_]) -> Measured:
        """The chosen (N,) images alone."""
        places = np.flatnonzero(chosen).tolist()
        masks, maps = [self.masks[place] for place in places], [self.maps[place] for place in places]
        inside = None if self.inside is None else [self.inside[place] for place in places]
        return Measured(self.labels[chosen], self.scores[chosen], masks, maps, self.threshold, inside)


class Metric(NamedTuple):
    """A kind of metric; its name in `METRICS` is its key in reports and sweeps.

    title: for people.  value: None where the images cannot give it.  per_defect: whether it is told of each defect type
    too, image metrics against all normal images, pixel metrics on the type's own images.
    higher_is_better: whether a sweep may maximise it.
    """

    title: str
    value: Callable[[Measured], float | None]
    per_defect: Literal["", "with_normals", "alone"] = ""
    higher_is_better: bool = True


@dataclass(frozen=True)
class _PixelCurve:
    """The curve's corners: one row per distinct score of an anomalous pixel, highest score first.

    Between two such scores only the false positives move, so the curve is flat there, and a normal score equal to an
    anomalous one makes one slanted step. That is why the normal scores (nearly all pixels) need only a plain sort.
    """

    above: NDArray[np.int64]  # (K,) normal pixels that score higher
    at_or_above: NDArray[np.int64]  # (K,) the same, ties included
    found: NDArray[np.int64]  # (K,) anomalous pixels at or above
    overlap: NDArray[np.float64]  # (K,) mean over regions of the share at or above; zeros if regions were not asked for
    num_normal: int

    @staticmethod
    def of(
        masks: Stack, maps: Stack, regions: bool, inside: Sequence[NDArray[np.bool_] | None] | None = None
    ) -> _PixelCurve:
        normal, anomalous, weights = _split_pixels(masks, maps, regions, inside)
        num_normal = normal.size
        order = np.argsort(anomalous)[::-1]
        anomalous = anomalous[order]
        last = np.flatnonzero(np.append(anomalous[1:] != anomalous[:-1], True))
        rising = anomalous[last][::-1]  # in which order a search goes through memory once
        normal = normal[normal >= rising[0]]  # the others are at or above none
        normal.sort()
        return _PixelCurve(
            above=normal.size - np.searchsorted(normal, rising, side="right")[::-1],
            at_or_above=normal.size - np.searchsorted(normal, rising, side="left")[::-1],
            found=last + 1,
            overlap=np.cumsum(weights[order])[last] if regions else np.zeros(last.size),
            num_normal=num_normal,
        )

    def auroc(self) -> float:
        gained = np.diff(self.found, prepend=0) / self.found[-1]
        return float(np.sum(gained * (1.0 - (self.above + self.at_or_above) / (2.0 * self.num_normal))))

    def average_precision(self) -> float:
        gained = np.diff(self.found, prepend=0) / self.found[-1]
        return float(np.sum(gained * self.found / (self.found + self.at_or_above)))

    def pro(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The per-region-overlap curve's corners from (0, 0) to (1, 1): false positive rate, mean overlap."""
        fpr = np.empty(2 * self.found.size + 2)
        pro = np.empty_like(fpr)
        fpr[0], fpr[1:-1:2], fpr[2:-1:2], fpr[-1] = 0.0, self.above, self.at_or_above, self.num_normal
        pro[0], pro[1], pro[3:-1:2], pro[2:-1:2], pro[-1] = 0.0, 0.0, self.overlap[:-1], self.overlap, 1.0
        return fpr / self.num_normal, pro

    def aupro(self, fpr_limit: float) -> float:
        fpr, pro = self.pro()
        inside = int(np.searchsorted(fpr, fpr_limit, side="right"))
        area = float(np.sum(0.5 * (pro[1:inside] + pro[: inside - 1]) * np.diff(fpr[:inside])))
        if inside < fpr.size:
            left, right = inside - 1, inside
            slope = (pro[right] - pro[left]) / (fpr[right] - fpr[left])
            width = fpr_limit - fpr[left]
            area += float(width * (pro[left] + 0.5 * slope * width))
        return min(area / fpr_limit, 1.0)


def _split_pixels(
    masks: Stack, maps: Stack, regions: bool, inside: Sequence[NDArray[np.bool_] | None] | None = None
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float64]]:
    """Scores of normal pixels, scores of anomalous pixels, and each anomalous pixel's share of the PRO.

    inside: the pixels that count, beyond which no mask reaches.
    """
    if len(masks) != len(maps):
        raise DataError(f"{len(masks)} masks for {len(maps)} maps; expected a mask per map, all-zero for a good image")
    normal, anomalous, region_of = [], [], []
    num_regions = 0
    for index, (mask, scores) in enumerate(zip(masks, maps, strict=True)):
        mask, scores = np.asarray(mask), np.asarray(scores)
        if mask.ndim != 2 or mask.shape != scores.shape:
            raise DataError(f"image {index}: mask {mask.shape} and map {scores.shape}; expected two of one (H, W)")
        if mask.dtype != np.bool_ and not np.issubdtype(mask.dtype, np.integer):
            raise DataError(f"image {index}: mask of {mask.dtype}; expected bool or integer, non-zero where anomalous")
        if scores.dtype not in (np.float32, np.float64):
            scores = scores.astype(np.float64)
        if not np.isfinite(scores).all():
            raise DataError(f"image {index}: the map has NaN or infinite values; expected finite scores")
        mask = mask != 0
        counts = None if inside is None else inside[index]
        if not mask.any():
            normal.append(scores.ravel() if counts is None else scores[counts])
            continue
        normal.append(scores[~mask] if counts is None else scores[~mask & counts])
        anomalous.append(scores[mask])
        if regions:
            labelled, count = ndimage.label(mask, structure=_EIGHT_CONNECTED)
            region_of.append(labelled[mask].astype(np.int64) - 1 + num_regions)
            num_regions += count
    if not anomalous:
        raise DataError("no anomalous pixel in any mask; pixel metrics need both classes, so skip them for this set")
    normal_scores, anomalous_scores = np.concatenate(normal), np.concatenate(anomalous)
    if not normal_scores.size:
        raise DataError("no normal pixel in any mask; pixel metrics need both classes, so skip them for this set")
    if normal_scores.dtype != anomalous_scores.dtype:
        normal_scores, anomalous_scores = normal_scores.astype(np.float64), anomalous_scores.astype(np.float64)
    if not regions:
        return normal_scores, anomalous_scores, np.empty(0)
    joined = np.concatenate(region_of)
    return normal_scores, anomalous_scores, (1.0 / (np.bincount(joined) * num_regions))[joined]


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


def _of_pixels(function: Callable[[_PixelCurve], float]) -> Callable[[Measured], float | None]:
    return lambda measured: None if measured.curve is None else function(measured.curve)


def _share_called_bad(label: int) -> Callable[[Measured], float | None]:
    def share(measured: Measured) -> float | None:
        scores = measured.scores[measured.labels == label]
        return float(is_above(scores, measured.threshold).mean()) if len(scores) else None

    return share


IMAGE_AUROC = Metric("image AUROC", _of_images(image_auroc), "with_normals")
IMAGE_AVERAGE_PRECISION = Metric("image AP", _of_images(average_precision))
IMAGE_F1_MAX = Metric("image F1-max", _of_images(lambda labels, scores: f1_max(labels, scores)[0]))
PIXEL_AUROC = Metric("pixel AUROC", _of_pixels(_PixelCurve.auroc), "alone")
PIXEL_AVERAGE_PRECISION = Metric("pixel AP", _of_pixels(_PixelCurve.average_precision), "alone")
AUPRO_03 = Metric("AUPRO 0.3", _of_pixels(lambda curve: curve.aupro(0.3)), "alone")
AUPRO_005 = Metric("AUPRO 0.05", _of_pixels(lambda curve: curve.aupro(0.05)), "alone")
FALSE_POSITIVE_RATE = Metric("FPR at threshold", _share_called_bad(0), higher_is_better=False)
RECALL = Metric("recall at threshold", _share_called_bad(1), "alone")
