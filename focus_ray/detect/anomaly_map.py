"""Module that computes anomaly maps (one value per pixel) from distances (one value per location of the feature map).

The steps are upsampling to pixels, blending of overlapping tiles, and smoothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.density.tiles import TileGrid


class AnomalyMapGenerator(NamedTuple):
    """Computes anomaly maps of whole images. All steps are linear and separable, so each side needs one matrix product.

    rows: (H, h), matrix that converts a column of h locations to a column of H pixels.
    columns: (W, w), matrix that converts a row of w locations to a row of W pixels.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def build_for_tiles(
        cls, tiles: TileGrid, locations_per_side: int, sigma_px: float, device: torch.device | str = "cpu"
    ) -> AnomalyMapGenerator:
        """Builds the generator for images that are divided into tiles.

        Args:
            tiles: the grid of tiles; a grid of 1 x 1 for images without tiles.
            locations_per_side: number of locations along one side of a tile.
            sigma_px: standard deviation of the Gaussian that smooths the map after the tiles are blended.
        """
        upsampled = build_upsampling_matrix(locations_per_side, tiles.side_px)
        return cls(
            *(
                smooth_columns(build_blending_matrix(upsampled, count, tiles.overlap_px), sigma_px)
                .float()
                .contiguous()
                .to(device)
                for count in (tiles.rows, tiles.columns)
            )
        )

    def __call__(self, distance: Tensor) -> Tensor:
        """Computes anomaly maps (B, H, W) from distances (B, h, w)."""
        return self.rows @ distance @ self.columns.t()

    def subsample_pixels(self, step_px: int) -> AnomalyMapGenerator:
        """Returns an `AnomalyMapGenerator` that computes only every `step_px`-th row and column of the map."""
        return AnomalyMapGenerator(*(matrix[step_px // 2 :: step_px] for matrix in self))


def build_blending_matrix(tile: Tensor, count: int, overlap_px: int) -> Tensor:
    """Builds the matrix that upsamples the locations of a row of tiles to pixels and blends the tiles where they overlap.

    In an overlap, the weight of one tile falls linearly from 1 to 0 while the weight of the next tile rises; the two weights add
    up to 1.

    Args:
        tile: (S, h), matrix that upsamples the h locations along one side of a tile to its S pixels.
        count: number of tiles in the row.
        overlap_px: pixels that two neighbouring tiles share.

    Returns: (count * (S - overlap_px) + overlap_px, count * h).
    """
    side_px, num_locations = tile.shape
    if count == 1:
        return tile
    step = side_px - overlap_px
    fade_in = (torch.arange(overlap_px, dtype=tile.dtype) + 0.5) / max(1, overlap_px)
    matrix = tile.new_zeros(count * step + overlap_px, count * num_locations)
    for number in range(count):
        weight = tile.new_ones(side_px)
        if number > 0:
            weight[:overlap_px] = fade_in
        if number < count - 1:
            weight[side_px - overlap_px :] = fade_in.flip(0)
        matrix[number * step : number * step + side_px, number * num_locations : (number + 1) * num_locations] = (
            weight[:, None] * tile
        )
    return matrix


def build_upsampling_matrix(num_locations: int, size_px: int) -> Tensor:
    """Builds the matrix (size_px, num_locations), float64, that upsamples one side of a map linearly."""
    identity = torch.eye(num_locations, dtype=torch.float64)
    return F.interpolate(identity[None], size=size_px, mode="linear", align_corners=False)[0].t()


def smooth_columns(matrix: Tensor, sigma_px: float) -> Tensor:
    """Smooths each column of a float64 matrix (size_px, n) by a Gaussian with the standard deviation `sigma_px`.

    The Gaussian is cut off at 4 sigma, or before if the matrix has fewer rows, and the values are mirrored at the border. With
    `sigma_px` 0 the matrix is returned unchanged.
    """
    if sigma_px == 0:
        return matrix
    radius = min(int(4 * sigma_px + 0.5), len(matrix) - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma_px) ** 2)
    kernel /= kernel.sum()
    columns = F.pad(matrix.t()[:, None], (radius, radius), mode="reflect")
    return F.conv1d(columns, kernel[None, None])[:, 0].t()
