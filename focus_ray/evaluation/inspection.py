"""What is known of an image that was inspected: score, verdict, map at the image's own size, and the areas in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage


@dataclass(frozen=True)
class Region:
    """A connected area of the map above the pixel threshold.

    x, y, width, height: bounding box, pixels of the original image.  area: pixels.  peak: highest value of the map in it.
    """

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float

    def to_dict(self) -> dict[str, float]:
        return dict(vars(self))


@dataclass(frozen=True)
class Inspection:
    """What is known of one image.

    score: higher is more anomalous.  p_value: conformal, see docs/learn/verdicts.md.  anomalous: the verdict.
    threshold: of the score.  pixel_threshold: of the map.  anomaly_map: (H, W), the image at the size at which it was scored,
    which for model.resize=stretch need not have its shape.  regions: in pixels of the original, width x height.
    trained_on: whether it is one of the images that the density was made of, so that its score says nothing of new parts.
    """

    score: float
    p_value: float
    anomalous: bool
    threshold: float
    pixel_threshold: float
    anomaly_map: NDArray[np.float32]
    width: int
    height: int
    regions: tuple[Region, ...]
    trained_on: bool = False

    @property
    def verdict(self) -> Literal["normal", "anomalous"]:
        return "anomalous" if self.anomalous else "normal"

    @property
    def score_to_threshold(self) -> float:
        """What can be compared between versions, whose scores are on scales of their own."""
        return self.score / max(self.threshold, 1e-12)

    def without_map(self) -> Inspection:
        """Small enough to be sent about: its map has no place."""
        return replace(self, anomaly_map=np.empty((0, 0), np.float32))

    def scaled(self, factor: float) -> Inspection:
        """With its regions in pixels of a picture `factor` times as large."""
        regions = tuple(
            replace(
                region,
                x=int(region.x * factor),
                y=int(region.y * factor),
                width=max(1, round(region.width * factor)),
                height=max(1, round(region.height * factor)),
            )
            for region in self.regions
        )
        return replace(self, regions=regions)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; without the map."""
        return {
            "score": self.score,
            "p_value": self.p_value,
            "anomalous": self.anomalous,
            "threshold": self.threshold,
            "pixel_threshold": self.pixel_threshold,
            "width": self.width,
            "height": self.height,
            "regions": [region.to_dict() for region in self.regions],
            **({"trained_on": True} if self.trained_on else {}),
        }


def find_regions(anomaly_map: NDArray[np.float32], threshold: float, width: int, height: int) -> tuple[Region, ...]:
    """Connected areas (8 neighbours) above the threshold, highest peak first, in pixels of a width x height image."""
    full = resize_map(anomaly_map, height, width)
    numbered, _ = ndimage.label(full > threshold, structure=np.ones((3, 3)))
    regions = []
    for number, box in enumerate(ndimage.find_objects(numbered), start=1):
        inside = numbered[box] == number
        rows, columns = box
        regions.append(
            Region(
                x=int(columns.start),
                y=int(rows.start),
                width=int(columns.stop - columns.start),
                height=int(rows.stop - rows.start),
                area=int(inside.sum()),
                peak=float(full[box][inside].max()),
            )
        )
    return tuple(sorted(regions, key=lambda region: -region.peak))


def resize_map(anomaly_map: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """(H, W) -> (height, width), bilinear."""
    if anomaly_map.shape == (height, width):
        return anomaly_map
    resized = F.interpolate(torch.from_numpy(anomaly_map)[None, None], size=(height, width), mode="bilinear")
    return resized[0, 0].numpy()
