"""Draws an inspection as a PNG (heat map, overlay or mask), or encodes the anomaly map for programs that draw it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from focus_ray.data.images import decode_image, encode_png
from focus_ray.detect.inspection import Inspection, resize_map
from focus_ray.evaluation.report import heat_map, overlay
from focus_ray.metrics.evaluate import evaluation_size

Output = Literal["json", "heatmap", "overlay", "mask"]
MAX_SIDE_PX = 1024  # of heat maps and overlays; a mask has the size of the image


def picture_size(width: int, height: int) -> tuple[int, int]:
    """Returns the (width, height) in pixels of the heat map and overlay of an image of `width` x `height` pixels."""
    rows, columns = evaluation_size(height, width, MAX_SIDE_PX)
    return columns, rows


def draw(output: Output, inspection: Inspection, data: bytes | NDArray[np.uint8]) -> bytes:
    """Draws an inspection as a PNG.

    Heat map and overlay have at most `MAX_SIDE_PX` a side. A mask has the size of the image and is white above the pixel
    threshold.

    Args: data: the image under an overlay: an encoded file, or (H, W, 3) RGB.
    """
    width, height = picture_size(inspection.width, inspection.height)
    if output == "mask":
        return encode_png(
            resize_map(inspection.anomaly_map, inspection.height, inspection.width) > inspection.pixel_threshold,
            drawn=True,
        )
    if output == "heatmap":
        return encode_png(
            heat_map(resize_map(inspection.anomaly_map, height, width), 0.0, 2 * inspection.pixel_threshold), drawn=True
        )
    from PIL import Image

    pixels = decode_image(data, None) if isinstance(data, bytes) else data
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    scale = width / inspection.width
    return encode_png(overlay(np.asarray(image), inspection.scaled(scale)), drawn=True)


class MapValues(NamedTuple):
    """An anomaly map as an 8-bit grey PNG; a pixel value v means `high * v / 255`."""

    png: bytes
    high: float


def map_values(inspection: Inspection) -> MapValues:
    """Encodes the anomaly map; `high` is twice the pixel threshold, or the maximum of the map if this is larger."""
    anomaly_map = inspection.anomaly_map
    high = max(2 * inspection.pixel_threshold, float(anomaly_map.max()), 1e-12)
    return MapValues(
        encode_png(np.clip(np.round(anomaly_map * (255 / high)), 0, 255).astype(np.uint8), drawn=True), high
    )
