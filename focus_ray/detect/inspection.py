"""Module for the result of the inspection of an image: score, verdict, anomaly map and anomalous regions."""

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
    """A connected area of the anomaly map above the pixel threshold.

    Attributes:
        x, y, width, height: bounding box in pixels of the original image.
        area: number of pixels.
        peak: highest value of the map in the area.
    """

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float

    def to_dict(self) -> dict[str, float]:
        """Returns a dictionary: name of an attribute -> value."""
        return dict(vars(self))


@dataclass(frozen=True, repr=False)
class Inspection:
    """Result of the inspection of one image.

    Attributes:
        score: higher is more anomalous.
        p_value: conformal p-value: about the share of good images that score at least as high, see docs/learn/verdicts.md.
        anomalous: the verdict: whether the score is above the threshold.
        threshold: image threshold.
        pixel_threshold: threshold of the anomaly map.
        anomaly_map: (H, W), at the size at which the image was scored. With model.resize=stretch, the aspect ratios of map and
            image may differ.
        width, height: size of the original image in pixels.
        regions: areas of the map above `pixel_threshold`, in pixels of the original image.
        trained_on: whether the model was trained on this image. Its score then says nothing about new parts.
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
        """The verdict as a word: "normal" or "anomalous"."""
        return "anomalous" if self.anomalous else "normal"

    @property
    def score_to_threshold(self) -> float:
        """Score divided by threshold. Between versions of a model, this ratio is comparable, but scores are not."""
        return self.score / max(self.threshold, 1e-12)

    def __repr__(self) -> str:
        """Returns one line with verdict, score, threshold, p-value and number of regions; the map is left out."""
        num_regions = f"{len(self.regions)} region{'' if len(self.regions) == 1 else 's'}"
        return (
            f"Inspection({self.verdict}: score {self.score:.4g}, {self.score_to_threshold:.2f} times the threshold "
            f"{self.threshold:.4g}, p-value {self.p_value:.3g}, {num_regions})"
        )

    def copy_without_map(self) -> Inspection:
        """Returns a copy with an empty map, which is small enough to send between processes."""
        return replace(self, anomaly_map=np.empty((0, 0), np.float32))

    def to_dict(self) -> dict[str, Any]:
        """Returns all attributes, by name, as JSON types. The map is left out, and `trained_on` too if it is False."""
        tree = {**vars(self), "regions": [region.to_dict() for region in self.regions]}
        del tree["anomaly_map"]
        if not self.trained_on:
            del tree["trained_on"]
        return tree


def find_regions(anomaly_map: NDArray[np.float32], threshold: float, width: int, height: int) -> tuple[Region, ...]:
    """Finds connected areas of an anomaly map above a threshold. Pixels are connected with their 8 neighbours.

    Args:
        anomaly_map: (H, W).
        width, height: size of the original image in pixels; the map is resized to this size first.

    Returns: the regions in pixels of the original image, highest peak first.
    """
    full_map = resize_anomaly_map(anomaly_map, height, width)
    numbered_areas, _ = ndimage.label(full_map > threshold, structure=np.ones((3, 3)))
    regions = []
    for number, box in enumerate(ndimage.find_objects(numbered_areas), start=1):
        inside = numbered_areas[box] == number
        (top, left), (height, width) = (edge.start for edge in box), inside.shape
        regions.append(Region(left, top, width, height, int(inside.sum()), float(full_map[box][inside].max())))
    return tuple(sorted(regions, key=lambda region: -region.peak))


def resize_anomaly_map(anomaly_map: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Resizes a map (H, W) to (height, width) with bilinear interpolation."""
    if anomaly_map.shape == (height, width):
        return anomaly_map
    resized = F.interpolate(torch.from_numpy(anomaly_map)[None, None], size=(height, width), mode="bilinear")
    return resized[0, 0].numpy()
