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


MAX_FITS = 4  # of a `LeftOutGaussian`, by the size of the group left out: 41 MB each at 1024 places and 100 channels


class LeftOutGaussian:
    """Distances of images to the Gaussian of all the others, from one fit [ours].

    Taking an image x out of n moves the mean m by (x - m) / (n - 1) and takes n / (n - 1) v v^T, v = x - m, from the
    scatter. With A the covariance of the whole scatter over n - 2, the left-out covariance is A - c v v^T, and the
    Sherman-Morrison formula gives its Mahalanobis distance from v^T A^-1 v alone. Exact but for the ridge and the pooled
    covariance, which stay those of all images. Several images are taken out together by the Woodbury formula.
    """

    def __init__(self, moments: Moments, ridge: float, pooling: float, bank: Tensor | None = None) -> None:
        """
        Args: bank: (N, L, C), embeddings of images among those fitted; needed where several images are left out together.

        Raises: ValueError: fewer than three images.
        """
        if moments.count < 3:
            raise ValueError(f"leaving one image out needs at least 3, got {moments.count}: add training images")
        self.height, self.width = moments.height, moments.width
        self.moments, self.ridge, self.pooling, self.bank = moments, ridge, pooling, bank
        self.fits: dict[int, Gaussian] = {}
        self.gaussian, self.num_left_out = self._fit(1), 1

    def _fit(self, num_left_out: int) -> Gaussian:
        """The Gaussian of all images whose covariance is scaled as if so many images were left out."""
        if num_left_out not in self.fits:
            if len(self.fits) >= MAX_FITS:
                self.fits.pop(next(iter(self.fits)))
            self.fits[num_left_out] = self._fit_anew(num_left_out)
        return self.fits[num_left_out]

    def _fit_anew(self, num_left_out: int) -> Gaussian:
        divisor = self.moments.count - num_left_out - 1
        if divisor < 1:
            raise ValueError(
                f"leaving out {num_left_out} images that show one part needs at least {num_left_out + 2} images, got "
                f"{self.moments.count}: add training images of other parts"
            )
        mean, factor = fit_gaussian(self.moments, self.ridge, self.pooling, divisor=divisor)
        return Gaussian(mean, factor, self.height, self.width)

    def score(self, embedding: Tensor, own: Tensor) -> Tensor:
        """(B, C, H, W) of images among those fitted -> (B, H, W). own: as of `LeavesOut.score`."""
        sets = [numbers.unique() for numbers in own.view(len(own), -1)]
        if all(len(numbers) == 1 for numbers in sets):
            return self._score_alone(embedding)
        distances = torch.empty(len(own), self.height, self.width, device=embedding.device)
        for size in sorted({len(numbers) for numbers in sets}):  # one fit for all sets of a size
            if size != self.num_left_out:
                self.gaussian, self.num_left_out = self._fit(size), size
            for numbers in {tuple(numbers.tolist()) for numbers in sets if len(numbers) == size}:
                images = [image for image, left_out in enumerate(sets) if tuple(left_out.tolist()) == numbers]
                if size == 1:
                    distances[images] = self._score_alone(embedding[images])
                else:
                    distances[images] = self._score_without(embedding[images], torch.tensor(numbers))
        return distances

    def _score_alone(self, embedding: Tensor) -> Tensor:
        """Each image (B, C, H, W) left out by itself -> (B, H, W)."""
        if self.num_left_out != 1:
            self.gaussian, self.num_left_out = self._fit(1), 1
        n = self.moments.count
        square = self.gaussian.score(embedding).square()
        taken = (1 - self.pooling) * n / ((n - 1) * (n - 2))
        return n / (n - 1) * (square / (1 - taken * square).clamp_min(1e-6)).sqrt()

    def _score_without(self, embedding: Tensor, numbers: Tensor) -> Tensor:
        """Images (B, C, H, W) with the same k images of the bank left out for each, their numbers (k,) -> (B, H, W).

        With v_j = x_j - m for the k images, m of all n images, and V = (v_1 ... v_k): the mean of the others is
        m - V 1 / (n - k), their scatter is S - V M V^T with M = I + 1 1^T / (n - k), whose inverse is I - 1 1^T / n. The
        squared distance of y = v + V 1 / (n - k) to A - c V M V^T, c = (1 - pooling) / (n - k - 1), is by Woodbury
        y^T A^-1 y + (y^T A^-1 V) ((c M)^-1 - V^T A^-1 V)^-1 (V^T A^-1 y).
        """
        assert self.bank is not None, "several images can be left out only of a density whose bank is kept"
        n, k = self.moments.count, len(numbers)
        factor, mean = self.gaussian.precision_factor, self.gaussian.mean
        rows = self.bank[numbers].to(mean).transpose(0, 1)[:, :, : mean.shape[1]]  # (L, k, C)
        centred = rows - mean[:, None]
        query = (
            locations_first(embedding.to(mean)) - mean[:, None] + centred.sum(dim=1, keepdim=True) / (n - k)
        )  # (L, B, C)
        whitened = torch.bmm(centred, factor.transpose(1, 2)).double()
        whitened_query = torch.bmm(query, factor.transpose(1, 2)).double()
        gram = whitened @ whitened.transpose(1, 2)  # V^T A^-1 V, (L, k, k)
        cross = whitened @ whitened_query.transpose(1, 2)  # V^T A^-1 y, (L, k, B)
        scale = (1 - self.pooling) / (n - k - 1)
        inverse = (torch.eye(k, dtype=gram.dtype, device=gram.device) - 1 / n) / max(scale, 1e-12)
        added = (cross * torch.linalg.solve(inverse - gram, cross)).sum(dim=1)
        square = whitened_query.square().sum(dim=2) + added  # (L, B)
        return square.clamp_min(0).sqrt().float().t().reshape(-1, self.height, self.width)


class _GaussianKind:
    keeps_bank = False

    def build(self, config: DensityConfig, statistics: Statistics) -> Gaussian:
        moments = statistics.moments
        mean, factor = fit_gaussian(moments, ridge_of(config, moments), config.pooling)
        return Gaussian(mean, factor, moments.height, moments.width)

    def leaving_out(self, config: DensityConfig, statistics: Statistics, density: Density) -> LeavesOut:
        ridge = ridge_of(config, statistics.moments)
        return LeftOutGaussian(statistics.moments, ridge, config.pooling, statistics.bank)

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
