"""The memory without places: which patches it keeps, how far others are from it, and beside a memory of places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from focus_ray.config import DensityConfig
from focus_ray.density import coreset as module
from focus_ray.density.base import Statistics, build_density, density_tensors, load_density
from focus_ray.density.coreset import Coreset, choose_coreset, greedy_coreset, greedy_coresets
from focus_ray.density.moments import Moments
from focus_ray.density.nearest import JointMemory, NearestMemory, keep

HEIGHT, WIDTH, PLACES, OTHERS = 5, 4, 6, 7


def points(count: int, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


def embeddings(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, PLACES + OTHERS, HEIGHT, WIDTH, generator=generator).half().float()


def statistics_of(images: Tensor) -> Statistics:
    moments = Moments(HEIGHT, WIDTH, PLACES)
    moments.update(images[:, :PLACES])
    return Statistics(moments, keep(images))


def slow_greedy(rows: Tensor, count: int) -> list[int]:
    chosen = [int((rows - rows.mean(dim=0)).norm(dim=1).argmax())]
    while len(chosen) < count:
        chosen.append(int(torch.cdist(rows, rows[chosen]).min(dim=1).values.argmax()))
    return chosen


def test_each_point_chosen_is_the_farthest_from_those_before() -> None:
    rows = points(60)
    assert greedy_coreset(rows, 12).tolist() == slow_greedy(rows, 12)


def test_the_order_of_the_points_does_not_matter() -> None:
    rows = points(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert order[greedy_coreset(rows[order], 12)].tolist() == greedy_coreset(rows, 12).tolist()


def test_no_more_points_than_there_are_and_each_once() -> None:
    assert sorted(greedy_coreset(points(5), 9).tolist()) == [0, 1, 2, 3, 4]


def test_many_sets_at_once_are_chosen_as_each_alone() -> None:
    sets = points(4 * 30).view(4, 30, 3)
    assert greedy_coresets(sets, 12).tolist() == [greedy_coreset(one, 12).tolist() for one in sets]


def test_of_points_that_are_all_alike_none_is_chosen_twice() -> None:
    assert all(len(set(one)) == 5 for one in greedy_coresets(torch.ones(3, 7, 2), 5).tolist())


def test_a_coreset_covers_better_than_as_many_random_patches() -> None:
    rows = torch.cat([points(400) * 0.1, points(8, seed=1) + 5])  # few rare ones
    far = [
        float(torch.cdist(rows, rows[kept]).min(dim=1).values.max()) for kept in (greedy_coreset(rows, 20), range(20))
    ]
    assert far[0] < far[1] / 4


def test_the_distance_is_that_to_the_nearest_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    images = embeddings(4)[:, :OTHERS]
    coreset = choose_coreset(keep(images), 9, "cpu")
    rows = images.permute(0, 2, 3, 1).reshape(-1, OTHERS)
    expected = torch.cdist(rows, coreset.patches).min(dim=1).values.view(4, HEIGHT, WIDTH)
    torch.testing.assert_close(coreset.score(images), expected, atol=1e-3, rtol=1e-3)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)  # one image at a time
    torch.testing.assert_close(coreset.score(images), expected, atol=1e-3, rtol=1e-3)


def test_an_images_own_patches_are_left_out_for_it() -> None:
    images = embeddings(4)[:, :OTHERS]
    coreset = choose_coreset(keep(images), 4 * HEIGHT * WIDTH, "cpu")  # all of them
    assert sorted(coreset.images.tolist()) == sorted(list(range(4)) * HEIGHT * WIDTH)
    assert coreset.score(images).max() < 0.01
    own = torch.arange(4)
    for number in range(4):
        others = coreset.images != number
        expected = Coreset(coreset.patches[others], coreset.images[others]).score(images[number : number + 1])
        torch.testing.assert_close(coreset.score(images, own)[number : number + 1], expected)


def test_patches_without_their_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"patches \(3, 2\) and their images \(2,\) do not fit"):
        Coreset(torch.zeros(3, 2), torch.zeros(2))


def test_beside_a_memory_of_places_each_counts_in_units_of_good_images() -> None:
    statistics = statistics_of(embeddings(9))
    density = build_density(DensityConfig(coreset=30), statistics)
    assert isinstance(density, JointMemory)
    queries = embeddings(3, seed=2)
    expected = density.places.score(queries[:, :PLACES]) / density.typical[0]
    expected = (expected + density.coreset.score(queries[:, PLACES:]) / density.typical[1]) / 2
    torch.testing.assert_close(density.score(queries), expected)
    # a good image that was left out lies about 1 from the others
    assert float(density.score(embeddings(9), torch.arange(9)).mean()) == pytest.approx(1, abs=0.05)
    # the memory of places is that of a density without a coreset
    alone = build_density(DensityConfig(coreset=0), Statistics(statistics.moments, statistics.bank[:, :, :PLACES]))  # type: ignore[index]
    assert isinstance(alone, NearestMemory)
    torch.testing.assert_close(alone.score(queries[:, :PLACES]), density.places.score(queries[:, :PLACES]))


def test_one_built_from_its_tensors_scores_the_same() -> None:
    config, statistics = DensityConfig(coreset=30), statistics_of(embeddings(9))
    built = build_density(config, statistics)
    tensors = density_tensors(config, statistics, built)
    assert tensors["bank"].shape[2] == PLACES
    loaded = load_density(config, tensors, HEIGHT, WIDTH, "cpu")
    queries = embeddings(4, seed=4)
    torch.testing.assert_close(loaded.score(queries), built.score(queries), atol=1e-5, rtol=1e-5)


def test_two_sites_join_to_what_all_images_give() -> None:
    images = embeddings(10)
    config = DensityConfig(coreset=40)
    joined = statistics_of(images[6:]).join(statistics_of(images[:6]))
    queries = embeddings(3, seed=5)
    expected = build_density(config, statistics_of(images)).score(queries)
    torch.testing.assert_close(build_density(config, joined).score(queries), expected, rtol=1e-3, atol=1e-3)
