"""Computes all metrics of one category on its labelled test images.

Pixel metrics are exact up to a total number of pixels. For larger test sets the pixels are counted in bins: a bin counts the
pixels whose scores are almost equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from focus_ray.errors import DataError
from focus_ray.metrics.metrics import ScoredTestImages, UnavailableMaps
from focus_ray.metrics.pixels import PixelBins
from focus_ray.metrics.registry import METRICS

MAX_SIDE_PX = 512  # maps and masks of larger images are compared at a reduced size
EXACT_PIXELS = 128_000_000  # a category with more pixels is counted in bins; a pixel takes 5 bytes, 15 during metrics
_IMAGES_PER_MERGE = 32  # merging the bins of many images takes as long as merging the bins of one


class UnseenTestImages(NamedTuple):
    """The scored test images of one category with labels, without images that the model was trained on.

    Attributes:
        measured: labels, scores, masks and anomaly maps of the N images.
        types: defect type of each image.
        numbers: (N,) int64, position of each image among all test images.
        reduced: whether masks were compared at a reduced size.
        num_trained_on: number of omitted images. The model was trained on them, so their scores say nothing about new parts.
        num_repeats: number of images that are almost equal to a training image: photographs of the same part.
    """

    measured: ScoredTestImages
    types: tuple[str, ...]
    numbers: NDArray[np.int64]
    reduced: bool
    num_trained_on: int = 0
    num_repeats: int = 0

    @property
    def good_scores(self) -> NDArray[np.float64]:
        """The image scores of the good (normal) images."""
        return self.measured.scores[self.measured.labels == 0]


@dataclass(frozen=True)
class WorkerScores:
    """The scores of some test images of a category, for example of one worker, with pixel counts that can be added up.

    Pixels are counted in bins by score: a bin counts the pixels whose scores are almost equal.

    Attributes:
        labels: (N,) int8, 0 normal, 1 anomalous.
        scores: (N,) image scores.
        types: defect type of each image.
        bins: defect type ("" for good images) -> pixel counts; without images that the model was trained on.
        trained_on: (N,) bool, whether the model was trained on the image.
        reduced, num_repeats: as in `UnseenTestImages`.
    """

    labels: NDArray[np.int8]
    scores: NDArray[np.float64]
    types: tuple[str, ...]
    bins: Mapping[str, PixelBins]
    reduced: bool
    trained_on: NDArray[np.bool_]
    num_repeats: int = 0

    def select_unseen_images(self, threshold: float) -> UnseenTestImages:
        """Returns the images that the model was not trained on, as input for the metrics.

        Args: threshold: image threshold; an image with a higher score is called bad.

        Raises: DataError: the model was trained on all images, or there is no image.
        """
        labels, unavailable = self.labels.astype(np.int64), UnavailableMaps()
        bins = dict(sorted(self.bins.items()))  # so that sums do not depend on the order of the images
        measured = ScoredTestImages(labels, self.scores, unavailable, unavailable, threshold, bins=bins)
        return _omit_training_images(self, measured)


class EvaluationCollector:
    """Collects scores, anomaly maps and masks of labelled images while they are scored.

    It stores maps and masks up to a number of pixels. Beyond this number, it counts the pixels of all images in bins by score.
    """

    def __init__(self, exact_pixels: int) -> None:
        """Makes an empty collector.

        Args: exact_pixels: largest total number of pixels of the stored anomaly maps.
        """
        self.labels: list[int] = []
        self.scores: list[float] = []
        self.types: list[str] = []
        self.trained_on: list[bool] = []
        self.reduced = False
        self.num_repeats = 0
        self._exact_pixels, self._num_pixels = exact_pixels, 0
        # map, mask and counted pixels of the latest images; with bins, of the images that are not in the bins yet
        self._images: list[tuple[NDArray[np.float32], NDArray[np.bool_] | None, NDArray[np.bool_] | None]] = []
        self._bins: dict[str, PixelBins] = {}

    @property
    def is_binned(self) -> bool:
        """Whether pixels are counted in bins by score, because the anomaly maps are too many to be stored."""
        return self._num_pixels > self._exact_pixels

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
        """Adds a scored image.

        Args:
            label: 0 normal, 1 anomalous.
            kind: defect type.
            score: image score.
            anomaly_map: (H, W), a score for each pixel.
            mask: (H, W) bool, True at anomalous pixels. None: unknown; then the image counts in image metrics only.
            inside: (H, W) bool, pixels that count; None: all.
            trained_on: whether the model was trained on this image.

        Raises: DataError: pixels are counted in bins, and the sizes of a map and a mask differ or a map is not finite. It may
            name an earlier image, because pixels are counted for many images at once.
        """
        self.labels.append(label)
        self.scores.append(score)
        self.types.append(kind)
        self.trained_on.append(trained_on)
        self._num_pixels += anomaly_map.size
        self._images.append((anomaly_map, mask, inside))
        if self.is_binned and len(self._images) >= _IMAGES_PER_MERGE:
            self._count_in_bins()

    def _count_in_bins(self) -> None:
        """Adds the pixels of the stored images to the bins of their defect types, and deletes their maps and masks.

        Raises: DataError: the sizes of a map and a mask differ, or a map is not finite.
        """
        parts = {group: [bins] for group, bins in self._bins.items()}
        first = len(self.labels) - len(self._images)
        for number, (anomaly_map, mask, inside) in enumerate(self._images, start=first):
            if mask is not None and not self.trained_on[number]:
                group = self.types[number] if self.labels[number] else ""
                bins = PixelBins.from_image(mask, anomaly_map, inside, f"image {number}")
                parts.setdefault(group, []).append(bins)
        self._bins = {group: PixelBins.merge(bins) for group, bins in parts.items()}
        self._images.clear()

    def get_worker_scores(self) -> WorkerScores:
        """Returns the collected images for a merge with other workers. It has bins only if pixels are counted in bins.

        Raises: DataError: as `add`.
        """
        if self.is_binned:
            self._count_in_bins()
        return WorkerScores(
            np.asarray(self.labels, dtype=np.int8),
            np.asarray(self.scores, dtype=np.float64),
            tuple(self.types),
            self._bins,
            self.reduced,
            np.asarray(self.trained_on, dtype=bool),
            self.num_repeats,
        )

    def select_unseen_images(self, threshold: float) -> UnseenTestImages:
        """Returns all images that the model was not trained on, as input for the metrics.

        Args: threshold: image threshold; an image with a higher score is called bad.

        Raises: DataError: the model was trained on all images, or there is no image. Also as `add`.
        """
        part = self.get_worker_scores()
        if self.is_binned or not self.labels:
            return part.select_unseen_images(threshold)
        maps, masks, inside = (list(column) for column in zip(*self._images, strict=True))
        measured = ScoredTestImages(part.labels.astype(np.int64), part.scores, masks, maps, threshold, inside)
        return _omit_training_images(part, measured)


def _omit_training_images(part: WorkerScores, measured: ScoredTestImages) -> UnseenTestImages:
    """Removes the images that the model was trained on, and returns the other images.

    Args:
        part: labels, types and `trained_on` of all images.
        measured: scores, masks and maps of all images of `part`.

    Raises: DataError: no image remains.
    """
    num_images, num_omitted = len(part.labels), int(part.trained_on.sum())
    if not num_images:
        raise DataError("there is no test image to evaluate: ingest a data set with test images")
    if num_omitted == num_images:
        raise DataError(
            f"the model was trained on all {num_images} test images, so their scores are near zero: evaluate with images "
            "that the model has not seen"
        )
    numbers = np.flatnonzero(~part.trained_on)
    if num_omitted:
        measured = measured.select_images(~part.trained_on, list(part.bins))
    types = tuple(part.types[number] for number in numbers)
    return UnseenTestImages(measured, types, numbers, part.reduced, num_omitted, part.num_repeats)


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


def compute_metrics(measured: ScoredTestImages, types: Sequence[str], target_fpr: float) -> dict[str, Any]:
    """Computes all metrics of one category, also for each defect type.

    Args:
        measured: the scored images.
        types: defect type of each image.
        target_fpr: false positive rate that the user wants. It is only copied into the result.

    Returns: key of a metric -> value. A value is None if the metric failed, or if the images lack a class or masks. Further
        keys: 'num_normal', 'num_anomalous', 'num_masks', 'threshold', 'target_fpr', and:
        'defect_types': defect type -> its metrics.
        'reasons': key of a metric (after the defect type, if any) -> why the metric failed, such as masks that cover whole
            images.
        'binned': whether pixels were counted in bins.
        'bounds': key of a metric -> largest difference between the binned and the exact value.
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
        **{key: _compute_or_store_reason(METRICS[key].value, measured, reasons, key) for key in METRICS},
        "bounds": _compute_error_bounds(measured, list(METRICS)),
    }
    kinds = np.array([kind if label else "" for kind, label in zip(types, labels.tolist(), strict=True)], dtype=object)
    result["defect_types"] = {
        kind: _compute_defect_type_metrics(measured, kinds == kind, kind, reasons)
        for kind in sorted(set(kinds[labels == 1]))
    }
    return {**result, "reasons": reasons}


def _compute_or_store_reason(
    function: Callable[[ScoredTestImages], float | None],
    measured: ScoredTestImages,
    reasons: dict[str, str],
    where: str,
) -> float | None:
    """Computes a metric. If the metric fails, returns None and stores the reason in `reasons` under the key `where`.

    Args:
        function: computes the metric.
        measured: the scored images.
        reasons: key -> reason; the function may add an entry.
        where: key of the metric.
    """
    try:
        return function(measured)
    except DataError as error:
        reasons[where] = str(error)
        return None


def _compute_error_bounds(measured: ScoredTestImages, keys: Sequence[str]) -> dict[str, float]:
    """Returns key of a pixel metric -> largest error that counting in bins can cause; empty if pixels were not counted in bins.

    Metrics without a value are left out.

    Args:
        measured: the scored images.
        keys: keys of metrics.
    """
    if measured.bins is None:
        return {}
    functions = {key: METRICS[key].bound for key in keys}
    values = {key: bound and _compute_or_store_reason(bound, measured, {}, key) for key, bound in functions.items()}
    return {key: value for key, value in values.items() if value is not None}


def _compute_defect_type_metrics(
    measured: ScoredTestImages, chosen: NDArray[np.bool_], kind: str, reasons: dict[str, str]
) -> dict[str, Any]:
    """Computes the metrics of one defect type.

    Args:
        measured: all scored images.
        chosen: (N,) bool, True for images of this type.
        kind: the defect type.
        reasons: key -> why a metric failed; the function may add entries.
    """
    parts = {
        "alone": measured.select_images(chosen, [kind]),
        "with_normals": measured.select_images(chosen | (measured.labels == 0), [kind, ""]),
    }
    places = {key: METRICS[key].per_defect for key in METRICS if METRICS[key].per_defect}
    values = {
        key: _compute_or_store_reason(METRICS[key].value, parts[place], reasons, f"{kind}: {key}")
        for key, place in places.items()
    }
    bounds = _compute_error_bounds(parts["alone"], [key for key, place in places.items() if place == "alone"])
    return {"num_images": int(chosen.sum()), **values, "bounds": bounds}


def compute_evaluation_size(height: int, width: int, max_side_px: int) -> tuple[int, int]:
    """Returns the height and width at which a map and a mask are compared: the image size, at most `max_side_px` a side."""
    scale = min(1.0, max_side_px / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
