"""The memory of locations equals slow references; both kinds of density are stored, joined and tiled behind one interface."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_embeddings import make_embeddings, moments_of, statistics_of
from torch import Tensor

from focus_ray.density.bank import convert_to_bank_rows, restore_bank_from_coresets, select_embeddings_outside_coresets
from focus_ray.density.base import (
    NormalStatistics,
    build_density,
    build_exportable_density,
    build_leave_one_out_scorer,
    choose_evenly_spaced,
    collect_density_tensors,
    restore_density,
)
from focus_ray.density.nearest import LocationMemory, subsample_location_coresets, whiten_bank
from focus_ray.density.relations import ImageRelations
from focus_ray.density.settings import DensityConfig

HEIGHT, WIDTH, CHANNELS = 3, 4, 6
LEARNT = {"reduction": "discriminant"}  # nothing is whitened
WHITENED = {"reduction": "semi_orthogonal", "shrinkage": "0.3 absolute"}


def config_of(**settings: Any) -> DensityConfig:
    return DensityConfig.model_validate({"coreset": 0, "precision": "fp32", **settings}, context={"is_fitted": True})


def build_location_memory(images: Tensor, **settings: Any) -> LocationMemory:
    memory = build_density(config_of(**settings), statistics_of(images))
    assert isinstance(memory, LocationMemory)
    return memory


def compute_pooled_covariance(images: Tensor) -> np.ndarray:
    locations = images.permute(2, 3, 0, 1).flatten(0, 1).double().numpy()
    return np.mean([np.cov(rows, rowvar=False) for rows in locations], axis=0)


def slow_scores(
    queries: Tensor, bank: Tensor, window: int, metric: np.ndarray, stored: Any = None, excluded: Any = None
) -> np.ndarray:
    """Computes distances (B, H, W) from the definition, for one patch and one neighbour at a time.

    Args:
        bank: (N, C, H, W).
        metric: (C, C), inverse covariance.
        stored: (L, M), numbers of the images that each location stores; None: all.
        excluded: for each query the numbers of the images that are ignored; None: no image.
    """
    reach, distances = window // 2, np.full((len(queries), HEIGHT, WIDTH), np.inf)
    for (image, row, column), _ in np.ndenumerate(distances):
        for i in range(max(0, row - reach), min(HEIGHT, row + reach + 1)):
            for j in range(max(0, column - reach), min(WIDTH, column + reach + 1)):
                for other in range(len(bank)) if stored is None else stored[i * WIDTH + j].tolist():
                    if excluded is None or other not in excluded[image]:
                        gap = (queries[image, :, row, column] - bank[other, :, i, j]).double().numpy()
                        distances[image, row, column] = min(distances[image, row, column], (gap @ metric @ gap) ** 0.5)
    return distances


@pytest.mark.parametrize("window", [1, 3, 5])
def test_scores_follow_the_definition(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    normal, queries = make_embeddings(9), make_embeddings(3, seed=1)
    memory = build_location_memory(normal, window=window, **WHITENED)
    metric = np.linalg.inv(compute_pooled_covariance(normal) + 0.3 * np.eye(CHANNELS))
    expected = slow_scores(queries, normal, window, metric)
    np.testing.assert_allclose(memory.score(queries).numpy(), expected, rtol=1e-3, atol=1e-3)
    whitening = memory.whitening.double().numpy()
    np.testing.assert_allclose(whitening.T @ whitening, metric, rtol=1e-3, atol=1e-4)
    assert memory.score(normal).max() < 0.05
    monkeypatch.setattr("focus_ray.density.nearest._CHUNK_BYTES", 1)  # one row at a time
    np.testing.assert_allclose(memory.score(queries).numpy(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("per_place", [None, 5])
@pytest.mark.parametrize("window", [1, 3])
def test_excluded_images_are_ignored(window: int, per_place: int | None) -> None:
    normal = make_embeddings(12)
    memory = build_location_memory(normal, window=window, per_place=per_place, **LEARNT)
    assert memory.bank.shape == (HEIGHT * WIDTH, per_place or 12, CHANNELS)
    for excluded in ([[number] for number in range(12)], [[1, 4, 6], [0, 0, 0]]):
        queries = normal[: len(excluded)]
        expected = slow_scores(queries, normal, window, np.eye(CHANNELS), memory.image_numbers, excluded)
        distances = memory.score(queries, torch.tensor(excluded)).numpy()
        np.testing.assert_allclose(distances, expected, rtol=2e-3, atol=2e-2)


def test_whitening_does_not_depend_on_the_images_in_the_bank() -> None:
    statistics = statistics_of(make_embeddings(12))
    assert statistics.bank is not None
    part = NormalStatistics(statistics.moments, statistics.bank[:2])
    first, second = (build_density(config_of(**WHITENED), each) for each in (statistics, part))
    assert torch.equal(first.whitening, second.whitening)  # type: ignore[attr-defined]


def test_the_coreset_of_a_location_covers_it_better_than_evenly_spaced_images() -> None:
    bank = whiten_bank(convert_to_bank_rows(make_embeddings(60)), torch.eye(CHANNELS)).float()
    coreset, images = subsample_location_coresets(bank, 20, "cpu")
    assert images is not None
    assert torch.equal(coreset, bank[torch.arange(len(bank))[:, None], images])
    assert torch.cdist(bank, coreset).amin(dim=2).amax() < torch.cdist(bank, bank[:, ::3]).amin(dim=2).amax()


def test_the_coreset_of_equal_images_contains_two_different_images() -> None:
    """Otherwise nothing would remain to compare an excluded image with."""
    equal = torch.ones(5, CHANNELS, HEIGHT, WIDTH)
    assert build_location_memory(equal, per_place=2, **LEARNT).score(equal, torch.arange(5)).max() < 0.01


def test_coresets_and_unused_embeddings_restore_the_bank() -> None:
    bank = convert_to_bank_rows(make_embeddings(20))
    coreset, images = subsample_location_coresets(bank.transpose(0, 1), 4, "cpu")
    assert images is not None
    unused = select_embeddings_outside_coresets(bank, images.t())
    assert len(unused) == 16 * HEIGHT * WIDTH
    assert torch.equal(restore_bank_from_coresets(coreset.transpose(0, 1), images.t(), unused), bank)


@pytest.mark.parametrize(
    ("bank", "whitening", "numbers"),
    [((3, 2, 3), (3, 3), None), ((4, 2, 3), (2, 2), None), ((4, 3), (3, 3), None), ((4, 2, 3), (3, 3), (4, 3))],
    ids=["locations", "channels", "dimensions", "image numbers"],
)
def test_tensors_that_do_not_fit_the_map_are_refused(bank: Any, whitening: Any, numbers: Any) -> None:
    numbers = None if numbers is None else torch.zeros(numbers)
    with pytest.raises(ValueError, match=r"needs"):
        LocationMemory(torch.zeros(bank), torch.zeros(whitening), 2, 2, image_numbers=numbers)


@pytest.mark.parametrize(
    ("count", "kept", "message"), [(4, 0, "got 0"), (1, 1, "got 1"), (4, None, r"density\.kind=nearest")]
)
def test_statistics_of_too_few_images_are_refused(count: int, kept: int | None, message: str) -> None:
    whole = statistics_of(make_embeddings(count))
    bank = None if kept is None or whole.bank is None else whole.bank[:kept]
    with pytest.raises(ValueError, match=message):
        build_density(config_of(**WHITENED), NormalStatistics(whole.moments, bank))


# Every kind behind one interface

KINDS: dict[str, dict[str, Any]] = {
    "gaussian": {"kind": "gaussian", "pooling": 0.2},
    "memory": {"per_place": 4},
    "unwhitened memory": {"per_place": 4, **LEARNT},
    "joint memory": {"coreset": 30, "gaussian_share": 0.0, **LEARNT},
    "checked memory": {"coreset": 30, **LEARNT},
}


def images_of(name: str, count: int, seed: int = 0) -> tuple[Tensor, int]:
    """Returns embeddings for a kind, and the number of their channels for a coreset."""
    coreset_channels = 5 if "coreset" in KINDS[name] else 0
    return make_embeddings(count, CHANNELS + coreset_channels, seed=seed), coreset_channels


@pytest.mark.parametrize("name", KINDS)
def test_a_density_loaded_from_its_tensors_or_exported_scores_the_same(name: str) -> None:
    config, (images, coreset_channels) = config_of(**KINDS[name]), images_of(name, 20)
    statistics, queries = statistics_of(images, coreset_channels), images_of(name, 4, seed=4)[0]
    built = build_density(config, statistics)
    tensors = collect_density_tensors(config, statistics, built)
    loaded = restore_density(config, tensors, HEIGHT, WIDTH, "cpu")
    expected = built.score(queries)
    torch.testing.assert_close(loaded.score(queries), expected, rtol=1e-5, atol=1e-5)
    left_out = [
        build_leave_one_out_scorer(config, statistics, each).score(images, torch.arange(20)) for each in (built, loaded)
    ]
    torch.testing.assert_close(*left_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        build_exportable_density(config, built, False).score(queries), expected, rtol=1e-3, atol=2e-3
    )
    torch.testing.assert_close(
        build_exportable_density(config, built, True).score(queries), expected, rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("name", KINDS)
def test_joined_statistics_of_two_sites_equal_the_statistics_of_all_images(name: str) -> None:
    config, (images, coreset_channels) = config_of(**{**KINDS[name], "per_place": None}), images_of(name, 20)
    first, second = (statistics_of(part, coreset_channels) for part in images.split([8, 12]))
    queries = images_of(name, 3, seed=5)[0]
    expected = build_density(config, statistics_of(images, coreset_channels)).score(queries)
    torch.testing.assert_close(build_density(config, first.join(second)).score(queries), expected, rtol=2e-3, atol=2e-3)


def test_statistics_that_do_not_fit_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match="bank"):
        statistics_of(make_embeddings(3)).join(NormalStatistics(moments_of(make_embeddings(3))))


def test_selecting_bank_images_selects_all_data_of_them() -> None:
    statistics = statistics_of(make_embeddings(3), relations=ImageRelations.from_groups(torch.tensor([0, 0, 1])))
    bank, statistics.shown = statistics.bank, torch.eye(3) > 0
    assert bank is not None
    assert statistics.find_images_to_exclude(torch.tensor([0])).tolist() == [[0, 1]]
    statistics.select_bank_images([0, 2])
    assert statistics.relations is not None
    assert statistics.relations.has_no_related_images
    assert torch.equal(statistics.bank, bank[[0, 2]])  # type: ignore[arg-type]
    assert statistics.shown.tolist() == [[True, False, False], [False, False, True]]


@given(st.integers(0, 3000), st.integers(1, 600))
def test_sample_evenly_returns_all_numbers_or_evenly_spaced_ones(count: int, limit: int) -> None:
    chosen = sorted(choose_evenly_spaced(count, limit))
    assert len(chosen) == min(count, limit)
    assert all(0 <= position < count for position in chosen)
    if count > limit:
        assert all(count // limit <= gap <= -(-count // limit) for gap in np.diff(chosen))
