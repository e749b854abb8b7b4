"""The frame of a category: its size, and its region of interest, drawn from polygons or read from a mask image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from focus_ray.config import Config, Polygon
from focus_ray.data.framing import Frame, Places
from focus_ray.data.images import ImageError, decode_image
from focus_ray.errors import DataError
from focus_ray.storage import read_bytes

_FINER = 4  # polygons are drawn so many times finer, and a pixel is inside where half of it is


def frame_of(config: Config, category: str) -> Frame:
    """The frame of a category's images, with its region. Raises: DataError: the region's mask cannot be used."""
    return frame_with(config, read_region(config, category))


def frame_with(config: Config, region: NDArray[np.bool_] | None) -> Frame:
    """As `frame_of`, with a region that was read before."""
    return Frame(*config.model.frame_px, config.model.resize, region, places_of(config))


def places_of(config: Config) -> Places:
    """The squares of the frame that the anomaly map's places stand for."""
    model, side_px = config.model, config.model.place_px(config.density)
    of_tile = np.arange(0, model.image_size_px, side_px)
    tops, lefts = (
        (np.arange(count)[:, None] * (model.image_size_px - model.overlap_px) + of_tile).ravel() for count in model.grid
    )
    return Places(tops, lefts, side_px)


def read_region(config: Config, category: str) -> NDArray[np.bool_] | None:
    """What is inspected of the category's images, stretched to the frame's size; None: everything.

    Returns: (height, width) bool.

    Raises: DataError: a mask cannot be read or is black all over, or what is white, or within polygons, has no place of the map.
    """
    region = config.data.regions.get(category)
    if region is None:
        return None
    height, width = config.model.frame_px
    found = _read_mask(region, height, width) if isinstance(region, str) else draw_polygons(region, height, width)
    if not places_of(config).any_inside(found):
        what = f"the white of the mask {region}" if isinstance(region, str) else "what its polygons enclose"
        raise DataError(
            f"data.regions.{category}: {what} is {found.sum()} of the {height} x {width} pixels that images are brought to, too "
            "few for any place of the map, so nothing would be inspected: enlarge it"
        )
    return found


def draw_polygons(polygons: Sequence[Polygon], height: int, width: int) -> NDArray[np.bool_]:
    """(height, width) bool: pixels of which at least half lies in any of the polygons, of [x, y] from 0 to 1."""
    canvas = Image.new("L", (width * _FINER, height * _FINER), 0)
    for polygon in polygons:
        corners = [(x * canvas.width - 0.5, y * canvas.height - 0.5) for x, y in polygon]
        ImageDraw.Draw(canvas).polygon(corners, fill=255)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) >= 128


def _read_mask(uri: str, height: int, width: int) -> NDArray[np.bool_]:
    hint = "data.regions takes an image, white where it is to be inspected"
    try:
        pixels = decode_image(read_bytes(uri), None)
    except FileNotFoundError:
        raise DataError(f"{uri}: there is no such file: {hint}") from None
    except ImageError as error:
        raise DataError(f"{uri}: {error}: {hint}") from None
    white = Image.fromarray(pixels.max(axis=2))
    return np.asarray(white.resize((width, height), Image.Resampling.BOX)) >= 128


def check_regions(config: Config, categories: Sequence[str]) -> None:
    """Raises: DataError: a region is of a category that the data set does not have, or cannot be used."""
    for category in config.data.regions:
        if category not in categories:
            raise DataError(
                f"data.regions names {category!r}, which {config.data.uri} does not have; it has {', '.join(categories)}"
            )
        frame_of(config, category)
