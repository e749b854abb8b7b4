"""Selection without labels: every interval is scored on validation images, and the best network is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_set import NUM_TRAIN, fit_alone, small_config

from focus_ray.errors import DataError
from focus_ray.features.network import build_network
from focus_ray.fitting.fit import FitResult, build_detector
from focus_ray.fitting.passes import compute_image_statistics, validate_detector
from focus_ray.fitting.selection import DEFECTS_PER_IMAGE, MIN_GAIN, compute_validation_metrics, make_validation_images
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import build_shard
from focus_ray.fitting.split import compute_split_plan
from focus_ray.metrics.metrics import image_auroc
from focus_ray.metrics.pixels import PixelCurve
from focus_ray.samples.write import draw_sample
from focus_ray.seeds import derive_seed

CPU = torch.device("cpu")
STEPS = 3
NORMALS = np.stack([draw_sample("board", 0, "train", index, 64)[0] for index in range(4)])


def make_selection_config(parts: str, **sections: dict[str, Any]) -> Config:
    defaults = {"selection": {"fraction": 0.2}}
    return small_config(parts, "unused", **{**defaults, **sections})


@pytest.fixture(scope="module")
def trained(parts: str) -> tuple[Config, FitResult]:
    """Trains three intervals of one step with a learning rate that changes the score; any gain is enough."""
    config = make_selection_config(parts, train={"steps": STEPS, "learning_rate": 0.02})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("focus_ray.fitting.fit.MIN_GAIN", 0.0)
        return config, fit_alone(config)


@pytest.mark.parametrize("method", ["split", "cross"])
def test_validation_images_are_in_no_other_part(parts: str, method: str) -> None:
    plan = compute_split_plan(make_selection_config(parts, calibration={"method": method}), "gear")
    together = [row for part in (plan.fit.rows, plan.validation.rows, plan.holdout.rows) for row in part]
    assert len(together) == len(set(together)) == NUM_TRAIN
    assert len(plan.validation.rows) == round(0.2 * NUM_TRAIN)
    assert len(plan.folds) == len(plan.fit.rows)


def test_without_selection_nothing_is_held_out_or_judged_and_the_calibration_images_are_the_same(parts: str) -> None:
    config = small_config(parts, "unused")
    plain, selecting = compute_split_plan(config, "gear"), compute_split_plan(make_selection_config(parts), "gear")
    assert len(plain.validation.rows) == 0
    assert selecting.holdout.rows.tolist() == plain.holdout.rows.tolist()
    assert fit_alone(config).notes.selection == []


def test_validation_takes_no_more_images_than_it_may(parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("focus_ray.fitting.split.MAX_VALIDATION_IMAGES", 3)
    assert len(compute_split_plan(make_selection_config(parts), "gear").validation.rows) == 3


def test_a_set_too_small_to_validate_on_is_refused(parts: str) -> None:
    config = make_selection_config(parts, selection={"fraction": 0.85})
    with pytest.raises(DataError, match=r"selection\.fraction=0"):
        compute_split_plan(config, "gear")


def test_every_interval_and_the_untrained_network_are_judged_and_the_best_is_kept(
    trained: tuple[Config, FitResult],
) -> None:
    config, result = trained
    scores = [entry["score"] for entry in result.notes.selection]
    assert [entry["step"] for entry in result.notes.selection] == list(range(STEPS + 1))
    assert len(set(scores)) > 1
    shard = build_shard(config, "gear", compute_split_plan(config, "gear"), 0, 1)
    bank_images = range(config.density.max_images)
    statistics = compute_image_statistics(
        result.detector.net, result.detector.reduction, shard.read_batches("fit"), CPU, bank_images
    )
    detector = build_detector(config, result.detector.net, result.detector.reduction, statistics)
    normals = torch.cat(list(shard.read_batches("validation"))).numpy()
    images = make_validation_images(normals, derive_seed(config.train.seed, "synthetic defects", 0))
    assert validate_detector(detector, *images)["score"] == pytest.approx(max(scores), abs=1e-6)


def test_the_untrained_network_is_kept_if_no_interval_gains_enough(parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MIN_GAIN > 0
    monkeypatch.setattr("focus_ray.fitting.fit.MIN_GAIN", 1.0)
    config = make_selection_config(parts, train={"steps": 1, "learning_rate": 0.05})
    torch.manual_seed(config.train.seed)
    untrained, selected = build_network(config.model).state_dict(), fit_alone(config).detector.net.state_dict()
    assert all(torch.equal(selected[name], value) for name, value in untrained.items() if name in selected)


@pytest.mark.parametrize("kind", ["gaussian", "nearest"])
def test_validation_images_join_the_density(parts: str, kind: str) -> None:
    config = make_selection_config(parts, density={"kind": kind})
    plan, statistics = compute_split_plan(config, "gear"), fit_alone(config).statistics
    expected = len(plan.fit.rows) + len(plan.validation.rows)
    assert statistics.moments.count == expected
    assert statistics.bank is None or len(statistics.bank) == expected


def test_aligning_is_judged_against_not_aligning(parts: str) -> None:
    result = fit_alone(make_selection_config(parts, model={"image_alignment": {"group": "rotation", "min_drop": 0.0}}))
    scores = {
        entry["image_alignment"]: entry["score"] for entry in result.notes.selection if "image_alignment" in entry
    }
    assert set(scores) == {"rotation", "none"}
    assert result.notes.alignment.enabled == (scores["rotation"] > scores["none"])
    assert bool(result.detector.net.image_aligner.enabled) == result.notes.alignment.enabled


def test_only_defective_copies_have_a_mask_and_they_depend_on_the_seed_only() -> None:
    images, masks = make_validation_images(NORMALS, seed=1)
    assert images.shape == (4 * (1 + DEFECTS_PER_IMAGE), 64, 64, 3)
    assert np.array_equal(images[:4], NORMALS)
    assert masks.any(axis=(1, 2)).tolist() == [False] * 4 + [True] * 4 * DEFECTS_PER_IMAGE
    assert np.array_equal(images, make_validation_images(NORMALS, seed=1)[0])
    assert not np.array_equal(images, make_validation_images(NORMALS, seed=2)[0])
    with pytest.raises(DataError, match="got 1"):
        make_validation_images(NORMALS[:1], seed=0)


def test_the_score_is_the_mean_of_image_auroc_and_aupro() -> None:
    masks = np.zeros((6, 16, 16), dtype=bool)
    masks[3:, 4:9, 6:12] = True
    maps = (np.random.default_rng(0).random(masks.shape) + 0.4 * masks).astype(np.float32)
    scores = maps.max(axis=(1, 2))
    curve, auroc = PixelCurve.from_maps(masks, maps), image_auroc([0, 0, 0, 1, 1, 1], scores)
    figures = compute_validation_metrics(masks, scores, maps)
    assert (figures["image_auroc"], figures["aupro"], figures["pixel_auroc"]) == (
        auroc,
        curve.aupro(0.3),
        curve.auroc(),
    )
    assert figures["score"] == pytest.approx((auroc + curve.aupro(0.3)) / 2)
