"""Densities as modules that can be traced: no chunks, no views written into, memories in as few bytes as they bear."""

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

_LOWEST = -3e38  # stands for no neighbour at all: an infinity is not every runtime's


def as_module(density: Density, half: bool) -> nn.Module:
    """Embeddings (B, C, H, W) -> distances (B, H, W), as `density.score`, of a density in float32.

    Args: half: keep memories in float16, rounded; False: where they lose nothing by it. Distances are worked out in float32.
    """
    if isinstance(density, TiledDensity):
        return _Shared(as_module(cast(Density, density.tile_density), half), density.grid)
    if isinstance(density, CheckedMemory):
        return _Checked(as_module(density.memory, half), density, half)
    if isinstance(density, JointMemory):
        return _Joint(_Nearest(density.location_memory, half), _Coreset(density.coreset, half), density)
    if isinstance(density, NearestMemory):
        return _Nearest(density, half)
    if isinstance(density, Gaussian):
        return _Gaussian(density, half)
    return _AsItIs(density)


def _stored(values: Tensor, half: bool) -> Tensor:
    """In float16 where that is asked for and bears it, or where it loses nothing."""
    smaller = values.half()
    fits = bool(torch.isfinite(smaller).all()) if half else bool((smaller.float() == values).all())
    return (smaller if fits else values).contiguous()


class _Gaussian(nn.Module):
    def __init__(self, density: Gaussian, half: bool) -> None:
        super().__init__()
        self.mean: Tensor
        self.factor: Tensor
        self.register_buffer("mean", density.mean)
        self.register_buffer("factor", _stored(density.precision_factor, half))

    def forward(self, embedding: Tensor) -> Tensor:
        return mahalanobis(embedding, self.mean, self.factor.float())


class _Nearest(nn.Module):
    def __init__(self, memory: NearestMemory, half: bool) -> None:
        super().__init__()
        assert memory.centre is None
        self.bank: Tensor
        self.half_norms: Tensor
        self.whitening: Tensor | None
        self.height, self.width, self.window = memory.height, memory.width, memory.window
        self.register_buffer("bank", _stored(memory.bank.transpose(1, 2), half))  # (L, C, M)
        self.register_buffer("half_norms", self.bank.float().square().sum(dim=1)[:, None] / 2)
        self.register_buffer("whitening", None if memory.is_unwhitened else memory.whitening)

    def forward(self, embedding: Tensor) -> Tensor:
        batch, channels, height, width = embedding.shape
        queries = locations_first(embedding)
        if self.whitening is not None:
            queries = queries @ self.whitening.t()
        reach = self.window // 2
        placed = queries.reshape(height, width, batch, channels)
        padded = F.pad(placed, (0, 0, 0, 0, reach, reach, reach, reach))
        moves = [(down, right) for down in range(self.window) for right in range(self.window)]
        near = torch.stack([padded[down : down + height, right : right + width] for down, right in moves], dim=2)
        near = near.reshape(height * width, len(moves) * batch, channels)
        best = (near @ self.bank.float() - self.half_norms).amax(dim=2).reshape(height, width, len(moves), batch)
        closest = best[:, :, len(moves) // 2]
        for number, (down, right) in enumerate(moves):  # what the bank of a place says of the queries around it
            sides = (0, 0, right, 2 * reach - right, down, 2 * reach - down)
            moved = F.pad(best[:, :, number], sides, value=_LOWEST)
            closest = torch.maximum(closest, moved[reach : reach + height, reach : reach + width])
        squares = queries.square().sum(dim=2).reshape(height, width, batch)
        return (squares - 2 * closest).clamp_min(0).sqrt().permute(2, 0, 1)


class _Coreset(nn.Module):
    def __init__(self, coreset: Coreset, half: bool) -> None:
        super().__init__()
        assert coreset.centre is None
        self.patches: Tensor
        self.half_norms: Tensor
        self.register_buffer("patches", _stored(coreset.patches.t(), half))  # (K, M)
        self.register_buffer("half_norms", self.patches.float().square().sum(dim=0) / 2)

    def forward(self, embedding: Tensor) -> Tensor:
        queries = embedding.permute(0, 2, 3, 1)
        closest = (queries @ self.patches.float() - self.half_norms).amax(dim=3)
        return (queries.square().sum(dim=3) - 2 * closest).clamp_min(0).sqrt()


class _Joint(nn.Module):
    def __init__(self, places: _Nearest, coreset: _Coreset, memory: JointMemory) -> None:
        super().__init__()
        self.places, self.coreset = places, coreset
        self.few = memory.location_memory.bank.shape[2]
        self.typical: Tensor
        self.register_buffer("typical", memory.typical_distance)

    def forward(self, embedding: Tensor) -> Tensor:
        here = self.places(embedding[:, : self.few]) / self.typical[0]
        anywhere = self.coreset(embedding[:, self.few :]) / self.typical[1]
        return cast(Tensor, here + anywhere) / 2


class _Checked(nn.Module):
    def __init__(self, memory: nn.Module, density: CheckedMemory, half: bool) -> None:
        super().__init__()
        self.memory, self.gaussian = memory, _Gaussian(density.gaussian, half)
        self.num_channels = density.gaussian.mean.shape[1]
        self.scale: Tensor
        self.register_buffer("scale", density.scale)

    def forward(self, embedding: Tensor) -> Tensor:
        distance = self.gaussian(embedding[:, : self.num_channels]) * self.scale
        return torch.minimum(self.memory(embedding), distance)


class _Shared(nn.Module):
    def __init__(self, one: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.one, self.grid = one, grid

    def forward(self, embedding: Tensor) -> Tensor:
        return join_maps(self.one(split_maps(embedding, *self.grid))[:, None], *self.grid)[:, 0]


class _AsItIs(nn.Module):
    """A kind that is not known here, traced through its own `score`."""

    def __init__(self, density: Any) -> None:
        super().__init__()
        self.density = density

    def forward(self, embedding: Tensor) -> Tensor:
        return cast(Tensor, self.density.score(embedding))
