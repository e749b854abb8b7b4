"""Moments equal numpy's, and adding, merging and removing images are consistent."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_embeddings import make_embeddings, moments_of
from torch import Tensor

from focus_ray.density.moments import (
    Moments,
    compute_absolute_ridge,
    compute_mean_variance,
    compute_pooled_covariance,
    pack_lower_triangles,
    unpack_lower_triangles,
)
from focus_ray.density.settings import DensityConfig


def assert_same(moments: Moments, expected: Moments, rtol: float = 1e-5) -> None:
    """Compares relative to the largest entry of a location, because small entries have the rounding errors of large ones."""
    assert moments.count == expected.count
    for a, b in ((moments.mean, expected.mean), (moments.scatter.flatten(1), expected.scatter.flatten(1))):
        error = (a - b).abs().amax(dim=1) / b.abs().amax(dim=1).clamp_min(1e-6)
        assert float(error.max()) <= rtol


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (0.2, 1000)], ids=["features", "small variance, large mean"])
def test_moments_equal_the_mean_and_covariance_of_numpy(scale: float, offset: float) -> None:
    values = make_embeddings(20) * scale + offset
    moments = moments_of(*values.split(7))
    for place in range(12):
        samples = values[:, :, place // 4, place % 4].double().numpy()
        covariance = np.cov(samples, rowvar=False)
        np.testing.assert_allclose(moments.mean[place], samples.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(moments.scatter[place] / 19, covariance, atol=1e-3 * np.abs(covariance).max())


@settings(max_examples=60)
@given(st.permutations(range(20)), st.lists(st.integers(0, 20), max_size=6))
def test_any_split_and_order_gives_the_same_moments(order: list[int], cuts: list[int]) -> None:
    values = make_embeddings(20)[order]
    edges = [0, *sorted(cuts), 20]  # equal edges give empty batches
    assert_same(moments_of(*(values[a:b] for a, b in itertools.pairwise(edges))), moments_of(make_embeddings(20)))


@settings(max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), st.randoms(use_true_random=False))
def test_sites_merged_in_any_order_equal_a_new_fit(counts: list[int], random) -> None:
    sites = [make_embeddings(count, seed=seed) for seed, count in enumerate(counts)]
    parts = [moments_of(site) for site in sites]
    random.shuffle(parts)
    merged = Moments(3, 4, 6)
    for part in parts:
        merged.merge(part)
    assert_same(merged, moments_of(torch.cat(sites)))


@settings(max_examples=60)
@given(st.integers(2, 20), st.integers(0, 20))
def test_moments_after_a_removal_equal_a_new_fit_of_the_remaining_images(num_stay: int, num_leave: int) -> None:
    stay, leave = make_embeddings(num_stay), make_embeddings(num_leave, seed=1)
    assert_same(moments_of(stay, leave).remove(moments_of(leave)), moments_of(stay), rtol=1e-4)
    emptied = moments_of(stay).remove(moments_of(stay))
    assert (emptied.count, float(emptied.mean.abs().max()), float(emptied.scatter.abs().max())) == (0, 0, 0)


def test_half_precision_embeddings_are_added_up_in_single_precision() -> None:
    values = make_embeddings(20).bfloat16()
    assert_same(moments_of(values), moments_of(values.float()), rtol=0)


def broken(value: float) -> Tensor:
    values = make_embeddings(5)
    values[3, 1, 0, 2] = value
    return values


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (make_embeddings(5, channels=5), r"\(5, 5, 3, 4\).*\(6, 3, 4\)"),
        (make_embeddings(5)[0], r"\(6, 3, 4\)"),
        (broken(float("nan")), "not finite"),
        (broken(float("inf")), "not finite"),
    ],
    ids=["channels", "dimensions", "nan", "inf"],
)
def test_embeddings_that_do_not_fit_are_refused(embedding: Tensor, message: str) -> None:
    moments = moments_of(make_embeddings(20))
    with pytest.raises(ValueError, match=message):
        moments.add_embeddings(embedding)
    assert_same(moments, moments_of(make_embeddings(20)))


def test_moments_that_do_not_fit_cannot_be_merged_or_removed() -> None:
    moments, other = moments_of(make_embeddings(3)), moments_of(make_embeddings(3, size=(2, 3)))
    for join in (moments.merge, moments.remove):
        with pytest.raises(ValueError, match=r"\(2, 3, 6\).*\(3, 4, 6\)"):
            join(other)
    with pytest.raises(ValueError, match=r"\b4 images .*\b3 images"):
        moments.remove(moments_of(make_embeddings(4)))


def test_the_pooled_covariance_is_the_mean_over_locations() -> None:
    values = make_embeddings(20)
    covariances = [np.cov(values[:, :, place // 4, place % 4].numpy(), rowvar=False) for place in range(12)]
    np.testing.assert_allclose(
        compute_pooled_covariance(moments_of(values)), np.mean(covariances, axis=0), rtol=1e-4, atol=1e-4
    )


def test_the_ridge_is_relative_to_the_mean_variance_or_absolute() -> None:
    moments = moments_of(make_embeddings(9))
    assert compute_absolute_ridge(DensityConfig(shrinkage=2.0), moments) == pytest.approx(
        2 * compute_mean_variance(moments)
    )
    assert compute_absolute_ridge(DensityConfig(shrinkage="0.01 absolute"), moments) == 0.01


@given(st.sampled_from([*range(1, 12), 100, 448, 550]))
def test_unpacking_undoes_packing(channels: int) -> None:
    full = torch.randn(3, channels, channels, generator=torch.Generator().manual_seed(channels))
    packed = pack_lower_triangles(full)
    assert packed.shape == (3, channels * (channels + 1) // 2)
    assert torch.equal(unpack_lower_triangles(packed), full.tril())
    assert torch.equal(unpack_lower_triangles(packed, symmetric=True), full.tril() + full.tril(-1).mT)
