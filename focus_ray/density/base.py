"""The densities behind one interface: what a pass over normal images keeps, and what is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from focus_ray.config import DensityConfig
from focus_ray.density.moments import Moments, mean_variance
from focus_ray.density.relations import Relations, join_relations
from focus_ray.density.tiles import SharedByTiles, fold_bank
from focus_ray.kinds import DENSITIES


class Density(Protocol):
    """Says how far each patch of an embedding is from the normal ones of its place."""

    height: int
    width: int

    @property
    def device(self) -> torch.device: ...

    def score(self, embedding: Tensor) -> Tensor:
        """(B, C, H, W) -> distances (B, H, W), >= 0."""


class LeavesOut(Protocol):
    """A density that scores images it was made of as if they were new."""

    height: int
    width: int

    def score(self, embedding: Tensor, own: Tensor) -> Tensor:
        """(B, C, H, W) -> distances (B, H, W), each image's own embeddings left out for it.

        Args:
            own: (B,), the images' numbers in the bank, or (B, K), the numbers of all images that are left out for each; of no
                meaning to a density without a bank.
        """


class DensityKind(Protocol):
    """How a density of one kind comes to be; its name in `DENSITIES` is what density.kind takes.

    keeps_bank: whether it is built from the embeddings of normal images, and not from their moments alone.

    A kind may also have `leaving_out(config, statistics, density) -> LeavesOut`, of a density as `build` made it; one without is
    calibrated by folds.
    """

    keeps_bank: bool

    def build(self, config: DensityConfig, statistics: Statistics) -> Density:
        """Raises: ValueError: fewer than two images."""

    def tensors(self, config: DensityConfig, statistics: Statistics, density: Density) -> dict[str, Tensor]:
        """What a bundle stores, for `load`; the bank, where it is kept, under the name 'bank', cut to the channels of places, or
        the part of it that is enough, with the images that it was taken from under 'bank.images'.

        Args:
            density: as `build` made it of the same statistics.
        """

    def load(
        self, config: DensityConfig, tensors: Mapping[str, Tensor], height: int, width: int, device: torch.device | str
    ) -> Density:
        """Raises: KeyError, ValueError: tensors that do not fit."""


@dataclass
class Statistics:
    """What is kept of the normal images; statistics of several sites can be joined.

    moments: of all images.
    bank: (N, L, C + K) float16, embeddings of the images that a memory keeps, with K channels for a coreset (0: none); None for
        a Gaussian.
    thetas: (N, 2, 3), how the images of the bank were aligned; None where they were not.
    shown: (N, L) bool, places of the images of the bank that are scored; None: all.
    scatter: (2, C, C), of normal and of defective residuals, of which the metric was learnt (`fitting.metric`); None: it was not.
    grid: rows and columns of tiles that share the places of the moments, which count each; the bank has those of all tiles.
    relations: which images of the bank show the same part; None: no two of them.
    descriptors: (N, P, K) float16, the images of the bank as near-duplicates are searched among them (`fitting.duplicates`).
    same_part_distance: the largest distance of descriptors at which two photographs may show the same part; None: not measured.
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
        return self.moments.count // (self.grid[0] * self.grid[1])

    @property
    def of_tiles(self) -> Statistics:
        """As if each tile that shares the places were an image."""
        if self.grid == (1, 1):
            return self
        moments = self.moments
        bank = None if self.bank is None else fold_bank(self.bank, self.grid, moments.height, moments.width)
        relations = None if self.relations is None else self.relations.repeat(self.grid[0] * self.grid[1])
        return Statistics(moments, bank, relations=relations)

    def left_out_with(self, own: Tensor) -> Tensor:
        """Numbers of the bank's images to leave out for each of some images, by their numbers (B,) -> (B,) or (B, K)."""
        return own if self.relations is None else self.relations.relatives(own)

    def join(self, other: Statistics) -> Statistics:
        """Adds another site's, in place. Raises: ValueError: shapes or kinds differ."""
        if (self.bank is None) != (other.bank is None):
            raise ValueError("statistics of a Gaussian and of a memory cannot be joined")
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

    def keep_at_most(self, num_images: int) -> None:
        """Thins the bank, evenly; the moments stay those of all images."""
        if self.bank is not None and len(self.bank) > num_images:
            self.keep(sorted(sample_positions(len(self.bank), num_images)))

    def keep(self, chosen: list[int]) -> None:
        """Keeps these images of the bank, by their numbers; the moments stay those of all."""
        if self.bank is not None:
            self.bank = self.bank[chosen]
        if self.thetas is not None:
            self.thetas = self.thetas[chosen]
        if self.shown is not None:
            self.shown = self.shown[chosen]
        if self.relations is not None:
            self.relations = self.relations.subset(chosen)
        if self.descriptors is not None:
            self.descriptors = self.descriptors[chosen]


def ridge_of(config: DensityConfig, moments: Moments) -> float:
    """The number added to a covariance's diagonal, in the embeddings' own unit squared."""
    scale = mean_variance(moments) if config.shrinkage_unit == "mean_variance" else 1.0
    return max(config.shrinkage * scale, 1e-12)


def build_density(config: DensityConfig, statistics: Statistics) -> Density:
    """The density of the config's kind. Raises: ValueError: fewer than two images, or no bank for a memory."""
    kind = DENSITIES[config.kind]
    if kind.keeps_bank and statistics.bank is None:
        raise ValueError(f"density.kind={config.kind} needs the bank of normal embeddings")
    tiles = statistics.grid[0] * statistics.grid[1]
    if tiles > 1 and config.per_place is not None:  # a place of the one tile stands for as many of the image
        config = config.model_copy(update={"per_place": config.per_place * tiles})
    if tiles > 1:  # a texture has no places of its own whose variation a Gaussian could know
        config = config.model_copy(update={"gaussian_share": 0.0})
    density = kind.build(config, statistics.of_tiles)
    return density if statistics.grid == (1, 1) else SharedByTiles(density, statistics.grid)


def leaves_out(config: DensityConfig, grid: tuple[int, int] = (1, 1)) -> bool:
    """Whether the density's kind can score an image it was made of as if it were new.

    Args: grid: as `Statistics.grid`. Without a bank, one tile can be left out of moments, and not all tiles of an image.
    """
    kind = DENSITIES[config.kind]
    return hasattr(kind, "leaving_out") and (grid == (1, 1) or kind.keeps_bank)


def leaving_out(config: DensityConfig, statistics: Statistics, density: Density) -> LeavesOut:
    """What scores the images that the density was made of as if they were new."""
    one = density.one if isinstance(density, SharedByTiles) else density
    found: LeavesOut = DENSITIES[config.kind].leaving_out(config, statistics.of_tiles, one)  # type: ignore[attr-defined]
    return found if statistics.grid == (1, 1) else SharedByTiles(found, statistics.grid)


def density_tensors(config: DensityConfig, statistics: Statistics, density: Density) -> dict[str, Tensor]:
    """What a bundle stores to build the density from, which is that of the statistics; a bank as in `Statistics.of_tiles`."""
    if isinstance(density, SharedByTiles):
        density = density.one
    return DENSITIES[config.kind].tensors(config, statistics.of_tiles, density)


def load_density(
    config: DensityConfig,
    tensors: Mapping[str, Tensor],
    height: int,
    width: int,
    device: torch.device | str,
    grid: tuple[int, int] = (1, 1),
) -> Density:
    """The density from `density_tensors`. Raises: KeyError, ValueError: tensors that do not fit.

    Args: height, width, grid: of the moments, and as `Statistics.grid`.
    """
    density = DENSITIES[config.kind].load(config, tensors, height, width, device)
    return density if grid == (1, 1) else SharedByTiles(density, grid)


def positions_to_keep(config: DensityConfig, count: int) -> set[int] | None:
    """Which of `count` images' embeddings a pass is to keep; None: none, since the density needs none."""
    return sample_positions(count, config.max_images) if DENSITIES[config.kind].keeps_bank else None


def sample_positions(count: int, limit: int) -> set[int]:
    """Which of `count` images, in the order of all workers, are among at most `limit` evenly chosen ones."""
    if count <= limit:
        return set(range(count))
    return {(2 * number + 1) * count // (2 * limit) for number in range(limit)}
