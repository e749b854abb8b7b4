"""Computes pixel metrics from masks and anomaly maps, either exactly from all scores or from counts in bins.

A bin counts the pixels whose scores are almost equal. Sorting all scores gives exact metrics, but needs all scores in RAM.
Counts in bins add up over any number of images and workers in a table of a few megabytes. The curve of the bins has one corner
per bin. The exact curve passes through the same corners, so the largest error of each metric can be computed from the bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from focus_ray.errors import DataError

_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)
# of 32 bits of a float32; 13 bits of the fraction remain, so a bin is 1/8192 to 1/16384 of its score wide
_DROPPED_BITS = 10
_SIGN = np.uint32(1 << 31)
_NO_NORMAL = "no normal pixel in any mask; pixel metrics need both classes, so skip them for this set"


class PixelScores(NamedTuple):
    """The scores of the pixels of one image, separated by the mask. Pixels outside the region of interest are left out.

    A region is a connected set of anomalous pixels.

    Attributes:
        normal: (n,) scores of the n normal pixels.
        anomalous: (m,) scores of the m anomalous pixels.
        region: (m,) region number of each anomalous pixel, from 0.
        num_regions: number of regions in the image.
    """

    normal: NDArray[Any]
    anomalous: NDArray[Any]
    region: NDArray[np.int64]
    num_regions: int


def separate_pixels_by_mask(
    mask: NDArray[Any], scores: NDArray[Any], inside: NDArray[np.bool_] | None, name: str
) -> PixelScores:
    """Separates the scores of normal and anomalous pixels of an image, and numbers the connected regions of the mask.

    Args:
        mask: (H, W) bool or integer, non-zero where anomalous.
        scores: (H, W) anomaly map.
        inside: (H, W) bool, pixels that count; None: all.
        name: name of the image for error messages.

    Raises: DataError: sizes differ, or a score is NaN or infinite.
    """
    if mask.shape != scores.shape:
        raise DataError(f"{name}: mask {mask.shape} and map {scores.shape}; expected two of one (H, W)")
    if not np.isfinite(scores).all():
        raise DataError(f"{name}: the map has NaN or infinite values; expected finite scores")
    is_anomalous = mask != 0 if inside is None else (mask != 0) & inside
    is_normal = ~is_anomalous if inside is None else ~is_anomalous & inside
    numbers, num_regions = ndimage.label(is_anomalous, structure=_EIGHT_CONNECTED)
    region = numbers[is_anomalous].astype(np.int64) - 1
    return PixelScores(scores[is_normal], scores[is_anomalous], region, num_regions)


@dataclass(frozen=True)
class PixelCurve:
    """The points of the curves behind all pixel metrics: one per distinct score of an anomalous pixel, highest first.

    Between two such scores only the number of false positives grows, so the curve is flat there. A normal score equal to an
    anomalous score makes one slanted step. So the normal scores, nearly all pixels, need only a plain sort.

    A curve of bins treats all scores in a bin as equal. The `*_bound` methods return the largest difference between a metric of
    the bins and the exact metric.

    Attributes:
        normals_above: (K,) number of normal pixels with a higher score; K is the number of distinct scores.
        normals_at_or_above: (K,) number of normal pixels with this score or a higher one.
        num_found: (K,) number of anomalous pixels with this score or a higher one.
        overlap: (K,) for each connected region of anomalous pixels, the share of pixels with this score or a higher one; the
            mean over all regions.
        num_normal: number of normal pixels.
    """

    normals_above: NDArray[np.int64]
    normals_at_or_above: NDArray[np.int64]
    num_found: NDArray[np.int64]
    overlap: NDArray[np.float64]
    num_normal: int

    @staticmethod
    def from_maps(
        masks: Sequence[NDArray[Any]],
        maps: Sequence[NDArray[Any]],
        inside: Sequence[NDArray[np.bool_] | None] | None = None,
    ) -> PixelCurve | None:
        """Computes the exact curve from the masks and anomaly maps of all images.

        Args: masks, maps, inside: of each image, as in `separate_pixels_by_mask`; inside None: all pixels count.

        Returns: None if there is no anomalous pixel.

        Raises: DataError: sizes differ, a score is NaN or infinite, or there is no normal pixel.
        """
        images = zip(masks, maps, [None] * len(masks) if inside is None else inside, strict=True)
        pixels = [separate_pixels_by_mask(*image, f"image {index}") for index, image in enumerate(images)]
        if not any(image.num_regions for image in pixels):
            return None
        normal = np.concatenate([image.normal for image in pixels])
        if not normal.size:
            raise DataError(_NO_NORMAL)
        anomalous = np.concatenate([image.anomalous for image in pixels])
        # region numbers continue from image to image
        first_regions = np.cumsum([0, *(image.num_regions for image in pixels)])
        regions = np.repeat(first_regions[:-1], [image.region.size for image in pixels])
        regions += np.concatenate([image.region for image in pixels])
        weights = (1.0 / (np.bincount(regions) * first_regions[-1]))[regions]  # of each pixel in the mean overlap
        num_normal = normal.size
        order = np.argsort(anomalous)[::-1]
        anomalous = anomalous[order]
        last = np.flatnonzero(np.append(anomalous[1:] != anomalous[:-1], True))
        ascending = anomalous[last][::-1]  # a search for ascending values passes through memory once
        normal = normal[normal >= ascending[0]]  # lower normal scores do not change the curve
        normal.sort()
        return PixelCurve(
            normals_above=normal.size - np.searchsorted(normal, ascending, side="right")[::-1],
            normals_at_or_above=normal.size - np.searchsorted(normal, ascending, side="left")[::-1],
            num_found=last + 1,
            overlap=np.cumsum(weights[order])[last],
            num_normal=num_normal,
        )

    def auroc(self) -> float:
        """Returns the pixel AUROC: the area under the ROC curve over all pixels of all images. Equal scores count half."""
        recall_steps = np.diff(self.num_found, prepend=0) / self.num_found[-1]
        return float(
            np.sum(recall_steps * (1.0 - (self.normals_above + self.normals_at_or_above) / (2.0 * self.num_normal)))
        )

    def average_precision(self) -> float:
        """Returns the pixel AP: the area under the precision-recall curve over all pixels of all images together."""
        recall_steps = np.diff(self.num_found, prepend=0) / self.num_found[-1]
        return float(np.sum(recall_steps * self.num_found / (self.num_found + self.normals_at_or_above)))

    def compute_pro_curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns the per-region-overlap (PRO) curve: false positive rates and mean overlaps, from (0, 0) to (1, 1).

        `aupro` defines the overlap.
        """
        fpr = np.empty(2 * self.num_found.size + 2)
        pro = np.empty_like(fpr)
        fpr[0], fpr[1:-1:2], fpr[2:-1:2], fpr[-1] = 0.0, self.normals_above, self.normals_at_or_above, self.num_normal
        pro[0], pro[1], pro[3:-1:2], pro[2:-1:2], pro[-1] = 0.0, 0.0, self.overlap[:-1], self.overlap, 1.0
        return fpr / self.num_normal, pro

    def aupro(self, fpr_limit: float) -> float:
        """Returns the area under the per-region-overlap (PRO) curve up to a false positive rate, divided by this rate.

        A region is a connected set of anomalous pixels. The overlap of a region at a threshold is the share of its pixels with a
        score at or above the threshold. PRO is the mean over all regions of all images. The false positive rate is taken over
        all normal pixels of all images. Every distinct score is a threshold. The curve starts at (0, 0) and is integrated by the
        trapezoid rule, with linear interpolation at `fpr_limit`. Regions are 8-connected, as in MVTec's own evaluation code
        (Bergmann et al., MVTec AD, IJCV 2021). Tools with 4-connectivity split diagonal scratches and give other values.

        Args: fpr_limit: the largest false positive rate, in (0, 1].
        """
        fpr, pro = self.compute_pro_curve()
        inside = int(np.searchsorted(fpr, fpr_limit, side="right"))
        area = float(np.sum(0.5 * (pro[1:inside] + pro[: inside - 1]) * np.diff(fpr[:inside])))
        if inside < fpr.size:
            last_inside, first_outside = inside - 1, inside
            slope = (pro[first_outside] - pro[last_inside]) / (fpr[first_outside] - fpr[last_inside])
            width = fpr_limit - fpr[last_inside]
            area += float(width * (pro[last_inside] + 0.5 * slope * width))
        return min(area / fpr_limit, 1.0)

    def auroc_bound(self) -> float:
        """Returns the largest error of `auroc` on bins: normal and anomalous pixels in one bin count as equal."""
        pairs = np.diff(self.num_found, prepend=0) * (self.normals_at_or_above - self.normals_above).astype(np.float64)
        return float(0.5 * pairs.sum() / (float(self.num_found[-1]) * self.num_normal))

    def average_precision_bound(self) -> float:
        """Returns the largest error of `average_precision` on bins: the order of the pixels in a bin is unknown."""
        recall_steps = np.diff(self.num_found, prepend=0) / self.num_found[-1]
        precision = self.num_found / (self.num_found + self.normals_at_or_above)
        all_after = self.num_found / (self.num_found + self.normals_above)
        # from this number of anomalous pixels on, precision is a concave rising function of their number
        first = np.append(0, self.num_found[:-1]) + 1
        all_before = 0.5 * (precision + first / (first + self.normals_at_or_above))
        return float(
            max(np.sum(recall_steps * (all_after - precision)), np.sum(recall_steps * (precision - all_before)))
        )

    def aupro_bound(self, fpr_limit: float) -> float:
        """Returns the largest error of `aupro` on bins: inside a bin, the exact curve may differ from a straight line."""
        bin_start, bin_end = self.normals_above / self.num_normal, self.normals_at_or_above / self.num_normal
        rise = np.diff(self.overlap, prepend=0.0)
        width = np.clip(fpr_limit - bin_start, 0.0, bin_end - bin_start)
        crossed_share = np.divide(width, bin_end - bin_start, out=np.zeros_like(width), where=bin_end > bin_start)
        return float(np.sum(width * rise * (1.0 - 0.5 * crossed_share)) / fpr_limit)


@dataclass(frozen=True)
class PixelBins:
    """The numbers of normal and anomalous pixels by score. The counts of several images add up.

    A bin contains the scores that share the leading 22 bits of a float32, so all bins have about the same relative width, and no
    range is needed. Only bins that contain a pixel have a row: scores over three orders of magnitude have at most 82,000 rows,
    2.3 MB.

    Attributes:
        keys: (K,) uint32, ascending numbers of the K bins.
        normal, anomalous: (K,) number of pixels.
        overlap: (K,) sum over the anomalous pixels in the bin of 1 / (number of pixels in the pixel's connected region).
        num_regions: number of connected regions in all images.
        num_images: number of images with a known mask.
    """

    keys: NDArray[np.uint32]
    normal: NDArray[np.int64]
    anomalous: NDArray[np.int64]
    overlap: NDArray[np.float64]
    num_regions: int = 0
    num_images: int = 0

    @staticmethod
    def from_image(
        mask: NDArray[Any], scores: NDArray[Any], inside: NDArray[np.bool_] | None = None, name: str = "an image"
    ) -> PixelBins:
        """Counts the normal and anomalous pixels of an image by score. Arguments and errors as in `separate_pixels_by_mask`."""
        pixels = separate_pixels_by_mask(mask, scores, inside, name)
        bins = compute_bin_numbers(np.concatenate([pixels.normal, pixels.anomalous]))
        if not bins.size:
            return replace(PixelBins.merge([]), num_images=1)
        # the bins of an image lie close together: counting all bins from the lowest to the highest is faster than sorting
        normal, anomalous = np.split(bins - bins.min(), [pixels.normal.size])
        length = int(bins.max() - bins.min()) + 1
        normal_counts, anomalous_counts = (np.bincount(numbers, minlength=length) for numbers in (normal, anomalous))
        shares = (1.0 / np.bincount(pixels.region))[pixels.region]
        overlap = np.bincount(anomalous, weights=shares, minlength=length).astype(np.float64)
        occupied = np.flatnonzero(normal_counts + anomalous_counts)
        return PixelBins(
            (occupied + bins.min()).astype(np.uint32),
            normal_counts[occupied],
            anomalous_counts[occupied],
            overlap[occupied],
            pixels.num_regions,
            1,
        )

    @staticmethod
    def merge(parts: Iterable[PixelBins]) -> PixelBins:
        """Adds up the counts of several tables of bins."""
        all_bins = list(parts)
        keys = np.unique(np.concatenate([np.empty(0, np.uint32), *(bins.keys for bins in all_bins)]))
        total = PixelBins(keys, np.zeros(keys.size, np.int64), np.zeros(keys.size, np.int64), np.zeros(keys.size))
        for bins in all_bins:
            rows = np.searchsorted(keys, bins.keys)
            total.normal[rows] += bins.normal
            total.anomalous[rows] += bins.anomalous
            total.overlap[rows] += bins.overlap
        regions, images = sum(bins.num_regions for bins in all_bins), sum(bins.num_images for bins in all_bins)
        return replace(total, num_regions=regions, num_images=images)

    def __add__(self, other: PixelBins) -> PixelBins:
        return PixelBins.merge([self, other])

    def compute_curve(self) -> PixelCurve | None:
        """Computes the curve behind all pixel metrics; None if there is no anomalous pixel.

        Raises: DataError: there is no normal pixel.
        """
        anomalous = self.anomalous[::-1]
        if not anomalous.any():
            return None
        if not self.normal.any():
            raise DataError(_NO_NORMAL)
        corners = anomalous > 0
        normals_at_or_above = np.cumsum(self.normal[::-1])
        return PixelCurve(
            normals_above=(normals_at_or_above - self.normal[::-1])[corners],
            normals_at_or_above=normals_at_or_above[corners],
            num_found=np.cumsum(anomalous)[corners],
            overlap=np.cumsum(self.overlap[::-1])[corners] / self.num_regions,
            num_normal=int(normals_at_or_above[-1]),
        )


def compute_bin_numbers(scores: NDArray[Any]) -> NDArray[np.uint32]:
    """Returns the bin number of each score. A higher score never has a lower bin number.

    Args: scores: finite numbers, of any shape.

    Returns: uint32, of the same shape.
    """
    bits = (np.asarray(scores, dtype=np.float32) + np.float32(0.0)).view(np.uint32)  # adding 0 turns -0 into 0
    return np.asarray(np.where(bits & _SIGN, ~bits, bits | _SIGN) >> np.uint32(_DROPPED_BITS))
