"""From distances at places to a map of pixels: upsampled, blended where tiles overlap, and smoothed."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.density.tiles import Tiles


class Spread(NamedTuple):
    """All steps are linear and separable, so a map is a product with one matrix a side.

    rows: (H, places down).  columns: (W, places across); of whole images.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, tiles: Tiles, places: int, sigma_px: float, device: torch.device | str = "cpu") -> Spread:
        """places: of a tile's side.  sigma_px: of the smoothing, after tiles are blended."""
        upsampled = upsample(places, tiles.side_px)
        return cls(
            *(
                smooth(blend(upsampled, count, tiles.overlap_px), sigma_px).float().contiguous().to(device)
                for count in (tiles.rows, tiles.columns)
            )
        )

    def __call__(self, distance: Tensor) -> Tensor:
        """(B, places down, places across) -> maps (B, H, W)."""
        return self.rows @ distance @ self.columns.t()

    def every(self, step_px: int) -> Spread:
        """To every so many pixels only."""
        return Spread(*(matrix[step_px // 2 :: step_px] for matrix in self))


def blend(tile: Tensor, count: int, overlap_px: int) -> Tensor:
    """`count` tiles of one side's matrix (S, h), each `overlap_px` over the one before -> (count (S - overlap_px) + overlap_px,
    count h). Where two overlap, the one fades out as the other fades in, linearly; their weights add up to 1."""
    side, places = tile.shape
    if count == 1:
        return tile
    step = side - overlap_px
    fade_in = (torch.arange(overlap_px, dtype=tile.dtype) + 0.5) / max(1, overlap_px)
    found = tile.new_zeros(count * step + overlap_px, count * places)
    for number in range(count):
        weight = tile.new_ones(side)
        if number > 0:
            weight[:overlap_px] = fade_in
        if number < count - 1:
            weight[side - overlap_px :] = fade_in.flip(0)
        found[number * step : number * step + side, number * places : (number + 1) * places] = weight[:, None] * tile
    return found


def upsample(places: int, size_px: int) -> Tensor:
    """The matrix (size_px, places), float64, of bilinear upsampling along one side."""
    identity = torch.eye(places, dtype=torch.float64)
    return F.interpolate(identity[None], size=size_px, mode="linear", align_corners=False)[0].t()


def smooth(matrix: Tensor, sigma_px: float) -> Tensor:
    """(size_px, n) -> the same, each column under a Gaussian of `sigma_px`, cut at 4 sigma, mirrored at the border."""
    if sigma_px == 0:
        return matrix
    radius = min(int(4 * sigma_px + 0.5), len(matrix) - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma_px) ** 2)
    kernel /= kernel.sum()
    columns = F.pad(matrix.t()[:, None], (radius, radius), mode="reflect")
    return F.conv1d(columns, kernel[None, None])[:, 0].t()


def upsample_and_smooth(places: int, size_px: int, sigma_px: float) -> Tensor:
    """The matrix A (size_px, places) with which A m A^T is the bilinear upsampling of a square map m, smoothed.

    Both steps are linear and separable, so one small product per axis does what two passes over the pixels would.
    """
    return smooth(upsample(places, size_px), sigma_px).float().contiguous()
