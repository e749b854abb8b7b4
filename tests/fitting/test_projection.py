"""Tests of the discriminant projection: eigenproblem, residuals (against a slow search), sums over workers, shared metrics."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from small_set import CATEGORIES, fit_alone, make_bundle, small_config
from torch import Tensor

from focus_ray.bundle.bundle import read_bundle, read_statistics
from focus_ray.bundle.metric import average_projections
from focus_ray.defects import make_defective_copies
from focus_ray.density.settings import DensityConfig
from focus_ray.detect.detector import embed_images
from focus_ray.detect.settings import ScoringConfig
from focus_ray.errors import BundleError, ConfigError
from focus_ray.features.network import convert_to_float_images
from focus_ray.fitting.fit import DetectorFitter
from focus_ray.fitting.passes import compute_image_statistics
from focus_ray.fitting.projection import (
    NUM_FOLDS,
    RIDGE,
    ResidualScatter,
    build_reduction_with_all_channels,
    compute_discriminant_directions,
    learn_projection,
)
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import build_shard
from focus_ray.fitting.shared_metric import read_shared_metric
from focus_ray.fitting.split import compute_split_plan

CPU = torch.device("cpu")


def make_fit(parts: str, storage: Path | str = "unused", group: str = "none", **density: Any) -> DetectorFitter:
    """Prepares a fit of the gears with a discriminant projection."""
    density = {"reduction": "discriminant", **density}
    config = small_config(parts, storage, model={"image_alignment": {"group": group}}, density=density)
    plan = compute_split_plan(config, "gear")
    return DetectorFitter(config, build_shard(config, "gear", plan, 0, 1), len(plan.fit.rows), CPU)


def make_scatter_matrix(seed: int, channels: int = 6, samples: int = 200, scale: float = 1.0) -> Tensor:
    values = scale * torch.randn(samples, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.t() @ values / samples


def test_the_directions_equal_those_of_the_generalised_eigenproblem_of_scipy() -> None:
    normal, defective = make_scatter_matrix(0), make_scatter_matrix(1, scale=3.0)
    directions = compute_discriminant_directions(normal, defective, 4).numpy()
    ridged = normal + RIDGE * normal.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    values, vectors = scipy.linalg.eigh(defective.numpy(), ridged.numpy())
    expected = (vectors[:, ::-1][:, :4] * np.sqrt(np.log(values[::-1][:4]))).T
    signs = np.sign((expected * directions).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(directions, expected * signs, rtol=1e-4, atol=1e-6)


def test_directions_in_which_defects_vary_no_more_than_normal_patches_are_0() -> None:
    normal = torch.eye(5, dtype=torch.float64)
    defective = torch.diag(torch.tensor([9.0, 0.5, 4.0, 0.1, 1.0], dtype=torch.float64))
    directions = compute_discriminant_directions(normal, defective, 5)
    assert (directions.norm(dim=1) > 0).tolist() == [True, True, False, False, False]
    assert directions[:2].abs().argmax(dim=1).tolist() == [0, 2]
    assert compute_discriminant_directions(normal, defective, 8).shape == (8, 5)


BANK = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(5))


def make_sums(images: Iterable[int] = ()) -> ResidualScatter:
    """Makes sums of residuals of some images of `BANK`."""
    sums = ResidualScatter(BANK, DensityConfig(window=3, num_channels=4), seed=1)
    for number in images:
        image = torch.tensor([number])
        for kind, embedding in enumerate((BANK[image], 3 * BANK[image].flip(2))):
            sums.add_residuals(kind, embedding, image, torch.ones(1, 4, 4, dtype=torch.bool))
    return sums


def test_residuals_equal_those_of_a_slow_search_over_other_images() -> None:
    sums, images = make_sums(), torch.tensor([2, 4])
    residuals = sums._compute_residuals(BANK[images], images)
    for row, y, x in itertools.product(range(2), range(4), range(4)):
        query = BANK[images[row], :, y, x]
        window = BANK[:, :, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        others = window[torch.arange(6) != images[row]].transpose(0, 1).flatten(1)  # (C, number of patches)
        distances = (sums.search @ (query[:, None] - others)).square().sum(dim=0)
        torch.testing.assert_close(residuals[row, y, x], query - others[:, distances.argmin()], rtol=1e-4, atol=1e-4)


def test_sums_of_parts_add_up_to_the_sums_of_all_images() -> None:
    whole, first, second = make_sums(range(6)), make_sums(range(3)), make_sums(range(3, 6))
    torch.testing.assert_close(first.sums + second.sums, whole.sums)
    assert torch.equal(first.counts + second.counts, whole.counts)
    assert whole.counts.sum(dim=0).tolist() == [6 * 16, 6 * 16]


def test_a_fold_projection_is_the_projection_of_the_other_images() -> None:
    others = make_sums(number for number in range(6) if number % NUM_FOLDS != 0)
    fold_projection = make_sums(range(6)).compute_fold_projections(4)[0]
    torch.testing.assert_close(fold_projection, others.compute_projection(4)[0])


def test_a_learnt_projection_separates_synthetic_defects_better_than_a_random_projection(parts: str) -> None:
    """Compares the change that a defect causes with the difference between two normal images."""
    run = make_fit(parts, num_channels=16)
    run.net.eval()
    random = run.reduction.projection.clone()
    run.learn_projection()
    full_reduction = build_reduction_with_all_channels(run.reduction, run.net.backbone.spec.channels)
    images = torch.cat(list(run.shard.read_batches("fit")))
    defective_images = torch.from_numpy(make_defective_copies(images.numpy(), 99, 1)[0])
    with torch.inference_mode():
        normal, defective = (
            embed_images(run.net, full_reduction, convert_to_float_images(batch, CPU))[0][
                :, : full_reduction.num_channels
            ]
            for batch in (images, defective_images)
        )

    def contrast(projection: Tensor) -> float:
        change, difference = (
            torch.einsum("kc,bchw->bkhw", projection, values).square().sum(dim=1)
            for values in (defective - normal, normal[1:] - normal[:-1])
        )
        return float((change.amax(dim=(1, 2)) / difference.mean()).log().mean())

    assert not run.projection.projection.requires_grad  # otherwise the autograd graph would keep all features in memory
    assert contrast(run.projection.projection) > contrast(random)


def test_the_same_seed_learns_the_same_projection_and_a_bundle_stores_it(parts: str, tmp_path: Path) -> None:
    config = make_fit(parts, tmp_path).config.model_copy(update={"scoring": ScoringConfig(image_score="profile")})
    first, second = fit_alone(config), fit_alone(config)
    assert torch.equal(first.detector.reduction.projection, second.detector.reduction.projection)
    assert first.detector.reduction.projection.shape == (32, 448)
    images = torch.cat(list(make_fit(parts).shard.read_batches("holdout")))
    expected, read = first.detector(images), read_bundle(make_bundle(config, result=second)).detector(images)
    torch.testing.assert_close(read.score, expected.score, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(read.anomaly_map, expected.anomaly_map, rtol=1e-3, atol=1e-2)


def test_a_projection_of_one_image_is_refused(parts: str) -> None:
    run = make_fit(parts)
    image = next(iter(run.shard.read_batches("fit")))[:1]
    with pytest.raises(ValueError, match="got 1"):
        learn_projection(run.net, run.reduction, [image], CPU, 1, [0], 0)


# Shared metrics


@pytest.fixture(scope="module")
def two_bundles(parts: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[str]]:
    """Makes bundles of both categories, each with its own projection."""
    config = make_fit(parts, tmp_path_factory.mktemp("shared")).config
    return config, [make_bundle(config, category) for category in CATEGORIES]


def set_shared_metric(config: Config, metric: Path | str, **model: Any) -> Config:
    density = config.density.model_copy(update={"metric": str(metric)})
    return config.model_copy(update={"density": density, "model": config.model.model_copy(update=model)})


def test_a_shared_metric_is_the_mean_of_the_scatter_matrices_of_the_categories(
    two_bundles: tuple[Config, list[str]], tmp_path: Path
) -> None:
    config, bundles = two_bundles
    place = str(tmp_path / "metric.safetensors")
    assert average_projections(bundles, place) == sorted(CATEGORIES)
    scatters = [read_statistics(bundle).residual_scatter for bundle in bundles]
    expected = sum(scatter / scatter[0].diagonal().mean() for scatter in scatters) / 2  # type: ignore[index,union-attr]
    torch.testing.assert_close(read_shared_metric(set_shared_metric(config, place)), expected)


def test_a_category_with_a_shared_metric_uses_its_directions_and_paints_no_defects(
    two_bundles: tuple[Config, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, bundles = two_bundles
    place = str(tmp_path / "metric.safetensors")
    average_projections(bundles[:1], place)
    monkeypatch.setattr("focus_ray.fitting.projection.draw_defective_copies", None)
    result = fit_alone(set_shared_metric(config, place), CATEGORIES[1])
    shared = read_statistics(bundles[0]).residual_scatter
    assert shared is not None
    directions = compute_discriminant_directions(
        shared[0].double(), shared[1].double(), config.density.num_channels // 2
    )
    learnt = result.detector.reduction.projection[: len(directions)]
    ratio = learnt.norm() / directions.norm()
    torch.testing.assert_close(learnt, directions * ratio, rtol=1e-3, atol=1e-3)
    assert result.statistics.residual_scatter is not None
    assert not result.statistics.residual_scatter[1].any()


def test_a_metric_of_another_network_or_a_file_that_is_no_metric_is_refused(
    two_bundles: tuple[Config, list[str]], tmp_path: Path
) -> None:
    config, bundles = two_bundles
    place = tmp_path / "metric.safetensors"
    average_projections(bundles, str(place))
    (tmp_path / "text").write_text("no metric")
    with pytest.raises(ConfigError, match=r"model\.padding=reflect.* model\.padding=zeros"):
        read_shared_metric(set_shared_metric(config, place, padding="zeros"))
    for name in ("nowhere", "text"):
        with pytest.raises(ConfigError, match=rf"density\.metric=.*{name}"):
            read_shared_metric(set_shared_metric(config, tmp_path / name))
    with_shared = make_bundle(set_shared_metric(config, place), CATEGORIES[0], place=tmp_path / "with_shared")
    with pytest.raises(BundleError, match="with_shared"):
        average_projections([with_shared], str(tmp_path / "other"))
    with pytest.raises(BundleError, match="another bundle has the same category"):
        average_projections([bundles[0], bundles[0]], str(tmp_path / "other"))


def test_statistics_from_cached_embeddings_equal_statistics_from_a_new_pass(parts: str) -> None:
    run = make_fit(parts, num_channels=16, coreset=32)
    run.learn_projection()
    cache = run.projection.cache
    partial_cache = cache._replace(row={number: row for number, row in cache.row.items() if number % 3})
    uncached, partly_cached, cached = (
        compute_image_statistics(
            run.net, run.reduction, run.shard.read_batches("fit"), CPU, range(run.num_images), 0, entries
        )
        for entries in (None, partial_cache, cache)
    )
    for statistics in (partly_cached, cached):
        torch.testing.assert_close(statistics.bank.float(), uncached.bank.float(), atol=0.02, rtol=0.01)
        torch.testing.assert_close(statistics.moments.mean, uncached.moments.mean, atol=0.01, rtol=0.01)


def test_the_embedding_of_an_image_does_not_depend_on_the_other_images(parts: str) -> None:
    """Otherwise a coreset would depend on the number of workers. This includes image alignment."""
    run = make_fit(parts, group="rotation_translation", coreset=32)
    run.fit_image_aligner()
    run.net.image_aligner.enabled.fill_(True)
    run.net.eval()
    images = convert_to_float_images(torch.cat(list(run.shard.read_batches("fit"))), CPU)
    whole, theta = embed_images(run.net, run.reduction, images, pad_batches=True)
    for count in (1, 3, 11):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(count))[:count]
        embedding, chosen_theta = embed_images(run.net, run.reduction, images[chosen], pad_batches=True)
        assert torch.equal(chosen_theta, theta[chosen])
        assert torch.equal(embedding, whole[chosen])
