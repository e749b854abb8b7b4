"""The memory that is checked against one Gaussian for each place."""

import pytest
import torch
from torch import Tensor

from focus_ray.config import DensityConfig
from focus_ray.density.base import Statistics, build_density, density_tensors, leaving_out, load_density
from focus_ray.density.checked import MIN_IMAGES, CheckedMemory
from focus_ray.density.moments import Moments
from focus_ray.density.nearest import JointMemory, keep
from focus_ray.density.relations import Relations
from focus_ray.export.densities import as_module

HEIGHT, WIDTH, PLACES, OTHERS = 3, 4, 6, 5
CONFIG = DensityConfig(coreset=30, precision="fp32")


def make_embeddings(count: int, seed: int = 0) -> Tensor:
    """(count, PLACES + OTHERS, HEIGHT, WIDTH), normal around a mean for each place; the first place varies ten times more."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, PLACES + OTHERS, HEIGHT, WIDTH, generator=generator)
    noise[:, :, 0, 0] *= 10
    return noise + 3 * torch.randn(PLACES + OTHERS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(9))


def make_statistics(images: Tensor, relations: Relations | None = None) -> Statistics:
    moments = Moments(HEIGHT, WIDTH, PLACES)
    moments.update(images[:, :PLACES].half().float())
    return Statistics(moments, keep(images), relations=relations)


def build_checked(images: Tensor) -> tuple[CheckedMemory, Statistics]:
    statistics = make_statistics(images)
    density = build_density(CONFIG, statistics)
    assert isinstance(density, CheckedMemory)
    return density, statistics


def test_a_distance_is_the_smaller_of_that_of_the_memory_and_the_share_of_that_of_the_gaussian() -> None:
    density, _ = build_checked(make_embeddings(40))
    queries = make_embeddings(5, seed=1)
    gaussian = density.gaussian.score(queries[:, :PLACES]) * density.scale
    torch.testing.assert_close(density.score(queries), torch.minimum(density.memory.score(queries), gaussian))


def test_a_good_image_that_is_left_out_has_the_share_as_mean_distance_to_its_gaussians() -> None:
    images = make_embeddings(MIN_IMAGES + 1)
    density, statistics = build_checked(images)
    left_out = leaving_out(CONFIG, statistics, density)
    distances = left_out.gaussian.score(images[:, :PLACES], torch.arange(16)) * density.scale  # type: ignore[attr-defined]
    assert float(distances.mean()) == pytest.approx(CONFIG.gaussian_share, rel=0.05)


def test_a_place_that_varies_in_good_images_stands_out_less_than_in_the_memory_alone() -> None:
    density, _ = build_checked(make_embeddings(60))
    queries = make_embeddings(20, seed=1)
    excess = [
        float(distance[:, 0, 0].mean() / distance[:, 1:].mean())
        for distance in (density.score(queries), density.memory.score(queries))
    ]
    assert excess[0] < 0.5 * excess[1]


def test_without_a_share_the_density_is_the_memory() -> None:
    statistics = make_statistics(make_embeddings(40))
    density = build_density(CONFIG.model_copy(update={"gaussian_share": 0.0}), statistics)
    checked = build_density(CONFIG, statistics)
    assert isinstance(density, JointMemory)
    assert isinstance(checked, CheckedMemory)
    queries = make_embeddings(5, seed=1)
    assert torch.equal(density.score(queries), checked.memory.score(queries))


@pytest.mark.parametrize("num_images", [2, MIN_IMAGES])
def test_few_images_do_without_gaussians(num_images: int) -> None:
    assert isinstance(build_density(CONFIG, make_statistics(make_embeddings(num_images))), JointMemory)


def test_images_of_one_part_are_left_out_together_of_the_images_that_a_gaussian_needs() -> None:
    images = make_embeddings(MIN_IMAGES + 1)
    relations = Relations.from_groups(torch.arange(len(images)) // 2)
    assert isinstance(build_density(CONFIG, make_statistics(images, relations)), JointMemory)


def test_a_left_out_image_scores_as_with_a_density_of_the_other_images() -> None:
    images = make_embeddings(30)
    density, statistics = build_checked(images)
    left_out = leaving_out(CONFIG, statistics, density)
    found = left_out.gaussian.score(images[:1, :PLACES].half().float(), torch.tensor([0]))  # type: ignore[attr-defined]
    others, _ = build_checked(images[1:])
    expected = others.gaussian.score(images[:1, :PLACES].half().float())
    # the ridge stays that of all images
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)


def test_a_density_from_its_tensors_scores_the_same() -> None:
    density, statistics = build_checked(make_embeddings(40))
    loaded = load_density(CONFIG, density_tensors(CONFIG, statistics, density), HEIGHT, WIDTH, "cpu")
    queries = make_embeddings(5, seed=1)
    torch.testing.assert_close(loaded.score(queries), density.score(queries), rtol=1e-5, atol=1e-5)


def test_the_exported_module_scores_the_same() -> None:
    density, _ = build_checked(make_embeddings(40))
    queries = make_embeddings(5, seed=1)
    torch.testing.assert_close(as_module(density, half=False)(queries), density.score(queries), rtol=1e-4, atol=1e-4)
