"""Tests of the profile of good images: weights, scores, and leave-one-out distances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from focus_ray.density.bank import convert_to_bank_rows
from focus_ray.density.base import NormalStatistics, build_density
from focus_ray.density.moments import Moments
from focus_ray.density.nearest import LocationMemory
from focus_ray.density.settings import DensityConfig
from focus_ray.density.tiles import TileGrid
from focus_ray.detect.anomaly_map import AnomalyMapGenerator
from focus_ray.detect.profile import (
    FLOOR,
    SHARES,
    ImageScoreProfile,
    average_highest_map_values,
    compute_image_scores,
    fit_profile,
)
from focus_ray.detect.settings import ScoringConfig

SIDE, CHANNELS = 8, 5
MAP_GENERATOR = AnomalyMapGenerator.build_for_tiles(TileGrid(1, 1, 64, 0), SIDE, 4.0)


def embeddings(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def memory(values: Tensor, window: int = 1) -> LocationMemory:
    moments = Moments(SIDE, SIDE, CHANNELS)
    moments.add_embeddings(values)
    config = DensityConfig(coreset=0, reduction="discriminant", window=window, precision="fp32")
    density = build_density(config, NormalStatistics(moments, convert_to_bank_rows(values)))
    assert isinstance(density, LocationMemory)
    return density


def profile_of(values: Tensor, thetas: Tensor | None = None, coverage_mask: Tensor | None = None) -> ImageScoreProfile:
    statistics = NormalStatistics(Moments(SIDE, SIDE, CHANNELS), convert_to_bank_rows(values), thetas)
    return fit_profile(memory(embeddings(2) if len(values) < 2 else values), statistics, coverage_mask, MAP_GENERATOR)[
        0
    ]


@pytest.mark.parametrize("window", [1, 3])
def test_an_image_of_the_bank_is_scored_as_if_it_were_new(window: int) -> None:
    rows = embeddings(7).half().float()  # as the bank stores them
    density = memory(rows, window)
    distances = density.score(rows, torch.arange(7))
    for number in range(7):
        expected = memory(torch.cat([rows[:number], rows[number + 1 :]]), window).score(rows[number : number + 1])[0]
        torch.testing.assert_close(distances[number], expected, rtol=1e-4, atol=1e-4)
    assert float(density.score(rows).max()) < 0.05  # nothing is excluded


def test_a_location_where_good_images_vary_has_a_small_weight() -> None:
    values = embeddings(12)
    values[:, :, 5, 5] *= 8
    weight = profile_of(values).weight
    row, column = divmod(int(weight.argmin()), SIDE)
    assert max(abs(row - 5), abs(column - 5)) <= 1
    assert float(weight.max()) <= (1 + FLOOR) / FLOOR + 1e-6


def test_a_good_image_has_a_score_of_about_1_and_a_defective_one_more_in_any_batch() -> None:
    density, profile, new = memory(embeddings(40)), profile_of(embeddings(40)), embeddings(20, seed=1)
    scores = profile.compute_image_scores(density.score(new), MAP_GENERATOR)
    assert 0.8 < float(scores.mean()) < 1.2
    torch.testing.assert_close(profile.compute_image_scores(density.score(new)[3:4], MAP_GENERATOR), scores[3:4])
    new[:, :, 2:4, 2:4] += 6
    assert float(profile.compute_image_scores(density.score(new), MAP_GENERATOR).min()) > float(scores.max())


def test_the_highest_values_fall_from_the_maximum_to_the_largest_share() -> None:
    values = average_highest_map_values(
        torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(2)), MAP_GENERATOR
    )
    assert values.shape == (3, len(SHARES))
    assert bool((values[:, :-1] >= values[:, 1:]).all())


@pytest.mark.parametrize("image_score", ["maximum", "highest_percent"])
def test_without_a_profile_the_score_is_the_maximum_or_the_mean_of_the_highest_percent(image_score: str) -> None:
    distance = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    anomaly_map = MAP_GENERATOR(distance)
    scoring = ScoringConfig(image_score=image_score)
    scores = compute_image_scores(None, scoring, distance, anomaly_map, MAP_GENERATOR)
    values = anomaly_map.flatten(1).sort(dim=1, descending=True).values
    expected = values[:, 0] if image_score == "maximum" else values[:, : values.shape[1] // 100].mean(dim=1)
    torch.testing.assert_close(
        scores, expected, rtol=0.05, atol=0.0
    )  # the highest percent is searched in a sampled map


def test_locations_that_are_not_scored_do_not_influence_the_profile() -> None:
    coverage_mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    coverage_mask[2:6, 2:6] = True
    masked = profile_of(embeddings(10), torch.eye(2, 3).expand(10, 2, 3), coverage_mask)
    assert bool((masked.typical[1:] < profile_of(embeddings(10)).typical[1:]).all())


def test_with_one_image_all_weights_are_1() -> None:
    assert bool((profile_of(embeddings(1)).weight == 1).all())
