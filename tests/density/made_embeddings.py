"""Embeddings of normal images, and their statistics, for the tests of densities."""

from __future__ import annotations

import torch
from torch import Tensor

from focus_ray.density.bank import convert_to_bank_rows
from focus_ray.density.base import NormalStatistics
from focus_ray.density.moments import Moments
from focus_ray.density.relations import ImageRelations


def make_embeddings(count: int, channels: int = 6, size: tuple[int, int] = (3, 4), seed: int = 0) -> Tensor:
    """Makes (count, channels, *size) with correlated channels and another mean at each location.

    The values are exact in float16, and large compared with their variation, as features after ReLU are.
    """
    fixed = torch.Generator().manual_seed(99)
    mixing = torch.randn(channels, channels, generator=fixed)
    means = 5 + 3 * torch.randn(channels, *size, generator=fixed)
    values = torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(seed))
    return (torch.einsum("dc,bchw->bdhw", mixing, values) + means).half().float()


def moments_of(*batches: Tensor) -> Moments:
    moments = Moments(*batches[0].shape[2:], batches[0].shape[1])
    for batch in batches:
        moments.add_embeddings(batch)
    return moments


def statistics_of(
    images: Tensor, coreset_channels: int = 0, relations: ImageRelations | None = None
) -> NormalStatistics:
    """Returns statistics with a bank; the last channels of the images are for a coreset."""
    return NormalStatistics(
        moments_of(images[:, : images.shape[1] - coreset_channels]), convert_to_bank_rows(images), relations=relations
    )
