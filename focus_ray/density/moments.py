"""Mergeable, removable moments of the embeddings of each location."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK_BYTES = 8 * 2**20  # of covariances handled at once: bounds the peak memory of a fit


class Moments:
    """Count, mean and scatter (sum of centred outer products) of the embeddings of each location.

    Adding two sites' moments, or taking images out again, gives what a fresh pass over the remaining images would:
    updates are pairwise (Chan, Golub, LeVeque 1979), so that float32 does not lose small variances to large means.

    Attributes:
        count: images seen.  height, width: of the map; L = height * width.
        mean: (L, C).  scatter: (L, C, C), both float32.
    """

    def __init__(self, height: int, width: int, channels: int, device: torch.device | str = "cpu") -> None:
        self.height, self.width, self.channels = height, width, channels
        self.count = 0
        self.mean = torch.zeros(height * width, channels, device=device)
        self.scatter = torch.zeros(height * width, channels, channels, device=device)

    @torch.no_grad()
    def update(self, embedding: Tensor) -> None:
        """Takes in (B, C, H, W).

        Raises: ValueError: another C, H or W, or values that are not finite.
        """
        self._check(embedding)
        self._absorb(locations_first(embedding.float()), sign=1)

    @torch.no_grad()
    def downdate(self, embedding: Tensor) -> None:
        """Takes (B, C, H, W), which had been taken in, out again.

        Raises: ValueError: another shape, values that are not finite, or more images than were taken in.
        """
        self._check(embedding)
        if embedding.shape[0] > self.count:
            raise ValueError(f"cannot take {embedding.shape[0]} images out of moments of {self.count}")
        self._absorb(locations_first(embedding.float()), sign=-1)

    @torch.no_grad()
    def merge(self, other: Moments) -> Moments:
        """Adds another set's moments to these, in place. Raises: ValueError: the shapes differ."""
        self._check_shape(other)
        total = self.count + other.count
        if other.count:
            difference = other.mean - self.mean
            self.scatter += other.scatter
            self.scatter.baddbmm_(
                difference[:, :, None], difference[:, None, :], alpha=self.count * other.count / total
            )
            self.mean += difference * (other.count / total)
            self.count = total
        return self

    @torch.no_grad()
    def remove(self, other: Moments) -> Moments:
        """Takes a set that had been merged out again, in place. Raises: ValueError: shapes differ, or too many."""
        self._check_shape(other)
        if other.count > self.count:
            raise ValueError(f"cannot take moments of {other.count} images out of moments of {self.count}")
        rest = self.count - other.count
        if rest == 0:
            self.count = 0
            self.mean.zero_()
            self.scatter.zero_()
        elif other.count:
            mean = self.mean + (self.mean - other.mean) * (other.count / rest)
            difference = other.mean - mean
            self.scatter -= other.scatter
            self.scatter.baddbmm_(
                difference[:, :, None], difference[:, None, :], alpha=-rest * other.count / self.count
            )
            self.mean = mean
            self.count = rest
        return self

    def _absorb(self, values: Tensor, sign: int) -> None:
        batch = values.shape[1]
        if batch == 0:
            return
        rest = self.count + sign * batch
        if rest == 0:
            self.count = 0
            self.mean.zero_()
            self.scatter.zero_()
            return
        base = self.count if sign > 0 else rest
        weight = (base * batch / (self.count if sign < 0 else rest)) ** 0.5
        for part in chunks(len(values), self.channels):
            batch_mean = values[part].mean(dim=1)
            difference = batch_mean - self.mean[part]
            new_mean = self.mean[part] + difference * (sign * batch / rest)
            # the shift between the two means rides along as one more sample of the same product
            pull = difference if sign > 0 else batch_mean - new_mean
            centred = torch.cat([values[part] - batch_mean[:, None], weight * pull[:, None]], dim=1)
            self.scatter[part].baddbmm_(centred.transpose(1, 2), centred, alpha=sign)
            self.mean[part] = new_mean
        self.count = rest

    def _check(self, embedding: Tensor) -> None:
        expected = (self.channels, self.height, self.width)
        if embedding.ndim != 4 or tuple(embedding.shape[1:]) != expected:
            raise ValueError(f"embedding has shape {tuple(embedding.shape)}, these moments take (B, {expected})")
        if not bool(torch.isfinite(embedding).all()):
            raise ValueError("an embedding has values that are not finite: training diverged, or an image is broken")

    def _check_shape(self, other: Moments) -> None:
        mine = (self.height, self.width, self.channels)
        theirs = (other.height, other.width, other.channels)
        if mine != theirs:
            raise ValueError(f"moments of (H, W, C) {theirs} cannot be joined with moments of {mine}")


def pooled_covariance(moments: Moments) -> Tensor:
    """(C, C): the covariance within locations, averaged over them. Raises: ValueError: fewer than two images."""
    check_count(moments)
    return moments.scatter.mean(dim=0) / (moments.count - 1)


def mean_variance(moments: Moments) -> float:
    """Variance within locations, averaged over locations and channels: the scale of the embeddings."""
    check_count(moments)
    return float(moments.scatter.diagonal(dim1=1, dim2=2).mean()) / (moments.count - 1)


def check_count(moments: Moments) -> None:
    if moments.count < 2:
        raise ValueError(f"a density needs at least 2 normal images, got {moments.count}: add training images")


def locations_first(embedding: Tensor) -> Tensor:
    """(B, C, H, W) -> (H*W, B, C), contiguous: a permuted view is many times slower in a batched product."""
    batch, channels, height, width = embedding.shape
    return embedding.permute(2, 3, 0, 1).reshape(height * width, batch, channels).contiguous()


def pack_lower(matrices: Tensor) -> Tensor:
    """The lower triangles of (L, C, C), row by row -> (L, C (C + 1) / 2)."""
    rows, columns = torch.tril_indices(matrices.shape[1], matrices.shape[1], device=matrices.device)
    return matrices[:, rows, columns]


def unpack_lower(packed: Tensor, symmetric: bool = False) -> Tensor:
    """Undoes `pack_lower`: (L, C (C + 1) / 2) -> (L, C, C), the upper triangle zero or mirrored."""
    channels = int((2 * packed.shape[1] + 0.25) ** 0.5)
    rows, columns = torch.tril_indices(channels, channels, device=packed.device)
    matrices = packed.new_zeros(packed.shape[0], channels, channels)
    matrices[:, rows, columns] = packed
    if symmetric:
        matrices[:, columns, rows] = packed
    return matrices


def pack_in_chunks(matrices: Tensor) -> Tensor:
    """`pack_lower` without a second copy of the index at full size."""
    channels = matrices.shape[1]
    packed = matrices.new_empty(matrices.shape[0], channels * (channels + 1) // 2)
    for part in chunks(matrices.shape[0], channels):
        packed[part] = pack_lower(matrices[part])
    return packed


def chunks(locations: int, channels: int) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // (channels * channels * 4))
    for start in range(0, locations, step):
        yield slice(start, min(start + step, locations))


def moments_tensors(moments: Moments) -> dict[str, Tensor]:
    return {"mean": moments.mean, "scatter": pack_in_chunks(moments.scatter)}
