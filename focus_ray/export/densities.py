"""Rewrites densities as modules that `torch.export` can trace: without chunks, without in-place writes, with small buffers."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus_ray.density.base import Density
from focus_ray.density.checked_memory import CheckedMemory
from focus_ray.density.coreset import Coreset
from focus_ray.density.gaussian import Gaussian, mahalanobis
from focus_ray.density.moments import locations_first
from focus_ray.density.nearest import JointMemory, NearestMemory
from focus_ray.density.tiles import TiledDensity, join_maps, split_maps

_LOWEST = -3e38  # agreement of a missing neighbour; not -inf, because not every runtime supports infinity


def to_traceable_module(density: Density, half: bool) -> nn.Module:
    """Returns a module that maps embeddings (B, C, H, W) to distances (B, H, W), as `density.score` does.

    Distances are computed in float32.

    Args:
        density: must compute in float32.
        half: round memories to float16. False: store memories in float16 only where this changes no value.
    """
    if isinstance(density, TiledDensity):
        return _PerTile(to_traceable_module(cast(Density, density.tile_density), half), density.grid)
    if isinstance(density, CheckedMemory):
        return _Checked(to_traceable_module(density.memory, half), density, half)
    if isinstance(density, JointMemory):
        return _Joint(_Nearest(density.location_memory, half), _Coreset(density.coreset, half), density)
    if isinstance(density, NearestMemory):
        return _Nearest(density, half)
    if isinstance(density, Gaussian):
        return _Gaussian(density, half)
    return _Unchanged(density)


def _shrink(values: Tensor, half: bool) -> Tensor:
    """Returns the values in float16 if `half` is set and no value overflows, or if float16 represents all values exactly.

    Otherwise the values keep their type.
    """
    half_values = values.half()
    fits = bool(torch.isfinite(half_values).all()) if half else bool((half_values.float() == values).all())
    return (half_values if fits else values).contiguous()


class _Gaussian(nn.Module):
    """Mahalanobis distance to the Gaussian of each location."""

    def __init__(self, density: Gaussian, half: bool) -> None:
        super().__init__()
        self.mean: Tensor
        self.factor: Tensor
        self.register_buffer("mean", density.mean)
        self.register_buffer("factor", _shrink(density.precision_factor, half))

    def forward(self, embedding: Tensor) -> Tensor:
        return mahalanobis(embedding, self.mean, self.factor.float())


class _Nearest(nn.Module):
    """Distance to the nearest stored embedding of the same location and its neighbours, as `NearestMemory.score`."""

    def __init__(self, memory: NearestMemory, half: bool) -> None:
        super().__init__()
        assert memory.centre is None
        self.bank: Tensor
        self.half_squares: Tensor
        self.whitening: Tensor | None
        self.height, self.width, self.window = memory.height, memory.width, memory.window
        self.register_buffer("bank", _shrink(memory.bank.transpose(1, 2), half))  # (L, C, M)
        self.register_buffer("half_squares", self.bank.float().square().sum(dim=1)[:, None] / 2)
        self.register_buffer("whitening", None if memory.is_unwhitened else memory.whitening)

    def forward(self, embedding: Tensor) -> Tensor:
        batch, channels, height, width = embedding.shape
        queries = locations_first(embedding)  # (L, B, C)
        if self.whitening is not None:
            queries = queries @ self.whitening.t()
        reach = self.window // 2
        # Every location compares its bank with all queries of the window around it: (L, W * B, C) against (L, C, M).
        query_grid = queries.reshape(height, width, batch, channels)
        padded = F.pad(query_grid, (0, 0, 0, 0, reach, reach, reach, reach))
        offsets = [(down, right) for down in range(self.window) for right in range(self.window)]
        window_queries = torch.stack(
            [padded[down : down + height, right : right + width] for down, right in offsets], dim=2
        )
        window_queries = window_queries.reshape(height * width, len(offsets) * batch, channels)
        # |q - m|^2 / 2 = |q|^2 / 2 - (q m - |m|^2 / 2): the nearest memory entry has the largest agreement.
        agreement = (
            (window_queries @ self.bank.float() - self.half_squares)
            .amax(dim=2)
            .reshape(height, width, len(offsets), batch)
        )
        best_agreement = agreement[:, :, len(offsets) // 2]
        for number, (down, right) in enumerate(
            offsets
        ):  # move each agreement from the location of the bank to the location of the query
            padding = (0, 0, right, 2 * reach - right, down, 2 * reach - down)
            moved = F.pad(agreement[:, :, number], padding, value=_LOWEST)
            best_agreement = torch.maximum(best_agreement, moved[reach : reach + height, reach : reach + width])
        squares = queries.square().sum(dim=2).reshape(height, width, batch)
        return (squares - 2 * best_agreement).clamp_min(0).sqrt().permute(2, 0, 1)


class _Coreset(nn.Module):
    """Distance to the nearest patch of the coreset, as `Coreset.score`."""

    def __init__(self, coreset: Coreset, half: bool) -> None:
        super().__init__()
        assert coreset.centre is None
        self.patches: Tensor
        self.half_squares: Tensor
        self.register_buffer("patches", _shrink(coreset.patches.t(), half))  # (K, M)
        self.register_buffer("half_squares", self.patches.float().square().sum(dim=0) / 2)

    def forward(self, embedding: Tensor) -> Tensor:
        queries = embedding.permute(0, 2, 3, 1)
        best_agreement = (queries @ self.patches.float() - self.half_squares).amax(dim=3)
        return (queries.square().sum(dim=3) - 2 * best_agreement).clamp_min(0).sqrt()


class _Joint(nn.Module):
    """Mean of the distances to a location memory and to a coreset, each divided by its typical distance."""

    def __init__(self, location_memory: _Nearest, coreset: _Coreset, memory: JointMemory) -> None:
        super().__init__()
        self.location_memory, self.coreset = location_memory, coreset
        self.num_location_channels = memory.location_memory.bank.shape[2]
        self.typical: Tensor
        self.register_buffer("typical", memory.typical_distance)

    def forward(self, embedding: Tensor) -> Tensor:
        location_distance = self.location_memory(embedding[:, : self.num_location_channels]) / self.typical[0]
        coreset_distance = self.coreset(embedding[:, self.num_location_channels :]) / self.typical[1]
        return cast(Tensor, location_distance + coreset_distance) / 2


class _Checked(nn.Module):
    """Minimum of the distance to a memory and the scaled Mahalanobis distance, as `CheckedMemory.score`."""

    def __init__(self, memory: nn.Module, density: CheckedMemory, half: bool) -> None:
        super().__init__()
        self.memory, self.gaussian = memory, _Gaussian(density.gaussian, half)
        self.num_channels = density.gaussian.mean.shape[1]
        self.scale: Tensor
        self.register_buffer("scale", density.scale)

    def forward(self, embedding: Tensor) -> Tensor:
        distance = self.gaussian(embedding[:, : self.num_channels]) * self.scale
        return torch.minimum(self.memory(embedding), distance)


class _PerTile(nn.Module):
    """Applies the density of one tile to every tile of a map."""

    def __init__(self, tile_density: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.tile_density, self.grid = tile_density, grid

    def forward(self, embedding: Tensor) -> Tensor:
        return join_maps(self.tile_density(split_maps(embedding, *self.grid))[:, None], *self.grid)[:, 0]


class _Unchanged(nn.Module):
    """Any other density: its own `score` is traced."""

    def __init__(self, density: Any) -> None:
        super().__init__()
        self.density = density

    def forward(self, embedding: Tensor) -> Tensor:
        return cast(Tensor, self.density.score(embedding))
