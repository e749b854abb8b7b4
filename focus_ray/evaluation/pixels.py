"""Pixels of masks and anomaly maps, and the curve that pixel metrics are read from: of all scores, or of bins that add up.

Sorting all scores gives a metric exactly, and needs them all at once. Counted in bins, images of any number, scored
anywhere, add to a table of some megabytes; the curve then has a corner a bin, the true one runs between the same corners,
and how far a metric may lie from its exact value is computed from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from focus_ray.errors import DataError

Stack = NDArray[Any] | Sequence[NDArray[Any]]
"""(N, H, W), or N arrays of (H, W) that may differ in size."""

_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)
_DROPPED_BITS = (
    10  # of a float32's 32: 13 bits of its fraction are left, so a bin is 1/8192 to 1/16384 of its score wide
)
_SIGN = np.uint32(1 << 31)
_NO_ANOMALOUS = "no anomalous pixel in any mask; pixel metrics need both classes, so skip them for this set"
_NO_NORMAL = "no normal pixel in any mask; pixel metrics need both classes, so skip them for this set"


class ImagePixels(NamedTuple):
    """One image's pixels that count.

    normal: (n,) scores.  anomalous: (m,) scores.  region: (m,), the number of each one's region, from 0; zeros where regions
    were not asked for.  num_regions: in the image.
    """

    normal: NDArray[Any]
    anomalous: NDArray[Any]
    region: NDArray[np.int64]
    num_regions: int


def split_image(
    mask: NDArray[Any], scores: NDArray[Any], inside: NDArray[np.bool_] | None, regions: bool, name: str
) -> ImagePixels:
    """Parts normal from anomalous pixels.

    Args:
        mask: (H, W) bool or integer, non-zero where anomalous.  scores: (H, W).  inside: (H, W), the pixels that count,
            beyond which no mask reaches; None: all.  regions: whether they are told apart.  name: for errors.

    Raises: DataError: sizes differ, a score is NaN or infinite, or the mask is not bool or integer.
    """
    mask, scores = np.asarray(mask), np.asarray(scores)
    if mask.ndim != 2 or mask.shape != scores.shape:
        raise DataError(f"{name}: mask {mask.shape} and map {scores.shape}; expected two of one (H, W)")
    if mask.dtype != np.bool_ and not np.issubdtype(mask.dtype, np.integer):
        raise DataError(f"{name}: mask of {mask.dtype}; expected bool or integer, non-zero where anomalous")
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float64)
    if not np.isfinite(scores).all():
        raise DataError(f"{name}: the map has NaN or infinite values; expected finite scores")
    mask = mask != 0
    if not mask.any():
        normal = scores.ravel() if inside is None else scores[inside]
        return ImagePixels(normal, scores[:0, 0], np.empty(0, np.int64), 0)
    normal = scores[~mask] if inside is None else scores[~mask & inside]
    anomalous = scores[mask]
    if not regions:
        return ImagePixels(normal, anomalous, np.zeros(anomalous.size, np.int64), 0)
    labelled, count = ndimage.label(mask, structure=_EIGHT_CONNECTED)
    return ImagePixels(normal, anomalous, labelled[mask].astype(np.int64) - 1, count)


@dataclass(frozen=True)
class PixelCurve:
    """The curve's corners: one row per distinct score of an anomalous pixel, highest score first.

    Between two such scores only the false positives move, so the curve is flat there, and a normal score equal to an
    anomalous one makes one slanted step. That is why the normal scores (nearly all pixels) need only a plain sort.
    Of bins, scores in one bin are equal; `*_bound` tell how far a metric may be from what their true order gives.
    """

    above: NDArray[np.int64]  # (K,) normal pixels that score higher
    at_or_above: NDArray[np.int64]  # (K,) the same, ties included
    found: NDArray[np.int64]  # (K,) anomalous pixels at or above
    overlap: NDArray[np.float64]  # (K,) mean over regions of the share at or above; zeros if regions were not asked for
    num_normal: int

    @staticmethod
    def of(
        masks: Stack, maps: Stack, regions: bool, inside: Sequence[NDArray[np.bool_] | None] | None = None
    ) -> PixelCurve:
        normal, anomalous, weights = _split_pixels(masks, maps, regions, inside)
        num_normal = normal.size
        order = np.argsort(anomalous)[::-1]
        anomalous = anomalous[order]
        last = np.flatnonzero(np.append(anomalous[1:] != anomalous[:-1], True))
        rising = anomalous[last][::-1]  # in which order a search goes through memory once
        normal = normal[normal >= rising[0]]  # the others are at or above none
        normal.sort()
        return PixelCurve(
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

    def auroc_bound(self) -> float:
        """Each pair of a normal and an anomalous pixel in one bin counts half, and would count 0 or 1."""
        pairs = np.diff(self.found, prepend=0) * (self.at_or_above - self.above).astype(np.float64)
        return float(0.5 * pairs.sum() / (float(self.found[-1]) * self.num_normal))

    def average_precision_bound(self) -> float:
        """Normal pixels of a bin may all come after its anomalous ones, or all before, one anomalous after the other."""
        gained = np.diff(self.found, prepend=0) / self.found[-1]
        here = self.found / (self.found + self.at_or_above)
        all_after = self.found / (self.found + self.above)
        first = np.append(0, self.found[:-1]) + 1  # the precision rises from here as more are found, ever less steeply
        all_before = 0.5 * (here + first / (first + self.at_or_above))
        return float(max(np.sum(gained * (all_after - here)), np.sum(gained * (here - all_before))))

    def aupro_bound(self, fpr_limit: float) -> float:
        """The true curve rises somehow from a bin's lower left corner to its upper right one, this one straight."""
        left, right = self.above / self.num_normal, self.at_or_above / self.num_normal
        rise = np.diff(self.overlap, prepend=0.0)
        width = np.clip(fpr_limit - left, 0.0, right - left)
        part = np.divide(width, right - left, out=np.zeros_like(width), where=right > left)
        return float(np.sum(width * rise * (1.0 - 0.5 * part)) / fpr_limit)


@dataclass(frozen=True)
class PixelBins:
    """Counts of pixels by score, in bins of constant relative width that need no range: they add, image by image.

    A bin is the leading 22 bits of a float32, mapped so that they rise with the score. Only bins that hold a pixel have a
    row: scores of three orders of magnitude have 82,000 at most, 2.3 MB.

    keys: (K,) uint32, ascending.  normal, anomalous: (K,) pixels.  overlap: (K,), of each anomalous pixel, 1 / its region's
    area, added.  num_regions: in all images.  num_images: whose truth is known.
    """

    keys: NDArray[np.uint32]
    normal: NDArray[np.int64]
    anomalous: NDArray[np.int64]
    overlap: NDArray[np.float64]
    num_regions: int = 0
    num_images: int = 0

    @staticmethod
    def of_image(
        mask: NDArray[Any], scores: NDArray[Any], inside: NDArray[np.bool_] | None = None, name: str = "an image"
    ) -> PixelBins:
        """Args and raises as of `split_image`; here a mask may reach beyond `inside`, and is cut."""
        mask = np.asarray(mask) if inside is None else np.asarray(mask) * inside
        pixels = split_image(mask, scores, inside, True, name)
        normal, anomalous = bin_of(pixels.normal), bin_of(pixels.anomalous)
        if not normal.size + anomalous.size:
            return PixelBins(*_NO_ROWS, num_images=1)
        low = min(int(keys.min()) for keys in (normal, anomalous) if keys.size)
        share = (1.0 / np.bincount(pixels.region))[pixels.region] if anomalous.size else np.empty(0)
        length = max(int(keys.max()) for keys in (normal, anomalous) if keys.size) - low + 1
        counts = np.bincount(normal - np.uint32(low), minlength=length)
        bad = np.bincount(anomalous - np.uint32(low), minlength=length)
        overlap = np.bincount(anomalous - np.uint32(low), weights=share, minlength=length)
        held = np.flatnonzero(counts + bad)
        keys = (held + low).astype(np.uint32)
        return PixelBins(keys, counts[held], bad[held], overlap[held].astype(np.float64), pixels.num_regions, 1)

    @staticmethod
    def total(parts: Iterable[PixelBins]) -> PixelBins:
        """The sum of all."""
        found = list(parts)
        keys = np.unique(np.concatenate([_NO_ROWS[0], *(part.keys for part in found)]))
        normal, anomalous = np.zeros(keys.size, np.int64), np.zeros(keys.size, np.int64)
        overlap = np.zeros(keys.size, np.float64)
        for part in found:
            at = np.searchsorted(keys, part.keys)
            normal[at] += part.normal
            anomalous[at] += part.anomalous
            overlap[at] += part.overlap
        regions, images = sum(part.num_regions for part in found), sum(part.num_images for part in found)
        return PixelBins(keys, normal, anomalous, overlap, regions, images)

    def __add__(self, other: PixelBins) -> PixelBins:
        return PixelBins.total([self, other])

    def curve(self) -> PixelCurve | None:
        """None where no anomalous pixel is known. Raises: DataError: there is no normal pixel."""
        bad = self.anomalous[::-1]
        if not bad.any():
            return None
        if not self.normal.any():
            raise DataError(_NO_NORMAL)
        corners = bad > 0
        at_or_above = np.cumsum(self.normal[::-1])
        return PixelCurve(
            above=(at_or_above - self.normal[::-1])[corners],
            at_or_above=at_or_above[corners],
            found=np.cumsum(bad)[corners],
            overlap=np.cumsum(self.overlap[::-1])[corners] / self.num_regions,
            num_normal=int(at_or_above[-1]),
        )


_NO_ROWS = (np.empty(0, np.uint32), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float64))


def bin_of(scores: NDArray[Any]) -> NDArray[np.uint32]:
    """Finite scores of any shape -> the number of each one's bin: a higher score never has a lower number."""
    bits = (np.asarray(scores, dtype=np.float32) + np.float32(0.0)).view(np.uint32)  # -0 becomes 0
    return np.asarray(np.where(bits & _SIGN, ~bits, bits | _SIGN) >> np.uint32(_DROPPED_BITS))


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
        pixels = split_image(mask, scores, None if inside is None else inside[index], regions, f"image {index}")
        normal.append(pixels.normal)
        if pixels.anomalous.size:
            anomalous.append(pixels.anomalous)
            region_of.append(pixels.region + num_regions)
            num_regions += pixels.num_regions
    if not anomalous:
        raise DataError(_NO_ANOMALOUS)
    normal_scores, anomalous_scores = np.concatenate(normal), np.concatenate(anomalous)
    if not normal_scores.size:
        raise DataError(_NO_NORMAL)
    if normal_scores.dtype != anomalous_scores.dtype:
        normal_scores, anomalous_scores = normal_scores.astype(np.float64), anomalous_scores.astype(np.float64)
    if not regions:
        return normal_scores, anomalous_scores, np.empty(0)
    joined = np.concatenate(region_of)
    return normal_scores, anomalous_scores, (1.0 / (np.bincount(joined) * num_regions))[joined]
