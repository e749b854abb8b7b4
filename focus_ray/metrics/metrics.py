"""Metrics of scores and anomaly maps: image and pixel AUROC, average precision, F1-max, AUPRO. Input numpy, output float.

A metric that needs both classes raises DataError if one is missing. The caller decides whether to skip the set or to stop.
The metric never returns a silent 0 or 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from focus_ray.errors import DataError
from focus_ray.metrics.pixels import PixelBins, PixelCurve
from focus_ray.metrics.ties import exceeds_threshold


def image_auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Computes the area under the ROC curve of image scores. An anomalous and a normal image with equal scores count half.

    Args:
        labels: (N,), 0 normal or 1 anomalous.
        scores: (N,), higher is more anomalous, any finite range.

    Raises: DataError: lengths differ, a score is NaN or infinite, or the labels are not 0 and 1, each at least once.
    """
    from sklearn.metrics import roc_auc_score  # takes a second to import, and a fit does not need it

    return float(roc_auc_score(*_check_labels_and_scores(labels, scores)))


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Computes the area under the precision-recall curve of image scores, without interpolation (scikit-learn's definition).

    Arguments and errors as for `image_auroc`.
    """
    from sklearn.metrics import average_precision_score  # takes a second to import, and a fit does not need it

    return float(average_precision_score(*_check_labels_and_scores(labels, scores)))


def f1_max(labels: ArrayLike, scores: ArrayLike) -> float:
    """Computes the best F1 score over all thresholds. An image counts as bad if score >= threshold.

    The best threshold depends on the labels of the measured images, so the best F1 is an upper bound for reports.

    Arguments and errors as for `image_auroc`.
    """
    from sklearn.metrics import precision_recall_curve  # takes a second to import, and a fit does not need it

    precision, recall, _ = precision_recall_curve(*_check_labels_and_scores(labels, scores))
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
    return float(f1.max())


class UnavailableMaps(Sequence[Any]):
    """A placeholder for the masks and maps of images whose pixels were counted in bins. Any access raises DataError."""

    def __len__(self) -> int:
        raise DataError(_UNAVAILABLE)

    def __getitem__(self, index: Any) -> Any:
        raise DataError(_UNAVAILABLE)


_UNAVAILABLE = (
    "maps and masks are not available, because the set is too large and its pixels were counted in bins: evaluate fewer images, "
    "or raise the limit with --exact-megapixels"
)


@dataclass(frozen=True)
class ScoredTestImages:
    """The scored test images of one category: the input of a metric.

    Attributes:
        labels: (N,), 0 normal or 1 anomalous.
        scores: (N,) image scores.
        masks: N arrays (H, W) bool. None: the mask of an anomalous image is unknown, and the image counts in image metrics only.
        maps: N anomaly maps (H, W), each as large as its mask.
        threshold: image threshold; an image with a higher score is called bad.
        inside: N arrays (H, W) bool, pixels that count because they lie in the region of interest; None: all.
        bins: defect type ("" for good images) -> counts of pixels by score. With bins, masks and maps are `UnavailableMaps`.
    """

    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    masks: Sequence[NDArray[np.bool_] | None]
    maps: Sequence[NDArray[np.float32]]
    threshold: float
    inside: Sequence[NDArray[np.bool_] | None] | None = None
    bins: Mapping[str, PixelBins] | None = None

    @property
    def has_both_labels(self) -> bool:
        """Whether the images contain at least one normal and one anomalous image."""
        return bool(0 < self.labels.sum() < len(self.labels))

    @property
    def num_masks(self) -> int:
        """The number of anomalous images with a known mask."""
        if self.bins is not None:
            return sum(bins.num_images for kind, bins in self.bins.items() if kind)
        return sum(mask is not None for mask, label in zip(self.masks, self.labels, strict=True) if label)

    @cached_property
    def pixel_curve(self) -> PixelCurve | None:
        """The curve from which all pixel metrics are computed, of all images with a known mask; None without an anomalous pixel.

        It is computed once and cached.

        Raises: DataError: there is no normal pixel, sizes differ, or a map is not finite.
        """
        if self.bins is not None:
            return PixelBins.merge(self.bins.values()).compute_curve()
        return PixelCurve.from_maps(
            *self._select_pixel_data([index for index, mask in enumerate(self.masks) if mask is not None])
        )

    def select_images(self, chosen: NDArray[np.bool_], kinds: Sequence[str]) -> ScoredTestImages:
        """Returns a selection of the images.

        Args:
            chosen: (N,) bool. It must select exactly the images of the defect types `kinds`.
            kinds: defect types; "" means good images.
        """
        images = replace(self, labels=self.labels[chosen], scores=self.scores[chosen])
        if self.bins is not None:
            return replace(images, bins={kind: self.bins[kind] for kind in kinds if kind in self.bins})
        masks, maps, inside = self._select_pixel_data(np.flatnonzero(chosen))
        return replace(images, masks=masks, maps=maps, inside=inside)

    def _select_pixel_data(
        self, indices: Sequence[int] | NDArray[np.int64]
    ) -> tuple[list[Any], list[Any], list[Any] | None]:
        """Returns masks, maps and counted pixels (`inside`) of the images at these positions."""
        masks, maps = [self.masks[index] for index in indices], [self.maps[index] for index in indices]
        return masks, maps, None if self.inside is None else [self.inside[index] for index in indices]


class Metric(NamedTuple):
    """The definition of a metric: its title, its function, and how reports use it.

    The name of a metric in `METRICS` is its key in reports and sweeps.

    Attributes:
        title: name in reports.
        value: function that computes the metric; it returns None if the images lack a class or masks.
        per_defect: whether reports show the metric for each defect type too: "with_normals" on the images of the type and all
            normal images, "alone" on the images of the type only, "" not at all.
        higher_is_better: whether a sweep may maximise the metric.
        bound: function that computes the largest error of the metric if pixels are counted in bins; None for a metric without
            pixels, or one that needs the maps themselves.
    """

    title: str
    value: Callable[[ScoredTestImages], float | None]
    per_defect: Literal["", "with_normals", "alone"] = ""
    higher_is_better: bool = True
    bound: Callable[[ScoredTestImages], float | None] | None = None


def _check_labels_and_scores(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Checks labels (N,) and scores (N,), and returns them as arrays. Raises: DataError: see `image_auroc`."""
    truth, values = np.asarray(labels, dtype=np.int64), np.asarray(scores, dtype=np.float64)
    if truth.shape != values.shape:
        raise DataError(f"labels {truth.shape} and scores {values.shape}; expected one label per score")
    if not np.isfinite(values).all():
        raise DataError(f"scores contain {values[~np.isfinite(values)][0]}; expected finite numbers")
    if set(truth.tolist()) != {0, 1}:
        raise DataError(f"the labels are {sorted(set(truth.tolist()))}; expected normal (0) and anomalous (1) images")
    return truth, values


# Entries of the table `focus_ray.metrics.registry.METRICS`


def _make_image_metric_function(
    function: Callable[[NDArray[Any], NDArray[Any]], float],
) -> Callable[[ScoredTestImages], float | None]:
    """Turns a function of labels and scores into a function of `ScoredTestImages`, which returns None if a class is missing."""
    return lambda measured: function(measured.labels, measured.scores) if measured.has_both_labels else None


def _make_pixel_metric_function(function: Callable[[PixelCurve], float]) -> Callable[[ScoredTestImages], float | None]:
    """Turns a function of a pixel curve into a function of `ScoredTestImages`, which returns None without an anomalous pixel."""
    return lambda measured: None if measured.pixel_curve is None else function(measured.pixel_curve)


def _define_pixel_metric(
    title: str, value: Callable[[PixelCurve], float], bound: Callable[[PixelCurve], float]
) -> Metric:
    """Returns the definition of a pixel metric, which reports also show for each defect type alone.

    Args:
        title: name in reports.
        value: computes the metric from the pixel curve.
        bound: computes the largest error of the metric if pixels are counted in bins.
    """
    return Metric(title, _make_pixel_metric_function(value), "alone", bound=_make_pixel_metric_function(bound))


def _make_share_above_threshold(label: int) -> Callable[[ScoredTestImages], float | None]:
    """Returns a function that computes which share of the images with this label has a score above the threshold.

    The function returns None if no image has the label.
    """

    def compute_share(measured: ScoredTestImages) -> float | None:
        """Returns the share of images above the threshold; None if no image has the label."""
        scores = measured.scores[measured.labels == label]
        return float(exceeds_threshold(scores, measured.threshold).mean()) if len(scores) else None

    return compute_share


IMAGE_AUROC = Metric("image AUROC", _make_image_metric_function(image_auroc), "with_normals")
IMAGE_AVERAGE_PRECISION = Metric("image AP", _make_image_metric_function(average_precision))
IMAGE_F1_MAX = Metric("image F1-max", _make_image_metric_function(f1_max))
PIXEL_AUROC = _define_pixel_metric("pixel AUROC", PixelCurve.auroc, PixelCurve.auroc_bound)
PIXEL_AVERAGE_PRECISION = _define_pixel_metric(
    "pixel AP", PixelCurve.average_precision, PixelCurve.average_precision_bound
)
AUPRO_03 = _define_pixel_metric("AUPRO 0.3", lambda curve: curve.aupro(0.3), lambda curve: curve.aupro_bound(0.3))
AUPRO_005 = _define_pixel_metric("AUPRO 0.05", lambda curve: curve.aupro(0.05), lambda curve: curve.aupro_bound(0.05))
FALSE_POSITIVE_RATE = Metric("FPR at threshold", _make_share_above_threshold(0), higher_is_better=False)
RECALL = Metric("recall at threshold", _make_share_above_threshold(1), "alone")
