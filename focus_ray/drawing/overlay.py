"""Draws heat maps, overlays of a heat map on its image, and outlines of masks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

Box = tuple[int, int, int, int]
"""x, y, width and height in pixels."""

# dark blue, violet, red, orange, pale yellow: the luminance rises steadily, so the map is readable without colour too
_HEAT_COLOURS = np.array([[8, 6, 60], [96, 20, 120], [196, 50, 70], [250, 150, 30], [255, 250, 190]], dtype=np.float64)


def draw_heat_map(values: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    """Colours values (H, W) as RGB (H, W, 3) uint8, from dark at `low` and below to light at `high` and above."""
    position = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(_HEAT_COLOURS) - 1)
    index = np.minimum(position.astype(int), len(_HEAT_COLOURS) - 2)
    fraction = (position - index)[..., None]
    return (_HEAT_COLOURS[index] * (1 - fraction) + _HEAT_COLOURS[index + 1] * fraction).astype(np.uint8)


def draw_heat_map_overlay(
    image: NDArray[np.uint8], anomaly_map: NDArray[np.float32], threshold: float, boxes: Iterable[Box]
) -> NDArray[np.uint8]:
    """Draws the heat map over an image (H, W, 3) and outlines boxes. Returns (H, W, 3) uint8.

    Args:
        anomaly_map: (H, W).
        threshold: pixel threshold, which has the colour in the middle of the scale.
    """
    colours = draw_heat_map(anomaly_map, 0.0, 2 * threshold)
    weight = np.clip(anomaly_map / (2 * threshold), 0.05, 0.6)[..., None]
    picture = Image.fromarray((image * (1 - weight) + colours * weight).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    line = max(1, round(min(image.shape[:2]) / 160))
    for x, y, width, height in boxes:
        draw.rectangle([(x, y), (x + width - 1, y + height - 1)], outline=(0, 255, 255), width=line)
    return np.asarray(picture)


def draw_mask_outline(picture: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Returns a copy of a picture (H, W, 3) with the outline of a mask (H, W).

    The outline is black inside the mask and white outside, so that it is visible on every colour.
    """
    outlined = picture.copy()
    neighbourhood = np.ones((3, 3), dtype=bool)
    outlined[mask & ~ndimage.binary_erosion(mask, neighbourhood, border_value=1)] = 0
    outlined[ndimage.binary_dilation(mask, neighbourhood) & ~mask] = 255
    return outlined
