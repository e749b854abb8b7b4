"""Tests of the coreset: the choice of patches, distances, and the combination with a memory of locations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from focus_ray.density import coreset as module
from focus_ray.density.base import Statistics, build_density, density_tensors, load_density
from focus_ray.density.coreset import Coreset, choose_coreset, greedy_coreset, greedy_coresets
from focus_ray.density.moments import Moments
from focus_ray.density.nearest import JointMemory, NearestMemory, to_bank_rows
from focus_ray.density.settings import DensityConfig

HEIGHT, WIDTH, LOCATION_CHANNELS, CORESET_CHANNELS = 5, 4, 6, 7


def points(count: int, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


def embeddings(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, LOCATION_CHANNELS + CORESET_CHANNELS, HEIGHT, WIDTH, generator=generator).half().float()


def statistics_of(images: Tensor) -> Statistics:
    moments = Moments(HEIGHT, WIDTH, LOCATION_CHANNELS)
    moments.update(images[:, :LOCATION_CHANNELS])
    return Statistics(moments, to_bank_rows(images))


def slow_greedy(rows: Tensor, count: int) -> list[int]:
    chosen = [int((rows - rows.mean(dim=0)).norm(dim=1).argmax())]
    while len(chosen) < count:
        chosen.append(int(torch.cdist(rows, rows[chosen]).min(dim=1).values.argmax()))
    return chosen


def test_each_chosen_point_is_the_farthest_from_the_points_chosen_before() -> None:
    rows = points(60)
    assert greedy_coreset(rows, 12).tolist() == slow_greedy(rows, 12)


def test_the_choice_does_not_depend_on_the_order_of_the_points() -> None:
    rows = points(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert order[greedy_coreset(rows[order], 12)].tolist() == greedy_coreset(rows, 12).tolist()


def test_a_coreset_larger_than_the_set_contains_every_point_once() -> None:
    assert sorted(greedy_coreset(points(5), 9).tolist()) == [0, 1, 2, 3, 4]


def test_coresets_of_many_sets_equal_the_coreset_of_each_set() -> None:
    sets = points(4 * 30).view(4, 30, 3)
    assert greedy_coresets(sets, 12).tolist() == [greedy_coreset(rows, 12).tolist() for rows in sets]


def test_equal_points_are_not_chosen_twice() -> None:
    assert all(len(set(chosen)) == 5 for chosen in greedy_coresets(torch.ones(3, 7, 2), 5).tolist())


def test_a_coreset_covers_points_better_than_an_arbitrary_choice_of_the_same_size() -> None:
    rows = torch.cat([points(400) * 0.1, points(8, seed=1) + 5])  # the last 8 are rare
    coreset, arbitrary = (
        float(torch.cdist(rows, rows[chosen]).min(dim=1).values.max())
        for chosen in (greedy_coreset(rows, 20), range(20))
    )
    assert coreset < arbitrary / 4


def test_the_distance_is_the_distance_to_the_nearest_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    images = embeddings(4)[:, :CORESET_CHANNELS]
    coreset = choose_coreset(to_bank_rows(images), 9, "cpu")
    rows = images.permute(0, 2, 3, 1).reshape(-1, CORESET_CHANNELS)
    expected = torch.cdist(rows, coreset.patches).min(dim=1).values.view(4, HEIGHT, WIDTH)
    torch.testing.assert_close(coreset.score(images), expected, atol=1e-3, rtol=1e-3)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)  # one image at a time
    torch.testing.assert_close(coreset.score(images), expected, atol=1e-3, rtol=1e-3)


def test_patches_of_an_excluded_image_are_ignored() -> None:
    images = embeddings(4)[:, :CORESET_CHANNELS]
    coreset = choose_coreset(to_bank_rows(images), 4 * HEIGHT * WIDTH, "cpu")  # all patches
    assert sorted(coreset.image_numbers.tolist()) == sorted(list(range(4)) * HEIGHT * WIDTH)
    assert coreset.score(images).max() < 0.01
    excluded_images = torch.arange(4)
    for number in range(4):
        is_other = coreset.image_numbers != number
        remaining = Coreset(coreset.patches[is_other], coreset.image_numbers[is_other])
        distance = coreset.score(images, excluded_images)[number : number + 1]
        torch.testing.assert_close(distance, remaining.score(images[number : number + 1]))


def test_patches_with_too_few_image_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(2,\)"):
        Coreset(torch.zeros(3, 2), torch.zeros(2))


def test_a_joint_memory_averages_both_distances_in_units_of_typical_distances() -> None:
    statistics = statistics_of(embeddings(9))
    density = build_density(DensityConfig(coreset=30), statistics)
    assert isinstance(density, JointMemory)
    queries = embeddings(3, seed=2)
    expected = density.location_memory.score(queries[:, :LOCATION_CHANNELS]) / density.typical_distance[0]
    expected = (expected + density.coreset.score(queries[:, LOCATION_CHANNELS:]) / density.typical_distance[1]) / 2
    torch.testing.assert_close(density.score(queries), expected)
    # a left-out good image has a distance of about 1
    assert float(density.score(embeddings(9), torch.arange(9)).mean()) == pytest.approx(1, abs=0.05)
    # its location memory equals a density without a coreset
    without_coreset = build_density(
        DensityConfig(coreset=0), Statistics(statistics.moments, statistics.bank[:, :, :LOCATION_CHANNELS])
    )  # type: ignore[index]
    assert isinstance(without_coreset, NearestMemory)
    torch.testing.assert_close(
        without_coreset.score(queries[:, :LOCATION_CHANNELS]),
        density.location_memory.score(queries[:, :LOCATION_CHANNELS]),
    )


def test_a_density_loaded_from_its_tensors_scores_the_same() -> None:
    config, statistics = DensityConfig(coreset=30), statistics_of(embeddings(9))
    built = build_density(config, statistics)
    tensors = density_tensors(config, statistics, built)
    assert tensors["bank"].shape[2] == LOCATION_CHANNELS
    loaded = load_density(config, tensors, HEIGHT, WIDTH, "cpu")
    queries = embeddings(4, seed=4)
    torch.testing.assert_close(loaded.score(queries), built.score(queries), atol=1e-5, rtol=1e-5)


def test_joined_statistics_of_two_sites_score_like_statistics_of_all_images() -> None:
    images = embeddings(10)
    config = DensityConfig(coreset=40)
    joined = statistics_of(images[6:]).join(statistics_of(images[:6]))
    queries = embeddings(3, seed=5)
    expected = build_density(config, statistics_of(images)).score(queries)
    torch.testing.assert_close(build_density(config, joined).score(queries), expected, rtol=1e-3, atol=1e-3)
