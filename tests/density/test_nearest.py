"""Tests of the memory of locations (distances, whitening, coresets), and of storing and joining both kinds of density."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_ray.density.base import (
    Statistics,
    absolute_ridge,
    build_density,
    density_tensors,
    load_density,
    sample_evenly,
)
from focus_ray.density.gaussian import Gaussian
from focus_ray.density.moments import Moments, mean_variance
from focus_ray.density.nearest import (
    NearestMemory,
    build_memory,
    restore_bank,
    select_unused_embeddings,
    subsample_coreset,
    to_bank_rows,
    whiten,
)
from focus_ray.density.settings import DensityConfig

HEIGHT, WIDTH, CHANNELS = 5, 4, 6


def embeddings(count: int, seed: int = 0) -> Tensor:
    """Makes (count, C, H, W) with correlated channels and a different mean at each location."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(100))
    means = 3 * torch.randn(CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(101))
    values = torch.randn(count, CHANNELS, HEIGHT, WIDTH, generator=generator)
    return torch.einsum("dc,bchw->bdhw", mixing, values) + means


def statistics_of(images: Tensor, with_bank: bool = True) -> Statistics:
    moments = Moments(HEIGHT, WIDTH, CHANNELS)
    moments.update(images)
    return Statistics(moments, to_bank_rows(images) if with_bank else None)


def pooled_by_numpy(images: Tensor, ridge: float) -> np.ndarray:
    locations = images.permute(2, 3, 0, 1).reshape(HEIGHT * WIDTH, len(images), CHANNELS).numpy().astype(np.float64)
    return np.mean([np.cov(rows, rowvar=False) for rows in locations], axis=0) + ridge * np.eye(CHANNELS)


def slow_scores(queries: Tensor, bank: Tensor, covariance: np.ndarray, window: int) -> np.ndarray:
    """Computes distances (B, H, W) from the definition, for one patch and one neighbour at a time."""
    inverse = np.linalg.inv(covariance)
    query = queries.numpy().astype(np.float64)
    normal = bank.float().numpy().astype(np.float64).reshape(len(bank), HEIGHT, WIDTH, CHANNELS)
    reach = window // 2
    distances = np.empty((len(query), HEIGHT, WIDTH))
    for image in range(len(query)):
        for row in range(HEIGHT):
            for column in range(WIDTH):
                best = np.inf
                for i in range(max(0, row - reach), min(HEIGHT, row + reach + 1)):
                    for j in range(max(0, column - reach), min(WIDTH, column + reach + 1)):
                        for normal_image in normal:
                            difference = query[image, :, row, column] - normal_image[i, j]
                            best = min(best, difference @ inverse @ difference)
                distances[image, row, column] = best**0.5
    return distances


@pytest.mark.parametrize("window", [1, 3, 5])
def test_scores_follow_the_definition(window: int) -> None:
    normal = embeddings(9)
    statistics = statistics_of(normal)
    assert statistics.bank is not None
    memory = build_memory(statistics.bank, statistics.moments, 0.3, window)
    queries = embeddings(3, seed=1)
    expected = slow_scores(queries, statistics.bank, pooled_by_numpy(normal, 0.3), window)
    np.testing.assert_allclose(memory.score(queries).numpy(), expected, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("window", [1, 3])
def test_scores_do_not_depend_on_the_size_of_chunks(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = statistics_of(embeddings(9))
    assert statistics.bank is not None
    memory = build_memory(statistics.bank, statistics.moments, 0.3, window)
    queries = embeddings(3, seed=2)
    whole = memory.score(queries)
    monkeypatch.setattr("focus_ray.density.nearest._CHUNK_BYTES", 1)  # one row at a time
    torch.testing.assert_close(memory.score(queries), whole, atol=1e-5, rtol=1e-5)


# A memory of coresets


def slow_coreset_scores(
    queries: Tensor, bank: Tensor, images: Tensor, window: int, excluded_images: list[int]
) -> np.ndarray:
    """Computes distances (B, H, W) from the definition: to the nearest coreset embedding of a not excluded image."""
    reach, distances = window // 2, np.full((len(queries), HEIGHT, WIDTH), np.inf)
    for (image, row, column), _ in np.ndenumerate(distances):
        for i in range(max(0, row - reach), min(HEIGHT, row + reach + 1)):
            for j in range(max(0, column - reach), min(WIDTH, column + reach + 1)):
                for other in images[i * WIDTH + j].tolist():
                    if other != excluded_images[image]:
                        gap = queries[image, :, row, column] - bank[other, i * WIDTH + j].float()
                        distances[image, row, column] = min(distances[image, row, column], float(gap.norm()))
    return distances


@pytest.mark.parametrize("window", [1, 3])
def test_a_memory_of_coresets_follows_the_definition_and_ignores_the_excluded_image(window: int) -> None:
    normal = embeddings(20).half().float()
    config = DensityConfig(reduction="discriminant", per_place=4, window=window, coreset=0, precision="fp32")  # type: ignore[arg-type]
    statistics = statistics_of(normal)
    memory = build_density(config, statistics)
    assert isinstance(memory, NearestMemory)
    assert statistics.bank is not None
    assert memory.image_numbers is not None
    assert memory.bank.shape == (HEIGHT * WIDTH, 4, CHANNELS)
    for excluded_images in (list(range(20)), [-1] * 20):  # each image itself, and none
        expected = slow_coreset_scores(normal, statistics.bank, memory.image_numbers, window, excluded_images)
        distances = memory.score(normal, torch.tensor(excluded_images)).numpy()
        np.testing.assert_allclose(distances, expected, rtol=2e-3, atol=2e-2)
    np.testing.assert_allclose(memory.score(normal).numpy(), distances, atol=1e-6)


def test_several_images_are_excluded_for_one_scored_image() -> None:
    normal = embeddings(20)
    config = DensityConfig(reduction="discriminant", per_place=6, coreset=0, precision="fp32")
    memory = build_density(config, statistics_of(normal))
    assert isinstance(memory, NearestMemory)
    assert memory.image_numbers is not None
    excluded = torch.tensor([3, 7])
    is_excluded = torch.isin(memory.image_numbers, excluded)[:, :, None]
    moved_far_away = memory.bank.masked_fill(is_excluded, 1e4)
    remaining = NearestMemory(moved_far_away, memory.whitening, HEIGHT, WIDTH, memory.window)
    distances = memory.score(normal[:2], excluded.expand(2, 2))
    torch.testing.assert_close(distances, remaining.score(normal[:2]), rtol=1e-4, atol=1e-3)


def test_a_coreset_covers_a_location_better_than_evenly_spaced_images() -> None:
    bank = whiten(to_bank_rows(embeddings(60)), torch.eye(CHANNELS))
    coreset, images = subsample_coreset(bank, 20, "cpu")
    assert images is not None
    torch.testing.assert_close(coreset, bank[torch.arange(len(bank))[:, None], images])
    even = bank[:, ::3]
    assert torch.cdist(bank, coreset).amin(dim=2).amax() < torch.cdist(bank, even).amin(dim=2).amax()


def test_a_coreset_of_equal_images_contains_two_different_images() -> None:
    """Otherwise nothing would remain to compare an excluded image with."""
    density = build_density(
        DensityConfig(reduction="discriminant", per_place=2, window=1, coreset=0),
        statistics_of(torch.ones(5, CHANNELS, HEIGHT, WIDTH)),
    )
    assert density.score(torch.ones(5, CHANNELS, HEIGHT, WIDTH), torch.arange(5)).max() < 0.01  # type: ignore[call-arg]


def test_a_location_with_few_images_keeps_them_all() -> None:
    memory = build_density(DensityConfig(per_place=9, coreset=0), statistics_of(embeddings(9)))
    assert isinstance(memory, NearestMemory)
    assert memory.image_numbers is None
    assert memory.bank.shape[1] == 9


@pytest.mark.parametrize("reduction", ["discriminant", "semi_orthogonal"])
def test_a_memory_of_coresets_loaded_from_its_tensors_scores_the_same(reduction: str) -> None:
    config = DensityConfig(reduction=reduction, per_place=4, coreset=0, precision="fp32")  # type: ignore[arg-type]
    statistics = statistics_of(embeddings(20))
    built = build_density(config, statistics)
    tensors = density_tensors(config, statistics, built)
    assert tensors["bank"].shape == (4, HEIGHT * WIDTH, CHANNELS)
    loaded = load_density(config, tensors, HEIGHT, WIDTH, "cpu")
    queries = embeddings(20)
    torch.testing.assert_close(loaded.score(queries), built.score(queries), rtol=1e-5, atol=1e-5)
    distances = [density.score(queries, torch.arange(20)) for density in (loaded, built)]  # type: ignore[call-arg]
    torch.testing.assert_close(*distances, rtol=1e-5, atol=1e-5)


def test_coresets_and_unused_embeddings_restore_the_bank() -> None:
    bank = to_bank_rows(embeddings(20))
    coreset, images = subsample_coreset(bank.transpose(0, 1), 4, "cpu")
    assert images is not None
    unused = select_unused_embeddings(bank, images.t())
    assert len(unused) == 16 * HEIGHT * WIDTH
    assert torch.equal(restore_bank(coreset.transpose(0, 1), images.t(), unused), bank)


def test_image_numbers_that_do_not_fit_the_bank_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 2, 3\).*\(4, 3\)"):
        NearestMemory(torch.zeros(4, 2, 3), torch.eye(3), 2, 2, image_numbers=torch.zeros(4, 3))


def test_a_batch_scores_like_its_images_one_by_one() -> None:
    density = build_density(DensityConfig(window=3, coreset=0, precision="fp32"), statistics_of(embeddings(9)))
    queries = embeddings(5, seed=3)
    expected = torch.cat([density.score(query[None]) for query in queries])
    torch.testing.assert_close(density.score(queries), expected, atol=1e-4, rtol=1e-4)


def test_an_image_of_the_bank_has_distance_zero() -> None:
    statistics = statistics_of(embeddings(9).half().float())
    density = build_density(DensityConfig(window=1, coreset=0, precision="fp32"), statistics)
    assert density.score(embeddings(9).half().float()).max() < 0.02


def test_whitening_is_a_root_of_the_inverse_pooled_covariance() -> None:
    images = embeddings(12)
    statistics = statistics_of(images)
    assert statistics.bank is not None
    whitening = build_memory(statistics.bank, statistics.moments, 0.5).whitening.double().numpy()
    np.testing.assert_allclose(
        whitening.T @ whitening, np.linalg.inv(pooled_by_numpy(images, 0.5)), rtol=1e-4, atol=1e-5
    )


def test_whitening_does_not_depend_on_the_images_in_the_bank() -> None:
    statistics = statistics_of(embeddings(12))
    assert statistics.bank is not None
    whole = build_memory(statistics.bank, statistics.moments, 0.5).whitening
    assert torch.equal(build_memory(statistics.bank[:1], statistics.moments, 0.5).whitening, whole)


def test_bank_rows_and_whitening_order_locations_row_by_row() -> None:
    images = embeddings(3)
    rows = to_bank_rows(images)
    assert (rows.shape, rows.dtype) == ((3, HEIGHT * WIDTH, CHANNELS), torch.float16)
    bank = whiten(rows, torch.eye(CHANNELS))
    assert bank.shape == (HEIGHT * WIDTH, 3, CHANNELS)
    torch.testing.assert_close(bank[2 * WIDTH + 1, 0], images[0, :, 2, 1], atol=5e-3, rtol=1e-3)


def test_an_empty_bank_is_refused() -> None:
    statistics = statistics_of(embeddings(4))
    assert statistics.bank is not None
    with pytest.raises(ValueError, match="got 0"):
        build_memory(statistics.bank[:0], statistics.moments, 0.5)


def test_moments_of_one_image_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1"):
        build_density(DensityConfig(coreset=0), statistics_of(embeddings(1)))


@pytest.mark.parametrize("window", [0, 2, -1])
def test_an_even_or_not_positive_window_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"density.window={window} "):
        NearestMemory(torch.zeros(4, 2, 3), torch.eye(3), 2, 2, window)


@pytest.mark.parametrize(
    ("bank", "whitening"),
    [((3, 2, 3), (3, 3)), ((4, 2, 3), (2, 2)), ((4, 3), (3, 3))],
    ids=["locations", "channels", "2d"],
)
def test_a_bank_that_does_not_fit_the_map_is_refused(bank: tuple[int, ...], whitening: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2 x 2"):
        NearestMemory(torch.zeros(bank), torch.zeros(whitening), 2, 2)


def test_an_embedding_of_another_map_is_refused() -> None:
    memory = NearestMemory(torch.zeros(4, 2, 3), torch.eye(3), 2, 2)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\)"):
        memory.score(torch.zeros(1, 3, 2, 3))


# Both densities behind one interface


def config_of(kind: str) -> DensityConfig:
    return DensityConfig.model_validate({"kind": kind, "pooling": 0.2 if kind == "gaussian" else 0.0, "coreset": 0})


def test_the_setting_kind_selects_the_density() -> None:
    statistics = statistics_of(embeddings(9))
    assert isinstance(build_density(config_of("gaussian"), statistics), Gaussian)
    memory = build_density(DensityConfig(kind="nearest", window=5, coreset=0, precision="fp32"), statistics)
    assert isinstance(memory, NearestMemory)
    assert memory.window == 5


@pytest.mark.parametrize("kind", ["gaussian", "nearest"])
def test_a_density_loaded_from_its_tensors_scores_the_same(kind: str) -> None:
    config, statistics = config_of(kind), statistics_of(embeddings(9))
    built = build_density(config, statistics)
    loaded = load_density(config, density_tensors(config, statistics, built), HEIGHT, WIDTH, "cpu")
    queries = embeddings(4, seed=4)
    torch.testing.assert_close(loaded.score(queries), built.score(queries), atol=1e-5, rtol=1e-5)


def test_a_memory_needs_a_bank() -> None:
    with pytest.raises(ValueError, match=r"density\.kind=nearest"):
        build_density(config_of("nearest"), statistics_of(embeddings(4), with_bank=False))


def test_the_ridge_is_relative_to_the_mean_variance_or_absolute() -> None:
    moments = statistics_of(embeddings(9)).moments
    assert absolute_ridge(DensityConfig(shrinkage=2.0), moments) == pytest.approx(2 * mean_variance(moments))
    assert absolute_ridge(DensityConfig(shrinkage=0.01, shrinkage_unit="absolute"), moments) == 0.01


@pytest.mark.parametrize("kind", ["gaussian", "nearest"])
def test_joined_statistics_of_two_sites_equal_the_statistics_of_all_images(kind: str) -> None:
    config, images = config_of(kind), embeddings(10)
    parts = [statistics_of(part, kind == "nearest") for part in images.split([4, 6])]
    joined = parts[0].join(parts[1])
    whole = statistics_of(images, kind == "nearest")
    assert joined.moments.count == 10
    torch.testing.assert_close(joined.moments.scatter, whole.moments.scatter, rtol=1e-4, atol=1e-4)
    queries = embeddings(3, seed=5)
    expected = build_density(config, whole).score(queries)
    torch.testing.assert_close(build_density(config, joined).score(queries), expected, rtol=1e-3, atol=1e-4)


def test_statistics_of_a_gaussian_and_of_a_memory_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match="bank"):
        statistics_of(embeddings(3)).join(statistics_of(embeddings(3), with_bank=False))


def test_statistics_of_maps_of_two_sizes_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2, 6\)"):
        statistics_of(embeddings(3)).join(Statistics(Moments(2, 2, CHANNELS), torch.zeros(0, 4, CHANNELS).half()))


@given(st.integers(0, 3000), st.integers(1, 600))
def test_sample_evenly_returns_all_numbers_or_evenly_spaced_ones(count: int, limit: int) -> None:
    chosen = sorted(sample_evenly(count, limit))
    assert len(chosen) == min(count, limit)
    assert all(0 <= position < count for position in chosen)
    if count > limit:
        gaps = np.diff(chosen)
        assert all(count // limit <= gap <= -(-count // limit) for gap in gaps)
