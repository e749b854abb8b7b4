"""Large photographs in tiles: how they are cut, how places of tiles lie side by side, and one density for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from focus_ray.config import ModelConfig

if TYPE_CHECKING:
    from focus_ray.density.base import Density, LeavesOut


class Tiles(NamedTuple):
    """rows x columns of tiles of side_px, each sharing overlap_px with the next. One tile: images pass as they are."""

    rows: int
    columns: int
    side_px: int
    overlap_px: int

    @classmethod
    def of(cls, config: ModelConfig) -> Tiles:
        return cls(*config.grid, config.image_size_px, config.overlap_px)

    @property
    def num_tiles(self) -> int:
        return self.rows * self.columns

    def cut(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B * num_tiles, C, side_px, side_px), an image's tiles after one another, row by row."""
        if self.num_tiles == 1:
            return images
        side, step = self.side_px, self.side_px - self.overlap_px
        found = images.unfold(2, side, step).unfold(3, side, step)  # (B, C, rows, columns, side, side)
        return found.permute(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1], side, side)

    def cut_batch(self, batch: Tensor) -> Tensor:
        """uint8 (B, H, W, C) -> (B * num_tiles, side_px, side_px, C)."""
        return batch if self.num_tiles == 1 else self.cut(batch.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def one_position(self, batch: Tensor, position: int) -> Tensor:
        """uint8 (B, H, W, C) -> the same tile of each, (B, side_px, side_px, C)."""
        step = self.side_px - self.overlap_px
        top, left = (number * step for number in divmod(position, self.columns))
        return batch[:, top : top + self.side_px, left : left + self.side_px]

    def join(self, tiles: Tensor) -> Tensor:
        """What is known at the places of tiles (B * num_tiles, C, h, w) -> (B, C, rows * h, columns * w), side by side."""
        return join_places(tiles, self.rows, self.columns)

    def split(self, places: Tensor) -> Tensor:
        """Undoes `join`."""
        return split_places(places, self.rows, self.columns)


def join_places(tiles: Tensor, rows: int, columns: int) -> Tensor:
    if rows == columns == 1:
        return tiles
    _, channels, height, width = tiles.shape
    found = tiles.reshape(-1, rows, columns, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return found.reshape(-1, channels, rows * height, columns * width)


def split_places(places: Tensor, rows: int, columns: int) -> Tensor:
    if rows == columns == 1:
        return places
    batch, channels, height, width = places.shape
    shape = batch, channels, rows, height // rows, columns, width // columns
    return places.reshape(shape).permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // rows, width // columns)


def fold_bank(bank: Tensor, grid: tuple[int, int], height: int, width: int) -> Tensor:
    """Embeddings of images (N, rows * height * columns * width, C) -> of their tiles (N * rows * columns, height * width, C)."""
    if grid == (1, 1):
        return bank
    images, _, channels = bank.shape
    found = bank.view(images, grid[0], height, grid[1], width, channels).permute(0, 1, 3, 2, 4, 5)
    return found.reshape(-1, height * width, channels)


def unfold_bank(bank: Tensor, grid: tuple[int, int], height: int, width: int) -> Tensor:
    """Undoes `fold_bank`."""
    if grid == (1, 1):
        return bank
    channels = bank.shape[2]
    found = bank.view(-1, grid[0], grid[1], height, width, channels).permute(0, 1, 3, 2, 4, 5)
    return found.reshape(-1, grid[0] * height * grid[1] * width, channels)


class SharedByTiles:
    """A density of one tile's places, fitted to the tiles of all positions, at the places of whole images."""

    def __init__(self, one: Density | LeavesOut, grid: tuple[int, int]) -> None:
        self.one, self.grid = cast(Any, one), grid
        self.height, self.width = grid[0] * one.height, grid[1] * one.width

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.one.device)

    def score(self, embedding: Tensor, own: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> distances (B, H, W).

        Args:
            own: (B,), the number of each image in the bank, or (B, K), several numbers: all tiles of these images are left out.
        """
        tiles = split_places(embedding, *self.grid)
        if own is None:
            found = self.one.score(tiles)
        else:
            count = self.grid[0] * self.grid[1]
            tiles_of = own.view(len(own), -1, 1) * count + torch.arange(count, device=own.device)  # (B, K, count)
            found = self.one.score(tiles, tiles_of.flatten(1).repeat_interleave(count, dim=0))
        return join_places(found[:, None], *self.grid)[:, 0]
