"""Moments against numpy, the laws of adding and taking out, distances against scipy, the memory that a fit takes."""

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

from focus_ray.density.gaussian import Gaussian, LeftOutGaussian, fit_gaussian, mahalanobis
from focus_ray.density.moments import (
    Moments,
    locations_first,
    pack_in_chunks,
    pack_lower,
    pooled_covariance,
    unpack_lower,
)


def embeddings(seed: int, count: int = 20, channels: int = 4, size: tuple[int, int] = (2, 3)) -> Tensor:
    """Correlated channels whose mean is large beside their spread, as that of features after ReLU is."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(99))
    values = torch.randn(count, channels, *size, generator=generator)
    return torch.einsum("dc,bchw->bdhw", mixing, values) + 5


def moments_of(*batches: Tensor) -> Moments:
    moments = Moments(*batches[0].shape[2:], batches[0].shape[1])
    for batch in batches:
        moments.update(batch)
    return moments


def assert_same(one: Moments, other: Moments, rtol: float = 1e-5) -> None:
    """Relative to the largest entry of a location: entries that happen to be near zero carry its rounding too."""
    assert one.count == other.count
    for a, b in ((one.mean, other.mean), (one.scatter.flatten(1), other.scatter.flatten(1))):
        error = (a - b).abs().amax(dim=1) / b.abs().amax(dim=1).clamp_min(1e-6)
        assert float(error.max()) <= rtol


# Moments


def test_moments_are_numpys_mean_and_covariance() -> None:
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
def test_sites_merged_in_any_order_give_a_fresh_fit(counts: list[int], random) -> None:
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
def test_a_set_taken_out_again_leaves_a_fresh_fit_of_the_rest(kept: int, taken: int) -> None:
    stay, leave = embeddings(0, kept), embeddings(1, taken)
    expected = moments_of(stay)
    assert_same(moments_of(stay, leave).remove(moments_of(leave)), expected, rtol=1e-4)
    downdated = moments_of(stay, leave)
    downdated.downdate(leave)
    assert_same(downdated, expected, rtol=1e-4)


def test_taking_everything_out_leaves_nothing() -> None:
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
    with pytest.raises(ValueError, match=r"embedding has shape \(20, 5, 2, 3\), these moments take \(B, \(4, 2, 3\)\)"):
        moments.update(embeddings(0, channels=5))
    with pytest.raises(ValueError, match=r"has shape \(4, 2, 3\)"):
        moments.downdate(embeddings(0)[0])
    for bad in (float("nan"), float("inf")):
        broken = embeddings(0).clone()
        broken[3, 1, 0, 2] = bad
        with pytest.raises(ValueError, match="not finite: training diverged, or an image is broken"):
            moments.update(broken)
    assert_same(moments, moments_of(embeddings(0)))


def test_more_images_than_were_taken_in_cannot_be_taken_out() -> None:
    moments = moments_of(embeddings(0, count=3))
    with pytest.raises(ValueError, match="cannot take 4 images out of moments of 3"):
        moments.downdate(embeddings(0, count=4))
    with pytest.raises(ValueError, match="cannot take moments of 4 images out of moments of 3"):
        moments.remove(moments_of(embeddings(0, count=4)))


def test_moments_of_other_shapes_do_not_join() -> None:
    other = moments_of(embeddings(0, size=(3, 3)))
    for join in (moments_of(embeddings(0)).merge, moments_of(embeddings(0)).remove):
        with pytest.raises(ValueError, match=r"\(H, W, C\) \(3, 3, 4\) cannot be joined with moments of \(2, 3, 4\)"):
            join(other)


# Distances


@pytest.mark.parametrize("count", [2, 30])  # fewer images than channels too: shrinkage makes it invertible
def test_distances_are_scipys_mahalanobis(count: int) -> None:
    values, queries = embeddings(0, count), embeddings(7, 3)
    gaussian = Gaussian(*fit_gaussian(moments_of(values), 0.05), 2, 3)
    found = gaussian.score(queries)
    assert found.shape == (3, 2, 3)
    for row in range(2):
        for column in range(3):
            samples = values[:, :, row, column].double().numpy()
            precision = np.linalg.inv(np.cov(samples, rowvar=False) + 0.05 * np.eye(4))
            expected = [
                distance.mahalanobis(query[:, row, column], samples.mean(axis=0), precision)
                for query in queries.double().numpy()
            ]
            np.testing.assert_allclose(found[:, row, column], expected, rtol=1e-4)


@pytest.mark.parametrize("pooling", [0.0, 0.5])
def test_a_left_out_distance_is_that_to_the_gaussian_of_the_others(pooling: float) -> None:
    values = embeddings(0, 12)
    moments = moments_of(values)
    found = LeftOutGaussian(moments, 0.05, pooling).score(values, torch.arange(len(values)))
    pooled = pooled_covariance(moments)
    for number in range(12):
        rest = moments_of(torch.cat([values[:number], values[number + 1 :]]))
        covariance = (1 - pooling) * rest.scatter / 10 + pooling * pooled + 0.05 * torch.eye(4)
        centred = values[number].flatten(1).t() - rest.mean
        expected = torch.einsum("lc,lcd,ld->l", centred, torch.linalg.inv(covariance), centred).sqrt().view(2, 3)
        torch.testing.assert_close(found[number], expected, rtol=1e-3, atol=1e-4)


def test_two_images_leave_no_gaussian_when_one_is_left_out() -> None:
    with pytest.raises(ValueError, match="leaving one image out needs at least 3, got 2"):
        LeftOutGaussian(moments_of(embeddings(0, count=2)), 0.01, 0.0)


def test_the_precision_factor_is_lower_triangular_and_squares_to_the_inverse_covariance() -> None:
    moments = moments_of(embeddings(0))
    mean, factor = fit_gaussian(moments, 0.01)
    covariance = moments.scatter / 19 + 0.01 * torch.eye(4)
    assert torch.equal(mean, moments.mean)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor.mT @ factor @ covariance, torch.eye(4).expand(6, 4, 4), rtol=0, atol=1e-3)


def test_the_mean_has_distance_zero_and_fitting_leaves_the_moments_alone() -> None:
    moments = moments_of(embeddings(0))
    mean, factor = fit_gaussian(moments, 0.01)
    picture = mean.t().reshape(1, 4, 2, 3)
    assert float(mahalanobis(picture, mean, factor).max()) == 0
    mean.zero_()
    assert_same(moments, moments_of(embeddings(0)))


def test_locations_are_the_rows_of_the_map_one_after_the_other() -> None:
    values = embeddings(0)
    first = locations_first(values)
    assert first.is_contiguous()
    assert torch.equal(first[4], values[:, :, 1, 1])


def test_fewer_than_two_images_make_no_gaussian() -> None:
    with pytest.raises(ValueError, match="at least 2 normal images, got 1: add training images"):
        fit_gaussian(moments_of(embeddings(0, count=1)), 0.01)


def test_a_map_of_another_size_is_not_scored() -> None:
    gaussian = Gaussian(*fit_gaussian(moments_of(embeddings(0)), 0.01), 2, 3)
    with pytest.raises(ValueError, match=r"embedding of \(3, 2\) places, the Gaussian was fitted at \(2, 3\)"):
        gaussian.score(embeddings(0, size=(3, 2)))
    with pytest.raises(ValueError, match=r"mean \(6, 4\) and precision factor \(6, 4, 4\) do not fit a map of 2 x 2"):
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
def test_packed_triangles_unpack_to_what_they_were(channels: int) -> None:
    full = torch.randn(3, channels, channels, generator=torch.Generator().manual_seed(channels))
    packed = pack_lower(full)
    assert packed.shape == (3, channels * (channels + 1) // 2)
    assert torch.equal(unpack_lower(packed), full.tril())
    assert torch.equal(unpack_lower(packed, symmetric=True), full.tril() + full.tril(-1).mT)
    assert torch.equal(pack_in_chunks(full), packed)


@pytest.mark.parametrize("channels", [100, 448, 550, 1792])
def test_the_width_of_a_packed_triangle_tells_its_channels(channels: int) -> None:
    assert unpack_lower(torch.zeros(1, channels * (channels + 1) // 2)).shape == (1, channels, channels)


def test_packed_factors_are_the_factors_packed() -> None:
    moments = moments_of(embeddings(0))
    assert torch.equal(fit_gaussian(moments, 0.01, packed=True)[1], pack_lower(fit_gaussian(moments, 0.01)[1]))


# Memory

FIT = """
import json, time, torch
from focus_ray.density.moments import Moments, pack_in_chunks
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

run(4, 20)  # what libraries set up on first use is not the fit's
before, start = resident("VmRSS"), time.perf_counter()
moments, mean, factor = run(56, 100)
peak, seconds = resident("VmHWM") - before, time.perf_counter() - start
stored = [mean, factor, moments.mean, pack_in_chunks(moments.scatter)]
print(json.dumps({"peak": peak, "seconds": seconds, "stored": sum(t.numel() * t.element_size() for t in stored)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_fitting_209_images_takes_at_most_2_5_times_the_memory_of_what_a_bundle_stores() -> None:
    done = subprocess.run([sys.executable, "-c", FIT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    ratio = figures["peak"] / figures["stored"]
    print(f"peak {figures['peak'] / 2**20:.0f} MiB, {ratio:.2f} times what is stored, {figures['seconds']:.1f} s")
    assert ratio <= 2.5
    assert figures["seconds"] < 60
