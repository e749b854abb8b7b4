"""Selection without labels: it scores every epoch on its own validation images and keeps the best network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from small_set import NUM_TRAIN, ingest_parts, small_config

from focus_ray.errors import DataError
from focus_ray.features.network import build_net
from focus_ray.fitting.fit import FitResult, build_detector, fit
from focus_ray.fitting.passes import compute_statistics, compute_validation_figures
from focus_ray.fitting.selection import DEFECTS_PER_IMAGE, validation_figures, validation_images
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import build_shard
from focus_ray.fitting.split import plan_category
from focus_ray.metrics.metrics import image_auroc
from focus_ray.metrics.pixels import PixelCurve
from focus_ray.samples.write import draw_sample
from focus_ray.seeds import derive_seed

CPU = torch.device("cpu")
EPOCHS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


def selection_config(data: str, selection: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    chosen = {"enabled": True, "fraction": 0.2, **(selection or {})}
    model = {"image_alignment": {"group": "none"}}
    return small_config(data, "unused", selection=chosen, **{"model": model, **sections})


def run(config: Config) -> FitResult:
    plan = plan_category(config, "gear")
    return fit(config, build_shard(config, "gear", plan, 0, 1), len(plan.fit_rows), CPU)


@pytest.fixture(scope="module")
def trained(data: str) -> Iterator[tuple[Config, FitResult]]:
    """Trains three epochs with a learning rate that changes the score."""
    config = selection_config(data, train={"epochs": EPOCHS, "learning_rate": 0.02})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("focus_ray.fitting.fit.MIN_GAIN", 0.0)
        yield config, run(config)


def normal_images(count: int, size_px: int = 64) -> np.ndarray:
    return np.stack([draw_sample("board", 0, "train", index, size_px)[0] for index in range(count)])


# The plan


@pytest.mark.parametrize("method", ["split", "cross"])
def test_validation_images_are_in_no_other_part(data: str, method: str) -> None:
    plan = plan_category(selection_config(data, calibration={"method": method}), "gear")
    parts = [plan.fit_rows, plan.validation_rows, plan.holdout_rows]
    together = [row for part in parts for row in part]
    assert len(together) == len(set(together)) == NUM_TRAIN
    assert len(plan.validation_rows) == round(0.2 * NUM_TRAIN)
    assert len(plan.folds) == len(plan.fit_rows)


def test_validation_takes_no_more_images_than_it_may(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("focus_ray.fitting.split.MAX_VALIDATION_IMAGES", 3)
    plan = plan_category(selection_config(data, {"fraction": 0.5}), "gear")
    assert len(plan.validation_rows) == 3


def test_without_selection_nothing_is_held_out_for_it(data: str) -> None:
    assert len(plan_category(small_config(data, "unused"), "gear").validation_rows) == 0


def test_selection_does_not_change_the_calibration_images(data: str) -> None:
    plain = plan_category(small_config(data, "unused"), "gear")
    assert plan_category(selection_config(data), "gear").holdout_rows.tolist() == plain.holdout_rows.tolist()


def test_a_set_too_small_to_validate_on_is_refused(data: str) -> None:
    config = selection_config(data, {"fraction": 0.85})
    with pytest.raises(DataError, match=r"selection\.enabled=false"):
        plan_category(config, "gear")


# A run


def test_every_epoch_and_the_untrained_network_are_judged(trained: tuple[Config, FitResult]) -> None:
    _, result = trained
    assert [entry["epoch"] for entry in result.notes.selection] == list(range(EPOCHS + 1))
    assert len({entry["score"] for entry in result.notes.selection}) > 1
    for entry in result.notes.selection:
        assert entry["score"] == pytest.approx((entry["image_auroc"] + entry["aupro"]) / 2)


def test_the_network_of_the_best_score_is_kept(trained: tuple[Config, FitResult]) -> None:
    config, result = trained
    shard = build_shard(config, "gear", plan_category(config, "gear"), 0, 1)
    positions = range(config.density.max_images)
    statistics = compute_statistics(result.net, result.reduction, shard.fit_batches(), CPU, positions)
    detector = build_detector(config, result.net, result.reduction, statistics)
    normals = torch.cat(list(shard.validation_batches())).numpy()
    figures = compute_validation_figures(
        detector, *validation_images(normals, seed=derive_seed(config.train.seed, "synthetic defects", 0))
    )
    assert figures["score"] == pytest.approx(max(entry["score"] for entry in result.notes.selection), abs=1e-6)


def test_the_untrained_network_is_kept_if_no_epoch_gains_enough(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("focus_ray.fitting.fit.MIN_GAIN", 1.0)
    config = selection_config(data, train={"epochs": 1, "learning_rate": 0.05})
    torch.manual_seed(config.train.seed)
    untrained = build_net(config.model).state_dict()
    selected = run(config).net.state_dict()
    assert all(torch.equal(selected[name], value) for name, value in untrained.items())


@pytest.mark.parametrize("kind", ["gaussian", "nearest"])
def test_validation_images_join_the_density(data: str, kind: str) -> None:
    config = selection_config(data, density={"kind": kind})
    plan = plan_category(config, "gear")
    result = run(config)
    expected = len(plan.fit_rows) + len(plan.validation_rows)
    assert result.statistics.moments.count == expected
    assert result.statistics.bank is None or len(result.statistics.bank) == expected


def test_aligning_is_judged_against_not_aligning(data: str) -> None:
    alignment = {"group": "rotation", "min_drop": 0.0}
    result = run(selection_config(data, model={"image_alignment": alignment}))
    scores = {
        entry["image_alignment"]: entry["score"] for entry in result.notes.selection if "image_alignment" in entry
    }
    assert set(scores) == {"rotation", "none"}
    assert result.notes.alignment is not None
    assert result.notes.alignment.enabled == (scores["rotation"] > scores["none"])
    assert bool(result.net.image_aligner.enabled) == result.notes.alignment.enabled  # type: ignore[union-attr]


def test_without_selection_nothing_is_judged(data: str) -> None:
    assert run(small_config(data, "unused")).notes.selection == []


# Images and figures


def test_only_defective_copies_have_a_mask() -> None:
    normals = normal_images(4)
    images, masks = validation_images(normals, seed=1)
    assert images.shape == (4 * (1 + DEFECTS_PER_IMAGE), 64, 64, 3)
    assert masks.shape == images.shape[:3]
    assert np.array_equal(images[:4], normals)
    assert not masks[:4].any()
    assert masks[4:].any(axis=(1, 2)).all()


def test_validation_images_depend_on_the_seed_only() -> None:
    normals = normal_images(2)
    first, again, other = (validation_images(normals, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(array, repeated_array) for array, repeated_array in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_one_image_is_not_enough_to_judge_on() -> None:
    with pytest.raises(DataError, match="got 1"):
        validation_images(normal_images(1), seed=0)


def test_the_score_is_the_mean_of_image_auroc_and_aupro() -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 16, 16), dtype=bool)
    masks[3:, 4:9, 6:12] = True
    maps = (rng.random(masks.shape) + 0.4 * masks).astype(np.float32)
    scores = maps.max(axis=(1, 2))
    figures = validation_figures(masks, scores, maps)
    curve = PixelCurve.of(masks, maps, regions=True)
    assert figures["image_auroc"] == image_auroc([0, 0, 0, 1, 1, 1], scores)
    assert figures["aupro"] == curve.aupro(0.3)
    assert figures["pixel_auroc"] == curve.auroc()
    assert figures["score"] == pytest.approx((figures["image_auroc"] + figures["aupro"]) / 2)
