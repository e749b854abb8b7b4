"""Module for a memory of normal embeddings whose distances are checked against one Gaussian per location [ours].

A memory is a density that stores normal embeddings and measures the distance to the nearest one. "Checked" means: a patch has a
high distance only if it is far from the memory and far from the Gaussian.

Good parts may change in permitted ways, for instance in a printed number. Then no two normal images show the same thing, and the
nearest neighbour is far away for good parts too. The Gaussian of the location (PaDiM, arXiv 2011.08785) has learnt how much the
location varies, and its distance stays low. So a patch is anomalous only if both distances are high: its distance is the smaller
of the two, after each is divided by the typical distance of good images.

The Gaussians are fitted to the channels of the location memory, because the moments of these channels exist anyway.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from focus_ray.density.base import NormalStatistics
from focus_ray.density.gaussian import Gaussian, LeaveOneOutGaussian, fit_gaussian
from focus_ray.density.moments import compute_mean_variance, pack_lower_triangles, unpack_lower_triangles
from focus_ray.density.nearest import LocationAndCoresetMemory, measure_mean_distance

RIDGE = 0.1  # as a share of the embedding's mean variance: ten times more blurs Gaussians of locations with little variation
MIN_IMAGES = 16  # images that remain without one part: with fewer images, a covariance consists mostly of its ridge
MAX_FACTOR_VALUES = 2**24  # in all packed precision factors: 128 MiB of memory; larger maps have no Gaussians


class GaussianCappedMemory:
    """Combines a memory with one Gaussian per location: a patch has a high distance only if both find it far away.

    The distance is the smaller of the memory's distance and the scaled distance of the Gaussian. An object is a density or a
    leave-one-out scorer, depending on `gaussian`.

    Attributes:
        memory: memory with scaled distances: a good patch has a distance of about 1.
        gaussian: a `Gaussian` for new images, or a `LeaveOneOutGaussian` for training images. It uses only the first C channels.
        scale: (), factor for a Gaussian's distance: density.gaussian_share / mean leave-one-out distance of good images.
    """

    def __init__(
        self, memory: LocationAndCoresetMemory, gaussian: Gaussian | LeaveOneOutGaussian, scale: Tensor
    ) -> None:
        self.memory, self.gaussian, self.scale = memory, gaussian, scale
        self.height, self.width = memory.height, memory.width

    @property
    def device(self) -> torch.device:
        """The device on which distances are computed."""
        return self.memory.device

    def score(self, embedding: Tensor, *excluded_images: Tensor) -> Tensor:
        """Computes distances (B, H, W), >= 0, of B images.

        Args:
            embedding: (B, C + K, H, W). The memory compares all channels, the Gaussians compare the first C channels.
            excluded_images: (B,) or (B, K'), positions in the bank of the images to exclude for each of the B images; only for a
                leave-one-out scorer.

        Raises: ValueError: a leave-one-out scorer would have fewer than two images left.
        """
        distance = self.gaussian.score(embedding[:, : self.gaussian.channels], *excluded_images)
        return torch.minimum(self.memory.score(embedding, *excluded_images), distance * self.scale)

    def make_exportable(self, half: bool) -> GaussianCappedMemory:
        """Returns a density that `torch.export` can trace. Args: half: see `shrink_tensor_for_export`."""
        assert isinstance(self.gaussian, Gaussian)
        return GaussianCappedMemory(self.memory.make_exportable(half), self.gaussian.make_exportable(half), self.scale)


def can_fit_gaussians(statistics: NormalStatistics, gaussian_share: float) -> bool:
    """Returns whether a `GaussianCappedMemory` is wanted and can be built.

    Conditions: `gaussian_share` (density.gaussian_share) is above 0; at least `MIN_IMAGES` images remain when an image and all
    images of the same physical part are left out; the precision factors have at most `MAX_FACTOR_VALUES` values.
    """
    moments, relations = statistics.moments, statistics.relations
    num_excluded = 1 if relations is None else int(relations.related.sum(dim=1).max())
    num_values = moments.height * moments.width * moments.channels * (moments.channels + 1) // 2
    return gaussian_share > 0 and moments.count - num_excluded >= MIN_IMAGES and num_values <= MAX_FACTOR_VALUES


def cap_memory_by_gaussians(
    memory: LocationAndCoresetMemory, statistics: NormalStatistics, gaussian_share: float
) -> GaussianCappedMemory:
    """Fits a Gaussian for each location, and combines the Gaussians with the memory of the same statistics.

    Args:
        statistics: with a bank of at least three images.
        gaussian_share: density.gaussian_share, see `GaussianCappedMemory.scale`.

    Raises: ValueError: fewer than three images, or fewer than two without an image and its related images.
    """
    moments = statistics.moments
    mean, factor = fit_gaussian(moments, _compute_ridge(statistics))
    gaussian = Gaussian(mean, _round_to_float16(factor).float(), moments.height, moments.width)
    return GaussianCappedMemory(
        memory, gaussian, measure_gaussian_scale(statistics, build_leave_one_out_gaussian(statistics), gaussian_share)
    )


def build_leave_one_out_gaussian(statistics: NormalStatistics) -> LeaveOneOutGaussian:
    """Builds the leave-one-out scorer of the Gaussians of a `GaussianCappedMemory`, with the same ridge and without pooling.

    Raises: ValueError: the statistics are of fewer than three images.
    """
    return LeaveOneOutGaussian(statistics.moments, _compute_ridge(statistics), 0.0, statistics.bank)


def measure_gaussian_scale(
    statistics: NormalStatistics, gaussian: LeaveOneOutGaussian, gaussian_share: float
) -> Tensor:
    """Computes `GaussianCappedMemory.scale`, a scalar, from leave-one-out distances of images of the bank.

    Raises: ValueError: fewer than two images would remain when an image and its related images are left out.
    """
    return gaussian_share / measure_mean_distance(gaussian, statistics, slice(gaussian.channels))


def collect_gaussian_tensors(density: GaussianCappedMemory) -> dict[str, Tensor]:
    """Returns the tensors that a bundle stores for the Gaussians of a `GaussianCappedMemory`, by name."""
    assert isinstance(density.gaussian, Gaussian)
    factor = _round_to_float16(pack_lower_triangles(density.gaussian.precision_factor))
    return {
        "gaussian.mean": density.gaussian.mean,
        "gaussian.precision_factor": factor,
        "gaussian.scale": density.scale,
    }


def restore_gaussian_capped_memory(
    memory: LocationAndCoresetMemory, tensors: Mapping[str, Tensor]
) -> GaussianCappedMemory:
    """Rebuilds a `GaussianCappedMemory`, a memory whose distances are limited by Gaussians.

    Args:
        memory: the memory without Gaussians.
        tensors: the result of `collect_gaussian_tensors`; other tensors are ignored.
    """
    factor = unpack_lower_triangles(tensors["gaussian.precision_factor"].float())
    gaussian = Gaussian(tensors["gaussian.mean"], factor, memory.height, memory.width)
    return GaussianCappedMemory(memory, gaussian, tensors["gaussian.scale"])


def _compute_ridge(statistics: NormalStatistics) -> float:
    """Returns the number to add to the diagonal of each Gaussian's covariance."""
    return max(RIDGE * compute_mean_variance(statistics.moments), 1e-12)


def _round_to_float16(factor: Tensor) -> Tensor:
    """Rounds precision factors to float16, as bundles store them; returns them unchanged if a value overflows float16."""
    half = factor.half()
    return half if bool(torch.isfinite(half).all()) else factor
