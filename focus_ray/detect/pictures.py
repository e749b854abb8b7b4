"""Module that draws the result of an inspection: heat map, overlay, overlay with a strip of text, mask, and encoded map values.

An overlay is the image under a transparent heat map, with outlined anomalous regions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from focus_ray.data.images import decode_image
from focus_ray.detect.inspection import Inspection, resize_anomaly_map
from focus_ray.drawing.overlay import draw_heat_map, draw_heat_map_overlay
from focus_ray.drawing.png import encode_png
from focus_ray.drawing.strip import add_text_strip, enlarge_narrow_image
from focus_ray.metrics.evaluate import compute_evaluation_size

Output = Literal["json", "heatmap", "overlay", "mask"]
MAX_SIDE_PX = 1024  # of heat maps and overlays; a mask has the size of the image


def compute_overlay_size(width: int, height: int) -> tuple[int, int]:
    """Returns the (width, height) of the heat map and overlay: the image's size, reduced to at most `MAX_SIDE_PX`."""
    rows, columns = compute_evaluation_size(height, width, MAX_SIDE_PX)
    return columns, rows


def draw_inspection_overlay(image: NDArray[np.uint8], inspection: Inspection, scale: float = 1.0) -> NDArray[np.uint8]:
    """Draws the heat map of an inspection over the image (H, W, 3), and outlines the anomalous regions.

    Args:
        image: (H, W, 3) uint8, RGB, the inspected image at any size.
        scale: size of `image` divided by the size of the inspected image.

    Returns: (H, W, 3) uint8.
    """
    boxes = [
        (int(r.x * scale), int(r.y * scale), max(1, round(r.width * scale)), max(1, round(r.height * scale)))
        for r in inspection.regions
    ]
    full_map = resize_anomaly_map(inspection.anomaly_map, *image.shape[:2])
    return draw_heat_map_overlay(image, full_map, inspection.pixel_threshold, boxes)


def draw_overlay_with_strip(data: bytes, inspection: Inspection) -> bytes:
    """Draws the overlay of an image with a strip below it that shows verdict, score, threshold, p-value and colour scale.

    Args: data: content of the encoded image file.

    Returns: a PNG with the overlay at the top left. An image that is narrower than `strip.MIN_WIDTH_PX` is enlarged.

    Raises: DataError: the image cannot be decoded.
    """
    image = decode_image(data, None)
    enlarged = enlarge_narrow_image(image)
    text = (
        f"score {inspection.score:.4g}, threshold {inspection.threshold:.4g} "
        f"({inspection.score_to_threshold:.3g} times), p-value {inspection.p_value:.3g}"
    )
    picture = draw_inspection_overlay(enlarged, inspection, len(enlarged) / len(image))
    return encode_png(add_text_strip(picture, inspection.verdict, text, inspection.pixel_threshold), drawn=True)


def draw_inspection_png(output: Output, inspection: Inspection, data: bytes | NDArray[np.uint8]) -> bytes:
    """Draws an inspection as a PNG.

    Heat map and overlay have at most `MAX_SIDE_PX` a side. A mask has the size of the inspected image and is white where the
    anomaly map is above the pixel threshold.

    Args:
        output: what to draw; any value except "mask" and "heatmap" draws the overlay.
        data: the inspected image, only used for an overlay: content of an encoded file, or (H, W, 3) uint8 RGB.

    Raises: DataError: an overlay is requested, and the encoded image cannot be decoded.
    """
    width, height = compute_overlay_size(inspection.width, inspection.height)
    anomaly_map, threshold = inspection.anomaly_map, inspection.pixel_threshold
    if output == "mask":
        return encode_png(resize_anomaly_map(anomaly_map, inspection.height, inspection.width) > threshold, drawn=True)
    if output == "heatmap":
        return encode_png(draw_heat_map(resize_anomaly_map(anomaly_map, height, width), 0.0, 2 * threshold), drawn=True)
    pixels = decode_image(data, None) if isinstance(data, bytes) else data
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    return encode_png(draw_inspection_overlay(np.asarray(image), inspection, width / inspection.width), drawn=True)


class EncodedAnomalyMap(NamedTuple):
    """An anomaly map as an 8-bit grey PNG; a pixel value v means `high * v / 255`."""

    png: bytes
    high: float


def encode_anomaly_map(inspection: Inspection) -> EncodedAnomalyMap:
    """Encodes the anomaly map of an inspection as an 8-bit PNG.

    Returns: the PNG and `high`, the map value of white: twice the pixel threshold, or the maximum of the map if this is larger.
    """
    anomaly_map = inspection.anomaly_map
    high = max(2 * inspection.pixel_threshold, float(anomaly_map.max()), 1e-12)
    values = np.clip(np.round(anomaly_map * (255 / high)), 0, 255).astype(np.uint8)
    return EncodedAnomalyMap(encode_png(values, drawn=True), high)
