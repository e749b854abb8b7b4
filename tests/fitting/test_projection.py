"""Tests of the discriminant projection: eigenproblem, residuals (against a slow search), sums over workers, shared metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from small_set import CATEGORIES, fit_alone, ingest_parts, make_bundle, small_config
from torch import Tensor

from focus_ray.bundle.bundle import read_bundle, read_statistics
from focus_ray.bundle.metric import share_metric
from focus_ray.defects import synthetic_validation_set
from focus_ray.density.reduction import ChannelReduction
from focus_ray.density.settings import DensityConfig
from focus_ray.detect.detector import embed
from focus_ray.errors import BundleError, ConfigError
from focus_ray.features.alignment.congealing import CongealingAligner
from focus_ray.features.network import build_net, to_images
from focus_ray.fitting.fit import CategoryFit, build_detector, fit
from focus_ray.fitting.passes import compute_statistics
from focus_ray.fitting.projection import (
    NUM_FOLDS,
    RIDGE,
    ResidualScatter,
    build_full_reduction,
    discriminant_directions,
    learn_projection,
)
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import build_shard
from focus_ray.fitting.shared_metric import read_shared_metric
from focus_ray.fitting.split import plan_category

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


def scatter(seed: int, channels: int = 6, samples: int = 200, scale: float = 1.0) -> Tensor:
    values = scale * torch.randn(samples, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.t() @ values / samples


def test_the_directions_equal_those_of_the_generalised_eigenproblem_of_scipy() -> None:
    normal, defective = scatter(0), scatter(1, scale=3.0)
    directions = discriminant_directions(normal, defective, 4)
    ridged = normal + RIDGE * normal.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    values, vectors = scipy.linalg.eigh(defective.numpy(), ridged.numpy())
    expected = (vectors[:, ::-1][:, :4] * np.sqrt(np.log(values[::-1][:4]))).T
    signs = np.sign((expected * directions.numpy()).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(directions.numpy(), expected * signs, rtol=1e-4, atol=1e-6)


def test_directions_in_which_defects_vary_no_more_than_normal_patches_are_0() -> None:
    normal = torch.eye(5, dtype=torch.float64)
    defective = torch.diag(torch.tensor([9.0, 0.5, 4.0, 0.1, 1.0], dtype=torch.float64))
    directions = discriminant_directions(normal, defective, 5)
    assert (directions.norm(dim=1) > 0).tolist() == [True, True, False, False, False]
    assert directions[0].abs().argmax() == 0
    assert directions[1].abs().argmax() == 2
    assert discriminant_directions(normal, defective, 8).shape == (8, 5)


def test_residuals_equal_those_of_a_slow_search_over_other_images() -> None:
    bank = torch.randn(5, 7, 4, 4, generator=torch.Generator().manual_seed(3))
    sums = ResidualScatter(bank, DensityConfig(window=3, num_channels=7), seed=0)
    images = torch.tensor([2, 4])
    residuals = sums._compute_residuals(bank[images], images)
    for row, image in enumerate(images.tolist()):
        for y in range(4):
            for x in range(4):
                query = bank[image, :, y, x]
                near = [
                    bank[other, :, v, u]
                    for other in range(5)
                    if other != image
                    for v in range(max(0, y - 1), min(4, y + 2))
                    for u in range(max(0, x - 1), min(4, x + 2))
                ]
                distances = [float((sums.search @ (query - neighbour)).square().sum()) for neighbour in near]
                expected = query - near[int(np.argmin(distances))]
                torch.testing.assert_close(residuals[row, y, x], expected, rtol=1e-4, atol=1e-4)


def test_sums_of_parts_add_up_to_the_sums_of_all_images() -> None:
    bank = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(5))
    config = DensityConfig(num_channels=5)
    whole, first, second = (ResidualScatter(bank, config, seed=1) for _ in range(3))
    for number in range(6):
        image = torch.tensor([number])
        for sums in (whole, first if number < 3 else second):
            sums.add_normal_residuals(image)
            sums.add_defective_residuals(bank[image] + number, image, torch.ones(1, 4, 4, dtype=torch.bool))
    torch.testing.assert_close(first.sums + second.sums, whole.sums)
    assert torch.equal(first.counts + second.counts, whole.counts)
    assert whole.counts.sum(dim=0).tolist() == [6 * 16, 6 * 16]


def test_a_fold_projection_is_the_projection_of_the_other_images() -> None:
    bank = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(5))
    covered = torch.ones(1, 4, 4, dtype=torch.bool)
    whole, remaining = (ResidualScatter(bank, DensityConfig(num_channels=4), seed=1) for _ in range(2))
    for number in range(6):
        image = torch.tensor([number])
        for sums in (whole, remaining):
            if sums is whole or number % NUM_FOLDS != 0:
                sums.add_normal_residuals(image)
                sums.add_defective_residuals(3 * bank[image].flip(2), image, covered)
    torch.testing.assert_close(whole.compute_fold_projections(4)[0], remaining.compute_projection(4)[0])


def test_defects_on_some_images_equal_the_defects_when_all_images_are_painted() -> None:
    images = np.random.default_rng(0).integers(0, 255, (4, 48, 48, 3), dtype=np.uint8)
    all_images, all_masks, all_kinds = synthetic_validation_set(images, 7, 2)
    some_images, some_masks, some_kinds = synthetic_validation_set(images, 7, 2, only=range(1, 3))
    assert some_kinds == all_kinds[2:6]
    assert np.array_equal(some_images, all_images[2:6])
    assert np.array_equal(some_masks, all_masks[2:6])


def test_a_learnt_projection_separates_synthetic_defects_better_than_a_random_projection(data: str) -> None:
    """Compares the change that a defect causes with the difference between two normal images."""
    config = small_config(
        data,
        "unused",
        model={"image_alignment": {"group": "none"}},
        density={"num_channels": 16, "reduction": "discriminant"},
    )
    plan = plan_category(config, "gear")
    net = build_net(config.model).eval()
    reduction = ChannelReduction(net.backbone.spec.channels, config.density, 0)
    batches = list(build_shard(config, "gear", plan, 0, 1).fit_batches())
    random, count = reduction.projection.clone(), len(plan.fit_rows)
    learnt = learn_projection(net, reduction, batches, CPU, count, range(count), seed=0).projection
    assert not learnt.requires_grad  # otherwise the autograd graph would keep all features in memory
    full_reduction = build_full_reduction(reduction, net.backbone.spec.channels)
    images = torch.cat(batches)
    defective_images, _, _ = synthetic_validation_set(images.numpy(), 99, 1)

    num_channels = full_reduction.num_channels

    def contrast(projection: Tensor) -> float:
        with torch.inference_mode():
            normal, defective = (
                torch.einsum(
                    "kc,bchw->bkhw", projection, embed(net, full_reduction, to_images(batch, CPU))[0][:, :num_channels]
                )
                for batch in (images, torch.from_numpy(defective_images))
            )
        change = (defective - normal).square().sum(dim=1).amax(dim=(1, 2))
        difference = (normal[1:] - normal[:-1]).square().sum(dim=1).mean()
        return float((change / difference).log().mean())

    assert contrast(learnt) > contrast(random)


def test_the_same_seed_learns_the_same_projection_and_a_bundle_stores_it(data: str, tmp_path: Path) -> None:
    config = small_config(
        data,
        tmp_path,
        model={"image_alignment": {"group": "none"}},
        density={"reduction": "discriminant"},
        scoring={"image_score": "profile"},
    )
    plan = plan_category(config, "gear")
    results = [fit(config, build_shard(config, "gear", plan, 0, 1), len(plan.fit_rows), CPU) for _ in range(2)]
    assert torch.equal(results[0].reduction.projection, results[1].reduction.projection)
    assert results[0].reduction.projection.shape == (32, 448)
    place = make_bundle(config)
    detector = build_detector(config, results[0].net, results[0].reduction, results[0].statistics)
    images = torch.cat(list(build_shard(config, "gear", plan, 0, 1).holdout_batches()))
    expected, read = detector(images), read_bundle(place).detector(images)
    torch.testing.assert_close(read.score, expected.score, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(read.anomaly_map, expected.anomaly_map, rtol=1e-3, atol=1e-2)


def test_a_projection_of_one_image_is_refused(data: str) -> None:
    config = small_config(data, "unused", model={"image_alignment": {"group": "none"}})
    plan = plan_category(config, "gear")
    run = CategoryFit(config, build_shard(config, "gear", plan, 0, 1), len(plan.fit_rows), CPU)
    image = next(iter(run.shard.fit_batches()))[:1]
    with pytest.raises(ValueError, match="got 1"):
        learn_projection(run.net, run.reduction, [image], CPU, 1, [0], 0)


# Shared metrics


@pytest.fixture(scope="module")
def two_bundles(data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[str]]:
    """Makes bundles of both categories, each with its own projection."""
    storage = tmp_path_factory.mktemp("shared")
    config = small_config(
        data,
        storage,
        model={"image_alignment": {"group": "none"}},
        density={"reduction": "discriminant"},
    )
    return config, [make_bundle(config, category) for category in CATEGORIES]


def with_metric(config: Config, metric: Path | str, **model: Any) -> Config:
    density = config.density.model_copy(update={"metric": str(metric)})
    return config.model_copy(update={"density": density, "model": config.model.model_copy(update=model)})


def test_a_shared_metric_is_the_mean_of_the_scatter_matrices_of_the_categories(
    two_bundles: tuple[Config, list[str]], tmp_path: Path
) -> None:
    config, bundles = two_bundles
    place = str(tmp_path / "metric.safetensors")
    assert share_metric(bundles, place) == sorted(CATEGORIES)
    scatters = [read_statistics(bundle).scatter for bundle in bundles]
    expected = sum(scatter / scatter[0].diagonal().mean() for scatter in scatters) / 2  # type: ignore[index,union-attr]
    torch.testing.assert_close(read_shared_metric(with_metric(config, place)), expected)


def test_a_category_with_a_shared_metric_uses_its_directions_and_paints_no_defects(
    two_bundles: tuple[Config, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, bundles = two_bundles
    place = str(tmp_path / "metric.safetensors")
    share_metric(bundles[:1], place)
    monkeypatch.setattr("focus_ray.fitting.projection.synthetic_validation_set", None)
    result = fit_alone(with_metric(config, place), CATEGORIES[1])
    shared = read_statistics(bundles[0]).scatter
    assert shared is not None
    directions = discriminant_directions(shared[0].double(), shared[1].double(), config.density.num_channels // 2)
    learnt = result.reduction.projection[: len(directions)]
    ratio = learnt.norm() / directions.norm()
    torch.testing.assert_close(learnt, directions * ratio, rtol=1e-3, atol=1e-3)
    assert result.statistics.scatter is not None
    assert not result.statistics.scatter[1].any()


def test_a_metric_of_another_network_or_a_file_that_is_no_metric_is_refused(
    two_bundles: tuple[Config, list[str]], tmp_path: Path
) -> None:
    config, bundles = two_bundles
    place = tmp_path / "metric.safetensors"
    share_metric(bundles, str(place))
    with pytest.raises(ConfigError, match=r"model\.padding=reflect.* model\.padding=zeros"):
        read_shared_metric(with_metric(config, place, padding="zeros"))
    with pytest.raises(ConfigError, match=r"density\.metric=.*nowhere"):
        read_shared_metric(with_metric(config, tmp_path / "nowhere"))
    (tmp_path / "text").write_text("no metric")
    with pytest.raises(ConfigError, match=r"density\.metric=.*text"):
        read_shared_metric(with_metric(config, tmp_path / "text"))
    with_shared = make_bundle(with_metric(config, place), CATEGORIES[0], place=tmp_path / "with_shared")
    with pytest.raises(BundleError, match="with_shared"):
        share_metric([with_shared], str(tmp_path / "other"))
    with pytest.raises(BundleError, match="another bundle has the same category"):
        share_metric([bundles[0], bundles[0]], str(tmp_path / "other"))


def test_statistics_from_cached_embeddings_equal_statistics_from_a_new_pass(data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path, density={"num_channels": 16, "reduction": "discriminant", "coreset": 32})
    plan = plan_category(config, "gear")
    net = build_net(config.model).eval()
    reduction = ChannelReduction(net.backbone.spec.channels, config.density, 0)
    batches = list(build_shard(config, "gear", plan, 0, 1).fit_batches())
    count = len(plan.fit_rows)
    learnt = learn_projection(net, reduction, batches, CPU, count, range(count), seed=0)
    reduction.projection.copy_(learnt.projection)
    assert learnt.cache is not None
    partial_cache = learnt.cache._replace(row={number: row for number, row in learnt.cache.row.items() if number % 3})
    uncached, partly_cached, cached = (
        compute_statistics(net, reduction, batches, CPU, range(count), 0, cache)
        for cache in (None, partial_cache, learnt.cache)
    )
    for statistics in (partly_cached, cached):
        assert uncached.bank is not None
        assert statistics.bank is not None
        torch.testing.assert_close(statistics.bank.float(), uncached.bank.float(), atol=0.02, rtol=0.01)
        torch.testing.assert_close(statistics.moments.mean, uncached.moments.mean, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("count", [1, 3, 8, 11])
def test_the_embedding_of_an_image_does_not_depend_on_the_other_images(data: str, tmp_path: Path, count: int) -> None:
    """Otherwise a coreset would depend on the number of workers. This includes image alignment."""
    config = small_config(
        data, tmp_path, density={"coreset": 32}, model={"image_alignment": {"group": "rotation_translation"}}
    )
    plan = plan_category(config, "gear")
    run = CategoryFit(config, build_shard(config, "gear", plan, 0, 1), len(plan.fit_rows), CPU)
    run.fit_image_aligner()
    assert isinstance(run.net.image_aligner, CongealingAligner)
    run.net.image_aligner.enabled.fill_(True)
    run.net.eval()
    images = to_images(torch.cat(list(run.shard.fit_batches())), CPU)
    whole, theta = embed(run.net, run.reduction, images, pad_batches=True)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(count))[:count]
    embedding, chosen_theta = embed(run.net, run.reduction, images[chosen], pad_batches=True)
    assert theta is not None
    assert chosen_theta is not None
    assert torch.equal(chosen_theta, theta[chosen])
    assert torch.equal(embedding, whole[chosen])
