"""Module for a density of one Gaussian per location (PaDiM, arXiv 2011.08785). Its distance is the Mahalanobis distance.

In shapes, L is the number of locations (cells of the feature map) and C the number of channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from focus_ray.density.base import shrink_tensor_for_export
from focus_ray.density.moments import (
    Moments,
    check_enough_images,
    compute_pooled_covariance,
    move_locations_first,
    split_locations_into_chunks,
)


class Gaussian:
    """A fitted density of one Gaussian per location.

    Attributes:
        mean: (L, C), mean embedding of each location.
        precision_factor: (L, C, C), lower triangular matrix W of each location, with W^T W = inverse covariance.
        height, width: size of the map of locations; L = height * width.
        channels: C.

    Raises: ValueError: the shapes do not fit together.
    """

    def __init__(self, mean: Tensor, precision_factor: Tensor, height: int, width: int) -> None:
        if mean.shape[0] != height * width or precision_factor.shape != (*mean.shape, mean.shape[1]):
            raise ValueError(
                f"a map of {height} x {width} locations needs a mean (L, C) and a precision factor (L, C, C) with "
                f"L = {height * width}, got {tuple(mean.shape)} and {tuple(precision_factor.shape)}"
            )
        self.mean, self.precision_factor, self.height, self.width = mean, precision_factor, height, width
        self.channels = mean.shape[1]

    @property
    def device(self) -> torch.device:
        """The device on which distances are computed."""
        return self.mean.device

    def score(self, embedding: Tensor) -> Tensor:
        """Computes the Mahalanobis distances (B, H, W), >= 0, of the patches of B embeddings (B, C, H, W)."""
        assert embedding.shape[2:] == (self.height, self.width)
        return compute_mahalanobis_distances(embedding, self.mean, self.precision_factor)

    def make_exportable(self, half: bool) -> Gaussian:
        """Returns a copy for export, whose precision factor is float16 if `shrink_tensor_for_export(..., half)` allows it."""
        return Gaussian(self.mean, shrink_tensor_for_export(self.precision_factor, half), self.height, self.width)


@torch.no_grad()
def fit_gaussian(
    moments: Moments, ridge: float, pooling: float = 0.0, divisor: int | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the mean and the precision factor of each location from its moments.

    The covariance of a location is (1 - pooling) scatter / (count - 1) + pooling * pooled + ridge I. Here `scatter` is the
    location's sum of centred outer products, `count` the number of images, `pooled` the mean covariance of all locations, and I
    the identity matrix. With pooling 0 this is the covariance of PaDiM (arXiv 2011.08785, section III-B). Pooling [ours] helps
    if there are few images per channel: a location then also uses the directions in which normal parts vary elsewhere (as in
    discriminant analysis).

    Args:
        moments: of all images.
        ridge: number that is added to the diagonal of each covariance.
        pooling: weight of the pooled covariance, 0 to 1.
        divisor: number that replaces count - 1 under the scatter; None: count - 1.

    Returns: mean (L, C), and precision factor (L, C, C), see `Gaussian`.

    Raises: ValueError: fewer than two images.
    """
    check_enough_images(moments)
    num_locations, channels = moments.mean.shape
    factors = torch.empty_like(moments.scatter)
    identity = torch.eye(channels, device=moments.mean.device)
    base = ridge * identity
    if pooling:
        base = base + pooling * compute_pooled_covariance(moments)
    for part in split_locations_into_chunks(num_locations, channels):
        covariance = torch.add(base, moments.scatter[part], alpha=(1 - pooling) / (divisor or moments.count - 1))
        root = torch.linalg.cholesky(covariance)
        factors[part] = torch.linalg.solve_triangular(root, identity.expand_as(root), upper=False)
    return moments.mean.clone(), factors


def compute_mahalanobis_distances(embedding: Tensor, mean: Tensor, precision_factor: Tensor) -> Tensor:
    """Computes the Mahalanobis distance of each patch to the Gaussian of its location (PaDiM, arXiv 2011.08785, eq. 2).

    Args:
        embedding: (B, C, H, W), feature maps of B images after alignment.
        mean: (H*W, C).
        precision_factor: (H*W, C, C), lower triangular matrix W of each location, with W^T W = inverse covariance.

    Returns: (B, H, W), >= 0, not squared (the method `mahalanobis` of scikit-learn's covariance estimators returns the square).
    """
    batch, channels, height, width = embedding.shape
    centred = move_locations_first(embedding) - mean[:, None].to(embedding.dtype)
    factor = precision_factor.to(embedding.dtype).transpose(1, 2)
    half = channels // 2  # two products skip the quarter of the factor above the diagonal that is zero
    first = torch.bmm(centred[:, :, :half], factor[:, :half, :half])
    second = torch.bmm(centred, factor[:, :, half:])
    squares = first.square_().sum(dim=2) + second.square_().sum(dim=2)
    return squares.sqrt_().t().reshape(batch, height, width)


MAX_FITS = 4  # fits that a `LeaveOneOutGaussian` stores: 41 MB each at 1024 locations and 100 channels


class LeaveOneOutGaussian:
    """Scores each training image against the Gaussian of all other training images, from one fit [ours].

    "Leave-one-out" means: an image is scored as if it had not been in the training images. For each number of excluded images,
    the Gaussian of all images is fitted once, and its distances are corrected by a formula: Sherman-Morrison for one excluded
    image, Woodbury for several. The result is exact, except that ridge and pooled covariance still include the excluded images.
    """

    # The formula for one excluded image:
    #   x: embedding of one of n images
    #   m: mean of all images
    #   v = x - m
    #   A: covariance that is computed from the scatter of all images with the divisor n - 2
    # Without x, the covariance is A - c v v^T with a constant c, so the distance follows from v^T A^-1 v alone.
    def __init__(self, moments: Moments, ridge: float, pooling: float, bank: Tensor | None = None) -> None:
        """
        Args:
            moments: of all training images.
            ridge: number that is added to the diagonal of each covariance.
            pooling: weight of the pooled covariance, 0 to 1, see `fit_gaussian`.
            bank: (N, L, C or more), stored embeddings of training images; only needed to exclude several images together.

        Raises: ValueError: fewer than three images.
        """
        if moments.count < 3:
            raise ValueError(
                f"leave-one-out needs at least 3 training images, got {moments.count}: add training images"
            )
        self.height, self.width, self.channels = moments.height, moments.width, moments.channels
        self.moments, self.ridge, self.pooling, self.bank = moments, ridge, pooling, bank
        self.fits: dict[int, Gaussian] = {}  # by the number of excluded images

    def _get_gaussian_for_exclusion(self, num_excluded: int) -> Gaussian:
        """Returns the Gaussian from which leave-one-out distances are computed if `num_excluded` images are excluded together.

        Mean and scatter are computed from all images. The covariance is computed as in `fit_gaussian`, but the divisor is the
        number of the remaining images minus 1. The newest `MAX_FITS` Gaussians are cached.

        Raises: ValueError: fewer than two images would remain.
        """
        if num_excluded not in self.fits:
            divisor = self.moments.count - num_excluded - 1
            if divisor < 1:
                raise ValueError(
                    f"{num_excluded} images show the same part and are left out together; this needs at least {num_excluded + 2} "
                    f"training images, got {self.moments.count}: add training images of other parts"
                )
            if len(self.fits) >= MAX_FITS:
                self.fits.pop(next(iter(self.fits)))
            fit = fit_gaussian(self.moments, self.ridge, self.pooling, divisor=divisor)
            self.fits[num_excluded] = Gaussian(*fit, self.height, self.width)
        return self.fits[num_excluded]

    def score(self, embedding: Tensor, excluded_images: Tensor) -> Tensor:
        """Computes the distances of B training images to the Gaussian of the training images that are not excluded.

        Args:
            embedding: (B, C, H, W), embeddings of the training images.
            excluded_images: (B,) or (B, K), positions in the bank of the images to exclude for each of the B images. A single
                excluded image is assumed to be the scored image itself.

        Returns: (B, H, W), >= 0.

        Raises: ValueError: fewer than two images would remain.
        """
        excluded_sets = [tuple(numbers.unique().tolist()) for numbers in excluded_images.view(len(excluded_images), -1)]
        if all(len(numbers) == 1 for numbers in excluded_sets):
            return self._score_without_own_image(embedding)
        distances = torch.empty(len(excluded_images), self.height, self.width, device=embedding.device)
        for numbers in sorted(set(excluded_sets), key=len):  # all sets of one size share a fit
            images = [image for image, excluded in enumerate(excluded_sets) if excluded == numbers]
            if len(numbers) == 1:
                distances[images] = self._score_without_own_image(embedding[images])
            else:
                distances[images] = self._score_without_excluded_images(embedding[images], torch.tensor(numbers))
        return distances

    def _score_without_own_image(self, embedding: Tensor) -> Tensor:
        """Computes the distances (B, H, W) of B training images to the Gaussian of all images except the scored image.

        Corrects the distances to the Gaussian of all images by the Sherman-Morrison formula.

        Args: embedding: (B, C, H, W), embeddings of the training images.
        """
        n = self.moments.count
        square = self._get_gaussian_for_exclusion(1).score(embedding).square()  # v^T A^-1 v
        c = (1 - self.pooling) * n / ((n - 1) * (n - 2))
        # y = x - left-out mean = n / (n - 1) v, and v^T (A - c v v^T)^-1 v = square / (1 - c square)
        return n / (n - 1) * (square / (1 - c * square).clamp_min(1e-6)).sqrt()

    def _score_without_excluded_images(self, embedding: Tensor, numbers: Tensor) -> Tensor:
        """Computes the distances (B, H, W) of B training images to the Gaussian of all images except k images of the bank.

        Args:
            embedding: (B, C, H, W), embeddings of the training images.
            numbers: (k,), positions of the excluded images in the bank.

        Corrects the distances to the Gaussian of all images by the Woodbury formula.

        Raises: ValueError: fewer than two images would remain.
        """
        # m: mean of all n images
        # S: scatter of all n images
        # x_1 ... x_k: embeddings of the excluded images
        # V: matrix with the columns x_1 - m ... x_k - m
        # 1: vector of k ones
        # The remaining images have the mean m - V 1 / (n - k) and the scatter S - V M V^T.
        # M = I + 1 1^T / (n - k), and the inverse of M is I - 1 1^T / n
        # c = (1 - pooling) / (n - k - 1)
        # A = c S + pooling * pooled covariance + ridge I
        # y = x - m + V 1 / (n - k): a scored embedding x minus the mean of the remaining images
        # The Woodbury formula gives the squared distance of y under the covariance A - c V M V^T:
        # y^T A^-1 y + (y^T A^-1 V) ((c M)^-1 - V^T A^-1 V)^-1 (V^T A^-1 y)
        assert self.bank is not None, "only a density with a bank can leave out several images together"
        n, k = self.moments.count, len(numbers)
        gaussian = self._get_gaussian_for_exclusion(k)
        factor, mean = gaussian.precision_factor, gaussian.mean
        rows = self.bank[numbers].to(mean).transpose(0, 1)[:, :, : mean.shape[1]]  # (L, k, C)
        centred = rows - mean[:, None]
        # (L, B, C)
        query = move_locations_first(embedding.to(mean)) - mean[:, None] + centred.sum(dim=1, keepdim=True) / (n - k)
        whitened = torch.bmm(centred, factor.transpose(1, 2)).double()
        whitened_query = torch.bmm(query, factor.transpose(1, 2)).double()
        gram = whitened @ whitened.transpose(1, 2)  # V^T A^-1 V, (L, k, k)
        cross = whitened @ whitened_query.transpose(1, 2)  # V^T A^-1 y, (L, k, B)
        scale = (1 - self.pooling) / (n - k - 1)
        # (c M)^-1; the clamp avoids a division by 0 at pooling 1
        inverse = (torch.eye(k, dtype=gram.dtype, device=gram.device) - 1 / n) / max(scale, 1e-12)
        correction = (cross * torch.linalg.solve(inverse - gram, cross)).sum(dim=1)
        square = whitened_query.square().sum(dim=2) + correction  # (L, B)
        return square.clamp_min(0).sqrt().float().t().reshape(-1, self.height, self.width)
