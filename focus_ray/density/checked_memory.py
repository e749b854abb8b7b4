"""A memory of normal embeddings whose distances are checked against one Gaussian per location [ours].

"Checked" means: a patch has a high distance only if it is far from the memory and far from the Gaussian.

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

from focus_ray.density.base import Density, LeaveOneOutScorer, Statistics, sample_evenly
from focus_ray.density.gaussian import Gaussian, LeaveOneOutGaussian, fit_gaussian
from focus_ray.density.moments import mean_variance, pack_lower, unpack_lower
from focus_ray.density.settings import DensityConfig

RIDGE = 0.1  # as a share of the embedding's mean variance: ten times more blurs Gaussians of locations with little variation
MIN_IMAGES = 16  # images that remain without one part: with fewer images, a covariance consists mostly of its ridge
MAX_FACTOR_VALUES = 2**24  # in all packed precision factors: 128 MiB of memory; larger maps have no Gaussians
_TYPICAL_IMAGES = 16


class CheckedMemory:
    """A density whose distance is the smaller of a memory's distance and a scaled Gaussian distance.

    Attributes:
        memory: a memory whose typical distance is 1.
        gaussian: Gaussians of the first channels of the embedding.
        scale: (), factor for a Gaussian's distance: density.gaussian_share / mean leave-one-out distance of good images.
    """

    def __init__(self, memory: Density, gaussian: Gaussian, scale: Tensor) -> None:
        self.memory, self.gaussian, self.scale = memory, gaussian, scale
        self.height, self.width = memory.height, memory.width

    @property
    def device(self) -> torch.device:
        return self.memory.device

    def score(self, embedding: Tensor) -> Tensor:
        """Computes distances (B, H, W), >= 0, of B images.

        Args: embedding: (B, C + K, H, W). The memory compares all channels, the Gaussians compare the first C channels.
        """
        num_channels = self.gaussian.mean.shape[1]
        distance = self.gaussian.score(embedding[:, :num_channels])
        return torch.minimum(self.memory.score(embedding), distance * self.scale)


class LeaveOneOutCheckedMemory:
    """Computes leave-one-out distances of the images from which a `CheckedMemory` was built.

    The distance of an image is the smaller of its leave-one-out distance in the memory and its scaled leave-one-out distance to
    the Gaussians.

    Attributes:
        memory: leave-one-out scorer of the memory.
        gaussian: leave-one-out scorer of the Gaussians.
        scale: (), factor for a Gaussian's distance, see `CheckedMemory`.
    """

    def __init__(self, memory: LeaveOneOutScorer, gaussian: LeaveOneOutGaussian, scale: Tensor) -> None:
        self.memory, self.gaussian, self.scale = memory, gaussian, scale
        self.height, self.width = memory.height, memory.width

    def score(self, embedding: Tensor, excluded_images: Tensor) -> Tensor:
        """Computes distances (B, H, W), >= 0, of B training images, without some excluded images.

        Args:
            embedding: (B, C + K, H, W), embeddings of the training images. The memory compares all channels, the Gaussians
                compare the first C channels.
            excluded_images: (B,) or (B, K'), numbers of the bank's images to exclude for each of the B images.
        """
        distance = self.gaussian.score(embedding[:, : self.gaussian.moments.channels], excluded_images)
        return torch.minimum(self.memory.score(embedding, excluded_images), distance * self.scale)


def is_checkable(config: DensityConfig, statistics: Statistics) -> bool:
    """Returns whether Gaussians can check a memory.

    This needs density.gaussian_share above 0, at least `MIN_IMAGES` images that do not show the part of the scored image, and a
    map whose precision factors have at most `MAX_FACTOR_VALUES` values.
    """
    moments, relations = statistics.moments, statistics.relations
    num_excluded = 1 if relations is None else int(relations.related.sum(dim=1).max())
    num_values = moments.height * moments.width * moments.channels * (moments.channels + 1) // 2
    return config.gaussian_share > 0 and moments.count - num_excluded >= MIN_IMAGES and num_values <= MAX_FACTOR_VALUES


def build_checked_memory(config: DensityConfig, statistics: Statistics, memory: Density) -> CheckedMemory:
    """Fits a Gaussian for each location, and combines the Gaussians with a memory.

    Args:
        statistics: the statistics from which the memory was built, with a bank.
        memory: a memory whose typical distance is 1.
    """
    moments = statistics.moments
    mean, packed = fit_gaussian(moments, _ridge(statistics), packed=True)
    gaussian = Gaussian(mean, unpack_lower(_round_to_half(packed).float()), moments.height, moments.width)
    return CheckedMemory(memory, gaussian, measure_scale(config, statistics, leave_one_out_gaussian(statistics)))


def leave_one_out_gaussian(statistics: Statistics) -> LeaveOneOutGaussian:
    """Builds the leave-one-out scorer of the Gaussians of a `CheckedMemory`.

    Raises: ValueError: the statistics are of fewer than three images.
    """
    return LeaveOneOutGaussian(statistics.moments, _ridge(statistics), 0.0, statistics.bank)


def measure_scale(config: DensityConfig, statistics: Statistics, gaussian: LeaveOneOutGaussian) -> Tensor:
    """Computes `CheckedMemory.scale`, a scalar, from the leave-one-out distances of some images of the bank."""
    bank, moments = statistics.bank, statistics.moments
    assert bank is not None
    total = torch.zeros((), device=moments.mean.device)
    sampled = torch.tensor(sorted(sample_evenly(len(bank), _TYPICAL_IMAGES)))
    for numbers in sampled.split(8):
        rows = bank[numbers, :, : moments.channels].to(moments.mean).transpose(1, 2)
        embedding = rows.unflatten(2, (moments.height, moments.width))
        total += gaussian.score(embedding, statistics.images_to_exclude(numbers)).mean() * len(numbers)
    return config.gaussian_share / (total / len(sampled)).clamp_min(1e-12)


def gaussian_tensors(density: CheckedMemory) -> dict[str, Tensor]:
    """Returns the tensors that a bundle stores for the Gaussians of a `CheckedMemory`, by name."""
    factor = _round_to_half(pack_lower(density.gaussian.precision_factor))
    return {
        "gaussian.mean": density.gaussian.mean,
        "gaussian.precision_factor": factor,
        "gaussian.scale": density.scale,
    }


def load_checked_memory(memory: Density, tensors: Mapping[str, Tensor]) -> Density:
    """Combines a memory with the Gaussians that `gaussian_tensors` returned. Without their tensors, returns the memory itself."""
    if "gaussian.mean" not in tensors:
        return memory
    mean, packed, scale = (
        tensors[f"gaussian.{name}"].to(memory.device) for name in ("mean", "precision_factor", "scale")
    )
    gaussian = Gaussian(mean, unpack_lower(packed.float()), memory.height, memory.width)
    return CheckedMemory(memory, gaussian, scale)


def _ridge(statistics: Statistics) -> float:
    """Returns the number to add to the diagonal of each Gaussian's covariance."""
    return max(RIDGE * mean_variance(statistics.moments), 1e-12)


def _round_to_half(packed: Tensor) -> Tensor:
    """Rounds precision factors to float16, as bundles store them; returns them unchanged if a value is too large."""
    half = packed.half()
    return half if bool(torch.isfinite(half).all()) else packed
