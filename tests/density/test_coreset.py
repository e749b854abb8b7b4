"""The coreset: the choice of patches, its distances, and the combination with a memory of locations."""

from __future__ import annotations

import pytest
import torch
from made_embeddings import make_embeddings, statistics_of
from torch import Tensor

from focus_ray.density.bank import convert_to_bank_rows
from focus_ray.density.base import build_density
from focus_ray.density.coreset import Coreset, choose_coreset, choose_farthest_points, choose_farthest_points_per_set
from focus_ray.density.nearest import LocationAndCoresetMemory
from focus_ray.density.settings import DensityConfig


def points(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def slow_greedy(rows: Tensor, count: int) -> list[int]:
    chosen = [int((rows - rows.mean(dim=0)).norm(dim=1).argmax())]
    while len(chosen) < count:
        chosen.append(int(torch.cdist(rows, rows[chosen]).min(dim=1).values.argmax()))
    return chosen


def test_each_chosen_point_is_the_farthest_from_the_points_chosen_before() -> None:
    sets = points(4 * 60).view(4, 60, 3)
    expected = [slow_greedy(rows, 12) for rows in sets]
    assert [choose_farthest_points(rows, 12).tolist() for rows in sets] == expected
    assert choose_farthest_points_per_set(sets, 12).tolist() == expected


def test_the_choice_does_not_depend_on_the_order_of_the_points() -> None:
    rows, order = points(60), torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert order[choose_farthest_points(rows[order], 12)].tolist() == choose_farthest_points(rows, 12).tolist()


def test_a_coreset_larger_than_the_set_contains_every_point_once() -> None:
    assert sorted(choose_farthest_points(points(5), 9).tolist()) == [0, 1, 2, 3, 4]


def test_equal_points_are_not_chosen_twice() -> None:
    assert all(len(set(chosen)) == 5 for chosen in choose_farthest_points_per_set(torch.ones(3, 7, 2), 5).tolist())


def test_a_coreset_covers_points_better_than_an_arbitrary_choice_of_the_same_size() -> None:
    rows = torch.cat([points(400) * 0.1, points(8, seed=1) + 5])  # the last 8 are rare
    coreset, arbitrary = (
        float(torch.cdist(rows, rows[chosen]).min(dim=1).values.max())
        for chosen in (choose_farthest_points(rows, 20), range(20))
    )
    assert coreset < arbitrary / 4


@pytest.mark.parametrize("chunk_bytes", [2**20, 1], ids=["whole", "one image at a time"])
def test_the_distance_is_the_distance_to_the_nearest_patch(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("focus_ray.density.coreset._CHUNK_BYTES", chunk_bytes)
    images = make_embeddings(4) - 5
    rows = images.permute(0, 2, 3, 1).reshape(-1, 6)
    few, all_patches = (choose_coreset(convert_to_bank_rows(images), count, "cpu") for count in (9, 4 * 12))
    expected = torch.cdist(rows, few.patches).min(dim=1).values.view(4, 3, 4)
    torch.testing.assert_close(few.score(images), expected, atol=1e-2, rtol=1e-3)
    assert sorted(all_patches.image_numbers.tolist()) == sorted(list(range(4)) * 12)
    distances = all_patches.score(images, torch.arange(4))  # each without its own patches
    for number in range(4):
        is_other = all_patches.image_numbers != number
        remaining = Coreset(all_patches.patches[is_other], all_patches.image_numbers[is_other])
        torch.testing.assert_close(distances[number : number + 1], remaining.score(images[number : number + 1]))


def test_patches_with_too_few_image_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(2,\)"):
        Coreset(torch.zeros(3, 2), torch.zeros(2))


def test_a_joint_memory_averages_both_distances_in_units_of_typical_distances() -> None:
    images, queries = make_embeddings(9, 13), make_embeddings(3, 13, seed=2)
    density = build_density(DensityConfig(coreset=30, precision="fp32"), statistics_of(images, coreset_channels=7))
    assert isinstance(density, LocationAndCoresetMemory)
    alone = build_density(DensityConfig(coreset=0, precision="fp32"), statistics_of(images[:, :6]))
    expected = alone.score(queries[:, :6]) / density.typical_distance[0]
    expected = (expected + density.coreset.score(queries[:, 6:]) / density.typical_distance[1]) / 2
    torch.testing.assert_close(density.score(queries), expected)
    # a left-out good image has a distance of about 1
    assert float(density.score(images, torch.arange(9)).mean()) == pytest.approx(1, abs=0.05)
