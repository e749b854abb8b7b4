"""Module for mean and scatter of the embeddings of each location. Images can be added and removed, and sites can be merged.

A location is a cell of the feature map. The scatter is the sum of centred outer products, that is, the covariance times n - 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from focus_ray.density.settings import DensityConfig

_CHUNK_BYTES = 8 * 2**20  # of covariances that are computed together: bounds the peak memory of a fit


class Moments:
    """Count, mean and scatter (sum of centred outer products) of the embeddings of each location.

    Merging the moments of two sites, or removing images, gives the same result, up to rounding, as a new pass over the images.
    Updates are pairwise (Chan, Golub, LeVeque 1979), so that float32 does not lose small variances beside large means.

    Attributes:
        count: number of images.
        height, width: size of the map of locations; L = height * width.
        channels: C, number of channels.
        mean: (L, C) float32.
        scatter: (L, C, C) float32.
    """

    def __init__(self, height: int, width: int, channels: int, device: torch.device | str = "cpu") -> None:
        self.height, self.width, self.channels = height, width, channels
        self.count = 0
        self.mean = torch.zeros(height * width, channels, device=device)
        self.scatter = torch.zeros(height * width, channels, channels, device=device)

    @torch.no_grad()
    def add_embeddings(self, embedding: Tensor) -> None:
        """Adds the embeddings (B, C, H, W) of B images, in place.

        Raises: ValueError: C, H or W differs, or a value is not finite.
        """
        expected = (self.channels, self.height, self.width)
        if embedding.ndim != 4 or tuple(embedding.shape[1:]) != expected:
            raise ValueError(
                f"the embedding has shape {tuple(embedding.shape)}, but these moments need (B, *{expected})"
            )
        if not bool(torch.isfinite(embedding).all()):
            raise ValueError("an embedding has values that are not finite: training diverged, or an image is broken")
        batch = len(embedding)
        if batch == 0:
            return
        values = move_locations_first(embedding.float())  # (L, B, C)
        total = self.count + batch
        weight = (self.count * batch / total) ** 0.5
        for part in split_locations_into_chunks(len(values), self.channels):
            batch_mean = values[part].mean(dim=1)
            difference = batch_mean - self.mean[part]
            # the shift between the two means is one more row of the same matrix product, which saves a second product
            centred = torch.cat([values[part] - batch_mean[:, None], weight * difference[:, None]], dim=1)
            self.scatter[part].baddbmm_(centred.transpose(1, 2), centred)
            self.mean[part] += difference * (batch / total)
        self.count = total

    @torch.no_grad()
    def merge(self, other: Moments) -> Moments:
        """Adds other moments to these, in place, and returns self. Raises: ValueError: the shapes differ."""
        self._check_same_shape(other)
        total = self.count + other.count
        if other.count:
            difference = other.mean - self.mean
            self.scatter += other.scatter
            alpha = self.count * other.count / total
            self.scatter.baddbmm_(difference[:, :, None], difference[:, None, :], alpha=alpha)
            self.mean += difference * (other.count / total)
            self.count = total
        return self

    @torch.no_grad()
    def remove(self, other: Moments) -> Moments:
        """Removes moments that were merged before, in place, and returns self.

        Raises: ValueError: the shapes differ, or `other` has more images.
        """
        self._check_same_shape(other)
        if other.count > self.count:
            raise ValueError(f"cannot remove moments of {other.count} images from the moments of {self.count} images")
        remaining = self.count - other.count
        if remaining and other.count:
            mean = self.mean + (self.mean - other.mean) * (other.count / remaining)
            difference = other.mean - mean
            self.scatter -= other.scatter
            alpha = -remaining * other.count / self.count
            self.scatter.baddbmm_(difference[:, :, None], difference[:, None, :], alpha=alpha)
            self.mean = mean
        elif not remaining:
            self.mean.zero_()
            self.scatter.zero_()
        self.count = remaining
        return self

    def _check_same_shape(self, other: Moments) -> None:
        """Raises ValueError if other moments have a different C, H or W."""
        shapes = [(moments.height, moments.width, moments.channels) for moments in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"moments with (H, W, C) = {shapes[1]} do not fit moments with (H, W, C) = {shapes[0]}")


def compute_pooled_covariance(moments: Moments) -> Tensor:
    """Computes the mean (C, C) of the covariances of all locations. Raises: ValueError: fewer than two images."""
    check_enough_images(moments)
    return moments.scatter.mean(dim=0) / (moments.count - 1)


def compute_mean_variance(moments: Moments) -> float:
    """Computes the variance between images, averaged over locations and channels. Raises: ValueError: fewer than two images."""
    check_enough_images(moments)
    return float(moments.scatter.diagonal(dim1=1, dim2=2).mean()) / (moments.count - 1)


def compute_absolute_ridge(config: DensityConfig, moments: Moments) -> float:
    """Converts density.shrinkage to the number to add to a covariance's diagonal, in the squared unit of the embeddings.

    Raises: ValueError: density.shrinkage is not absolute, and there are fewer than two images.
    """
    if isinstance(config.shrinkage, str):
        return max(float(config.shrinkage.removesuffix(" absolute")), 1e-12)
    return max(config.shrinkage * compute_mean_variance(moments), 1e-12)


def check_enough_images(moments: Moments) -> None:
    """Raises ValueError if the moments have fewer than two images, because then they have no variance."""
    if moments.count < 2:
        raise ValueError(f"a density needs at least 2 normal images, got {moments.count}: add training images")


def move_locations_first(embedding: Tensor) -> Tensor:
    """Copies an embedding (B, C, H, W) to a contiguous tensor (H*W, B, C), which is faster in a batched product than a view."""
    batch, channels, height, width = embedding.shape
    return embedding.permute(2, 3, 0, 1).reshape(height * width, batch, channels).contiguous()


def pack_lower_triangles(matrices: Tensor) -> Tensor:
    """Extracts the lower triangles of matrices (L, C, C), row by row: (L, C (C + 1) / 2)."""
    channels = matrices.shape[1]
    rows, columns = torch.tril_indices(channels, channels, device=matrices.device)
    packed = matrices.new_empty(matrices.shape[0], len(rows))
    for part in split_locations_into_chunks(matrices.shape[0], channels):
        packed[part] = matrices[part][:, rows, columns]
    return packed


def unpack_lower_triangles(packed: Tensor, symmetric: bool = False) -> Tensor:
    """Rebuilds matrices (L, C, C) from the result of `pack_lower_triangles` (L, C (C + 1) / 2).

    Args: symmetric: True: mirror the lower triangle to the upper one. False: fill the upper triangle with zeros.
    """
    channels = int((2 * packed.shape[1] + 0.25) ** 0.5)
    rows, columns = torch.tril_indices(channels, channels, device=packed.device)
    matrices = packed.new_zeros(packed.shape[0], channels, channels)
    matrices[:, rows, columns] = packed
    if symmetric:
        matrices[:, columns, rows] = packed
    return matrices


def split_locations_into_chunks(num_locations: int, channels: int) -> Iterator[slice]:
    """Generator: yields slices that cover all locations; the covariances (n, C, C) of a slice take at most _CHUNK_BYTES.

    If a single covariance is larger, a slice has one location.
    """
    step = max(1, _CHUNK_BYTES // (channels * channels * 4))
    for start in range(0, num_locations, step):
        yield slice(start, min(start + step, num_locations))
