"""The memory that is checked against one Gaussian for each location."""

from __future__ import annotations

import pytest
import torch
from made_embeddings import make_embeddings, statistics_of
from torch import Tensor

from focus_ray.density.base import build_density, build_leave_one_out_scorer
from focus_ray.density.gaussian_capped_memory import MIN_IMAGES, GaussianCappedMemory
from focus_ray.density.nearest import LocationAndCoresetMemory
from focus_ray.density.relations import ImageRelations
from focus_ray.density.settings import DensityConfig

CHANNELS, CORESET_CHANNELS = 6, 5
CONFIG = DensityConfig(coreset=30, precision="fp32")


def images_of(count: int, seed: int = 0) -> Tensor:
    """Makes embeddings; the first location varies ten times more than the others."""
    images = make_embeddings(count, CHANNELS + CORESET_CHANNELS, seed=seed)
    images[:, :, 0, 0] += 9 * (images[:, :, 0, 0] - 5)
    return images.half().float()


def build_capped_memory(images: Tensor) -> GaussianCappedMemory:
    density = build_density(CONFIG, statistics_of(images, CORESET_CHANNELS))
    assert isinstance(density, GaussianCappedMemory)
    return density


def test_the_distance_is_the_smaller_of_the_memory_distance_and_the_scaled_gaussian_distance() -> None:
    density, queries = build_capped_memory(images_of(40)), images_of(5, seed=1)
    gaussian = density.gaussian.score(queries[:, :CHANNELS]) * density.scale
    torch.testing.assert_close(density.score(queries), torch.minimum(density.memory.score(queries), gaussian))


def test_a_location_with_much_normal_variation_stands_out_less_than_in_the_memory_alone() -> None:
    density, queries = build_capped_memory(images_of(60)), images_of(20, seed=1)
    excess = [
        float(distance[:, 0, 0].mean() / distance[:, 1:].mean())
        for distance in (density.score(queries), density.memory.score(queries))
    ]
    assert excess[0] < 0.5 * excess[1]


@pytest.mark.parametrize(
    ("num_images", "images_per_part", "share"),
    [(2, 1, 0.9), (MIN_IMAGES, 1, 0.9), (MIN_IMAGES + 1, 2, 0.9), (40, 1, 0.0)],
    ids=["2 images", "few images", "few images beside the part", "switched off"],
)
def test_without_enough_other_images_or_a_share_the_density_is_the_memory(
    num_images: int, images_per_part: int, share: float
) -> None:
    images, queries = images_of(num_images), images_of(3, seed=1)
    relations = ImageRelations.from_groups(torch.arange(num_images) // images_per_part) if images_per_part > 1 else None
    config = CONFIG.model_copy(update={"gaussian_share": share})
    density = build_density(config, statistics_of(images, CORESET_CHANNELS, relations))
    assert isinstance(density, LocationAndCoresetMemory)
    if share == 0.0:
        assert torch.equal(density.score(queries), build_capped_memory(images).memory.score(queries))


def test_left_out_images_score_like_new_images_and_typically_the_gaussian_share() -> None:
    images = images_of(30)
    left_out = build_leave_one_out_scorer(CONFIG, statistics_of(images, CORESET_CHANNELS), build_capped_memory(images))
    assert isinstance(left_out, GaussianCappedMemory)
    distances = left_out.gaussian.score(images[:, :CHANNELS], torch.arange(30))
    assert float(distances.mean() * left_out.scale) == pytest.approx(0.9, rel=0.05)  # gaussian_share
    expected = build_capped_memory(images[1:]).gaussian.score(images[:1, :CHANNELS])
    # the two ridges differ: leave-one-out uses the ridge of all images
    torch.testing.assert_close(distances[:1], expected, rtol=0.05, atol=0.01)
