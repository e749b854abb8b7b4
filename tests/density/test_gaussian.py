"""Gaussians equal scipy and slow references, also without some images; a fit takes little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_embeddings import make_embeddings, moments_of
from scipy.spatial import distance

from focus_ray.density.base import NormalStatistics, build_density
from focus_ray.density.gaussian import Gaussian, LeaveOneOutGaussian, fit_gaussian
from focus_ray.fitting.settings import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("pooling", [0.0, 0.3])
@pytest.mark.parametrize("count", [2, 30])  # 2 images in 6 channels: the ridge makes the covariance invertible
def test_distances_equal_the_mahalanobis_distance_of_scipy(count: int, pooling: float) -> None:
    values, queries = make_embeddings(count), make_embeddings(3, seed=7)
    moments = moments_of(values)
    mean, factor = fit_gaussian(moments, 0.05, pooling)
    assert torch.equal(factor, factor.tril())
    distances = Gaussian(mean, factor, 3, 4).score(queries)
    assert distances.shape == (3, 3, 4)
    samples = values.double().permute(2, 3, 0, 1).flatten(0, 1).numpy()
    covariances = np.stack([np.cov(rows, rowvar=False) for rows in samples])
    covariances = (1 - pooling) * covariances + pooling * covariances.mean(axis=0) + 0.05 * np.eye(6)
    for (query, row, column), value in np.ndenumerate(distances.numpy()):
        place = row * 4 + column
        point, precision = queries[query, :, row, column].double().numpy(), np.linalg.inv(covariances[place])
        assert value == pytest.approx(distance.mahalanobis(point, samples[place].mean(axis=0), precision), rel=1e-3)


@pytest.mark.parametrize("pooling", [0.0, 0.5])
@pytest.mark.parametrize("group", [[4], [1, 4, 6]], ids=["one image", "three images"])
def test_excluded_images_do_not_count(group: list[int], pooling: float) -> None:
    images = make_embeddings(12)
    moments = moments_of(images)
    remaining = moments_of(images[[number for number in range(12) if number not in group]])
    # the ridge and the pooled covariance are of all images
    covariance = (1 - pooling) * remaining.scatter / (remaining.count - 1) + pooling * moments.scatter.mean(dim=0) / 11
    factor = torch.linalg.inv(torch.linalg.cholesky(covariance + 0.05 * torch.eye(6)))
    expected = Gaussian(remaining.mean, factor, 3, 4).score(images[4:5])
    density = LeaveOneOutGaussian(moments, 0.05, pooling, images.flatten(2).transpose(1, 2))
    excluded = torch.tensor([group, [0] * len(group)])
    distances = density.score(images[[4, 0]], excluded)
    # excluding several images pools over their number too
    torch.testing.assert_close(distances[:1], expected, rtol=0.05 if pooling and len(group) > 1 else 2e-3, atol=1e-4)
    torch.testing.assert_close(distances[1:], density.score(images[:1], torch.tensor([0])))


@pytest.mark.parametrize("name", ["fyd", "default"])
def test_only_an_absolute_ridge_sees_how_compact_features_are(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml").density.model_copy(update={"kind": "gaussian"})
    distances = []
    for scale in (0.05, 0.05 / 4):  # the fine loss makes features compact
        moments = moments_of(make_embeddings(30) * scale)
        distances.append(build_density(config, NormalStatistics(moments)).score(make_embeddings(3, seed=7) * scale))
    ratio = float(distances[1].mean() / distances[0].mean())
    assert ratio < 0.6 if name == "fyd" else ratio == pytest.approx(1.0, abs=1e-3)


def test_too_few_remaining_images_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1"):
        fit_gaussian(moments_of(make_embeddings(1)), 0.01)
    with pytest.raises(ValueError, match="got 2"):
        LeaveOneOutGaussian(moments_of(make_embeddings(2)), 0.01, 0.0)
    images = make_embeddings(4)
    density = LeaveOneOutGaussian(moments_of(images), 0.1, 0.0, images.flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="got 4"):
        density.score(images[:1], torch.tensor([[0, 1, 2]]))


def test_a_gaussian_that_does_not_fit_its_map_is_refused() -> None:
    mean, factor = fit_gaussian(moments_of(make_embeddings(20)), 0.01)
    with pytest.raises(ValueError, match=r"2 x 2.*\(12, 6\) and \(12, 6, 6\)"):
        Gaussian(mean, factor, 2, 2)


FIT = """
import json, torch
from focus_ray.density.moments import Moments, pack_lower_triangles
from focus_ray.density.gaussian import fit_gaussian

def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

def run(size, channels):
    moments = Moments(size, size, channels)
    for start in range(0, 64, 32):
        moments.add_embeddings(torch.randn(32, channels, size, size))
    return moments, *fit_gaussian(moments, 0.01)

run(4, 20)  # a small fit first, so that the memory that libraries allocate on first use does not count
before = resident("VmRSS")
moments, mean, factor = run(56, 100)
print(json.dumps([resident("VmHWM") - before, moments.scatter.nbytes + factor.nbytes]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_fit_takes_hardly_more_memory_than_its_result() -> None:
    process = subprocess.run([sys.executable, "-c", FIT], capture_output=True, text=True, timeout=120, check=True)
    peak, result = json.loads(process.stdout)
    assert peak < 1.35 * result
