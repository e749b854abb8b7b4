"""Module that builds the frame of a category: the size to which images are resized, and the region of interest.

The region is drawn from polygons or read from a mask image. Only pixels inside the region are scored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from focus_ray.data.framing import AnomalyMapCells, InputFrame
from focus_ray.data.images import ImageError, decode_image
from focus_ray.data.settings import Polygon
from focus_ray.errors import DataError
from focus_ray.fitting.settings import Config
from focus_ray.storage.files import read_bytes

# Polygons are drawn on a canvas that is this many times larger per side. A pixel is inside if half of its subpixels are inside.
_OVERSAMPLING = 4


def load_frame(config: Config, category: str) -> InputFrame:
    """Returns the frame of a category, with the region of interest from data.regions.

    Raises: DataError: the region cannot be used, see `read_region`.
    """
    return make_frame(config, read_region(config, category))


def make_frame(config: Config, region: NDArray[np.bool_] | None) -> InputFrame:
    """Returns the frame with a given region of interest.

    Args: region: (height, width) bool, the pixels that are scored, from `read_region`; None scores all pixels.
    """
    return InputFrame(*config.model.resized_image_px, config.model.resize, region, compute_map_cells(config))


def compute_map_cells(config: Config) -> AnomalyMapCells:
    """Returns the squares of the frame, in pixels, that the locations of the feature map describe."""
    model, side_px = config.model, config.model.location_side_px(config.density.map_layer)
    starts_in_tile = np.arange(0, model.image_size_px, side_px)
    tile_step = model.image_size_px - model.overlap_px
    tops, lefts = (
        (np.arange(num_tiles)[:, None] * tile_step + starts_in_tile).ravel() for num_tiles in model.tile_grid
    )
    return AnomalyMapCells(tops, lefts, side_px)


def read_region(config: Config, category: str) -> NDArray[np.bool_] | None:
    """Returns the region of interest of a category, stretched to the size of the frame.

    Returns:
        (height, width) bool, the pixels that are inspected; None if the category has no region.

    Raises:
        DataError: the mask file does not exist, is no image or is completely black, or the region is too small to cover at least
            half of a location of the feature map.
    """
    region = config.data.regions.get(category)
    if region is None:
        return None
    height, width = config.model.resized_image_px
    pixels = (
        _read_mask_image(region, height, width) if isinstance(region, str) else draw_polygon_mask(region, height, width)
    )
    if not compute_map_cells(config).has_scored_cell(pixels):
        area = f"the white area of the mask {region}" if isinstance(region, str) else "the area of the polygons"
        raise DataError(
            f"data.regions.{category}: {area} covers {pixels.sum()} of the {height} x {width} pixels of a resized image, too few "
            "for any place of the map, so nothing would be inspected: enlarge it"
        )
    return pixels


def draw_polygon_mask(polygons: Sequence[Polygon], height: int, width: int) -> NDArray[np.bool_]:
    """Draws polygons into a mask (height, width), bool: True at pixels that lie with at least half of their area inside.

    Args: polygons: lists of corners [x, y] from 0 to 1, as shares of width and height.
    """
    canvas = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING), 0)
    for polygon in polygons:
        corners = [(x * canvas.width - 0.5, y * canvas.height - 0.5) for x, y in polygon]
        ImageDraw.Draw(canvas).polygon(corners, fill=255)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) >= 128


def _read_mask_image(uri: str, height: int, width: int) -> NDArray[np.bool_]:
    """Reads a mask image and stretches it to a mask (height, width), bool, that is True in white areas.

    Raises: DataError: the file does not exist, or is no image that can be decoded.
    """
    hint = "data.regions expects an image that is white in the area to be inspected"
    try:
        pixels = decode_image(read_bytes(uri), None)
    except FileNotFoundError:
        raise DataError(f"{uri}: no such file: {hint}") from None
    except ImageError as error:
        raise DataError(f"{uri}: {error}: {hint}") from None
    white = Image.fromarray(pixels.max(axis=2))
    return np.asarray(white.resize((width, height), Image.Resampling.BOX)) >= 128


def check_regions(config: Config, categories: Sequence[str]) -> None:
    """Checks that every region of a configuration can be used.

    Args: categories: the categories of the data set.

    Raises: DataError: a region belongs to a category that the data set does not have, or cannot be used.
    """
    for category in config.data.regions:
        if category not in categories:
            raise DataError(
                f"data.regions names {category!r}, which {config.data.uri} does not have; it has {', '.join(categories)}"
            )
        load_frame(config, category)
