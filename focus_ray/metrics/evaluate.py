"""Computes all metrics of one category on its labelled test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from focus_ray.errors import DataError
from focus_ray.metrics.metrics import MeasuredImages, Metric, UnavailableMaps
from focus_ray.metrics.pixels import PixelBins
from focus_ray.settings.kinds import METRICS

MAX_SIDE_PX = 512  # maps and masks of larger images are compared at a reduced size
EXACT_PIXELS = 128_000_000  # a category with more pixels is counted in bins; a pixel takes 5 bytes, 15 during metrics
_IMAGES_PER_MERGE = 32  # merging the bins of many images takes as long as merging the bins of one


class LabelledImages(NamedTuple):
    """Scored labelled images of one category, in the order of their records, without images that the model was trained on.

    Attributes:
        measured: labels, scores, masks and maps of the N images.
        types: N defect types.
        numbers: (N,) int64, number of each image among all records.
        reduced: whether maps are smaller than their images.
        num_trained_on: number of omitted images. The model was trained on them, so their scores say nothing about new parts.
        num_repeats: number of images that are almost equal to a training image: photographs of the same part.
    """

    measured: MeasuredImages
    types: tuple[str, ...]
    numbers: NDArray[np.int64]
    reduced: bool
    num_trained_on: int = 0
    num_repeats: int = 0

    @property
    def good_scores(self) -> NDArray[np.float64]:
        """Scores of the good images."""
        return self.measured.scores[self.measured.labels == 0]


@dataclass(frozen=True)
class EvaluationPart:
    """Scores of some labelled images of a category, with pixels counted in bins. `join_evaluation_parts` joins several parts.

    Attributes:
        labels: (N,) int8.
        scores: (N,).
        types: N defect types.
        bins: pixel counts by defect type, "" for good images; without images that the model was trained on.
        trained_on: (N,) bool, whether the model was trained on the image.
        reduced, num_repeats: as in `LabelledImages`.
    """

    labels: NDArray[np.int8]
    scores: NDArray[np.float64]
    types: tuple[str, ...]
    bins: Mapping[str, PixelBins]
    reduced: bool
    trained_on: NDArray[np.bool_]
    num_repeats: int = 0


class EvaluationCollector:
    """Collects labelled images while they are scored.

    Stores maps and masks up to a number of pixels. Beyond this number, counts the pixels of all images in bins.
    """

    def __init__(self, exact_pixels: int) -> None:
        """Args: exact_pixels: largest total number of pixels of the stored maps."""
        self.labels: list[int] = []
        self.scores: list[float] = []
        self.types: list[str] = []
        self.trained_on: list[bool] = []
        self.reduced = False
        self.num_repeats = 0
        self._remaining_pixels = exact_pixels
        self._stored_images: list[tuple[NDArray[np.float32], NDArray[np.bool_] | None, NDArray[np.bool_] | None]] = []
        self._bins: dict[str, PixelBins] | None = None
        self._unmerged_bins: list[tuple[str, PixelBins]] = []

    @property
    def binned(self) -> bool:
        """Whether pixels are counted in bins."""
        return self._bins is not None

    def add(
        self,
        label: int,
        kind: str,
        score: float,
        anomaly_map: NDArray[np.float32],
        mask: NDArray[np.bool_] | None,
        inside: NDArray[np.bool_] | None,
        trained_on: bool = False,
    ) -> None:
        """Adds an image.

        Args:
            label: 0 normal, 1 anomalous.
            kind: defect type.
            mask: (H, W) bool; None: unknown, then the image counts in image metrics only.
            inside: (H, W) bool, pixels that count; None: all.
            trained_on: whether the model was trained on this image.

        Raises: DataError: pixels are counted in bins, and sizes differ or the map is not finite.
        """
        self.labels.append(int(label))
        self.scores.append(float(score))
        self.types.append(kind)
        self.trained_on.append(trained_on)
        self._remaining_pixels -= anomaly_map.size
        if self._remaining_pixels >= 0:
            self._stored_images.append((anomaly_map, mask, inside))
            return
        if self._bins is None:
            self._bins = {}
            for number, stored_image in enumerate(self._stored_images):
                self._count_in_bins(number, *stored_image)
            self._stored_images.clear()
        self._count_in_bins(len(self.labels) - 1, anomaly_map, mask, inside)

    def _count_in_bins(
        self,
        number: int,
        anomaly_map: NDArray[np.float32],
        mask: NDArray[np.bool_] | None,
        inside: NDArray[np.bool_] | None,
    ) -> None:
        if mask is None or self.trained_on[number]:
            return
        group = self.types[number] if self.labels[number] else ""
        self._unmerged_bins.append((group, PixelBins.of_image(mask, anomaly_map, inside, f"image {number}")))
        if len(self._unmerged_bins) >= _IMAGES_PER_MERGE:
            self._merge_bins()

    def _merge_bins(self) -> dict[str, PixelBins]:
        assert self._bins is not None
        for group in {group for group, _ in self._unmerged_bins}:
            new_bins = [bins for bins_group, bins in self._unmerged_bins if bins_group == group]
            self._bins[group] = PixelBins.total([*([self._bins[group]] if group in self._bins else []), *new_bins])
        self._unmerged_bins.clear()
        return self._bins

    def part(self) -> EvaluationPart:
        """Returns the images as a part with pixels in bins. All images must be in bins."""
        bins = self._merge_bins() if self.binned else {}
        labels, scores = np.asarray(self.labels, dtype=np.int8), np.asarray(self.scores, dtype=np.float64)
        trained_on = np.asarray(self.trained_on, dtype=bool)
        return EvaluationPart(labels, scores, tuple(self.types), bins, self.reduced, trained_on, self.num_repeats)

    def labelled(self, threshold: float) -> LabelledImages:
        """Returns all images that the model was not trained on.

        Args: threshold: image threshold.

        Raises: DataError: the model was trained on all images, or there is no image.
        """
        indices = _untrained_indices(np.asarray(self.trained_on, dtype=bool))
        if self.binned:
            return join_evaluation_parts([self.part()], threshold)
        labels, scores = np.asarray(self.labels, dtype=np.int64), np.asarray(self.scores, dtype=np.float64)
        maps, masks, inside = (list(column) for column in zip(*self._stored_images, strict=True))
        measured = MeasuredImages(labels, scores, masks, maps, threshold, inside)
        num_omitted = len(labels) - len(indices)
        if num_omitted:
            measured = measured.only(~np.asarray(self.trained_on, dtype=bool), [])
        types = tuple(self.types[index] for index in indices)
        return LabelledImages(measured, types, indices, self.reduced, num_omitted, self.num_repeats)


def join_evaluation_parts(parts: Sequence[EvaluationPart], threshold: float) -> LabelledImages:
    """Joins parts of one category, in order, without the images that the model was trained on.

    Args: threshold: image threshold.

    Raises: DataError: the model was trained on all images, or there is no image.
    """
    trained_on = np.concatenate([part.trained_on for part in parts]) if parts else np.zeros(0, dtype=bool)
    indices = _untrained_indices(trained_on)
    groups = {group for part in parts for group in part.bins}
    measured = MeasuredImages(
        labels=np.concatenate([part.labels for part in parts]).astype(np.int64)[indices],
        scores=np.concatenate([part.scores for part in parts])[indices],
        masks=UnavailableMaps(),
        maps=UnavailableMaps(),
        threshold=threshold,
        bins={
            group: PixelBins.total([part.bins[group] for part in parts if group in part.bins])
            for group in sorted(groups)
        },
    )
    all_types = [kind for part in parts for kind in part.types]
    types = tuple(all_types[index] for index in indices)
    num_repeats = sum(part.num_repeats for part in parts)
    is_reduced = any(part.reduced for part in parts)
    num_omitted = len(trained_on) - len(indices)
    return LabelledImages(measured, types, indices, is_reduced, num_omitted, num_repeats)


def _untrained_indices(trained_on: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Returns the indices of the images that the model was not trained on. Raises: DataError: there is no such image."""
    if not len(trained_on):
        raise DataError("there is no test image to evaluate: ingest a data set with test images")
    if trained_on.all():
        raise DataError(
            f"the model was trained on all {len(trained_on)} test images, so their scores are near zero: evaluate with images "
            "that the model has not seen"
        )
    return np.flatnonzero(~trained_on)


def describe_training_images(num_trained_on: int, num_images: int) -> str | None:
    """Returns a sentence about test images that were omitted because the model was trained on them; None if there are none.

    Args:
        num_trained_on: number of omitted images.
        num_images: number of all test images, including the omitted ones.
    """
    if not num_trained_on:
        return None
    return (
        f"The model was trained on {num_trained_on} of {num_images} test images. They are left out of all metrics, because their "
        "scores say nothing about new parts."
    )


def compute_metrics_of_arrays(
    labels: Sequence[int],
    types: Sequence[str],
    scores: Sequence[float],
    maps: Sequence[NDArray[np.float32]],
    masks: Sequence[NDArray[np.bool_] | None],
    threshold: float,
    target_fpr: float,
) -> dict[str, Any]:
    """Computes `compute_metrics` from arrays.

    Args:
        labels, types, scores, maps, masks: one entry for each image. A mask of None means unknown: such an image counts in
            image metrics only.
        threshold: image threshold.
    """
    measured = MeasuredImages(
        np.asarray(labels, dtype=np.int64), np.asarray(scores, dtype=np.float64), masks, maps, float(threshold)
    )
    return compute_metrics(measured, types, target_fpr)


def compute_metrics(measured: MeasuredImages, types: Sequence[str], target_fpr: float) -> dict[str, Any]:
    """Computes all metrics of one category.

    Returns: metric values by key, counts of images, 'threshold', 'target_fpr', and:
        'defect_types': metrics of each defect type.
        'reasons': metric key (after the defect type, if any) -> why the metric failed, such as masks that cover whole images.
        'binned': whether pixels were counted in bins.
        'bounds': metric key -> largest difference between the binned and the exact value.
        A metric is None if it failed, or if the set lacks a class or masks.
    """
    reasons: dict[str, str] = {}
    labels = measured.labels
    result: dict[str, Any] = {
        "num_normal": int((labels == 0).sum()),
        "num_anomalous": int((labels == 1).sum()),
        "num_masks": measured.num_masks,
        "threshold": measured.threshold,
        "target_fpr": float(target_fpr),
        "binned": measured.bins is not None,
        **{key: _value_or_reason(METRICS[key], measured, reasons, key) for key in METRICS},
        "bounds": _bounds(measured, list(METRICS)),
    }
    kinds = np.array([kind if label else "" for kind, label in zip(types, labels.tolist(), strict=True)], dtype=object)
    result["defect_types"] = {
        str(kind): _metrics_of_type(measured, kinds == kind, str(kind), reasons)
        for kind in sorted(set(kinds[labels == 1]))
    }
    return {**result, "reasons": reasons}


def _value_or_reason(metric: Metric, measured: MeasuredImages, reasons: dict[str, str], where: str) -> float | None:
    """Returns the value of a metric. If the metric fails, returns None and stores the reason under the key `where`."""
    try:
        return metric.value(measured)
    except DataError as error:
        reasons[where] = str(error)
        return None


def _bounds(measured: MeasuredImages, keys: Sequence[str]) -> dict[str, float]:
    """Returns the error bounds of pixel metrics on binned pixels, by key; without metrics that have no value."""
    bounds: dict[str, float] = {}
    for key in keys:
        bound = METRICS[key].bound
        value = (
            None if bound is None or measured.bins is None else _value_or_reason(Metric(key, bound), measured, {}, key)
        )
        if value is not None:
            bounds[key] = value
    return bounds


def _metrics_of_type(
    measured: MeasuredImages, chosen: NDArray[np.bool_], kind: str, reasons: dict[str, str]
) -> dict[str, Any]:
    """Computes the metrics of one defect type. chosen: (N,), which images have this type."""
    parts = {
        "alone": measured.only(chosen, [kind]),
        "with_normals": measured.only(chosen | (measured.labels == 0), [kind, ""]),
    }
    type_metrics = {key: METRICS[key] for key in METRICS if METRICS[key].per_defect}
    bounded_keys = [key for key, metric in type_metrics.items() if metric.per_defect == "alone"]
    return {
        "num_images": int(chosen.sum()),
        **{
            key: _value_or_reason(metric, parts[metric.per_defect], reasons, f"{kind}: {key}")
            for key, metric in type_metrics.items()
        },
        "bounds": _bounds(parts["alone"], bounded_keys),
    }


def evaluation_size(height: int, width: int, max_side_px: int) -> tuple[int, int]:
    """Returns height and width at which a map and a mask are compared: the image size, but at most `max_side_px` a side."""
    scale = min(1.0, max_side_px / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
