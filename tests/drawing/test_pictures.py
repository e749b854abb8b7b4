"""Pictures of an inspection: the strip of an overlay lies below the picture and shows the verdict; outlines are visible."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from focus_ray.detect.inspection import Inspection, find_regions
from focus_ray.detect.pictures import draw_inspection_overlay, draw_overlay_with_strip
from focus_ray.drawing.mark import is_drawn_by_focus_ray
from focus_ray.drawing.overlay import draw_heat_map, draw_mask_outline
from focus_ray.drawing.png import encode_png
from focus_ray.drawing.strip import MIN_WIDTH_PX

RED, GREEN = [179, 38, 30], [31, 111, 67]


def make_inspection(width: int, height: int, anomalous: bool = True) -> Inspection:
    anomaly_map = np.zeros((16, 16), np.float32)
    anomaly_map[4:8, 4:8] = 3.0
    regions = find_regions(anomaly_map, 2.0, width, height)
    return Inspection(3.5, 0.01, anomalous, 2.5, 2.0, anomaly_map, width, height, regions)


def draw_picture(image: NDArray[np.uint8], anomalous: bool = True) -> NDArray[Any]:
    data = draw_overlay_with_strip(encode_png(image), make_inspection(image.shape[1], image.shape[0], anomalous))
    assert is_drawn_by_focus_ray(data)
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(
    ("width", "height", "factor"), [(64, 64, 5), (4000, 300, 1), (320, 240, 1), (90, 60, 4), (100, 3000, 1)]
)
def test_the_strip_covers_nothing_of_the_picture(width: int, height: int, factor: int) -> None:
    image = np.full((height, width, 3), 128, np.uint8)
    picture = draw_picture(image)
    large = image.repeat(factor, axis=0).repeat(factor, axis=1)
    expected = draw_inspection_overlay(large, make_inspection(width, height), factor)
    np.testing.assert_array_equal(picture[: height * factor, : width * factor], expected, strict=True)
    assert picture.shape[0] >= height * factor + 100
    assert picture.shape[1] == max(width * factor, MIN_WIDTH_PX)


def test_the_outline_of_a_region_is_on_its_outermost_pixels() -> None:
    inspection = make_inspection(160, 160)
    (region,) = inspection.regions
    rows, columns = np.nonzero(
        (draw_inspection_overlay(np.zeros((160, 160, 3), np.uint8), inspection) == [0, 255, 255]).all(axis=2)
    )
    assert (rows.min(), rows.max()) == (region.y, region.y + region.height - 1)
    assert (columns.min(), columns.max()) == (region.x, region.x + region.width - 1)


def test_text_grows_with_the_picture() -> None:
    small, large = (len(draw_picture(np.zeros((side, side, 3), np.uint8))) / side for side in (400, 1600))
    assert large - 1 == pytest.approx(small - 1, rel=0.5)


@pytest.mark.parametrize("anomalous", [True, False])
def test_the_verdict_has_its_colour(anomalous: bool) -> None:
    picture = draw_picture(np.zeros((400, 400, 3), np.uint8), anomalous)
    assert [bool((picture == colour).all(axis=2).any()) for colour in (RED, GREEN)] == [anomalous, not anomalous]


def test_the_scale_shows_the_heat_maps_colours_from_end_to_end() -> None:
    strip = draw_picture(np.zeros((400, 400, 3), np.uint8))[400:].astype(int)
    for colour in draw_heat_map(np.array([[0.1, 0.3, 0.7, 0.9]], np.float32), 0.0, 1.0)[0].astype(int):
        assert (np.abs(strip - colour).max(axis=2) <= 4).any()


def test_an_outline_is_white_outside_and_black_inside_the_mask() -> None:
    mask = np.zeros((9, 9), bool)
    mask[3:6, 3:6] = True
    outlined = draw_mask_outline(np.full((9, 9, 3), 100, np.uint8), mask)[..., 0]
    assert outlined[4].tolist() == [100, 100, 255, 0, 100, 0, 255, 100, 100]
