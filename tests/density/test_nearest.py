"""Nearest normal neighbours: distances as the definition has them, whitening, both densities through tensors and joins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_ray.config import DensityConfig
from focus_ray.density.base import Statistics, build_density, density_tensors, load_density, ridge_of, sample_positions
from focus_ray.density.gaussian import Gaussian
from focus_ray.density.moments import Moments, mean_variance
from focus_ray.density.nearest import NearestMemory, build_memory, keep, rest_of, thinned, whiten, with_rest

HEIGHT, WIDTH, CHANNELS = 5, 4, 6


def embeddings(count: int, seed: int = 0) -> Tensor:
    """Correlated channels and a mean of its own at each place: (count, C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(100))
    places = 3 * torch.randn(CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(101))
    values = torch.randn(count, CHANNELS, HEIGHT, WIDTH, generator=generator)
    return torch.einsum("dc,bchw->bdhw", mixing, values) + places


def statistics_of(images: Tensor, with_bank: bool = True) -> Statistics:
    moments = Moments(HEIGHT, WIDTH, CHANNELS)
    moments.update(images)
    return Statistics(moments, keep(images) if with_bank else None)


def pooled_by_numpy(images: Tensor, ridge: float) -> np.ndarray:
    places = images.permute(2, 3, 0, 1).reshape(HEIGHT * WIDTH, len(images), CHANNELS).numpy().astype(np.float64)
    return np.mean([np.cov(place, rowvar=False) for place in places], axis=0) + ridge * np.eye(CHANNELS)


def slow_scores(queries: Tensor, bank: Tensor, covariance: np.ndarray, window: int) -> np.ndarray:
    """The definition, one patch and one neighbour at a time: (B, H, W)."""
    inverse = np.linalg.inv(covariance)
    query = queries.numpy().astype(np.float64)
    normal = bank.float().numpy().astype(np.float64).reshape(len(bank), HEIGHT, WIDTH, CHANNELS)
    reach = window // 2
    found = np.empty((len(query), HEIGHT, WIDTH))
    for image in range(len(query)):
        for row in range(HEIGHT):
            for column in range(WIDTH):
                best = np.inf
                for i in range(max(0, row - reach), min(HEIGHT, row + reach + 1)):
                    for j in range(max(0, column - reach), min(WIDTH, column + reach + 1)):
                        for one in normal:
                            difference = query[image, :, row, column] - one[i, j]
                            best = min(best, difference @ inverse @ difference)
                found[image, row, column] = best**0.5
    return found


@pytest.mark.parametrize("window", [1, 3, 5])
def test_scores_are_those_of_the_definition(window: int) -> None:
    normal = embeddings(9)
    statistics = statistics_of(normal)
    assert statistics.bank is not None
    memory = build_memory(statistics.bank, statistics.moments, 0.3, window)
    queries = embeddings(3, seed=1)
    expected = slow_scores(queries, statistics.bank, pooled_by_numpy(normal, 0.3), window)
    np.testing.assert_allclose(memory.score(queries).numpy(), expected, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("window", [1, 3])
def test_scores_do_not_depend_on_how_the_rows_are_cut(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = statistics_of(embeddings(9))
    assert statistics.bank is not None
    memory = build_memory(statistics.bank, statistics.moments, 0.3, window)
    queries = embeddings(3, seed=2)
    whole = memory.score(queries)
    monkeypatch.setattr("focus_ray.density.nearest._CHUNK_BYTES", 1)  # one row at a time
    torch.testing.assert_close(memory.score(queries), whole, atol=1e-5, rtol=1e-5)


# A memory that keeps a part of what there is


def slow_thinned_scores(queries: Tensor, bank: Tensor, images: Tensor, window: int, own: list[int]) -> np.ndarray:
    """The definition: the nearest, around the place, of what each place keeps of other images than the query's own."""
    reach, found = window // 2, np.full((len(queries), HEIGHT, WIDTH), np.inf)
    for (image, row, column), _ in np.ndenumerate(found):
        for i in range(max(0, row - reach), min(HEIGHT, row + reach + 1)):
            for j in range(max(0, column - reach), min(WIDTH, column + reach + 1)):
                for other in images[i * WIDTH + j].tolist():
                    if other != own[image]:
                        gap = queries[image, :, row, column] - bank[other, i * WIDTH + j].float()
                        found[image, row, column] = min(found[image, row, column], float(gap.norm()))
    return found


@pytest.mark.parametrize("window", [1, 3])
def test_a_memory_of_a_part_scores_as_the_definition_has_it_and_never_against_the_image_itself(window: int) -> None:
    normal = embeddings(20).half().float()
    config = DensityConfig(reduction="discriminant", per_place=4, window=window, coreset=0, precision="fp32")  # type: ignore[arg-type]
    statistics = statistics_of(normal)
    memory = build_density(config, statistics)
    assert isinstance(memory, NearestMemory)
    assert statistics.bank is not None
    assert memory.images is not None
    assert memory.bank.shape == (HEIGHT * WIDTH, 4, CHANNELS)
    for own in (list(range(20)), [-1] * 20):  # each image left out, and none
        expected = slow_thinned_scores(normal, statistics.bank, memory.images, window, own)
        found = memory.score(normal, torch.tensor(own)).numpy()
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-2)
    np.testing.assert_allclose(memory.score(normal).numpy(), found, atol=1e-6)


def test_several_numbers_of_an_image_are_all_left_out() -> None:
    normal = embeddings(20)
    config = DensityConfig(reduction="discriminant", per_place=6, coreset=0, precision="fp32")
    memory = build_density(config, statistics_of(normal))
    assert isinstance(memory, NearestMemory)
    assert memory.images is not None
    gone = torch.tensor([3, 7])
    kept = [[not np.isin(one, gone) for one in place] for place in memory.images.tolist()]
    far = torch.where(torch.tensor(kept)[:, :, None], memory.bank, torch.full((), 1e4))
    rest = NearestMemory(far, memory.whitening, HEIGHT, WIDTH, memory.window)
    found = memory.score(normal[:2], gone.expand(2, 2))
    torch.testing.assert_close(found, rest.score(normal[:2]), rtol=1e-4, atol=1e-3)


def test_what_a_place_keeps_is_near_everything_else() -> None:
    bank = whiten(keep(embeddings(60)), torch.eye(CHANNELS))
    kept, images = thinned(bank, 20, "cpu")
    assert images is not None
    torch.testing.assert_close(kept, bank[torch.arange(len(bank))[:, None], images])
    even = bank[:, ::3]
    assert torch.cdist(bank, kept).amin(dim=2).amax() < torch.cdist(bank, even).amin(dim=2).amax()


def test_places_where_all_images_are_alike_keep_two_of_them() -> None:
    """Or an image that is left out would leave nothing to be compared with."""
    density = build_density(
        DensityConfig(reduction="discriminant", per_place=2, window=1, coreset=0),
        statistics_of(torch.ones(5, CHANNELS, HEIGHT, WIDTH)),
    )
    assert density.score(torch.ones(5, CHANNELS, HEIGHT, WIDTH), torch.arange(5)).max() < 0.01  # type: ignore[call-arg]


def test_no_more_images_than_a_place_may_keep_are_all_kept() -> None:
    memory = build_density(DensityConfig(per_place=9, coreset=0), statistics_of(embeddings(9)))
    assert isinstance(memory, NearestMemory)
    assert memory.images is None
    assert memory.bank.shape[1] == 9


@pytest.mark.parametrize("reduction", ["discriminant", "semi_orthogonal"])
def test_a_part_through_its_tensors_is_the_same_part(reduction: str) -> None:
    config = DensityConfig(reduction=reduction, per_place=4, coreset=0, precision="fp32")  # type: ignore[arg-type]
    statistics = statistics_of(embeddings(20))
    built = build_density(config, statistics)
    tensors = density_tensors(config, statistics, built)
    assert tensors["bank"].shape == (4, HEIGHT * WIDTH, CHANNELS)
    loaded = load_density(config, tensors, HEIGHT, WIDTH, "cpu")
    queries, own = embeddings(20), torch.arange(20)
    torch.testing.assert_close(loaded.score(queries), built.score(queries), rtol=1e-5, atol=1e-5)
    apart = [one.score(queries, own) for one in (loaded, built)]  # type: ignore[call-arg]
    torch.testing.assert_close(*apart, rtol=1e-5, atol=1e-5)


def test_a_part_and_the_rest_make_the_whole() -> None:
    bank = keep(embeddings(20))
    kept, images = thinned(bank.transpose(0, 1), 4, "cpu")
    assert images is not None
    rest = rest_of(bank, images.t())
    assert len(rest) == 16 * HEIGHT * WIDTH
    assert torch.equal(with_rest(kept.transpose(0, 1), images.t(), rest), bank)


def test_images_that_do_not_fit_their_bank_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bank \(4, 2, 3\) and its images \(4, 3\) do not fit"):
        NearestMemory(torch.zeros(4, 2, 3), torch.eye(3), 2, 2, images=torch.zeros(4, 3))


def test_a_batch_scores_as_its_images_do_one_by_one() -> None:
    density = build_density(DensityConfig(window=3, coreset=0, precision="fp32"), statistics_of(embeddings(9)))
    queries = embeddings(5, seed=3)
    alone = torch.cat([density.score(query[None]) for query in queries])
    torch.testing.assert_close(density.score(queries), alone, atol=1e-4, rtol=1e-4)


def test_a_normal_image_of_the_bank_is_at_no_distance_from_it() -> None:
    statistics = statistics_of(embeddings(9).half().float())
    density = build_density(DensityConfig(window=1, coreset=0, precision="fp32"), statistics)
    assert density.score(embeddings(9).half().float()).max() < 0.02


def test_euclidean_distance_after_whitening_is_mahalanobis_before() -> None:
    images = embeddings(12)
    statistics = statistics_of(images)
    assert statistics.bank is not None
    whitening = build_memory(statistics.bank, statistics.moments, 0.5).whitening.double().numpy()
    np.testing.assert_allclose(
        whitening.T @ whitening, np.linalg.inv(pooled_by_numpy(images, 0.5)), rtol=1e-4, atol=1e-5
    )


def test_whitening_does_not_depend_on_how_much_of_the_bank_is_kept() -> None:
    statistics = statistics_of(embeddings(12))
    assert statistics.bank is not None
    whole = build_memory(statistics.bank, statistics.moments, 0.5).whitening
    assert torch.equal(build_memory(statistics.bank[:1], statistics.moments, 0.5).whitening, whole)


def test_keep_and_whiten_put_every_patch_at_its_place() -> None:
    images = embeddings(3)
    kept = keep(images)
    assert (kept.shape, kept.dtype) == ((3, HEIGHT * WIDTH, CHANNELS), torch.float16)
    bank = whiten(kept, torch.eye(CHANNELS))
    assert bank.shape == (HEIGHT * WIDTH, 3, CHANNELS)
    torch.testing.assert_close(bank[2 * WIDTH + 1, 0], images[0, :, 2, 1], atol=5e-3, rtol=1e-3)


def test_an_empty_bank_is_refused() -> None:
    statistics = statistics_of(embeddings(4))
    assert statistics.bank is not None
    with pytest.raises(ValueError, match="a memory needs at least 1 normal image"):
        build_memory(statistics.bank[:0], statistics.moments, 0.5)


def test_moments_of_one_image_are_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 2 normal images, got 1"):
        build_density(DensityConfig(coreset=0), statistics_of(embeddings(1)))


@pytest.mark.parametrize("window", [0, 2, -1])
def test_a_window_that_has_no_middle_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"window={window} must be odd and positive"):
        NearestMemory(torch.zeros(4, 2, 3), torch.eye(3), 2, 2, window)


@pytest.mark.parametrize(
    ("bank", "whitening"),
    [((3, 2, 3), (3, 3)), ((4, 2, 3), (2, 2)), ((4, 3), (3, 3))],
    ids=["places", "channels", "2d"],
)
def test_a_bank_that_does_not_fit_its_map_is_refused(bank: tuple[int, ...], whitening: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit a map of 2 x 2"):
        NearestMemory(torch.zeros(bank), torch.zeros(whitening), 2, 2)


def test_an_embedding_of_another_map_is_refused() -> None:
    memory = NearestMemory(torch.zeros(4, 2, 3), torch.eye(3), 2, 2)
    with pytest.raises(ValueError, match=r"embedding of \(2, 3\) places, the memory was made at \(2, 2\)"):
        memory.score(torch.zeros(1, 3, 2, 3))


# Both densities behind one interface


def config_of(kind: str) -> DensityConfig:
    return DensityConfig.model_validate({"kind": kind, "pooling": 0.2 if kind == "gaussian" else 0.0, "coreset": 0})


def test_the_config_decides_which_density_is_built() -> None:
    statistics = statistics_of(embeddings(9))
    assert isinstance(build_density(config_of("gaussian"), statistics), Gaussian)
    memory = build_density(DensityConfig(kind="nearest", window=5, coreset=0, precision="fp32"), statistics)
    assert isinstance(memory, NearestMemory)
    assert memory.window == 5


@pytest.mark.parametrize("kind", ["gaussian", "nearest"])
def test_a_density_built_from_its_tensors_scores_the_same(kind: str) -> None:
    config, statistics = config_of(kind), statistics_of(embeddings(9))
    built = build_density(config, statistics)
    loaded = load_density(config, density_tensors(config, statistics, built), HEIGHT, WIDTH, "cpu")
    queries = embeddings(4, seed=4)
    torch.testing.assert_close(loaded.score(queries), built.score(queries), atol=1e-5, rtol=1e-5)


def test_a_memory_needs_a_bank() -> None:
    with pytest.raises(ValueError, match=r"density\.kind=nearest needs the bank of normal embeddings"):
        build_density(config_of("nearest"), statistics_of(embeddings(4), with_bank=False))


def test_the_ridge_follows_the_embeddings_scale_or_stands_alone() -> None:
    moments = statistics_of(embeddings(9)).moments
    assert ridge_of(DensityConfig(shrinkage=2.0), moments) == pytest.approx(2 * mean_variance(moments))
    assert ridge_of(DensityConfig(shrinkage=0.01, shrinkage_unit="absolute"), moments) == 0.01


@pytest.mark.parametrize("kind", ["gaussian", "nearest"])
def test_statistics_of_two_sites_join_to_those_of_all_images(kind: str) -> None:
    config, images = config_of(kind), embeddings(10)
    parts = [statistics_of(part, kind == "nearest") for part in images.split([4, 6])]
    joined = parts[0].join(parts[1])
    whole = statistics_of(images, kind == "nearest")
    assert joined.moments.count == 10
    torch.testing.assert_close(joined.moments.scatter, whole.moments.scatter, rtol=1e-4, atol=1e-4)
    queries = embeddings(3, seed=5)
    expected = build_density(config, whole).score(queries)
    torch.testing.assert_close(build_density(config, joined).score(queries), expected, rtol=1e-3, atol=1e-4)


def test_a_gaussian_and_a_memory_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match="of a Gaussian and of a memory cannot be joined"):
        statistics_of(embeddings(3)).join(statistics_of(embeddings(3), with_bank=False))


def test_maps_of_two_sizes_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match="cannot be joined with moments of"):
        statistics_of(embeddings(3)).join(Statistics(Moments(2, 2, CHANNELS), torch.zeros(0, 4, CHANNELS).half()))


@given(st.integers(0, 3000), st.integers(1, 600))
def test_sample_positions_takes_all_or_an_even_share(count: int, limit: int) -> None:
    chosen = sorted(sample_positions(count, limit))
    assert len(chosen) == min(count, limit)
    assert all(0 <= position < count for position in chosen)
    if count > limit:
        gaps = np.diff(chosen)
        assert all(count // limit <= gap <= -(-count // limit) for gap in gaps)
