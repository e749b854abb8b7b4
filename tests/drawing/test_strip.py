"""The strip of an overlay lies below the picture, is readable for narrow and wide pictures, and shows the verdict."""

from __future__ import annotations

import numpy as np
import pytest

from focus_ray.detect.inspection import Inspection, find_regions
from focus_ray.drawing.strip import MIN_WIDTH_PX, overlay_with_strip
from focus_ray.evaluation.report import heat_map, overlay


def inspection_of(width: int, height: int, anomalous: bool = True) -> Inspection:
    anomaly_map = np.zeros((16, 16), np.float32)
    anomaly_map[4:8, 4:8] = 3.0
    regions = find_regions(anomaly_map, 2.0, width, height)
    return Inspection(3.5, 0.01, anomalous, 2.5, 2.0, anomaly_map, width, height, regions)


@pytest.mark.parametrize(
    ("width", "height", "factor"), [(64, 64, 5), (4000, 300, 1), (320, 240, 1), (90, 60, 4), (100, 3000, 1)]
)
def test_the_strip_covers_nothing_of_the_picture(width: int, height: int, factor: int) -> None:
    image = np.full((height, width, 3), 128, np.uint8)
    inspection = inspection_of(width, height)
    picture = overlay_with_strip(image, inspection)
    large = image.repeat(factor, axis=0).repeat(factor, axis=1)
    np.testing.assert_array_equal(
        picture[: height * factor, : width * factor], overlay(large, inspection.scaled(factor)), strict=True
    )
    assert picture.shape[0] >= height * factor + 100
    assert picture.shape[1] == max(width * factor, MIN_WIDTH_PX)


def test_text_grows_with_the_picture() -> None:
    small, large = (
        overlay_with_strip(np.zeros((side, side, 3), np.uint8), inspection_of(side, side)) for side in (400, 4000)
    )
    assert (large.shape[0] - 4000) / 4000 == pytest.approx((small.shape[0] - 400) / 400, rel=0.5)


def test_the_verdict_has_its_colour() -> None:
    image = np.zeros((400, 400, 3), np.uint8)
    bad, good = (overlay_with_strip(image, inspection_of(400, 400, anomalous)) for anomalous in (True, False))
    red, green = np.array([179, 38, 30]), np.array([31, 111, 67])
    assert (bad == red).all(axis=2).any()
    assert not (bad == green).all(axis=2).any()
    assert (good == green).all(axis=2).any()


def test_the_scale_shows_the_heat_maps_colours_from_end_to_end() -> None:
    strip = overlay_with_strip(np.zeros((400, 400, 3), np.uint8), inspection_of(400, 400))[400:]
    for position in (0.1, 0.3, 0.7, 0.9):
        colour = heat_map(np.array([[position]], np.float32), 0.0, 1.0)[0, 0].astype(int)
        assert (np.abs(strip.astype(int) - colour).max(axis=2) <= 4).any(), position
