"""Module for fitted densities and for the statistics of normal images from which a density is built.

A density is a model of normal embeddings: it measures how far a new embedding is from the normal ones. The bank contains the
stored embeddings of selected normal images. An image number is a position in the bank, from 0. A location is a cell
of the feature map. Each kind of density is a module of `density.kinds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from focus_ray.density.bank import restore_bank_from_coresets, select_embeddings_outside_coresets
from focus_ray.density.moments import Moments, pack_lower_triangles, unpack_lower_triangles
from focus_ray.density.registry import DENSITIES
from focus_ray.density.relations import ImageRelations, join_relations
from focus_ray.density.settings import DensityConfig
from focus_ray.density.tiles import TiledDensity, join_bank_tiles, split_bank_into_tiles


class Density(Protocol):
    """A fitted model of normal embeddings that measures the distance of new embeddings to the normal embeddings.

    height, width: rows and columns of the map of locations for which the density was fitted.
    """

    height: int
    width: int

    @property
    def device(self) -> torch.device:
        """The device on which distances are computed."""
        ...

    def score(self, embedding: Tensor) -> Tensor:
        """Computes how far B embeddings (B, C, H, W) are from the normal embeddings of each location: (B, H, W), >= 0."""


class LeaveOneOutScorer(Protocol):
    """Scores the images that a density was fitted to as if the density had not seen them."""

    height: int
    width: int

    def score(self, embedding: Tensor, excluded_images: Tensor) -> Tensor:
        """Computes the distances of B training images to the training images that are not excluded.

        Args:
            embedding: (B, C, H, W), embeddings of the training images.
            excluded_images: positions in the bank of the images to exclude. (B,) excludes one image for each of the B images,
                usually the scored image. (B, K) excludes up to K images for each of the B images; a row may repeat a position.

        Returns: (B, H, W), >= 0.

        Raises: ValueError: fewer than two images would remain for a Gaussian.
        """


_PER_IMAGE = (
    "bank",
    "thetas",
    "shown",
    "descriptors",
)  # attributes of `NormalStatistics` with a row for each image of the bank


@dataclass
class NormalStatistics:
    """Statistics of normal images, from which a density is built. Statistics of several sites can be joined.

    moments: count, mean and scatter of the embeddings of all images.
    bank: (N, L, C + K) float16, stored embeddings of N selected images at L locations; the last K channels are for a coreset, a
        small subset of representative patches (K is 0 without a coreset). None if no embeddings are stored.
    thetas: (N, 2, 3), alignment of each image of the bank; None without image alignment.
    shown: (N, L) bool, True at locations of the bank's images that are scored; None if all locations are scored.
    residual_scatter: (2, C, C), scatter matrices of normal and defective residuals from which the projection was computed
        (`fitting.projection`); None if no projection was learnt.
    grid: (rows, columns) of tiles of one image. All tiles share the locations of the moments, and each tile counts as an image
        in `moments.count`. A row of the bank contains all tiles of an image.
    relations: which images of the bank show the same physical part; None if every image shows a different part.
    descriptors: (N, P, D) float16, features of the bank's images averaged over P cells, for the search for near-duplicates
        (`fitting.duplicates`); None if they were not computed.
    same_part_distance: the largest distance between descriptors at which two photographs may show the same physical part; None
        if it was not measured.
    """

    moments: Moments
    bank: Tensor | None = None
    thetas: Tensor | None = None
    residual_scatter: Tensor | None = None
    shown: Tensor | None = None
    grid: tuple[int, int] = (1, 1)
    relations: ImageRelations | None = None
    descriptors: Tensor | None = None
    same_part_distance: float | None = None

    @property
    def num_images(self) -> int:
        """Number of images in the moments. All tiles of an image count as one image."""
        return self.moments.count // (self.grid[0] * self.grid[1])

    @property
    def tile_statistics(self) -> NormalStatistics:
        """Statistics in which each tile counts as one image, with only moments, bank and relations.

        If images have a single tile, this is the object itself, with all attributes.
        """
        if self.grid == (1, 1):
            return self
        moments = self.moments
        bank = None if self.bank is None else split_bank_into_tiles(self.bank, self.grid, moments.height, moments.width)
        relations = None if self.relations is None else self.relations.repeat_for_tiles(self.grid[0] * self.grid[1])
        return NormalStatistics(moments, bank, relations=relations)

    def find_images_to_exclude(self, images: Tensor) -> Tensor:
        """Returns the positions of the images to exclude from the bank when images of the bank are scored.

        Args: images: (B,), positions of the scored images in the bank.

        Returns: without relations, `images`, so that each image excludes itself. With relations, (B, K): each image excludes
            itself and its related images; see `ImageRelations.find_related_images`.
        """
        return images if self.relations is None else self.relations.find_related_images(images)

    def join(self, other: NormalStatistics) -> NormalStatistics:
        """Adds the statistics of other images (of another site, of a fold, or new images), in place, and returns self.

        Data per bank image that only one of the two has, for instance `descriptors`, become None. No image of `self` becomes
        related to an image of `other`. `residual_scatter` of `other` is not used, and its `same_part_distance` only if `self`
        has none.

        Raises: ValueError: the shapes of the moments differ, or only one of the two has a bank.
        """
        if (self.bank is None) != (other.bank is None):
            raise ValueError(
                "statistics with a bank (of a memory) cannot be joined with statistics without a bank (of a Gaussian)"
            )
        self.moments.merge(other.moments)
        if self.bank is not None and other.bank is not None:
            self.relations = join_relations(self.relations, len(self.bank), other.relations, len(other.bank))
        for name in _PER_IMAGE:
            rows, other_rows = getattr(self, name), getattr(other, name)
            setattr(self, name, None if rows is None or other_rows is None else torch.cat([rows, other_rows]))
        if self.same_part_distance is None:
            self.same_part_distance = other.same_part_distance
        return self

    def limit_bank_size(self, num_images: int) -> None:
        """Reduces the bank and all data per bank image to at most `num_images` evenly spaced images, in place.

        The moments do not change.
        """
        if self.bank is not None and len(self.bank) > num_images:
            self.select_bank_images(sorted(choose_evenly_spaced(len(self.bank), num_images)))

    def select_bank_images(self, images: list[int]) -> None:
        """Reduces the bank and all data per bank image to the images at these positions, in place; the moments do not change."""
        for name in _PER_IMAGE:
            rows = getattr(self, name)
            setattr(self, name, None if rows is None else rows[images])
        if self.relations is not None:
            self.relations = self.relations.select_images(images)

    def collect_tensors(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors, by name, from which `restore_moments` and `restore_bank` rebuild moments and bank.

        Args: stored: the result of `collect_density_tensors`. Embeddings that it contains are left out, so that a bundle stores
            every embedding once.
        """
        moments, channels = self.moments, self.moments.channels
        tensors = {"mean": moments.mean, "scatter": pack_lower_triangles(moments.scatter)}
        tiles = self.tile_statistics.bank
        if "bank.images" in stored and tiles is not None:
            tensors["bank.rest"] = select_embeddings_outside_coresets(tiles[:, :, :channels], stored["bank.images"])
        if self.bank is not None and self.bank.shape[2] > channels:
            tensors["coreset_bank"] = self.bank[:, :, channels:]
        return tensors


def restore_moments(count: int, height: int, width: int, tensors: Mapping[str, Tensor]) -> Moments:
    """Rebuilds moments from the result of `NormalStatistics.collect_tensors`.

    Args:
        count: number of images in the moments; every tile counts if tiles share the locations.
        height, width: size of the map of locations.
    """
    moments = Moments(0, 0, 0)
    moments.count, moments.height, moments.width, moments.channels = count, height, width, tensors["mean"].shape[1]
    moments.mean, moments.scatter = tensors["mean"], unpack_lower_triangles(tensors["scatter"], symmetric=True)
    return moments


def restore_bank(
    moments: Moments, grid: tuple[int, int], tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> Tensor | None:
    """Rebuilds the bank from stored tensors; returns None if the density has no bank.

    Args:
        moments: the rebuilt moments, which set the size of the map.
        grid: (rows, columns) of tiles of an image.
        tensors: the result of `NormalStatistics.collect_tensors`.
        stored: the result of `collect_density_tensors`.
    """
    bank = stored.get("bank")
    if bank is None:
        return None
    if "bank.rest" in tensors:
        bank = restore_bank_from_coresets(bank, stored["bank.images"], tensors["bank.rest"])
    bank = join_bank_tiles(bank, grid, moments.height, moments.width)
    return torch.cat([bank, tensors["coreset_bank"]], dim=2) if "coreset_bank" in tensors else bank


def build_density(config: DensityConfig, statistics: NormalStatistics) -> Density:
    """Fits a density of the configured kind to the statistics.

    Raises: ValueError: fewer than two images, or the kind needs a bank and the statistics have none.
    """
    kind = DENSITIES[config.kind]
    if kind.keeps_bank and statistics.bank is None:
        raise ValueError(f"density.kind={config.kind} needs statistics with a bank of normal embeddings, got none")
    return _wrap_tile_density(
        kind.build(_get_tile_config(config, statistics.grid), statistics.tile_statistics), statistics.grid
    )


def supports_leave_one_out(config: DensityConfig, grid: tuple[int, int] = (1, 1)) -> bool:
    """Returns whether a density of the configured kind can score each training image as if it had not seen that image.

    If several tiles of an image share one density, this needs a kind with a bank. Without a bank, a density can exclude one tile
    from its moments, but not all tiles of an image together.

    Args: grid: (rows, columns) of tiles of one image that share one density; (1, 1) for images without tiles.
    """
    kind = DENSITIES[config.kind]
    return kind.supports_leave_one_out and (grid == (1, 1) or kind.keeps_bank)


def build_leave_one_out_scorer(
    config: DensityConfig, statistics: NormalStatistics, density: Density
) -> LeaveOneOutScorer:
    """Builds a scorer that computes the distances of training images, each without the image's own embeddings.

    Args:
        statistics: the statistics from which the density was built.
        density: the result of `build_density` for a configuration for which `supports_leave_one_out` returns True.

    Raises: ValueError: a density of kind `gaussian` was fitted to fewer than three images.
    """
    scorer = DENSITIES[config.kind].build_leave_one_out_scorer(
        config, statistics.tile_statistics, _unwrap_tile_density(density)
    )
    return _wrap_tile_density(scorer, statistics.grid)


def compute_leave_one_out_distances_per_projection(
    config: DensityConfig,
    density: Density,
    statistics: Iterable[NormalStatistics],
    score: Callable[[LeaveOneOutScorer, Tensor], Tensor],
) -> Iterator[Tensor]:
    """Generator: for each of several projections, builds the density again and yields the leave-one-out distances of all images.

    A projection maps all channels of an embedding to fewer channels. A leave-one-out distance of an image is its distance to a
    density that has not seen the image.

    Args:
        density: the result of `build_density` for the projection that was learnt from all images.
        statistics: one object for each projection, with a bank. The channels for a coreset are the same in all objects.
        score: called as score(scorer, channels), with the channels (N, L, C) of the bank that the scorer compares; returns the
            leave-one-out distances of all N images.

    Raises: ValueError: there are too few images for the kind of density.
    """
    grid = density.grid if isinstance(density, TiledDensity) else (1, 1)

    def score_tiles(scorer: LeaveOneOutScorer, bank: Tensor) -> Tensor:
        """Calls `score` with a scorer of whole images and a bank of whole images, for a scorer and a bank of tiles."""
        return score(_wrap_tile_density(scorer, grid), join_bank_tiles(bank, grid, scorer.height, scorer.width))

    return DENSITIES[config.kind].compute_leave_one_out_distances_per_projection(
        _get_tile_config(config, grid),
        _unwrap_tile_density(density),
        (each.tile_statistics for each in statistics),
        score_tiles,
    )


def collect_density_tensors(config: DensityConfig, statistics: NormalStatistics, density: Density) -> dict[str, Tensor]:
    """Returns the tensors that a bundle stores for `restore_density`, by name. In these tensors, each tile counts as one image.

    Args: density: the result of `build_density` for the same statistics.
    """
    return DENSITIES[config.kind].collect_tensors(config, statistics.tile_statistics, _unwrap_tile_density(density))


def restore_density(
    config: DensityConfig,
    tensors: Mapping[str, Tensor],
    height: int,
    width: int,
    device: torch.device | str,
    grid: tuple[int, int] = (1, 1),
) -> Density:
    """Rebuilds a density from the result of `collect_density_tensors`.

    Args:
        height, width: rows and columns of locations of one tile.
        grid: (rows, columns) of tiles of one image that share the density.

    Raises: KeyError: a tensor is missing. ValueError: the shapes do not fit together.
    """
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    return _wrap_tile_density(DENSITIES[config.kind].restore(config, on_device, height, width), grid)


def build_exportable_density(config: DensityConfig, density: Density, half: bool) -> Density:
    """Returns a density that `torch.export` can trace. It computes in float32, also from tensors that are stored in float16.

    Args:
        density: computes in float32.
        half: round the stored tensors to float16, see `shrink_tensor_for_export`.
    """
    exportable = DENSITIES[config.kind].make_exportable(_unwrap_tile_density(density), half)
    return _wrap_tile_density(exportable, density.grid if isinstance(density, TiledDensity) else (1, 1))


def shrink_tensor_for_export(values: Tensor, half: bool) -> Tensor:
    """Converts values to float16 where this is allowed; otherwise the values keep their type.

    Args: half: True: convert unless a value overflows. False: convert only if float16 represents all values exactly.
    """
    half_values = values.half()
    fits = bool(torch.isfinite(half_values).all()) if half else bool((half_values.float() == values).all())
    return (half_values if fits else values).contiguous()


def _get_tile_config(config: DensityConfig, grid: tuple[int, int]) -> DensityConfig:
    """Returns the settings of the density that all tiles of an image share; the unchanged settings for images without tiles."""
    return config if grid == (1, 1) else DENSITIES[config.kind].adapt_settings_to_tiles(config, grid[0] * grid[1])


def _unwrap_tile_density(density: Any) -> Any:
    """Returns the density of single tiles inside a density of whole images; a density without tiles is returned unchanged."""
    return density.tile_density if isinstance(density, TiledDensity) else density


def _wrap_tile_density(density: Any, grid: tuple[int, int]) -> Any:
    """Wraps a density, or leave-one-out scorer, of single tiles so that it scores whole images; unchanged without tiles."""
    return density if grid == (1, 1) else TiledDensity(density, grid)


def choose_bank_images(config: DensityConfig, num_images: int) -> set[int] | None:
    """Chooses at most density.max_images of the images 0 to num_images - 1 for the bank; None if the kind needs no bank."""
    return choose_evenly_spaced(num_images, config.max_images) if DENSITIES[config.kind].keeps_bank else None


def choose_evenly_spaced(count: int, limit: int) -> set[int]:
    """Chooses at most `limit` evenly spaced numbers from 0 to count - 1; all numbers if count <= limit."""
    if count <= limit:
        return set(range(count))
    return {(2 * number + 1) * count // (2 * limit) for number in range(limit)}
