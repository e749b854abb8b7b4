"""A memory whose distances are checked against one Gaussian for each place [ours].

Where good parts change in permitted ways, for instance in a printed number, no two normal images show the same thing. The nearest
neighbour is then far away for good parts too. The Gaussian of the place (PaDiM, arXiv 2011.08785) has seen how much the place
varies, and its distance stays low. So a patch is anomalous only if both say so: its distance is the smaller of the two, each as a
multiple of what good images show.

The Gaussians are fitted in the embedding of the memory of places, whose moments a fit adds up anyway.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from focus_ray.config import DensityConfig
from focus_ray.density.base import Density, LeavesOut, Statistics, sample_positions
from focus_ray.density.gaussian import Gaussian, LeftOutGaussian, fit_gaussian
from focus_ray.density.moments import mean_variance, pack_lower, unpack_lower

RIDGE = 0.1  # of the embedding's mean variance: ten times more blurs the Gaussians of places that vary little
MIN_IMAGES = 16  # that remain when a part is left out: with fewer, a covariance is mostly its ridge
MAX_FACTOR_VALUES = 2**24  # of all precision factors, packed: 128 MiB in memory; larger maps do without Gaussians
_TYPICAL_IMAGES = 16


class CheckedMemory:
    """The smaller of a memory's distance and a share of the distance to the Gaussian of the place.

    Attributes:
        memory: its typical distance is 1.
        gaussian: over the first channels of the embedding.
        scale: (), what a Gaussian's distance is multiplied by: density.gaussian_share / mean distance of left-out good images.
    """

    def __init__(self, memory: Density, gaussian: Gaussian, scale: Tensor) -> None:
        self.memory, self.gaussian, self.scale = memory, gaussian, scale
        self.height, self.width = memory.height, memory.width

    @property
    def device(self) -> torch.device:
        return self.memory.device

    def score(self, embedding: Tensor) -> Tensor:
        """(B, C + K, H, W) -> distances (B, H, W)."""
        num_channels = self.gaussian.mean.shape[1]
        distance = self.gaussian.score(embedding[:, :num_channels])
        return torch.minimum(self.memory.score(embedding), distance * self.scale)


class LeftOutCheckedMemory:
    """A `CheckedMemory` that scores images it was made of as if they were new."""

    def __init__(self, memory: LeavesOut, gaussian: LeftOutGaussian, scale: Tensor) -> None:
        self.memory, self.gaussian, self.scale = memory, gaussian, scale
        self.height, self.width = memory.height, memory.width

    def score(self, embedding: Tensor, own: Tensor) -> Tensor:
        """(B, C + K, H, W) -> distances (B, H, W); own as of `LeavesOut.score`."""
        distance = self.gaussian.score(embedding[:, : self.gaussian.moments.channels], own)
        return torch.minimum(self.memory.score(embedding, own), distance * self.scale)


def is_checkable(config: DensityConfig, statistics: Statistics) -> bool:
    """Whether a memory of these images is checked: the setting is on, and images and places allow it."""
    moments, relations = statistics.moments, statistics.relations
    num_left_out = 1 if relations is None else int(relations.related.sum(dim=1).max())
    num_values = moments.height * moments.width * moments.channels * (moments.channels + 1) // 2
    return config.gaussian_share > 0 and moments.count - num_left_out >= MIN_IMAGES and num_values <= MAX_FACTOR_VALUES


def check_memory(config: DensityConfig, statistics: Statistics, memory: Density) -> CheckedMemory:
    """The memory of the statistics' images with a Gaussian for each place."""
    moments = statistics.moments
    mean, packed = fit_gaussian(moments, _ridge(statistics), packed=True)
    gaussian = Gaussian(mean, unpack_lower(_rounded(packed).float()), moments.height, moments.width)
    return CheckedMemory(memory, gaussian, measure_scale(config, statistics, left_out_gaussian(statistics)))


def left_out_gaussian(statistics: Statistics) -> LeftOutGaussian:
    """The Gaussians of all images but those that are left out, each in turn."""
    return LeftOutGaussian(statistics.moments, _ridge(statistics), 0.0, statistics.bank)


def measure_scale(config: DensityConfig, statistics: Statistics, gaussian: LeftOutGaussian) -> Tensor:
    """(), as `CheckedMemory.scale`, from some images of the bank."""
    bank, moments = statistics.bank, statistics.moments
    assert bank is not None
    total = torch.zeros((), device=moments.mean.device)
    chosen = torch.tensor(sorted(sample_positions(len(bank), _TYPICAL_IMAGES)))
    for numbers in chosen.split(8):
        rows = bank[numbers, :, : moments.channels].to(moments.mean).transpose(1, 2)
        embedding = rows.unflatten(2, (moments.height, moments.width))
        total += gaussian.score(embedding, statistics.left_out_with(numbers)).mean() * len(numbers)
    return config.gaussian_share / (total / len(chosen)).clamp_min(1e-12)


def checked_tensors(density: CheckedMemory) -> dict[str, Tensor]:
    """The Gaussians as a bundle stores them."""
    factor = _rounded(pack_lower(density.gaussian.precision_factor))
    return {
        "gaussian.mean": density.gaussian.mean,
        "gaussian.precision_factor": factor,
        "gaussian.scale": density.scale,
    }


def load_checked(memory: Density, tensors: Mapping[str, Tensor]) -> Density:
    """The memory with the Gaussians of `checked_tensors`; the memory itself where the tensors have none."""
    if "gaussian.mean" not in tensors:
        return memory
    mean, packed, scale = (
        tensors[f"gaussian.{name}"].to(memory.device) for name in ("mean", "precision_factor", "scale")
    )
    gaussian = Gaussian(mean, unpack_lower(packed.float()), memory.height, memory.width)
    return CheckedMemory(memory, gaussian, scale)


def _ridge(statistics: Statistics) -> float:
    return max(RIDGE * mean_variance(statistics.moments), 1e-12)


def _rounded(packed: Tensor) -> Tensor:
    """To float16, as bundles store it, unless it does not fit."""
    half = packed.half()
    return half if bool(torch.isfinite(half).all()) else packed
