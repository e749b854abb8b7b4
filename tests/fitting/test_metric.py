"""The discriminant metric: the generalised eigenproblem, residuals against a slow search, sums over workers."""

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
from focus_ray.config import Config, DensityConfig
from focus_ray.data.shards import build_shard
from focus_ray.data.split import plan_category
from focus_ray.errors import BundleError, ConfigError
from focus_ray.evaluation.defects import synthetic_validation_set
from focus_ray.fitting.fit import Run, build_detector, fit
from focus_ray.fitting.metric import FOLDS, RIDGE, ResidualScatter, discriminant, full_reduction, metric_pass
from focus_ray.fitting.passes import statistics_pass
from focus_ray.fitting.scoring import embed, to_images
from focus_ray.fitting.shared_metric import read_shared_metric
from focus_ray.model.alignment.congealing import CongealingAligner
from focus_ray.model.network import build_net
from focus_ray.model.reduction import ChannelReduction

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


def scatter(seed: int, channels: int = 6, samples: int = 200, scale: float = 1.0) -> Tensor:
    values = scale * torch.randn(samples, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.t() @ values / samples


def test_the_directions_are_those_of_scipys_generalised_eigenproblem() -> None:
    normal, defective = scatter(0), scatter(1, scale=3.0)
    found = discriminant(normal, defective, 4)
    ridged = normal + RIDGE * normal.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    values, vectors = scipy.linalg.eigh(defective.numpy(), ridged.numpy())
    expected = (vectors[:, ::-1][:, :4] * np.sqrt(np.log(values[::-1][:4]))).T
    signs = np.sign((expected * found.numpy()).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found.numpy(), expected * signs, rtol=1e-4, atol=1e-6)


def test_directions_in_which_defects_vary_no_more_than_normals_are_left_out() -> None:
    normal = torch.eye(5, dtype=torch.float64)
    defective = torch.diag(torch.tensor([9.0, 0.5, 4.0, 0.1, 1.0], dtype=torch.float64))
    found = discriminant(normal, defective, 5)
    assert (found.norm(dim=1) > 0).tolist() == [True, True, False, False, False]
    assert found[0].abs().argmax() == 0
    assert found[1].abs().argmax() == 2
    assert discriminant(normal, defective, 8).shape == (8, 5)


def test_residuals_are_those_of_a_slow_search_over_other_images() -> None:
    bank = torch.randn(5, 7, 4, 4, generator=torch.Generator().manual_seed(3))
    sums = ResidualScatter(bank, DensityConfig(window=3, num_channels=7), seed=0)
    own = torch.tensor([2, 4])
    found = sums._residuals(bank[own], own)
    for row, image in enumerate(own.tolist()):
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
                distances = [float((sums.search @ (query - one)).square().sum()) for one in near]
                expected = query - near[int(np.argmin(distances))]
                torch.testing.assert_close(found[row, y, x], expected, rtol=1e-4, atol=1e-4)


def test_sums_of_parts_are_the_sums_of_all() -> None:
    bank = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(5))
    config = DensityConfig(num_channels=5)
    whole, one, other = (ResidualScatter(bank, config, seed=1) for _ in range(3))
    for number in range(6):
        own = torch.tensor([number])
        for sums in (whole, one if number < 3 else other):
            sums.add_normal(own)
            sums.add_defective(bank[own] + number, own, torch.ones(1, 4, 4, dtype=torch.bool))
    torch.testing.assert_close(one.sums + other.sums, whole.sums)
    assert torch.equal(one.counts + other.counts, whole.counts)
    assert whole.counts.sum(dim=0).tolist() == [6 * 16, 6 * 16]


def test_a_metric_without_a_fold_is_that_of_the_other_images_residuals() -> None:
    bank = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(5))
    covered = torch.ones(1, 4, 4, dtype=torch.bool)
    whole, others = (ResidualScatter(bank, DensityConfig(num_channels=4), seed=1) for _ in range(2))
    for number in range(6):
        own = torch.tensor([number])
        for sums in (whole, others):
            if sums is whole or number % FOLDS != 0:
                sums.add_normal(own)
                sums.add_defective(3 * bank[own].flip(2), own, covered)
    torch.testing.assert_close(whole.projections_of_folds(4)[0], others.projection(4)[0])


def test_copies_made_of_some_images_are_those_made_with_all() -> None:
    images = np.random.default_rng(0).integers(0, 255, (4, 48, 48, 3), dtype=np.uint8)
    all_images, all_masks, all_kinds = synthetic_validation_set(images, 7, 2)
    some_images, some_masks, some_kinds = synthetic_validation_set(images, 7, 2, only=range(1, 3))
    assert some_kinds == all_kinds[2:6]
    assert np.array_equal(some_images, all_images[2:6])
    assert np.array_equal(some_masks, all_masks[2:6])


def test_it_tells_the_defects_it_learns_from_better_than_a_plain_projection(data: str) -> None:
    """The law it is made for: defects stand out against the spread of normal images more than at random."""
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
    plain, count = reduction.projection.clone(), len(plan.fit_rows)
    learnt = metric_pass(net, reduction, batches, CPU, count, range(count), seed=0).projection
    assert not learnt.requires_grad  # a graph of all that was looked at would be kept with it
    full = full_reduction(reduction, net.backbone.spec.channels)
    images = torch.cat(batches)
    made, _, _ = synthetic_validation_set(images.numpy(), 99, 1)

    def contrast(projection: Tensor) -> float:
        with torch.inference_mode():
            normal, defective = (
                torch.einsum(
                    "kc,bchw->bkhw", projection, embed(net, full, to_images(batch, CPU))[0][:, : full.num_channels]
                )
                for batch in (images, torch.from_numpy(made))
            )
        change = (defective - normal).square().sum(dim=1).amax(dim=(1, 2))
        among = (normal[1:] - normal[:-1]).square().sum(dim=1).mean()
        return float((change / among).log().mean())

    assert contrast(learnt) > contrast(plain)


def test_the_same_seed_learns_the_same_metric_and_a_bundle_keeps_it(data: str, tmp_path: Path) -> None:
    config = small_config(
        data,
        tmp_path,
        model={"image_alignment": {"group": "none"}},
        density={"reduction": "discriminant"},
        scoring={"image_score": "profile"},
    )
    plan = plan_category(config, "gear")
    found = [fit(config, build_shard(config, "gear", plan, 0, 1), len(plan.fit_rows), CPU) for _ in range(2)]
    assert torch.equal(found[0].reduction.projection, found[1].reduction.projection)
    assert found[0].reduction.projection.shape == (32, 448)
    place = make_bundle(config)
    detector = build_detector(config, found[0].net, found[0].reduction, found[0].statistics)
    images = torch.cat(list(build_shard(config, "gear", plan, 0, 1).holdout_batches()))
    expected, read = detector(images), read_bundle(place).detector(images)
    torch.testing.assert_close(read.score, expected.score, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(read.anomaly_map, expected.anomaly_map, rtol=1e-3, atol=1e-2)


def test_one_image_is_too_few(data: str) -> None:
    config = small_config(data, "unused", model={"image_alignment": {"group": "none"}})
    plan = plan_category(config, "gear")
    run = Run(config, build_shard(config, "gear", plan, 0, 1), len(plan.fit_rows), CPU)
    one = next(iter(run.shard.fit_batches()))[:1]
    with pytest.raises(ValueError, match="a metric needs at least 2 normal images, got 1"):
        metric_pass(run.net, run.reduction, [one], CPU, 1, [0], 0)


# Shared over categories


@pytest.fixture(scope="module")
def of_two(data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[str]]:
    """Bundles of both categories, each with a metric of its own."""
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


def test_a_shared_metric_is_the_mean_of_the_categories_own(of_two: tuple[Config, list[str]], tmp_path: Path) -> None:
    config, bundles = of_two
    place = str(tmp_path / "metric.safetensors")
    assert share_metric(bundles, place) == sorted(CATEGORIES)
    scatters = [read_statistics(bundle).scatter for bundle in bundles]
    expected = sum(scatter / scatter[0].diagonal().mean() for scatter in scatters) / 2  # type: ignore[index,union-attr]
    found = read_shared_metric(with_metric(config, place))
    torch.testing.assert_close(found, expected)


def test_a_category_given_a_metric_takes_its_directions_and_makes_no_defects(
    of_two: tuple[Config, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, bundles = of_two
    place = str(tmp_path / "metric.safetensors")
    share_metric(bundles[:1], place)
    monkeypatch.setattr("focus_ray.fitting.metric.synthetic_validation_set", None)
    result = fit_alone(with_metric(config, place), CATEGORIES[1])
    own = read_statistics(bundles[0]).scatter
    assert own is not None
    directions = discriminant(own[0].double(), own[1].double(), config.density.num_channels // 2)
    found = result.reduction.projection[: len(directions)]
    ratio = found.norm() / directions.norm()
    torch.testing.assert_close(found, directions * ratio, rtol=1e-3, atol=1e-3)
    assert result.statistics.scatter is not None
    assert not result.statistics.scatter[1].any()


def test_a_metric_of_another_network_or_no_metric_is_refused(of_two: tuple[Config, list[str]], tmp_path: Path) -> None:
    config, bundles = of_two
    place = tmp_path / "metric.safetensors"
    share_metric(bundles, str(place))
    with pytest.raises(ConfigError, match=r"made with model\.padding=reflect, this run has zeros: give the file that"):
        read_shared_metric(with_metric(config, place, padding="zeros"))
    with pytest.raises(ConfigError, match=r"density\.metric=.*nowhere: cannot be read .*give the file that"):
        read_shared_metric(with_metric(config, tmp_path / "nowhere"))
    (tmp_path / "text").write_text("no metric")
    with pytest.raises(ConfigError, match=r"text: not a shared metric: give the file"):
        read_shared_metric(with_metric(config, tmp_path / "text"))
    given = make_bundle(with_metric(config, place), CATEGORIES[0], place=tmp_path / "given")
    with pytest.raises(BundleError, match="keeps no metric of its own: train it with"):
        share_metric([given], str(tmp_path / "other"))
    with pytest.raises(BundleError, match="is there twice: name each category once"):
        share_metric([bundles[0], bundles[0]], str(tmp_path / "other"))


def test_statistics_of_images_that_the_metric_looked_at_need_no_second_pass(data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path, density={"num_channels": 16, "reduction": "discriminant", "coreset": 32})
    plan = plan_category(config, "gear")
    net = build_net(config.model).eval()
    reduction = ChannelReduction(net.backbone.spec.channels, config.density, 0)
    batches = list(build_shard(config, "gear", plan, 0, 1).fit_batches())
    count = len(plan.fit_rows)
    learnt = metric_pass(net, reduction, batches, CPU, count, range(count), seed=0)
    reduction.projection.copy_(learnt.projection)
    assert learnt.known is not None
    some = learnt.known._replace(row={number: row for number, row in learnt.known.row.items() if number % 3})
    whole, mixed, none = (
        statistics_pass(net, reduction, batches, CPU, range(count), 0, known) for known in (None, some, learnt.known)
    )
    for found in (mixed, none):
        assert whole.bank is not None
        assert found.bank is not None
        torch.testing.assert_close(found.bank.float(), whole.bank.float(), atol=0.02, rtol=0.01)
        torch.testing.assert_close(found.moments.mean, whole.moments.mean, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("count", [1, 3, 8, 11])
def test_an_images_embedding_hangs_on_no_other(data: str, tmp_path: Path, count: int) -> None:
    """Or a coreset chosen by it would be another with another number of workers. Image alignment included."""
    config = small_config(
        data, tmp_path, density={"coreset": 32}, model={"image_alignment": {"group": "rotation_translation"}}
    )
    plan = plan_category(config, "gear")
    run = Run(config, build_shard(config, "gear", plan, 0, 1), len(plan.fit_rows), CPU)
    run.align()
    assert isinstance(run.net.image_aligner, CongealingAligner)
    run.net.image_aligner.enabled.fill_(True)
    run.net.eval()
    images = to_images(torch.cat(list(run.shard.fit_batches())), CPU)
    whole, theta = embed(run.net, run.reduction, images, alike=True)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(count))[:count]
    found, moved = embed(run.net, run.reduction, images[chosen], alike=True)
    assert theta is not None
    assert moved is not None
    assert torch.equal(moved, theta[chosen])
    assert torch.equal(found, whole[chosen])
