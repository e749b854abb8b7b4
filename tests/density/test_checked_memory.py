"""Tests of the memory that is checked against one Gaussian for each location."""

import pytest
import torch
from torch import Tensor

from focus_ray.density.base import Statistics, build_density, density_tensors, leave_one_out_scorer, load_density
from focus_ray.density.checked_memory import MIN_IMAGES, CheckedMemory
from focus_ray.density.moments import Moments
from focus_ray.density.nearest import JointMemory, to_bank_rows
from focus_ray.density.relations import Relations
from focus_ray.density.settings import DensityConfig
from focus_ray.export.densities import to_traceable_module

HEIGHT, WIDTH, LOCATION_CHANNELS, CORESET_CHANNELS = 3, 4, 6, 5
CONFIG = DensityConfig(coreset=30, precision="fp32")


def make_embeddings(count: int, seed: int = 0) -> Tensor:
    """Makes (count, channels, HEIGHT, WIDTH), normal around a mean per location; the first location varies ten times more."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, LOCATION_CHANNELS + CORESET_CHANNELS, HEIGHT, WIDTH, generator=generator)
    noise[:, :, 0, 0] *= 10
    return noise + 3 * torch.randn(
        LOCATION_CHANNELS + CORESET_CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(9)
    )


def make_statistics(images: Tensor, relations: Relations | None = None) -> Statistics:
    moments = Moments(HEIGHT, WIDTH, LOCATION_CHANNELS)
    moments.update(images[:, :LOCATION_CHANNELS].half().float())
    return Statistics(moments, to_bank_rows(images), relations=relations)


def build_checked(images: Tensor) -> tuple[CheckedMemory, Statistics]:
    statistics = make_statistics(images)
    density = build_density(CONFIG, statistics)
    assert isinstance(density, CheckedMemory)
    return density, statistics


def test_the_distance_is_the_smaller_of_the_memory_distance_and_the_scaled_gaussian_distance() -> None:
    density, _ = build_checked(make_embeddings(40))
    queries = make_embeddings(5, seed=1)
    gaussian = density.gaussian.score(queries[:, :LOCATION_CHANNELS]) * density.scale
    torch.testing.assert_close(density.score(queries), torch.minimum(density.memory.score(queries), gaussian))


def test_left_out_good_images_have_the_gaussian_share_as_mean_gaussian_distance() -> None:
    images = make_embeddings(MIN_IMAGES + 1)
    density, statistics = build_checked(images)
    left_out = leave_one_out_scorer(CONFIG, statistics, density)
    distances = left_out.gaussian.score(images[:, :LOCATION_CHANNELS], torch.arange(16)) * density.scale  # type: ignore[attr-defined]
    assert float(distances.mean()) == pytest.approx(CONFIG.gaussian_share, rel=0.05)


def test_a_location_with_much_normal_variation_stands_out_less_than_in_the_memory_alone() -> None:
    density, _ = build_checked(make_embeddings(60))
    queries = make_embeddings(20, seed=1)
    excess = [
        float(distance[:, 0, 0].mean() / distance[:, 1:].mean())
        for distance in (density.score(queries), density.memory.score(queries))
    ]
    assert excess[0] < 0.5 * excess[1]


def test_with_gaussian_share_0_the_density_is_the_memory() -> None:
    statistics = make_statistics(make_embeddings(40))
    density = build_density(CONFIG.model_copy(update={"gaussian_share": 0.0}), statistics)
    checked = build_density(CONFIG, statistics)
    assert isinstance(density, JointMemory)
    assert isinstance(checked, CheckedMemory)
    queries = make_embeddings(5, seed=1)
    assert torch.equal(density.score(queries), checked.memory.score(queries))


@pytest.mark.parametrize("num_images", [2, MIN_IMAGES])
def test_a_memory_of_few_images_has_no_gaussians(num_images: int) -> None:
    assert isinstance(build_density(CONFIG, make_statistics(make_embeddings(num_images))), JointMemory)


def test_related_images_count_as_one_in_the_number_of_images_that_gaussians_need() -> None:
    images = make_embeddings(MIN_IMAGES + 1)
    relations = Relations.from_groups(torch.arange(len(images)) // 2)
    assert isinstance(build_density(CONFIG, make_statistics(images, relations)), JointMemory)


def test_leave_one_out_gaussians_score_like_gaussians_of_the_other_images() -> None:
    images = make_embeddings(30)
    density, statistics = build_checked(images)
    left_out = leave_one_out_scorer(CONFIG, statistics, density)
    distance = left_out.gaussian.score(images[:1, :LOCATION_CHANNELS].half().float(), torch.tensor([0]))  # type: ignore[attr-defined]
    density_of_others, _ = build_checked(images[1:])
    expected = density_of_others.gaussian.score(images[:1, :LOCATION_CHANNELS].half().float())
    # the two ridges differ: leave-one-out uses the ridge of all images
    torch.testing.assert_close(distance, expected, rtol=0.02, atol=0.01)


def test_a_density_loaded_from_its_tensors_scores_the_same() -> None:
    density, statistics = build_checked(make_embeddings(40))
    loaded = load_density(CONFIG, density_tensors(CONFIG, statistics, density), HEIGHT, WIDTH, "cpu")
    queries = make_embeddings(5, seed=1)
    torch.testing.assert_close(loaded.score(queries), density.score(queries), rtol=1e-5, atol=1e-5)


def test_the_exported_module_scores_the_same() -> None:
    density, _ = build_checked(make_embeddings(40))
    queries = make_embeddings(5, seed=1)
    torch.testing.assert_close(
        to_traceable_module(density, half=False)(queries), density.score(queries), rtol=1e-4, atol=1e-4
    )
