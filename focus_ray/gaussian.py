"""One Gaussian per location: mergeable, removable moments; mean and precision factor; Mahalanobis distance."""

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
        for part in _chunks(len(values), self.channels):
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


class Gaussian:
    """The fitted density.

    Attributes:
        mean: (L, C).  precision_factor: (L, C, C), lower triangular, W with W^T W = inverse covariance.
    """

    def __init__(self, mean: Tensor, precision_factor: Tensor, height: int, width: int) -> None:
        if mean.shape[0] != height * width or precision_factor.shape != (*mean.shape, mean.shape[1]):
            raise ValueError(
                f"mean {tuple(mean.shape)} and precision factor {tuple(precision_factor.shape)} "
                f"do not fit a map of {height} x {width}"
            )
        self.mean, self.precision_factor, self.height, self.width = mean, precision_factor, height, width

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def score(self, embedding: Tensor) -> Tensor:
        """(B, C, H, W) -> distances (B, H, W)."""
        if tuple(embedding.shape[2:]) != (self.height, self.width):
            raise ValueError(
                f"embedding of {tuple(embedding.shape[2:])} places, the Gaussian was fitted at {(self.height, self.width)}"
            )
        return mahalanobis(embedding, self.mean, self.precision_factor)


def pooled_covariance(moments: Moments) -> Tensor:
    """(C, C): the covariance within locations, averaged over them. Raises: ValueError: fewer than two images."""
    _check_count(moments)
    return moments.scatter.mean(dim=0) / (moments.count - 1)


def mean_variance(moments: Moments) -> float:
    """Variance within locations, averaged over locations and channels: the scale of the embeddings."""
    _check_count(moments)
    return float(moments.scatter.diagonal(dim1=1, dim2=2).mean()) / (moments.count - 1)


@torch.no_grad()
def fit_gaussian(moments: Moments, ridge: float, pooling: float = 0.0, packed: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and precision factor of moments.

    Covariance of a location: (1 - pooling) scatter / (count - 1) + pooling * pooled + ridge I. With pooling 0 that is
    PaDiM's (arXiv 2011.08785, section III-B); pooling towards the mean over locations [ours] lends a location with few
    images for its channels the directions in which normal parts vary elsewhere (as in discriminant analysis).

    Args:
        packed: give the factors as `pack_lower` does, at half the memory.

    Returns: mean (L, C), precision factor (L, C, C), or (L, C (C + 1) / 2) packed.

    Raises: ValueError: fewer than two images.
    """
    _check_count(moments)
    locations, channels = moments.mean.shape
    shape = (channels * (channels + 1) // 2,) if packed else (channels, channels)
    factors = torch.empty(locations, *shape, device=moments.mean.device)
    identity = torch.eye(channels, device=moments.mean.device)
    base = ridge * identity
    if pooling:
        base = base + pooling * pooled_covariance(moments)
    for part in _chunks(locations, channels):
        covariance = torch.add(base, moments.scatter[part], alpha=(1 - pooling) / (moments.count - 1))
        root = torch.linalg.cholesky(covariance)
        factor = torch.linalg.solve_triangular(root, identity.expand_as(root), upper=False)
        factors[part] = pack_lower(factor) if packed else factor
    return moments.mean.clone(), factors


def _check_count(moments: Moments) -> None:
    if moments.count < 2:
        raise ValueError(f"a density needs at least 2 normal images, got {moments.count}: add training images")


def mahalanobis(embedding: Tensor, mean: Tensor, precision_factor: Tensor) -> Tensor:
    """Distance of each patch to the Gaussian of its position (PaDiM, arXiv 2011.08785, eq. 2).

    Args:
        embedding: (B, C, H, W), in the aligned frame.
        mean: (H*W, C).  precision_factor: (H*W, C, C), lower triangular, W with W^T W = inverse covariance.

    Returns: (B, H, W), >= 0, not squared (scikit-learn's function of this name is squared).
    """
    batch, channels, height, width = embedding.shape
    centred = locations_first(embedding) - mean[:, None].to(embedding.dtype)
    factor = precision_factor.to(embedding.dtype).transpose(1, 2)
    half = channels // 2  # the quarter above the diagonal is zero: not multiplied
    first = torch.bmm(centred[:, :, :half], factor[:, :half, :half])
    second = torch.bmm(centred, factor[:, :, half:])
    squares = first.square_().sum(dim=2) + second.square_().sum(dim=2)
    return squares.sqrt_().t().reshape(batch, height, width)


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
    for part in _chunks(matrices.shape[0], channels):
        packed[part] = pack_lower(matrices[part])
    return packed


def _chunks(locations: int, channels: int) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // (channels * channels * 4))
    for start in range(0, locations, step):
        yield slice(start, min(start + step, locations))
