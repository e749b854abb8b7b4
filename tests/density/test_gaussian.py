"""Tests of moments (against numpy; laws of adding and removing), of distances (against scipy), and of the memory of a fit."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance
from torch import Tensor

from focus_ray.density.gaussian import Gaussian, LeaveOneOutGaussian, fit_gaussian, mahalanobis
from focus_ray.density.moments import (
    Moments,
    locations_first,
    pack_lower,
    pack_lower_in_chunks,
    pooled_covariance,
    unpack_lower,
)


def embeddings(seed: int, count: int = 20, channels: int = 4, size: tuple[int, int] = (2, 3)) -> Tensor:
    """Makes (count, channels, *size) with correlated channels and, like features after ReLU, a mean larger than the variation."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(99))
    values = torch.randn(count, channels, *size, generator=generator)
    return torch.einsum("dc,bchw->bdhw", mixing, values) + 5


def moments_of(*batches: Tensor) -> Moments:
    moments = Moments(*batches[0].shape[2:], batches[0].shape[1])
    for batch in batches:
        moments.update(batch)
    return moments


def assert_same(moments: Moments, expected: Moments, rtol: float = 1e-5) -> None:
    """Compares relative to the largest entry of a location, because small entries have the rounding errors of large ones."""
    assert moments.count == expected.count
    for a, b in ((moments.mean, expected.mean), (moments.scatter.flatten(1), expected.scatter.flatten(1))):
        error = (a - b).abs().amax(dim=1) / b.abs().amax(dim=1).clamp_min(1e-6)
        assert float(error.max()) <= rtol


# Moments


def test_moments_equal_the_mean_and_covariance_of_numpy() -> None:
    values = embeddings(0)
    moments = moments_of(values[:7], values[7:])
    for place in range(6):
        samples = values[:, :, place // 3, place % 3].double().numpy()
        np.testing.assert_allclose(moments.mean[place], samples.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(moments.scatter[place] / 19, np.cov(samples, rowvar=False), rtol=1e-4, atol=1e-4)


def test_small_variances_survive_large_means() -> None:
    values = embeddings(0) / 5 + 1000
    moments = moments_of(*values.split(3))
    samples = values[:, :, 1, 1].double().numpy()
    covariance = np.cov(samples, rowvar=False)
    np.testing.assert_allclose(moments.scatter[4] / 19, covariance, atol=1e-3 * np.abs(covariance).max())


@settings(max_examples=60)
@given(st.permutations(range(20)), st.lists(st.integers(0, 20), max_size=6))
def test_any_split_and_order_gives_the_same_moments(order: list[int], cuts: list[int]) -> None:
    values = embeddings(0)[order]
    edges = [0, *sorted(set(cuts) - {0, 20}), 20]
    parts = [values[a:b] for a, b in itertools.pairwise(edges)]
    assert_same(moments_of(*parts), moments_of(embeddings(0)))


@settings(max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_sites_merged_in_any_order_equal_a_new_fit(counts: list[int], random) -> None:
    sites = [embeddings(seed, count) for seed, count in enumerate(counts)]
    fresh = moments_of(torch.cat(sites))
    parts = [moments_of(site) for site in sites]
    random.shuffle(parts)
    merged = Moments(2, 3, 4)
    for part in parts:
        assert merged.merge(part) is merged
    assert_same(merged, fresh)


@settings(max_examples=60)
@given(st.integers(2, 20), st.integers(1, 20))
def test_moments_after_a_removal_equal_a_new_fit_of_the_remaining_images(num_stay: int, num_leave: int) -> None:
    stay, leave = embeddings(0, num_stay), embeddings(1, num_leave)
    expected = moments_of(stay)
    assert_same(moments_of(stay, leave).remove(moments_of(leave)), expected, rtol=1e-4)
    downdated = moments_of(stay, leave)
    downdated.downdate(leave)
    assert_same(downdated, expected, rtol=1e-4)


def test_removing_all_images_leaves_empty_moments() -> None:
    downdated = moments_of(embeddings(0))
    downdated.downdate(embeddings(0))
    for emptied in (downdated, moments_of(embeddings(0)).remove(moments_of(embeddings(0)))):
        assert (emptied.count, float(emptied.mean.abs().max()), float(emptied.scatter.abs().max())) == (0, 0, 0)


def test_merging_or_removing_empty_moments_changes_nothing() -> None:
    moments = moments_of(embeddings(0))
    assert_same(moments.merge(Moments(2, 3, 4)), moments_of(embeddings(0)))
    assert_same(moments.remove(Moments(2, 3, 4)), moments_of(embeddings(0)))
    assert Moments(2, 3, 4).merge(Moments(2, 3, 4)).count == 0


def test_a_batch_without_images_changes_nothing() -> None:
    moments = moments_of(embeddings(0))
    moments.update(embeddings(0)[:0])
    moments.downdate(embeddings(0)[:0])
    assert_same(moments, moments_of(embeddings(0)))


def test_half_precision_embeddings_are_added_up_in_single_precision() -> None:
    values = embeddings(0).bfloat16()
    assert_same(moments_of(values), moments_of(values.float()), rtol=0)


def test_embeddings_of_another_shape_or_not_finite_are_refused() -> None:
    moments = moments_of(embeddings(0))
    with pytest.raises(ValueError, match=r"\(20, 5, 2, 3\).*\(4, 2, 3\)"):
        moments.update(embeddings(0, channels=5))
    with pytest.raises(ValueError, match=r"\(4, 2, 3\)"):
        moments.downdate(embeddings(0)[0])
    for bad in (float("nan"), float("inf")):
        broken = embeddings(0).clone()
        broken[3, 1, 0, 2] = bad
        with pytest.raises(ValueError, match="not finite"):
            moments.update(broken)
    assert_same(moments, moments_of(embeddings(0)))


def test_more_images_than_were_added_cannot_be_removed() -> None:
    moments = moments_of(embeddings(0, count=3))
    with pytest.raises(ValueError, match=r"\b4 images .*\b3 images"):
        moments.downdate(embeddings(0, count=4))
    with pytest.raises(ValueError, match=r"\b4 images .*\b3 images"):
        moments.remove(moments_of(embeddings(0, count=4)))


def test_moments_of_different_shapes_cannot_be_merged_or_removed() -> None:
    other = moments_of(embeddings(0, size=(3, 3)))
    for join in (moments_of(embeddings(0)).merge, moments_of(embeddings(0)).remove):
        with pytest.raises(ValueError, match=r"\(3, 3, 4\).*\(2, 3, 4\)"):
            join(other)


# Distances


@pytest.mark.parametrize("count", [2, 30])  # 2 images in 4 channels: the ridge makes the covariance invertible
def test_distances_equal_the_mahalanobis_distance_of_scipy(count: int) -> None:
    values, queries = embeddings(0, count), embeddings(7, 3)
    gaussian = Gaussian(*fit_gaussian(moments_of(values), 0.05), 2, 3)
    distances = gaussian.score(queries)
    assert distances.shape == (3, 2, 3)
    for row in range(2):
        for column in range(3):
            samples = values[:, :, row, column].double().numpy()
            precision = np.linalg.inv(np.cov(samples, rowvar=False) + 0.05 * np.eye(4))
            expected = [
                distance.mahalanobis(query[:, row, column], samples.mean(axis=0), precision)
                for query in queries.double().numpy()
            ]
            np.testing.assert_allclose(distances[:, row, column], expected, rtol=1e-4)


@pytest.mark.parametrize("pooling", [0.0, 0.5])
def test_leave_one_out_distances_equal_distances_to_the_gaussian_of_the_other_images(pooling: float) -> None:
    values = embeddings(0, 12)
    moments = moments_of(values)
    distances = LeaveOneOutGaussian(moments, 0.05, pooling).score(values, torch.arange(len(values)))
    pooled = pooled_covariance(moments)
    for number in range(12):
        remaining = moments_of(torch.cat([values[:number], values[number + 1 :]]))
        covariance = (1 - pooling) * remaining.scatter / 10 + pooling * pooled + 0.05 * torch.eye(4)
        centred = values[number].flatten(1).t() - remaining.mean
        expected = torch.einsum("lc,lcd,ld->l", centred, torch.linalg.inv(covariance), centred).sqrt().view(2, 3)
        torch.testing.assert_close(distances[number], expected, rtol=1e-3, atol=1e-4)


def test_leave_one_out_refuses_two_images() -> None:
    with pytest.raises(ValueError, match="got 2"):
        LeaveOneOutGaussian(moments_of(embeddings(0, count=2)), 0.01, 0.0)


def test_the_precision_factor_is_lower_triangular_and_squares_to_the_inverse_covariance() -> None:
    moments = moments_of(embeddings(0))
    mean, factor = fit_gaussian(moments, 0.01)
    covariance = moments.scatter / 19 + 0.01 * torch.eye(4)
    assert torch.equal(mean, moments.mean)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor.mT @ factor @ covariance, torch.eye(4).expand(6, 4, 4), rtol=0, atol=1e-3)


def test_the_mean_has_distance_zero_and_fitting_does_not_change_the_moments() -> None:
    moments = moments_of(embeddings(0))
    mean, factor = fit_gaussian(moments, 0.01)
    picture = mean.t().reshape(1, 4, 2, 3)
    assert float(mahalanobis(picture, mean, factor).max()) == 0
    mean.zero_()
    assert_same(moments, moments_of(embeddings(0)))


def test_locations_first_orders_locations_row_by_row() -> None:
    values = embeddings(0)
    first = locations_first(values)
    assert first.is_contiguous()
    assert torch.equal(first[4], values[:, :, 1, 1])


def test_a_gaussian_of_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="got 1"):
        fit_gaussian(moments_of(embeddings(0, count=1)), 0.01)


def test_a_map_of_another_size_is_refused() -> None:
    gaussian = Gaussian(*fit_gaussian(moments_of(embeddings(0)), 0.01), 2, 3)
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 3\)"):
        gaussian.score(embeddings(0, size=(3, 2)))
    with pytest.raises(ValueError, match=r"2 x 2.*\(6, 4\) and \(6, 4, 4\)"):
        Gaussian(gaussian.mean, gaussian.precision_factor, 2, 2)


def test_pooling_mixes_in_the_mean_covariance_over_locations() -> None:
    moments = moments_of(embeddings(0))
    covariances = np.stack([np.cov(embeddings(0)[:, :, p // 3, p % 3].numpy(), rowvar=False) for p in range(6)])
    np.testing.assert_allclose(pooled_covariance(moments), covariances.mean(axis=0), rtol=1e-4, atol=1e-4)
    mixed = 0.7 * covariances + 0.3 * covariances.mean(axis=0) + 0.05 * np.eye(4)
    _, factor = fit_gaussian(moments, 0.05, pooling=0.3)
    np.testing.assert_allclose(np.linalg.inv((factor.mT @ factor).double()), mixed, rtol=1e-3, atol=1e-3)


# Packing


@given(st.integers(1, 12))
def test_unpacking_undoes_packing(channels: int) -> None:
    full = torch.randn(3, channels, channels, generator=torch.Generator().manual_seed(channels))
    packed = pack_lower(full)
    assert packed.shape == (3, channels * (channels + 1) // 2)
    assert torch.equal(unpack_lower(packed), full.tril())
    assert torch.equal(unpack_lower(packed, symmetric=True), full.tril() + full.tril(-1).mT)
    assert torch.equal(pack_lower_in_chunks(full), packed)


@pytest.mark.parametrize("channels", [100, 448, 550, 1792])
def test_unpacking_infers_the_number_of_channels(channels: int) -> None:
    assert unpack_lower(torch.zeros(1, channels * (channels + 1) // 2)).shape == (1, channels, channels)


def test_a_packed_fit_equals_the_packed_factors_of_a_fit() -> None:
    moments = moments_of(embeddings(0))
    assert torch.equal(fit_gaussian(moments, 0.01, packed=True)[1], pack_lower(fit_gaussian(moments, 0.01)[1]))


# Memory

FIT = """
import json, time, torch
from focus_ray.density.moments import Moments, pack_lower_in_chunks
from focus_ray.density.gaussian import fit_gaussian
def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

def batches(size, channels):
    generator = torch.Generator().manual_seed(0)
    for start in range(0, 209, 32):
        yield torch.randn(min(32, 209 - start), channels, size, size, generator=generator)

def run(size, channels):
    moments = Moments(size, size, channels)
    for batch in batches(size, channels):
        moments.update(batch)
        del batch
    mean, factor = fit_gaussian(moments, 0.01, packed=True)
    return moments, mean, factor

run(4, 20)  # a small fit first, so that the memory that libraries allocate on first use does not count
before, start = resident("VmRSS"), time.perf_counter()
moments, mean, factor = run(56, 100)
peak, seconds = resident("VmHWM") - before, time.perf_counter() - start
stored = [mean, factor, moments.mean, pack_lower_in_chunks(moments.scatter)]
print(json.dumps({"peak": peak, "seconds": seconds, "stored": sum(t.numel() * t.element_size() for t in stored)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_fitting_209_images_takes_at_most_2_5_times_the_memory_of_the_stored_tensors() -> None:
    process = subprocess.run([sys.executable, "-c", FIT], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    figures = json.loads(process.stdout)
    ratio = figures["peak"] / figures["stored"]
    print(f"peak {figures['peak'] / 2**20:.0f} MiB, {ratio:.2f} times the stored tensors, {figures['seconds']:.1f} s")
    assert ratio <= 2.5
    assert figures["seconds"] < 60
