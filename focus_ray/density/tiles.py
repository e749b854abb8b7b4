"""Module for tiles of large photographs: cuts images into tiles, joins maps of tiles, and shares one density between tiles.

A map is a tensor with a value or a vector for each location of an image or tile. The bank contains stored normal embeddings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from focus_ray.density.base import Density, LeaveOneOutScorer


class TileGrid(NamedTuple):
    """A grid of rows x columns square tiles with the side side_px, in which neighbours overlap by overlap_px pixels.

    A grid of 1 x 1 is the whole image.
    """

    rows: int
    columns: int
    side_px: int
    overlap_px: int

    @property
    def num_tiles(self) -> int:
        """The number of tiles of an image."""
        return self.rows * self.columns

    def cut_images(self, images: Tensor) -> Tensor:
        """Cuts images (B, C, H, W) into tiles (B * num_tiles, C, side_px, side_px), the tiles of an image row by row."""
        if self.num_tiles == 1:
            return images
        side, step = self.side_px, self.side_px - self.overlap_px
        tiles = images.unfold(2, side, step).unfold(3, side, step)  # (B, C, rows, columns, side, side)
        return tiles.permute(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1], side, side)

    def cut_channels_last_images(self, batch: Tensor) -> Tensor:
        """Cuts images with channels last (B, H, W, C) into tiles (B * num_tiles, side_px, side_px, C); see `cut_images`."""
        return batch if self.num_tiles == 1 else self.cut_images(batch.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def cut_one_tile(self, batch: Tensor, tile_number: int) -> Tensor:
        """Cuts one tile (B, side_px, side_px, C) out of each image (B, H, W, C).

        Args: tile_number: index of the tile in the grid, from 0, counted row by row.
        """
        step = self.side_px - self.overlap_px
        top, left_edge = (number * step for number in divmod(tile_number, self.columns))
        return batch[:, top : top + self.side_px, left_edge : left_edge + self.side_px]

    def join_tile_maps(self, tiles: Tensor) -> Tensor:
        """Places the maps of tiles (B * num_tiles, C, h, w) side by side to maps of images (B, C, rows * h, columns * w)."""
        return join_tile_maps(tiles, self.rows, self.columns)


def join_tile_maps(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Places the maps of tiles (B * rows * columns, C, h, w) side by side to maps of images (B, C, rows * h, columns * w)."""
    if rows == columns == 1:
        return tiles
    count, channels, height, width = tiles.shape  # there may be no tiles, or no channels
    shape = count // (rows * columns), rows, columns, channels, height, width
    return tiles.reshape(shape).permute(0, 3, 1, 4, 2, 5).reshape(shape[0], channels, rows * height, columns * width)


def split_into_tile_maps(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Splits maps of images (B, C, H, W) into maps of their tiles; the inverse of `join_tile_maps`.

    Returns: (B * rows * columns, C, H / rows, W / columns), the tiles of an image row by row.
    """
    if rows == columns == 1:
        return maps
    batch, channels, height, width = maps.shape
    shape = batch, channels, rows, height // rows, columns, width // columns
    return maps.reshape(shape).permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // rows, width // columns)


def split_bank_into_tiles(bank: Tensor, grid: tuple[int, int], height: int, width: int) -> Tensor:
    """Splits the map of each image of a bank into the maps of its tiles, so that each row of the bank is one tile.

    Args:
        bank: (N, rows * height * columns * width, C), locations of an image row by row.
        grid: (rows, columns) of tiles of an image.
        height, width: rows and columns of locations of a tile.

    Returns: (N * rows * columns, height * width, C); the tiles of an image are consecutive.
    """
    if grid == (1, 1):
        return bank
    images, _, channels = bank.shape
    tiles = bank.view(images, grid[0], height, grid[1], width, channels).permute(0, 1, 3, 2, 4, 5)
    return tiles.reshape(-1, height * width, channels)


def join_bank_tiles(bank: Tensor, grid: tuple[int, int], height: int, width: int) -> Tensor:
    """Joins the maps of the tiles of each image, so that each row of the bank is one image; undoes `split_bank_into_tiles`.

    Args:
        bank: (N * rows * columns, height * width, C).
        grid: (rows, columns) of tiles of an image.
        height, width: rows and columns of locations of a tile.

    Returns: (N, rows * height * columns * width, C).
    """
    if grid == (1, 1):
        return bank
    channels = bank.shape[2]
    images = bank.view(-1, grid[0], grid[1], height, width, channels).permute(0, 1, 3, 2, 4, 5)
    return images.reshape(-1, grid[0] * height * grid[1] * width, channels)


class TiledDensity:
    """Scores the embeddings of whole images with one density that all tiles share.

    Attributes:
        tile_density: a density, or a leave-one-out scorer, of single tiles; fitted to the tiles at all positions of the grid.
        grid: (rows, columns) of tiles of an image.
        height, width: rows and columns of locations of a whole image.
    """

    def __init__(self, tile_density: Density | LeaveOneOutScorer, grid: tuple[int, int]) -> None:
        self.tile_density, self.grid = cast(Any, tile_density), grid
        self.height, self.width = grid[0] * tile_density.height, grid[1] * tile_density.width

    @property
    def device(self) -> torch.device:
        """The device on which distances are computed."""
        return cast(torch.device, self.tile_density.device)

    def score(self, embedding: Tensor, excluded_images: Tensor | None = None) -> Tensor:
        """Computes distances (B, H, W), >= 0, of B whole images.

        Args:
            embedding: (B, C, H, W), embeddings of the images, with the maps of their tiles side by side.
            excluded_images: (B,) or (B, K), for each of the B images the positions in the bank of the images whose tiles are
                ignored; only for a leave-one-out scorer. None ignores no image.
        """
        tiles = split_into_tile_maps(embedding, *self.grid)
        if excluded_images is None:
            distances = self.tile_density.score(tiles)
        else:
            count = self.grid[0] * self.grid[1]
            # (B, K, count): numbers of the excluded images' tiles in the bank of tiles
            excluded_tiles = excluded_images.view(len(excluded_images), -1, 1) * count + torch.arange(
                count, device=excluded_images.device
            )
            distances = self.tile_density.score(tiles, excluded_tiles.flatten(1).repeat_interleave(count, dim=0))
        return join_tile_maps(distances[:, None], *self.grid)[:, 0]
