"""The densities behind one interface: what a pass over normal images keeps, and what is built from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from focus_ray.config import DensityConfig
from focus_ray.density.gaussian import Gaussian, fit_gaussian
from focus_ray.density.moments import Moments, mean_variance, unpack_lower
from focus_ray.density.nearest import NearestMemory, build_memory, whiten


class Density(Protocol):
    """Says how far each patch of an embedding is from the normal ones of its place."""

    height: int
    width: int

    @property
    def device(self) -> torch.device: ...

    def score(self, embedding: Tensor) -> Tensor:
        """(B, C, H, W) -> distances (B, H, W), >= 0."""


@dataclass
class Statistics:
    """What is kept of the normal images; statistics of several sites can be joined.

    moments: of all images.  bank: (N, L, C) float16, embeddings of the images that a memory keeps; None for a Gaussian.
    """

    moments: Moments
    bank: Tensor | None = None

    def join(self, other: Statistics) -> Statistics:
        """Adds another site's, in place. Raises: ValueError: shapes or kinds differ."""
        if (self.bank is None) != (other.bank is None):
            raise ValueError("statistics of a Gaussian and of a memory cannot be joined")
        self.moments.merge(other.moments)
        if self.bank is not None and other.bank is not None:
            self.bank = torch.cat([self.bank, other.bank])
        return self

    def keep_at_most(self, num_images: int) -> None:
        """Thins the bank, evenly; the moments stay those of all images."""
        if self.bank is not None and len(self.bank) > num_images:
            self.bank = self.bank[sorted(sample_positions(len(self.bank), num_images))]


def ridge_of(config: DensityConfig, moments: Moments) -> float:
    """The number added to a covariance's diagonal, in the embeddings' own unit squared."""
    scale = mean_variance(moments) if config.shrinkage_unit == "mean_variance" else 1.0
    return max(config.shrinkage * scale, 1e-12)


def build_density(config: DensityConfig, statistics: Statistics) -> Density:
    """The density of the config's kind. Raises: ValueError: fewer than two images, or no bank for a memory."""
    moments = statistics.moments
    ridge = ridge_of(config, moments)
    if config.kind == "gaussian":
        mean, factor = fit_gaussian(moments, ridge, config.pooling)
        return Gaussian(mean, factor, moments.height, moments.width)
    if statistics.bank is None:
        raise ValueError("density.kind=nearest needs the bank of normal embeddings")
    return build_memory(statistics.bank, moments, ridge, config.window)


def density_tensors(config: DensityConfig, statistics: Statistics) -> dict[str, Tensor]:
    """What a bundle stores to build the density from."""
    moments = statistics.moments
    ridge = ridge_of(config, moments)
    if config.kind == "gaussian":
        mean, packed = fit_gaussian(moments, ridge, config.pooling, packed=True)
        return {"mean": mean, "precision_factor": packed}
    assert statistics.bank is not None
    return {"bank": statistics.bank, "whitening": build_memory(statistics.bank[:1], moments, ridge).whitening}


def load_density(
    config: DensityConfig, tensors: dict[str, Tensor], height: int, width: int, device: torch.device | str
) -> Density:
    """The density from `density_tensors`. Raises: KeyError, ValueError: tensors that do not fit."""
    if config.kind == "gaussian":
        factor = unpack_lower(tensors["precision_factor"].to(device))
        return Gaussian(tensors["mean"].to(device), factor, height, width)
    whitening = tensors["whitening"].to(device)
    return NearestMemory(whiten(tensors["bank"], whitening), whitening, height, width, config.window)


def sample_positions(count: int, limit: int) -> set[int]:
    """Which of `count` images, in the order of all workers, are among at most `limit` evenly chosen ones."""
    if count <= limit:
        return set(range(count))
    return {(2 * number + 1) * count // (2 * limit) for number in range(limit)}
