"""The interface of all densities, and the statistics of normal images from which each kind builds its density."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from focus_ray.density.moments import Moments, mean_variance
from focus_ray.density.relations import Relations, join_relations
from focus_ray.density.settings import DensityConfig
from focus_ray.density.tiles import TiledDensity, split_bank_into_tiles
from focus_ray.settings.kinds import DENSITIES


class Density(Protocol):
    """A fitted model of normal embeddings that measures the distance of new embeddings to the normal ones.

    height, width: size of the map of locations that the density was fitted at.
    """

    height: int
    width: int

    @property
    def device(self) -> torch.device: ...

    def score(self, embedding: Tensor) -> Tensor:
        """Computes distances (B, H, W), >= 0, of B embeddings (B, C, H, W) to the normal embeddings of each location."""


class LeaveOneOutScorer(Protocol):
    """Scores the images that a density was fitted to as if the density had not seen them."""

    height: int
    width: int

    def score(self, embedding: Tensor, excluded_images: Tensor) -> Tensor:
        """Computes the distances of B training images to the other training images, without some excluded images.

        Args:
            embedding: (B, C, H, W), embeddings of the training images.
            excluded_images: numbers of the bank's images to exclude for each of the B images. (B,) excludes one image for each,
                usually the image itself; (B, K) excludes up to K images for each. A density without a bank uses only the number
                of excluded images.

        Returns: (B, H, W), >= 0.
        """


class DensityKind(Protocol):
    """Builds, stores and loads densities of one kind. The key in `DENSITIES` is the value of density.kind.

    A kind may also define `leave_one_out_scorer(config, statistics, density) -> LeaveOneOutScorer`, where `density` is the result
    of `build` for the same statistics. A kind without this method is calibrated by cross-validation folds.

    keeps_bank: whether the density needs the embeddings of normal images, not only their moments.
    """

    keeps_bank: bool

    def build(self, config: DensityConfig, statistics: Statistics) -> Density:
        """Fits the density to the statistics. Raises: ValueError: the statistics are of fewer than two images."""

    def tensors(self, config: DensityConfig, statistics: Statistics, density: Density) -> dict[str, Tensor]:
        """Returns the tensors that a bundle stores and that `load` needs.

        A kind with a bank stores it under 'bank', with the channels of the moments only. If it stores a part of the bank, it also
        stores the number of the source image of each embedding, under 'bank.images'.

        Args:
            density: the result of `build` for the same statistics.
        """

    def load(
        self, config: DensityConfig, tensors: Mapping[str, Tensor], height: int, width: int, device: torch.device | str
    ) -> Density:
        """Rebuilds the density from the result of `tensors`.

        Raises: KeyError: a tensor is missing. ValueError: the shapes do not fit together.
        """


@dataclass
class Statistics:
    """Statistics of normal images, from which a density is built. Statistics of several sites can be joined.

    moments: moments of the embeddings of all images.
    bank: (N, L, C + K) float16, embeddings of N selected images; the last K channels are for a coreset (K is 0 without a
        coreset). None for a Gaussian.
    thetas: (N, 2, 3), alignment of each image of the bank; None without image alignment.
    shown: (N, L) bool, True at locations of the bank's images that are scored; None if all locations are scored.
    scatter: (2, C, C), scatter matrices of normal and defective residuals from which the projection was computed
        (`fitting.projection`); None if no projection was learnt.
    grid: rows and columns of tiles of one image. All tiles share the locations of the moments, and each tile counts as an image
        there. A row of the bank contains all tiles of an image.
    relations: which images of the bank show the same part; None if every image shows a different part.
    descriptors: (N, P, K) float16, descriptors of the bank's images for the search for near-duplicates (`fitting.duplicates`).
    same_part_distance: the largest distance of descriptors at which two photographs may show the same part; None if it was not
        measured.
    """

    moments: Moments
    bank: Tensor | None = None
    thetas: Tensor | None = None
    scatter: Tensor | None = None
    shown: Tensor | None = None
    grid: tuple[int, int] = (1, 1)
    relations: Relations | None = None
    descriptors: Tensor | None = None
    same_part_distance: float | None = None

    @property
    def num_images(self) -> int:
        """Number of whole images in the moments."""
        return self.moments.count // (self.grid[0] * self.grid[1])

    @property
    def per_tile(self) -> Statistics:
        """The statistics in which each tile counts as one image. They have only moments, bank and relations.

        Images of one tile: these statistics themselves.
        """
        if self.grid == (1, 1):
            return self
        moments = self.moments
        bank = None if self.bank is None else split_bank_into_tiles(self.bank, self.grid, moments.height, moments.width)
        relations = None if self.relations is None else self.relations.repeat(self.grid[0] * self.grid[1])
        return Statistics(moments, bank, relations=relations)

    def images_to_exclude(self, images: Tensor) -> Tensor:
        """Returns the numbers of the bank's images to exclude when images of the bank are scored.

        Args: images: (B,), numbers of the scored images in the bank.

        Returns: without relations `images`, so that each image excludes itself. With relations (B, K): each image excludes itself
            and its related images; see `Relations.relatives`.
        """
        return images if self.relations is None else self.relations.relatives(images)

    def join(self, other: Statistics) -> Statistics:
        """Adds the statistics of another site, in place, and returns self. Raises: ValueError: shapes or kinds differ."""
        if (self.bank is None) != (other.bank is None):
            raise ValueError(
                "statistics with a bank (of a memory) cannot be joined with statistics without a bank (of a Gaussian)"
            )
        self.moments.merge(other.moments)
        if self.bank is not None and other.bank is not None:
            self.relations = join_relations(self.relations, len(self.bank), other.relations, len(other.bank))
            self.bank = torch.cat([self.bank, other.bank])
        if self.thetas is not None and other.thetas is not None:
            self.thetas = torch.cat([self.thetas, other.thetas])
        if self.shown is not None and other.shown is not None:
            self.shown = torch.cat([self.shown, other.shown])
        if self.descriptors is not None and other.descriptors is not None:
            self.descriptors = torch.cat([self.descriptors, other.descriptors])
        else:
            self.descriptors = None
        if self.same_part_distance is None:
            self.same_part_distance = other.same_part_distance
        return self

    def limit_bank(self, num_images: int) -> None:
        """Reduces the bank to at most `num_images` evenly spaced images; the moments do not change."""
        if self.bank is not None and len(self.bank) > num_images:
            self.select_bank_images(sorted(sample_evenly(len(self.bank), num_images)))

    def select_bank_images(self, images: list[int]) -> None:
        """Reduces the bank and all data per bank image to the images with these numbers; the moments do not change."""
        if self.bank is not None:
            self.bank = self.bank[images]
        if self.thetas is not None:
            self.thetas = self.thetas[images]
        if self.shown is not None:
            self.shown = self.shown[images]
        if self.relations is not None:
            self.relations = self.relations.subset(images)
        if self.descriptors is not None:
            self.descriptors = self.descriptors[images]


def absolute_ridge(config: DensityConfig, moments: Moments) -> float:
    """Returns the number to add to a covariance's diagonal, in the squared unit of the embeddings (density.shrinkage)."""
    scale = mean_variance(moments) if config.shrinkage_unit == "mean_variance" else 1.0
    return max(config.shrinkage * scale, 1e-12)


def build_density(config: DensityConfig, statistics: Statistics) -> Density:
    """Fits a density of the configured kind to the statistics.

    Raises: ValueError: fewer than two images, or the kind needs a bank and the statistics have none.
    """
    kind = DENSITIES[config.kind]
    if kind.keeps_bank and statistics.bank is None:
        raise ValueError(f"density.kind={config.kind} needs statistics with a bank of normal embeddings, got none")
    num_tiles = statistics.grid[0] * statistics.grid[1]
    if (
        num_tiles > 1 and config.per_place is not None
    ):  # a location of the shared tile has the embeddings of num_tiles locations
        config = config.model_copy(update={"per_place": config.per_place * num_tiles})
    if num_tiles > 1:  # tiled textures have no fixed locations, so no Gaussian per location can describe them
        config = config.model_copy(update={"gaussian_share": 0.0})
    density = kind.build(config, statistics.per_tile)
    return density if statistics.grid == (1, 1) else TiledDensity(density, statistics.grid)


def supports_leave_one_out(config: DensityConfig, grid: tuple[int, int] = (1, 1)) -> bool:
    """Returns whether a density of the configured kind can score each training image without the image's own embeddings.

    If an image has several tiles, this needs a kind with a bank. Without a bank, a density can exclude one tile from its moments,
    but not all tiles of an image together.

    Args: grid: (rows, columns) of tiles of one image that share one density; (1, 1) for images without tiles.
    """
    kind = DENSITIES[config.kind]
    return hasattr(kind, "leave_one_out_scorer") and (grid == (1, 1) or kind.keeps_bank)


def leave_one_out_scorer(config: DensityConfig, statistics: Statistics, density: Density) -> LeaveOneOutScorer:
    """Builds a scorer that computes the distances of training images, each without the image's own embeddings.

    Args:
        statistics: the statistics from which the density was built.
        density: the result of `build_density` for a configuration for which `supports_leave_one_out` returns True.

    Raises: ValueError: a density of kind `gaussian` was fitted to fewer than three images.
    """
    tile_density = density.tile_density if isinstance(density, TiledDensity) else density
    scorer: LeaveOneOutScorer = DENSITIES[config.kind].leave_one_out_scorer(  # type: ignore[attr-defined]
        config, statistics.per_tile, tile_density
    )
    return scorer if statistics.grid == (1, 1) else TiledDensity(scorer, statistics.grid)


def density_tensors(config: DensityConfig, statistics: Statistics, density: Density) -> dict[str, Tensor]:
    """Returns the tensors that a bundle stores for `load_density`, by name. Each tile counts as one image.

    Args: density: the result of `build_density` for the same statistics.
    """
    if isinstance(density, TiledDensity):
        density = density.tile_density
    return DENSITIES[config.kind].tensors(config, statistics.per_tile, density)


def load_density(
    config: DensityConfig,
    tensors: Mapping[str, Tensor],
    height: int,
    width: int,
    device: torch.device | str,
    grid: tuple[int, int] = (1, 1),
) -> Density:
    """Rebuilds a density from the result of `density_tensors`.

    Args:
        height, width: rows and columns of locations of one tile.
        grid: (rows, columns) of tiles of one image that share the density.

    Raises: KeyError: a tensor is missing. ValueError: the shapes do not fit together.
    """
    density = DENSITIES[config.kind].load(config, tensors, height, width, device)
    return density if grid == (1, 1) else TiledDensity(density, grid)


def choose_bank_images(config: DensityConfig, num_images: int) -> set[int] | None:
    """Chooses at most density.max_images of the images 0 to num_images - 1 for the bank; None if the kind has no bank."""
    return sample_evenly(num_images, config.max_images) if DENSITIES[config.kind].keeps_bank else None


def sample_evenly(count: int, limit: int) -> set[int]:
    """Chooses at most `limit` evenly spaced numbers from 0 to count - 1; all numbers if count <= limit."""
    if count <= limit:
        return set(range(count))
    return {(2 * number + 1) * count // (2 * limit) for number in range(limit)}
