"""One Gaussian per location: mean and precision factor; Mahalanobis distance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from focus_ray.config import DensityConfig
from focus_ray.density.base import Density, LeavesOut, Statistics, ridge_of
from focus_ray.density.moments import (
    Moments,
    check_count,
    chunks,
    locations_first,
    pack_lower,
    pooled_covariance,
    unpack_lower,
)


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


@torch.no_grad()
def fit_gaussian(
    moments: Moments, ridge: float, pooling: float = 0.0, packed: bool = False, divisor: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and precision factor of moments.

    Covariance of a location: (1 - pooling) scatter / (count - 1) + pooling * pooled + ridge I. With pooling 0 that is
    PaDiM's (arXiv 2011.08785, section III-B); pooling towards the mean over locations [ours] lends a location with few
    images for its channels the directions in which normal parts vary elsewhere (as in discriminant analysis).

    Args:
        packed: give the factors as `pack_lower` does, at half the memory.
        divisor: of a location's scatter, in place of count - 1.

    Returns: mean (L, C), precision factor (L, C, C), or (L, C (C + 1) / 2) packed.

    Raises: ValueError: fewer than two images.
    """
    check_count(moments)
    locations, channels = moments.mean.shape
    shape = (channels * (channels + 1) // 2,) if packed else (channels, channels)
    factors = torch.empty(locations, *shape, device=moments.mean.device)
    identity = torch.eye(channels, device=moments.mean.device)
    base = ridge * identity
    if pooling:
        base = base + pooling * pooled_covariance(moments)
    for part in chunks(locations, channels):
        covariance = torch.add(base, moments.scatter[part], alpha=(1 - pooling) / (divisor or moments.count - 1))
        root = torch.linalg.cholesky(covariance)
        factor = torch.linalg.solve_triangular(root, identity.expand_as(root), upper=False)
        factors[part] = pack_lower(factor) if packed else factor
    return moments.mean.clone(), factors


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


class LeftOutGaussian:
    """Distances of images to the Gaussian of all the others, from one fit [ours].

    Taking an image x out of n moves the mean m by (x - m) / (n - 1) and takes n / (n - 1) v v^T, v = x - m, from the
    scatter. With A the covariance of the whole scatter over n - 2, the left-out covariance is A - c v v^T, and the
    Sherman-Morrison formula gives its Mahalanobis distance from v^T A^-1 v alone. Exact but for the ridge and the pooled
    covariance, which stay those of all images.
    """

    def __init__(self, moments: Moments, ridge: float, pooling: float) -> None:
        """Raises: ValueError: fewer than three images."""
        if moments.count < 3:
            raise ValueError(f"leaving one image out needs at least 3, got {moments.count}: add training images")
        n = moments.count
        self.height, self.width = moments.height, moments.width
        mean, factor = fit_gaussian(moments, ridge, pooling, divisor=n - 2)
        self.gaussian = Gaussian(mean, factor, moments.height, moments.width)
        self.moved = n / (n - 1)
        self.taken = (1 - pooling) * n / ((n - 1) * (n - 2))

    def score(self, embedding: Tensor, own: Tensor) -> Tensor:
        """(B, C, H, W) of images among those fitted -> (B, H, W)."""
        square = self.gaussian.score(embedding).square()
        return self.moved * (square / (1 - self.taken * square).clamp_min(1e-6)).sqrt()


class _GaussianKind:
    keeps_bank = False

    def build(self, config: DensityConfig, statistics: Statistics) -> Gaussian:
        moments = statistics.moments
        mean, factor = fit_gaussian(moments, ridge_of(config, moments), config.pooling)
        return Gaussian(mean, factor, moments.height, moments.width)

    def leaving_out(self, config: DensityConfig, statistics: Statistics, density: Density) -> LeavesOut:
        return LeftOutGaussian(statistics.moments, ridge_of(config, statistics.moments), config.pooling)

    def tensors(self, config: DensityConfig, statistics: Statistics, density: Density) -> dict[str, Tensor]:
        moments = statistics.moments
        mean, packed = fit_gaussian(moments, ridge_of(config, moments), config.pooling, packed=True)
        return {"mean": mean, "precision_factor": packed}

    def load(
        self, config: DensityConfig, tensors: Mapping[str, Tensor], height: int, width: int, device: torch.device | str
    ) -> Gaussian:
        factor = unpack_lower(tensors["precision_factor"].to(device))
        return Gaussian(tensors["mean"].to(device), factor, height, width)


GAUSSIAN = _GaussianKind()
